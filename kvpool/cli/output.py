"""How the CLIs speak: JSON for programs, tables for people, errors that say what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
import typer
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from kvpool import __version__
from kvpool.core.errors import KvpoolError, Unavailable
from kvpool.service import rpc

#: Exit codes: 1 = asked for something that is not there or was refused, 2 = wrong usage, 3 = nothing answers.
EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE = 1, 2, 3

# A file or a pipe has no width of its own; tables need more than the 80 columns that rich would assume.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)


def to_dict(message: Message) -> dict[str, Any]:
    """A message as plain data: numbers stay numbers, bytes become hex, enums their lower-case names."""
    out: dict[str, Any] = {}
    for fd in message.DESCRIPTOR.fields:
        repeated = fd.label == FieldDescriptor.LABEL_REPEATED
        if fd.has_presence and not message.HasField(fd.name):
            continue
        value = getattr(message, fd.name)
        out[fd.name] = [_plain(fd, v) for v in value] if repeated else _plain(fd, value)
    return out


def _plain(fd: FieldDescriptor, value: Any) -> Any:
    if fd.type == FieldDescriptor.TYPE_MESSAGE:
        return to_dict(value)
    if fd.type == FieldDescriptor.TYPE_BYTES:
        return value.hex()
    if fd.type == FieldDescriptor.TYPE_ENUM:
        names = fd.enum_type.values_by_number
        name = names[value].name if value in names else str(value)
        prefix = "".join("_" + c if c.isupper() else c.upper() for c in fd.enum_type.name).lstrip("_") + "_"
        return name.removeprefix(prefix).lower()
    return value


def print_json(data: Any) -> None:
    json.dump(data, sys.stdout, indent=2)
    sys.stdout.write("\n")


def fail(message: str, *, hint: str = "", code: int = EXIT_FAILED) -> NoReturn:
    """Ends the command with a message on stderr."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)
    raise typer.Exit(code)


@contextmanager
def reported_errors(address: str, what: str) -> Iterator[None]:
    """Turns what goes wrong while `what` at `address` is asked into a message and an exit code."""
    try:
        yield
    except grpc.RpcError as error:
        _report(rpc.from_rpc_error(error, address), address, what)
    except KvpoolError as error:
        _report(error, address, what)


def _report(error: KvpoolError, address: str, what: str) -> NoReturn:
    if isinstance(error, Unavailable) and error.hint != rpc.REACH_HINT:
        fail(str(error), hint=error.hint, code=EXIT_UNREACHABLE)
    if isinstance(error, Unavailable):
        fail(
            f"no {what} answers at {address}",
            hint=f"start one with `kvpool serve` or `kvpool {what}`, or name another address with --{what}",
            code=EXIT_UNREACHABLE,
        )
    fail(str(error), hint=error.hint)


def version_option(program: str) -> Any:
    """A `--version` that needs no command beside it."""

    def show(asked: bool) -> None:
        if asked:
            print(f"{program} {__version__}")
            raise typer.Exit

    # KVPOOL_VERSION is a name that container images like to set: it must not end the program.
    return typer.Option(
        "--version", callback=show, is_eager=True, allow_from_autoenv=False, help="Print the version and end."
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; columns whose name ends in a colon are right-aligned numbers."""
    out = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        out.add_column(column.rstrip(":"), justify="right" if column.endswith(":") else "left")
    for row in rows:
        out.add_row(*(str(cell) for cell in row))
    console.print(out)


def facts(title: str, values: Mapping[str, Any]) -> None:
    out = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in values.items():
        out.add_row(f"  {name}", str(value))
    console.print(out)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def milliseconds(us: float) -> str:
    return f"{us / 1000:.1f} ms"


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "2GB", "4096". Raises: typer.BadParameter."""
    units = {"": 1, "b": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
    units |= {f"{u}ib": units[u] for u in "kmgt"} | {f"{u}b": 1000**i for i, u in enumerate("kmgt", 1)}
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        count = float(digits) * units[unit]
    except (ValueError, KeyError):
        raise typer.BadParameter(f"{text!r} is not a size; write for example 512MiB or 2GB") from None
    if count < 1 or count > 1 << 50:
        raise typer.BadParameter(f"{text!r} is out of range")
    return int(count)
