"""A while in which something is not tried, since it took too long a moment ago."""

from __future__ import annotations

import time
from collections.abc import Callable


class Rest:
    """For any thread: whoever is late tries once too often."""

    def __init__(self, rest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rest_s, self._clock, self._until_s = rest_s, clock, 0.0

    def begin(self) -> None:
        self._until_s = self._clock() + self._rest_s

    @property
    def now(self) -> bool:
        return self._clock() < self._until_s
