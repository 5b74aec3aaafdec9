"""Numbered batches of block changes between a source and whoever announces them, bounded.

`append` is for the source's thread, the rest for the reader's; both may be called at any time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvpool.core.changes import BlockChange
from kvpool.core.ids import KEY_BYTES


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes of one `append`, in order."""

    number: int
    changes: tuple[BlockChange, ...]
    key_count: int


class EventLog:
    """Holds batches until they are taken. At `keys_max` it drops all and asks its reader to take a snapshot."""

    def __init__(self, keys_max: int = 1 << 18) -> None:
        self._keys_max = keys_max
        self._lock = threading.Lock()
        self._batches: deque[Batch] = deque()
        self._keys = 0
        self._number = 0
        self._overflows = 0
        self._complete = True

    def append(self, changes: Sequence[BlockChange]) -> int:
        """Numbers a batch from 1 on, without gaps. Returns the number. Never blocks."""
        count = sum(max(len(c.keys) // KEY_BYTES, 1) for c in changes)
        with self._lock:
            self._number += 1
            self._batches.append(Batch(self._number, tuple(changes), count))
            self._keys += count
            if self._keys > self._keys_max:
                self._batches.clear()
                self._keys = 0
                self._complete = False
                self._overflows += 1
            return self._number

    def lose(self) -> None:
        """Changes were lost before they came here: only a snapshot helps."""
        with self._lock:
            self._batches.clear()
            self._keys = 0
            self._number += 1
            self._complete = False

    def take(self, keys_max: int) -> list[BlockChange] | None:
        """Removes leading batches of about `keys_max` keys. None: batches were dropped, only a snapshot helps."""
        with self._lock:
            if not self._complete:
                return None
            taken: list[BlockChange] = []
            count = 0
            while self._batches and count < keys_max:
                batch = self._batches.popleft()
                self._keys -= batch.key_count
                count += batch.key_count
                taken.extend(batch.changes)
            return taken

    def snapshot_taken(self, number: int) -> None:
        """A snapshot holds all batches up to `number`: forgets them, and any gap before them."""
        with self._lock:
            while self._batches and self._batches[0].number <= number:
                self._keys -= self._batches.popleft().key_count
            first = self._batches[0].number if self._batches else self._number + 1
            self._complete = first <= number + 1

    @property
    def last_number(self) -> int:
        return self._number

    @property
    def overflows(self) -> int:
        return self._overflows

    def check_invariants(self) -> None:
        with self._lock:
            numbers = [b.number for b in self._batches]
            assert self._keys == sum(b.key_count for b in self._batches) <= self._keys_max
            assert numbers == list(range(self._number - len(numbers) + 1, self._number + 1))
