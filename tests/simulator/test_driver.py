"""Whole simulations: the same every time, nothing lost, nothing left behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.errors import BadArgument
from scheduler.core.config import SECOND_US, SchedulerConfig
from scheduler.core.policies import POLICIES
from scheduler.simulator.columns import TraceRequest
from scheduler.simulator.driver import Simulation, simulate
from scheduler.simulator.hardware import PROFILES
from scheduler.simulator.metrics import Result
from scheduler.simulator.settings import SimulationConfig
from tests.simulator.cases import A800, config, conversations, request

TRACE = conversations(120, 60.0, seed=7)


def settled(requests: list[TraceRequest], how: SimulationConfig) -> tuple[Simulation, Result]:
    """Runs a trace with checks after every event of the scheduler, and then until everything is quiet."""
    simulation = Simulation(requests, how)
    count = 0

    def check() -> None:
        nonlocal count
        count += 1
        if count % 50 == 0:
            simulation.check_invariants()

    simulation.control.after_event = check
    result = simulation.run()
    simulation.control.after_event = None
    simulation.settle(60_000_000)
    simulation.check_invariants()
    return simulation, result


def assert_conserved(simulation: Simulation, requests: list[TraceRequest], result: Result) -> None:
    """Each request has ended once, each byte is accounted for, and nobody holds anything any more."""
    assert [r.number for r in result.records] == list(range(len(requests)))
    for record, asked in zip(result.records, requests, strict=True):
        assert record.output_tokens == asked.output_tokens
        assert record.tokens <= asked.output_tokens
        assert (record.tokens == asked.output_tokens) == (record.end == "done")
        assert (record.ttft_us is not None) == (record.tokens > 0)
        assert 0 <= record.cached_tokens < asked.prompt_tokens
    assert not simulation.core.book.placements
    assert len(simulation.hosts.handoffs) == len(simulation.hosts.fetches) == 0
    fabric = simulation.hosts.pool.fabric
    assert fabric.bytes_delivered == simulation.hosts.pool.bytes_pulled
    for seat in simulation.hosts.seats.values():
        engine = seat.engine
        assert engine.dead or engine.running == engine.waiting == len(engine.batch) == engine.cache.private_blocks == 0
    for node in simulation.hosts.pool.nodes.values():
        assert node.dead or not node.store._pins


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("split", [None, (2, 2)])
def test_every_policy_serves_every_request(policy: str, split: tuple[int, int] | None) -> None:
    simulation, result = settled(TRACE, config(4, policy=policy, split=split, ttft_slo_us=10**9, tbt_slo_us=10**8))
    assert_conserved(simulation, TRACE, result)
    assert Counter(r.end for r in result.records) == {"done": len(TRACE)}
    computed = sum(i.prefill_tokens for i in result.instances)
    cached = sum(r.cached_tokens for r in result.records)
    assert computed + cached >= sum(r.prompt_tokens for r in TRACE)
    assert sum(i.decode_tokens for i in result.instances) == sum(r.output_tokens - 1 for r in TRACE)


@pytest.mark.parametrize("split", [None, (2, 2)])
def test_the_same_seed_gives_the_same_log(split: tuple[int, int] | None) -> None:
    how = config(4, split=split)
    logs: list[list[str]] = [[], [], []]
    results = [simulate(TRACE, how, logs[0].append), simulate(TRACE, how, logs[1].append)]
    results.append(simulate(TRACE, replace(how, seed=1), logs[2].append))
    assert logs[0] == logs[1] and results[0] == results[1]
    assert results[2].log_sha256 != results[0].log_sha256
    assert results[0].log_lines == len(logs[0])


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    speed=st.sampled_from([1.0, 4.0, 20.0]),
    nodes=st.integers(1, 4),
    kv_blocks=st.integers(120, 400),
    dram_blocks=st.integers(0, 300),
    ssd_blocks=st.sampled_from([0, 500]),
    policy=st.sampled_from(sorted(POLICIES)),
    splits=st.booleans(),
    readable=st.booleans(),
    chunk_tokens=st.sampled_from([0, 2048]),
)
def test_nothing_is_lost_in_any_cluster(
    seed: int,
    speed: float,
    nodes: int,
    kv_blocks: int,
    dram_blocks: int,
    ssd_blocks: int,
    policy: str,
    splits: bool,
    readable: bool,
    chunk_tokens: int,
) -> None:
    block_bytes = A800.kv_token_bytes * 512
    hardware = replace(
        A800,
        kv_tokens=kv_blocks * 512,
        dram_bytes=dram_blocks * block_bytes,
        ssd_bytes=ssd_blocks * block_bytes,
        chunk_tokens=chunk_tokens,
    )
    requests = conversations(30, 20.0, seed)
    split = (nodes // 2, nodes - nodes // 2) if splits and nodes > 1 else None
    how = config(
        nodes, hardware, seed=seed, speed=speed, policy=policy, split=split, hbm_readable=readable,
        request_timeout_us=120_000_000, max_tokens=512,
    )  # fmt: skip
    simulation, result = settled(requests, how)
    assert_conserved(simulation, requests, result)


def test_a_split_request_gets_its_first_token_before_its_blocks_have_moved() -> None:
    requests = [request(0, 20_000, 50)]
    slow = replace(A800, nic_bytes_s=2e9, pull_bytes_s=2e9)
    how = config(2, slow, split=(1, 1), policy="always_split", noise_ratio=0.0, handoff_wait_us=60_000_000)
    _, result = settled(requests, how)
    record = result.records[0]
    assert record.split and record.tokens == 50
    prefill_us = A800.prefill_us(20_000, 0)
    assert record.ttft_us == pytest.approx(prefill_us, rel=0.02)
    moved_us = 20_000 * A800.kv_token_bytes / 2e9 * 1e6
    # What is not hidden behind the prefill is seen between the first token and the second.
    assert record.tbt_us > (moved_us - prefill_us) / 5
    assert result.bytes_pulled == 20_000 * A800.kv_token_bytes


def test_a_decode_instance_computes_what_does_not_come_in_time() -> None:
    requests = [request(0, 20_000, 50)]
    slow = replace(A800, nic_bytes_s=2e8, pull_bytes_s=2e8)
    how = config(2, slow, split=(1, 1), policy="always_split", noise_ratio=0.0)
    _, result = settled(requests, how)
    assert result.records[0].end == "done"
    computed = sum(i.prefill_tokens for i in result.instances)
    assert 30_000 < computed < 40_000


def test_a_long_prefix_elsewhere_is_pulled() -> None:
    """The second turn finds the instance that holds its prefix stuck behind a queue, and takes the blocks elsewhere."""
    turns = [request(0, 40_000, 2, stem=1), request(30, 40_500, 2, stem=1)]
    queue = [request(29.5 + 0.01 * i, 60_000, 2, stem=9 + i) for i in range(3)]
    requests = sorted([*turns, *queue], key=lambda r: r.arrival_us)
    _, result = settled(requests, config(4, policy="kvpool", noise_ratio=0.0))
    assert result.records[-1].cached_tokens == 78 * 512
    _, apart = settled(requests, config(4, policy="random", noise_ratio=0.0))
    assert result.records[-1].ttft_us < apart.records[-1].ttft_us


def test_a_refused_client_that_comes_back_is_served() -> None:
    requests = [request(0.01 * i, 30_000, 4, stem=i) for i in range(30)]
    how = config(1, policy="kvpool", ttft_slo_us=20_000_000)
    _, once = settled(requests, how)
    assert any(r.end == "refused" for r in once.records)
    assert all(r.why for r in once.records if r.end == "refused")
    _, again = settled(requests, replace(how, retries_max=20))
    assert sum(r.end == "done" for r in again.records) > sum(r.end == "done" for r in once.records)


def test_a_request_that_takes_too_long_ends_at_its_deadline() -> None:
    requests = [request(0.01 * i, 30_000, 4, stem=i) for i in range(10)]
    how = config(1, policy="random", request_timeout_us=10_000_000)
    simulation, result = settled(requests, how)
    assert_conserved(simulation, requests, result)
    late = [r for r in result.records if r.end == "deadline"]
    assert late and all(r.ended_us - r.arrival_us == 10_000_000 for r in late)


def test_the_scheduler_learns_what_the_hardware_is() -> None:
    """Its predictions start from priors of other hardware, and end near the truth."""
    simulation, result = settled(conversations(200, 120.0, 3), config(2, PROFILES["h100x8-llama3-70b"]))
    assert result.figures()["ttft_error_ratio_p50"] < 0.25
    fit = simulation.core.costs.prefill_us("engine-0", 8192, 0)
    assert fit == pytest.approx(PROFILES["h100x8-llama3-70b"].prefill_us(8192, 0), rel=0.25)


def test_instances_of_a_node_find_each_others_blocks_in_its_memory() -> None:
    h200 = PROFILES["h200-gpt-oss-120b"]
    requests = [request(0, 20_000, 2, stem=1), request(10, 20_500, 2, stem=1)]
    how = config(1, h200, policy="kvpool", noise_ratio=0.0)
    busy = [request(9.9, 60_000, 2, stem=9)]
    simulation, result = settled(sorted([*requests, *busy], key=lambda r: r.arrival_us), how)
    assert len(simulation.hosts.seats) == 8
    assert result.records[-1].cached_tokens == 39 * 512


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"nodes": 0}, "nodes must be"),
        ({"split": (3, 3)}, "does not fit"),
        ({"split": (4, 0)}, "nothing decodes"),
        ({"speed": 0.0}, "speed must be"),
        ({"policy": "clairvoyant"}, "policy 'clairvoyant' is not one of"),
        ({"noise_ratio": 1.0}, "noise_ratio"),
        ({"ttft_slo_us": 0}, "ttft_slo_us"),
        ({"hardware": replace(A800, kv_tokens=600)}, "no room for two blocks"),
    ],
)
def test_what_cannot_be_simulated_is_said(over: dict[str, object], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        Simulation(TRACE, replace(config(4), **over))  # type: ignore[arg-type]


def test_a_slice_of_the_published_trace() -> None:
    """With the trace where the task's shared folder has it, else a made-up one of its shape."""
    found = next((p / "conversation_trace.jsonl.gz" for p in _folders() if p.is_dir()), None)
    if found is not None and found.exists():
        from scheduler.simulator.traces import read_trace

        requests = list(read_trace(found)[:250])
    else:
        requests = conversations(250, 80.0, 11, prompt_tokens=16_000, output_tokens=700)
    simulation, result = settled(requests, config(16))
    assert_conserved(simulation, requests, result)
    figures = result.figures()
    assert figures["goodput"] > 0.5 and figures["errors"] == 0
    random = simulate(requests, config(16, policy="random")).figures()
    assert figures["goodput"] >= random["goodput"] and figures["ttft_ms"] < random["ttft_ms"]


