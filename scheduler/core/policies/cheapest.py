"""kvpool's own policy: co-locate or split, whichever is predicted to cost all concerned the least time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option

#: Prefill instances for which a split is looked at, by predicted time to first token.
SPLITS_MAX = 8


@dataclass(slots=True)
class Cheapest:
    """Mooncake's Algorithm 1 over prefill instances, extended by staying on one instance and by harm to decodes.

    cost = queue + pull + prefill + hand-off + weight * harm to running decodes. Decode instances for a split: the one
    with most free KV capacity, placements on the way counted, and the one that holds the longest part of the prompt.
    Source: Qin et al., Mooncake, FAST'25, Algorithm 1.
    """

    config: SchedulerConfig

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> list[Option]:
        decodes = [i for i in instances if i.decodes()]
        options = [appraiser.colocated(i) for i in decodes]
        if appraiser.request.use_pool and decodes:
            targets = _decode_targets(appraiser, decodes)
            for prefill in _prefill_sources(appraiser, instances):
                options.extend(appraiser.split(prefill, d) for d in targets if d is not prefill)
        options.sort(key=lambda o: (not o.feasible, *o.order))
        return options

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        """Keeps nothing."""


def _decode_targets(appraiser: Appraiser, decodes: Sequence[Instance]) -> list[Instance]:
    freest = min(decodes, key=lambda i: (-appraiser.kv_tokens_left(i) / i.info.kv_tokens_total, i.id))
    roomy = [i for i in decodes if appraiser.kv_tokens_left(i) >= 0]
    nearest = min(roomy, key=lambda i: (-appraiser.prefix.own_blocks(i.info.hbm_source_id), i.id), default=freest)
    if nearest is freest or appraiser.prefix.own_blocks(nearest.info.hbm_source_id) == 0:
        return [freest]
    return [freest, nearest]


def _prefill_sources(appraiser: Appraiser, instances: Sequence[Instance]) -> list[Instance]:
    def order(instance: Instance) -> tuple[int, str]:
        p = appraiser.prospect(instance)
        return p.queue_us + p.pull_us + p.prefill_us * (1 + appraiser.load(instance).batch), instance.id

    return sorted((i for i in instances if i.prefills()), key=order)[:SPLITS_MAX]
