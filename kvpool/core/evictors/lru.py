"""Least recently used first; of what was used together, the tail first. One intrusive list a class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.core.evictors.base import Ranks
from kvpool.core.evictors.lists import ListedEntries
from kvpool.core.index import Entries


class Lru(ListedEntries):
    """The plain one: what a scan reads once pushes out what is read again and again."""

    name = "lru"

    def insert(
        self,
        entries: Entries,
        slot_classes: NDArray[np.int32],
        parents: NDArray[np.int32],
        weights: NDArray[np.uint32],
        fingerprints: NDArray[np.uint64],
    ) -> None:
        self._list_new(entries, slot_classes, np.zeros(len(entries), dtype=np.int64))

    def touch(self, entries: Entries) -> None:
        self._use(entries, False, 1)

    def victims(self, slot_class: int, count: int) -> Entries:
        return self._first_by_rank(slot_class, count, 0)

    def next_class(self) -> int | None:
        return self._first_class_by_rank(0)

    def rank(self, entries: Entries) -> Ranks:
        return self._stamps[entries].astype(np.uint64)
