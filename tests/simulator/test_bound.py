"""The clairvoyant bound: against all subsets, and above whatever any policy does."""

from __future__ import annotations

from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.simulator.bound import goodput_max, least_prefill_us, prefixes_of, served_max, served_max_by_block
from scheduler.simulator.columns import TraceRequest
from scheduler.simulator.driver import simulate
from tests.simulator.cases import A800, config, conversations, request

JOBS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=9)


def _feasible(jobs: list[tuple[int, float]], limit: float) -> bool:
    """First come, first served, on one machine: the best order where all have the same limit."""
    end = 0.0
    for arrival, work in jobs:
        end = max(end, arrival) + work
        if end > arrival + limit:
            return False
    return True


def _by_search(jobs: list[tuple[int, float]], limit: float) -> int:
    return next(
        count
        for count in range(len(jobs), -1, -1)
        if any(_feasible(list(chosen), limit) for chosen in combinations(jobs, count))
    )


@settings(max_examples=300, deadline=None)
@given(jobs=JOBS, limit=st.integers(1, 60), machines=st.integers(1, 3))
def test_the_largest_set_is_that_of_a_search_through_all(
    jobs: list[tuple[int, int]], limit: int, machines: int
) -> None:
    jobs = sorted(jobs)
    # Works that divide: both sides compute without rounding.
    arrivals, works = [float(a) for a, _ in jobs], [float(w * machines) for _, w in jobs]
    possible = [(a, float(w)) for (a, w), whole in zip(jobs, works, strict=True) if whole <= limit]
    assert served_max(arrivals, works, machines, limit) == _by_search(possible, limit)


def test_a_prompt_that_came_before_costs_its_last_token() -> None:
    twice = [request(0, 4096, 10, stem=1), request(1, 4096, 10, stem=1), request(2, 6000, 10, stem=1)]
    first, second, longer = least_prefill_us(twice, A800)
    assert first == pytest.approx(4096 * A800.prefill_token_us + A800.prefill_pair_us * 4096**2 / 2)
    assert second == pytest.approx(A800.prefill_token_us + A800.prefill_pair_us * (4095 + 0.5))
    new = 6000 - 4096
    assert longer == pytest.approx(new * A800.prefill_token_us + A800.prefill_pair_us * new * (4096 + new / 2))
    assert least_prefill_us(twice, A800, 0.5)[0] == pytest.approx(first / 2)


# ---------------------------------------------------------------- by block

LIMIT_US = 2_000_000


def _forks(seed: int, count: int, seconds: float) -> list[TraceRequest]:
    """Prompts that go on from some place of an earlier one, or begin anew."""
    random, out, blocks = Random(seed), list[TraceRequest](), 0
    for arrival_s in sorted(random.random() * seconds for _ in range(count)):
        earlier = random.choice(out).hash_ids if out and random.random() < 0.7 else ()
        ids = list(earlier[: random.randint(0, len(earlier))])
        for _ in range(random.randint(0, 14)):
            ids.append(blocks)
            blocks += 1
        tail = random.choice((0, 1, 200)) if ids else 200
        tokens = len(ids) * 512 + tail
        out.append(TraceRequest(round(arrival_s * 1e6), tokens, random.randint(1, 60), tuple(ids), 512))
    return out


def _by_block(requests: list[TraceRequest], machines: int) -> int:
    arrival_us = np.array([float(request.arrival_us) for request in requests])
    return served_max_by_block(arrival_us, prefixes_of(requests, A800), machines, LIMIT_US)


def _jobs(chosen: tuple[int, ...], requests: list[TraceRequest]) -> list[tuple[float, float, float]]:
    """(release, due, work) of all that chosen requests need: blocks once, due with the first of them that has each."""
    jobs: list[tuple[float, float, float]] = []
    done: set[int] = set()
    for number in chosen:
        asked = requests[number]
        due = float(asked.arrival_us + LIMIT_US)
        full = asked.prompt_tokens // 512
        for place, block in enumerate(asked.hash_ids[:full]):
            if block not in done:
                done.add(block)
                release = next(r.arrival_us for r in requests if block in r.hash_ids)
                work = 512 * A800.prefill_token_us + A800.prefill_pair_us * 512 * (place * 512 + 256)
                jobs.append((release, due, work))
        tail = asked.prompt_tokens - full * 512
        work = tail * A800.prefill_token_us + A800.prefill_pair_us * tail * (full * 512 + tail / 2)
        jobs.append((asked.arrival_us, due, work))
    return jobs


def _can_be_in_time(requests: list[TraceRequest]) -> list[int]:
    """Who is, if each block is begun when the one before it is there and somebody has come who has it."""
    ready: dict[int, float] = {}
    out = []
    for number, asked in enumerate(requests):
        at = float(asked.arrival_us)
        end, full = 0.0, asked.prompt_tokens // 512
        for place, block in enumerate(asked.hash_ids[:full]):
            work = 512 * A800.prefill_token_us + A800.prefill_pair_us * 512 * (place * 512 + 256)
            end = ready.setdefault(block, max(end, at) + work)
        tail = asked.prompt_tokens - full * 512
        end = max(end, at) + tail * A800.prefill_token_us + A800.prefill_pair_us * tail * (full * 512 + tail / 2)
        if end <= at + LIMIT_US + 1e-6:
            out.append(number)
    return out


