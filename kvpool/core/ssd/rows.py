"""Index of the log: one row of arrays for each record on disk, a table from keys to their newest rows.

The newest record of a key is its *head*, in the table. Older data records that are still on disk are *stale*: they
wait for their segment to go, and until then the head, whatever it is, must not go without something newer in its place:
the log would bring the stale one back at the next start. A head counts its stale records. An older tombstone is
obsolete at once: as a head it would do no harm. A record that a footer calls LOST counts as data: should the footer go,
it may be read again.

A key's head keeps its row for as long as the key is there, so that a listing in row order misses nothing.
Bytes of memory a record: 54 in the rows, 8 to 16 in the table.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import TABLE_VERSION
from kvpool.core.ids import KEY_BYTES, KeyArray
from kvpool.core.index import key_words
from kvpool.core.kernels.entries import table_insert, table_lookup, table_remove
from kvpool.core.ssd.format import UNIT_BYTES, FooterEntries, RecordKind, record_bytes_of

Rows = NDArray[np.int32]
NO_ROW: Final = -1


class RowState(IntEnum):
    """What a row is. The first three after FREE are heads."""

    FREE = 0
    LIVE = 1
    TOMBSTONE = 2  # removed; stale records remain
    LOST = 3  # did not verify once, is on its way out, or was not removed durably: absent, but hides stale records
    STALE = 4
    OBSOLETE = 5  # a tombstone that hides nothing any more, or not by itself; in no table


_COLUMNS: Final[tuple[tuple[str, type[np.generic]], ...]] = (
    ("sequences", np.uint64),
    ("sizes", np.uint64),
    ("segments", np.uint32),
    ("units", np.uint32),  # place in the segment, in UNIT_BYTES
    ("stale", np.uint32),
    ("namespaces", np.uint16),
    ("name_bytes", np.uint16),
    ("kinds", np.uint8),
    ("states", np.uint8),
    ("fidelities", np.uint8),
    ("section_counts", np.uint8),
    ("touches", np.uint8),
)
_HEAD_STATES: Final = {
    RecordKind.DATA: RowState.LIVE,
    RecordKind.TOMBSTONE: RowState.TOMBSTONE,
    RecordKind.LOST: RowState.LOST,
}
_ROWS_MIN: Final = 1024


class LogRows:
    """The arrays. At most `rows_max` records; the caller checks `free_count` before it adds."""

    sequences: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    segments: NDArray[np.uint32]
    units: NDArray[np.uint32]
    stale: NDArray[np.uint32]
    namespaces: NDArray[np.uint16]
    name_bytes: NDArray[np.uint16]
    kinds: NDArray[np.uint8]
    states: NDArray[np.uint8]
    fidelities: NDArray[np.uint8]
    section_counts: NDArray[np.uint8]
    touches: NDArray[np.uint8]

    def __init__(self, rows_max: int) -> None:
        self.rows_max = rows_max
        self.keys: NDArray[np.uint64] = np.zeros((0, 2), np.uint64)
        for name, dtype in _COLUMNS:
            setattr(self, name, np.zeros(0, dtype))
        self._free: Rows = np.zeros(0, np.int32)
        self._free_count = 0
        self._buckets: NDArray[np.uint32] = np.zeros(16, np.uint32)
        # The table's kernels keep a version there for readers in other processes; this table has none.
        self._header: NDArray[np.uint64] = np.zeros(TABLE_VERSION + 1, np.uint64)
        self._grow(min(_ROWS_MIN, rows_max))

    # ------------------------------------------------------------ questions

    @property
    def count(self) -> int:
        """Records on disk, of any state."""
        return len(self.states) - self._free_count

    @property
    def free_count(self) -> int:
        return self.rows_max - self.count

    def heads(self, keys: KeyArray) -> Rows:
        """Row of each key's newest record, whatever it says, or NO_ROW."""
        out = np.empty(len(keys), np.int32)
        # Owned memory, so that the kernel is compiled for one type.
        table_lookup(key_words(keys).copy(), self._buckets, self.keys, out)
        return out

    def live(self, keys: KeyArray) -> Rows:
        """Row of each readable key, or NO_ROW."""
        rows = self.heads(keys)
        rows[self.states[rows] != RowState.LIVE] = NO_ROW
        return rows

    def undead(self, keys: KeyArray) -> Rows:
        """Row of each key whose record can't be read, but may be on disk as it was written; or NO_ROW.

        At most a footer says that it is lost: a later start may find it readable.
        """
        rows = self.heads(keys)
        rows[self.states[rows] != RowState.LOST] = NO_ROW
        return rows

    def in_segment(self, number: int) -> Rows:
        """Rows of all records in a segment, in no particular order."""
        rows = np.flatnonzero(self.segments == number)
        return rows[self.states[rows] != RowState.FREE].astype(np.int32)

    def record_bytes(self, rows: Rows) -> NDArray[np.int64]:
        return record_bytes_of(self.sizes[rows], self.name_bytes[rows])

    def key_bytes(self, rows: Rows) -> KeyArray:
        return self.keys[rows].view(np.uint8).reshape(-1, KEY_BYTES)

    def offsets(self, rows: Rows) -> NDArray[np.int64]:
        """Where records begin, bytes from their segment's start."""
        return self.units[rows].astype(np.int64) * UNIT_BYTES

    # ------------------------------------------------------------ changes

    def put(
        self, entries: FooterEntries, number: int, namespaces: NDArray[np.uint16]
    ) -> tuple[Rows, Rows, NDArray[np.uint8]]:
        """Records that are now the newest of their distinct keys.

        Args:
            entries: as in a footer, kinds DATA or TOMBSTONE; a tombstone only for a key that has a head.
        Returns: heads, one an entry; rows that now hold what the known ones among the keys were before, and the states
            that these had.
        """
        keys = np.ascontiguousarray(entries["key"])
        heads = self.heads(keys)
        known = heads != NO_ROW
        fresh = self._allocate(len(entries))
        old, copies, created = heads[known], fresh[known], fresh[~known]
        before = self.states[old].copy()
        if len(old):
            self._set_aside(old, copies)
        heads[~known] = created
        self.keys[created] = key_words(keys[~known])
        self.stale[created] = 0
        self._write(heads, entries, number, namespaces)
        self.states[heads] = np.where(entries["kind"] == RecordKind.DATA, RowState.LIVE, RowState.TOMBSTONE)
        self.touches[heads] = 0
        table_insert(created, self._header, self._buckets, self.keys)
        self._drop_idle(heads)
        return heads, copies, before

    def _set_aside(self, heads: Rows, copies: Rows) -> None:
        """Makes stale copies of heads that something newer is about to replace; their tombstones hide nothing then."""
        self.keys[copies] = self.keys[heads]
        for name, _ in _COLUMNS:
            column = getattr(self, name)
            column[copies] = column[heads]
        data = self.kinds[heads] != RecordKind.TOMBSTONE
        self.states[copies] = np.where(data, RowState.STALE, RowState.OBSOLETE)
        self.stale[copies] = 0
        self.stale[heads] += data.astype(np.uint32)

    def lose(self, heads: Rows) -> None:
        """Makes live heads unreadable without a tombstone on disk."""
        assert (self.states[heads] == RowState.LIVE).all()
        self.states[heads] = RowState.LOST

    def drop(self, rows: Rows) -> Rows:
        """Forgets the records of a segment that is gone. Heads among them must hide nothing outside of it.

        Returns: tombstones elsewhere that hid some of these and now hide nothing: OBSOLETE.
        """
        states = self.states[rows]
        stale = rows[states == RowState.STALE]
        owners = self.heads(self.key_bytes(stale))
        assert (owners != NO_ROW).all(), "a stale record without a newer one"
        np.subtract.at(self.stale, owners, np.uint32(1))
        heads = rows[(states >= RowState.LIVE) & (states <= RowState.LOST)]
        assert not self.stale[heads].any(), "a record would come back at the next start"
        table_remove(heads, self._header, self._buckets, self.keys)
        self.states[rows] = RowState.FREE
        self._release(rows)
        owners = np.unique(owners)
        return self._drop_idle(owners[self.states[owners] != RowState.FREE])

    def rebuild(self, entries: FooterEntries, segments: NDArray[np.uint32], namespaces: NDArray[np.uint16]) -> None:
        """Fills the empty index with all records found on disk; the highest sequence of a key is its head.

        Args:
            entries: in any order; segments: uint32 (n), the segment of each.
        """
        assert self.count == 0
        words = key_words(np.ascontiguousarray(entries["key"]))
        order = np.lexsort((entries["sequence"], words[:, 0], words[:, 1]))
        last = np.ones(len(order), np.bool_)
        last[:-1] = (words[order][1:] != words[order][:-1]).any(axis=1)
        group = np.concatenate((np.zeros(1, np.int64), np.cumsum(last)))[: len(order)]
        rows = self._allocate(len(entries))
        self.keys[rows] = words
        self._write(rows, entries, segments, namespaces)
        self.touches[rows] = 0
        self.stale[rows] = 0
        placed = rows[order]
        older_data = (self.kinds[placed] != RecordKind.TOMBSTONE) & ~last
        self.states[placed] = np.where(older_data, RowState.STALE, RowState.OBSOLETE)
        heads = placed[last]
        self.stale[heads] = np.bincount(group[older_data], minlength=len(heads)).astype(np.uint32)
        for kind, state in _HEAD_STATES.items():
            self.states[heads[self.kinds[heads] == kind]] = state
        table_insert(heads, self._header, self._buckets, self.keys)
        self._drop_idle(heads)

    def _write(
        self, rows: Rows, entries: FooterEntries, segments: int | NDArray[np.uint32], namespaces: NDArray[np.uint16]
    ) -> None:
        self.sequences[rows] = entries["sequence"]
        self.sizes[rows] = entries["size"]
        self.segments[rows] = segments
        self.units[rows] = (entries["position"] // np.uint64(UNIT_BYTES)).astype(np.uint32)
        self.namespaces[rows] = namespaces
        self.name_bytes[rows] = entries["name_bytes"]
        self.kinds[rows] = entries["kind"]
        self.fidelities[rows] = entries["fidelity"]
        self.section_counts[rows] = entries["section_count"]

    def _drop_idle(self, heads: Rows) -> Rows:
        """Takes tombstones out of the table that hide nothing."""
        idle = heads[(self.kinds[heads] == RecordKind.TOMBSTONE) & (self.stale[heads] == 0)]
        table_remove(idle, self._header, self._buckets, self.keys)
        self.states[idle] = RowState.OBSOLETE
        return idle

    # ------------------------------------------------------------ memory

    def _allocate(self, count: int) -> Rows:
        assert count <= self.free_count, "the caller has not made room"
        while self._free_count < count:
            self._grow(min(self.rows_max, 2 * len(self.states)))
        rows = self._free[self._free_count - count : self._free_count][::-1].copy()
        self._free_count -= count
        return rows

    def _release(self, rows: Rows) -> None:
        self._free[self._free_count : self._free_count + len(rows)] = rows
        self._free_count += len(rows)

    def _grow(self, rows: int) -> None:
        before = len(self.states)
        assert rows > before
        self.keys = np.concatenate((self.keys, np.zeros((rows - before, 2), np.uint64)))
        for name, dtype in _COLUMNS:
            setattr(self, name, np.concatenate((getattr(self, name), np.zeros(rows - before, dtype))))
        free = np.empty(rows, np.int32)
        free[: rows - before] = np.arange(rows - 1, before - 1, -1, dtype=np.int32)
        # Low rows on top of the stack.
        free[rows - before : rows - before + self._free_count] = self._free[: self._free_count]
        self._free, self._free_count = free, rows - before + self._free_count
        self._buckets = np.zeros(max(16, 1 << (2 * rows - 1).bit_length()), np.uint32)
        heads = np.flatnonzero((self.states >= RowState.LIVE) & (self.states <= RowState.LOST)).astype(np.int32)
        table_insert(heads, self._header, self._buckets, self.keys)

    @property
    def memory_bytes(self) -> int:
        """Private memory of the index."""
        columns = sum(getattr(self, name).nbytes for name, _ in _COLUMNS)
        return int(columns + self.keys.nbytes + self._buckets.nbytes + self._free.nbytes)

    def check_invariants(self) -> None:
        used = np.flatnonzero(self.states != RowState.FREE).astype(np.int32)
        assert len(used) + self._free_count == len(self.states) <= self.rows_max
        heads = used[(self.states[used] >= RowState.LIVE) & (self.states[used] <= RowState.LOST)]
        assert np.count_nonzero(self._buckets) == len(heads)
        assert (self.heads(self.key_bytes(heads)) == heads).all()
        stale = used[self.states[used] == RowState.STALE]
        owners = self.heads(self.key_bytes(stale))
        assert (owners != NO_ROW).all()
        counts = np.bincount(owners, minlength=len(self.states)).astype(np.uint32)
        assert (counts[heads] == self.stale[heads]).all()
        assert (self.sequences[stale] < self.sequences[owners]).all()
        assert (self.stale[heads[self.kinds[heads] == RecordKind.TOMBSTONE]] > 0).all()
        assert (self.kinds[stale] != RecordKind.TOMBSTONE).all()
        free = self._free[: self._free_count]
        assert len(np.unique(free)) == len(free)
        assert (self.states[free] == RowState.FREE).all()
