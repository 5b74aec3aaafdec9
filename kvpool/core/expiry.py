"""When what is held ends by itself: a heap of deadlines that stays as small as what is held."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from enum import IntEnum
from typing import TypeAlias


class Expiry(IntEnum):
    """What ends."""

    LEASE = 1
    PIN = 2
    HANDOFF = 3
    RESERVATION = 4
    WAIT = 5


Holder: TypeAlias = tuple[Expiry, int | str]


class Expiries:
    """One deadline for each holder."""

    def __init__(self) -> None:
        self._deadlines: dict[Holder, int] = {}
        self._heap: list[tuple[int, int, str]] = []
        self._holders: dict[tuple[int, str], Holder] = {}

    def __len__(self) -> int:
        return len(self._deadlines)

    def set(self, kind: Expiry, number: int | str, deadline_us: int) -> None:
        """Sets a holder's deadline, or moves it."""
        holder = (kind, number)
        self._deadlines[holder] = deadline_us
        self._holders[(int(kind), str(number))] = holder
        heapq.heappush(self._heap, (deadline_us, int(kind), str(number)))
        if len(self._heap) > 2 * len(self._deadlines) + 64:
            self._heap = [(d, int(k), str(n)) for (k, n), d in self._deadlines.items()]
            heapq.heapify(self._heap)

    def cancel(self, kind: Expiry, number: int | str) -> None:
        """The holder ended; nothing happens if it has no deadline."""
        self._deadlines.pop((kind, number), None)
        self._holders.pop((int(kind), str(number)), None)

    def next_us(self) -> int | None:
        """The earliest deadline."""
        while self._heap and not self._live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now_us: int) -> Iterator[Holder]:
        """Takes out, one by one, the holders whose deadline has come."""
        while (deadline := self.next_us()) is not None and deadline <= now_us:
            _, kind, number = heapq.heappop(self._heap)
            holder = self._holders.pop((kind, number))
            del self._deadlines[holder]
            yield holder

    def _live(self, item: tuple[int, int, str]) -> bool:
        holder = self._holders.get(item[1:])
        return holder is not None and self._deadlines[holder] == item[0]
