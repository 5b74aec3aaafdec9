"""The index of one source: keys to entries, with entries handed out and taken back.

The arrays outlive the process. Statements stand in the order that lets a process which is killed after any of them be
followed by another one (`adoption`): an entry's fields are complete before its state says that it is used, its state
says so before its slot is named to anybody, and READABLE with an even generation is only what was committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import TABLE_VERSION, Descriptors, EntryState, SourceArrays
from kvpool.core.ids import KEY_BYTES, Fidelity, KeyArray
from kvpool.core.kernels.entries import order_stores, table_insert, table_lookup, table_rebuild, table_remove

#: Stands in arrays of entries where a key has none.
NO_ENTRY: Final = -1

Entries = NDArray[np.int32]


def key_words(keys: KeyArray) -> NDArray[np.uint64]:
    """Keys as uint64 (n, 2)."""
    return np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)


def split_keys(keys: KeyArray) -> list[bytes]:
    """Keys as bytes objects, for dictionaries."""
    packed = keys.tobytes()
    return [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]


def first_of_each(keys: KeyArray, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of `rows` the first of them with the same key; int64, beside `rows`."""
    # Half a key tells most lists of hashes apart, and no list that holds a key twice.
    if len(np.unique(key_words(keys[rows])[:, 0])) == len(rows):
        return rows
    seen: dict[bytes, int] = {}
    firsts = (seen.setdefault(key, row) for row, key in zip(rows.tolist(), split_keys(keys[rows]), strict=True))
    return np.fromiter(firsts, dtype=np.int64, count=len(rows))


@dataclass(frozen=True, slots=True, eq=False)
class NewEntries:
    """What is known of blocks before they are written; arrays have a row a block.

    keys uint8 (n, 16), distinct; offsets int64 (n); sizes uint64 (n), payload bytes; name_bytes uint16 (n).
    """

    keys: KeyArray
    offsets: NDArray[np.int64]
    sizes: NDArray[np.uint64]
    name_bytes: NDArray[np.uint16]
    namespace: int
    tenant: int
    fidelity: Fidelity
    section_count: int


