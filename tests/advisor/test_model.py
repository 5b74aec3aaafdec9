"""The advisor's closed forms: against theory, against plain searches, and moving the right way."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.advisor import model, sizing
from scheduler.advisor.demand import Demand, Sample, demand_of
from scheduler.advisor.model import Objectives
from scheduler.simulator import workloads
from scheduler.simulator.columns import TraceBuilder
from scheduler.simulator.hardware import PROFILES

A800, H200 = PROFILES["a800x8-llama3-70b"], PROFILES["h200-gpt-oss-120b"]
LOOSE = Objectives(30e6, 200e3, 0.9)


def uniform(prompt: float, output: float, rate_per_s: float = 1.0, cached: float = 0.0) -> Demand:
    sizes = (np.full(200, float(x)) for x in (prompt, output, cached))
    return Demand(rate_per_s, 1.0, Sample(*sizes), capacity_blocks=1)


MIXED = demand_of(workloads.generate("multi-turn", 400, 1.0, seed=1), 10_000)


# ---------------------------------------------------------------- demand


def test_cached_tokens_are_those_of_a_plain_cache() -> None:
    trace = workloads.generate("agentic", 300, 2.0, seed=4, block_tokens=64)
    for capacity in (50, 500, 10_000_000):
        demand = demand_of(trace, capacity)
        held: dict[int, None] = {}
        for request, cached in zip(trace, demand.cached_tokens, strict=True):
            leading, matching = 0, True
            for block in request.hash_ids:
                matching = matching and block in held
                leading += matching
                held.pop(block, None)
                held[block] = None
                if len(held) > capacity:
                    del held[next(iter(held))]
            assert cached == min(leading, (request.prompt_tokens - 1) // 64) * 64


def test_requests_without_blocks_have_nothing_cached() -> None:
    builder = TraceBuilder("journal", 64)
    for n, ids in enumerate([[], [1, 2], [], [1, 2, 3], []]):
        builder.add(n, 64 * len(ids) + 10, 5, ids)
    assert demand_of(builder.build(), 100).cached_tokens.tolist() == [0, 0, 0, 128, 0]


def test_rate_and_unevenness() -> None:
    even, bursts = TraceBuilder("kvpool", 64), TraceBuilder("kvpool", 64)
    for n in range(400):
        even.add(n * 1_000_000, 10, 1, [n])
        bursts.add(n // 40 * 40_000_000, 10, 1, [n])
    assert demand_of(even.build(), 1).rate_per_s == pytest.approx(1.0)
    assert demand_of(even.build(), 1, speed=3).rate_per_s == pytest.approx(3.0)
    assert demand_of(even.build(), 1).unevenness == 1.0
    assert demand_of(bursts.build(), 1).unevenness > 10
    poisson = demand_of(
        workloads.generate("long-document", 3000, 2.0, 3, parameters=workloads.LongDocument(questions_mean=1)), 1
    )
    assert 1.0 <= poisson.unevenness < 1.3


# ---------------------------------------------------------------- queues


@pytest.mark.parametrize("busy", [0.1, 0.5, 0.9])
def test_one_server_is_pollaczek_and_khinchine(busy: float) -> None:
    fixed = np.full(1000, 1000.0)
    rate_per_s = busy * 1e6 / 1000
    found = model.queue_us(fixed, 1, rate_per_s, 1.0)
    assert found == pytest.approx((busy, busy, busy / (1 - busy) * 1000 / 2))
    exponential = -1000 * np.log(1 - (np.arange(100_000) + 0.5) / 100_000)
    assert model.queue_us(exponential, 1, rate_per_s, 1.0)[2] == pytest.approx(busy / (1 - busy) * 1000, rel=0.01)


def erlang_c(servers: int, load: float) -> float:
    """Chance of having to wait in M/M/n, exactly."""
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(load**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize("servers", [2, 8, 16])
@pytest.mark.parametrize("busy", [0.5, 0.8, 0.95])
def test_many_servers_are_near_erlang(servers: int, busy: float) -> None:
    exponential = -1000 * np.log(1 - (np.arange(100_000) + 0.5) / 100_000)
    _, _, wait_us = model.queue_us(exponential, servers, busy * servers * 1e6 / 1000, 1.0)
    exact_us = erlang_c(servers, busy * servers) / (servers * (1 - busy)) * 1000
    assert wait_us == pytest.approx(exact_us, rel=0.25, abs=20)


def test_a_full_queue_has_no_end() -> None:
    assert model.queue_us(np.full(10, 1000.0), 2, 2000.0, 1.0)[2] == math.inf


def test_in_time_counts_waits_longer_than_what_is_left() -> None:
    chances = model.in_time(np.array([1.0, 8.0, 11.0]), 0.5, 4.0, 10.0)
    # Waits: none with chance 1/2, else exponential with mean 8.
    assert chances.tolist() == pytest.approx([1 - 0.5 * math.exp(-9 / 8), 1 - 0.5 * math.exp(-2 / 8), 0.0])


# ---------------------------------------------------------------- prefill, pull, decode


@pytest.mark.parametrize("new", [1, 512, 2048, 2049, 10_000])
@pytest.mark.parametrize("cached", [0, 4096])
@pytest.mark.parametrize("chunk", [0, 512, 2048])
def test_prefill_is_the_sum_of_its_steps(new: int, cached: int, chunk: int) -> None:
    total, done = 0.0, 0
    while done < new:
        part = min(chunk or new, new - done)
        total += A800.step_duration_us([(part, cached + done)], 0, 0)
        done += part
    found = model.prefill_us(A800, np.array([float(new)]), np.array([float(cached)]), chunk)
    assert found[0] == pytest.approx(total)


def test_published_prefill_times() -> None:
    """FAST'25 Fig. 14, seconds at 8 to 128 thousand tokens."""
    published = {8: 0.97, 16: 2.08, 32: 4.44, 64: 10.58, 128: 27.5}
    tokens = np.array([1000.0 * n for n in published])
    found = model.prefill_us(A800, tokens, np.zeros(5), 0) / 1e6
    assert found.tolist() == pytest.approx(list(published.values()), rel=0.08)


