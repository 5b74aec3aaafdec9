"""Published figures of Mooncake and llm-d, and the simulations that stand for them. Pure.

What is compared is the shape: who is better and by about how much. Of Mooncake's figures shown here none was used to
fit the hardware (that was Fig. 14 of FAST'25); of llm-d's table the rows that were are marked. The papers' system is
`mooncake_algorithm1` here; its own policy is not published further. As in the papers' figures nothing is refused, but
for Table 3; kvpool is told its objectives, and what it refuses is not within them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scheduler.core.config import SECOND_US, SchedulerConfig
from scheduler.core.policy_parameters import PolicyParameters
from scheduler.simulator.bound import least_prefill_us
from scheduler.simulator.columns import Trace
from scheduler.simulator.driver import simulate
from scheduler.simulator.hardware import PROFILES
from scheduler.simulator.metrics import RequestRecord, Result
from scheduler.simulator.published.rules import balanced
from scheduler.simulator.published.workloads import Mixture, synthetic
from scheduler.simulator.settings import SimulationConfig

KVPOOL: dict[str, Any] = {"policy": "kvpool", "refuses": None}
A800 = PROFILES["a800x8-llama3-70b"]
GBPS = 1e9 / 8
#: Prefill nodes whose HBM holds what is computed, while caches are in DRAM: twice the longest prompt.
PREFILL_ONLY = replace(A800, kv_tokens=2 * A800.context_tokens_max)
BASE = SimulationConfig(hardware=A800, nodes=16, policy="mooncake_algorithm1", refuses=False)
#: Mooncake's matching restricted to an instance's own node: nothing is ever worth pulling.
LOCAL_ONLY = SchedulerConfig(mooncake_threshold=1e9)


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
    trace: Trace


def run(trace: Trace, row: Row) -> Result:
    """Simulates a row of an experiment."""
    if row.prefill_only:
        trace = replace(trace, output_tokens=np.ones_like(trace.output_tokens))
    return simulate(trace, row.config)


def _within(limit_ms: int) -> Callable[[Result], float]:
    return lambda result: _share(lambda r: r.within(result.ttft_slo_us, limit_ms * 1000))(result)


def _share(chosen: Callable[[RequestRecord], bool]) -> Callable[[Result], float]:
    return lambda result: 100 * sum(map(chosen, result.records)) / len(result.records)


def _figure(key: str, factor: float) -> Callable[[Result], float]:
    return lambda result: float(result.figures()[key]) * factor


def _gpu_s(result: Result) -> float:
    """Seconds that instances computed prompts, a request."""
    busy_s = sum(i.prefill_share for i in result.instances) * result.duration_us / 1e6
    return busy_s / len(result.records)


TTFT = ("mean TTFT, s", _figure("ttft_ms", 0.001))
TBT = ("mean TBT, ms", _figure("tbt_ms", 1.0))
HITS = ("hit ratio, %", _figure("hit_ratio", 100))


def _prefill(label: str, policy: str, printed: str, nodes: int, scheduler: SchedulerConfig | None = None) -> Row:
    refuses = None if policy == "kvpool" else False
    config = replace(
        BASE, policy=policy, refuses=refuses, nodes=nodes, max_tokens=1, scheduler=scheduler or SchedulerConfig()
    )
    return Row(label, config, printed, prefill_only=True)


def fig5(trace: Trace) -> Experiment:
    rows = (
        _prefill("global cache-aware", "mooncake_algorithm1", "3.07", 6),
        _prefill("local cache-aware", "mooncake_algorithm1", "3.58", 6, LOCAL_ONLY),
        _prefill("load balance", "least_loaded", "5.27", 6),
        _prefill("random", "random", "19.65", 6),
        _prefill("kvpool (not in the paper)", "kvpool", "", 6),
    )
    return Experiment("Fig. 5: where to prefill, 6 nodes that do nothing else", (TTFT, HITS), rows, trace)


def fig10(trace: Trace) -> Experiment:
    made = (
        _prefill("local cache", "mooncake_algorithm1", "16.9 %, 1.38 s", 10, LOCAL_ONLY),
        _prefill("global cache", "mooncake_algorithm1", "37.5 %, 1.05 s", 10),
        _prefill("kvpool (not in the paper)", "kvpool", "", 10),
    )
    rows = tuple(replace(row, config=replace(row.config, hardware=PREFILL_ONLY)) for row in made)
    figures = (HITS, ("GPU s a request", _gpu_s), TTFT)
    return Experiment("Fig. 10: 10 prefill nodes of 3M tokens, nothing cached in HBM", figures, rows, trace)


def _synthetic(trace: Trace) -> Trace:
    """The paper's synthetic workload in place of a trace, as many requests at most."""
    return synthetic(min(len(trace), Mixture().requests), 0, trace.block_tokens)


def fig13(trace: Trace) -> Experiment:
    printed = {24: "5.09", 40: "2.40", 80: "1.73", 100: "1.60", 160: "1.41", 320: "1.24", 400: "1.25"}
    rows = []
    for gbps, seconds in printed.items():
        hardware = replace(PREFILL_ONLY, nic_bytes_s=gbps * GBPS, pull_bytes_s=gbps * GBPS)
        config = replace(BASE, hardware=hardware, nodes=8, max_tokens=1)
        forced = replace(config, policy="forced_transfers")
        rows.append(Row(f"{gbps} Gbps, transfers forced", forced, seconds, prefill_only=True))
        if gbps in (24, 100, 400):
            rows.append(Row(f"{gbps} Gbps, Algorithm 1", config, "", prefill_only=True))
            rows.append(Row(f"{gbps} Gbps, kvpool", replace(config, **KVPOOL), "", prefill_only=True))
    figures = (TTFT, HITS, ("of these pulled, %", _figure("pulled_ratio", 100)))
    title = "Fig. 13: TTFT by a node's bandwidth, synthetic workload, 8 prefill nodes"
    return Experiment(title, figures, tuple(rows), _synthetic(trace))


