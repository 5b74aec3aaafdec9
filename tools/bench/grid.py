"""Ours against every baseline over load x workload x cluster x seed, in the simulator; all figures are modelled.

    python tools/bench/grid.py tune   --traces FOLDER --out docs/results        # each policy, the same number of tries
    python tools/bench/grid.py run    --traces FOLDER --out docs/results        # goes on where it was stopped
    python tools/bench/grid.py report --out docs/results                        # grid.md from grid.jsonl.gz

`FOLDER` holds conversation_trace.jsonl.gz and azure_code.csv; the other workloads are made up. Cells are those of
`scheduler/simulator/cells.py`. Finished simulations are kept in `grid.jsonl`, one a line: Ctrl-C loses those under way
only, and the same command goes on. Seeds are done one after the other, so that whenever it is stopped all cells have
nearly as many. Rows of another version of the code or of other settings are not counted as done, and not reported.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from scheduler.simulator import cells, tuning, verdict  # noqa: E402
from scheduler.simulator.cells import Cell, Task  # noqa: E402
from scheduler.simulator.columns import Trace  # noqa: E402
from scheduler.simulator.driver import simulate  # noqa: E402
from scheduler.simulator.traces import read_trace  # noqa: E402

JOBS_MAX = 2
#: What of a result is kept.
FIGURES = (
    "goodput", "token_goodput", "ttft_ms", "ttft_p90_ms", "tbt_ms", "tbt_p90_ms", "hit_ratio", "split_ratio", "refused",
    "deadline", "errors", "good_by_length", "refused_by_length",
)  # fmt: skip
#: Load at which policies are tuned: between the two that are compared.
TUNING_LOAD = 1.2
#: Windows on which each try is judged, from the beginning, the middle and the end of the first half.
TUNING_SEEDS = (1001, 1005, 1008)


def code_digest() -> str:
    """Of all code that decides or simulates: rows of one grid must come from the same."""
    digest = hashlib.sha256()
    for folder in ("scheduler/core", "scheduler/simulator", "kvpool/core"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@lru_cache(maxsize=16)
def half(workload: str, folder: str, report: bool) -> Trace:
    asked = cells.WORKLOADS[workload]
    trace = read_trace(Path(folder) / asked.file) if asked.file else asked.made_up()
    return cells.half(trace, report)


def task_of(row: dict[str, Any], folder: str) -> Task:
    cell = Cell(row["workload"], row["cluster"], row["load"])
    trace = half(cell.workload, folder, row["half"] == "second")
    return cells.task_of(cell, row["policy"], row["seed"], trace, row["settings"], row["requests"])


@lru_cache(maxsize=64)
def bound(cell: Cell, seed: int, report: bool, requests: int, folder: str) -> float:
    """That of a window, which all policies share."""
    trace = half(cell.workload, folder, report)
    return cells.bound_of(cells.task_of(cell, cells.OURS, seed, trace, {}, requests))


def simulated(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """A row with its figures; runs in a process of its own."""
    began = time.process_time()
    task = task_of(row, folder)
    result = simulate(task.trace, task.config)
    figures = result.figures()
    kept = {name: _rounded(figures[name]) for name in FIGURES}
    return {
        **row,
        **kept,
        "bound": _rounded(bound(task.cell, task.seed, row["half"] == "second", row["requests"], folder)),
        "log_sha256": result.log_sha256[:16],
        "cpu_s": round(time.process_time() - began, 2),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


# ---------------------------------------------------------------- running


def _quiet() -> None:
    os.nice(max(10 - os.nice(0), 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends; what is under way is lost


def carried_out(rows: Sequence[dict[str, Any]], folder: str, jobs: int) -> Iterator[dict[str, Any]]:
    """Results as they come, with progress on stderr. What has not begun when it is left is not begun any more."""
    began, done = time.monotonic(), 0
    # Windows differ in length, and so in what they cost.
    done_requests, all_requests = 0, sum(row["requests"] for row in rows)
    ahead = iter(rows)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        running: set[Future[dict[str, Any]]] = set()
        try:
            while True:
                while len(running) < jobs and (row := next(ahead, None)) is not None:
                    running.add(pool.submit(simulated, row, folder))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    row = future.result()
                    yield row
                    done, done_requests = done + 1, done_requests + row["requests"]
                    left_s = (time.monotonic() - began) / done_requests * (all_requests - done_requests)
                    print(f"\r{done}/{len(rows)}, {left_s / 60:.1f} min left ", end="", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def kept(rows: Sequence[dict[str, Any]], path: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Those of the rows that were carried out, each written as soon as it is; fewer if somebody pressed Ctrl-C."""
    out = []
    with path.open("a") as file:
        try:
            for row in carried_out(rows, str(arguments.traces), arguments.jobs):
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
                file.flush()
                out.append(row)
        except KeyboardInterrupt:
            print(f"\ninterrupted: {len(out)} of {len(rows)} are kept; run it again to go on", file=sys.stderr)
    return out


