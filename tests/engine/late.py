"""A block memory whose copies end when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engines.torch.hbm import CpuBlocks
from kvpool.tiers.hbm import CopyEvent, Staging

POISON = 0xA5


class LateEvent:
    def __init__(self, action: Callable[[], None]) -> None:
        self._action, self._done = action, threading.Event()

    def complete(self) -> None:
        if not self._done.is_set():
            self._action()
            self._done.set()

    def wait(self, timeout_s: float) -> bool:
        return self._done.wait(timeout_s)


class LateBlocks:
    """Stages through memory of its own that holds poison until the copy is completed."""

    def __init__(self, below: CpuBlocks) -> None:
        self._below = below
        self.block_count, self.block_bytes = below.block_count, below.block_bytes
        self.batch_blocks_max = 4
        self.pending: list[LateEvent] = []
        #: Copies are begun in threads of the worker, and ended in that of the test.
        self._lock = threading.Lock()
        self.staged = 0
        self.automatic = False

    def gather(self, blocks: NDArray[np.int64]) -> Staging:
        area = self._area(blocks)
        source = self._below.gather(blocks)

        def copy() -> None:
            area[:] = source.data[source.rows]

        return Staging(area, np.arange(len(blocks)), self._event(copy), self._release)

    def receive(self, blocks: NDArray[np.int64]) -> Staging:
        return Staging(self._area(blocks), np.arange(len(blocks)), self._event(lambda: None), self._release)

    def scatter(self, staging: Staging, blocks: NDArray[np.int64], indices: NDArray[np.int64]) -> CopyEvent:
        target = self._below.receive(blocks)

        def copy() -> None:
            target.data[target.rows[indices]] = staging.data[staging.rows[indices]]

        return self._event(copy)

    def complete(self) -> None:
        """Ends all copies begun so far."""
        with self._lock:
            pending, self.pending = self.pending, []
        for event in pending:
            event.complete()

    def _area(self, blocks: NDArray[np.int64]) -> NDArray[np.uint8]:
        assert len(blocks) <= self.batch_blocks_max
        with self._lock:
            self.staged += 1
        return np.full((len(blocks), self.block_bytes), POISON, dtype=np.uint8)

    def _event(self, action: Callable[[], None]) -> LateEvent:
        event = LateEvent(action)
        with self._lock:
            self.pending.append(event)
        if self.automatic:
            event.complete()
        return event

    def _release(self) -> None:
        with self._lock:
            self.staged -= 1
