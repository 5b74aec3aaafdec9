"""The advice itself: one answer, the designs it was chosen from, and where it would change. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from kvpool.core.errors import BadArgument
from scheduler.advisor import sizing
from scheduler.advisor.demand import Demand
from scheduler.advisor.measured import Links
from scheduler.advisor.model import Kind, Network, Objectives, own_chunk_tokens, prefill_us, pull_us
from scheduler.advisor.sizing import Sized
from scheduler.simulator.hardware import Hardware

#: A split must carry so much more than staying together, or cost so much less, to be worth its moving parts.
GAIN_MIN = 0.1
#: Bandwidths between which the turning point is looked for.
BYTES_S_MIN, BYTES_S_MAX = 1e6, 1e14
INSTANCES_TRIED = (*range(1, 9), 10, 12, 16, 24, 32, 64)
DESIGNS_SHOWN = 6


class Answer(StrEnum):
    COLOCATE = "co-locate"
    SPLIT = "split"
    NEITHER = "neither"


@dataclass(frozen=True, slots=True)
class Range:
    """GPU counts with one and the same answer."""

    gpus_min: int
    gpus_max: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Storage:
    """Whether blocks of a typical prefix are worth fetching from one place, or are computed faster."""

    place: str
    tokens: int
    pull_us: float
    recompute_us: float
    tokens_min: int | None  # from which on fetching pays; None = never

    @property
    def pays(self) -> bool:
        return self.pull_us < self.recompute_us


@dataclass(frozen=True, slots=True)
class Advice:
    """All that was found out.

    Fields:
        chosen: None if no design carries anything.
        colocated, split: the best of each kind with the same GPUs; `split` is None with less than two instances.
        gain: what the split carries beyond the other, as a share of it; with free numbers, what it saves of its price.
        designs: the cheapest that carry the demand; empty where the number of GPUs was given.
        carries: whether the chosen one carries the demand.
        unchanged: with staying together as the answer, what that carries with chunks as the profile has them; None if
            these are the best.
        healed_gain: `gain` if the broken links were like the others; None if none is broken.
        bytes_s_turns: bandwidth of a link from which on a split pays; None = at none.
    """

    answer: Answer
    demand: Demand
    objectives: Objectives
    chosen: Sized | None
    colocated: Sized | None
    split: Sized | None
    gain: float
    designs: tuple[Sized, ...]
    carries: bool
    links: Links | None
    unchanged: Sized | None
    healed_gain: float | None
    link_bytes_s: float
    bytes_s_turns: float | None
    by_gpus: tuple[Range, ...]
    storage: tuple[Storage, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def cost_per_million(self) -> float | None:
        """Of prompt and generated tokens, at the demand's rate or what is carried of it."""
        return None if self.chosen is None else cost_per_million(self.chosen, self.demand)


def cost_per_million(one: Sized, demand: Demand) -> float | None:
    """Price of a million tokens; None for a design that carries nothing."""
    rate_per_s = min(demand.rate_per_s, one.capacity_per_s)
    if not rate_per_s:
        return None
    return one.design.price_hour / (rate_per_s * 3600 * demand.tokens_per_request) * 1e6