def run(arguments: argparse.Namespace) -> None:
    path, tuned = arguments.out / "grid.jsonl", read_tuned(arguments.out)
    wanted = wanted_rows(arguments, tuned)
    have = {_key(row) for row in read_rows(path)}
    todo = [row for row in wanted if _key(row) not in have]
    print(f"{len(wanted)} simulations, {len(wanted) - len(todo)} of them done", file=sys.stderr)
    kept(todo, path, arguments)


def wanted_rows(arguments: argparse.Namespace, tuned: dict[str, Any]) -> list[dict[str, Any]]:
    """By seed first: whenever it is stopped, all cells have nearly the same seeds."""
    code = code_digest()
    return [
        {
            "workload": cell.workload,
            "cluster": cell.cluster,
            "load": cell.load,
            "policy": policy,
            "seed": seed,
            "half": "second",
            "requests": arguments.requests or cells.WORKLOADS[cell.workload].requests,
            "settings": tuned.get(cell.workload, {}).get(policy, {}).get("settings", {}),
            "code": code,
        }
        for seed in range(arguments.seeds)
        for cell in cells.all_cells()
        if not arguments.only or any(text in cell.name for text in arguments.only)
        for policy in cells.POLICIES
        if not arguments.policy or policy in arguments.policy
    ]