def test_what_is_slower_to_fetch_is_computed() -> None:
    demand = uniform(8192, 100, cached=8000)
    for bytes_s, reuses in ((1e12, True), (1e8, False)):
        hardware = replace(A800, pull_bytes_s=bytes_s, nic_bytes_s=bytes_s, local_bytes_s=bytes_s)
        design = sizing.colocated(hardware, 4)
        service, _ = model.service_us(hardware, design.network, demand.sample, 0)
        full = model.prefill_us(hardware, demand.prompt_tokens, np.zeros(200), 0)
        assert (service < full).all() if reuses else (service == full).all()


def test_decode_batch_is_littles_law() -> None:
    demand = uniform(1000, 500, rate_per_s=4.0)
    e = model.evaluate(sizing.split(A800, 2, A800, 1, None), demand, LOOSE)
    step_us = A800.decode_step_us(1, 0) - A800.decode_sequence_us
    per_sequence_us = A800.decode_sequence_us + A800.decode_token_us * 1250
    # batch = arrivals in the time that one request takes
    assert e.batch == pytest.approx(4.0 * 500 * (step_us + e.batch * per_sequence_us) / 1e6)


def test_colocated_batch_makes_as_many_tokens_as_come() -> None:
    demand = uniform(4000, 300, rate_per_s=1.0)
    e = model.evaluate(sizing.colocated(A800, 1), demand, LOOSE)
    chunk = e.chunk_tokens
    chunks = math.ceil(4000 / chunk)
    riding = e.batch * (A800.decode_sequence_us + A800.decode_token_us * 4150)
    prefill = float(model.prefill_us(A800, np.array([4000.0]), np.zeros(1), chunk)[0])
    left_us = 1e6 - prefill - chunks * riding
    steps = chunks + left_us / (A800.step_us + riding)
    assert steps * e.batch == pytest.approx(300, rel=1e-6)


def test_the_share_of_undisturbed_answers_is_that_of_drawn_ones() -> None:
    rng = np.random.default_rng(5)
    output = np.full(20_000, 400.0)
    for share, clustered in ((0.02, 1), (0.05, 4), (0.08, 2), (0.2, 8)):
        clusters = rng.poisson(share * 400 / clustered, 20_000)
        long = np.minimum(clusters * clustered, 40)
        tbt = (long * 300 + (40 - long) * 50) / 40
        drawn = float((tbt <= 200).mean())
        steps, chunks_us = np.full(50, float(clustered)), np.full(50, 300.0)
        found = float(model._undisturbed(output, share, steps, 50.0, chunks_us, 200.0).mean())
        assert found == pytest.approx(drawn, abs=0.06), (share, clustered)


def test_only_chunks_beyond_the_limit_disturb() -> None:
    output, steps = np.full(10, 400.0), np.full(4, 10.0)
    calm = model._undisturbed(output, 0.5, steps, 50.0, np.full(4, 199.0), 200.0)
    assert calm.tolist() == [1.0] * 10
    one = model._undisturbed(output, 0.5, steps, 50.0, np.array([100.0, 100.0, 100.0, 300.0]), 200.0)
    every = model._undisturbed(output, 0.5, steps, 50.0, np.full(4, 300.0), 200.0)
    assert (every < one).all() and (one < calm).all()
    assert not model._undisturbed(output, 0.5, steps, 201.0, np.full(4, 300.0), 200.0).any()


