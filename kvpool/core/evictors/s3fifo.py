"""S3-FIFO: a small queue for what is new, a main one for what was read there, and a memory of what left the small one.

Source: Yang et al., FIFO queues are all you need for cache eviction, SOSP'23, algorithm 1, for each class with its
residents as the size of the cache. A read moves nothing; queues move when victims leave, that is, when `remove` is
given just the next victims of a class. Other removals only take entries out. Different from the paper: hidden entries
stay where they are, one search passes PASSES_MAX entries over at most, and the ghost queue is an array of sets of
16-bit tags, as many tags as entries, shared by the classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.core.evictors.base import Ranks, as_entries
from kvpool.core.evictors.lists import ListedEntries
from kvpool.core.index import Entries
from kvpool.core.kernels import evictors as kernels


class S3Fifo(ListedEntries):
    """What a scan reads once leaves through the small queue, past the main one."""

    name = "s3fifo"
    levels_of_use = (0,) * 4 + (1,) * 12  # use = queue << 2 | reads

    def __init__(self, entries_max: int, classes: int) -> None:
        super().__init__(entries_max, classes)
        self._prints = np.zeros(entries_max, dtype=np.uint32)
        sets = -(-entries_max // kernels.GHOST_WAYS)
        self._ghosts = np.zeros((sets, kernels.GHOST_WAYS), dtype=np.uint16)

    def insert(
        self,
        entries: Entries,
        slot_classes: NDArray[np.int32],
        parents: NDArray[np.int32],
        weights: NDArray[np.uint32],
        fingerprints: NDArray[np.uint64],
    ) -> None:
        prints = np.empty(len(entries), dtype=np.uint32)
        kernels.fold(np.ascontiguousarray(fingerprints, dtype=np.uint64), prints)
        remembered = np.empty(len(entries), dtype=np.int64)
        kernels.ghosts_take(prints, self._ghosts, remembered)
        self._list_new(entries, slot_classes, remembered * kernels.MAIN)
        self._prints[entries] = prints

    def touch(self, entries: Entries) -> None:
        entries = as_entries(entries)
        done = kernels.s3_touch(entries, self._state)
        assert done == len(entries), f"entry {entries[done]} is not there"

    def remove(self, entries: Entries) -> None:
        entries = as_entries(entries)
        state = self._state[entries]
        assert (state >= 0).all(), "an entry that is not there"
        classes = state & kernels.CLASS_MASK
        for slot_class in np.unique(classes).tolist():
            self._evict_if_next(slot_class, entries[classes == slot_class])
        # An entry may have come to main on the way only to be passed over again: the queue counts that it leaves from.
        queues = self._state[entries] >> kernels.USE_SHIFT
        kernels.ghosts_add(self._prints[entries[queues < kernels.MAIN]], self._ghosts)
        super().remove(entries)

    def victims(self, slot_class: int, count: int) -> Entries:
        return self._evictions(slot_class, count)[0]

    def next_class(self) -> int | None:
        found = int(kernels.s3_next_class(self._entries_max, self._links, self._heads, self._stamps, self._state))
        return None if found < 0 else found

    def rank(self, entries: Entries) -> Ranks:
        """Age in the queue, plus `entries_max` for each time that the entry will be passed over.

        Orders entries of one queue as their victims go; between the queues of a class their shares decide.
        """
        use = np.maximum(self._state[entries], 0).astype(np.int64) >> kernels.USE_SHIFT
        reads = use & kernels.READS
        passes = np.where(use & kernels.MAIN, reads + 1, reads > 1)
        return (self._stamps[entries] + passes * self._entries_max).astype(np.uint64)

    def _evictions(self, slot_class: int, count: int) -> tuple[Entries, NDArray[np.int64]]:
        out = np.empty(count, dtype=np.int32)
        found, moves = kernels.s3_evictions(slot_class, self._links, self._heads, self._state, out)
        return out[:found], moves

    def _evict_if_next(self, slot_class: int, entries: Entries) -> None:
        """Lets the queues move as evicting these entries moves them, if they are the next victims of their class."""
        victims, moves = self._evictions(slot_class, len(entries))
        if len(moves) and np.array_equal(np.sort(victims), np.sort(entries)):
            lists = (self._links, self._heads, self._stamps, self._state, self._levels)
            kernels.s3_apply(moves, *lists, self._clock)
