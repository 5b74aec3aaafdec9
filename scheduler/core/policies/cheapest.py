"""kvpool's own policy: co-locate or split, whichever is predicted to cost all concerned the least time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.core import screening
from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.fleet import Fleet
from scheduler.core.options import Appraiser, Option

#: Ways to co-locate, and as many prefill instances of a split, that are looked at even if others can't be beaten.
APPRAISED_MIN = 3
#: And at most: of many that are nearly alike it does not matter which is taken. Where none is feasible a few more are
#: looked at, since what is missing must be told.
APPRAISED_MAX, HOPELESS_MAX = 16, 32
#: The same in fleets larger than this: there the more are alike.
LARGE_FLEET, APPRAISED_MAX_LARGE = 64, 5


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
        fleet = appraiser.fleet
        # Whoever prefers splits must see the best of them, though staying on one instance is cheaper.
        rivals = type(self) is Cheapest
        if fleet is not None and instances is fleet.instances:
            options = _by_columns(appraiser, fleet, rivals)
        else:
            options = _one_by_one(appraiser, instances, rivals)
        options.sort(key=lambda o: (not o.feasible, *o.order))
        return options

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        """Keeps nothing."""


def _by_columns(appraiser: Appraiser, fleet: Fleet, rivals: bool) -> list[Option]:
    """What is worth looking at in a fleet, by bounds of all at once."""
    demand = screening.demand_of(appraiser, fleet)
    work_ahead, kv_ahead = screening.ahead_of(appraiser)
    bounds_us, slow_us = fleet.bounds_us(demand, work_ahead), fleet.slow_us(demand)
    left = fleet.kv_left(demand, kv_ahead)
    limit = APPRAISED_MAX if len(fleet.instances) <= LARGE_FLEET else APPRAISED_MAX_LARGE
    options = _best(
        fleet.in_order(bounds_us + slow_us, fleet.decodes, left >= 0), lambda i: [appraiser.colocated(i)], limit=limit
    )
    if appraiser.request.use_pool and fleet.decodes.any():
        targets = fleet.freest(left, 2)
        holders = np.flatnonzero(demand.own)
        order = holders[np.argsort(-demand.own[holders], kind="stable")].tolist()
        nearest = _nearest(appraiser, (fleet.instances[row] for row in order))
        targets += [nearest] if nearest is not None else []
        least_us = min(appraiser.slow_cost_us(d) for d in targets)
        service_us = screening.split_service_us(appraiser, fleet, demand, targets)
        bounds_us = fleet.bounds_us(demand, work_ahead, service_us)
        options += _best(
            fleet.in_order(bounds_us + least_us, fleet.prefills),
            lambda p: [appraiser.split(p, d) for d in _others(targets, p)],
            _least(options) if rivals else None,
            limit,
        )
    return options


def _one_by_one(appraiser: Appraiser, instances: Sequence[Instance], rivals: bool) -> list[Option]:
    """The same for any choice of instances, by plain arithmetic."""
    bounds = {i.id: appraiser.bound_us(i) for i in instances}
    decodes = [i for i in instances if i.decodes()]
    options = _best(
        _in_order([(bounds[i.id] + appraiser.slow_cost_us(i), i) for i in decodes]),
        lambda i: [appraiser.colocated(i)],
    )
    if appraiser.request.use_pool and decodes:
        targets = _decode_targets(appraiser, decodes)
        slow_us = min(appraiser.slow_cost_us(d) for d in targets)
        options += _best(
            _in_order([(bounds[i.id] + slow_us, i) for i in instances if i.prefills()]),
            lambda p: [appraiser.split(p, d) for d in _others(targets, p)],
            _least(options) if rivals else None,
        )
    return options


def _least(options: Sequence[Option]) -> int | None:
    return min((option.cost_us for option in options if option.feasible), default=None)


def _in_order(bounded: list[tuple[int, Instance]]) -> list[tuple[int, Instance]]:
    return sorted(bounded, key=lambda b: (b[0], b[1].id))


def _best(
    bounded: Iterable[tuple[float, Instance]],
    options_of: Callable[[Instance], list[Option]],
    best_us: int | None = None,
    limit: int | None = None,
) -> list[Option]:
    """Options of instances in order of their bounds, until a feasible one costs less than the next bound.

    Bounds are rounded down as often as costs or more often, so they are never above.

    Args:
        best_us: cost of a feasible option that is known already.
        limit: instances looked at once an option is feasible; None = `APPRAISED_MAX`.
    """
    limit = APPRAISED_MAX if limit is None else limit
    options: list[Option] = []
    for count, (bound_us, instance) in enumerate(bounded):
        if count >= APPRAISED_MIN and best_us is not None and (best_us < bound_us or count >= limit):
            break
        if count >= HOPELESS_MAX and best_us is None:
            break
        for option in options_of(instance):
            options.append(option)
            if option.feasible and (best_us is None or option.cost_us < best_us):
                best_us = option.cost_us
    return options


def _nearest(appraiser: Appraiser, holders: Iterable[Instance]) -> Instance | None:
    """The first decode instance with room of those that hold a part of the prompt, the longest part first."""
    for instance in holders:
        if instance.decodes() and appraiser.kv_tokens_left(instance) >= 0:
            return instance
    return None


def _decode_targets(appraiser: Appraiser, decodes: Sequence[Instance]) -> list[Instance]:
    """The two freest, freest first, and behind them the one that holds the longest part of the prompt."""
    room = [(appraiser.kv_tokens_left(i), i) for i in decodes]
    by_room = sorted(room, key=lambda r: (-r[0] / r[1].info.kv_tokens_total, r[1].id))
    own = [(appraiser.prefix.own_blocks(i.info.hbm_source_id), i) for i in decodes]
    nearest = _nearest(appraiser, [i for blocks, i in sorted(own, key=lambda o: (-o[0], o[1].id)) if blocks])
    return [instance for _, instance in by_room[:2]] + ([nearest] if nearest is not None else [])


def _others(targets: Sequence[Instance], prefill: Instance) -> list[Instance]:
    """Decode instances for a split from `prefill`: the freest that it is not itself, and the nearest."""
    freest = next((t for t in targets[:2] if t is not prefill), None)
    nearest = [t for t in targets[2:] if t is not prefill and t is not freest]
    return nearest if freest is None else [freest, *nearest]
