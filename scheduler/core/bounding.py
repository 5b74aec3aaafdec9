"""Lower bounds of the cost of a request on each row of a fleet, and the rows with the least. Pure; numba kernels.

Elementwise + - * / and comparisons on float64, each row by itself: the same everywhere. The plain oracles are in the
tests, in numpy.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from scheduler.core.cost import LinkFloor
from scheduler.core.covering import CROWD, LEAST, LEAST_HOST, OTHER, REACH

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_jit = numba.njit(cache=True, nogil=True)

#: Rows of a fleet's table; what they hold is told in `fleet`.
(
    P0, P1, P2, D0, D1, D2, QUEUE_US, HEAD_SINCE_US, HEAD_US, FOREIGN, BATCH, CONTEXT, EXPECTED, KV_FREE, KV_TOTAL,
    STALLING_PER_S, STALLING_SEEN_US,
) = range(17)  # fmt: skip
COLUMNS = 17
#: Rows of what `least_costs` finds: prefill work before the request, its pull and prefill, what it costs others, what
#: decoding adds, KV tokens left, the share of an instance's KV tokens that is left, negative (the most is first), and
#: microseconds of prefill a second that hold up decodes there.
WAIT_US, SERVICE_US, OTHERS_US, SLOW_US, KV_LEFT, KV_SHARE, STALLING = range(7)
FOUND = 7
#: Rounding of sums in other orders: bounds are lowered by this, so that none is above its cost.
SLACK_US = 8.0
#: The same for what a risk costs, which is computed from rounded times: of it so much is counted.
RISK_COUNTED = 0.998
#: What pulling a block takes that nobody has.
NEVER_US = 1e15


class Asked(NamedTuple):
    """A request, as numbers. What a pull takes at least is told of each row: see `pull_floors`."""

    prompt_tokens: float
    block_tokens: float
    covered: float  # blocks that could be reused at most; a pull may bring them all
    pulls: float  # 1 if it may pull, else 0
    context_tokens: float
    expected_tokens: float
    kv_tokens: float
    harm_weight: float
    slo_us: float  # TTFT objective, 0 = none
    slack_price: float
    delay_rate: float  # weight of a delay, times requests a second that come to an instance
    tpot_slo_us: float  # 0 = none, or nothing to miss
    typical_tokens: float  # of an answer: as many are shorter as are longer
    stall_share: float  # of the time that an objective leaves, which prefills may take
    broken_us: float  # what a missed objective costs
    window_us: float  # of rates
    now_us: float


@_jit
def pull_floors(
    own: Ints, hosts: Ints, numbers: Ints, near: Ints, behind: Ints, link: LinkFloor, size: float
) -> tuple[Floats, Floats]:
    """Latency, and microseconds a block, that a pull to each row takes at least, however far it reaches.

    The first block that a row lacks is the cheapest: the further a block, the fewer there are who have it.

    Args:
        own: (rows), blocks that a row holds.
        hosts, numbers: (rows), indices into numbers; (hosts), places in `near`, -1 is the last.
        near, behind: see `covering.offer`.
        size: bytes of a block.
    """
    latency_us, block_us = np.zeros(len(own)), np.zeros(len(own))
    for r in range(len(own)):
        if own[r] >= behind.shape[1]:
            continue
        host, at = numbers[hosts[r]], own[r]
        crowd = behind[OTHER, at] if behind[LEAST_HOST, at] == host else behind[LEAST, at]
        latency_us[r], block_us[r] = link.away_latency_us, NEVER_US
        if crowd > 0:
            block_us[r] = link.away_us * crowd * size
        if near[REACH, host] > at:
            latency_us[r] = min(latency_us[r], link.here_latency_us)
            block_us[r] = min(block_us[r], link.here_us * near[CROWD, host] * size)
    return latency_us, block_us


@_jit
def _risk_us(asked: Asked, step_us: float, stalling_per_s: float) -> float:
    """What prefills that come as of late cost a request that decodes; as `objectives.broken`."""
    if not asked.tpot_slo_us > 0:
        return 0.0
    limit_us = asked.stall_share * asked.typical_tokens * max(asked.tpot_slo_us - step_us, 0.0)
    share = stalling_per_s * (step_us * asked.typical_tokens / 1e6) / max(limit_us, 1.0)
    return RISK_COUNTED * asked.broken_us * (1.0 - 1.0 / (1.0 + share + 0.5 * share * share))


@_jit
def least_costs(
    table: Floats, own: Ints, ready: Ints, latency_us: Floats, block_us: Floats, wait_us: Floats, kv_ahead: Floats,
    asked: Asked, found: Floats,
) -> None:  # fmt: skip
    """Fills found (FOUND, rows).

    Args:
        table: (COLUMNS, rows).
        own, ready: (rows), blocks that a row holds, and that it holds or is computing.
        latency_us, block_us: (rows), of a pull and of each block of it, at least.
        wait_us, kv_ahead: (rows), prefill work and KV tokens of those who wait before the request.
    """
    prompt, block_tokens = asked.prompt_tokens, asked.block_tokens
    for r in range(table.shape[1]):
        p0, p1, p2 = table[P0, r], table[P1, r], table[P2, r]
        cached = own[r] * block_tokens
        new = prompt - cached
        work_us = p0 + p1 * new + p2 * (new * (cached + new / 2))
        service_us = work_us
        if asked.pulls > 0 and asked.covered > 0:
            pulled = asked.covered * block_tokens
            new = prompt - pulled
            pulled_us = p0 + p1 * new + p2 * (new * (pulled + new / 2))
            missing = asked.covered - own[r]
            pull_us = latency_us[r] + block_us[r] * missing if missing > 0 else 0.0
            service_us = min(work_us, pulled_us + pull_us)
            work_us = min(work_us, pulled_us)
        computed = ready[r] * block_tokens
        new = prompt - computed
        ready_us = p0 + p1 * new + p2 * (new * (computed + new / 2))
        service_us, work_us = min(service_us, ready_us), min(work_us, ready_us)
        head_us = min(max(asked.now_us - table[HEAD_SINCE_US, r], 0.0), table[HEAD_US, r])
        queue_us = table[QUEUE_US, r] - head_us + wait_us[r]
        queue_us += table[FOREIGN, r] * (p0 + p1 * prompt + p2 * (prompt * (prompt / 2)))
        batch = table[BATCH, r]
        delay_us = asked.delay_rate * ((queue_us + work_us) / 1e6) * work_us
        found[WAIT_US, r], found[SERVICE_US, r] = queue_us, service_us
        found[OTHERS_US, r] = asked.harm_weight * work_us * batch + delay_us - SLACK_US
        d0, d1, d2, context = table[D0, r], table[D1, r], table[D2, r], table[CONTEXT, r]
        with_us = d0 + d1 * (batch + 1) + d2 * (context + asked.context_tokens)
        age_us = max(asked.now_us - table[STALLING_SEEN_US, r], 0.0)
        found[STALLING, r] = table[STALLING_PER_S, r] * asked.window_us / (asked.window_us + age_us)
        found[SLOW_US, r] = _risk_us(asked, with_us, found[STALLING, r])
        if batch > 0:
            step_us = d0 + d1 * batch + d2 * context
            alone_us = d0 + d1 + d2 * asked.context_tokens
            expected = table[EXPECTED, r] if table[EXPECTED, r] > 0 else asked.expected_tokens
            slow_us = max(with_us - step_us - 1, 0.0) * batch + max(with_us - alone_us - 1, 0.0)
            found[SLOW_US, r] += asked.harm_weight * slow_us * min(expected, asked.expected_tokens)
        found[KV_LEFT, r] = table[KV_FREE, r] - asked.kv_tokens - kv_ahead[r]
        found[KV_SHARE, r] = -found[KV_LEFT, r] / max(table[KV_TOTAL, r], 1.0)


@_jit
def _priced_us(ttft_us: float, slo_us: float, slack_price: float) -> float:
    """As `options.priced_us`."""
    if not slo_us > 0:
        return ttft_us
    within_us = min(ttft_us, slo_us)
    part = (1 - slack_price) * (within_us * within_us / (2 * slo_us))
    return slack_price * within_us + part + ttft_us - within_us


@_jit
def _insert(cost: float, later: int, row: int, count: int, costs: Floats, laters: Ints, rows: Ints) -> int:
    """Keeps the least of what comes in order of rows: those that are not `later` first, then by cost, then by row."""
    size = len(rows)
    if count == size and (later > laters[size - 1] or (later == laters[size - 1] and cost >= costs[size - 1])):
        return count
    at = count if count < size else size - 1
    while at > 0 and (later < laters[at - 1] or (later == laters[at - 1] and cost < costs[at - 1])):
        costs[at], laters[at], rows[at] = costs[at - 1], laters[at - 1], rows[at - 1]
        at -= 1
    costs[at], laters[at], rows[at] = cost, later, row
    return min(count + 1, size)


@_jit
def first_colocated(
    found: Floats, decodes: Bools, slo_us: float, slack_price: float, count: int
) -> tuple[Ints, Floats]:
    """At most `count` rows to stay on, and their bounds: those with room first, then the least bound."""
    costs, laters, rows = np.empty(count), np.empty(count, np.int64), np.empty(count, np.int64)
    n = 0
    for r in range(found.shape[1]):
        if decodes[r]:
            ttft_us = found[WAIT_US, r] + found[SERVICE_US, r]
            cost = _priced_us(ttft_us, slo_us, slack_price) + found[OTHERS_US, r] + found[SLOW_US, r]
            n = _insert(cost, 1 if found[KV_LEFT, r] < 0 else 0, r, n, costs, laters, rows)
    return rows[:n], costs[:n]


class HandOff(NamedTuple):
    """How a prompt would be handed over.

    Fields:
        prompt_blocks, size: blocks, and bytes of one.
        first: the row to decode on; `instead` is the one for a prefill on `first` itself, -1 for none.
    """

    prompt_blocks: float
    size: float
    first: int
    instead: int


@_jit
def _handoff_us(
    beside: bool, same: bool, publish: float, pull: float, size: float, link: LinkFloor
) -> tuple[float, float]:
    """What a hand-off takes at least, and what of it is left when the prefill ends.

    Args:
        beside: whether the prefill instance's node is on its host; if not, nothing is known of either way.
        same: whether the decode instance is on that host too.
        publish, pull: blocks that travel to the node, and from it.
    """
    least_latency_us, least_us = min(link.here_latency_us, link.away_latency_us), min(link.here_us, link.away_us)
    publish_latency_us, publish_us = (link.here_latency_us, link.here_us) if beside else (least_latency_us, least_us)
    pull_latency_us, pull_us = least_latency_us, least_us
    if beside:
        pull_latency_us, pull_us = (
            (link.here_latency_us, link.here_us) if same else (link.away_latency_us, link.away_us)
        )
    latency_us = publish_latency_us + pull_latency_us
    whole_us = latency_us + size * (publish_us * max(publish, 1.0) + pull_us * max(pull, 1.0))
    return whole_us, latency_us + size * (publish_us + pull_us)


@_jit
def first_prefills(
    table: Floats, own: Ints, ready: Ints, latency_us: Floats, block_us: Floats, asked: Asked, found: Floats,
    prefills: Bools, hosts: Ints, beside: Bools, link: LinkFloor, handoff: HandOff, targets: Ints, count: int,
) -> tuple[Ints, Floats]:  # fmt: skip
    """At most `count` rows to prefill on for a decode on another, and their bounds, the least first.

    Blocks travel while later ones are computed: with a prefill of w microseconds and a hand-off of h in all, of which
    l are left in any case, max(w + l, h) pass. Pulling more blocks before makes w shorter, which is worth nothing
    below h.

    Args:
        hosts, beside: (rows), the host of each, and whether its node is there too.
        targets: (n), rows to decode on besides `handoff.first`.
    """
    costs, laters, rows = np.empty(count), np.empty(count, np.int64), np.empty(count, np.int64)
    n = 0
    prompt, block_tokens = asked.prompt_tokens, asked.block_tokens
    for r in range(table.shape[1]):
        if not prefills[r]:
            continue
        p0, p1, q = table[P0, r], table[P1, r], table[P2, r] / 2
        whole_us = p0 + p1 * prompt + q * (prompt * prompt)
        cached, covered = max(own[r], ready[r]) * block_tokens, asked.covered * block_tokens
        work_us = whole_us - p1 * cached - q * (cached * cached)
        covered_us = whole_us - p1 * covered - q * (covered * covered)
        least_us = np.inf
        for t in range(-1, len(targets)):
            decode = targets[t] if t >= 0 else (handoff.instead if handoff.first == r else handoff.first)
            if decode == r or decode < 0:
                continue
            handoff_us, last_us = _handoff_us(
                beside[r], hosts[r] == hosts[decode], handoff.prompt_blocks - own[r],
                handoff.prompt_blocks - own[decode], handoff.size, link,
            )  # fmt: skip
            service_us = max(work_us + last_us, handoff_us)
            if asked.pulls > 0 and asked.covered > own[r]:
                pulled, left_us = covered, covered_us + last_us
                excess_us = whole_us + last_us - handoff_us
                if left_us < handoff_us and excess_us >= 0:
                    # Cached tokens with which the prefill takes just as long as the hand-off.
                    root = p1 + np.sqrt(p1 * p1 + 4 * q * excess_us)
                    pulled = min(2 * excess_us / root, pulled) if root > 0 else 0.0
                    left_us = handoff_us
                missing = max(pulled / block_tokens - own[r], 0.0)
                service_us = min(service_us, latency_us[r] + block_us[r] * missing + max(left_us, handoff_us))
            ttft_us = _priced_us(found[WAIT_US, r] + service_us, asked.slo_us, asked.slack_price)
            least_us = min(least_us, ttft_us + found[OTHERS_US, r] + found[SLOW_US, decode])
        n = _insert(least_us, 0, r, n, costs, laters, rows)
    return rows[:n], costs[:n]


@_jit
def freest(found: Floats, decodes: Bools, count: int) -> Ints:
    """Rows that decode with the largest share of KV tokens left."""
    costs, laters, rows = np.empty(count), np.empty(count, np.int64), np.empty(count, np.int64)
    n = 0
    for r in range(found.shape[1]):
        if decodes[r]:
            n = _insert(found[KV_SHARE, r], 0, r, n, costs, laters, rows)
    return rows[:n]


@_jit
def calmest(found: Floats, decodes: Bools) -> int:
    """The row that decodes, has room and is held up least by prefills, then the freest; -1 if there is none."""
    best = -1
    for r in range(found.shape[1]):
        if decodes[r] and found[KV_LEFT, r] >= 0:
            less = best < 0 or found[STALLING, r] < found[STALLING, best]
            equal = best >= 0 and found[STALLING, r] == found[STALLING, best]
            if less or (equal and found[KV_SHARE, r] < found[KV_SHARE, best]):
                best = r
    return best


@_jit
def nearest(found: Floats, decodes: Bools, own: Ints) -> int:
    """The row that decodes, has room and holds most blocks, at least one; -1 if there is none (for numba's sake)."""
    best = -1
    for r in range(found.shape[1]):
        if decodes[r] and own[r] > 0 and found[KV_LEFT, r] >= 0 and (best < 0 or own[r] > own[best]):
            best = r
    return best


def warm_up() -> None:
    """Compiles, or loads what was compiled: not while somebody waits for a place."""
    table, found = np.zeros((COLUMNS, 1)), np.zeros((FOUND, 1))
    none, zeros, yes = np.zeros(1, np.int64), np.zeros(1), np.ones(1, bool)
    asked, link = Asked(*(1.0,) * len(Asked._fields)), LinkFloor(1.0, 1.0, 1.0, 1.0)
    pull_floors(none, none, none, np.zeros((2, 2), np.int64), np.zeros((4, 1), np.int64), link, 1.0)
    least_costs(table, none, none, zeros, zeros, zeros, zeros, asked, found)
    first_colocated(found, yes, 1.0, 1.0, 1)
    handoff = HandOff(1.0, 1.0, 0, -1)
    first_prefills(table, none, none, zeros, zeros, asked, found, yes, none, yes, link, handoff, none, 1)
    freest(found, yes, 1)
    nearest(found, yes, none)
    calmest(found, yes)
