"""Counts of what a worker did, for people and tests. Any thread adds; a snapshot is consistent."""

from __future__ import annotations

import threading

NAMES = (
    "requests", "requests_refused", "requests_aborted", "requests_failed", "requests_handed_off",
    "tokens_computed", "tokens_generated", "blocks_pulled", "bytes_pulled", "blocks_pull_failed", "blocks_published",
    "bytes_published", "blocks_already_there", "blocks_publish_given_up", "streams_lost",
    "handoff_publish_us", "handoff_read_us", "handoff_exposed_us", "hbm_blocks_promoted", "hbm_blocks_not_promoted",
)  # fmt: skip


class Counters:
    """Numbers since the start, by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(NAMES, 0)

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._values[name] += count

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._values)
