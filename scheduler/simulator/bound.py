"""How many requests of a trace anybody could serve in time: an upper bound that no scheduler can beat. Pure.

The bound is the optimum of an easier problem, known in advance and without interference:

* every block of a prompt that an earlier request had (served or not) is there, everywhere, at once and for nothing;
* what is left of a prompt can be computed by all instances that prefill together, in any pieces, without gaps;
* decoding costs nothing, memory has no end, the network takes no time;
* noise is always in our favour, and no step has a fixed cost.

A request then needs its least prefill work done between its arrival and its TTFT limit, on one machine as fast as all
instances together, and cannot be faster than one instance alone. Requests have the same limit, so who comes first is
due first, and the largest set that can be in time is found exactly (Kise, Ibaraki and Mine, Operations Research 26,
1978, for release and due dates in the same order).
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.simulator.columns import TraceRequest
from scheduler.simulator.hardware import Hardware


def least_prefill_us(requests: Sequence[TraceRequest], hardware: Hardware, noise_ratio: float = 0.0) -> list[float]:
    """Of each request: the least time that one instance computes its prompt for, with all that came before cached."""
    known: set[int] = set()
    out = []
    for request in requests:
        blocks = 0
        for block in request.hash_ids:
            if block not in known:
                break
            blocks += 1
        known.update(request.hash_ids)
        cached = min(blocks * request.block_tokens, request.prompt_tokens - 1)
        new = request.prompt_tokens - cached
        pairs = new * (cached + new / 2)
        out.append((hardware.prefill_token_us * new + hardware.prefill_pair_us * pairs) * (1 - noise_ratio))
    return out


def served_max(arrival_us: Sequence[float], work_us: Sequence[float], machines: int, limit_us: float) -> int:
    """The most requests that can be done within `limit_us` of their arrival, by so many machines' work in one.

    Args: arrival_us: in order. work_us: of one machine.
    Cost: O(requests²) at most.
    """
    assert machines > 0
    chosen: list[tuple[float, float]] = []  # (arrival, work on the one fast machine), in order
    end_us = 0.0
    for arrival, work in zip(arrival_us, work_us, strict=True):
        if work > limit_us:
            continue
        chosen.append((arrival, work / machines))
        end_us = max(end_us, arrival) + work / machines
        if end_us > arrival + limit_us:
            end_us = _drop_one(chosen)
    return len(chosen)


def _drop_one(chosen: list[tuple[float, float]]) -> float:
    """Leaves out the one without which the others end soonest; returns when that is."""
    before = [0.0]  # before[k]: when the first k are done
    for arrival, work in chosen:
        before.append(max(before[-1], arrival) + work)
    # Those from k on, begun at t, are done at max(t + length, latest).
    length, latest = 0.0, 0.0
    best_us, best = float("inf"), 0
    for k in range(len(chosen) - 1, -1, -1):
        end_us = max(before[k] + length, latest)
        if end_us < best_us:
            best_us, best = end_us, k
        arrival, work = chosen[k]
        latest = max(latest, arrival + work + length)
        length += work
    del chosen[best]
    return best_us


def goodput_max(
    requests: Sequence[TraceRequest], hardware: Hardware, prefills: int, ttft_slo_us: int, noise_ratio: float
) -> float:
    """Share of requests that could be within the TTFT limit at best. Args: prefills: instances that prefill."""
    if not len(requests):
        return 1.0
    arrivals = [float(request.arrival_us) for request in requests]
    work_us = least_prefill_us(requests, hardware, noise_ratio)
    return served_max(arrivals, work_us, prefills, float(ttft_slo_us)) / len(requests)
