"""Who holds a run of keys, as columns: a prefix that a thousand sources hold must not cost a thousand steps. Pure."""

from __future__ import annotations

import numpy as np

from kvpool.core.directory import Directory, Run
from kvpool.core.ids import Fidelity, KeyArray
from scheduler.core import covering
from scheduler.core.cluster import Cluster, Source
from scheduler.core.covering import Ints, Runs

_ANY_FIDELITY = 255
#: Runs that are kept as objects; beyond it all are made anew.
RUNS_KEPT_MAX = 4096
#: To look one up takes a third of calling the enumeration.
_FIDELITIES = {int(fidelity): fidelity for fidelity in Fidelity}


class Sources:
    """All sources by the number that the directory gives them. Derived: it can be made anew at any time."""

    def __init__(self, directory: Directory, cluster: Cluster) -> None:
        self.version = cluster.version
        self._directory = directory
        numbers = {name: directory.number_of(name) for name in cluster.sources}
        known = {name: number for name, number in numbers.items() if number is not None}
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
        self._runs: dict[tuple[int, ...], tuple[Source, Run]] = {}

    def match(self, keys: KeyArray, exact: bool) -> tuple[int, Ints, Runs]:
        """Leading keys that any source holds, those that each holds from the first on, and runs that may be read.

        Returns: a count; int64 (sources + 1), the last of nobody; int32 (runs, 4), see `covering`.
        """
        covered, rows = self._directory.match_rows(keys)
        lead = np.zeros(len(self.by_number) + 1, np.int64)
        fidelity_max = int(Fidelity.EXACT) if exact else _ANY_FIDELITY
        readable, touching = covering.sort_out(rows, self.readable, fidelity_max, lead[:-1])
        if touching:
            _join(rows[rows[:, covering.FIDELITY] <= fidelity_max], lead[:-1])
        return covered, lead, readable

    def furthest(self, rows: Runs, count: int) -> list[tuple[Source, Run]]:
        """Runs that reach furthest; ids break ties."""
        return self.runs(covering.furthest(rows, self.rank, count))

    def furthest_by_host(self, rows: Runs, count: int) -> tuple[Runs, list[int], list[int]]:
        """The same of the sources of each host, by its number: of host h from row h * count on, how many, to where."""
        best, found = covering.furthest_by_host(rows, self.rank, self.hosts, len(self.host_numbers), count)
        counts, ends = found.tolist()
        return best, counts, ends

    def runs(self, rows: Runs) -> list[tuple[Source, Run]]:
        found = []
        for row in map(tuple, rows.tolist()):
            known = self._runs.get(row)
            found.append(self._made(row) if known is None else known)
        return found

    def _made(self, row: tuple[int, ...]) -> tuple[Source, Run]:
        """Makes and keeps a run: the same few of a shared prefix come with each request."""
        number, first, count, fidelity = row
        source = self.by_number[number]
        assert source is not None
        if len(self._runs) >= RUNS_KEPT_MAX:
            self._runs.clear()
        run = Run(source.id, source.attached.tier, first, count, _FIDELITIES[fidelity])
        self._runs[row] = source, run
        return source, run


def _join(rows: Runs, lead: Ints) -> None:
    """Makes `lead` longer by runs that touch it. A source's runs touch where their fidelity differs: hardly ever."""
    for number, first, count, _ in sorted(rows.tolist(), key=lambda row: int(row[covering.FIRST])):
        if number < len(lead) and first <= lead[number]:
            lead[number] = max(int(lead[number]), first + count)
