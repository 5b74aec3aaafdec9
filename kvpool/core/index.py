"""The index of one source: keys to entries, with entries handed out and taken back."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors, EntryState, SourceArrays
from kvpool.core.ids import KEY_BYTES, KeyArray
from kvpool.core.kernels.entries import table_insert, table_lookup, table_remove

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


def first_of_each(keys: KeyArray, rows: NDArray[np.int64]) -> dict[int, int]:
    """For each of `rows` the first of them with the same key."""
    seen: dict[bytes, int] = {}
    return {row: seen.setdefault(key, row) for row, key in zip(rows.tolist(), split_keys(keys[rows]), strict=True)}


class BlockIndex:
    """Which entry holds which key. One writer; readers in other processes follow the rules of `arrays`."""

    def __init__(self, arrays: SourceArrays) -> None:
        self.arrays = arrays
        free = np.flatnonzero(arrays.states == EntryState.FREE).astype(np.int32)
        self._free: Entries = np.empty(arrays.entries, dtype=np.int32)
        self._free_count = len(free)
        # Low entries first.
        self._free[: len(free)] = free[::-1]

    @property
    def free_count(self) -> int:
        return self._free_count

    def lookup(self, keys: KeyArray) -> Entries:
        """Entry of each key, or NO_ENTRY. Changes nothing."""
        out = np.empty(len(keys), dtype=np.int32)
        table_lookup(key_words(keys), self.arrays.buckets, self.arrays.keys, out)
        return out

    def insert(self, keys: KeyArray) -> Entries:
        """New entries in state WRITING for distinct keys that are not there; their generations become odd.

        The caller has made sure that there are as many free entries.
        """
        count = len(keys)
        assert count <= self._free_count, "no free entry"
        entries = self._free[self._free_count - count : self._free_count][::-1].copy()
        self._free_count -= count
        arrays = self.arrays
        arrays.generations[entries] |= np.uint32(1)
        arrays.keys[entries] = key_words(keys)
        arrays.states[entries] = EntryState.WRITING
        arrays.digests[entries] = 0
        table_insert(entries, arrays.buckets, arrays.keys)
        return entries

    def publish(self, entries: Entries) -> None:
        """Makes completely written entries readable: their generations become even."""
        self.arrays.states[entries] = EntryState.READABLE
        self.arrays.generations[entries] += np.uint32(1)

    def unlink(self, entries: Entries) -> None:
        """Makes entries unfindable, in state DOOMED; they stay allocated until `free`."""
        arrays = self.arrays
        arrays.generations[entries] |= np.uint32(1)
        table_remove(entries, arrays.buckets, arrays.keys)
        arrays.states[entries] = EntryState.DOOMED

    def free(self, entries: Entries) -> None:
        """Takes unlinked entries back. Their next use has another generation."""
        assert (self.arrays.states[entries] == EntryState.DOOMED).all()
        self.arrays.states[entries] = EntryState.FREE
        self.arrays.generations[entries] += np.uint32(1)
        count = len(entries)
        self._free[self._free_count : self._free_count + count] = entries
        self._free_count += count

    def describe(self, entries: Entries, sections: int | None = None) -> Descriptors:
        """Where entries lie; digests of the first `sections` sections."""
        arrays = self.arrays
        return Descriptors(
            arrays.keys[entries].view(np.uint8).reshape(-1, 16),
            arrays.offsets[entries],
            arrays.sizes[entries],
            arrays.generations[entries],
            arrays.digests[entries][:, : arrays.sections if sections is None else sections],
        )

    def keys_of(self, entries: Entries) -> list[bytes]:
        return split_keys(self.arrays.keys[entries].view(np.uint8).reshape(-1, KEY_BYTES))

    def check_invariants(self) -> None:
        arrays = self.arrays
        used = np.flatnonzero(arrays.states != EntryState.FREE).astype(np.int32)
        linked = used[arrays.states[used] != EntryState.DOOMED]
        assert len(used) + self._free_count == arrays.entries
        assert np.count_nonzero(arrays.buckets) == len(linked)
        assert (self.lookup(arrays.keys[linked].view(np.uint8).reshape(-1, 16)) == linked).all()
        odd = (arrays.generations & np.uint32(1)).astype(bool)
        assert (odd == np.isin(arrays.states, (EntryState.WRITING, EntryState.DOOMED))).all()
        free = self._free[: self._free_count]
        assert len(np.unique(free)) == len(free)
        assert (arrays.states[free] == EntryState.FREE).all()
