"""How one call of a cluster client spreads over nodes: which keys go where next, and what is known of each so far.

Told by several threads at once: each note is one assignment of whole rows, of rows that no other thread has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.cluster.placement import Place, choose, rank
from kvpool.core.ids import KeyArray
from kvpool.service.client_reads import Outcome
from kvpool.service.client_types import Bools
from kvpool.service.cluster_types import ClusterPutResult

Rows = NDArray[np.int64]


@dataclass
class Run:
    """Keys whose copies go to the same nodes: rows of the call, and places that were not tried yet, best first."""

    rows: NDArray[np.int64]
    order: list[int]
    tried: list[int]


def make_runs(keys: KeyArray, run_blocks: int, places: Sequence[Place]) -> list[Run]:
    """Cuts keys into runs of consecutive ones; the first key of each decides where its copies go."""
    firsts = np.arange(0, len(keys), run_blocks)
    orders = rank(keys[firsts], places)
    return [
        Run(np.arange(first, min(first + run_blocks, len(keys))), order, [])
        for first, order in zip(firsts.tolist(), orders.tolist(), strict=True)
    ]


class Stored:
    """Which keys of a put have how many copies.

    Args: hosts: of each place.
    """

    def __init__(self, count: int, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._lock = threading.Lock()
        self._places: list[list[int]] = [[] for _ in range(count)]
        self._stored: Bools = np.zeros(count, dtype=np.bool_)
        self._existed: Bools = np.zeros(count, dtype=np.bool_)
        self._written_elsewhere: Bools = np.zeros(count, dtype=np.bool_)
        self._bytes = 0

    def note(self, place: int, rows: Rows, *, stored: bool, size_bytes: int = 0) -> None:
        """These rows are readable at `place`: by this call, or before it."""
        with self._lock:
            (self._stored if stored else self._existed)[rows] = True
            self._bytes += size_bytes
            for row in rows.tolist():
                self._places[row].append(place)

    def note_written_elsewhere(self, rows: Rows) -> None:
        """Somebody else writes these: they are not stored a second time beside that."""
        with self._lock:
            self._written_elsewhere[rows] = True

    def assign(self, runs: Sequence[Run], replicas: int) -> list[tuple[int, Rows]]:
        """What to try next: places, and the rows for each; nothing once all is done, or nowhere is left to try."""
        wanted: dict[int, list[int]] = {}
        for run in runs:
            if not run.order:
                continue
            short = [
                row for row in run.rows.tolist()
                if len(self._places[row]) < replicas and not self._written_elsewhere[row]
            ]  # fmt: skip
            if not short:
                continue
            count = max(replicas - len(self._places[row]) for row in short)
            taken = sorted({place for row in short for place in self._places[row]})
            for place in choose(run.order, self._hosts, taken, count):
                run.order.remove(place)
                wanted.setdefault(place, []).extend(row for row in short if place not in self._places[row])
        return [(place, np.array(rows, dtype=np.int64)) for place, rows in sorted(wanted.items())]

    def result(self, begin_s: float) -> ClusterPutResult:
        copies = np.fromiter((len(places) for places in self._places), dtype=np.int64, count=len(self._places))
        hosts = ({self._hosts[place] for place in places} for places in self._places)
        shared = np.fromiter((len(h) for h in hosts), dtype=np.int64, count=len(self._places)) < copies
        with self._lock:
            stored, existed, elsewhere = self._stored.copy(), self._existed.copy(), self._written_elsewhere.copy()
        return ClusterPutResult(copies, stored, existed, shared, elsewhere, self._bytes, time.monotonic() - begin_s)


class Found:
    """Which keys of a get were read, and from where."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self.found: Bools = np.zeros(count, dtype=np.bool_)
        self.corrupt: Bools = np.zeros(count, dtype=np.bool_)
        self.sources = [""] * count
        self.bytes = 0

    @property
    def missing(self) -> Rows:
        return np.flatnonzero(~self.found)

    def note(self, source: str, rows: Rows, outcome: Outcome) -> None:
        """What a node had of these rows."""
        with self._lock:
            here = rows[outcome.found]
            self.corrupt[rows[outcome.corrupt]] = True
            self.corrupt[here] = False
            self.found[here] = True
            self.bytes += outcome.bytes
            for row in here.tolist():
                self.sources[row] = source


class Holders:
    """Which nodes may have which keys, as they said when they were asked."""

    def __init__(self, count: int, places: int) -> None:
        self._lock = threading.Lock()
        self._has: Bools = np.zeros((places, count), dtype=np.bool_)

    def note(self, place: int, rows: Rows, has: Bools) -> None:
        with self._lock:
            self._has[place, rows[has]] = True

    def take(self, rows: Rows) -> list[tuple[int, Rows, bool]]:
        """For each row the first place that has it; it is not named again.

        Returns: (place, its rows, whether one of them is elsewhere too).
        """
        with self._lock:
            some = rows[self._has[:, rows].any(axis=0)]
            first = self._has[:, some].argmax(axis=0)
            self._has[first, some] = False
            again = np.asarray(self._has[:, some].any(axis=0))
            return [
                (place, some[first == place], bool(again[first == place].any())) for place in np.unique(first).tolist()
            ]