def _fits(jobs: list[tuple[float, float, float]], machines: int) -> bool:
    """In pieces, the earliest due first: possible if and only if no stretch of time has more work than it has room."""
    releases, dues = sorted({r for r, _, _ in jobs}), sorted({d for _, d, _ in jobs})
    return all(
        sum(work for release, due, work in jobs if release >= begin and due <= end) <= machines * (end - begin) + 1e-6
        for begin in releases
        for end in dues
        if end > begin
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    count=st.integers(1, 7),
    seconds=st.sampled_from([0.0, 1.0, 5.0]),
    machines=st.integers(1, 2),
)
def test_by_block_no_set_of_requests_is_larger(seed: int, count: int, seconds: float, machines: int) -> None:
    requests = _forks(seed, count, seconds)
    possible = _can_be_in_time(requests)
    best = next(
        size
        for size in range(len(possible), -1, -1)
        if any(_fits(_jobs(chosen, requests), machines) for chosen in combinations(possible, size))
    )
    assert best <= _by_block(requests, machines) <= len(possible)


def test_leaving_out_who_comes_first_saves_nothing_that_others_need() -> None:
    # Ten documents of 0.94 s each and ten readers of each, all at once: two seconds are enough for two.
    tokens = 7680
    requests = [request(0, tokens + 10, 2, stem=n % 10) for n in range(100)]
    document_us = float(prefixes_of(requests, A800).run_us[1])
    assert document_us == pytest.approx(tokens * A800.prefill_token_us + A800.prefill_pair_us * tokens**2 / 2)
    assert 2 * document_us < LIMIT_US < 3 * document_us
    assert _by_block(requests, 1) in (20, 21)
    # Who may take each document as computed by one who is left out serves nearly everybody.
    arrivals = [float(r.arrival_us) for r in requests]
    assert served_max(arrivals, least_prefill_us(requests, A800), 1, LIMIT_US) >= 90


def test_nobody_is_in_time_whose_prefix_another_has_just_begun() -> None:
    # 20k tokens take 2.6 s on one instance, of two that there are.
    requests = [request(at, 20_480 + 100, 2, stem=1) for at in (0.0, 0.3, 1.0, 2.0)]
    assert [_by_block(requests[:count], 2) for count in (1, 2, 3, 4)] == [0, 0, 1, 2]
    assert goodput_max(requests, A800, 2, LIMIT_US, 0.0) == 0.5


def test_runs_of_blocks_are_those_that_everybody_has_together() -> None:
    first, fork, longer = (0, 1, 2, 3), (0, 1, 7), (0, 1, 2, 3, 4, 5)
    requests = [
        TraceRequest(at, len(ids) * 512 + 5, 1, ids, 512) for at, ids in enumerate((first, fork, longer, first, ()))
    ]
    found = prefixes_of(requests, A800)
    assert found.before.tolist() == [0, 0, 1, 1, 2]
    assert found.first.tolist() == [0, 0, 0, 1, 2]
    assert found.last.tolist() == [2, 3, 4, 2, 0]
    whole = A800.prefill_token_us * 6 * 512 + A800.prefill_pair_us * (6 * 512) ** 2 / 2
    assert found.run_us[[1, 2, 4]].sum() == pytest.approx(whole)
    assert found.tail_us[4] == pytest.approx(5 * A800.prefill_token_us, rel=1e-3)
    assert prefixes_of(requests, A800, 0.25).run_us.sum() == pytest.approx(0.75 * found.run_us.sum())


def test_the_bound_falls_with_load_and_rises_with_machines() -> None:
    trace = conversations(80, 10.0, 3, prompt_tokens=12_000)
    shares = [goodput_max(trace, A800, machines, 3_000_000, 0.03) for machines in (1, 2, 4, 8)]
    assert shares == sorted(shares) and shares[0] < 0.6 < shares[-1]
    assert goodput_max([], A800, 1, 1, 0.0) == 1.0


@pytest.mark.parametrize("policy", ["kvpool", "always_split", "mooncake_algorithm1", "least_loaded", "llmd"])
@pytest.mark.parametrize("split", [None, (1, 2), (1, 1)])
def test_nobody_is_above_the_bound(policy: str, split: tuple[int, int] | None) -> None:
    trace = conversations(50, 15.0, 11, prompt_tokens=20_000)
    asked = config(nodes=3, split=split, policy=policy, ttft_slo_us=4_000_000, seed=2)
    reached = simulate(trace, asked).figures()["goodput"]
    bound = goodput_max(trace, A800, asked.instances, asked.ttft_slo_us, asked.noise_ratio)
    assert 0 <= reached <= bound < 1, (reached, bound)


def test_instances_that_are_there_to_decode_count_since_they_compute_prompts_too() -> None:
    # Hardly any answers: what stays on the decode instance is more than the prefill instance alone could serve.
    trace = [request(n * 0.1, 8192, 2, stem=n + 1) for n in range(60)]
    reached = simulate(trace, config(nodes=2, split=(1, 1), policy="kvpool", ttft_slo_us=3_000_000))
    good, limit_us = reached.figures()["goodput"], 3_000_000
    assert goodput_max(trace, A800, 1, limit_us, 0.03) < good <= goodput_max(trace, A800, 2, limit_us, 0.03)
    (prefill, decode) = reached.instances
    assert (prefill.role, decode.role) == ("prefill", "decode") and decode.prefill_tokens > 0
