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
        self._heap: list[tuple[int, int, int, str]] = []

    def __len__(self) -> int:
        return len(self._deadlines)

    def set(self, kind: Expiry, number: int | str, deadline_us: int) -> None:
        """Sets a holder's deadline, or moves it."""
        self._deadlines[(kind, number)] = deadline_us
        heapq.heappush(self._heap, _item(deadline_us, kind, number))
        if len(self._heap) > 2 * len(self._deadlines) + 64:
            self._heap = [_item(d, k, n) for (k, n), d in self._deadlines.items()]
            heapq.heapify(self._heap)

    def cancel(self, kind: Expiry, number: int | str) -> None:
        """The holder ended; nothing happens if it has no deadline."""
        self._deadlines.pop((kind, number), None)

    def next_us(self) -> int | None:
        """The earliest deadline."""
        while self._heap and not self._live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now_us: int) -> Iterator[Holder]:
        """Takes out, one by one, the holders whose deadline has come."""
        while (deadline := self.next_us()) is not None and deadline <= now_us:
            holder = _holder(heapq.heappop(self._heap))
            del self._deadlines[holder]
            yield holder

    def _live(self, item: tuple[int, int, int, str]) -> bool:
        return self._deadlines.get(_holder(item)) == item[0]


def _item(deadline_us: int, kind: Expiry, number: int | str) -> tuple[int, int, int, str]:
    """Heap order: deadline, kind, number, name."""
    return (deadline_us, int(kind), number, "") if isinstance(number, int) else (deadline_us, int(kind), 0, number)


def _holder(item: tuple[int, int, int, str]) -> Holder:
    _, kind, number, name = item
    return Expiry(kind), name if kind == Expiry.HANDOFF else number
