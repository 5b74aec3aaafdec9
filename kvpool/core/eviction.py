"""Which blocks go first: least recently used, and of one prefix its tail first, so that prefixes live longest.

Blocks under a lease or a pin are in no list, so they are never victims and cost nothing to skip.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from kvpool.core.index import Entries
from kvpool.core.kernels.entries import list_append, list_oldest, list_unlink

#: Slot sizes that can be in use at the same time; the namespaces of one node share them.
CLASSES_MAX: Final = 64


class LruLists:
    """One list for each slot size, threaded through arrays. Entries are named by their index."""

    def __init__(self, entries_max: int) -> None:
        self._entries_max = entries_max
        size = entries_max + CLASSES_MAX
        self._previous = np.full(size, -1, dtype=np.int32)
        self._following = np.full(size, -1, dtype=np.int32)
        self._stamps = np.zeros(entries_max, dtype=np.uint64)
        self._clock = 0
        self._class_of: dict[int, int] = {}  # slot bytes -> sentinel
        self._entries_of: dict[int, int] = {}  # slot bytes -> entries of that size, listed or not
        self._free_sentinels = list(range(entries_max, size))[::-1]
        for sentinel in range(entries_max, size):
            self._previous[sentinel] = self._following[sentinel] = sentinel

    def open_class(self, slot_bytes: int) -> bool:
        """Makes a list for blocks of this size; False if too many sizes are in use."""
        if slot_bytes in self._class_of:
            return True
        if not self._free_sentinels:
            unused = next((size for size, count in self._entries_of.items() if count == 0), None)
            if unused is None:
                return False
            del self._entries_of[unused]
            self._free_sentinels.append(self._class_of.pop(unused))
        self._class_of[slot_bytes] = self._free_sentinels.pop()
        self._entries_of[slot_bytes] = 0
        return True

    def count(self, slot_bytes: int, change: int) -> None:
        """Entries of this size came or went; the list of a size without entries may be given to another."""
        self._entries_of[slot_bytes] += change

    def append(self, run: Entries, slot_bytes: int) -> None:
        """Lists a run of blocks in prompt order as just used; its tail counts as used before its head."""
        tail_first = np.ascontiguousarray(run[::-1])
        self._stamps[tail_first] = np.arange(self._clock, self._clock + len(run), dtype=np.uint64)
        self._clock += len(run)
        list_append(tail_first, self._class_of[slot_bytes], self._previous, self._following)

    def unlink(self, entries: Entries) -> None:
        """Takes entries out of their lists; those that are in none stay so."""
        list_unlink(np.ascontiguousarray(entries), self._previous, self._following)

    def listed(self, entry: int) -> bool:
        return bool(self._following[entry] != -1)

    def oldest(self, slot_bytes: int, count: int) -> Entries:
        """At most `count` victims of one size, oldest first."""
        out = np.empty(count, dtype=np.int32)
        if slot_bytes not in self._class_of:
            return out[:0]
        return out[: int(list_oldest(self._class_of[slot_bytes], self._following, out))]

    def oldest_class(self) -> int | None:
        """The slot size whose oldest block is the oldest of all; None if nothing can be evicted."""
        best: tuple[int, int] | None = None
        for slot_bytes, sentinel in self._class_of.items():
            entry = int(self._following[sentinel])
            if entry != sentinel:
                candidate = (int(self._stamps[entry]), slot_bytes)
                best = candidate if best is None else min(best, candidate)
        return best[1] if best else None

    def check_invariants(self) -> None:
        seen = 0
        for sentinel in self._class_of.values():
            entry = int(self._following[sentinel])
            while entry != sentinel:
                assert self._previous[self._following[entry]] == entry
                seen += 1
                entry = int(self._following[entry])
        assert all(count >= 0 for count in self._entries_of.values())
        assert seen == int(np.count_nonzero(self._following[: self._entries_max] != -1))
