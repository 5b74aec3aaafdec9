"""What goes wrong and when, as a file says it. Pure but for `read_faults`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from kvpool.core.errors import BadArgument

FILE_BYTES_MAX = 16 << 20
FAULTS_MAX = 100_000


class FaultKind(Enum):
    """Each acts on `target` from `at_s` on, and is over `duration_s` later, if it has a duration."""

    CRASH = "crash"  # an instance, or a host with all on it; comes back empty after `duration_s`, 0 = never
    PARTITION = "partition"  # a host reaches nobody and nobody it
    LINK = "link"  # a host's network at `factor` of its bandwidth, 0 = down; with `period_s` it flaps
    SLOW = "slow"  # an instance computes `factor` times as long
    CLOCK = "clock"  # a host's clock measures `factor` times what passes
    LOST_EVENTS = "lost-events"  # a host's sources lose this share (`factor`) of their batches
    LATE_EVENTS = "late-events"  # messages of a host's sources come `delay_s` later


@dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    target: str
    at_us: int
    duration_us: int = 0
    factor: float = 0.0
    period_us: int = 0
    delay_us: int = 0


#: Kind -> fields it must have besides kind, target and at_s; and those it may have.
_FIELDS: dict[FaultKind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    FaultKind.CRASH: ((), ("duration_s",)),
    FaultKind.PARTITION: (("duration_s",), ()),
    FaultKind.LINK: (("factor", "duration_s"), ("period_s",)),
    FaultKind.SLOW: (("factor", "duration_s"), ()),
    FaultKind.CLOCK: (("factor",), ("duration_s",)),
    FaultKind.LOST_EVENTS: (("factor", "duration_s"), ()),
    FaultKind.LATE_EVENTS: (("delay_s", "duration_s"), ()),
}
#: Largest factor that makes sense.
_FACTOR_MAX = {FaultKind.LINK: 1.0, FaultKind.LOST_EVENTS: 1.0, FaultKind.SLOW: 1000.0, FaultKind.CLOCK: 10.0}


def read_faults(path: str | Path) -> tuple[Fault, ...]:
    """A JSON file with a list of faults, or {"faults": [...]}. Raises: BadArgument with the entry that is wrong."""
    file = Path(path)
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            raise BadArgument(f"{path} is not a file of faults: larger than {FILE_BYTES_MAX} bytes")
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadArgument(f"{path} can't be read as a file of faults: {error}") from error
    if isinstance(data, dict):
        data = data.get("faults")
    if not isinstance(data, list) or len(data) > FAULTS_MAX:
        raise BadArgument(f"{path}: a list of up to {FAULTS_MAX} faults is expected", hint=_HINT)
    return tuple(fault_of(entry, f"{path}: fault {number}") for number, entry in enumerate(data, 1))


_HINT = 'an entry is {"kind": "link", "target": "host-3", "at_s": 60, "duration_s": 30, "factor": 0.2}'


def fault_of(entry: Any, where: str) -> Fault:
    """One fault from plain data. Raises: BadArgument."""
    if not isinstance(entry, dict):
        raise BadArgument(f"{where}: an object is expected", hint=_HINT)
    try:
        kind = FaultKind(entry.get("kind"))
    except ValueError:
        known = ", ".join(k.value for k in FaultKind)
        raise BadArgument(f"{where}: kind {entry.get('kind')!r} is not one of {known}") from None
    target = entry.get("target")
    if not isinstance(target, str) or not target:
        raise BadArgument(f"{where}: target must name a host or an instance", hint=_HINT)
    needed, optional = _FIELDS[kind]
    numbers = {}
    for name in entry:
        if name not in ("kind", "target", "at_s", *needed, *optional):
            raise BadArgument(f"{where}: {kind.value} has no field {name!r}")
    for name in ("at_s", *needed, *optional):
        if name in entry:
            numbers[name] = _number(entry[name], f"{where}: {name}")
        elif name not in optional:
            raise BadArgument(f"{where}: {kind.value} needs {name}")
    factor = numbers.get("factor", 0.0)
    if factor > _FACTOR_MAX.get(kind, factor):
        raise BadArgument(f"{where}: factor {factor:g} is above {_FACTOR_MAX[kind]:g}")
    if kind in (FaultKind.SLOW, FaultKind.CLOCK) and factor <= 0:
        raise BadArgument(f"{where}: factor must be above zero")
    times = {f"{name[:-2]}_us": round(value * 1e6) for name, value in numbers.items() if name.endswith("_s")}
    return Fault(kind=kind, target=target, factor=factor, **times)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise BadArgument(f"{where} must be a number from 0 to below 1e9, not {value!r}")
    return float(value)