def test_a_network_that_is_too_slow_is_an_obstacle() -> None:
    e = model.evaluate(sizing.split(A800, 4, A800, 4, 1e8), uniform(8192, 100), LOOSE)
    assert "network" in e.obstacle and e.network_busy > 1
    fast = model.evaluate(sizing.split(A800, 4, A800, 4, 1e11), uniform(8192, 100), LOOSE)
    assert not fast.obstacle and fast.exposed_us < 10_000


# ---------------------------------------------------------------- moving the right way


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.sampled_from([50e3, 100e3, 300e3]), st.floats(0.05, 20))
def test_more_requests_are_never_better(instances: int, tbt_us: float, rate: float) -> None:
    objectives = Objectives(10e6, tbt_us, 0.9)
    designs = [sizing.colocated(H200, instances), sizing.split(H200, instances, H200, instances, None)]
    for design in designs:
        slow, fast = (model.evaluate(design, MIXED.at(r), objectives).good_share for r in (rate, rate * 1.5))
        assert fast <= slow + 1e-9


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 12), st.floats(1e8, 1e11))
def test_more_instances_and_faster_links_carry_no_less(instances: int, bytes_s: float) -> None:
    def split(n: int, link: float) -> float:
        return sizing.capacity_per_s(sizing.split(H200, n, H200, n, link), MIXED, LOOSE)

    base = split(instances, bytes_s)
    assert split(instances, 4 * bytes_s) >= base * 0.99
    assert split(2 * instances, bytes_s) >= base * 0.99
    together = [sizing.capacity_per_s(sizing.colocated(H200, n), MIXED, LOOSE) for n in (instances, 2 * instances)]
    assert together[1] >= together[0] * 0.99


@pytest.mark.parametrize("instances", [2, 3, 9, 14, 20])
@pytest.mark.parametrize("demand", [uniform(32_768, 512), uniform(1000, 1000), MIXED])
def test_the_best_split_is_that_of_a_search_through_all(instances: int, demand: Demand) -> None:
    found = sizing.best_split(H200, instances, None, demand, LOOSE)
    every = [
        sizing.capacity_per_s(sizing.split(H200, p, H200, instances - p, None), demand, LOOSE)
        for p in range(1, instances)
    ]
    assert found is not None
    assert found.capacity_per_s >= max(every) * 0.98


def test_capacity_is_where_the_share_is_lost() -> None:
    design = sizing.colocated(A800, 4)
    capacity = sizing.capacity_per_s(design, MIXED, LOOSE)
    assert model.evaluate(design, MIXED.at(capacity), LOOSE).good_share >= 0.9
    assert model.evaluate(design, MIXED.at(capacity * 1.02), LOOSE).good_share < 0.9
    assert sizing.capacity_per_s(design, MIXED, Objectives(1.0, 1.0, 0.9)) == 0.0


def test_the_cheapest_is_that_of_a_search_through_all() -> None:
    demand = uniform(8192, 256, rate_per_s=6.0)
    found = sizing.cheapest([A800], None, demand, LOOSE)
    together = next(s.design for s in found if s.design.prefills == 0)
    apart = next(s.design for s in found if s.design.prefills)

    def good(design: model.Design) -> bool:
        return model.evaluate(design, demand, LOOSE).good_share >= 0.9

    assert together.decodes == next(n for n in range(1, 99) if good(sizing.colocated(A800, n)))
    fewest = min(p + d for p in range(1, 20) for d in range(1, 20) if good(sizing.split(A800, p, A800, d, None)))
    assert apart.prefills + apart.decodes == fewest


def test_tensor_parallel_variants_keep_the_weights() -> None:
    variants = {h.gpus_per_instance: h for h in sizing.tp_variants(A800, 32_768)}
    assert sorted(variants) == [4, 8]
    gpu_bytes = 0.9 * 80e9
    weights = {n: gpu_bytes * n - h.kv_tokens * h.kv_token_bytes for n, h in variants.items()}
    assert weights[4] == pytest.approx(weights[8], rel=1e-5)
    assert variants[4].instances_per_node == 2
    assert 1 < variants[4].prefill_token_us / A800.prefill_token_us < 2
    assert [h.gpus_per_instance for h in sizing.tp_variants(PROFILES["gb200-nvl72"], 1)] == [4]
    # Where one long request would not fit, half as many GPUs are none.
    assert [h.gpus_per_instance for h in sizing.tp_variants(A800, 1_000_000)] == [8]
