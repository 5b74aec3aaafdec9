"""A request as the columns of a fleet take it: what it costs anywhere at least, and where that is least. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvpool.core.ids import Fidelity
from scheduler.core import bounding
from scheduler.core.arrivals import WINDOW_US
from scheduler.core.bounding import KV_LEFT, Asked, Floats, HandOff, Ints
from scheduler.core.cluster import Instance
from scheduler.core.cost import CostBook
from scheduler.core.fleet import Fleet
from scheduler.core.options import Appraiser, whole_blocks
from scheduler.core.waiting import Lane, Order

TIERS = ("", "-hbm", "-ssd")
#: Instances and their bounds, the least first.
Bounded = list[tuple[float, Instance]]


class LinkFloor(NamedTuple):
    """The best that any link is believed to do."""

    latency_us: float
    here_us: float  # a byte from the same host
    away_us: float  # a byte from another

    @classmethod
    def of(cls, costs: CostBook) -> LinkFloor:
        here, away = ([costs.floor(place + tier) for tier in TIERS] for place in ("local", "remote"))
        latency_us = min([latency for latency, _ in (*here, *away)])
        return cls(latency_us, min([per_byte for _, per_byte in here]), min([per_byte for _, per_byte in away]))


@dataclass(slots=True)
class Screen:
    """One request against all rows of a fleet. `found` is the fleet's: good until the next request."""

    fleet: Fleet
    own: Ints  # blocks that each row holds
    ready: Ints  # blocks that each row holds or is computing
    block_us: Floats  # of a block pulled to each host, at least
    asked: Asked
    found: Floats  # (FOUND, rows)
    link: LinkFloor

    def colocated(self, count: int) -> Bounded:
        """At most `count` instances to stay on: those with room first, then the least bound, then the first id."""
        return self._named(*bounding.first_colocated(self.asked, self.found, self.fleet.decodes, count))

    def full(self, bounded: Bounded) -> bool:
        """Whether none of all decode instances has room, told from the first of `colocated`."""
        return not bounded or self.found[KV_LEFT, self.fleet.rows[bounded[0][1].id]] < 0

    def freest(self, count: int) -> list[Instance]:
        """Decode instances with most room for the request in proportion to what they have."""
        return [self.fleet.instances[row] for row in bounding.freest(self.found, self.fleet.decodes, count)]

    def calmest(self) -> Instance | None:
        """The decode instance with room that prefills hold up least."""
        row = bounding.calmest(self.found, self.fleet.decodes)
        return self.fleet.instances[row] if row >= 0 else None

    def nearest(self) -> Instance | None:
        """The decode instance with room that holds the longest part of the prompt."""
        row = bounding.nearest(self.found, self.fleet.decodes, self.own)
        return self.fleet.instances[row] if row >= 0 else None

    def prefills(self, appraiser: Appraiser, targets: Sequence[Instance], slow_us: int, count: int) -> Bounded:
        """At most `count` instances to prefill on for a decode on one of `targets`.

        Args:
            slow_us: what decoding adds at least.
        """
        latency_us, byte_us = self.link.latency_us, min(self.link.here_us, self.link.away_us)
        size = 0
        for group in self.fleet.instances[0].info.namespace.groups:
            size += group.block_bytes * group.shard_count
        prompt_blocks = -(-appraiser.request.prompt_tokens // appraiser.prefix.block_tokens)
        own = max((appraiser.prefix.own_blocks(t.info.hbm_source_id) for t in targets), default=0)
        block_us = float(byte_us * size)
        handoff = HandOff(
            fixed_us=2 * latency_us + block_us * max(prompt_blocks - own, 1),
            block_us=block_us,
            last_us=2 * latency_us + 2 * block_us,
            prompt_blocks=float(prompt_blocks),
            slow_us=float(slow_us),
        )
        fleet = self.fleet
        return self._named(
            *bounding.first_prefills(
                fleet.table, fleet.hosts, self.own, self.ready, self.block_us, self.asked, handoff, self.found,
                fleet.prefills, count,
            )
        )  # fmt: skip

    def _named(self, rows: Ints, bounds_us: Floats) -> Bounded:
        instances = self.fleet.instances
        return [(bound, instances[row]) for row, bound in zip(rows.tolist(), bounds_us.tolist(), strict=True)]


def screen(appraiser: Appraiser, fleet: Fleet) -> Screen:
    """Bounds of what a request costs on each row of a fleet that has rows."""
    prefix, request = appraiser.prefix, appraiser.request
    own = prefix.own_by_number()[fleet.hbm_numbers(prefix.source_numbers)]
    ready = own
    for prompt, shared in appraiser.standing.pending:
        row = fleet.rows.get(prompt.instance_id)
        if row is not None:
            ready = own.copy() if ready is own else ready
            ready[row] = max(ready[row], min(shared, prefix.usable))
    pulls = request.use_pool and appraiser.covered > 0
    link = LinkFloor.of(appraiser.costs)
    latency_us, block_us = (link.latency_us, _pull_floor(appraiser, fleet, link)) if pulls else (0.0, fleet.nothing)
    wait_us, kv_ahead = _ahead(appraiser, fleet)
    asked = _asked(appraiser, float(pulls), latency_us)
    bounding.least_costs(fleet.table, fleet.hosts, own, ready, block_us, wait_us, kv_ahead, asked, fleet.found)
    return Screen(fleet, own, ready, block_us, asked, fleet.found, link)


def _asked(appraiser: Appraiser, pulls: float, latency_us: float) -> Asked:
    request, config, block_tokens = appraiser.request, appraiser.config, appraiser.prefix.block_tokens
    objective = request.tpot_slo_us > 0 and request.max_tokens > 1
    return Asked(
        prompt_tokens=float(request.prompt_tokens),
        block_tokens=float(block_tokens),
        covered=float(appraiser.covered),
        pulls=pulls,
        latency_us=float(latency_us),
        context_tokens=float(appraiser.context_tokens),
        expected_tokens=float(appraiser.expected_tokens),
        kv_tokens=float(whole_blocks(request.prompt_tokens + request.max_tokens, block_tokens)),
        harm_weight=float(config.harm_weight),
        slo_us=float(request.ttft_slo_us),
        slack_price=float(config.slack_price),
        delay_rate=float(config.delay_weight * appraiser.standing.arrivals_per_s),
        tpot_slo_us=float(request.tpot_slo_us if objective else 0),
        typical_tokens=float(appraiser.typical_tokens),
        stall_share=float(config.tpot_tail * config.stall_margin),
        broken_us=float(config.broken_us),
        window_us=float(WINDOW_US),
        now_us=float(appraiser.now_us),
    )


def _pull_floor(appraiser: Appraiser, fleet: Fleet, link: LinkFloor) -> Floats:
    """Microseconds a block pulled to each host of the fleet, at least."""
    exact = appraiser.request.fidelity_min == Fidelity.EXACT
    size = appraiser.prefix.block_bytes(fleet.instances[0], exact)
    hosts, shared = appraiser.prefix.host_numbers, appraiser.prefix.crowding(appraiser.now_us)
    for prompt, _ in appraiser.standing.pending:
        other = appraiser.cluster.instances.get(prompt.instance_id)
        node = appraiser.cluster.sources.get(other.info.node_source_id) if other is not None else None
        if node is not None and node.attached.host_id in hosts:
            shared[hosts[node.attached.host_id]] = 1
    return bounding.pull_floor(shared, fleet.source_hosts(hosts), link.here_us, link.away_us, float(size))


def _ahead(appraiser: Appraiser, fleet: Fleet) -> tuple[Floats, Floats]:
    """Prefill work, and KV tokens, that those before a request are going to take on each row."""
    line, order = appraiser.standing.line, appraiser.standing.order
    if line is None:
        return fleet.nothing, fleet.nothing
    return _amounts(line.prefill_us, order, fleet), _amounts(line.kv_tokens, order, fleet)


def _amounts(lanes: dict[str, Lane], order: Order, fleet: Fleet) -> Floats:
    if not lanes:
        return fleet.nothing
    amounts = np.zeros(len(fleet.instances))
    for instance_id, lane in lanes.items():
        row = fleet.rows.get(instance_id)
        if row is not None:
            amounts[row] = lane.ahead(order)
    return amounts
