"""The kernels that screen a fleet and sort out runs, against plain arithmetic."""

from __future__ import annotations

import random

import numpy as np
import pytest

from scheduler.core import bounding, covering
from scheduler.core.bounding import Asked, HandOff
from scheduler.core.cost import LinkFloor


def asked_of(rng: random.Random, rows: int) -> Asked:
    return Asked(
        prompt_tokens=float(rng.randrange(64, 20_000)), block_tokens=64.0, covered=float(rng.randrange(0, 40)),
        pulls=float(rng.randrange(2)), context_tokens=float(rng.randrange(1, 20_000)),
        expected_tokens=float(rng.randrange(1, 500)), kv_tokens=float(rng.randrange(64, 20_000)),
        harm_weight=rng.uniform(0, 1), slo_us=rng.choice([0.0, 1e6]), slack_price=rng.choice([1.0, 0.3]),
        delay_rate=rng.uniform(0, 2), tpot_slo_us=rng.choice([0.0, 2e5]), typical_tokens=float(rng.randrange(1, 500)),
        stall_share=0.05, broken_us=8e7,
        window_us=3e7, now_us=1e6,
    )  # fmt: skip


def link_of(rng: random.Random) -> LinkFloor:
    return LinkFloor(rng.uniform(0, 3000), rng.uniform(0, 0.01), rng.uniform(0, 3000), rng.uniform(0, 0.01))


def plain(
    table: np.ndarray, r: int, own: int, ready: int, pull: tuple[float, float], ahead: tuple[float, float], a: Asked
):
    """Work before the request, its service, and what is left of KV tokens, of one row."""
    latency_us, block_us = pull
    p0, p1, p2 = table[:3, r]

    def prefill_us(blocks: float) -> float:
        cached = blocks * a.block_tokens
        new = a.prompt_tokens - cached
        return p0 + p1 * new + p2 * new * (cached + new / 2)

    ways = [prefill_us(own), prefill_us(ready)]
    if a.pulls and a.covered:
        pull_us = latency_us + block_us * (a.covered - own) if a.covered > own else 0.0
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
    own = np.array([rng.randrange(0, 20) for _ in range(rows)])
    ready = own + np.array([rng.randrange(0, 5) for _ in range(rows)])
    latency_us, block_us = (np.array([rng.uniform(0, most) for _ in range(rows)]) for most in (3000, 500))
    wait_us, kv_ahead = (np.array([rng.uniform(0, 1e4) for _ in range(rows)]) for _ in range(2))
    asked, found = asked_of(rng, rows), np.zeros((bounding.FOUND, rows))
    bounding.least_costs(table, own, ready, latency_us, block_us, wait_us, kv_ahead, asked, found)
    for r in range(rows):
        ahead = float(wait_us[r]), float(kv_ahead[r])
        pull = float(latency_us[r]), float(block_us[r])
        expected = plain(table, r, int(own[r]), int(ready[r]), pull, ahead, asked)
        assert found[[bounding.WAIT_US, bounding.SERVICE_US, bounding.KV_LEFT], r] == pytest.approx(expected), seed
    decodes = np.array([rng.random() < 0.7 for _ in range(rows)])
    count = rng.randrange(1, 12)
    chosen, costs = bounding.first_colocated(found, decodes, asked.slo_us, asked.slack_price, count)
    whole, all_costs = bounding.first_colocated(found, decodes, asked.slo_us, asked.slack_price, rows)
    cost_of = dict(zip(whole.tolist(), all_costs.tolist(), strict=True))
    order = sorted(cost_of, key=lambda r: (found[bounding.KV_LEFT, r] < 0, cost_of[r], r))
    assert whole.tolist() == order and sorted(order) == np.flatnonzero(decodes).tolist()
    assert chosen.tolist() == whole[:count].tolist() and costs.tolist() == all_costs[:count].tolist()
    by_share = sorted(np.flatnonzero(decodes), key=lambda r: (found[bounding.KV_SHARE, r], r))
    assert bounding.freest(found, decodes, 2).tolist() == by_share[:2]


