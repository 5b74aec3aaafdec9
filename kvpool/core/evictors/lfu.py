"""Least frequently used first, with ageing, ties by recency.

A counter (1..15) rises with each read and is halved for each PERIOD that passed since the last one. Levels are the
powers of two of the counter. Ageing costs nothing: a block of level l goes when one of level 0 would that was read l
periods later, so its rank is its last use plus l periods, and each list of a level stays in order by itself. Of equal
ranks the lower level goes first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.core.evictors.base import Ranks, period_of
from kvpool.core.evictors.lists import ListedEntries
from kvpool.core.index import Entries


class Lfu(ListedEntries):
    """What was read often stays through a scan, and goes when it is not read for some periods."""

    name = "lfu"
    levels_of_use = tuple(max(use.bit_length() - 1, 0) for use in range(16))

    def __init__(self, entries_max: int, classes: int) -> None:
        super().__init__(entries_max, classes)
        self._period = period_of(1, 0)

    def insert(
        self,
        entries: Entries,
        slot_classes: NDArray[np.int32],
        parents: NDArray[np.int32],
        weights: NDArray[np.uint32],
        fingerprints: NDArray[np.uint64],
    ) -> None:
        self._period = period_of(self._residents + len(entries), self._period)
        self._list_new(entries, slot_classes, np.ones(len(entries), dtype=np.int64))

    def touch(self, entries: Entries) -> None:
        self._use(entries, True, self._period)

    def victims(self, slot_class: int, count: int) -> Entries:
        return self._first_by_rank(slot_class, count, self._period)

    def next_class(self) -> int | None:
        return self._first_class_by_rank(self._period)

    def rank(self, entries: Entries) -> Ranks:
        return (self._stamps[entries] + self._levels_now(entries) * self._period).astype(np.uint64)
