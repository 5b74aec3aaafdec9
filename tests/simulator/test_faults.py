"""Faults: each is seen to act, and nothing is lost by any."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.errors import BadArgument
from scheduler.simulator.driver import Simulation, simulate
from scheduler.simulator.faults import Fault, FaultKind, fault_of, read_faults
from tests.simulator.cases import config, conversations, request
from tests.simulator.test_driver import assert_conserved, settled

TRACE = conversations(80, 60.0, seed=5, output_tokens=300)


def fault(kind: str, target: str, at_s: float, **over: float) -> Fault:
    return fault_of({"kind": kind, "target": target, "at_s": at_s, **over}, "here")


def log_of(faults: tuple[Fault, ...], **over: object) -> tuple[list[dict[str, Any]], Simulation]:
    lines: list[str] = []
    # Limits that nobody refuses for: these tests are about losses.
    how = config(3, faults=faults, ttft_slo_us=10**9, tbt_slo_us=10**8, **over)
    simulation = Simulation(TRACE, how, lines.append)
    result = simulation.run()
    simulation.settle(60_000_000)
    simulation.check_invariants()
    assert_conserved(simulation, TRACE, result)
    return [json.loads(line) for line in lines], simulation


def test_a_crashed_instance_loses_its_requests_and_they_end_elsewhere() -> None:
    log, simulation = log_of((fault("crash", "engine-1", 20, duration_s=15),), policy="round_robin")
    lost = [e for e in log if e["what"] == "lost"]
    assert lost and all(e["instance"] == "engine-1" for e in lost)
    assert any(e["tokens"] > 0 for e in lost), "some had tokens: they go on from there"
    assert all(r.end == "done" for r in simulation.gateway.records)
    crash_us, back_us = (next(e["us"] for e in log if e["what"] == w) for w in ("fault", "fault-over"))
    placed = [e["us"] for e in log if e["what"] == "placed" and e["decode"] == "engine-1"]
    assert not [us for us in placed if crash_us + 2000 < us < back_us], "nothing is placed on the dead"
    assert [us for us in placed if us > back_us], "it is used again"


def test_a_crashed_host_takes_its_blocks_with_it() -> None:
    log, simulation = log_of((fault("crash", "host-0", 20),))
    assert all(r.end == "done" for r in simulation.gateway.records)
    gone = {(e["kind"], e["id"]) for e in log if e["what"] == "state" and e["state"] == "gone"}
    assert {("instance", "engine-0"), ("source", "host-0.node"), ("source", "engine-0/hbm")} <= gone
    assert simulation.hosts.pool.nodes["host-0"].dead


def test_a_host_cut_off_is_suspected_and_then_gone_and_comes_back() -> None:
    log, simulation = log_of((fault("partition", "host-2", 20, duration_s=25),))
    states = [(e["state"], e["us"]) for e in log if e["what"] == "state" and e["id"] == "engine-2"]
    assert [state for state, _ in states] == ["alive", "suspect", "gone", "alive"]
    cut_us = next(e["us"] for e in log if e["what"] == "fault")
    assert 2_000_000 < states[1][1] - cut_us < 4_000_000
    assert all(r.end == "done" for r in simulation.gateway.records)


def test_a_short_cut_only_delays() -> None:
    log, _ = log_of((fault("partition", "host-2", 20, duration_s=4),))
    states = [e["state"] for e in log if e["what"] == "state" and e["id"] == "engine-2"]
    assert states == ["alive", "suspect", "alive"]
    assert not [e for e in log if e["what"] == "lost"]


def test_a_slow_link_slows_what_goes_through_it() -> None:
    requests = [request(0, 40_000, 200)]
    how = config(2, split=(1, 1), policy="always_split", noise_ratio=0.0, handoff_wait_us=60_000_000)
    slow = fault("link", "host-0", 0, duration_s=600, factor=0.01)
    good, bad = (simulate(requests, replace(how, faults=f)).records[0] for f in ((), (slow,)))
    assert bad.ended_us - good.ended_us > 5_000_000
    assert bad.ttft_us == good.ttft_us


def test_a_link_that_is_down_fails_pulls_and_the_rest_is_computed() -> None:
    requests = [request(0, 40_000, 200)]
    how = config(2, split=(1, 1), policy="always_split", noise_ratio=0.0)
    down = fault("link", "host-0", 0, duration_s=600, factor=0.0)
    _, result = settled(requests, replace(how, faults=(down,)))
    assert result.records[0].end == "done" and result.pull_failures > 0
    assert sum(i.prefill_tokens for i in result.instances) == 80_000


def test_a_flapping_link_is_up_and_down_by_turns() -> None:
    flap = fault("link", "host-0", 1, duration_s=10, factor=0.0, period_s=2)
    simulation = Simulation(TRACE, config(3, faults=(flap,)))
    seen: list[float] = []
    resource = simulation.hosts.pool.fabric.resources["host-0/nic-in"]

    def look() -> None:
        if not seen or seen[-1] != resource.factor:
            seen.append(resource.factor)

    simulation.control.after_event = look
    simulation.run()
    assert seen == [1.0, *[0.0, 1.0] * 5]


def test_a_slow_instance_is_slow_and_the_scheduler_notices() -> None:
    slow = fault("slow", "engine-0", 5, duration_s=50, factor=8)
    log, simulation = log_of((slow,))
    share = {i.instance_id: i.prefill_tokens + i.decode_tokens for i in simulation._result().instances}
    assert share["engine-0"] < 0.8 * sum(share.values()) / 3
    assert [e for e in log if e["what"] == "fault-over"]


def test_a_wrong_clock_shows_in_what_is_measured_only() -> None:
    requests = [request(0, 8_000, 100), request(20, 9_000, 100, stem=5)]
    skewed, straight = (
        Simulation(requests, config(1, noise_ratio=0.0, faults=f))
        for f in ((fault("clock", "host-0", 0, factor=3),), ())
    )
    ends = [[r.ended_us for r in s.run().records] for s in (skewed, straight)]
    assert ends[0] == ends[1]
    believed = [s.core.costs.prefill_us("engine-0", 8192, 0) for s in (skewed, straight)]
    assert believed[0] > 1.5 * believed[1]


def test_lost_batches_are_made_good_by_snapshots() -> None:
    _, simulation = log_of((fault("lost-events", "host-0", 0, duration_s=50, factor=0.5),))
    lines = simulation.hosts.source_lines("host-0")
    assert sum(line.batches_lost for line in lines) > 0
    assert_directory_is_right(simulation)


def test_late_batches_come_in_order() -> None:
    _, simulation = log_of((fault("late-events", "host-0", 5, duration_s=40, delay_s=2),))
    assert all(line.late_us == 0 for line in simulation.hosts.source_lines("host-0"))
    assert_directory_is_right(simulation)


def assert_directory_is_right(simulation: Simulation) -> None:
    """Everything quiet: what the scheduler believes is what the sources hold."""
    hosts = simulation.hosts
    for node in hosts.pool.nodes.values():
        for tier, line in node.lines.items():
            held = sorted(hosts.keys.of(block) for block in node.store.blocks(tier))
            source_id = node.node_id if tier.name == "DRAM" else f"{node.node_id}.ssd"
            assert simulation.core.directory.held_by(source_id).tobytes() == b"".join(held), line
    for seat in hosts.seats.values():
        held = sorted(hosts.keys.of(block) for block in seat.engine.cache.blocks())
        assert simulation.core.directory.held_by(f"{seat.instance_id}/hbm").tobytes() == b"".join(held)


def test_without_faults_the_directory_is_right_in_the_end() -> None:
    _, simulation = log_of(())
    assert_directory_is_right(simulation)


FAULTS = st.lists(
    st.one_of(
        st.builds(
            Fault,
            kind=st.just(FaultKind.CRASH),
            target=st.sampled_from(["engine-0", "engine-1", "host-2"]),
            at_us=st.integers(0, 40_000_000),
            duration_us=st.integers(0, 30_000_000),
        ),
        st.builds(
            Fault,
            kind=st.sampled_from([FaultKind.PARTITION, FaultKind.LINK, FaultKind.LOST_EVENTS]),
            target=st.sampled_from(["host-0", "host-1", "host-2"]),
            at_us=st.integers(0, 40_000_000),
            duration_us=st.integers(1, 30_000_000),
            factor=st.sampled_from([0.0, 0.05, 0.9]),
            period_us=st.sampled_from([0, 3_000_000]),
        ),
        st.builds(
            Fault,
            kind=st.just(FaultKind.LATE_EVENTS),
            target=st.sampled_from(["host-0", "host-1"]),
            at_us=st.integers(0, 40_000_000),
            duration_us=st.integers(1, 30_000_000),
            delay_us=st.integers(0, 20_000_000),
        ),
    ),
    max_size=6,
)


@settings(max_examples=12, deadline=None)
@given(faults=FAULTS, seed=st.integers(0, 100), split=st.sampled_from([None, (1, 1), (1, 2)]))
def test_whatever_goes_wrong_each_request_ends_once(
    faults: list[Fault], seed: int, split: tuple[int, int] | None
) -> None:
    requests = conversations(30, 40.0, seed, output_tokens=200)
    how = config(3, seed=seed, faults=tuple(faults), split=split, request_timeout_us=60_000_000)
    simulation, result = settled(requests, how)
    assert_conserved(simulation, requests, result)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("crash", "an object is expected"),
        ({"kind": "meteor"}, "kind 'meteor' is not one of crash"),
        ({"kind": "crash", "at_s": 1}, "target must name"),
        ({"kind": "crash", "target": "engine-0"}, "crash needs at_s"),
        ({"kind": "crash", "target": "engine-0", "at_s": -1}, "at_s must be a number from 0"),
        ({"kind": "crash", "target": "engine-0", "at_s": "soon"}, "at_s must be a number"),
        ({"kind": "link", "target": "host-0", "at_s": 1, "duration_s": 1}, "link needs factor"),
        ({"kind": "link", "target": "host-0", "at_s": 1, "duration_s": 1, "factor": 2}, "factor 2 is above 1"),
        ({"kind": "crash", "target": "engine-0", "at_s": 1, "factor": 1}, "crash has no field 'factor'"),
        ({"kind": "slow", "target": "engine-0", "at_s": 1, "duration_s": 1, "factor": 0}, "factor must be above zero"),
    ],
)
def test_a_bad_fault_is_named(tmp_path: Path, entry: Any, message: str) -> None:
    good = {"kind": "crash", "target": "engine-0", "at_s": 1}
    file = tmp_path / "faults.json"
    file.write_text(json.dumps({"faults": [good, entry]}))
    with pytest.raises(BadArgument, match="fault 2: .*" + message):
        read_faults(file)


def test_a_file_of_faults_is_read(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    file.write_text(json.dumps([{"kind": "link", "target": "host-1", "at_s": 1.5, "duration_s": 2, "factor": 0.25}]))
    assert read_faults(file) == (Fault(FaultKind.LINK, "host-1", at_us=1_500_000, duration_us=2_000_000, factor=0.25),)
    file.write_text("{")
    with pytest.raises(BadArgument, match="can't be read"):
        read_faults(file)


@pytest.mark.parametrize(("kind", "target"), [("crash", "engine-9"), ("link", "engine-0"), ("slow", "host-0")])
def test_a_fault_on_nobody_is_refused(kind: str, target: str) -> None:
    over = {"crash": {}, "link": {"factor": 0.5, "duration_s": 1}, "slow": {"factor": 2, "duration_s": 1}}[kind]
    with pytest.raises(BadArgument, match=f"fault {kind}: no .* {target!r}"):
        Simulation(TRACE, config(3, faults=(fault(kind, target, 1, **over),)))
