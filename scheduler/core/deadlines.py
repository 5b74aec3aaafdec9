"""The times at which something ends by itself. Pure data structure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TypeAlias

#: (kind, id) or (kind, gateway, request): what a deadline belongs to.
DeadlineKey: TypeAlias = tuple[str, ...]


@dataclass(slots=True)
class Deadlines:
    """At most one deadline a key; the earliest first, equal times by key.

    Moving a deadline leaves the old heap entry behind; it is skipped later, and the heap is rebuilt when more than
    half of it is stale, so memory stays proportional to the live keys.
    """

    live: dict[DeadlineKey, int] = field(default_factory=dict)
    heap: list[tuple[int, DeadlineKey]] = field(default_factory=list)

    def set(self, key: DeadlineKey, at_us: int) -> None:
        self.live[key] = at_us
        heapq.heappush(self.heap, (at_us, key))
        self._compact()

    def discard(self, key: DeadlineKey) -> None:
        if self.live.pop(key, None) is not None:
            self._compact()

    def _compact(self) -> None:
        if len(self.heap) > 2 * len(self.live) + 64:
            self.heap = [(at, live_key) for live_key, at in self.live.items()]
            heapq.heapify(self.heap)

    def _drop_stale(self) -> None:
        while self.heap and self.live.get(self.heap[0][1]) != self.heap[0][0]:
            heapq.heappop(self.heap)

    def next_us(self) -> int | None:
        self._drop_stale()
        return self.heap[0][0] if self.heap else None

    def pop_due(self, now_us: int) -> DeadlineKey | None:
        """Takes out the earliest key whose time has come; None if there is none."""
        self._drop_stale()
        if not self.heap or self.heap[0][0] > now_us:
            return None
        _, key = heapq.heappop(self.heap)
        del self.live[key]
        self._compact()
        return key

    def check_invariants(self) -> None:
        entries = {}
        for at_us, key in self.heap:
            entries[(key, at_us)] = True
        for key, at_us in self.live.items():
            assert (key, at_us) in entries, f"{key} has no heap entry"
        assert len(self.heap) <= 2 * len(self.live) + 65
