"""Who holds a run of keys, as columns: a prefix that a thousand sources hold must not cost a thousand steps. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.core.directory import Directory, Run
from kvpool.core.ids import Fidelity, KeyArray
from scheduler.core.cluster import Cluster, Source

Ints = NDArray[np.int64]

_NUMBER, _FIRST, _COUNT, _FIDELITY = range(4)


class Sources:
    """All sources by the number that the directory gives them. Derived: it can be made anew at any time."""

    def __init__(self, directory: Directory, cluster: Cluster) -> None:
        self.version = cluster.version
        self._table = directory._table  # rows of a match, without an object for each
        known = {name: source.number for name, source in directory._sources.items() if name in cluster.sources}
        size = max(known.values(), default=-1) + 1
        self.numbers = known
        self.by_number: list[Source | None] = [None] * size
        self.readable = np.zeros(size, bool)
        self.rank = np.zeros(size, np.int64)
        hosts: dict[str, int] = {}
        self.hosts = np.full(size, -1, np.int64)
        for rank, source_id in enumerate(sorted(known)):
            source, number = cluster.sources[source_id], known[source_id]
            self.by_number[number] = source
            self.readable[number] = source.readable
            self.rank[number] = rank
            self.hosts[number] = hosts.setdefault(source.attached.host_id, len(hosts))
        self.host_numbers = hosts

    def match(self, keys: KeyArray, exact: bool) -> tuple[int, Ints]:
        """Leading keys that any source holds, and runs (m, 4) of known sources: number, first, count, fidelity."""
        covered, found = self._table.match(keys)
        rows = found.astype(np.int64)
        keep = rows[:, _NUMBER] < len(self.by_number)
        if exact:
            keep &= rows[:, _FIDELITY] == Fidelity.EXACT
        return covered, rows[keep]

    def leading(self, rows: Ints) -> Ints:
        """Blocks that each source holds from the first on, by number."""
        lead = np.zeros(len(self.by_number), np.int64)
        first = rows[rows[:, _FIRST] == 0]
        lead[first[:, _NUMBER]] = first[:, _COUNT]
        later = rows[rows[:, _FIRST] > 0]
        # A source's runs touch only where their fidelity differs: hardly ever.
        touching = dict.fromkeys(later[later[:, _FIRST] <= lead[later[:, _NUMBER]]][:, _NUMBER].tolist())
        if touching:
            for number, begin, count, _ in sorted(later.tolist(), key=lambda row: row[_FIRST]):
                if number in touching and begin <= lead[number]:
                    lead[number] = max(int(lead[number]), begin + count)
        return lead

    def readable_rows(self, rows: Ints) -> Ints:
        return rows[self.readable[rows[:, _NUMBER]]]

    def furthest(self, rows: Ints, count: int) -> Ints:
        """Runs that reach furthest, ids breaking ties."""
        if len(rows) <= count:
            return rows
        ends = rows[:, _FIRST] + rows[:, _COUNT]
        order = np.lexsort((rows[:, _FIRST], self.rank[rows[:, _NUMBER]], -ends))
        return rows[order[:count]]

    def on_host(self, rows: Ints, host_id: str) -> Ints:
        number = self.host_numbers.get(host_id)
        return rows[self.hosts[rows[:, _NUMBER]] == number] if number is not None else rows[:0]

    def runs(self, rows: Ints) -> list[tuple[Source, Run]]:
        found = []
        for number, first, count, fidelity in rows.tolist():
            source = self.by_number[number]
            assert source is not None
            found.append((source, Run(source.id, source.attached.tier, first, count, Fidelity(fidelity))))
        return found
