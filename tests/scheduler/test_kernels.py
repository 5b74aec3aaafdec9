"""The kernels that screen a fleet and sort out runs, against plain arithmetic."""

from __future__ import annotations

import random

import numpy as np
import pytest

from scheduler.core import bounding, covering
from scheduler.core.bounding import Asked, HandOff


def asked_of(rng: random.Random, rows: int) -> Asked:
    return Asked(
        prompt_tokens=float(rng.randrange(64, 20_000)), block_tokens=64.0, covered=float(rng.randrange(0, 40)),
        pulls=float(rng.randrange(2)), latency_us=rng.uniform(0, 3000), context_tokens=float(rng.randrange(1, 20_000)),
        expected_tokens=float(rng.randrange(1, 500)), kv_tokens=float(rng.randrange(64, 20_000)),
        harm_weight=rng.uniform(0, 1), slo_us=rng.choice([0.0, 1e6]), slack_price=rng.choice([1.0, 0.3]),
        delay_rate=rng.uniform(0, 2), tpot_slo_us=rng.choice([0.0, 2e5]), typical_tokens=float(rng.randrange(1, 500)),
        stall_share=0.05, broken_us=8e7,
        window_us=3e7, now_us=1e6,
    )  # fmt: skip


def plain(table: np.ndarray, r: int, own: int, ready: int, block_us: float, ahead: tuple[float, float], a: Asked):
    """Work before the request, its service, and what is left of KV tokens, of one row."""
    p0, p1, p2 = table[:3, r]

    def prefill_us(blocks: float) -> float:
        cached = blocks * a.block_tokens
        new = a.prompt_tokens - cached
        return p0 + p1 * new + p2 * new * (cached + new / 2)

    ways = [prefill_us(own), prefill_us(ready)]
    if a.pulls and a.covered:
        pull_us = a.latency_us + block_us * (a.covered - own) if a.covered > own else 0.0
        ways.append(prefill_us(a.covered) + pull_us)
    head_us = min(max(a.now_us - table[bounding.HEAD_SINCE_US, r], 0), table[bounding.HEAD_US, r])
    wait_us = table[bounding.QUEUE_US, r] - head_us + ahead[0] + table[bounding.FOREIGN, r] * prefill_us(0)
    return wait_us, min(ways), table[bounding.KV_FREE, r] - a.kv_tokens - ahead[1]


@pytest.mark.parametrize("seed", range(20))
def test_bounds_are_what_plain_arithmetic_finds(seed: int) -> None:
    rng = random.Random(seed)
    rows = rng.randrange(1, 60)
    table = np.array([[rng.uniform(0, 100) for _ in range(rows)] for _ in range(bounding.COLUMNS)])
    table[2] /= 1e5
    hosts = np.array([rng.randrange(3) for _ in range(rows)])
    own = np.array([rng.randrange(0, 20) for _ in range(rows)])
    ready = own + np.array([rng.randrange(0, 5) for _ in range(rows)])
    block_us = np.array([rng.uniform(0, 500) for _ in range(3)])
    wait_us, kv_ahead = (np.array([rng.uniform(0, 1e4) for _ in range(rows)]) for _ in range(2))
    asked, found = asked_of(rng, rows), np.zeros((bounding.FOUND, rows))
    bounding.least_costs(table, hosts, own, ready, block_us, wait_us, kv_ahead, asked, found)
    for r in range(rows):
        ahead = float(wait_us[r]), float(kv_ahead[r])
        expected = plain(table, r, int(own[r]), int(ready[r]), float(block_us[hosts[r]]), ahead, asked)
        assert found[[bounding.WAIT_US, bounding.SERVICE_US, bounding.KV_LEFT], r] == pytest.approx(expected), seed
    decodes = np.array([rng.random() < 0.7 for _ in range(rows)])
    count = rng.randrange(1, 12)
    chosen, costs = bounding.first_colocated(asked, found, decodes, count)
    whole, all_costs = bounding.first_colocated(asked, found, decodes, rows)
    cost_of = dict(zip(whole.tolist(), all_costs.tolist(), strict=True))
    order = sorted(cost_of, key=lambda r: (found[bounding.KV_LEFT, r] < 0, cost_of[r], r))
    assert whole.tolist() == order and sorted(order) == np.flatnonzero(decodes).tolist()
    assert chosen.tolist() == whole[:count].tolist() and costs.tolist() == all_costs[:count].tolist()
    by_share = sorted(np.flatnonzero(decodes), key=lambda r: (found[bounding.KV_SHARE, r], r))
    assert bounding.freest(found, decodes, 2).tolist() == by_share[:2]


