"""Items that wait to be written to the log: in order, numbered by entry, bounded."""

from __future__ import annotations

from collections import deque

from kvpool.v1 import event_log_pb2

#: Items are gathered into entries of about this size; a larger item is an entry of its own.
ENTRY_BYTES = 256 << 10
ENTRY_ITEMS = 4096


class Outgoing:
    """At `bytes_max`, or while closed, items are dropped and counted, and a number is left out: readers see that gap.

    Not thread-safe.
    """

    def __init__(self, scheduler_id: str, incarnation: int, bytes_max: int = 32 << 20) -> None:
        self.scheduler_id, self.incarnation = scheduler_id, incarnation
        self.number = 0  # of the last entry taken, or left out
        self.dropped = 0
        self.bytes = 0
        self._bytes_max = bytes_max
        self._items: deque[tuple[event_log_pb2.LogItem, int]] = deque()
        self._open = False

    def open(self) -> None:
        """From now on items are kept."""
        self._open = True

    def close(self) -> None:
        """The log is down: what waits would be old news when it returns."""
        self._open = False
        self._lose()

    def append(self, item: event_log_pb2.LogItem) -> None:
        if not self._open:
            self.dropped += 1
            return
        size = item.ByteSize() + 8
        if self.bytes + size > self._bytes_max:
            self.dropped += 1
            self._lose()
            return
        self._items.append((item, size))
        self.bytes += size

    def _lose(self) -> None:
        self.dropped += len(self._items)
        self._items.clear()
        self.bytes = 0
        self.number += 1

    def take(self, entries_max: int) -> list[bytes]:
        """The next entries, ready to be written; they count as said, whether or not they are written."""
        entries: list[bytes] = []
        while self._items and len(entries) < entries_max:
            entries.append(self._next_entry())
        return entries

    def _next_entry(self) -> bytes:
        self.number += 1
        entry = event_log_pb2.LogEntry(scheduler_id=self.scheduler_id, incarnation=self.incarnation, number=self.number)
        taken = 0
        while self._items and len(entry.items) < ENTRY_ITEMS:
            item, size = self._items[0]
            if taken and taken + size > ENTRY_BYTES:
                break
            self._items.popleft()
            entry.items.append(item)
            taken += size
        self.bytes -= taken
        data: bytes = entry.SerializeToString()
        return data

    def __len__(self) -> int:
        return len(self._items)

    def check_invariants(self) -> None:
        assert self.bytes == sum(size for _, size in self._items) <= self._bytes_max
        assert self._open or not self._items
