"""How much of a hand-off's transfer a decode worker had to wait for.

The *exposed* part of a split request begins when its first token is known here and ends when the last of its blocks is
here: in that time nothing but the transfer keeps decoding from beginning. Blocks that arrive before the first token are
hidden behind the prefill. All times are of the decode worker's own clock. Pure but for a lock.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
RATIO_BUCKETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Exposure:
    """One hand-off: time spent reading, time exposed, and both without what they have in common."""

    read_us: int
    exposed_us: int
    whole_us: int

    @property
    def ratio(self) -> float:
        """Exposed part of what this worker sees of the transfer, 0 to 1.

        The prefill worker's publishing that was hidden is not seen here, so the share of all of it is smaller.
        """
        return self.exposed_us / self.whole_us if self.whole_us else 0.0


def exposure(reads: Sequence[tuple[float, float]], first_token_s: float, ended_s: float) -> Exposure:
    """What a hand-off's transfer cost.

    Args:
        reads: begin and end of each read, seconds.
        first_token_s: when the first token was known.
        ended_s: when the last block was here, or it was clear that no more would come.
    """
    exposed_s = max(0.0, ended_s - first_token_s)
    hidden_s = sum(max(0.0, min(end_s, first_token_s) - begin_s) for begin_s, end_s in reads)
    read_s = sum(end_s - begin_s for begin_s, end_s in reads)
    return Exposure(round(read_s * 1e6), round(exposed_s * 1e6), round(hidden_s * 1e6) + round(exposed_s * 1e6))


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]`: observations of at most `bounds[i]`, those of earlier bounds included; `count`: all of them."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    count: int
    total: float


class _Observed:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._total += value

    def histogram(self) -> Histogram:
        sums = [sum(self._counts[: i + 1]) for i in range(len(self._bounds))]
        return Histogram(self._bounds, tuple(sums), sum(self._counts), self._total)


class ExposureMeter:
    """Histograms since the start. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ratio, self._exposed_s, self._read_s = (
            _Observed(bounds) for bounds in (RATIO_BUCKETS, SECONDS_BUCKETS, SECONDS_BUCKETS)
        )

    def add(self, exposed: Exposure) -> None:
        with self._lock:
            self._ratio.add(exposed.ratio)
            self._exposed_s.add(exposed.exposed_us / 1e6)
            self._read_s.add(exposed.read_us / 1e6)

    def histograms(self) -> dict[str, Histogram]:
        """By the names under which they are served as metrics."""
        with self._lock:
            return {
                "kvpool_exposed_transfer_ratio": self._ratio.histogram(),
                "kvpool_exposed_transfer_seconds": self._exposed_s.histogram(),
                "kvpool_handoff_read_seconds": self._read_s.histogram(),
            }
