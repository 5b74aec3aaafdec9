"""Shows how far a long operation of a node is, on a terminal; says at the end what came of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.v1 import source_admin_pb2 as pb

#: As a shell says it of a program that was interrupted.
EXIT_INTERRUPTED = 130


def follow(title: str, call: Any, *, interrupted: str) -> pb.Progress:
    """Follows a stream of progress to its end; returns the last message.

    Args: interrupted: what to say when the operator ends it with Ctrl-C.
    """
    last = pb.Progress()

    def note(progress: pb.Progress) -> None:
        nonlocal last
        last = progress

    try:
        _show(title, call, note)
    except KeyboardInterrupt:
        call.cancel()
        print(f"interrupted after {last.blocks_done} blocks: {interrupted}", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    return last


def _show(title: str, call: Iterable[pb.Progress], note: Callable[[pb.Progress], None]) -> None:
    """Bars go to stderr, and only where a terminal shows them."""
    if not sys.stderr.isatty():
        for progress in call:
            note(progress)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[blocks]} blocks"),
               TransferSpeedColumn(), TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, blocks=0)
        for progress in call:
            note(progress)
            done = progress.blocks_done
            # The bar counts bytes, of which only those done are known: the rest is guessed from the blocks.
            total = progress.bytes_done * progress.blocks_total / done if done and progress.blocks_total else None
            bar.update(
                task, completed=progress.bytes_done, total=total, blocks=f"{done}/{progress.blocks_total or '?'}"
            )


def report(title: str, results: dict[str, pb.Progress], *, json: bool, done: str) -> None:
    """Prints the last progress of each node; fails if something could not be done or was bad."""
    if json:
        output.print_json({name: output.to_dict(p) for name, p in results.items()})
    else:
        rows = [
            (name, p.blocks_done, output.size(p.bytes_done), p.blocks_failed, p.blocks_bad, p.message or "-")
            for name, p in results.items()
        ]
        tables.table(title, ("node", f"{done}:", "bytes:", "failed:", "bad:", "note"), rows)
    bad, failed = (sum(getattr(p, n) for p in results.values()) for n in ("blocks_bad", "blocks_failed"))
    if bad:
        output.fail(
            f"{bad} blocks did not have the bytes that were committed",
            hint="they were removed, and will be computed again; look at the host's memory and disks",
        )
    if failed:
        output.fail(f"{failed} blocks were not {done}", hint="the note says why; what was is not done again")
