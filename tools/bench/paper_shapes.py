"""Published figures of Mooncake and llm-d, modelled: the same experiments in the simulator, beside what was printed.

    python tools/bench/paper_shapes.py --trace conversation_trace.jsonl.gz [--only fig5 ...] [--jobs 2] [--json]

The experiments are those of `scheduler/simulator/published/experiments.py`, which says what they stand for.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from scheduler.core.policies import POLICIES  # noqa: E402
from scheduler.simulator.columns import Trace  # noqa: E402
from scheduler.simulator.metrics import Result  # noqa: E402
from scheduler.simulator.published.experiments import EXPERIMENTS, Experiment, Row, p2p_rows, run  # noqa: E402
from scheduler.simulator.published.rules import RULES  # noqa: E402
from scheduler.simulator.traces import read_trace  # noqa: E402

#: Not of the simulator: the profile of an H200 beside llm-d's table.
P2P = "p2p"
P2P_TITLE = "llm-d's P2P study: recompute or pull, H200, gpt-oss-120b"

# By being imported, so that processes of their own know them, too.
POLICIES.update(RULES)


def timed(trace: Trace, row: Row) -> tuple[Result, float]:
    """A result, and the seconds of processor time that it took."""
    begin_s = time.process_time()
    return run(trace, row), time.process_time() - begin_s


def results(experiment: Experiment, jobs: int) -> list[tuple[Result, float]]:
    if jobs == 1:
        return [timed(experiment.trace, row) for row in experiment.rows]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(timed, [experiment.trace] * len(experiment.rows), experiment.rows))


def rows_of(experiment: Experiment, jobs: int) -> list[dict[str, Any]]:
    rows = []
    for row, (result, seconds) in zip(experiment.rows, results(experiment, jobs), strict=True):
        values = {figure: shown_by(result) for figure, shown_by in experiment.figures}
        rows.append({"label": row.label, **values, "processor s": seconds, "printed": row.printed})
    return rows


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    names = [name.removesuffix(" (held out)") for name in rows[0]]
    for name in names:
        table.add_column("" if name == "label" else name, justify="left" if name == "label" else "right")
    for row in rows:
        held_out = [name.endswith("(held out)") for name in row]
        texts = [f"{value:.2f}" if isinstance(value, float) else value for value in row.values()]
        table.add_row(*(text + " (held out)" * held for text, held in zip(texts, held_out, strict=True)))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", required=True, help="Mooncake's conversation trace")
    parser.add_argument("--requests", type=int, default=0, help="only the first N; 0 = all")
    parser.add_argument("--speed", type=float, default=1.0, help="requests come X times as fast")
    parser.add_argument("--only", nargs="+", choices=(*EXPERIMENTS, P2P), default=[*EXPERIMENTS, P2P])
    parser.add_argument("--jobs", type=int, default=1, help="simulations at a time")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace)
    trace = (trace[: arguments.requests] if arguments.requests else trace).sped_up(arguments.speed)
    shown: dict[str, Any] = {"trace": arguments.trace, "requests": len(trace), "modelled": True, "experiments": {}}
    console = Console(width=None if sys.stdout.isatty() else 150)
    for name in arguments.only:
        if name == P2P:
            title, rows = f"{P2P_TITLE} (modelled)", p2p_rows()
        else:
            experiment = EXPERIMENTS[name](trace)
            title = f"{experiment.title} (modelled, {len(experiment.trace):,} requests)"
            rows = rows_of(experiment, arguments.jobs)
        shown["experiments"][name] = {"title": title, "rows": rows}
        if not arguments.json:
            show(console, title, rows)
    if arguments.json:
        print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()
