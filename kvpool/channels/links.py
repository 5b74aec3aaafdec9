"""The link meter of a process, for all its threads, and the thread that probes. What it means: `kvpool.core.links`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kvpool.core.links import LinkConfig, LinkMeter, LinkSnapshot

log = logging.getLogger(__name__)

#: Between two rounds of probes, however much is due, or little.
WAIT_S_MIN, WAIT_S_MAX = 0.01, 5.0


class Watched(Protocol):
    """Something with links that are to be probed."""

    def next_probe_us(self) -> int:
        """When the next probe of any of its links is due."""
        ...

    def probe_due(self) -> None:
        """Probes those links whose probes are due, each within the probe timeout."""
        ...


def monotonic_us() -> int:
    return time.monotonic_ns() // 1000


class _Now:
    """Holds the lock of a meter; lighter than a generator, since each transfer asks several times."""

    __slots__ = ("_clock", "_lock", "_meter")

    def __init__(self, lock: threading.Lock, meter: LinkMeter, clock: Callable[[], int]) -> None:
        self._lock, self._meter, self._clock = lock, meter, clock

    def __enter__(self) -> tuple[LinkMeter, int]:
        self._lock.acquire()
        return self._meter, self._clock()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class Links:
    """The link meter of a process, for all threads, and the thread that probes what `watch` was called for."""

    def __init__(self, config: LinkConfig | None = None, clock: Callable[[], int] = monotonic_us) -> None:
        self.config = LinkConfig() if config is None else config
        self._meter, self._clock = LinkMeter(self.config), clock
        self._lock = threading.Lock()
        self._now = _Now(self._lock, self._meter, clock)
        self._changed = threading.Condition()
        self._watched: list[Watched] = []
        self._thread: threading.Thread | None = None

    def now(self) -> _Now:
        """For a `with` block: the meter and the time. The block must not wait for anything."""
        return self._now

    def snapshot(self, source: str | None = None) -> list[LinkSnapshot]:
        """All links that this process knows, or those to one source."""
        with self._lock:
            return self._meter.snapshot(source)

    def watch(self, channel: Watched) -> None:
        """Probes the links of `channel` until `unwatch`."""
        with self._changed:
            self._watched.append(channel)
            if self._thread is None:
                self._thread = threading.Thread(target=self._probe, name="link-probes", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def unwatch(self, channel: Watched) -> None:
        with self._changed:
            if channel in self._watched:
                self._watched.remove(channel)
            self._changed.notify_all()

    def look_again(self) -> None:
        """A link changed its state: the next probe may be due earlier than thought."""
        with self._changed:
            self._changed.notify_all()

    @property
    def probing(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None

    def _probe(self) -> None:
        """The thread: ends with the last channel. A probe takes at most its timeout, so none waits for long."""
        while True:
            with self._changed:
                if not self._watched:
                    self._thread = None
                    return
                due_us = min(channel.next_probe_us() for channel in self._watched)
                self._changed.wait(min(max(WAIT_S_MIN, (due_us - self._clock()) / 1e6), WAIT_S_MAX))
                channels = list(self._watched)
            for channel in channels:
                try:
                    channel.probe_due()
                except Exception:
                    # A bug of ours must not end the probes of all other links.
                    log.exception("a probe failed")
