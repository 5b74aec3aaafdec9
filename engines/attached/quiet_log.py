"""Warnings that may come with every step, said now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable


class QuietLog:
    """Lets one warning of a kind through in an interval and says how many it kept back. For any thread."""

    def __init__(
        self, log: logging.Logger, interval_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._interval_s, self._clock = log, interval_s, clock
        self._lock = threading.Lock()
        self._said_s: dict[str, float] = {}
        self._kept: dict[str, int] = {}

    def warning(self, kind: str, text: str, *arguments: object, trace: BaseException | None = None) -> None:
        """Logs a warning unless one of its kind was logged just before.

        Args:
            kind: of a small fixed set; what is counted together.
            trace: an exception whose stack is shown.
        """
        now_s = self._clock()
        with self._lock:
            if now_s - self._said_s.get(kind, -self._interval_s) < self._interval_s:
                self._kept[kind] = self._kept.get(kind, 0) + 1
                return
            kept = self._kept.pop(kind, 0)
            self._said_s[kind] = now_s
        if kept:
            text += " (and %d more like this)"
            arguments = (*arguments, kept)
        self._log.warning(text, *arguments, exc_info=trace, stacklevel=2)
