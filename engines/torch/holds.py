"""Frees the hand-off holds of a request's prompt blocks: when they are read, and a while after its first token.

Freeing what was read is not enough: blocks that were in the pool before are readable before the prefill instance has
put its hold on them, and blocks that the decode instance has in its own cache are never read. Without a last round
these holds would stay until they expire. It has a thread of its own: decoding may be waiting for the next blocks.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from dataclasses import dataclass, field

from engines.torch.links import Links
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import KeyArray

log = logging.getLogger(__name__)

#: Rounds that wait; beyond it a hold ends by its own expiry.
ROUNDS_MAX = 4096


@dataclass(frozen=True, order=True)
class _Round:
    due_s: float
    address: str = field(compare=False)
    hold: str = field(compare=False)
    keys: KeyArray = field(compare=False)


class HoldSweeper:
    """One thread that frees holds when they are due."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._rounds: list[_Round] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="hold-sweeper", daemon=True)
        self._thread.start()

    def free(self, address: str, hold: str, keys: KeyArray, *, after_s: float) -> None:
        """Frees the holds of request `hold` on `keys` at `address`, `after_s` from now."""
        with self._wake:
            if len(self._rounds) < ROUNDS_MAX:
                heapq.heappush(self._rounds, _Round(time.monotonic() + after_s, address, hold, keys))
                self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(5.0)

    def _run(self) -> None:
        while (due := self._next()) is not None:
            try:
                with self._links.client(due.address) as client:
                    client.free_hold(self._links.namespace, due.keys, due.hold)
            except KvpoolError as error:
                log.info("%s: holds at %s stay until they expire: %s", due.hold, due.address, error)
            except Exception:
                log.exception("%s: freeing holds failed", due.hold)

    def _next(self) -> _Round | None:
        with self._wake:
            while not self._closed:
                wait_s = self._rounds[0].due_s - time.monotonic() if self._rounds else None
                if wait_s is not None and wait_s <= 0.0:
                    return heapq.heappop(self._rounds)
                self._wake.wait(wait_s)
            return None
