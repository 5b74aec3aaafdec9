"""What all benchmarks share: interleaved rounds, the wait for an idle machine, medians, ratios to limits, output.

Other users of a machine move everything together, so single figures say little and ratios inside one run say much:
rounds of all cases are interleaved, and a ratio is the median over rounds of both cases' ratio in that round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Self

from rich.console import Console
from rich.table import Table

#: How often a second is divided, and whether more is better.
UNITS: Final = {
    "GB/s": (1e9, True), "M keys/s": (1e6, True), "M blocks/s": (1e6, True), "k/s": (1e3, True), "us": (1e6, False),
    "ms": (1e3, False),
}  # fmt: skip
IDLE_SHARE_MIN = 0.9


def _nothing() -> None: ...


@dataclass(frozen=True)
class Case:
    """Something to measure.

    run: does it once; may return the seconds it took, where it knows better than the clock around it.
    amount: what one run does, in bytes, keys or calls.
    limits: names of cases of the same measurement; the best of them is what this one is compared with.
    aim: the least ratio to it that we want.
    prepare: called before each run, not timed.
    """

    name: str
    run: Callable[[], float | None]
    amount: float
    unit: str = "GB/s"
    limits: tuple[str, ...] = ()
    aim: float | None = None
    prepare: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Row:
    """A case that was measured, or a single figure (`rounds` 1). `ratio` above 1 is better than the limit."""

    name: str
    unit: str
    median: float
    low: float
    high: float
    rounds: int
    limit: str = ""
    ratio: float | None = None
    aim: float | None = None

    @classmethod
    def figure(cls, name: str, value: float, unit: str, *, limit: str = "", ratio: float | None = None) -> Self:
        """Something that was measured once, or counted."""
        return cls(name, unit, value, value, value, 1, limit, ratio)


def measure(cases: Sequence[Case], rounds: int, *, quiet_s: float = 0.0, warm: int = 1) -> list[Row]:
    """Runs all cases `rounds` times, interleaved, after `warm` rounds that do not count.

    Args: quiet_s: how long each run may wait for the rest of the machine to be idle.
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    assert len(seconds) == len(cases), "two cases of one name"
    for number in range(warm + rounds):
        for case in cases:
            case.prepare()
            if number >= warm:
                wait_until_quiet(quiet_s)
            begin_s = time.perf_counter()
            known_s = case.run()
            took_s = time.perf_counter() - begin_s if known_s is None else known_s
            if number >= warm:
                seconds[case.name].append(took_s)
    return [_row(case, {c.name: c for c in cases}, seconds) for case in cases]


def _row(case: Case, cases: dict[str, Case], seconds: dict[str, list[float]]) -> Row:
    values = sorted(_value(case, took_s) for took_s in seconds[case.name])
    limit, ratio = "", None
    if case.limits:
        limit = min(case.limits, key=lambda name: statistics.median(seconds[name]) / cases[name].amount)
        pairs = zip(seconds[case.name], seconds[limit], strict=True)
        shares = [(theirs / cases[limit].amount) / (ours / case.amount) for ours, theirs in pairs]
        ratio = statistics.median(shares)
    return Row(
        case.name, case.unit, statistics.median(values), values[0], values[-1], len(values), limit, ratio, case.aim
    )


def _value(case: Case, took_s: float) -> float:
    divided, more_is_better = UNITS[case.unit]
    return case.amount / took_s / divided if more_is_better else took_s / case.amount * divided


# ------------------------------------------------------------ the machine


def wait_until_quiet(limit_s: float) -> bool:
    """Waits until nearly all of the machine is idle, at most so long. Returns whether it was."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if idle_share(0.05) >= IDLE_SHARE_MIN:
            return True
    return limit_s <= 0


def idle_share(seconds: float) -> float:
    """Share of the machine's time that nobody used, over so long."""

    def read() -> tuple[int, int]:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return fields[3] + fields[4], sum(fields)

    idle, total = read()
    time.sleep(seconds)
    idle_then, total_then = read()
    return (idle_then - idle) / max(1, total_then - total)


def machine() -> dict[str, str]:
    """What figures are worth nothing without."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory_kib = int(Path("/proc/meminfo").read_text().split(None, 2)[1])
    return {
        "cpu": f"{os.cpu_count()} x {models[0].partition(':')[2].strip() if models else platform.machine()}",
        "memory": f"{memory_kib / (1 << 20):.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


# ------------------------------------------------------------ output


@dataclass
class Report:
    """Tables of one benchmark, printed as they come, and written as JSON in the end."""

    name: str
    json_path: Path | None = None
    tables: dict[str, list[Row]] = field(default_factory=dict)
    _machine: dict[str, str] = field(default_factory=machine)
    _console: Console = field(default_factory=lambda: Console(width=None if sys.stdout.isatty() else 120))

    def __post_init__(self) -> None:
        self._console.print(f"[bold]{self.name}[/]  " + ", ".join(f"{k} {v}" for k, v in self._machine.items() if v))

    def add(self, title: str, rows: Sequence[Row]) -> None:
        self.tables.setdefault(title, []).extend(rows)
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("what")
        for column in ("median", "min .. max", "unit", "of limit", "aim"):
            table.add_column(column, justify="right" if column != "unit" else "left")
        table.add_column("limit", style="dim")
        for row in rows:
            table.add_row(*_cells(row))
        self._console.print(table)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def save(self) -> None:
        if self.json_path is not None:
            tables = {title: [asdict(row) for row in rows] for title, rows in self.tables.items()}
            document = {"bench": self.name, "machine": self._machine, "command": sys.argv, "tables": tables}
            self.json_path.write_text(json.dumps(document, indent=2))


def _cells(row: Row) -> list[str]:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    if row.ratio is not None and row.aim is not None:
        ratio = f"[{'green' if row.ratio >= row.aim else 'red'}]{ratio}[/]"
    spread = f"{number(row.low)} .. {number(row.high)}" if row.rounds > 1 else ""
    return [
        row.name, number(row.median), spread, row.unit, ratio, "" if row.aim is None else f"{row.aim:g}", row.limit
    ]  # fmt: skip


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def arguments(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved repetitions of each case")
    parser.add_argument("--quiet-s", type=float, default=1.0, help="wait so long for an idle machine before each run")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser


def size_name(size_bytes: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size_bytes >= unit and size_bytes % unit == 0:
            return f"{size_bytes // unit} {name}"
    return f"{size_bytes} B"
