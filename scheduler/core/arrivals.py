"""How much comes of late: what tells that an instance kept busy keeps others waiting. Pure."""

from __future__ import annotations

from dataclasses import dataclass

#: Time over which arrivals are averaged.
WINDOW_US = 30_000_000


@dataclass(slots=True)
class Rate:
    """What comes a second, old amounts forgotten by 1 / (1 + age / window): plain arithmetic, the same everywhere."""

    per_s: float = 0.0
    seen_us: int = 0

    def add(self, amount: float, now_us: int) -> None:
        self.per_s = self.at(now_us) + amount * 1e6 / WINDOW_US
        self.seen_us = now_us

    def at(self, now_us: int) -> float:
        return self.per_s * WINDOW_US / (WINDOW_US + max(now_us - self.seen_us, 0))


@dataclass(slots=True)
class ArrivalRate(Rate):
    """Requests a second."""

    def arrived(self, now_us: int) -> None:
        self.add(1.0, now_us)
