"""A journal through a fresh core: whether the same comes out, bit for bit, and where it first does not. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvpool.core.errors import BadArgument
from scheduler.core import checkpoint
from scheduler.core.commands import Command, Placed, Refused
from scheduler.core.core import SchedulerCore
from scheduler.core.events import Event, PlaceRequested
from scheduler.replay.reading import Entry, JournalFile, open_journal
from scheduler.service import codec

DIFFERENCES_KEPT_MAX = 100


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay did not do what is on record."""

    line: int
    at_us: int
    event: Event
    recorded: tuple[Command, ...]
    replayed: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """One file, replayed.

    Fields:
        decisions: answers to placement requests, as replayed.
        difference_count: entries that came out otherwise; the first of them in `differences`.
        decisions_sha256: of all commands with their times, as replayed.
        state_sha256: of all that further decisions depend on, at the end; empty where a source was half through a
            snapshot, which has no plain form.
        core: as it was at the end.
    """

    path: str
    version: str
    events: int
    decisions: tuple[Placed | Refused, ...]
    difference_count: int
    differences: tuple[Difference, ...]
    torn: bool
    bad_lines: int
    decisions_sha256: str
    state_sha256: str
    core: SchedulerCore

    @property
    def identical(self) -> bool:
        return not self.difference_count


def core_of(journal: JournalFile, checkpoint_json: Any = None) -> SchedulerCore:
    """The core as it was where a file begins. Args: checkpoint_json: to be used instead of the file's.

    Raises: BadArgument if the checkpoint has parts that are not known here.
    """
    state = journal.checkpoint if checkpoint_json is None else checkpoint_json
    try:
        return checkpoint.core_of(codec.from_json(state))
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, BadArgument) as error:
        raise BadArgument(
            f"{journal.path}:1: the checkpoint can't be restored: {error!r}",
            hint=f"kvpool {journal.version or '?'} wrote it",
        ) from error


def step(core: SchedulerCore, entry: Entry, journal: JournalFile) -> list[Command]:
    """Lets a core take in one entry. Raises: BadArgument with the line at which it fails."""
    try:
        return core.handle(entry.event, entry.at_us)
    except (
        Exception
    ) as error:  # whatever it is, it is the line's or the core's fault, and a scheduler may have died of it
        raise BadArgument(
            f"{journal.path}:{entry.line}: the core fails on this event: {error!r}",
            hint="if the scheduler died here, this is what it died of",
        ) from error


def replay(journal: JournalFile, after_event: Callable[[SchedulerCore], object] | None = None) -> Replay:
    """Args: after_event: called with the core after each event.

    Raises: BadArgument for what can't be read or taken in.
    """
    core = core_of(journal)
    digest = hashlib.sha256()
    decisions: list[Placed | Refused] = []
    differences: list[Difference] = []
    difference_count = events = 0
    for entry in journal.entries():
        commands = tuple(step(core, entry, journal))
        events += 1
        decisions.extend(c for c in commands if isinstance(c, Placed | Refused))
        if commands:
            digest.update(f"{entry.at_us} {codec.dumps(commands)}\n".encode())
        if commands != entry.commands and entry.complete:
            difference_count += 1
            if len(differences) < DIFFERENCES_KEPT_MAX:
                differences.append(Difference(entry.line, entry.at_us, entry.event, entry.commands, commands))
        if after_event is not None:
            after_event(core)
    return Replay(
        path=str(journal.path),
        version=journal.version,
        events=events,
        decisions=tuple(decisions),
        difference_count=difference_count,
        differences=tuple(differences),
        torn=journal.torn,
        bad_lines=journal.bad_lines,
        decisions_sha256=digest.hexdigest(),
        state_sha256=_state_sha256(core),
        core=core,
    )


def replay_file(path: str | Path) -> Replay:
    """Replays one file. Raises: BadArgument for what can't be read or taken in."""
    return replay(open_journal(Path(path)))


def _state_sha256(core: SchedulerCore) -> str:
    if checkpoint.unsynced_streams(core):
        return ""
    return hashlib.sha256(codec.dumps(checkpoint.state_of(core)).encode()).hexdigest()


def told(difference: Difference) -> dict[str, Any]:
    """A difference for people: which event, and each field of the commands that is not the same."""
    recorded, replayed = difference.recorded, difference.replayed
    changed: list[str] = []
    for number in range(max(len(recorded), len(replayed))):
        then = recorded[number] if number < len(recorded) else None
        now = replayed[number] if number < len(replayed) else None
        changed += _changed(then, now)
    return {
        "line": difference.line,
        "at_us": difference.at_us,
        "event": type(difference.event).__name__,
        "request": difference.event.request_id if isinstance(difference.event, PlaceRequested) else "",
        "changed": changed,
    }


def _changed(then: Command | None, now: Command | None) -> list[str]:
    if then == now:
        return []
    if then is None or now is None or type(then) is not type(now):
        return [f"{_short(then)} is {_short(now)}"]
    kind = type(then).__name__
    pairs = [(f.name, getattr(then, f.name), getattr(now, f.name)) for f in fields(then)]
    return [f"{kind}.{name}: {before!r} is {after!r}" for name, before, after in pairs if before != after]


def _short(command: Command | None) -> str:
    if command is None:
        return "nothing"
    request = getattr(command, "request_id", "")
    return f"{type(command).__name__}({request})" if request else repr(command)