class BlockIndex:
    """Which entry holds which key. One writer; readers in other processes follow the rules of `arrays`."""

    def __init__(self, arrays: SourceArrays) -> None:
        self.arrays = arrays
        free = np.flatnonzero(arrays.states == EntryState.FREE).astype(np.int32)
        self._free: Entries = np.zeros(arrays.entries, dtype=np.int32)
        self._free_count = len(free)
        # Low entries first.
        self._free[: len(free)] = free[::-1]
        self._counts = np.bincount(arrays.states, minlength=len(EntryState)).astype(np.int64)

    @property
    def free_count(self) -> int:
        return self._free_count

    def count(self, state: EntryState) -> int:
        """Entries in a state."""
        return int(self._counts[state])

    def lookup(self, keys: KeyArray) -> Entries:
        """Entry of each key, or NO_ENTRY. Changes nothing."""
        out = np.empty(len(keys), dtype=np.int32)
        table_lookup(key_words(keys), self.arrays.buckets, self.arrays.keys, out)
        return out

    def insert(self, new: NewEntries) -> Entries:
        """New entries in state WRITING for keys that are not there; their generations become odd.

        The caller has made sure that there are as many free entries.
        """
        count = len(new.keys)
        assert count <= self._free_count, "no free entry"
        entries = self._free[self._free_count - count : self._free_count][::-1].copy()
        self._free_count -= count
        arrays = self.arrays
        arrays.generations[entries] |= np.uint32(1)
        order_stores()
        arrays.keys[entries] = key_words(new.keys)
        arrays.offsets[entries] = new.offsets
        arrays.sizes[entries] = new.sizes
        arrays.name_bytes[entries] = new.name_bytes
        arrays.namespaces[entries] = new.namespace
        arrays.tenants[entries] = new.tenant
        arrays.fidelities[entries] = new.fidelity
        arrays.section_counts[entries] = new.section_count
        arrays.digests[entries] = 0
        arrays.touches[entries] = 0
        self._turn(entries, EntryState.FREE, EntryState.WRITING)
        table_insert(entries, arrays.header, arrays.buckets, arrays.keys)
        return entries

    def publish(self, entries: Entries) -> None:
        """Makes completely written entries readable: their generations become even."""
        order_stores()
        self._turn(entries, EntryState.WRITING, EntryState.READABLE)
        order_stores()
        self.arrays.generations[entries] += np.uint32(1)

    def quarantine(self, entries: Entries) -> None:
        """Makes entries that were never completed unfindable; they keep their slots until `free`."""
        self._turn(entries, EntryState.WRITING, EntryState.QUARANTINED)
        self._unlink(entries)

    def discard(self, entries: Entries) -> None:
        """Makes entries that were never completed, and whose writer has stopped, unfindable; to be freed."""
        self._unlink(entries)
        self._turn(entries, EntryState.WRITING, EntryState.DOOMED)

    def doom(self, entries: Entries) -> None:
        """Entries in quarantine whose writer has stopped stay allocated for their readers until `free`."""
        self._turn(entries, EntryState.QUARANTINED, EntryState.DOOMED)

    def unlink(self, entries: Entries) -> None:
        """Makes readable entries unfindable, in state DOOMED; they stay allocated until `free`."""
        self.arrays.generations[entries] |= np.uint32(1)
        order_stores()
        self._unlink(entries)
        self._turn(entries, EntryState.READABLE, EntryState.DOOMED)

    def free(self, entries: Entries) -> None:
        """Takes doomed or quarantined entries back. Their next use has another generation."""
        doomed = self.arrays.states[entries] == EntryState.DOOMED
        self._turn(entries[doomed], EntryState.DOOMED, EntryState.FREE)
        self._turn(entries[~doomed], EntryState.QUARANTINED, EntryState.FREE)
        self.arrays.generations[entries] += np.uint32(1)
        count = len(entries)
        self._free[self._free_count : self._free_count + count] = entries
        self._free_count += count

    def relink(self) -> None:
        """Makes the table anew from the readable entries; none is being written."""
        arrays = self.arrays
        readable = np.flatnonzero(arrays.states == EntryState.READABLE).astype(np.int32)
        table_rebuild(readable, arrays.header, arrays.buckets, arrays.keys)

    def describe(self, entries: Entries, sections: int | None = None) -> Descriptors:
        """Where entries lie; digests of the first `sections` sections."""
        arrays = self.arrays
        return Descriptors(
            self.key_array(entries),
            arrays.offsets[entries],
            arrays.sizes[entries],
            arrays.generations[entries],
            arrays.digests[entries][:, : arrays.sections if sections is None else sections],
        )

    def key_array(self, entries: Entries) -> KeyArray:
        """Keys of entries; uint8 (n, 16)."""
        return self.arrays.keys[entries].view(np.uint8).reshape(-1, KEY_BYTES)

    def keys_of(self, entries: Entries) -> list[bytes]:
        return split_keys(self.key_array(entries))

    def check_invariants(self) -> None:
        arrays = self.arrays
        assert (np.bincount(arrays.states, minlength=len(EntryState)) == self._counts).all()
        used = np.flatnonzero(arrays.states != EntryState.FREE).astype(np.int32)
        linked = used[np.isin(arrays.states[used], (EntryState.WRITING, EntryState.READABLE))]
        assert len(used) + self._free_count == arrays.entries
        assert np.count_nonzero(arrays.buckets) == len(linked)
        assert (self.lookup(self.key_array(linked)) == linked).all()
        odd = (arrays.generations & np.uint32(1)).astype(bool)
        assert (odd == ~np.isin(arrays.states, (EntryState.FREE, EntryState.READABLE))).all()
        assert arrays.header[TABLE_VERSION] % np.uint64(2) == 0
        free = self._free[: self._free_count]
        assert len(np.unique(free)) == len(free)
        assert (arrays.states[free] == EntryState.FREE).all()

    # ---------------------------------------------------------------- parts

    def _unlink(self, entries: Entries) -> None:
        table_remove(entries, self.arrays.header, self.arrays.buckets, self.arrays.keys)

    def _turn(self, entries: Entries, before: EntryState, after: EntryState) -> None:
        assert (self.arrays.states[entries] == before).all(), f"entries that are not {before.name}"
        self.arrays.states[entries] = after
        self._counts[before] -= len(entries)
        self._counts[after] += len(entries)
