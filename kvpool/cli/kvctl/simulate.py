"""`kvctl simulate`: policies on a trace, under virtual time. No cluster is asked."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpool.cli import output
from kvpool.cli.kvctl import tables, trace
from kvpool.cli.kvctl.options import Json, parse_seconds
from kvpool.core.errors import KvpoolError

if TYPE_CHECKING:
    from scheduler.simulator.hardware import Hardware
    from scheduler.simulator.metrics import Result
    from scheduler.simulator.settings import SimulationConfig
    from scheduler.simulator.traces import Trace

GIB = 1 << 30
PLOT_DEFAULT = Path("simulation.svg")
DramGib = Annotated[
    float | None, typer.Option("--dram-gib", min=0, help="DRAM of the pool, a node. [default: the hardware's]")
]
SsdGib = Annotated[
    float | None, typer.Option("--ssd-gib", min=0, help="SSD of the pool, a node. [default: the hardware's]")
]


def simulate(
    trace_file: Annotated[
        Path,
        typer.Option("--trace", metavar="FILE", help="Mooncake's JSONL, Azure's CSV, a journal, or our own."),
    ],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="Policy; many times, or all. [default: kvpool]")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes of the cluster.")] = 16,
    split: Annotated[
        str,
        typer.Option("--split", metavar="P:D", help="Instances that only prefill and only decode; others do both."),
    ] = "",
    hardware: Annotated[
        str, typer.Option("--hardware", metavar="NAME|FILE", help="What a node is; a .toml or .json file of your own.")
    ] = "a800x8-llama3-70b",
    speed: Annotated[float, typer.Option("--speed", help="Requests come so much faster than in the trace.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same simulation.")] = 0,
    faults: Annotated[
        Path | None, typer.Option("--faults", metavar="FILE", help="JSON file of what goes wrong, and when.")
    ] = None,
    ttft_slo: Annotated[str, typer.Option("--ttft-slo", help="Limit of time to first token.")] = "30s",
    tbt_slo: Annotated[
        str, typer.Option("--tbt-slo", help="Limit of the mean of a request's longest tenth of times between tokens.")
    ] = "200ms",
    requests: Annotated[int, typer.Option("--requests", min=0, help="Only so many, from the first on; 0 = all.")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="What clients allow for answers.")] = 2048,
    retries: Annotated[int, typer.Option("--retries", min=0, help="How often a refused client comes back.")] = 0,
    dram_gib: DramGib = None,
    ssd_gib: SsdGib = None,
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="FILE", help="Write what happened, a JSON object a line."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Write an SVG; several policies do, to simulation.svg."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=256, help="Policies simulated at a time.")] = 1,
    skip_bad: trace.SkipBad = False,
    json: Json = False,
) -> None:
    """Runs a trace against the scheduler and a simulated cluster; with several policies, compares them."""
    requested = trace.read(trace_file, skip_bad)
    if requests:
        requested = requested[:requests]
    try:
        configs = _configs(policy or ["kvpool"], nodes, split, hardware, speed, seed, faults)
        configs = [
            replace(
                config,
                ttft_slo_us=round(parse_seconds(ttft_slo) * 1e6),
                tbt_slo_us=round(parse_seconds(tbt_slo) * 1e6),
                max_tokens=max_tokens,
                retries_max=retries,
                hardware=_sized(config, dram_gib, ssd_gib),
            )
            for config in configs
        ]
        if log is not None and len(configs) > 1:
            output.fail("--log takes one policy", code=output.EXIT_USAGE)
        results = _run(requested, configs, jobs, log)
    except KvpoolError as error:
        output.fail(str(error), hint=error.hint, code=output.EXIT_USAGE)
    about = _about(trace_file, requested, configs[0])
    _show(results, about, json)
    if plot is None and len(results) > 1:
        plot = PLOT_DEFAULT
    if plot is not None:
        _plot(results, about, plot)


def _configs(
    policies: Sequence[str], nodes: int, split: str, hardware: str, speed: float, seed: int, faults: Path | None
) -> list[SimulationConfig]:
    from scheduler.core.policies import POLICIES
    from scheduler.simulator.faults import read_faults
    from scheduler.simulator.hardware import read_hardware
    from scheduler.simulator.settings import SimulationConfig

    names: dict[str, None] = {}
    for policy in policies:
        names.update(dict.fromkeys(POLICIES if policy == "all" else [policy]))
    for name in names:
        if name not in POLICIES:
            output.fail(f"policy {name!r} is not one of {', '.join(POLICIES)}, all", code=output.EXIT_USAGE)
    base = SimulationConfig(
        hardware=read_hardware(hardware),
        nodes=nodes,
        split=_parse_split(split),
        speed=speed,
        seed=seed,
        faults=read_faults(faults) if faults is not None else (),
    )
    return [replace(base, policy=name) for name in names]


def _parse_split(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    prefill, _, decode = text.partition(":")
    try:
        return int(prefill), int(decode)
    except ValueError:
        output.fail(f"--split {text}: PREFILL:DECODE is needed, as in 8:8", code=output.EXIT_USAGE)


def _sized(config: SimulationConfig, dram_gib: float | None, ssd_gib: float | None) -> Hardware:
    hardware = config.hardware
    if dram_gib is not None:
        hardware = replace(hardware, dram_bytes=int(dram_gib * GIB))
    if ssd_gib is not None:
        hardware = replace(hardware, ssd_bytes=int(ssd_gib * GIB))
    return hardware


def _run(requested: Trace, configs: Sequence[SimulationConfig], jobs: int, log: Path | None) -> list[Result]:
    from scheduler.simulator.driver import Simulation, simulate

    for config in configs:
        Simulation(requested, config)  # whatever is wrong shows before the first minute is spent
    if log is not None:
        try:
            with log.open("w") as file:
                return [simulate(requested, configs[0], file.write)]
        except OSError as error:
            output.fail(f"{log} can't be written: {error}")
    if jobs == 1 or len(configs) == 1:
        return [simulate(requested, config) for config in configs]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(configs)), mp_context=context) as pool:
        return list(pool.map(simulate, [requested] * len(configs), configs))


def _about(file: Path, requested: Trace, config: SimulationConfig) -> dict[str, Any]:
    return {
        "trace": str(file),
        "requests": len(requested),
        "bad_lines": requested.bad_lines,
        "hardware": config.hardware.name,
        "nodes": config.nodes,
        "split": None if config.split is None else f"{config.split[0]}:{config.split[1]}",
        "speed": config.speed,
        "seed": config.seed,
        "ttft_slo_ms": config.ttft_slo_us / 1000,
        "tbt_slo_ms": config.tbt_slo_us / 1000,
        "modelled": True,
    }


def _show(results: Sequence[Result], about: dict[str, Any], json: bool) -> None:
    from scheduler.simulator import compare

    if json:
        output.print_json(compare.to_json(results, about))
        return
    split = f", split {about['split']}" if about["split"] else ""
    limits = f"TTFT within {about['ttft_slo_ms'] / 1000:g} s, TBT within {about['tbt_slo_ms']:g} ms"
    title = f"modelled: {_cluster(about)}{split}; {limits}"
    tables.table(title, compare.columns(), compare.rows(results))
    if len(results) == 1:
        tables.facts("", {"log": f"{results[0].log_lines:,} lines, sha256 {results[0].log_sha256}"})


def _cluster(about: dict[str, Any]) -> str:
    return f"{about['requests']:,} requests at {about['speed']:g} x, {about['nodes']} nodes of {about['hardware']}"


def _plot(results: Sequence[Result], about: dict[str, Any], path: Path) -> None:
    from scheduler.simulator import compare

    title = f"{_cluster(about)} (modelled)"
    try:
        path.write_text(compare.plot(results, title))
    except OSError as error:
        output.fail(f"{path} can't be written: {error}")
    typer.echo(f"plot: {path}", err=True)
