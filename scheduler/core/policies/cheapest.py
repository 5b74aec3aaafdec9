"""kvpool's own policy: co-locate or split, whichever is predicted to cost all concerned the least time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from scheduler.core import objectives, screening
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
#: There nothing is looked at in vain, and what is known to be within this factor of the best is good enough.
APPRAISED_MIN_LARGE, NEARLY = 0, 1.03
#: Where nobody has room nothing is feasible: so many are looked at for what is missing, and for how long.
FULL_MAX = 4


@dataclass(slots=True)
class Targets:
    """Where a split may decode."""

    freest: list[Instance]  # the two with most room, most first
    others: list[Instance]  # the one that prefills hold up least, and the one that holds the longest part of the prompt

    def for_prefill(self, prefill: Instance) -> list[Instance]:
        """The freest that the request does not prefill on, and the others."""
        return _distinct(
            next((t for t in self.freest if t is not prefill), None), *(t for t in self.others if t is not prefill)
        )


@dataclass(slots=True)
class Reach:
    """How many instances are looked at: at most and at least once an option is feasible, and while none is."""

    limit: int
    least: int
    nearly: float = 1.0  # what costs so many times a bound is good enough
    hopeless: int = HOPELESS_MAX


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
    screen = screening.screen(appraiser, fleet)
    large = len(fleet.instances) > LARGE_FLEET
    reach = Reach(APPRAISED_MAX_LARGE, APPRAISED_MIN_LARGE, NEARLY) if large else Reach(APPRAISED_MAX, APPRAISED_MIN)
    count = min(max(reach.limit, HOPELESS_MAX) + 1, len(fleet.instances))
    freest, calmest = screen.freest(2), screen.calmest()
    reach.hopeless = FULL_MAX if calmest is None else HOPELESS_MAX
    options = _best(screen.colocated(count), lambda i: [appraiser.colocated(i)], None, reach)
    if calmest is None:
        seen = {option.decode.id for option in options}
        options += [appraiser.colocated(i) for i in freest if i.id not in seen]
    if appraiser.request.use_pool and freest:
        targets = Targets(freest, _distinct(calmest, screen.nearest()))
        options += _best(
            screen.prefills(appraiser, targets.freest, targets.others, count),
            lambda p: [appraiser.split(p, d) for d in targets.for_prefill(p)],
            _least(options) if rivals else None,
            reach,
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
        slow_us = min(appraiser.slow_cost_us(d) for d in (*targets.freest, *targets.others))
        options += _best(
            _in_order([(bounds[i.id] + slow_us, i) for i in instances if i.prefills()]),
            lambda p: [appraiser.split(p, d) for d in targets.for_prefill(p)],
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
    reach: Reach | None = None,
) -> list[Option]:
    """Options of instances in order of their bounds, until a feasible one costs less than the next bound.

    Bounds are rounded down as often as costs or more often, so they are never above.

    Args:
        best_us: cost of a feasible option that is known already.
    """
    reach = reach or Reach(APPRAISED_MAX, APPRAISED_MIN)
    options: list[Option] = []
    for count, (bound_us, instance) in enumerate(bounded):
        if count >= reach.least and best_us is not None and (best_us < reach.nearly * bound_us or count >= reach.limit):
            break
        if count >= reach.hopeless and best_us is None:
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


def _distinct(*instances: Instance | None) -> list[Instance]:
    """Those that are there, each once."""
    return list({i.id: i for i in instances if i is not None}.values())


def _decode_targets(appraiser: Appraiser, decodes: Sequence[Instance]) -> Targets:
    room = [(appraiser.kv_tokens_left(i), i) for i in decodes]
    by_room = sorted(room, key=lambda r: (-r[0] / r[1].info.kv_tokens_total, r[1].id))
    own = [(appraiser.prefix.own_blocks(i.info.hbm_source_id), i) for i in decodes]
    nearest = _nearest(appraiser, [i for blocks, i in sorted(own, key=lambda o: (-o[0], o[1].id)) if blocks])
    roomy = [i for left, i in by_room if left >= 0]
    calm = sorted(roomy, key=lambda i: objectives.stalling_per_s(appraiser, i))  # stable: of equal ones the freest
    return Targets([i for _, i in by_room[:2]], _distinct(calm[0] if calm else None, nearest))
