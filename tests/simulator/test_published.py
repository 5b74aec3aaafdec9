"""Published experiments: workloads with the published means, rules that judge as published, rows that can be run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from scheduler.core.config import SECOND_US, SchedulerConfig
from scheduler.core.placements import Placement, PlacementBook
from scheduler.core.policies import POLICIES
from scheduler.core.policy_parameters import PolicyParameters
from scheduler.simulator.columns import Trace, TraceBuilder
from scheduler.simulator.driver import simulate
from scheduler.simulator.hardware import PROFILES
from scheduler.simulator.published import experiments, rules
from scheduler.simulator.published.workloads import Mixture, synthetic
from scheduler.simulator.settings import SimulationConfig
from scheduler.simulator.trace_stats import stats

A800 = PROFILES["a800x8-llama3-70b"]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_synthetic_workload_has_the_published_means(seed: int) -> None:
    """FAST'25, Table 2, and what the published file has in blocks and seconds."""
    found = stats(synthetic(Mixture().requests, seed), ())
    assert found.requests == 3993
    assert found.duration_s == pytest.approx(1022, rel=0.05)
    assert found.prompt.mean == pytest.approx(15_325, rel=0.05)
    assert found.output.mean == pytest.approx(149, rel=0.08)
    assert found.unique_blocks == pytest.approx(43_924, rel=0.1)
    assert found.hit_ratios[-1].tokens == pytest.approx(0.66, abs=0.03)


def test_fewer_requests_share_as_much() -> None:
    part, whole = (stats(synthetic(count, 3), ()).hit_ratios[-1].tokens for count in (600, 3993))
    assert part == pytest.approx(whole, abs=0.05)


def test_equal_ids_are_equal_prefixes() -> None:
    trace = synthetic(800, 5)
    before: dict[int, int] = {}
    for request in trace:
        assert len(request.hash_ids) == -(-request.prompt_tokens // request.block_tokens)
        for last, block in zip((-1, *request.hash_ids), request.hash_ids, strict=False):
            assert before.setdefault(block, last) == last
    assert synthetic(800, 5).hash_ids.tolist() == trace.hash_ids.tolist()


def test_balanced_phases_are_full_at_the_same_load() -> None:
    limit_us, outputs, context = 100_000.0, 300.0, 12_000.0
    made = rules.balanced(1_000_000.0, outputs, context, limit_us, A800.step_us, A800.decode_token_us)
    batch = made.requests_s * outputs * limit_us / 1e6  # as many as come while one decodes
    step_us = A800.step_us + batch * (made.sequence_us + A800.decode_token_us * context)
    assert step_us == pytest.approx(limit_us)


def _placement(number: int, prefill_done: bool, prefill_ends_s: float, decode_ends_s: float) -> Placement:
    return Placement(
        owner=("gateway", f"r{number}"), model="model", max_tokens=100, prefill_id="p", decode_id="d", split=True,
        kv_tokens=1_100, prefill_kv_tokens=0, prefill_holds=False, prefill_us=1, context_tokens=1_000 * number,
        expected_tokens=100, placed_us=0, decode_ends_us=int(decode_ends_s * 1e6), expires_us=10**9,
        prefill_done=prefill_done, prefill_ends_us=int(prefill_ends_s * 1e6),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("at_s", "predicted", "who"),
    [
        pytest.param(1, False, (1,), id="on arrival: who decodes now, and nobody whose prompt is computed"),
        pytest.param(1, True, (1,), id="predicted for now"),
        pytest.param(5, True, (1, 2), id="the second has begun by then"),
        pytest.param(11, True, (2, 3), id="and the first is over"),
        pytest.param(30, True, (), id="all are over"),
    ],
)
def test_load_is_of_those_who_decode_at_a_time(at_s: int, predicted: bool, who: tuple[int, ...]) -> None:
    book = PlacementBook()
    book.open(_placement(1, True, 0.5, 10))
    book.open(_placement(2, False, 3, 20))
    book.open(_placement(3, False, 8, 28))
    appraiser = SimpleNamespace(book=book, now_us=SECOND_US)
    instance = SimpleNamespace(id="d")
    found = rules._decoding_at(appraiser, instance, at_s * SECOND_US, predicted)  # type: ignore[arg-type]
    assert found == (len(who), sum(1_000 * number for number in who))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in rules.RULES.items():
        monkeypatch.setitem(POLICIES, name, make)


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_rows_can_be_simulated(name: str, known: None) -> None:
    experiment = experiments.EXPERIMENTS[name](synthetic(40, 0))
    assert experiment.rows and experiment.figures
    for row in experiment.rows:
        row.config.check()
        assert row.config.policy in POLICIES


def test_who_is_judged_late_was_computed_in_vain(known: None) -> None:
    """Table 3's first two rules with one instance that decodes, slowly: early rejection spares work."""
    trace = _crowd()
    slow = replace(A800, decode_sequence_us=4_000.0)
    base = SimulationConfig(
        hardware=slow, nodes=3, split=(2, 1), refuses=True, late_rejection=True, tbt_slo_us=SECOND_US // 10,
        max_tokens=512,
    )  # fmt: skip
    on_arrival = SchedulerConfig(baselines=PolicyParameters(mooncake_predicts_load=False))
    late = simulate(trace, replace(base, policy="late_rejection"))
    early = simulate(trace, replace(base, policy="early_rejection", scheduler=on_arrival))
    in_vain, spared = (sum(r.why == "decode_load" for r in result.records) for result in (late, early))
    assert in_vain > spared, (in_vain, spared)
    computed = [result.figures()["computed_prompt_tokens"] for result in (late, early)]
    assert computed[0] > computed[1]
    assert all(r.tokens == 0 for result in (late, early) for r in result.records if r.why == "decode_load")
    assert not any(r.why == "slo_unreachable" for r in late.records), "it does not ask before the prefill"
    assert any(r.why == "slo_unreachable" for r in early.records)
    for result in (late, early):
        assert all(r.end in ("done", "refused") for r in result.records)


def _crowd() -> Trace:
    builder = TraceBuilder("generated", 512)
    for number in range(60):
        builder.add(250_000 * number, 4_000, 300, range(100 * number, 100 * number + 8))
    return builder.build()


def test_held_out_rows_are_marked() -> None:
    rows = {row["label"]: row for row in experiments.p2p_rows()}
    assert "compute, ms (held out)" in rows["2k tokens"] and "compute, ms" in rows["8k tokens"]
    for thousands, (compute_ms, pull_ms) in experiments.P2P_MS.items():
        values = [value for value in rows[f"{thousands}k tokens"].values() if isinstance(value, float)]
        assert values[0] == pytest.approx(compute_ms, rel=0.33) and values[1] == pytest.approx(pull_ms, rel=0.16)