def _folders() -> list[Path]:
    here = Path(__file__).resolve()
    return [parent / "shared" / "traces" for parent in here.parents]


def test_the_scheduler_config_is_the_given_one() -> None:
    simulation = Simulation(TRACE, config(4, policy="sticky", scheduler=SchedulerConfig(harm_weight=2.0)))
    assert simulation.core.config.harm_weight == 2.0 and simulation.core.config.policy == "sticky"


def test_a_request_waits_for_a_place_as_long_as_gateways_allow() -> None:
    """The first takes all KV tokens for about half a minute; the second could wait so long by its objective."""
    small = replace(A800, kv_tokens=12_288)
    requests = [request(0.0, 6_000, 1_000, stem=1), request(1.0, 6_000, 5, stem=2)]
    base = config(1, hardware=small, ttft_slo_us=60 * SECOND_US, max_tokens=1_024)
    patient = simulate(requests, replace(base, wait_us_max=60 * SECOND_US)).records[1]
    assert patient.end == "done" and patient.ttft_us is not None and patient.ttft_us > 20 * SECOND_US
    hasty = simulate(requests, replace(base, wait_us_max=2 * SECOND_US)).records[1]
    assert (hasty.end, hasty.why) == ("refused", "no_capacity")
    assert hasty.ended_us - hasty.arrival_us <= 2 * SECOND_US
