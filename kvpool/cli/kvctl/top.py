"""`kvctl top`: what the nodes do now, as rates between two samples."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import grpc
import typer
from rich.live import Live
from rich.table import Table

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.cluster import Node, chosen_nodes
from kvpool.cli.kvctl.options import ANYBODY, DEFAULT_SCHEDULER, Access, Json, OneNode, Scheduler
from kvpool.service import rpc
from kvpool.v1 import block_source_pb2

#: Counters that only grow; all else in the statistics is a level.
COUNTERS = ("hits", "misses", "evictions", "bytes_read", "bytes_written", "digest_errors", "touches", "expired")
LEVELS = ("bytes_total", "bytes_used", "blocks", "blocks_writing", "sessions", "leases", "pins", "reservations")


@dataclass(frozen=True)
class Sample:
    """The statistics of one node at one moment; `error` where it did not answer."""

    at_s: float
    stats: block_source_pb2.SourceStats | None
    error: str = ""


def top(
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    node: OneNode = "",
    access: Access = ANYBODY,
    json: Json = False,
    interval: Annotated[float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between samples.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Two samples, one table, and out.")] = False,
) -> None:
    """A live table of the nodes; `q` or Ctrl-C ends it. --once --json is for scripts."""
    if json and not once:
        output.fail("--json goes with --once", code=output.EXIT_USAGE)
    with chosen_nodes(scheduler, node, access) as nodes:
        before = _sample(nodes)
        if once:
            time.sleep(interval)
            rows = _rows(nodes, before, _sample(nodes))
            if json:
                output.print_json({"interval_s": interval, "nodes": rows})
            else:
                output.console.print(_table(rows))
            if all("error" in row for row in rows):
                output.fail("no node answers", code=output.EXIT_UNREACHABLE)
            return
        with contextlib.suppress(KeyboardInterrupt):
            _watch(nodes, before, interval)


def _watch(nodes: list[Node], before: dict[str, Sample], interval_s: float) -> None:
    """Shows a new table each interval, until told to end."""
    first = _table(_rows(nodes, before, before))
    with _keys() as ended, Live(first, console=output.console, auto_refresh=False) as live:
        while not ended(interval_s):
            now = _sample(nodes)
            live.update(_table(_rows(nodes, before, now)), refresh=True)
            before = now


def _sample(nodes: list[Node]) -> dict[str, Sample]:
    return {one.address: _sample_one(one) for one in nodes}


def _sample_one(node: Node) -> Sample:
    try:
        stats = node.stats()
    except grpc.RpcError as error:
        return Sample(time.monotonic(), None, str(rpc.from_rpc_error(error, node.address)))
    return Sample(time.monotonic(), stats)


def _rows(nodes: list[Node], before: dict[str, Sample], now: dict[str, Sample]) -> list[dict[str, Any]]:
    return [{"node": one.source_id, **rates(before[one.address], now[one.address])} for one in nodes]


def rates(before: Sample, now: Sample) -> dict[str, Any]:
    """Levels of a node, and its counters as rates a second since the sample before.

    A counter that fell belongs to a node that was restarted meanwhile: it counts from zero.
    """
    if now.stats is None:
        return {"error": now.error}
    seconds = max(now.at_s - before.at_s, 1e-3)
    row: dict[str, Any] = {name: getattr(now.stats, name) for name in LEVELS}
    for name in COUNTERS:
        count = getattr(now.stats, name)
        past = getattr(before.stats, name) if before.stats is not None else count
        row[f"{name}_per_s"] = (count - past if count >= past else count) / seconds
    asked = row["hits_per_s"] + row["misses_per_s"]
    row["hit_ratio"] = row["hits_per_s"] / asked if asked else None
    row["draining"] = now.stats.draining
    return row


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = ("node", "used:", "blocks:", "hits/s:", "hit %:", "evictions/s:", "read/s:", "written/s:", "clients:",
               "leases:", "pins:", "writing:")  # fmt: skip
    table = Table(title="nodes (q ends)", title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column.rstrip(":"), justify="right" if column.endswith(":") else "left")
    for row in rows:
        if "error" in row:
            table.add_row(tables.plain(row["node"]), tables.plain(row["error"]), *[""] * (len(columns) - 2))
            continue
        ratio = "-" if row["hit_ratio"] is None else f"{100 * row['hit_ratio']:.0f}"
        table.add_row(
            tables.plain(row["node"]) + (" (draining)" if row["draining"] else ""),
            f"{output.size(row['bytes_used'])} of {output.size(row['bytes_total'])}", str(row["blocks"]),
            f"{row['hits_per_s']:.0f}", ratio, f"{row['evictions_per_s']:.0f}", output.size(row["bytes_read_per_s"]),
            output.size(row["bytes_written_per_s"]), str(row["sessions"]), str(row["leases"]), str(row["pins"]),
            str(row["blocks_writing"]),
        )  # fmt: skip
    return table


def _ends(typed: bytes) -> bool:
    """Whether what was typed ends it; nothing was typed at a terminal that is gone."""
    return not typed or b"q" in typed.lower()


def _wait_only(seconds: float) -> bool:
    time.sleep(seconds)
    return False


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A wait that tells whether `q` was pressed meanwhile; without a terminal it only waits."""
    if not sys.stdin.isatty():
        yield _wait_only
        return
    fd = sys.stdin.fileno()
    kept = termios.tcgetattr(fd)

    def pressed(seconds: float) -> bool:
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            # Not through sys.stdin, whose buffer would keep keys from the next select.
            if select.select([fd], [], [], left_s)[0] and _ends(os.read(fd, 64)):
                return True
        return False

    try:
        tty.setcbreak(fd)
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, kept)
