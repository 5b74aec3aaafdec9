"""Virtual time: what happens next, and the log of what happened. Pure."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable
from typing import Any

Action = Callable[..., object]


class EventQueue:
    """Actions in order of their time; those of the same microsecond in the order in which they were added."""

    def __init__(self) -> None:
        self.now_us = 0
        self.done = 0
        self._heap: list[tuple[int, int, Action, tuple[Any, ...]]] = []
        self._added = 0

    def at(self, time_us: int, action: Action, *args: Any) -> None:
        """Adds an action. One that must not happen any more finds that out itself when its time comes."""
        assert time_us >= self.now_us, "an event in the past"
        heapq.heappush(self._heap, (time_us, self._added, action, args))
        self._added += 1

    def after(self, delay_us: int, action: Action, *args: Any) -> None:
        self.at(self.now_us + delay_us, action, *args)

    def step(self) -> bool:
        """Does the next action; False if there is none."""
        if not self._heap:
            return False
        time_us, _, action, args = heapq.heappop(self._heap)
        self.now_us = time_us
        self.done += 1
        action(*args)
        return True

    def next_us(self) -> float:
        """When the next action is due; infinity if there is none."""
        return self._heap[0][0] if self._heap else float("inf")

    def __len__(self) -> int:
        return len(self._heap)


class EventLog:
    """What happened, a JSON object a line, and the digest of all lines."""

    def __init__(self, queue: EventQueue, sink: Callable[[str], object] | None = None) -> None:
        """Args: sink: takes each line, newline included."""
        self._queue = queue
        self._sink = sink
        self._digest = hashlib.sha256()
        self.lines = 0

    def add(self, what: str, /, **fields: Any) -> None:
        line = json.dumps({"us": self._queue.now_us, "what": what, **fields}, separators=(",", ":")) + "\n"
        self._digest.update(line.encode())
        self.lines += 1
        if self._sink is not None:
            self._sink(line)

    def sha256(self) -> str:
        return self._digest.hexdigest()
