"""Never strands a suffix: only blocks without a resident child go, the least valuable first.

The value of a leaf is its last use plus what its earlier uses are worth, times its weight over the mean weight:
GreedyDual with the number of uses as its clock, so that whole spans may be evicted out of turn without stopping its
ageing. Uses (1..15) are halved for each period without one. Of what is used together the tail goes first; a parent is
a candidate when its last child is gone.

Private memory: 24 bytes an entry, and a little for each class in use.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.evictors.base import CLASSES_MAX, Mask, Ranks, as_entries, period_of
from kvpool.core.index import Entries
from kvpool.core.kernels import prefixes as kernels
from kvpool.core.kernels.evictors import CLASS_MASK, HIDDEN

#: Where the clock starts again after it has passed CLOCK_MAX; what is older than that is all the same age.
_CLOCK_AFTER: Final = 1 << 29


class Prefix:
    """Leaves of the tree of prefixes, in a heap for each class."""

    name = "prefix"

    def __init__(self, entries_max: int, classes: int) -> None:
        assert 0 < entries_max < _CLOCK_AFTER and 0 < classes <= CLASSES_MAX
        self._entries_max, self._classes = entries_max, classes
        self._period = period_of(1, 0)
        self._place = np.full(entries_max, kernels.LEAF_OUTSIDE, dtype=np.int32)
        self._keys = np.zeros(entries_max, dtype=np.uint32)
        self._parents = np.full(entries_max, kernels.NO_PARENT, dtype=np.int32)
        self._births = np.zeros(entries_max, dtype=np.uint32)
        self._weights = np.zeros(entries_max, dtype=np.uint8)
        self._state = np.full(entries_max, -1, dtype=np.int16)
        self._heaps = np.zeros(0, dtype=np.int32)
        self._table = np.zeros((4, classes), dtype=np.int64)
        self._scalars = np.zeros(2, dtype=np.int64)

    def insert(
        self,
        entries: Entries,
        slot_classes: NDArray[np.int32],
        parents: NDArray[np.int32],
        weights: NDArray[np.uint32],
        fingerprints: NDArray[np.uint64],
    ) -> None:
        entries, classes = as_entries(entries), as_entries(slot_classes)
        assert len(classes) == len(entries) and (classes < self._classes).all()
        self._rebase_before(len(entries))
        self._adapt_period(int(self._table[kernels.RESIDENTS].sum()) + len(entries))
        self._table[kernels.RESIDENTS] += np.bincount(classes, minlength=self._classes)
        if (self._table[kernels.RESIDENTS] > self._table[kernels.ROOM]).any():
            self._make_room()
        done = kernels.prefix_insert(
            entries, classes, as_entries(parents), np.ascontiguousarray(weights, dtype=np.uint32), self._period,
            self._place, self._keys, self._parents, self._births, self._weights, self._state, self._heaps, self._table,
            self._scalars,
        )  # fmt: skip
        assert done == len(entries), f"entry {entries[done]} is there already"

    def touch(self, entries: Entries) -> None:
        entries = as_entries(entries)
        self._rebase_before(len(entries))
        arrays = (self._place, self._keys, self._weights, self._state, self._heaps, self._table, self._scalars)
        done = kernels.prefix_touch(entries, self._period, *arrays)
        assert done == len(entries), f"entry {entries[len(entries) - 1 - done]} is not there"

    def hide(self, entries: Entries) -> None:
        entries = as_entries(entries)
        done = kernels.prefix_hide(entries, self._place, self._keys, self._state, self._heaps, self._table)
        assert done == len(entries), f"entry {entries[done]} is hidden already, or not there"

    def show(self, entries: Entries) -> None:
        entries = as_entries(entries)
        done = kernels.prefix_show(entries, self._place, self._keys, self._state, self._heaps, self._table)
        assert done == len(entries), f"entry {entries[done]} is not hidden"

    def remove(self, entries: Entries) -> None:
        entries = as_entries(entries)
        arrays = (self._place, self._keys, self._parents, self._births, self._state, self._heaps, self._table)
        done = kernels.prefix_remove(entries, *arrays)
        assert done == len(entries), f"entry {entries[done]} is not there"

    def hidden(self, entries: Entries) -> Mask:
        state = self._state[entries]
        return (state >= 0) & (state & HIDDEN != 0)

    def evictable(self, entries: Entries) -> Mask:
        leaf: Mask = (self._state[entries] >= 0) & (self._place[entries] >= 0)
        return leaf

    def evictable_together(self, entries: Entries) -> Mask:
        entries = as_entries(entries)
        # Children are younger than their parents.
        order = np.argsort(self._births[entries], kind="stable")[::-1].astype(np.int64)
        out = np.empty(len(entries), dtype=np.int64)
        kernels.prefix_together(
            np.ascontiguousarray(order), entries, self._place, self._parents, self._births, self._state, out
        )
        return out.astype(np.bool_)

    def victims(self, slot_class: int, count: int) -> Entries:
        out = np.empty(count, dtype=np.int32)
        arrays = (self._place, self._keys, self._parents, self._births, self._state, self._heaps, self._table)
        return out[: kernels.prefix_victims(slot_class, *arrays, out)]

    def next_class(self) -> int | None:
        found = int(kernels.prefix_next_class(self._keys, self._heaps, self._table))
        return None if found < 0 else found

    def rank(self, entries: Entries) -> Ranks:
        """Value, of leaves and of others; ties by entry."""
        return self._keys[entries].astype(np.uint64) << np.uint64(32) | np.asarray(entries).astype(np.uint64)

    def check_invariants(self) -> None:
        present = np.flatnonzero(self._state >= 0)
        children = np.zeros(self._entries_max, dtype=np.int64)
        for entry in present.tolist():
            parent = int(self._parents[entry])
            if parent >= 0 and self._state[parent] >= 0 and self._births[parent] < self._births[entry]:
                children[parent] += 1
        assert len(np.unique(self._births[present])) == len(present), "two blocks were born at once"
        assert (self._births[present] < self._scalars[kernels.CLOCK]).all()
        classes = self._state[present] & CLASS_MASK
        residents = np.bincount(classes, minlength=self._classes)
        assert (residents == self._table[kernels.RESIDENTS]).all()
        assert (self._table[kernels.RESIDENTS] <= self._table[kernels.ROOM]).all()
        place, leaf = self._place[present], (children[present] == 0) & (self._state[present] & HIDDEN == 0)
        assert ((place >= 0) == leaf).all(), "the heaps hold all shown leaves and nothing else"
        assert (np.where(leaf, -1, place) == np.where(leaf, -1, -children[present] - 1)).all()
        assert leaf.sum() == self._table[kernels.SIZE].sum()
        for entry in present[leaf].tolist():
            start = int(self._table[kernels.START, int(self._state[entry]) & CLASS_MASK])
            at = int(self._place[entry])
            assert self._heaps[start + at] == entry
            above = int(self._heaps[start + (at - 1) // 2]) if at else entry
            assert (self._keys[above], above) <= (self._keys[entry], entry), "a heap is out of order"

    # ---------------------------------------------------------------- parts

    def _make_room(self) -> None:
        """Lays the heaps out anew, each with a quarter more room than it has residents."""
        table = self._table
        residents = table[kernels.RESIDENTS]
        room = np.where(residents > 0, residents + residents // 4 + 16, 0)
        starts = np.concatenate([[0], np.cumsum(room)[:-1]])
        heaps = np.zeros(int(room.sum()), dtype=np.int32)
        for number in np.flatnonzero(table[kernels.SIZE]).tolist():
            old, size = int(table[kernels.START, number]), int(table[kernels.SIZE, number])
            heaps[starts[number] : starts[number] + size] = self._heaps[old : old + size]
        self._heaps = heaps
        table[kernels.START], table[kernels.ROOM] = starts, room

    def _adapt_period(self, residents: int) -> None:
        period = period_of(residents, self._period)
        if period != self._period:
            kernels.reprice(self._period, period, self._keys, self._weights, self._state)
            self._period = period
            kernels.heapify(self._heaps, self._table, self._keys, self._place)

    def _rebase_before(self, steps: int) -> None:
        """Turns the clock back before it passes its bound: births keep their order, keys their distances."""
        clock = int(self._scalars[kernels.CLOCK])
        if clock + steps < kernels.CLOCK_MAX:
            return
        shift = clock - _CLOCK_AFTER
        present = np.flatnonzero(self._state >= 0)
        order = np.argsort(self._births[present])
        self._births[present[order]] = np.arange(len(present), dtype=np.uint32)
        self._keys = np.where(self._keys > shift, self._keys - np.uint32(shift), 0).astype(np.uint32)
        self._scalars[kernels.CLOCK] = _CLOCK_AFTER
        kernels.heapify(self._heaps, self._table, self._keys, self._place)
