"""`kvctl trace`: what is in a trace, and traces that are made up. No cluster is asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.options import Json
from kvpool.core.errors import KvpoolError

if TYPE_CHECKING:
    from scheduler.simulator.trace_stats import Lengths, TraceStats
    from scheduler.simulator.traces import Trace

app = typer.Typer(help="Look into traces of requests, and make some up.", no_args_is_help=True)

SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave lines out that can't be understood; count them.")]


def read(path: Path, skip_bad: bool) -> Trace:
    """A trace, or the end of the command with what is wrong with it."""
    from scheduler.simulator.traces import read_trace

    try:
        return read_trace(path, skip_bad)
    except KvpoolError as error:
        output.fail(str(error), hint=error.hint)


@app.command("stats")
def stats(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Mooncake's JSONL, Azure's CSV, a journal, or our own.")],
    skip_bad: SkipBad = False,
    capacity: Annotated[
        list[int] | None, typer.Option("--capacity", min=1, help="Blocks of an LRU cache to ask about; many times.")
    ] = None,
    json: Json = False,
) -> None:
    """Lengths, load and how much of it caches of each size would find again."""
    from scheduler.simulator import trace_stats

    found = trace_stats.stats(read(file, skip_bad), capacity or trace_stats.CAPACITIES_BLOCKS)
    if json:
        output.print_json({"file": str(file), **found.to_json()})
        return
    _print(file, found)


def _print(file: Path, found: TraceStats) -> None:
    tables.facts(
        str(file),
        {
            "format": found.kind,
            "requests": f"{found.requests:,} in {found.duration_s:,.0f} s",
            "a second": f"{found.requests_per_s:.2f}; {found.peak_per_s:.2f} in the busiest 10 s",
            "prompt tokens": _lengths(found.prompt),
            "generated tokens": _lengths(found.output),
            f"blocks of {found.block_tokens}": f"{found.block_references:,} references to {found.unique_blocks:,} "
            f"blocks; {found.used_once:,} used once, one used {found.hottest_references:,} times",
            "sessions, tenants": f"{found.sessions:,}, {found.tenants:,}",
            **({"bad lines left out": f"{found.bad_lines:,}"} if found.bad_lines else {}),
            **{f"note {n}": note for n, note in enumerate(found.notes, 1)},
        },
    )
    rows = [
        ("no bound" if r.capacity_blocks is None else f"{r.capacity_blocks:,}", f"{r.blocks:.4f}", f"{r.tokens:.4f}")
        for r in found.hit_ratios
    ]
    tables.table("hit ratio of an LRU cache", ("blocks held:", "of block references:", "of prompt tokens:"), rows)


def _lengths(lengths: Lengths) -> str:
    return (
        f"mean {lengths.mean:,.0f}; half below {lengths.p50:,}, 90 % below {lengths.p90:,}, "
        f"99 % below {lengths.p99:,}; at most {lengths.max:,}; {lengths.total:,} in all"
    )


@app.command("generate")
def generate(
    kind: Annotated[str, typer.Option("--kind", help="multi-turn, agentic or long-document.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; compressed if it ends in .gz.")],
    requests: Annotated[int, typer.Option("--requests", min=1, max=10_000_000, help="How many.")] = 10_000,
    rate: Annotated[float, typer.Option("--rate", min=1e-6, max=1e6, help="Sessions that begin a second.")] = 1.0,
    block_tokens: Annotated[int, typer.Option("--block-tokens", min=1, max=65_536, help="Tokens of a block.")] = 512,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same trace.")] = 0,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the kind; many times.")
    ] = None,
) -> None:
    """Writes a made-up trace; the distributions of each kind are in docs/scheduling.md."""
    from dataclasses import asdict

    from scheduler.simulator import workloads
    from scheduler.simulator.traces import write_trace

    over = {}
    for text in setting or []:
        name, equals, value = text.partition("=")
        if not equals:
            output.fail(f"--set {text}: NAME=VALUE is needed", code=output.EXIT_USAGE)
        over[name.strip()] = value.strip()
    try:
        parameters = workloads.parameters_of(kind, over)
    except KvpoolError as error:
        output.fail(str(error), hint=error.hint, code=output.EXIT_USAGE)
    trace = workloads.generate(kind, requests, rate, seed, block_tokens, parameters)
    about = {"generated": kind, "seed": seed, "sessions_per_s": rate, "parameters": asdict(parameters)}
    try:
        write_trace(out, trace, about)
    except KvpoolError as error:
        output.fail(str(error), hint=error.hint)
    typer.echo(f"{out}: {len(trace):,} requests in {trace.duration_us / 1e6:,.0f} s")
