"""What the backend did, in SGLang's own storage metrics."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

#: Calls remembered between two readings by SGLang; older ones are forgotten.
CALLS_MAX = 4096


class TransferStats:
    """Pages and gigabytes per second of each call since the last reading. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loads: deque[tuple[int, float]] = deque(maxlen=CALLS_MAX)
        self._stores: deque[tuple[int, float]] = deque(maxlen=CALLS_MAX)

    def loaded(self, pages: int, size_bytes: int, seconds: float) -> None:
        self._note(self._loads, pages, size_bytes, seconds)

    def stored(self, pages: int, size_bytes: int, seconds: float) -> None:
        self._note(self._stores, pages, size_bytes, seconds)

    def _note(self, calls: deque[tuple[int, float]], pages: int, size_bytes: int, seconds: float) -> None:
        if pages:
            with self._lock:
                calls.append((pages, size_bytes / (1 << 30) / max(seconds, 1e-9)))

    def take(self) -> Any:
        """SGLang's `StorageMetrics` of what happened since the last call."""
        # Here, since it brings all of SGLang's metrics with it: in an engine they are loaded already.
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._lock:
            loads, stores = list(self._loads), list(self._stores)
            self._loads.clear()
            self._stores.clear()
        return StorageMetrics(
            prefetch_pgs=[pages for pages, _ in loads],
            backup_pgs=[pages for pages, _ in stores],
            prefetch_bandwidth=[speed for _, speed in loads],
            backup_bandwidth=[speed for _, speed in stores],
        )