def advise(
    kinds: Sequence[Hardware],
    gpus: int | None,
    links: Links | None,
    demand: Demand,
    objectives: Objectives,
) -> Advice:
    """Compares staying together with splitting.

    Args:
        kinds: hardware to choose from, at least one; with `gpus`, the first alone counts, at any of its TP degrees.
        gpus: how many there are; None = as many as it takes, at the least price.
    Raises: BadArgument if these are too few for one instance.
    """
    longest = int(np.percentile(demand.prompt_tokens + demand.output_tokens, 99))
    variants = [v for kind in (kinds[:1] if gpus is not None else kinds) for v in sizing.tp_variants(kind, longest)]
    fewest = min(variant.gpus_per_instance for variant in variants)
    if gpus is not None and gpus < fewest:
        raise BadArgument(f"{gpus} GPUs are too few: an instance of {kinds[0].name} takes {fewest} at least")
    slowest = links.slowest_bytes_s if links is not None else None
    designs: tuple[Sized, ...] = ()
    if gpus is None:
        designs = tuple(sizing.cheapest(variants, slowest, demand, objectives))
        together = next((s for s in designs if s.design.kind is Kind.COLOCATED), None)
        apart = next((s for s in designs if s.design.kind is Kind.SPLIT), None)
        gain = _saving(together, apart)
    else:
        together, apart = _with_gpus(variants, gpus, slowest, demand, objectives)
        gain = _gain(together, apart)
    answer = _answer(together, apart, gain)
    chosen = apart if answer is Answer.SPLIT else together
    main = chosen.design.decode if chosen is not None else variants[0]
    count = _instances(main, gpus, chosen)
    healed = None
    if links is not None and links.broken:
        healed = _gain_at(main, count, links.healthy_bytes_s, demand, objectives)
    bandwidth = (
        slowest if slowest is not None else Network.of(main, -(-count // main.instances_per_node)).transfer_bytes_s
    )
    return Advice(
        answer=answer,
        demand=demand,
        objectives=objectives,
        chosen=chosen if answer is not Answer.NEITHER else None,
        colocated=together,
        split=apart,
        gain=gain,
        designs=designs[:DESIGNS_SHOWN],
        carries=chosen is not None and chosen.capacity_per_s >= demand.rate_per_s * (1 - 2 * sizing.PRECISION),
        links=links,
        unchanged=_unchanged(together, demand, objectives) if answer is Answer.COLOCATE else None,
        healed_gain=healed,
        link_bytes_s=bandwidth,
        bytes_s_turns=_turning_bytes_s(main, count, demand, objectives),
        by_gpus=_by_gpus(main, slowest, demand, objectives),
        storage=_storage(main, count, links, demand),
    )


def _unchanged(together: Sized | None, demand: Demand, objectives: Objectives) -> Sized | None:
    """The same instances with chunks as they are, where that is less good."""
    if together is None:
        return None
    own = own_chunk_tokens(together.design.decode)
    if own == together.evaluation.chunk_tokens:
        return None
    found = sizing.sized(replace(together.design, chunk_tokens=own), demand, objectives)
    return found if found.capacity_per_s < together.capacity_per_s * (1 - 2 * sizing.PRECISION) else None


def _with_gpus(
    variants: Sequence[Hardware], gpus: int, link_bytes_s: float | None, demand: Demand, objectives: Objectives
) -> tuple[Sized | None, Sized | None]:
    """The best design of each kind with so many GPUs, at any TP degree."""
    together: list[Sized] = []
    apart: list[Sized] = []
    for variant in variants:
        count = gpus // variant.gpus_per_instance
        if count:
            together.append(sizing.sized(sizing.colocated(variant, count), demand, objectives))
        found = sizing.best_split(variant, count, link_bytes_s, demand, objectives)
        if found is not None:
            apart.append(found)
    return max(together, key=_carried, default=None), max(apart, key=_carried, default=None)


def _carried(one: Sized) -> tuple[float, float]:
    return one.capacity_per_s, one.evaluation.good_share


def _gain(together: Sized | None, apart: Sized | None) -> float:
    """What a split carries beyond the other, as a share."""
    if apart is None or not apart.capacity_per_s:
        return -1.0
    if together is None or not together.capacity_per_s:
        return math.inf
    return apart.capacity_per_s / together.capacity_per_s - 1


def _saving(together: Sized | None, apart: Sized | None) -> float:
    """What a split saves of the other's price, as a share; per request carried where there are no prices."""
    if apart is None:
        return -1.0
    if together is None:
        return math.inf
    price, other = apart.design.price_hour, together.design.price_hour
    if not price or not other:
        price, other = float(apart.design.gpus), float(together.design.gpus)
    return 1 - price / other


def _answer(together: Sized | None, apart: Sized | None, gain: float) -> Answer:
    if not any(one is not None and one.capacity_per_s for one in (together, apart)):
        return Answer.NEITHER
    return Answer.SPLIT if gain >= GAIN_MIN else Answer.COLOCATE


def _instances(main: Hardware, gpus: int | None, chosen: Sized | None) -> int:
    if gpus is not None:
        return max(gpus // main.gpus_per_instance, 1)
    return chosen.design.prefills + chosen.design.decodes if chosen is not None else 1


def _gain_at(main: Hardware, count: int, link_bytes_s: float | None, demand: Demand, objectives: Objectives) -> float:
    together = sizing.sized(sizing.colocated(main, count), demand, objectives)
    return _gain(together, sizing.best_split(main, count, link_bytes_s, demand, objectives))


def _turning_bytes_s(main: Hardware, count: int, demand: Demand, objectives: Objectives) -> float | None:
    """The least bandwidth between instances at which a split is worth it, by bisection."""
    if _gain_at(main, count, BYTES_S_MAX, demand, objectives) < GAIN_MIN:
        return None
    low, high = BYTES_S_MIN, BYTES_S_MAX
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        if _gain_at(main, count, middle, demand, objectives) >= GAIN_MIN:
            high = middle
        else:
            low = middle
    return high


def _by_gpus(main: Hardware, link_bytes_s: float | None, demand: Demand, objectives: Objectives) -> tuple[Range, ...]:
    """The answer by the number of GPUs, for as much work for each of them: small clusters can't be cut well."""
    ranges: list[Range] = []
    for count in INSTANCES_TRIED:
        together = sizing.sized(sizing.colocated(main, count), demand, objectives)
        apart = sizing.best_split(main, count, link_bytes_s, demand, objectives)
        answer = _answer(together, apart, _gain(together, apart))
        gpus = count * main.gpus_per_instance
        if ranges and ranges[-1].answer is answer:
            ranges[-1] = Range(ranges[-1].gpus_min, gpus, answer)
        else:
            ranges.append(Range(gpus, gpus, answer))
    return tuple(ranges)


# ---------------------------------------------------------------- storage


def _storage(main: Hardware, count: int, links: Links | None, demand: Demand) -> tuple[Storage, ...]:
    """Fetching a typical cached prefix against computing it."""
    tokens = _typical_prefix(demand)
    places = {"memory of the same node": Network(main.local_bytes_s, main.local_bytes_s, main.local_latency_us)}
    if count > main.instances_per_node or links is not None:
        network = Network.of(main, max(-(-count // main.instances_per_node), 2))
        places["memory of another node"] = network.limited(links.slowest_bytes_s if links is not None else None)
    if main.ssd_bytes:
        places["SSD of the same node"] = Network(main.ssd_bytes_s, main.ssd_bytes_s, main.ssd_latency_us)
    return tuple(_fetching(place, network, main, tokens) for place, network in places.items())


def _typical_prefix(demand: Demand) -> int:
    """Half of all cached tokens are in prefixes at most this long; half a prompt where nothing is cached."""
    cached = np.sort(demand.cached_tokens)
    total = float(cached.sum())
    if not total:
        return max(int(np.median(demand.prompt_tokens)) // 2, 1)
    return int(cached[np.searchsorted(np.cumsum(cached), total / 2)])


def _fetching(place: str, network: Network, main: Hardware, tokens: int) -> Storage:
    def times(count: int) -> tuple[float, float]:
        size = np.array([float(count)])
        pulled = float(pull_us(network, main, size)[0])
        return pulled, float(prefill_us(main, size, np.zeros(1), main.prefill_chunk_tokens)[0])

    def pays(count: int) -> bool:
        pulled, computed = times(count)
        return pulled < computed

    tokens_min: int | None = None
    longest = main.context_tokens_max
    if pays(longest):
        low, high = 0, longest
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        tokens_min = high
    pulled, computed = times(tokens)
    return Storage(place, tokens, pulled, computed, tokens_min)
