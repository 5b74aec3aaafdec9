"""Published figures of Mooncake and llm-d, modelled: the same experiments in the simulator, beside what was printed.

What is compared is the shape: who is better and by about how much. Of Mooncake's figures shown here none was used to
fit the hardware (that was Fig. 14 of FAST'25); of llm-d's table the rows that were are marked. The paper's system is
`mooncake_algorithm1` here; its own policy is not published further.

    python tools/bench/paper_shapes.py --trace conversation_trace.jsonl.gz [--only fig5 ...] [--jobs 2] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from scheduler.core.cluster import Instance  # noqa: E402
from scheduler.core.config import SECOND_US, SchedulerConfig  # noqa: E402
from scheduler.core.options import Appraiser, Option, Prospect  # noqa: E402
from scheduler.core.policies import POLICIES, local  # noqa: E402
from scheduler.core.policies.mooncake import MooncakeAlgorithm1  # noqa: E402
from scheduler.core.policy_parameters import PolicyParameters  # noqa: E402
from scheduler.simulator.driver import simulate  # noqa: E402
from scheduler.simulator.hardware import PROFILES  # noqa: E402
from scheduler.simulator.metrics import RequestRecord, Result  # noqa: E402
from scheduler.simulator.settings import SimulationConfig  # noqa: E402
from scheduler.simulator.traces import Trace, read_trace  # noqa: E402
from scheduler.simulator.workloads import LongDocument, generate  # noqa: E402

KVPOOL: dict[str, Any] = {"policy": "kvpool", "refuses": None}
A800 = PROFILES["a800x8-llama3-70b"]
GBPS = 1e9 / 8
DOCUMENT_REQUESTS = 4000
#: As in the paper's figures nothing is refused; kvpool is told its objectives, and what it refuses is not within them.
BASE = SimulationConfig(hardware=A800, nodes=16, policy="mooncake_algorithm1", refuses=False)
#: Mooncake's matching restricted to an instance's own node: nothing is ever worth pulling.
LOCAL_ONLY = SchedulerConfig(mooncake_threshold=1e9)


class ForcedTransfers(MooncakeAlgorithm1):
    """Algorithm 1, but a longer prefix is always pulled, and the choice does not count what that takes.

    The published algorithm avoids slow transfers, and so hardly shows what bandwidth is worth.
    """

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> list[Option]:
        options = MooncakeAlgorithm1.rank(self, appraiser, instances)
        options.sort(key=lambda o: (not o.feasible, o.queue_us + o.prefill_us, o.prefill.id, o.decode.id))
        return options

    def _prospect(self, appraiser: Appraiser, instance: Instance) -> Prospect:
        best = appraiser.prefix.longest()
        longer = best > local.own_blocks(appraiser, instance).total
        return appraiser.prospect_with(instance, best) if longer else local.own_prospect(appraiser, instance)


#: Registered by being imported, so that processes of their own know it, too.
POLICIES.setdefault("forced_transfers", ForcedTransfers)


@dataclass(frozen=True)
class Row:
    """One simulation and the printed figure that belongs to it."""

    label: str
    config: SimulationConfig
    printed: str
    prefill_only: bool = False  # answers of one token


@dataclass(frozen=True)
class Experiment:
    title: str
    figures: tuple[tuple[str, Callable[[Result], float]], ...]  # (name, what is shown)
    rows: tuple[Row, ...]
    workload: Callable[[Trace], Trace] = lambda trace: trace  # what is run instead of the given trace


def _within(limit_ms: int) -> Callable[[Result], float]:
    def share(result: Result) -> float:
        good = sum(r.within(result.ttft_slo_us, limit_ms * 1000) for r in result.records)
        return 100 * good / len(result.records)

    return share


def _figure(key: str, factor: float) -> Callable[[Result], float]:
    return lambda result: result.figures()[key] * factor


def _gpu_s(result: Result) -> float:
    """Seconds that instances computed prompts, a request."""
    busy_s = sum(i.prefill_share for i in result.instances) * result.duration_us / 1e6
    return busy_s / len(result.records)


TTFT = ("mean TTFT, s", _figure("ttft_ms", 0.001))
HITS = ("hit ratio, %", _figure("hit_ratio", 100))


def _prefill(label: str, policy: str, printed: str, nodes: int, scheduler: SchedulerConfig | None = None) -> Row:
    refuses = None if policy == "kvpool" else False
    config = replace(
        BASE, policy=policy, refuses=refuses, nodes=nodes, max_tokens=1, scheduler=scheduler or SchedulerConfig()
    )
    return Row(label, config, printed, prefill_only=True)


def _fig5() -> Experiment:
    rows = (
        _prefill("global cache-aware", "mooncake_algorithm1", "3.07", 6),
        _prefill("local cache-aware", "mooncake_algorithm1", "3.58", 6, LOCAL_ONLY),
        _prefill("load balance", "least_loaded", "5.27", 6),
        _prefill("random", "random", "19.65", 6),
        _prefill("kvpool (not in the paper)", "kvpool", "", 6),
    )
    return Experiment("Fig. 5: where to prefill, 6 nodes that do nothing else", (TTFT, HITS), rows)


def _fig10() -> Experiment:
    rows = (
        _prefill("local cache", "mooncake_algorithm1", "16.9 %, 1.38 s", 10, LOCAL_ONLY),
        _prefill("global cache", "mooncake_algorithm1", "37.5 %, 1.05 s", 10),
        _prefill("kvpool (not in the paper)", "kvpool", "", 10),
    )
    return Experiment("Fig. 10: 10 prefill nodes of 3M tokens", (HITS, ("GPU s a request", _gpu_s), TTFT), rows)


def _fig13() -> Experiment:
    printed = {24: "5.09", 40: "2.40", 80: "1.73", 100: "1.60", 160: "1.41", 320: "1.24", 400: "1.25"}
    rows = []
    for gbps, seconds in printed.items():
        hardware = replace(A800, nic_bytes_s=gbps * GBPS, pull_bytes_s=gbps * GBPS)
        config = replace(BASE, hardware=hardware, nodes=10, max_tokens=1)
        forced = replace(config, policy="forced_transfers")
        rows.append(Row(f"{gbps} Gbps, transfers forced", forced, seconds, prefill_only=True))
        if gbps in (24, 100, 400):
            rows.append(Row(f"{gbps} Gbps, Algorithm 1", config, "", prefill_only=True))
            rows.append(Row(f"{gbps} Gbps, kvpool", replace(config, **KVPOOL), "", prefill_only=True))
    figures = (TTFT, HITS, ("of these pulled, %", _figure("pulled_ratio", 100)))
    return Experiment("Fig. 13: TTFT by a node's bandwidth, long documents", figures, tuple(rows), _documents)


def _documents(trace: Trace) -> Trace:
    """In place of the paper's synthetic trace, which is not published: 15k tokens a prompt, two thirds shared."""
    parameters = LongDocument(
        documents=100,
        documents_zipf=0.6,
        document_tokens_median=9_000,
        document_tokens_max=40_000,
        questions_mean=1.0,
        question_tokens_median=3_500,
    )
    return generate("long-document", min(len(trace), DOCUMENT_REQUESTS), 8.0, 0, trace.block_tokens, parameters)


