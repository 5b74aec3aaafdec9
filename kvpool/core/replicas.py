"""Who holds which key: an array-backed table of (key, source) pairs that grows. Pure; knows no protocol, no names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ids import KEY_BYTES, KeyArray
from kvpool.core.kernels import directory as kernels

ROWS_MIN = 1024
#: Sets of holders that are remembered: a power of two, and a row to read into.
RECENT_SETS = 64 + 1


def warm_up() -> None:
    """Compiles, or loads what was compiled: not while somebody waits for a place."""
    table, keys = ReplicaTable(1 << 16), np.arange(64, dtype=np.uint8).reshape(-1, KEY_BYTES)
    for source in range(2):
        table.insert(keys, source, 1)
    many = np.arange(4 * ROWS_MIN * KEY_BYTES, dtype=np.uint32).view(np.uint8).reshape(-1, KEY_BYTES)
    table.insert(many, 0, 1)  # it grows
    table.match(keys)
    table.collect(0)
    table.remove(keys, 0)
    table.clear(1)


def _words(keys: KeyArray) -> NDArray[np.uint64]:
    """Keys as uint64 (n, 2), always read-only: kernels are then compiled for one type, and packed fields not copied."""
    words = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2).view()
    if not words.flags.aligned:
        words = words.copy()
    words.flags.writeable = False
    return words


class ReplicaTable:
    """Pairs of key and source number, each at most once. Sources are small numbers that the caller gives out.

    Heads grow to the double, rows to four times as many, of which those never used take no memory: a replica takes 46
    bytes at most when the table has just grown, and 8 more where several sources hold its key. Neither ever shrinks.
    `replicas_max` bounds the rows: beyond it pairs are refused.
    """

    def __init__(self, replicas_max: int) -> None:
        assert 0 < replicas_max < kernels.NIL
        self._replicas_max = replicas_max
        self._heads = np.zeros(2 * ROWS_MIN, np.uint32)
        self._firsts = np.full(16, -1, np.int64)
        self._counts = np.zeros(16, np.int64)
        self._meta = np.array([0, -1, 0, 0], np.int64)
        size = min(ROWS_MIN, replicas_max)
        self._set_rows(np.empty((size, kernels.ROW_WORDS), np.uint64), np.zeros(size, np.uint64))
        self._forget_recent()

    def _set_rows(self, rows: NDArray[np.uint64], sets: NDArray[np.uint64]) -> None:
        self._rows, self._sets = rows, sets
        self._links = rows.view(np.uint32)

    def _forget_recent(self) -> None:
        """Begins to remember holders anew, with room for all sources."""
        width = kernels.RECENT_FIRST + len(self._firsts)
        self._recent = np.zeros((RECENT_SETS, width), np.uint64)

    @property
    def _arrays(self) -> tuple[Any, ...]:
        """What every change is about, in the order in which kernels take it."""
        return self._rows, self._links, self._sets, self._heads, self._firsts, self._counts, self._meta

    @property
    def replicas(self) -> int:
        return int(self._meta[kernels.REPLICAS])

    @property
    def distinct(self) -> int:
        return int(self._meta[kernels.DISTINCT])

    @property
    def bytes_allocated(self) -> int:
        """Bytes of memory in use: of rows those that were ever used."""
        rows = int(self._meta[kernels.USED]) * (kernels.ROW_WORDS + 1) * self._rows.itemsize
        return rows + self._recent.nbytes + self._heads.nbytes + self._firsts.nbytes + self._counts.nbytes

    def count(self, source: int) -> int:
        """Keys that a source holds."""
        return int(self._counts[source]) if source < len(self._counts) else 0

    def insert(self, keys: KeyArray, source: int, fidelity: int) -> int:
        """Records that a source holds keys; one held before takes the new fidelity. Returns how many were refused."""
        while source >= len(self._firsts):
            self._firsts = np.concatenate([self._firsts, np.full(len(self._firsts), -1, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(len(self._counts), np.int64)])
            self._forget_recent()
        words = _words(keys)
        done = 0
        while True:
            done = kernels.replicas_insert(*self._arrays, words, done, source, int(fidelity))
            if done == len(words) or not self._grow():
                return len(words) - int(done)

    def _grow(self) -> bool:
        """Makes room for at least one more pair. False at the bound."""
        if (self.distinct + 1) * kernels.LOAD_DENOMINATOR > len(self._heads) * kernels.LOAD_NUMERATOR:
            heads = np.zeros(len(self._heads) * 2, np.uint32)
            kernels.heads_rehash(self._rows, self._heads, heads)
            self._heads = heads
        if self.replicas < len(self._rows):
            return True
        if len(self._rows) >= self._replicas_max:
            return False
        size = min(len(self._rows) * 4, self._replicas_max)
        # Not to be filled with anything: the system gives memory to what is written.
        rows, sets = np.empty((size, kernels.ROW_WORDS), np.uint64), np.zeros(size, np.uint64)
        rows[: len(self._rows)] = self._rows
        shared = np.flatnonzero(self._sets)
        sets[shared] = self._sets[shared]
        self._set_rows(rows, sets)
        return True

    def remove(self, keys: KeyArray, source: int) -> int:
        """Forgets keys of a source; those it does not hold are passed over. Returns how many it held."""
        if not self.count(source):
            return 0
        return int(kernels.replicas_remove(*self._arrays, _words(keys), source))

    def clear(self, source: int) -> int:
        """Forgets all of a source. Returns how many keys that were. Cost: O(its keys and their other replicas)."""
        if not self.count(source):
            return 0
        return int(kernels.replicas_clear(*self._arrays, source))

    def collect(self, source: int) -> tuple[KeyArray, NDArray[np.uint8]]:
        """A source's keys (n, 16) and their fidelities (n), in no order that means anything."""
        count = self.count(source)
        words = np.empty((count, 2), np.uint64)
        fidelities = np.empty(count, np.uint8)
        if count:
            kernels.replicas_collect(self._rows, self._links, self._firsts, source, words, fidelities)
        return words.view(np.uint8).reshape(-1, KEY_BYTES), fidelities

    def match(self, keys: KeyArray) -> tuple[int, NDArray[np.int32]]:
        """Leading keys that any source holds, and runs (m, 4) among them: source, first, count, fidelity.

        Holders are read where they are others than those of the key before, and many of them only once: what is
        remembered of them changes no answer.
        """
        covered, runs = kernels.replicas_match(
            self._rows, self._links, self._sets, self._heads, len(self._firsts), self._recent, _words(keys)
        )
        return int(covered), runs

    def check_invariants(self) -> None:
        """Raises: AssertionError at the first rule that does not hold. Cost: O(rows)."""
        used, free, replicas, distinct = (int(v) for v in self._meta)
        links, nil = self._links[:used], kernels.NIL
        owners = links[:, kernels.OWNER]
        live = owners != nil
        assert int(live.sum()) == replicas == int(self._counts.sum()) <= self._replicas_max
        free_rows = 0
        while free >= 0:
            assert owners[free] == nil, "a row is both free and used"
            following = int(links[free, kernels.NEXT])
            free, free_rows = (-1 if following == nil else following), free_rows + 1
        assert free_rows == used - replicas, "rows were lost"
        self._check_heads(distinct, replicas)
        self._check_lists(live)

    def _check_heads(self, distinct: int, replicas: int) -> None:
        """Each key has one head, found where a search looks, and its chain holds each source once."""
        heads = self._heads[self._heads > 0].astype(np.int64) - 1
        assert len(heads) == distinct
        found = np.empty(distinct, np.int64)
        kernels.replicas_find(self._rows, self._heads, np.ascontiguousarray(self._rows[heads, :2]), found)
        assert np.array_equal(found, heads), "a head is not found by its key"
        rows, reached = heads, 0
        sets, places = np.zeros(distinct, np.uint64), np.arange(distinct)
        pairs: list[NDArray[np.uint64]] = []
        while len(rows):
            sources = self._links[rows, kernels.OWNER] // kernels.FIDELITIES
            sets[places] ^= kernels.marks_of(self._links[rows, kernels.OWNER])
            pairs.append(np.column_stack([self._rows[rows, :2], sources.astype(np.uint64)]))
            reached += len(rows)
            assert reached <= replicas, "a chain does not end"
            following = self._links[rows, kernels.NEXT]
            linked = following != kernels.NIL
            assert np.array_equal(self._rows[rows[linked], :2], self._rows[following[linked], :2])
            rows, places = following[linked].astype(np.int64), places[linked]
        assert reached == replicas, "a replica is in no chain"
        several = self._links[heads, kernels.NEXT] != kernels.NIL
        assert np.array_equal(self._sets[heads[several]], sets[several]), "a key's holders have another number"
        if pairs:
            assert len(np.unique(np.concatenate(pairs), axis=0)) == replicas, "a source holds a key twice"

    def _check_lists(self, live: NDArray[np.bool_]) -> None:
        """Each replica is in its source's list."""
        rows = np.flatnonzero(live)
        sources = self._links[rows, kernels.OWNER] // kernels.FIDELITIES
        held = np.bincount(sources, minlength=len(self._counts))
        assert np.array_equal(held, self._counts)
        after = self._links[rows, kernels.AFTER]
        linked = after != kernels.NIL
        assert np.array_equal(self._links[after[linked], kernels.BEFORE], rows[linked])
        assert np.array_equal(self._links[after[linked], kernels.OWNER] // kernels.FIDELITIES, sources[linked])
        firsts = self._firsts[self._firsts >= 0]
        assert np.array_equal(np.sort(firsts), rows[self._links[rows, kernels.BEFORE] == kernels.NIL])
        for source in np.flatnonzero(held).tolist():
            words, fidelities = np.empty((held[source] + 1, 2), np.uint64), np.empty(held[source] + 1, np.uint8)
            count = kernels.replicas_collect(self._rows, self._links, self._firsts, source, words, fidelities)
            assert count == held[source], "a source's list does not hold all its replicas"
