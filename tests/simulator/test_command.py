"""`kvctl simulate`, as it is typed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kvpool.cli.kvctl.app import app
from scheduler.simulator.plots import Chart, page
from tests.simulator.cases import conversations


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.jsonl"
    lines = [
        {
            "timestamp": r.arrival_us // 1000,
            "input_length": r.prompt_tokens,
            "output_length": r.output_tokens,
            "hash_ids": r.hash_ids,
        }
        for r in conversations(25, 20.0, seed=3)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def kvctl(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_one_policy_and_its_log(trace: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    one = kvctl("--trace", trace, "--nodes", 2, "--split", "1:1", "--seed", 4, "--log", log, "--json")
    assert one.exit_code == 0, one.output
    data = json.loads(one.stdout)
    assert (data["nodes"], data["split"], data["requests"], data["modelled"]) == (2, "1:1", 25, True)
    (policy,) = data["policies"]
    assert policy["policy"] == "kvpool" and policy["goodput"] > 0
    lines = log.read_text().splitlines()
    assert len(lines) == policy["log_lines"]
    assert [json.loads(line)["what"] for line in lines].count("ended") == 25
    again = kvctl("--trace", trace, "--nodes", 2, "--split", "1:1", "--seed", 4, "--json")
    assert json.loads(again.stdout)["policies"][0]["log_sha256"] == policy["log_sha256"]


def test_several_policies_are_compared_and_plotted(trace: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    table = kvctl("--trace", trace, "--nodes", 2, "--policy", "kvpool", "--policy", "random", "--plot", plot)
    assert table.exit_code == 0, table.output
    assert "modelled" in table.stdout and "kvpool" in table.stdout and "random" in table.stdout
    root = ElementTree.parse(plot).getroot()
    assert root.tag.endswith("svg") and len(root.findall("{http://www.w3.org/2000/svg}g")) == 6


def test_all_means_all(trace: Path, tmp_path: Path) -> None:
    from scheduler.core.policies import POLICIES

    out = kvctl(
        "--trace", trace, "--nodes", 2, "--policy", "all", "--requests", 5, "--json", "--plot", tmp_path / "p.svg"
    )
    assert out.exit_code == 0, out.output
    policies = json.loads(out.stdout)["policies"]
    assert [p["policy"] for p in policies] == list(POLICIES) and policies[0]["policy"] == "kvpool"
    needed = {"goodput", "token_goodput", "ttft_ms", "tbt_ms", "hit_ratio", "refused"}
    assert all(needed <= set(p) for p in policies)


def test_faults_and_sizes_are_taken(trace: Path, tmp_path: Path) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text('[{"kind": "crash", "target": "engine-0", "at_s": 5, "duration_s": 5}]')
    out = kvctl(
        "--trace", trace, "--nodes", 2, "--faults", faults, "--json", "--dram-gib", 0, "--policy", "round_robin"
    )  # fmt: skip
    assert out.exit_code == 0, out.output
    (policy,) = json.loads(out.stdout)["policies"]
    assert policy["bytes_published"] == 0 and policy["placed_again"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "best"], "policy 'best' is not one of kvpool"),
        (["--hardware", "abacus"], "hardware 'abacus' is not one of"),
        (["--split", "8"], "PREFILL:DECODE is needed"),
        (["--split", "20:20"], "does not fit"),
        (["--nodes", "0"], "nodes must be"),
        (["--speed", "0"], "speed must be"),
        (["--faults", "/nowhere.json"], "can't be read"),
        (["--ttft-slo", "soon"], "not a duration"),
    ],
)
def test_bad_input_is_said_before_anything_runs(trace: Path, arguments: list[str], message: str) -> None:
    out = kvctl("--trace", trace, *arguments)
    assert out.exit_code == 2
    assert message in " ".join(out.output.split())


def test_a_bad_trace_is_said(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"timestamp": 0, "input_length": 10, "output_length": 1, "hash_ids": [1]}\n{"timestamp": \n')
    out = kvctl("--trace", bad)
    assert out.exit_code != 0 and f"{bad}:2" in out.output.replace("\n", "")
    assert kvctl("--trace", bad, "--skip-bad", "--nodes", 1).exit_code == 0


def test_charts_hold_whatever_they_are_given() -> None:
    """Names are escaped; nothing, one point, zero and huge values are drawn inside the page."""
    charts = [
        Chart.lines('<none> & "none"', {}, "s"),
        Chart.lines("one", {"a<b": [(1.0, 0.0)]}, "s"),
        Chart.lines("odd", {"a": [(0, 1e12), (5, float("nan")), (9, -4.0)]}, "s"),
        Chart.bars("bars", [("x", 0.0), ("y", 1e-9), ("z", float("inf"))]),
        Chart.bars("no bars", []),
    ]
    root = ElementTree.fromstring(page("a & b", charts))
    numbers = [float(v) for line in root.iter() for p in line.get("points", "").split() for v in p.split(",")]
    assert numbers and all(0 <= v <= 600 for v in numbers)
