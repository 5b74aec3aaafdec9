"""Lists of entries by slot class and level: the ground of the policies that are lists. No policy of its own.

Hidden entries stay in their lists, so that showing one is O(1) and restores its place; the front of each list remembers
which hidden ones were skipped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool.core.evictors.base import CLASSES_MAX, Mask, as_entries
from kvpool.core.index import Entries
from kvpool.core.kernels import evictors as kernels


class ListedEntries:
    """State of entries and their lists: 18 bytes an entry. `uses` (0..15) pick one of the lists of a class."""

    #: Level of each use; the lists of a class are one more than the highest.
    levels_of_use: tuple[int, ...] = (0,) * 16

    def __init__(self, entries_max: int, classes: int) -> None:
        assert 0 < entries_max < 2**30 and 0 < classes <= CLASSES_MAX
        self._entries_max, self._classes = entries_max, classes
        self._levels = np.array(self.levels_of_use, dtype=np.int64)
        self._per_class = max(self.levels_of_use) + 1
        lists = classes * self._per_class
        self._links = np.full((2, entries_max + lists), -1, dtype=np.int32)
        self._links[:, entries_max:] = np.arange(entries_max, entries_max + lists, dtype=np.int32)
        self._heads = np.zeros((2, lists), dtype=np.int64)
        self._heads[kernels.FRONT] = np.arange(entries_max, entries_max + lists)
        self._stamps = np.zeros(entries_max, dtype=np.int64)
        self._state = np.full(entries_max, -1, dtype=np.int16)
        self._clock = np.zeros(1, dtype=np.int64)
        self._residents = 0

    def hide(self, entries: Entries) -> None:
        entries = as_entries(entries)
        done = kernels.list_hide(entries, self._heads, self._state, self._levels, self._per_class)
        assert done == len(entries), f"entry {entries[done]} is hidden already, or not there"

    def show(self, entries: Entries) -> None:
        entries = as_entries(entries)
        done = kernels.list_show(entries, self._heads, self._stamps, self._state, self._levels, self._per_class)
        assert done == len(entries), f"entry {entries[done]} is not hidden"

    def remove(self, entries: Entries) -> None:
        entries = as_entries(entries)
        done = kernels.list_remove(entries, self._links, self._heads, self._state, self._levels, self._per_class)
        assert done == len(entries), f"entry {entries[done]} is not there"
        self._residents -= len(entries)

    def hidden(self, entries: Entries) -> Mask:
        state = self._state[entries]
        return (state >= 0) & (state & kernels.HIDDEN != 0)

    def evictable(self, entries: Entries) -> Mask:
        state = self._state[entries]
        return (state >= 0) & (state & kernels.HIDDEN == 0)

    def evictable_together(self, entries: Entries) -> Mask:
        return self.evictable(entries)

    def check_invariants(self) -> None:
        seen = 0
        for number in range(self._heads.shape[1]):
            node = self._entries_max + number
            walk, at = [], int(self._links[kernels.NEXT, node])
            while at != node:
                assert self._links[kernels.PREVIOUS, self._links[kernels.NEXT, at]] == at
                walk.append(at)
                at = int(self._links[kernels.NEXT, at])
            seen += len(walk)
            if not walk:
                assert self._heads[kernels.FRONT, number] == node and self._heads[kernels.SHOWN, number] == 0
                continue
            run = np.array(walk)
            state = self._state[run]
            lists = (state & kernels.CLASS_MASK) * self._per_class + self._levels[state >> kernels.USE_SHIFT]
            assert (state >= 0).all() and (lists == number).all(), "an entry in a wrong list"
            assert (np.diff(self._stamps[run]) > 0).all(), "stamps do not rise"
            shown = self.evictable(run)
            assert shown.sum() == self._heads[kernels.SHOWN, number]
            front = int(self._heads[kernels.FRONT, number])
            assert not shown[: len(walk) if front == node else walk.index(front)].any(), "a shown entry is passed by"
        assert seen == int((self._state >= 0).sum()) == self._residents

    def _list_new(self, entries: NDArray[Any], slot_classes: NDArray[Any], uses: NDArray[np.int64]) -> None:
        entries, classes = as_entries(entries), as_entries(slot_classes)
        assert len(classes) == len(entries) and (classes < self._classes).all()
        lists = (self._links, self._heads, self._stamps, self._state, self._levels, self._per_class, self._clock)
        done = kernels.list_insert(entries, classes, uses, *lists)
        assert done == len(entries), f"entry {entries[len(entries) - 1 - done]} is there already"
        self._residents += len(entries)

    def _use(self, entries: NDArray[Any], counting: bool, period: int) -> None:
        entries = as_entries(entries)
        lists = (self._links, self._heads, self._stamps, self._state, self._levels, self._per_class, self._clock)
        done = kernels.list_touch(entries, counting, period, *lists)
        assert done == len(entries), f"entry {entries[len(entries) - 1 - done]} is not there"

    def _first_by_rank(self, slot_class: int, count: int, period: int) -> Entries:
        out = np.empty(count, dtype=np.int32)
        lists = (self._links, self._heads, self._stamps, self._state, self._per_class)
        return out[: kernels.list_victims(slot_class, period, *lists, out)]

    def _first_class_by_rank(self, period: int) -> int | None:
        lists = (self._links, self._heads, self._stamps, self._state, self._per_class)
        found = int(kernels.list_next_class(period, *lists))
        return None if found < 0 else found

    def _levels_now(self, entries: Entries) -> NDArray[np.int64]:
        levels: NDArray[np.int64] = self._levels[np.maximum(self._state[entries], 0) >> kernels.USE_SHIFT]
        return levels
