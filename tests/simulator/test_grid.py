"""The grid: its cells and windows, a slice of it run by its command, and what is concluded from rows."""

from __future__ import annotations

import json
import math
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scheduler.core.config import SchedulerConfig
from scheduler.core.policies import POLICIES
from scheduler.core.policy_parameters import PolicyParameters
from scheduler.simulator import cells, tuning, verdict
from scheduler.simulator.cells import Cell
from scheduler.simulator.hardware import PROFILES
from scheduler.simulator.workloads import generate

REPOSITORY = Path(__file__).resolve().parents[2]
GRID = REPOSITORY / "tools" / "bench" / "grid.py"


# ---------------------------------------------------------------- cells


def test_halves_share_no_request_and_windows_of_ten_seeds_share_none() -> None:
    trace = generate("multi-turn", 1200, 1.0, 0)
    first, second = cells.half(trace, report=False), cells.half(trace, report=True)
    assert len(first) + len(second) == len(trace)
    assert len(first) == len(second) and first.arrival_us[0] == second.arrival_us[0] == 0
    assert first.duration_us + second.duration_us <= trace.duration_us
    numbered = replace(second, priority=np.arange(len(second), dtype=np.int64))
    for count in (1, 20, len(second) // 10):
        drawn = [cells.window(numbered, count, seed) for seed in range(1000, 1010)]
        assert all(len(window) == count and window.arrival_us[0] == 0 for window in drawn)
        assert len({number for window in drawn for number in window.priority.tolist()}) == 10 * count
    again = cells.window(numbered, 20, 1003)
    assert np.array_equal(again.priority, cells.window(numbered, 20, 1003).priority)
    # Longer than a tenth: they overlap, and still are others.
    firsts = [int(cells.window(numbered, 300, seed).priority[0]) for seed in range(10)]
    assert firsts == sorted(set(firsts)) and firsts[-1] + 300 <= len(second)
    assert len(cells.window(second[:40], 100, 3)) == 40


@pytest.mark.parametrize("workload", [w for w in cells.WORKLOADS.values() if w.made])
def test_halves_of_made_up_traces_have_room_for_ten_windows(workload: cells.Workload) -> None:
    trace = workload.made_up()
    for report in (False, True):
        assert len(cells.half(trace, report)) // cells.SEEDS_SPREAD >= workload.requests


@pytest.mark.parametrize("cluster", cells.CLUSTERS)
def test_a_cell_has_the_load_that_it_says(cluster: str) -> None:
    trace = generate("multi-turn", 600, 1.0, 0)
    nodes, split = cells.CLUSTERS[cluster]
    for load in (0.5, 2.0):
        task = cells.task_of(Cell("multi-turn", cluster, load), "kvpool", 1, trace, {}, requests=200)
        assert cells.load_of(task.trace, PROFILES["a800x8-llama3-70b"], nodes, split) == pytest.approx(load, rel=0.01)
        assert task.config.split == split and task.config.seed == 1


def test_all_cells_are_there_and_saturated_ones_known() -> None:
    found = cells.all_cells()
    assert len(found) == len(set(found)) == len(cells.WORKLOADS) * len(cells.CLUSTERS) * len(cells.LOADS)
    assert {c.saturated for c in found} == {True, False}
    assert set(cells.POLICIES) <= POLICIES.keys() and cells.OURS in cells.POLICIES


@pytest.mark.parametrize("policy", tuning.SPACES)
def test_tries_are_settings_that_exist_and_everybody_has_as_many(policy: str) -> None:
    known = set(SchedulerConfig.__dataclass_fields__) | set(PolicyParameters.__dataclass_fields__)
    assert tuning.draw(policy, "agentic", 0) == {}
    seen = set()
    for number in range(1, 6):
        drawn = tuning.draw(policy, "agentic", number)
        assert drawn == tuning.draw(policy, "agentic", number) and drawn.keys() <= known
        config = cells.with_overrides(SchedulerConfig(), drawn)
        for name, value in drawn.items():
            assert getattr(config, name, getattr(config.baselines, name, None)) == value
            default = getattr(SchedulerConfig(), name, getattr(PolicyParameters(), name, None))
            assert type(value) is type(default), name
        json.dumps(drawn)
        seen.add(tuple(sorted(drawn.items())))
    assert len(seen) > 1


def test_a_try_is_kept_if_it_beats_the_defaults_by_more_than_luck() -> None:
    assert tuning.chosen({0: [0.5, 0.6, 0.7], 1: [0.6, 0.7, 0.8], 2: [0.55, 0.65, 0.75]}) == 1
    # Far better on one window and worse on the others: that is luck.
    assert tuning.chosen({0: [0.5, 0.6, 0.7], 1: [0.8, 0.58, 0.65]}) == 0
    assert tuning.chosen({0: [0.5, 0.6], 1: [0.5, 0.6]}) == 0, "of equal ones the defaults"
    assert tuning.chosen({0: [0.5, 0.6], 3: [0.6, 0.7], 2: [0.6, 0.7]}) == 2, "of equal ones the earliest"
    assert tuning.chosen({0: [0.9, 0.9], 1: [0.1, 0.2]}) == 0
    assert tuning.chosen({0: [0.5], 4: [0.6]}) == 4


# ---------------------------------------------------------------- verdicts


def _row(policy: str, seed: int, goodput: float, load: float = 1.5, bound: float = 1.0, **over: Any) -> dict[str, Any]:
    return {
        "workload": "agentic", "cluster": "2:2", "load": load, "policy": policy, "seed": seed, "goodput": goodput,
        "token_goodput": goodput, "bound": bound, "good_by_length": [goodput] * 10, "refused_by_length": [0.0] * 10,
        **over,
    }  # fmt: skip


def test_intervals_are_those_of_student() -> None:
    values = [0.02, 0.01, 0.05, -0.01, 0.03, 0.02, 0.04, 0.00, 0.01, 0.03]
    found = verdict.interval(values)
    reach = 2.262 * statistics.stdev(values) / math.sqrt(10)
    assert (found.low, found.high) == pytest.approx((statistics.mean(values) - reach, statistics.mean(values) + reach))
    assert verdict.interval([0.5]).low == -math.inf
    assert verdict.interval([0.1] * 4) == verdict.Interval(
        pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 4
    )


def test_ours_is_compared_with_the_best_by_seed() -> None:
    rows = [_row("kvpool", s, 0.90 + s / 100) for s in range(4)]
    rows += [_row("llmd", s, 0.80 + s / 100) for s in range(4)] + [_row("dynamo", s, 0.7) for s in range(4)]
    (found,) = verdict.verdicts(rows)
    assert found.best == "llmd" and found.seeds == 4
    assert found.difference.mean == pytest.approx(0.1)
    assert found.difference.low == pytest.approx(0.1)  # paired: the seeds' spread is no doubt
    assert found.problems == []
    assert verdict.summary([found])["saturated_interval_above_zero"] == 1
    (row,) = verdict.table([found])
    assert len(row) == len(verdict.COLUMNS) and "llmd 81.5" in row


def test_every_broken_promise_is_named() -> None:
    rows = [_row("kvpool", s, 0.5 + s / 50, good_by_length=[1.0] * 9 + [0.1]) for s in range(3)]
    rows += [_row("llmd", s, 0.6 - s / 50, good_by_length=[1.0] * 9 + [0.3]) for s in range(3)]
    (found,) = verdict.verdicts(rows)
    text = "; ".join(found.problems)
    assert "6.0 points below llmd" in text
    assert "interval is not above zero" in text
    assert "decile 10 of lengths is 20.0 points worse" in text
    assert "52 % of the bound" in text
    (relaxed,) = verdict.verdicts([_row("kvpool", 0, 0.9, load=0.5), _row("llmd", 0, 0.9, load=0.5)])
    assert relaxed.problems == []


def test_the_worst_decile_has_an_interval_of_its_own() -> None:
    gaps = [0.00, 0.10, 0.20]
    rows = [_row("kvpool", s, 0.8, good_by_length=[0.9, 0.7 - gap, 0.8], refused_by_length=[0.1, 0.2, 0.0])
            for s, gap in enumerate(gaps)]  # fmt: skip
    rows += [_row("llmd", s, 0.7, good_by_length=[0.9, 0.7, 0.7], refused_by_length=[0.1, 0.1, 0.3]) for s in range(3)]
    (found,) = verdict.verdicts(rows)
    assert found.decile == 2
    assert found.decile_excess == verdict.Interval(*(pytest.approx(x) for x in _mean_and_reach(gaps)), 3)
    assert found.refused_excess.mean == pytest.approx(0.1)
    assert "decile 2 of lengths is 10.0 points worse" in found.problems
    assert "2: +10.0 (-14.8 to +34.8)" in verdict.table([found])[0]


def _mean_and_reach(values: list[float]) -> tuple[float, float, float]:
    mean, reach = statistics.mean(values), 4.303 * statistics.stdev(values) / math.sqrt(3)
    return mean, mean - reach, mean + reach


def test_where_a_baseline_serves_all_nothing_is_saturated() -> None:
    (found,) = verdict.verdicts([_row(p, s, 0.985 + s / 1000) for p in ("kvpool", "llmd") for s in range(3)])
    assert not found.saturated and found.problems == []
    (found,) = verdict.verdicts([_row(p, s, 0.95 + s / 1000) for p in ("kvpool", "llmd") for s in range(3)])
    assert found.saturated and "interval is not above zero" in found.problems[0]


def test_seeds_that_not_all_policies_have_are_left_out() -> None:
    rows = [_row(p, s, 0.5) for p in ("kvpool", "llmd") for s in range(3)] + [_row("kvpool", 3, 0.9)]
    (found,) = verdict.verdicts(rows)
    assert found.seeds == 3 and found.goodput["kvpool"] == 0.5
    assert verdict.verdicts([_row("kvpool", 0, 1.0)]) == []


def test_a_cell_that_was_stopped_halfway_is_not_judged_by_the_baselines_it_has() -> None:
    rows = [_row(p, s, 0.5) for p in ("kvpool", "llmd", "dynamo") for s in range(2)]
    begun = [_row(p, 0, 0.9, load=0.7) for p in ("kvpool", "dynamo")]
    (found,) = verdict.verdicts(rows + begun)
    assert found.cell.load == 1.5 and found.seeds == 2


# ---------------------------------------------------------------- the command


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GRID), *arguments, "--traces", "nowhere", "--out", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "grid.jsonl").read_text().splitlines()]


