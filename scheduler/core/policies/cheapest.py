"""kvpool's own policy: co-locate or split, whichever is predicted to cost all concerned the least time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option

#: Ways to co-locate, and as many prefill instances of a split, that are looked at even if others can't be beaten.
APPRAISED_MIN = 8


@dataclass(slots=True)
class Cheapest:
    """Mooncake's Algorithm 1 over prefill instances, extended by staying on one instance and by harm to decodes.

    cost = queue + pull + prefill + hand-off + weight * harm to running decodes. Decode instances for a split: the one
    with most free KV capacity, placements on the way counted, and the one that holds the longest part of the prompt.
    Instances are looked at in the order of a lower bound of their cost, and no further than it can matter.
    Source: Qin et al., Mooncake, FAST'25, Algorithm 1.
    """

    config: SchedulerConfig

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> list[Option]:
        bounds = {i.id: appraiser.bound_us(i) for i in instances}
        decodes = [i for i in instances if i.decodes()]
        options = _best(
            [(bounds[i.id] + appraiser.slow_cost_us(i), i) for i in decodes], lambda i: [appraiser.colocated(i)]
        )
        if appraiser.request.use_pool and decodes:
            targets = _decode_targets(appraiser, decodes)
            slow_us = min(appraiser.slow_cost_us(d) for d in targets)
            options += _best(
                [(bounds[i.id] + slow_us, i) for i in instances if i.prefills()],
                lambda p: [appraiser.split(p, d) for d in _others(targets, p)],
            )
        options.sort(key=lambda o: (not o.feasible, *o.order))
        return options

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        """Keeps nothing."""


def _best(bounded: Sequence[tuple[int, Instance]], options_of: Callable[[Instance], list[Option]]) -> list[Option]:
    """Options of instances in order of their bounds, until a feasible one costs no more than the next bound.

    Bounds are rounded down as often as costs or more often, so they are never above.
    """
    options: list[Option] = []
    best_us: int | None = None
    for count, (bound_us, instance) in enumerate(sorted(bounded, key=lambda b: (b[0], b[1].id))):
        if count >= APPRAISED_MIN and best_us is not None and best_us <= bound_us:
            break
        for option in options_of(instance):
            options.append(option)
            if option.feasible and (best_us is None or option.cost_us < best_us):
                best_us = option.cost_us
    return options


def _decode_targets(appraiser: Appraiser, decodes: Sequence[Instance]) -> list[Instance]:
    """The two freest, freest first, and behind them the one that holds the longest part of the prompt."""
    room = [(appraiser.kv_tokens_left(i), appraiser.prefix.own_blocks(i.info.hbm_source_id), i) for i in decodes]
    by_room = sorted(room, key=lambda r: (-r[0] / r[2].info.kv_tokens_total, r[2].id))
    targets = [instance for _, _, instance in by_room[:2]]
    roomy = [r for r in room if r[0] >= 0 and r[1] > 0]
    if roomy:
        targets.append(min(roomy, key=lambda r: (-r[1], r[2].id))[2])
    return targets


def _others(targets: Sequence[Instance], prefill: Instance) -> list[Instance]:
    """Decode instances for a split from `prefill`: the freest that it is not itself, and the nearest."""
    freest = next((t for t in targets[:2] if t is not prefill), None)
    nearest = [t for t in targets[2:] if t is not prefill and t is not freest]
    return nearest if freest is None else [freest, *nearest]
