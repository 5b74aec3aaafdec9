"""How many requests of a trace anybody could serve in time: an upper bound that no scheduler can beat. Pure.

The bound is the least of two, each the optimum of an easier problem, known in advance and without interference. In both

* what is to be computed can be computed by all instances together, in any pieces, without gaps, and is everywhere at
  once, for nothing; those that are there to decode compute prompts as well, since they do so for requests that stay;
* decoding costs nothing, memory has no end, the network takes no time, noise is always in our favour, and no step has a
  fixed cost;
* only who could not be in time even on an idle cluster is lost for that: the parts of a prompt are computed one after
  another by one instance, and none before a request has come that has it.

**By request** (`served_max`): every block that an earlier request had, served or not, is there for nothing. A request
then needs its own work done between its arrival and its TTFT limit, on one machine as fast as all instances together.
Requests have the same limit, so who comes first is due first, and the largest set that can be in time is found exactly
(Kise, Ibaraki and Mine, Operations Research 26, 1978, for release and due dates in the same order).

**By block** (`served_max_by_block`): leaving out a request does not save the work of blocks that later ones need as
well. Take requests in a row, and the time from the first one's arrival to the last one's TTFT limit. Those of them that
are served need, within that time, all their blocks that nobody had before (nobody can have computed them earlier), each
once, and what comes after a prompt's last full block. So the work of a served set is at most what the machine does in
that time. The largest such set is bounded by Lagrange's relaxation: at any price of work it is at most the value of the
time plus the most that requests are worth beyond their work, and on a tree of prefixes that most is found exactly,
leaves first. What rows of requests that do not overlap must lose adds up.

Decode work is left out. That of the tokens that are due under the TBT limit before the last prompt is takes at most 0.4
points off the bound with four instances that do both, since answers may come as slowly as that limit allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.simulator.columns import TraceRequest
from scheduler.simulator.hardware import Hardware

#: Rows of requests begin and end at so many places of a trace.
PARTS = 10
#: Prices that are tried at once. Between the neighbours of the best they are tried again, so many times in all.
PRICES, ROUNDS = 24, 3
#: Before the first block of a prompt.
NOTHING = -1


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
        out.append(_prefill_us(hardware, request.prompt_tokens - cached, cached) * (1 - noise_ratio))
    return out


def _prefill_us(hardware: Hardware, new: int, cached: int) -> float:
    """Work of so many prompt tokens after others; of two runs in a row it is the sum of theirs."""
    return hardware.prefill_token_us * new + hardware.prefill_pair_us * new * (cached + new / 2)


# ---------------------------------------------------------------- by request


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


# ---------------------------------------------------------------- by block


@dataclass(frozen=True, eq=False, slots=True)
class Prefixes:
    """A tree of all prompts' full blocks. A run is blocks in a row that all who have one of them have; run 0 is empty.

    Fields:
        before: int64 (runs,), the run that one follows; always an earlier one. Of run 0 it is 0.
        first: int64 (runs,), the request that had it first; never falling.
        run_us: float64 (runs,), to compute it on one instance with all before it there.
        last: int64 (requests,), where the full blocks of a prompt end.
        tail_us: float64 (requests,), to compute what comes after them; nobody else can use that.
    """

    before: NDArray[np.int64]
    first: NDArray[np.int64]
    run_us: NDArray[np.float64]
    last: NDArray[np.int64]
    tail_us: NDArray[np.float64]


def prefixes_of(requests: Sequence[TraceRequest], hardware: Hardware, noise_ratio: float = 0.0) -> Prefixes:
    """Cost: O(block references)."""
    follows: dict[int, int] = {}  # block -> the one before it
    first: dict[int, int] = {}
    depth: dict[int, int] = {NOTHING: -1}
    forks: dict[int, int] = {}  # block -> how many different ones follow it
    ends: list[int] = []
    tail_us = []
    for number, request in enumerate(requests):
        full, before = request.hash_ids[: request.prompt_tokens // request.block_tokens], NOTHING
        for block in full:
            if block not in follows:
                follows[block], first[block], depth[block] = before, number, depth[before] + 1
                forks[before] = forks.get(before, 0) + 1
            assert follows[block] == before, f"block {block} stands for two prefixes"
            before = block
        ends.append(before)
        cached = len(full) * request.block_tokens
        tail_us.append(_prefill_us(hardware, request.prompt_tokens - cached, cached))
    run_of = {NOTHING: 0}
    runs: list[tuple[int, int]] = [(0, 0)]  # (run before, first request)
    run_us = [0.0]
    borders = {NOTHING, *ends}
    block_tokens = requests[0].block_tokens if len(requests) else 1
    for block, before in follows.items():  # as they first came, so after the one before
        run = run_of[before]
        if before in borders or forks[before] > 1:
            runs.append((run, first[block]))
            run_us.append(0.0)
            run = len(runs) - 1
        run_of[block] = run
        run_us[run] += _prefill_us(hardware, block_tokens, depth[block] * block_tokens)
    share = 1 - noise_ratio
    return Prefixes(
        before=np.array([run for run, _ in runs], dtype=np.int64),
        first=np.array([number for _, number in runs], dtype=np.int64),
        run_us=np.array(run_us) * share,
        last=np.array([run_of[block] for block in ends], dtype=np.int64),
        tail_us=np.array(tail_us) * share,
    )


def possible_alone(arrival_us: NDArray[np.float64], prefixes: Prefixes, limit_us: float) -> NDArray[np.bool_]:
    """Who could be in time if nobody else needed anything; bool (requests,). Args: as of `served_max_by_block`."""
    ready_us = [0.0]  # of each run: when it can be there at the earliest
    before, begin_us = prefixes.before.tolist(), arrival_us[prefixes.first].tolist()
    for run in range(1, len(before)):
        ready_us.append(max(ready_us[before[run]], begin_us[run]) + float(prefixes.run_us[run]))
    done_us = np.maximum(np.array(ready_us)[prefixes.last], arrival_us) + prefixes.tail_us
    return np.asarray(done_us <= arrival_us + limit_us)


def served_max_by_block(arrival_us: NDArray[np.float64], prefixes: Prefixes, machines: int, limit_us: float) -> int:
    """An upper bound of the requests that can have their prompts computed within `limit_us` of their arrival.

    Args: arrival_us: float64 (requests,), in order.
    Cost: O(PARTS² * ROUNDS * PRICES * runs).
    """
    assert machines > 0
    count = len(arrival_us)
    possible = possible_alone(arrival_us, prefixes, limit_us)
    edges = sorted({count * part // PARTS for part in range(PARTS + 1)})
    lost = [0] * len(edges)  # of all requests before that edge
    for after in range(1, len(edges)):
        end = edges[after]
        due_us = float(arrival_us[end - 1]) + limit_us
        for before in range(after):
            begin = edges[before]
            capacity_us = machines * (due_us - float(arrival_us[begin]))
            most = _most(prefixes, begin, end, possible[begin:end], capacity_us)
            lost[after] = max(lost[after], lost[before] + end - begin - most)
    return count - lost[-1]


def _most(prefixes: Prefixes, begin: int, end: int, possible: NDArray[np.bool_], capacity_us: float) -> int:
    """At least the most of requests begin..end whose blocks and tails take `capacity_us` at most."""
    wanted = int(possible.sum())
    runs = int(np.searchsorted(prefixes.first, end))
    work_us = np.where(prefixes.first[:runs] >= begin, prefixes.run_us[:runs], 0.0)
    total_us = float(work_us.sum() + prefixes.tail_us[begin:end].sum())
    if total_us <= capacity_us:
        return wanted
    low, high = 1.0 / total_us, 100.0 * wanted / total_us
    most = float(wanted)
    for _ in range(ROUNDS):
        prices = np.geomspace(low, high, PRICES)
        values = capacity_us * prices + _worth(prefixes, begin, end, work_us, possible, prices)
        best = int(values.argmin())
        most = min(most, float(values[best]))
        low, high = float(prices[max(best - 1, 0)]), float(prices[min(best + 1, PRICES - 1)])
    return math.floor(most + 1e-6)


def _worth(
    prefixes: Prefixes,
    begin: int,
    end: int,
    work_us: NDArray[np.float64],
    possible: NDArray[np.bool_],
    prices: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The most that requests begin..end are worth, each one, beyond the price of what they need; float64 (prices,).

    Args: work_us: float64 (runs,), what each run still costs. possible: bool (end - begin,). prices: a microsecond's.
    """
    worth = np.zeros((len(work_us), len(prices)))
    gains = np.maximum(1.0 - np.outer(prefixes.tail_us[begin:end], prices), 0.0) * possible[:, None]
    np.add.at(worth, prefixes.last[begin:end], gains)
    costs = np.outer(work_us, prices)
    before = prefixes.before.tolist()
    for run in range(len(work_us) - 1, 0, -1):
        worth[before[run]] += np.maximum(worth[run] - costs[run], 0.0)
    return np.asarray(worth[0])


# ---------------------------------------------------------------- both


def goodput_max(
    requests: Sequence[TraceRequest], hardware: Hardware, instances: int, ttft_slo_us: int, noise_ratio: float
) -> float:
    """Share of requests that could be within the TTFT limit at best."""
    if not len(requests):
        return 1.0
    arrival_us = np.array([float(request.arrival_us) for request in requests])
    limit_us = float(ttft_slo_us)
    prefixes = prefixes_of(requests, hardware, noise_ratio)
    work_us = np.array(least_prefill_us(requests, hardware, noise_ratio))
    possible = possible_alone(arrival_us, prefixes, limit_us)
    by_request = served_max(arrival_us[possible].tolist(), work_us[possible].tolist(), instances, limit_us)
    by_block = served_max_by_block(arrival_us, prefixes, instances, limit_us)
    return min(by_request, by_block) / len(requests)