def _key(row: dict[str, Any]) -> str:
    names = ("workload", "cluster", "load", "policy", "seed", "half", "requests", "settings", "code")
    return json.dumps([row[name] for name in names], sort_keys=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that may be packed; a last line that was cut off is left out, and cut off there too."""
    if not path.exists():
        return []
    if path.suffix == ".gz":
        return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


# ---------------------------------------------------------------- tuning


def tune(arguments: argparse.Namespace) -> None:
    """Tries settings on windows of the first halves, in each cluster; of each policy `tuning.chosen` is kept."""
    tried: dict[tuple[str, str], dict[int, list[float]]] = {}
    path = arguments.out / "tuning.jsonl"
    wanted = list(_tries(arguments))
    have = {_key(row): row for row in read_rows(path)}
    todo = [row for row in wanted if _key(row) not in have]
    print(f"{len(wanted)} simulations, {len(wanted) - len(todo)} of them done", file=sys.stderr)
    have.update((_key(row), row) for row in kept(todo, path, arguments))
    for row in wanted:
        if _key(row) in have:
            numbers = tried.setdefault((row["workload"], row["policy"]), {})
            numbers.setdefault(row["try"], []).append(have[_key(row)]["goodput"])
    best: dict[str, dict[str, Any]] = {}
    for (workload, policy), numbers in tried.items():
        whole = {n: goodputs for n, goodputs in numbers.items() if len(goodputs) == _windows_tuned()}
        if 0 in whole:
            number = tuning.chosen(whole)
            best.setdefault(workload, {})[policy] = {
                "settings": tuning.draw(policy, workload, number), "goodput": round(_mean(whole[number]), 4),
                "of_defaults": round(_mean(whole[0]), 4), "tries": len(whole),
            }  # fmt: skip
    (arguments.out / "tuning.json").write_text(json.dumps(best, indent=1) + "\n")


def _windows_tuned() -> int:
    return len(cells.CLUSTERS) * len(TUNING_SEEDS)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tries(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    code = code_digest()
    for workload in cells.WORKLOADS:
        for number in range(arguments.tries):
            for policy in tuning.SPACES:
                if arguments.policy and policy not in arguments.policy:
                    continue
                requests = arguments.requests or cells.WORKLOADS[workload].requests
                for cluster, seed in product(cells.CLUSTERS, TUNING_SEEDS):
                    yield {
                        "workload": workload, "cluster": cluster, "load": TUNING_LOAD, "policy": policy,
                        "seed": seed, "half": "first", "requests": requests,
                        "settings": tuning.draw(policy, workload, number), "code": code, "try": number,
                    }  # fmt: skip


def read_tuned(folder: Path) -> dict[str, Any]:
    path = folder / "tuning.json"
    return json.loads(path.read_text()) if path.exists() else {}


# ---------------------------------------------------------------- the report


def report(arguments: argparse.Namespace) -> None:
    rows = read_rows(arguments.out / "grid.jsonl") or read_rows(arguments.out / "grid.jsonl.gz")
    if not rows:
        sys.exit(f"{arguments.out} has no grid.jsonl: run it first")
    code = rows[-1]["code"]
    rows = [row for row in rows if row["code"] == code]
    packed = b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)
    (arguments.out / "grid.jsonl.gz").write_bytes(gzip.compress(packed, mtime=0))
    text = told(rows, read_tuned(arguments.out), code)
    (arguments.out / "grid.md").write_text(text)
    print(text)


def told(rows: Sequence[dict[str, Any]], tuned: dict[str, Any], code: str) -> str:
    found = verdict.verdicts(rows)
    summary = verdict.summary(found)
    cpu_min = sum(row["cpu_s"] for row in rows) / 60
    lines = [
        "# The grid",
        "",
        "Modelled. Made by `python tools/bench/grid.py` (`tune`, `run`, `report`); the rows are in `grid.jsonl.gz`,",
        (
            "the settings that tuning found in `tuning.json`."
            if tuned
            else "all settings are the defaults: nothing was tuned."
        )
        + " What a cell is, and what the bound is the bound of:",
        "[scheduling](../scheduling.md#the-grid).",
        "",
        f"{len(rows)} simulations, {cpu_min:.0f} min of one core; code {code}. Windows of the second halves, "
        f"{_windows_said(rows)}. Of {summary['cells']} cells, at least {summary['seeds_min']} seeds each:",
        "",
        f"* ours is at most 1 point below the best baseline in {summary['within_one_point']}, ahead in "
        f"{summary['ahead']}; by {100 * summary['mean_difference']:+.1f} points on average, at worst by "
        f"{100 * summary['worst_difference']:+.1f}",
        f"* of {summary['saturated']} saturated ones the interval is above zero in "
        f"{summary['saturated_interval_above_zero']}",
        f"* no decile of prompt length is more than 5 points worse in {summary['deciles_kept']}",
        f"* at least 85 % of the clairvoyant bound in {summary['bound_share_kept']}",
        "",
        "Shares are of all requests of a window, in per cent, means over seeds. The best baseline is the one with the",
        "highest mean in that cell; differences are ours less its, paired by seed, with 95 % intervals (Student's t).",
        "",
        *_markdown(verdict.COLUMNS, verdict.table(found)),
        "",
        "## All policies",
        "",
        *_markdown(("workload", "cluster", "load", *cells.POLICIES), _all_policies(found)),
        "",
        "## Tuning",
        "",
        f"Goodput on {len(TUNING_SEEDS)} windows of the first half in each cluster, of the settings kept and of the",
        "defaults. Settings are kept if they are better than the defaults by more than a standard error.",
        "",
        *_markdown(("workload", "policy", "tries", "best", "defaults"), _tuned(tuned)),
        "",
    ]
    return "\n".join(lines)


def _windows_said(rows: Sequence[dict[str, Any]]) -> str:
    """How long they are."""
    requests = sorted({(row["workload"], row["requests"]) for row in rows})
    return "in requests: " + ", ".join(f"{workload} {count}" for workload, count in requests)


def _all_policies(found: Sequence[verdict.Verdict]) -> list[list[str]]:
    return [
        [v.cell.workload, v.cell.cluster, f"{v.cell.load:g}",
         *(f"{100 * v.goodput[p]:.1f}" if p in v.goodput else "-" for p in cells.POLICIES)]
        for v in found
    ]  # fmt: skip


def _tuned(tuned: dict[str, Any]) -> list[list[str]]:
    return [
        [workload, policy, str(best["tries"]), f"{100 * best['goodput']:.1f}", f"{100 * best['of_defaults']:.1f}"]
        for workload, policies in tuned.items()
        for policy, best in policies.items()
    ]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=("tune", "run", "report"))
    parser.add_argument("--traces", type=Path, default=Path("shared/traces"), help="folder of the published traces")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "results", help="folder of the results")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tries", type=int, default=6, help="of tuning, the defaults among them")
    parser.add_argument("--requests", type=int, default=0, help="in a window, instead of the workload's own number")
    parser.add_argument("--only", nargs="+", default=[], help="cells whose name has one of these texts")
    parser.add_argument("--policy", nargs="+", default=[], choices=cells.POLICIES)
    parser.add_argument("--jobs", type=int, default=JOBS_MAX, choices=range(1, JOBS_MAX + 1), help="processes")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    {"tune": tune, "run": run, "report": report}[arguments.act](arguments)


if __name__ == "__main__":
    main()
