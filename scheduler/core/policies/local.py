"""What schedulers see that know each instance's own caches and pull from no other: input of the baselines. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.core.cluster import Instance
from scheduler.core.options import Appraiser, Option, Prospect

#: What a node's SSD is called as a source, behind the node's own name.
SSD_SUFFIX = ".ssd"


@dataclass(frozen=True, slots=True)
class OwnBlocks:
    """Leading blocks of a prompt that an instance need not compute, each counted where it is nearest."""

    device: int
    host: int
    disk: int

    @property
    def total(self) -> int:
        return self.device + self.host + self.disk


def own_sources(instance: Instance) -> tuple[str, ...]:
    """What an instance may load from: its node's memory, then its node's SSD."""
    node = instance.info.node_source_id
    return (node, node + SSD_SUFFIX) if node else ()


def own_blocks(appraiser: Appraiser, instance: Instance) -> OwnBlocks:
    """Blocks in an instance's own memory, and going on from these in its node's memory and on its node's SSD."""
    prefix = appraiser.prefix
    device = prefix.own_blocks(instance.info.hbm_source_id)
    if not appraiser.request.use_pool or prefix.covered() <= device:
        return OwnBlocks(device, 0, 0)
    pull = prefix.pull_from(instance, device, own_sources(instance), appraiser.costs, appraiser.now_us)
    if pull is None:
        return OwnBlocks(device, 0, 0)
    host = 0
    for first, end, source, _ in pull.segments[0]:
        if source.id == instance.info.node_source_id:
            host += max(min(end, pull.reach) - first, 0)
    return OwnBlocks(device, host, pull.reach - device - host)


def own_prospect(appraiser: Appraiser, instance: Instance) -> Prospect:
    """Prefill on an instance with what it has in its own tiers, whatever loading that costs; nothing from others."""
    return appraiser.prospect_from(instance, own_sources(instance))


def active_requests(appraiser: Appraiser, instance: Instance) -> int:
    """Requests placed on an instance and not ended, those that are to be prefilled there only among them."""
    held = appraiser.book.on(instance.id)
    waiting = sum(owner not in held.decoding for owner in held.queue)
    return len(held.decoding) + waiting


def by_role(
    appraiser: Appraiser,
    instances: Sequence[Instance],
    order: Callable[[Instance], tuple[Any, ...]],
    prefill_order: Callable[[Instance], tuple[Any, ...]],
    splits: Callable[[Instance], bool],
) -> Iterator[Option]:
    """One option for each instance that decodes, in `order`.

    It is split where there are instances that only prefill, the first in `prefill_order` that can hand blocks over is
    taken, and `splits` says yes to the decode instance; otherwise it stays on one instance.
    """
    prefills = sorted((i for i in instances if not i.decodes()), key=prefill_order)
    for decode in sorted((i for i in instances if i.decodes()), key=order):
        prefill = None
        if prefills and splits(decode):
            prefill = next((p for p in prefills if not appraiser.handoff_obstacle(p, decode)), None)
        if prefill is None:
            yield appraiser.colocated(decode, own_prospect(appraiser, decode))
        else:
            yield appraiser.split(prefill, decode, own_prospect(appraiser, prefill))