def fig15(trace: Trace) -> Experiment:
    """At the rate of the published file, and where 5 prefill nodes are full: the figure's own rate is not known."""
    printed = {5: "77.7", 6: "97.2", 7: "99.1", 8: "99.0", 9: "99.2", 10: "98.4", 11: "86.1"}
    base = replace(BASE, ttft_slo_us=10 * SECOND_US, tbt_slo_us=SECOND_US // 10)
    rows: list[Row] = []
    for speed in (1.0, 1.25):
        for prefills, share in printed.items():
            config = replace(base, split=(prefills, 16 - prefills), speed=speed)
            rows.append(Row(f"{prefills}P{16 - prefills}D, {speed:g} x", config, share))
        rows.append(Row(f"8P8D, {speed:g} x, kvpool", replace(base, split=(8, 8), speed=speed, **KVPOOL), ""))
    figures = (("%", _within(100)), ("within TTFT, %", _figure("within_ttft", 100)), TTFT, TBT)
    title = "Fig. 15: splits of 16 nodes, synthetic workload, requests within TTFT 10 s and TBT 100 ms"
    return Experiment(title, figures, tuple(rows), _synthetic(trace))


def capacity(trace: Trace) -> Experiment:
    """Co-located engines with and without chunks stand for vLLM's modes."""
    whole = replace(A800, chunk_tokens=0)
    figures = tuple((f"TBT {ms} ms", _within(ms)) for ms in (100, 200, 300))
    cached = replace(BASE, hardware=whole, policy="sglang_cache_aware")
    rows = (
        Row("Mooncake, 8P8D", replace(BASE, split=(8, 8)), "96.6 / 99.9 / 100"),
        Row("vLLM: balanced, whole prompts", replace(cached, policy="least_loaded"), "16.1 / 38.8 / 62.7"),
        Row("vLLM, prefix caching", cached, "15.0 / 34.3 / 55.5"),
        Row("vLLM, chunked prefill", replace(BASE, policy="least_loaded"), "9.4 / 28.8 / 55.2"),
        Row("kvpool, 8P8D (not in the paper)", replace(BASE, split=(8, 8), **KVPOOL), ""),
        Row("kvpool, all do both (not in the paper)", replace(BASE, **KVPOOL), ""),
    )
    return Experiment("Effective capacity: requests within TTFT 30 s and TBT, %", figures, rows, trace)


#: Offered load of Table 3's cluster, as a share of what both phases can carry.
OVERLOADS = (1.0, 1.3)


def table3(trace: Trace) -> Experiment:
    """Rejections under overload: after the prefill, at arrival, and at arrival by the load when the prefill ends.

    The paper's trace of 23 000 requests is not here, nor is it known how its decode steps grow with the batch. So load
    is set relative to what the cluster can carry, and decoding so that both phases are full at the same load: only
    then does it matter when a request is rejected.
    """
    limit_us = SECOND_US // 10
    work_us = float(np.mean(least_prefill_us(trace, A800)))
    outputs = float(np.mean(trace.output_tokens))
    context = float(np.mean(trace.prompt_tokens)) + outputs / 2
    slow = balanced(work_us, outputs, context, limit_us, A800.step_us, A800.decode_token_us)
    base = replace(
        BASE, split=(8, 8), refuses=True, tbt_slo_us=limit_us, policy="early_rejection", late_rejection=True,
        hardware=replace(A800, decode_sequence_us=slow.sequence_us),
    )  # fmt: skip
    on_arrival = SchedulerConfig(baselines=PolicyParameters(mooncake_predicts_load=False))
    offered_s = len(trace) / max(trace.duration_us / 1e6, 1e-6)
    rows: list[Row] = []
    for load in OVERLOADS:
        config = replace(base, speed=load * 8 * slow.requests_s / offered_s)
        printed = ("18.2", "16.4", "15.6") if load == OVERLOADS[-1] else ("", "", "")
        rules = (
            ("after the prefill", replace(config, policy="late_rejection")),
            ("early, load on arrival", replace(config, scheduler=on_arrival)),
            ("early, load as predicted", config),
        )
        rows += [Row(f"load {load:g}, {name}", one, text) for (name, one), text in zip(rules, printed, strict=True)]
        rows.append(
            Row(f"load {load:g}, kvpool (not in the paper)", replace(config, policy="kvpool", late_rejection=False), "")
        )
    figures = (
        ("rejected, %", _share(lambda r: r.end == "refused")),
        ("of all after their prefill, %", _share(lambda r: r.why == "decode_load")),
        ("within limits, %", _figure("goodput", 100)),
    )
    title = f"Table 3: 8P8D, TTFT 30 s, TBT 100 ms, {slow.sequence_us / 1000:.1f} ms a sequence and decode step"
    return Experiment(title, figures, tuple(rows), trace)


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
        row: dict[str, Any] = {"label": f"{thousands}k tokens"}
        for what, fitted, value in zip(("compute", "pull"), P2P_FITTED, modelled, strict=True):
            row[f"{what}, ms{'' if thousands in fitted else ' (held out)'}"] = value
        rows.append({**row, "printed": f"{printed[0]}, {printed[1]}"})
    return rows


EXPERIMENTS: dict[str, Callable[[Trace], Experiment]] = {
    "fig5": fig5,
    "fig10": fig10,
    "fig13": fig13,
    "fig15": fig15,
    "capacity": capacity,
    "table3": table3,
}
