"""Files of a journal, entry by entry, with the place of whatever is wrong in them. Nothing is decided here."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, get_args

from kvpool.core.errors import BadArgument
from scheduler.core.commands import Command
from scheduler.core.events import Event
from scheduler.service import codec
from scheduler.service.journal import FORMAT, files

#: A line longer than this is none of a journal: files are rotated long before.
LINE_BYTES_MAX = 1 << 28
#: Bad lines that are kept with what is wrong with them; all are counted.
BAD_EXAMPLES_MAX = 20
_GZIP_MAGIC = b"\x1f\x8b"
_EVENTS, _COMMANDS = get_args(Event), get_args(Command)


@dataclass(frozen=True, slots=True)
class Entry:
    """One event that entered the core.

    Fields:
        line: of the event, counted from 1.
        commands: what is on record of what came of it.
        complete: whether all that came of it is on record. Of a file's last event it may not be: whoever wrote the file
            may have died of it.
    """

    line: int
    at_us: int
    event: Event
    commands: tuple[Command, ...]
    complete: bool


@dataclass(frozen=True, slots=True)
class BadLine:
    line: int
    offset: int  # bytes before it, of the file unpacked
    problem: str


@dataclass(slots=True)
class JournalFile:
    """One file; go through `entries` once.

    Fields:
        checkpoint: the core's state at the beginning, as JSON.
        torn: the last line was cut off, as by a crash; known once all entries were read.
        bad_lines: how many lines were left out, with `skip_bad`; the first of them in `bad_examples`.
    """

    path: Path
    skip_bad: bool
    version: str
    wall_time_s: float
    checkpoint: Any
    lines: Iterator[tuple[int, int, bytes]]  # behind the checkpoint: number, bytes before it, text
    torn: bool = False
    bad_lines: int = 0
    bad_examples: list[BadLine] = field(default_factory=list)

    def entries(self) -> Iterator[Entry]:
        """Events in their order.

        Raises: BadArgument with the line's number for one that is none of a journal, unless they are skipped.
        """
        pending: tuple[int, int, Event] | None = None
        at_us = 0
        for number, offset, text in self.lines:
            if not text.endswith(b"\n"):
                self.torn = True
                break
            try:
                what = _understood(text, at_us)
                if isinstance(what, list):
                    if pending is None:
                        raise BadArgument("commands without an event before them")
                    yield Entry(*pending, commands=tuple(what), complete=True)
                    pending = None
                    continue
            except BadArgument as error:
                self._bad(number, offset, str(error))
                continue
            if pending is not None:
                yield Entry(*pending, commands=(), complete=True)
            at_us, event = what
            pending = number, at_us, event
        if pending is not None:
            yield Entry(*pending, commands=(), complete=False)

    def _bad(self, number: int, offset: int, problem: str) -> None:
        if not self.skip_bad:
            raise BadArgument(
                f"{self.path}:{number}: byte {offset}: {problem}",
                hint="--skip-bad leaves such lines out and counts them",
            )
        self.bad_lines += 1
        if len(self.bad_examples) < BAD_EXAMPLES_MAX:
            self.bad_examples.append(BadLine(number, offset, problem))


def _understood(text: bytes, last_us: int) -> tuple[int, Event] | list[Command]:
    """An event with its time, or commands. Raises: BadArgument."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadArgument(f"no JSON: {error}") from error
    if isinstance(line, dict) and "commands" in line:
        commands = codec.from_json(line["commands"])
        if not isinstance(commands, tuple) or not all(isinstance(c, _COMMANDS) for c in commands):
            raise BadArgument("commands are expected")
        return list(commands)
    if not isinstance(line, dict) or "event" not in line:
        raise BadArgument("neither an event nor commands")
    event, at_us = codec.from_json(line["event"]), line.get("at")
    if not isinstance(event, _EVENTS):
        raise BadArgument(f"{type(event).__name__} is no event")
    if type(at_us) is not int or at_us < last_us:
        raise BadArgument(f"at {at_us!r}: a time not before that of the event before, {last_us}, is needed")
    return at_us, event


def open_journal(path: Path, skip_bad: bool = False) -> JournalFile:
    """Opens one file, also one packed by gzip, and reads its checkpoint.

    Raises: BadArgument if it can't be read or is no journal of a format known here.
    """
    lines = _lines(path)
    _, _, first = next(lines, (0, 0, b""))
    try:
        header = json.loads(first)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("journal") != FORMAT or "checkpoint" not in header:
        raise BadArgument(
            f"{path} is not a scheduler journal of format {FORMAT}",
            hint="`kvpool scheduler --journal FOLDER` writes them, as scheduler-NNNNNN.jsonl",
        )
    version, wall_time_s = str(header.get("version", "")), header.get("wall_time_s", 0.0)
    return JournalFile(path, skip_bad, version, wall_time_s, header["checkpoint"], lines)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Numbered lines with the bytes before them. A packed file that ends early ends like a torn one."""
    offset = 0
    try:
        with _opened(path) as file:
            number = 0
            while text := file.readline(LINE_BYTES_MAX):
                number += 1
                yield number, offset, text
                offset += len(text)
    except EOFError:
        yield 0, offset, b""
    except (OSError, zlib.error) as error:
        raise BadArgument(f"{path} can't be read: {error}") from error


def _opened(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
    if packed:
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def files_of(path: Path) -> list[Path]:
    """A journal's files, oldest first: those of a folder, or the one named. Raises: BadArgument if there is none."""
    if not path.is_dir():
        return [path]
    found = files(path)
    if not found:
        raise BadArgument(f"{path} has no scheduler-NNNNNN.jsonl in it", hint="name a journal's folder, or one file")
    return found