SLICE = ("--only", "multi-turn / 2:2 / 1.5", "--policy", "kvpool", "llmd", "always_split", "--seeds", "2",
         "--requests", "30")  # fmt: skip


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_a_slice_runs_goes_on_and_reports(tmp_path: Path) -> None:
    done = _run(tmp_path, "run", *SLICE)
    assert done.returncode == 0, done.stderr
    assert "6 simulations, 0 of them done" in done.stderr
    rows = _rows(tmp_path)
    assert len(rows) == 6
    for row in rows:
        assert 0 <= row["goodput"] <= row["bound"] <= 1 and len(row["good_by_length"]) == 10
    # Torn, as by a crash: that line is done again, the others are not, and come out the same.
    path = tmp_path / "grid.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    done = _run(tmp_path, "run", *SLICE)
    assert "6 simulations, 5 of them done" in done.stderr
    digests = {(row["policy"], row["seed"]): row["log_sha256"] for row in _rows(tmp_path)}
    assert digests == {(row["policy"], row["seed"]): row["log_sha256"] for row in rows}
    assert len(set(digests.values())) == 6, "seeds and policies differ"
    done = _run(tmp_path, "report")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "grid.md").read_text()
    assert "| multi-turn | 2:2 | 1.5 |" in text and "Of 1 cells, at least 2 seeds each" in text
    assert "Windows of the second halves, in requests: multi-turn 30." in text
    packed = (tmp_path / "grid.jsonl.gz").read_bytes()
    _run(tmp_path, "report")
    assert (tmp_path / "grid.jsonl.gz").read_bytes() == packed


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_interrupted_it_keeps_what_is_done(tmp_path: Path) -> None:
    command = [sys.executable, str(GRID), "run", "--traces", "nowhere", "--out", str(tmp_path), "--seeds", "5000",
               "--only", "multi-turn", "--policy", "llmd", "least_loaded", "--requests", "30"]  # fmt: skip
    # Whoever runs these tests in the background ignores it, and so would their children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed) as process:
        assert process.stderr is not None
        seen = b""
        while b"3/" not in seen:
            part = process.stderr.read1(4096)
            assert part, seen
            seen += part
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 0, rest
    assert b"40000 simulations, 0 of them done" in seen
    assert b"are kept" in rest
    assert 3 <= len(_rows(tmp_path)) < 40_000
