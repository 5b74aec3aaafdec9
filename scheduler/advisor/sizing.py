"""How much each design carries, which is best with so many GPUs, and which is cheapest for a demand. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from scheduler.advisor.demand import Demand
from scheduler.advisor.model import Design, Evaluation, Kind, Objectives, evaluate
from scheduler.simulator.hardware import GB, Hardware

#: Rates are found to this share.
PRECISION = 0.005
#: Of an instance's memory an engine takes this share; profiles are derived from it.
MEMORY_SHARE = 0.9
#: Twice the GPUs do this share of twice the work: they have to talk to each other. Assumed, as in published TP sweeps.
TP_EFFICIENCY = 0.92
INSTANCES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Sized:
    """A design, what it carries at most, and how it does under the demand itself."""

    design: Design
    capacity_per_s: float  # requests a second at which so many as must are still inside their limits
    evaluation: Evaluation


def capacity_per_s(design: Design, demand: Demand, objectives: Objectives) -> float:
    """The largest rate at which the share of good requests is still `share_min`; 0 if none is."""

    def carries(rate_per_s: float) -> bool:
        return evaluate(design, demand.at(rate_per_s), objectives).good_share >= objectives.share_min

    low, high = 0.0, demand.rate_per_s
    while carries(high):
        low, high = high, 2 * high
        if high > 1e7:
            return low
    floor = high * 1e-6
    while high - low > PRECISION * max(low, floor):
        middle = (low + high) / 2 if low else high / 4
        if middle < floor:
            return 0.0
        low, high = (middle, high) if carries(middle) else (low, middle)
    return low


def sized(design: Design, demand: Demand, objectives: Objectives) -> Sized:
    return Sized(design, capacity_per_s(design, demand, objectives), evaluate(design, demand, objectives))


def colocated(hardware: Hardware, instances: int) -> Design:
    return Design(Kind.COLOCATED, hardware, hardware, 0, instances)


def split(prefill: Hardware, prefills: int, decode: Hardware, decodes: int, link_bytes_s: float | None) -> Design:
    return Design(Kind.SPLIT, prefill, decode, prefills, decodes, link_bytes_s)


def best_split(
    hardware: Hardware, instances: int, link_bytes_s: float | None, demand: Demand, objectives: Objectives
) -> Sized | None:
    """The split of so many instances that carries most; None if there are too few.

    What a split carries rises with prefill instances until decode is what limits it, then falls: the best is found by
    looking at ever fewer of them.
    """
    known: dict[int, float] = {}

    def carried(prefills: int) -> float:
        if prefills not in known:
            design = split(hardware, prefills, hardware, instances - prefills, link_bytes_s)
            known[prefills] = capacity_per_s(design, demand, objectives)
        return known[prefills]

    if instances < 2:
        return None
    low, high = 1, instances - 1
    while high - low > 8:
        left, right = low + (high - low) // 3, high - (high - low) // 3
        if carried(left) < carried(right):
            low = left + 1
        else:
            high = right - 1
    best = max(range(low, high + 1), key=lambda prefills: (carried(prefills), -prefills))
    return sized(split(hardware, best, hardware, instances - best, link_bytes_s), demand, objectives)


def cheapest(
    kinds: Sequence[Hardware], link_bytes_s: float | None, demand: Demand, objectives: Objectives
) -> list[Sized]:
    """The fewest instances of each kind, and of each pair of kinds for the two roles, that carry a demand.

    Returns: cheapest first; designs that no number of instances makes good enough are left out.
    """
    found: list[Design] = []
    for both in kinds:
        count = _fewest(partial(_colocated_good, both, demand, objectives))
        if count is not None:
            found.append(colocated(both, count))
    for prefill in kinds:
        for decode in kinds:
            design = _cheapest_split(prefill, decode, link_bytes_s, demand, objectives)
            if design is not None:
                found.append(design)
    found.sort(key=lambda d: (d.price_hour, d.gpus, d.kind is Kind.SPLIT, d.named()))
    return [sized(design, demand, objectives) for design in found]


def _cheapest_split(
    prefill: Hardware, decode: Hardware, link_bytes_s: float | None, demand: Demand, objectives: Objectives
) -> Design | None:
    """Fewest prefill instances with decode instances to spare, then fewest decode instances; then one more of each."""

    def design(prefills: int, decodes: int) -> Design:
        return split(prefill, prefills, decode, decodes, link_bytes_s)

    def good(prefills: int, decodes: int) -> bool:
        return _good(design(prefills, decodes), demand, objectives)

    prefills = _fewest(lambda count: good(count, INSTANCES_MAX))
    if prefills is None:
        return None
    options = []
    for more in (prefills, prefills + 1, prefills + 2):
        decodes = _fewest(partial(good, more))
        if decodes is not None:
            options.append(design(more, decodes))
    return min(options, key=lambda d: (d.price_hour, d.gpus), default=None)


def _good(design: Design, demand: Demand, objectives: Objectives) -> bool:
    return evaluate(design, demand, objectives).good_share >= objectives.share_min


def _colocated_good(hardware: Hardware, demand: Demand, objectives: Objectives, count: int) -> bool:
    return _good(colocated(hardware, count), demand, objectives)


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """The least number for which `enough` holds; with more it goes on to hold."""
    high = 1
    while not enough(high):
        if high >= INSTANCES_MAX:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def tp_variants(hardware: Hardware, context_tokens_min: int) -> Iterator[Hardware]:
    """The same GPUs with half and twice as many an instance, where the model and one long request fit.

    Memory of the GPU is read from its name (`H100-80GB`); without one only the profile itself is given.
    """
    yield hardware
    memory = re.search(r"(\d+)GB", hardware.gpu)
    if memory is None:
        return
    gpu_bytes = MEMORY_SHARE * float(memory[1]) * GB
    gpus = hardware.gpus_per_instance
    weights_bytes = gpu_bytes * gpus - hardware.kv_tokens * hardware.kv_token_bytes
    on_node = gpus * hardware.instances_per_node
    for other in (gpus // 2, gpus * 2):
        if not 1 <= other <= on_node or (on_node % other):
            continue
        kv_tokens = int((gpu_bytes * other - weights_bytes) / hardware.kv_token_bytes)
        if kv_tokens < context_tokens_min:
            continue
        faster = other / gpus * (TP_EFFICIENCY if other > gpus else 1 / TP_EFFICIENCY)
        yield replace(
            hardware,
            gpus_per_instance=other,
            instances_per_node=on_node // other,
            kv_tokens=kv_tokens,
            prefill_token_us=hardware.prefill_token_us / faster,
            prefill_pair_us=hardware.prefill_pair_us / faster,
            step_us=hardware.step_us / faster,
            decode_sequence_us=hardware.decode_sequence_us / faster,
            decode_token_us=hardware.decode_token_us / faster,
            pull_bytes_s=hardware.pull_bytes_s * other / gpus,
            local_bytes_s=hardware.local_bytes_s * other / gpus,
        )
