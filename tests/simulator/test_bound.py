"""The clairvoyant bound: against all subsets, and above whatever any policy does."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.simulator.bound import goodput_max, least_prefill_us, served_max
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


def test_the_bound_falls_with_load_and_rises_with_machines() -> None:
    trace = conversations(80, 10.0, 3, prompt_tokens=30_000)
    shares = [goodput_max(trace, A800, machines, 3_000_000, 0.03) for machines in (1, 2, 4, 8)]
    assert shares == sorted(shares) and shares[0] < 0.6 < shares[-1]
    assert goodput_max([], A800, 1, 1, 0.0) == 1.0


@pytest.mark.parametrize("policy", ["kvpool", "always_split", "mooncake_algorithm1", "least_loaded", "llmd"])
@pytest.mark.parametrize(("split", "prefills"), [(None, 3), ((1, 2), 1), ((1, 1), 2)])
def test_nobody_is_above_the_bound(policy: str, split: tuple[int, int] | None, prefills: int) -> None:
    trace = conversations(50, 15.0, 11, prompt_tokens=20_000)
    asked = config(nodes=3, split=split, policy=policy, ttft_slo_us=4_000_000, seed=2)
    reached = simulate(trace, asked).figures()["goodput"]
    bound = goodput_max(trace, A800, prefills, asked.ttft_slo_us, asked.noise_ratio)
    assert 0 <= reached <= bound < 1, (reached, bound)