@pytest.mark.parametrize("seed", range(40))
def test_no_way_to_split_is_cheaper_than_its_bound(seed: int) -> None:
    """Any number of blocks pulled, then prefill and hand-off side by side."""
    rng = random.Random(seed)
    table = np.zeros((bounding.COLUMNS, 1))
    table[:3, 0] = rng.uniform(0, 1e4), rng.uniform(0, 200), rng.uniform(0, 0.01)
    own, zeros = np.array([rng.randrange(0, 20)]), np.zeros(1)
    block_us, nowhere, yes = np.array([rng.uniform(0, 20_000)]), np.zeros(1, np.int64), np.ones(1, bool)
    asked = asked_of(rng, 1)._replace(covered=float(own[0] + rng.randrange(0, 30)), prompt_tokens=6400.0, slo_us=0.0)
    found = np.zeros((bounding.FOUND, 1))
    bounding.least_costs(table, nowhere, own, own, block_us, zeros, zeros, asked, found)
    handoff = HandOff(rng.uniform(0, 1e6), rng.uniform(0, 1e4), rng.uniform(0, 1e4), 100.0, 0.0)
    _, (bound,) = bounding.first_prefills(table, nowhere, own, own, block_us, asked, handoff, found, yes, 1)
    bound -= found[bounding.WAIT_US, 0] + found[bounding.OTHERS_US, 0]
    handoff_us = handoff.fixed_us + handoff.block_us * max(100 - own[0], 1)
    reaches = range(int(own[0]), int(asked.covered) + 1) if asked.pulls else [int(own[0])]
    for blocks in reaches:
        new = asked.prompt_tokens - 64 * blocks
        work_us = table[0, 0] + table[1, 0] * new + table[2, 0] * new * (64 * blocks + new / 2)
        pull_us = asked.latency_us + block_us[0] * (blocks - own[0]) if blocks > own[0] else 0.0
        assert bound <= pull_us + max(work_us + handoff.last_us, handoff_us) + 1e-3, (seed, blocks)


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_sorted_out(seed: int) -> None:
    rng = random.Random(seed)
    sources = rng.randrange(1, 30)
    rows = []
    for number in range(sources + 2):  # the last two are not known
        at = rng.choice([0, 0, 3])
        for _ in range(rng.randrange(0, 3)):
            count = rng.randrange(1, 9)
            rows.append((number, at, count, rng.choice([1, 1, 2])))
            at += count + rng.randrange(1, 4)
    rng.shuffle(rows)
    table = np.array(rows, np.int32).reshape(-1, 4)
    readable = np.array([rng.random() < 0.6 for _ in range(sources)])
    lead = np.zeros(sources, np.int64)
    kept, touching = covering.sort_out(table, readable, 1, lead)
    known = [row for row in rows if row[0] < sources and row[3] == 1]
    assert [tuple(row) for row in kept.tolist()] == [row for row in known if readable[row[0]]]
    assert lead.tolist() == [sum(c for n, first, c, _ in known if n == s and first == 0) for s in range(sources)]
    assert touching == any(first > 0 and first <= lead[n] for n, first, _, _ in known)
    rank, hosts = np.array(rng.sample(range(sources), sources)), np.array([rng.randrange(3) for _ in range(sources)])
    in_order = sorted(map(tuple, kept.tolist()), key=lambda row: (-(row[1] + row[2]), rank[row[0]], row[1]))
    assert [tuple(row) for row in covering.furthest(kept, rank, 4).tolist()] == in_order[:4], seed
    best, counts = covering.furthest_by_host(kept, rank, hosts, 3, 4)
    for host in range(3):
        here = [row for row in in_order if hosts[row[0]] == host][:4]
        assert [tuple(row) for row in best[4 * host : 4 * host + counts[host]].tolist()] == here, seed
    crowds, shared = np.array([rng.randrange(1, 5) for _ in range(sources)]), np.zeros(4, np.int64)
    covering.least_crowded(kept, hosts, crowds, shared)
    holders = [number for number, *_ in kept.tolist()]
    assert shared.tolist() == [min((crowds[n] for n in holders if hosts[n] == h), default=0) for h in range(4)]


@pytest.mark.parametrize("seed", range(20))
def test_the_floor_of_a_pull_is_what_plain_arithmetic_finds(seed: int) -> None:
    rng = random.Random(seed)
    shared = np.array([*(rng.choice([0, 0, 1, 2, 5]) for _ in range(rng.randrange(0, 6))), 0])
    numbers = np.array([rng.randrange(-1, len(shared)) for _ in range(8)])
    here_us, away_us, size = rng.uniform(0, 0.001), rng.uniform(0, 0.01), float(rng.randrange(1, 1 << 22))
    remote_us = away_us * min((n for n in shared.tolist() if n), default=1)
    expected = [min(here_us * n, remote_us) * size if n else remote_us * size for n in shared[numbers].tolist()]
    assert bounding.pull_floor(shared, numbers, here_us, away_us, size).tolist() == expected, seed
