"""Replays: exact ones in any process, what other settings would have decided, and files that are no good."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journals_made import record, requests, saturated
from typer.testing import CliRunner

from kvpool.cli.kvctl import app
from kvpool.core.errors import BadArgument
from scheduler.core.commands import Placed, Refused
from scheduler.core.config import SchedulerConfig
from scheduler.replay import overrides
from scheduler.replay.cases import Case, report
from scheduler.replay.exact import replay, told
from scheduler.replay.reading import files_of, open_journal
from scheduler.replay.whatif import WhatIf, what_if

runner = CliRunner()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, result = record(tmp_path_factory.mktemp("journal"), requests(80, 15.0, 6), saturated(6))
    assert any(r.end == "refused" for r in result.records) and any(r.end == "done" for r in result.records)
    return path


# ---------------------------------------------------------------- exactly


def test_a_saturated_cluster_replays_to_the_bit(recorded: Path) -> None:
    done = replay(open_journal(recorded), after_event=lambda core: core.check_invariants())
    assert done.identical and not done.torn and not done.bad_lines
    on_record = [c for entry in open_journal(recorded).entries() for c in entry.commands]
    assert done.decisions == tuple(c for c in on_record if isinstance(c, Placed | Refused))
    assert any(isinstance(d, Refused) for d in done.decisions)
    assert any(isinstance(d, Placed) and d.waited_us for d in done.decisions), "nobody waited"
    assert replay(open_journal(recorded)).decisions_sha256 == done.decisions_sha256


def test_other_processes_with_other_threads_and_hashes_decide_the_same(recorded: Path) -> None:
    digests = []
    for threads, hashes in (("1", "0"), ("2", "4711")):
        environment = {**os.environ, "PYTHONHASHSEED": hashes}
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            environment[name] = threads
        command = [sys.executable, "-m", "kvpool.cli.kvctl", "replay", str(recorded), "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stderr
        data = json.loads(done.stdout)
        assert data["identical"]
        digests.append((data["files"][0]["decisions_sha256"], data["files"][0]["state_sha256"]))
    here = replay(open_journal(recorded))
    assert set(digests) == {(here.decisions_sha256, here.state_sha256)}
    assert all(here.decisions_sha256) and here.state_sha256


def test_the_first_difference_is_shown(recorded: Path, tmp_path: Path) -> None:
    lines = recorded.read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if '"Placed"' in line and n > 300)
    lines[at] = lines[at].replace('"split":true', '"split":false').replace('"waited_us":', '"waited_us":7')
    path = tmp_path / "scheduler-000001.jsonl"
    path.write_text("".join(lines))
    done = replay(open_journal(path))
    (difference,) = done.differences
    assert difference.line == at  # lines are counted from 1: the event stands before its commands
    assert any(change.startswith("Placed.waited_us: 7") for change in told(difference)["changed"])
    shown = runner.invoke(app, ["replay", str(path)])
    assert shown.exit_code == 1
    assert "first difference" in shown.stdout and f":{at}:" in shown.stdout and "Placed.waited_us" in shown.stdout
    assert "1 of" in shown.stderr and "come out otherwise" in shown.stderr


def test_a_folder_is_all_its_files(recorded: Path) -> None:
    assert files_of(recorded.parent) == [recorded]
    shown = runner.invoke(app, ["replay", str(recorded.parent)])
    assert shown.exit_code == 0, shown.output
    assert "identical" in shown.stdout


# ---------------------------------------------------------------- what if


def test_with_the_same_settings_nothing_changes(recorded: Path) -> None:
    """Two cores side by side, the record bent where they differ: they must not differ."""
    cases = what_if(open_journal(recorded), {})
    assert len(cases) == 80
    assert not any(case.changed for case in cases)
    assert [c.then for c in cases] == [c.now for c in cases]
    same = what_if(open_journal(recorded), {"policy": "kvpool", "harm_weight": SchedulerConfig().harm_weight})
    assert [c.now for c in same] == [c.now for c in cases]


@pytest.mark.parametrize("policy", ["kvpool", "mooncake_algorithm1", "least_loaded", "always_split"])
@pytest.mark.parametrize("was", ["kvpool", "random"])
def test_every_request_is_answered_and_nothing_stays_held(tmp_path: Path, was: str, policy: str) -> None:
    path, _ = record(tmp_path, requests(40, 12.0, 11), saturated(11, was))
    journal = open_journal(path)
    run = _side_by_side(journal, {"policy": policy})
    answered = [c for c in run.cases if c.now is not None]
    assert len(answered) >= 36, "those of the last seconds may wait still"
    for case in run.cases:
        for answer in (case.then, case.now):
            assert answer is None or answer.request_id == case.request.request_id
    assert all(case.changed == (not case.same_place) for case in run.cases if isinstance(case.then, Placed))
    run.now.check_invariants()
    # What is left runs out: nothing of then keeps what was placed now.
    run._catch_up(run.now.now_us + 4_000_000_000)
    run.now.check_invariants()
    assert not run.now.room.entries
    assert not run.now.book.placements


def _side_by_side(journal: object, changes: dict[str, object]) -> WhatIf:
    from scheduler.replay.exact import core_of

    file = journal
    second = core_of(file, overrides.applied(file.checkpoint, changes))  # type: ignore[attr-defined,arg-type]
    run = WhatIf(core_of(file), second, "policy" in changes)  # type: ignore[arg-type]
    for entry in file.entries():  # type: ignore[attr-defined]
        run.take(entry, file)  # type: ignore[arg-type]
    return run


def test_another_policy_is_reported_beside_the_old_one(recorded: Path) -> None:
    data = report(what_if(open_journal(recorded), {"policy": "least_loaded"}))
    assert data["requests"] == 80 and data["then"]["split"] > 0 and data["now"]["split"] == 0
    assert data["changed"] >= data["placements_changed"] > 0
    for side in ("then", "now"):
        assert data[side]["placed"] + data[side]["refused"] + data[side]["unanswered"] == 80
        assert sum(data[side]["refused_by_reason"].values()) == data[side]["refused"]
        assert 0 < data[side]["predicted_ttft_ms_p50"] <= data[side]["predicted_ttft_ms_p95"]
    assert data["then"]["measured_ttft_ms_p50"] > 0
    assert sum(case["changed"] for case in data["cases"]) == data["changed"]


def test_another_configuration_is_a_file(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.toml"
    path.write_text("late_binding = []\n[baselines]\nllmd_prefix_weight = 1\n")
    shown = runner.invoke(app, ["replay", str(recorded), "--config", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    data = json.loads(shown.stdout)
    assert data["now"]["waited_ms_mean"] == 0 < data["then"]["waited_ms_mean"]
    assert data["settings"] == {"late_binding": [], "baselines": {"llmd_prefix_weight": 1.0}}
    shown = runner.invoke(app, ["replay", str(recorded), "--policy", "always_split", "--limit", "3"])
    assert shown.exit_code == 0, shown.output
    assert "what if policy = always_split" in shown.stdout and "changed (3 of" in shown.stdout


def test_a_config_reaches_every_part_of_the_core(recorded: Path) -> None:
    changes = overrides.check({"harm_weight": 3, "baselines": {"dynamo_block_tokens": 64}}, "here")
    run = _side_by_side(open_journal(recorded), changes)
    expected = replace(run.then.config, harm_weight=3.0, baselines=run.now.config.baselines)
    assert run.now.config == run.now.room.config == run.now.cluster.config == expected
    assert all(policy.config == expected for policy in run.now.policies.values() if hasattr(policy, "config"))
    assert run.now.config.baselines.dynamo_block_tokens == 64


def test_changed_says_whether_the_answer_is_another_one(recorded: Path) -> None:
    case = next(c for c in what_if(open_journal(recorded), {}) if isinstance(c.then, Placed))
    assert isinstance(case.then, Placed)
    refused = Refused(case.then.request_id, case.then.gateway_id, reason=_reason(), message="", retry_after_ms=1)
    answers = {
        (case.then, case.then): False,
        (case.then, replace(case.then, split=not case.then.split)): True,
        (case.then, replace(case.then, predicted_ttft_us=1)): False,
        (case.then, refused): True,
        (refused, case.then): True,
        (refused, replace(refused, retry_after_ms=2)): False,
        (None, case.then): True,
        (None, refused): True,
        (None, None): False,
    }
    for (then, now), changed in answers.items():
        assert Case(case.request, 0, then, now).changed is changed, (then, now)


def _reason() -> object:
    from kvpool.core.errors import Reason

    return Reason.NO_CAPACITY


# ---------------------------------------------------------------- files that are no good


def _changed(recorded: Path, folder: Path, line: int, text: str) -> Path:
    lines = recorded.read_text().splitlines(keepends=True)
    lines[line - 1] = text
    path = folder / "scheduler-000001.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nonsense\n", "no JSON"),
        ('{"at":5}\n', "neither an event nor commands"),
        ('{"at":5,"event":{"$":"Placed"}}\n', "not a journal value"),
        ('{"at":5,"event":{"$":"Target","instance_id":"a","address":"","epoch":1}}\n', "Target is no event"),
        ('{"at":5,"event":{"$":"TimePassed"}}\n', "at 5"),
        ('{"at":"x","event":{"$":"TimePassed"}}\n', "at 'x'"),
        ('{"commands":[{"$":"TimePassed"}]}\n', "commands are expected"),
        ("[" * 100_000 + "\n", "no JSON"),
    ],
)
def test_a_bad_line_is_named_or_left_out(recorded: Path, tmp_path: Path, text: str, problem: str) -> None:
    lines = recorded.read_text().splitlines(keepends=True)
    line = next(n for n, old in enumerate(lines, 1) if n > 200 and "InstanceReported" in old)
    path = _changed(recorded, tmp_path, line, text)
    offset = len("".join(lines[: line - 1]).encode())
    with pytest.raises(BadArgument, match=f":{line}: byte {offset}: .*{problem}") as caught:
        replay(open_journal(path))
    assert "--skip-bad" in caught.value.hint
    done = replay(open_journal(path, skip_bad=True))
    assert done.bad_lines == 1 and done.events
    shown = runner.invoke(app, ["replay", str(path)])
    assert shown.exit_code == 1 and f":{line}:" in shown.stderr
    shown = runner.invoke(app, ["replay", str(path), "--skip-bad", "--json"])
    assert json.loads(shown.stdout)["files"][0]["bad_lines"] == 1


def test_an_event_that_kills_the_core_is_named(recorded: Path, tmp_path: Path) -> None:
    lines = recorded.read_text().splitlines(keepends=True)
    line = next(n for n, old in enumerate(lines, 1) if n > 200 and "PlaceRequested" in old)
    path = _changed(recorded, tmp_path, line, lines[line - 1].replace('"prompt_tokens":', '"prompt_tokens":"x","a":'))
    with pytest.raises(BadArgument, match=f":{line}: byte"):
        replay(open_journal(path))  # an unknown field
    lines[line - 1] = lines[line - 1].replace('"max_tokens":', '"max_tokens":null,"max_tokens":null,"_":')
    text = json.loads(recorded.read_text().splitlines()[line - 1])
    text["event"]["prompt_tokens"] = "many"
    path = _changed(recorded, tmp_path, line, json.dumps(text) + "\n")
    with pytest.raises(BadArgument, match=f":{line}: the core fails on this event"):
        replay(open_journal(path))


@pytest.mark.parametrize("text", ["", "{}\n", "nonsense\n", '{"journal":99}\n', '{"journal":1}\n'])
def test_what_is_no_journal_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scheduler-000001.jsonl"
    path.write_text(text)
    shown = runner.invoke(app, ["replay", str(path)])
    assert shown.exit_code == 1 and "is not a scheduler journal" in shown.stderr and "hint:" in shown.stderr


def test_folders_and_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.jsonl"):
        shown = runner.invoke(app, ["replay", str(path)])
        assert shown.exit_code == 1 and "error:" in shown.stderr and "Traceback" not in shown.output


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.toml", "harm_wait = 1", "no setting 'harm_wait'"),
        ("a.toml", "harm_weight = 'x'", "must be a number"),
        ("a.toml", "harm_weight = -1.0", "must be 0 to"),
        ("a.toml", "waiting_max = 1.5", "must be a whole number"),
        ("a.toml", "policy = 'none'", "is not one of"),
        ("a.toml", "baselines = 1", "is a table"),
        ("a.toml", "[baselines]\nllmd = 1", "no setting 'llmd'"),
        ("a.toml", "late_binding = 'kvpool'", "must be a list"),
        ("a.toml", "= nonsense", "can't be read"),
        ("a.json", "[1]", "a table of settings"),
    ],
)
def test_bad_settings_are_named(recorded: Path, tmp_path: Path, name: str, text: str, problem: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    shown = runner.invoke(app, ["replay", str(recorded), "--config", str(path)])
    assert shown.exit_code == 2 and problem in shown.stderr
    shown = runner.invoke(app, ["replay", str(recorded), "--policy", "odd"])
    assert shown.exit_code == 2 and "'odd' is not one of" in shown.stderr


def test_a_torn_file_and_a_packed_one(recorded: Path, tmp_path: Path) -> None:
    whole = replay(open_journal(recorded))
    packed = tmp_path / "scheduler-000001.jsonl.gz"
    packed.write_bytes(gzip.compress(recorded.read_bytes()))
    assert replay(open_journal(packed)).decisions_sha256 == whole.decisions_sha256
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(recorded.read_bytes()[:-10])
    done = replay(open_journal(cut))
    assert done.torn and done.identical and whole.events - 1 <= done.events <= whole.events
    packed.write_bytes(packed.read_bytes()[:-4000])
    done = replay(open_journal(packed))
    assert done.torn and done.identical and done.events < whole.events


@settings(
    max_examples=40, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_a_mangled_file_is_read_or_refused_never_more(recorded: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(recorded.read_bytes()[: 1 << 18])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(("flip", "cut", "drop")))
        if kind == "flip":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 200))]
        else:
            del raw[at:]
        if not raw:
            break
    path = tmp_path / "mangled.jsonl"
    path.write_bytes(bytes(raw))
    for skip_bad in (False, True):
        try:
            done = replay(open_journal(path, skip_bad))
        except BadArgument as error:
            assert str(path) in str(error)
        else:
            assert done.events >= 0