@pytest.mark.parametrize("seed", range(60))
def test_no_way_to_split_is_cheaper_than_its_bound(seed: int) -> None:
    """Any number of blocks pulled, then prefill and hand-off side by side, to any of the instances that may decode."""
    rng = random.Random(seed)
    rows, prompt_blocks, size = 4, 100, 1e6
    table = np.zeros((bounding.COLUMNS, rows))
    table[:3, 0] = rng.uniform(0, 1e4), rng.uniform(0, 200), rng.uniform(0, 0.01)
    own = np.array([rng.randrange(0, 20) for _ in range(rows)])
    latency_us = np.array([rng.uniform(0, 3000)] * rows)
    block_us = np.array([rng.choice([rng.uniform(0, 20_000), bounding.NEVER_US])] * rows)
    zeros, hosts = np.zeros(rows), np.array([rng.randrange(2) for _ in range(rows)])
    asked, link = asked_of(rng, rows), link_of(rng)
    asked = asked._replace(covered=float(own[0] + rng.randrange(0, 30)), prompt_tokens=6400.0, slo_us=0.0)
    found = np.zeros((bounding.FOUND, rows))
    bounding.least_costs(table, own, own, latency_us, block_us, zeros, zeros, asked, found)
    found[bounding.SLOW_US] = [rng.uniform(0, 1e6) for _ in range(rows)]
    prefills, beside = np.array([True, False, False, False]), np.array([rng.random() < 0.7] * rows)
    first = rng.randrange(3)
    targets = np.array(rng.sample(range(rows), rng.randrange(0, 3)), np.int64)
    handoff = HandOff(float(prompt_blocks), size, first, rng.choice([-1, 3]))
    chosen, (bound,) = bounding.first_prefills(
        table, own, own, latency_us, block_us, asked, found, prefills, hosts, beside, link, handoff, targets, 2
    )
    assert chosen.tolist() == [0]

    def way_us(blocks: int, decode: int) -> float:
        new = asked.prompt_tokens - 64 * blocks
        work_us = table[0, 0] + table[1, 0] * new + table[2, 0] * new * (64 * blocks + new / 2)
        pull_us = latency_us[0] + block_us[0] * (blocks - own[0]) if blocks > own[0] else 0.0
        here, away = (link.here_latency_us, link.here_us), (link.away_latency_us, link.away_us)
        if beside[0]:
            hops = [here, here if hosts[0] == hosts[decode] else away]
        else:
            hops = [(min(here[0], away[0]), min(here[1], away[1]))] * 2
        handoff_us = last_us = 0.0
        for (hop_us, byte_us), held in zip(hops, (own[0], own[decode]), strict=True):
            handoff_us += hop_us + byte_us * size * (prompt_blocks - held)
            last_us += hop_us + byte_us * size
        return pull_us + max(work_us + last_us, handoff_us) + found[bounding.SLOW_US, decode]

    reaches = range(int(own[0]), int(asked.covered) + 1) if asked.pulls else [int(own[0])]
    decodes = {handoff.instead if first == 0 else first, *targets.tolist()} - {0, -1}
    least_us = min((way_us(blocks, decode) for blocks in reaches for decode in decodes), default=np.inf)
    least_us += found[bounding.WAIT_US, 0] + found[bounding.OTHERS_US, 0]
    assert bound <= least_us + 1e-3, seed
    # Blocks are whole: a bound may take a part of one.
    block_work_us = 64 * (table[1, 0] + table[2, 0] * asked.prompt_tokens)
    assert bound == least_us or bound >= least_us - min(block_us[0], block_work_us) - 1e-3, seed


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
    best, (counts, ends) = covering.furthest_by_host(kept, rank, hosts, 3, 4)
    for host in range(3):
        here = [row for row in in_order if hosts[row[0]] == host][:4]
        assert [tuple(row) for row in best[4 * host : 4 * host + counts[host]].tolist()] == here, seed
    reach = [max((first + count for n, first, count, _ in in_order if hosts[n] == h), default=0) for h in range(3)]
    assert ends.tolist() == reach, seed


@pytest.mark.parametrize("seed", range(60))
def test_the_floor_of_a_pull_is_what_plain_arithmetic_finds(seed: int) -> None:
    rng = random.Random(seed)
    sources, blocks, size = rng.randrange(1, 8), rng.randrange(1, 12), float(rng.randrange(1, 1 << 22))
    hosts = np.array([rng.randrange(4) for _ in range(sources)])
    crowds = np.array([rng.choice([1, 1, 2, 5]) for _ in range(sources)])
    runs = []
    for number in rng.sample(range(sources), rng.randrange(sources + 1)):
        first = rng.choice([0, 0, rng.randrange(blocks)])
        runs.append((number, first, rng.randrange(1, blocks - first + 1), 1))
    near, behind = np.zeros((2, 5), np.int64), np.zeros((4, blocks), np.int64)
    for part in (runs[::2], runs[1::2]):
        covering.offer(np.array(part, np.int32).reshape(-1, 4), hosts, crowds, near, behind)
    covering.settle(behind)
    numbers, link = np.array([2, 0, -1, 3, 1]), link_of(rng)
    own, rows_hosts = (np.array([rng.randrange(most) for _ in range(12)]) for most in (blocks + 2, 5))
    floors = bounding.pull_floors(own, rows_hosts, numbers, near, behind, link, size)
    for at, row_host, latency_us, block_us in zip(own, rows_hosts, *floors, strict=True):
        host = numbers[row_host]
        here = [crowds[n] for n, *_ in runs if hosts[n] == host]
        here_reach = max((first + count for n, first, count, _ in runs if hosts[n] == host), default=0)
        away = [crowds[n] for n, first, count, _ in runs if hosts[n] != host and first + count > at]
        latency, block = link.away_latency_us, link.away_us * min(away) * size if away else bounding.NEVER_US
        if here_reach > at:
            latency, block = min(latency, link.here_latency_us), min(block, link.here_us * min(here) * size)
        assert (latency_us, block_us) == ((latency, block) if at < blocks else (0.0, 0.0)), seed
