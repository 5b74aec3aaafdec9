"""`kvctl trace`, as a shell runs it."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from kvpool.cli.kvctl import app

runner = CliRunner()


def test_generate_then_stats(tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl.gz"
    command = ["trace", "generate", "--kind", "agentic", "--out", str(out), "--requests", "200", "--seed", "3"]
    done = runner.invoke(app, [*command, "--set", "steps_mean=5"])
    assert done.exit_code == 0, done.output
    first = out.read_bytes()
    runner.invoke(app, [*command, "--set", "steps_mean=5"])
    assert out.read_bytes() == first
    done = runner.invoke(app, ["trace", "stats", str(out), "--json", "--capacity", "64"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.output)
    assert data["requests"] == 200
    assert [r["capacity_blocks"] for r in data["hit_ratios"]] == [64, None]
    assert 0 < data["hit_ratios"][0]["blocks"] <= data["hit_ratios"][1]["blocks"] < 1
    shown = runner.invoke(app, ["trace", "stats", str(out)])
    assert shown.exit_code == 0
    assert "200 in" in shown.output


def test_bad_input_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = '{"timestamp":0,"input_length":1,"output_length":1,"hash_ids":[0]}\n'
    path.write_text(good + "{}\n", encoding="utf-8")
    done = runner.invoke(app, ["trace", "stats", str(path)])
    assert done.exit_code == 1
    assert "t.jsonl:2: field 'input_length' is missing" in done.stderr
    assert "--skip-bad" in done.stderr
    done = runner.invoke(app, ["trace", "stats", str(path), "--skip-bad", "--json"])
    assert json.loads(done.output)["bad_lines"] == 1
    done = runner.invoke(app, ["trace", "generate", "--kind", "odd", "--out", str(path)])
    assert done.exit_code == 2
    assert "multi-turn, agentic, long-document" in done.stderr
    done = runner.invoke(app, ["trace", "generate", "--kind", "agentic", "--out", str(tmp_path / "no" / "t")])
    assert done.exit_code == 1
    assert "can't be written" in done.stderr