def _fig15() -> Experiment:
    printed = {5: "77.7", 6: "97.2", 7: "99.1", 8: "99.0", 9: "99.2", 10: "98.4", 11: "86.1"}
    rows = [
        Row(f"{p}P{16 - p}D", replace(BASE, split=(p, 16 - p), tbt_slo_us=SECOND_US // 10), share)
        for p, share in printed.items()
    ]
    rows.append(Row("8P8D, kvpool", replace(BASE, split=(8, 8), tbt_slo_us=SECOND_US // 10, **KVPOOL), ""))
    return Experiment(
        "Fig. 15: splits of 16 nodes, requests within TTFT 30 s and TBT 100 ms, %",
        (("%", _within(100)), TTFT),
        tuple(rows),
    )


def _capacity() -> Experiment:
    """Co-located engines with and without chunks stand for vLLM's modes."""
    whole = replace(A800, chunk_tokens=0)
    figures = tuple((f"TBT {ms} ms", _within(ms)) for ms in (100, 200, 300))
    rows = (
        Row("Mooncake, 8P8D", replace(BASE, split=(8, 8)), "96.6 / 99.9 / 100"),
        Row(
            "vLLM: balanced, whole prompts", replace(BASE, hardware=whole, policy="least_loaded"), "16.1 / 38.8 / 62.7"
        ),
        Row("vLLM, prefix caching", replace(BASE, hardware=whole, policy="sglang_cache_aware"), "15.0 / 34.3 / 55.5"),
        Row("vLLM, chunked prefill", replace(BASE, policy="least_loaded"), "9.4 / 28.8 / 55.2"),
        Row("kvpool, 8P8D (not in the paper)", replace(BASE, split=(8, 8), **KVPOOL), ""),
        Row("kvpool, all do both (not in the paper)", replace(BASE, **KVPOOL), ""),
    )
    return Experiment("Effective capacity: requests within TTFT 30 s and TBT, %", figures, rows)


#: Decoding is faster here than in the paper, and would never be the bottleneck. With KV read at a sixth of the speed
#: eight decode instances are about as near to their limit as eight that prefill.
SLOW_DECODE = replace(A800, decode_token_us=6 * A800.decode_token_us)


def _table3() -> Experiment:
    """Rejections under overload: after the prefill, at arrival, and at arrival by the load when the prefill ends."""
    config = replace(
        BASE, split=(8, 8), speed=2.0, refuses=True, tbt_slo_us=SECOND_US // 10, hardware=SLOW_DECODE
    )  # fmt: skip
    plain = replace(SchedulerConfig(), baselines=PolicyParameters(mooncake_predicts_load=False))
    figures = (
        ("rejected, %", _share(lambda r: r.end == "refused")),
        ("of these after their prefill, %", _share(lambda r: r.why == "decode_load")),
        ("within limits, %", _figure("goodput", 100)),
    )
    rows = (
        Row("baseline: decode load is judged after the prefill", replace(config, late_rejection=True), "18.2"),
        Row("early rejection, load as on arrival", replace(config, scheduler=plain), "16.4"),
        Row("early rejection, load as predicted", config, "15.6"),
        Row("kvpool (not in the paper)", replace(config, policy="kvpool"), ""),
    )
    title = "Table 3: 8P8D, 2 x, decode slowed, TTFT 30 s and TBT 100 ms (printed: 4183, 3771, 3589 of 23k)"
    return Experiment(title, figures, rows)


def _share(chosen: Callable[[RequestRecord], bool]) -> Callable[[Result], float]:
    return lambda result: 100 * sum(map(chosen, result.records)) / len(result.records)


#: llm-d's P2P study: thousands of tokens -> ms to compute and to pull them; and those that the profile was fitted to.
P2P_MS = {2: (78, 35), 8: (250, 57), 16: (510, 86), 32: (1173, 165), 48: (1988, 235)}
P2P_FITTED = ({8, 16, 32}, {8, 32})


def p2p_rows() -> list[dict[str, Any]]:
    """The profile's own times: nothing is simulated."""
    hardware = PROFILES["h200-gpt-oss-120b"]
    rows = []
    for thousands, printed in P2P_MS.items():
        tokens = 1000 * thousands
        pull_us = hardware.nic_latency_us + tokens * hardware.kv_token_bytes / hardware.pull_bytes_s * 1e6
        modelled = (hardware.prefill_us(tokens, 0) / 1000, pull_us / 1000)
        marks = ["" if thousands in fitted else " (held out)" for fitted in P2P_FITTED]
        rows.append(
            {
                "label": f"{thousands}k tokens",
                **{f"{what}, ms{mark}": value for what, mark, value in zip(("compute", "pull"), marks, modelled,
                                                                           strict=True)},
                "printed": f"{printed[0]}, {printed[1]}",
            }
        )  # fmt: skip
    return rows


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "fig5": _fig5,
    "fig10": _fig10,
    "fig13": _fig13,
    "fig15": _fig15,
    "capacity": _capacity,
    "table3": _table3,
}
#: Not of the simulator: the profile of an H200 beside llm-d's table.
P2P = "p2p"


def _run(trace: Trace, row: Row) -> Result:
    if row.prefill_only:
        trace = replace(trace, output_tokens=np.ones_like(trace.output_tokens))
    return simulate(trace, row.config)


def _results(trace: Trace, rows: tuple[Row, ...], jobs: int) -> list[Result]:
    if jobs == 1:
        return [_run(trace, row) for row in rows]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_run, [trace] * len(rows), rows))


P2P_TITLE = "llm-d's P2P study: recompute or pull, H200, gpt-oss-120b"


def _print_p2p(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{P2P_TITLE} (modelled)", title_justify="left")
    for column in ("", "compute, ms", "pull, ms", "printed"):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in rows:
        times = [(name, value) for name, value in row.items() if isinstance(value, float)]
        cells = [f"{value:.0f}{' (held out)' * ('held out' in name)}" for name, value in times]
        table.add_row(row["label"], *cells, row["printed"])
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
            rows = p2p_rows()
            shown["experiments"][name] = {"title": P2P_TITLE, "rows": rows}
            if not arguments.json:
                _print_p2p(console, rows)
            continue
        experiment = EXPERIMENTS[name]()
        workload = experiment.workload(trace)
        results = _results(workload, experiment.rows, arguments.jobs)
        table = Table(title=f"{experiment.title} (modelled, {len(workload):,} requests)", title_justify="left")
        for column in ("", *(f for f, _ in experiment.figures), "printed"):
            table.add_column(column, justify="left" if column == "" else "right")
        rows = []
        for row, result in zip(experiment.rows, results, strict=True):
            values = {figure: shown_by(result) for figure, shown_by in experiment.figures}
            rows.append({"label": row.label, "printed": row.printed, **values})
            table.add_row(row.label, *(f"{value:.2f}" for value in values.values()), row.printed)
        shown["experiments"][name] = {"title": experiment.title, "rows": rows}
        if not arguments.json:
            console.print(table)
    if arguments.json:
        print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()
