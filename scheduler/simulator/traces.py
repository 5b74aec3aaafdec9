"""Files of traces: what kind one is, reading it, and writing one of our own."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from kvpool.core.errors import BadArgument
from scheduler.simulator import trace_formats
from scheduler.simulator.columns import BadLine, Trace, TraceBuilder, TraceRequest
from scheduler.simulator.trace_formats import Lines

__all__ = ["BadLine", "Trace", "TraceBuilder", "TraceRequest", "read_trace", "write_trace"]

_GZIP_MAGIC = b"\x1f\x8b"
#: A key of the first line -> who reads such a file.
_BY_KEY: dict[str, Callable[[Lines], TraceBuilder]] = {
    "kvpool_trace": trace_formats.read_kvpool,
    "journal": trace_formats.read_journal,
    "input_length": trace_formats.read_mooncake,
    "hash_ids": trace_formats.read_mooncake,
    "timestamp": trace_formats.read_mooncake,
}
#: The first of them that tells the format decides: those before it are bad lines like others.
LINES_LOOKED_AT = 16
_HINT = "known are Mooncake's JSONL, Azure's CSV, a scheduler's journal, and what `kvctl trace generate` writes"


def read_trace(path: str | Path, skip_bad: bool = False) -> Trace:
    """Reads a trace of any known format; what it is, and whether it is compressed (gzip), the file itself tells.

    Args:
        skip_bad: leaves bad lines out and counts them, see `Trace.bad_lines`.
    Raises: BadArgument with the line's number for one that can't be understood, for a file that can't be read, is of
        no known format, or has no request at all.
    """
    try:
        with _opened(Path(path)) as file:
            trace = _read(str(path), file, skip_bad)
    except (OSError, EOFError, zlib.error) as error:
        raise BadArgument(f"{path} can't be read: {error}") from error
    except UnicodeDecodeError as error:
        raise BadArgument(f"{path} is not text in UTF-8: {error}", hint=_HINT) from error
    if not len(trace):
        bad = f": all {trace.bad_lines} lines are bad" if trace.bad_lines else ""
        raise BadArgument(f"{path} has no requests{bad}")
    return trace


def _opened(path: Path) -> IO[str]:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
    if packed:
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8-sig")


def _read(path: str, file: IO[str], skip_bad: bool) -> Trace:
    numbered = ((number, text) for number, text in enumerate(file, 1) if text.strip())
    looked_at: list[tuple[int, str]] = []
    for line in islice(numbered, LINES_LOOKED_AT):
        looked_at.append(line)
        reader = _reader(line[1])
        if reader is not None:
            lines: Iterator[tuple[int, str]] = chain(looked_at, numbered)
            return reader(Lines(path, lines, skip_bad)).build()
    if not looked_at:
        raise BadArgument(f"{path} is empty", hint=_HINT)
    raise BadArgument(f"{path}:1: not a trace: {looked_at[0][1].strip()[:60]!r}", hint=_HINT)


def _reader(text: str) -> Callable[[Lines], TraceBuilder] | None:
    """Who reads a file with this line among its first; None if the line does not tell."""
    if not text.lstrip().startswith("{"):
        return trace_formats.read_azure if "TIMESTAMP" in text else None
    return next((reader for key, reader in _BY_KEY.items() if f'"{key}"' in text), None)


def write_trace(path: str | Path, trace: Trace, about: dict[str, Any] | None = None) -> None:
    """Writes a trace in our own format, compressed if the name ends in .gz; the same trace gives the same bytes.

    Raises: BadArgument if the file can't be written.
    """
    try:
        with Path(path).open("wb") as file:
            if str(path).endswith(".gz"):
                with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                    _write(packed, trace, about or {})
            else:
                _write(file, trace, about or {})
    except OSError as error:
        raise BadArgument(f"{path} can't be written: {error}") from error


def _write(file: IO[bytes] | gzip.GzipFile, trace: Trace, about: dict[str, Any]) -> None:
    file.write(trace_formats.header(trace.block_tokens, about).encode() + b"\n")
    for request in trace:
        line: dict[str, Any] = {
            "arrival_us": request.arrival_us,
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": request.output_tokens,
            "hash_ids": request.hash_ids,
        }
        optional = {"session": request.session, "tenant": request.tenant, "priority": request.priority}
        line |= {name: value for name, value in optional.items() if value}
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
