"""How far predictions were off, and by how much they are put right. Pure; plain arithmetic, medians by sorting."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.core.fit import LinearFit

#: Errors kept of each kind; the median is of these.
ERRORS_KEPT = 64
EWMA_SHARE = 0.05
#: What lies between prediction and first token besides queue, pull and prefill: gateway, network, steps of others.
TTFT_PRIOR = (5_000.0, 1.0, 1.0)
TTFT_FORGETTING = 0.97
#: Predictions are put right from this many samples on, and by no more than these factors.
CORRECTED_FROM_SAMPLES = 4
CORRECTION_MIN, CORRECTION_MAX = 0.5, 3.0
OVERHEAD_US_MAX = 1e6
#: A correction that no outcome has confirmed for this long loses its weight: one that refuses everybody would stay.
TRUSTED_US = 10_000_000
#: An error counts as this much at most: one stall is not worth a hundred good predictions.
ERROR_MAX = 10.0


@dataclass(slots=True)
class Errors:
    """|predicted - actual| / actual of the last predictions."""

    last: list[float] = field(default_factory=list)  # a ring
    mean: float = 0.0  # exponentially weighted
    count: int = 0

    def observe(self, predicted_us: int, actual_us: int) -> None:
        if actual_us <= 0:
            return
        error = min(abs(predicted_us - actual_us) / actual_us, ERROR_MAX)
        if len(self.last) < ERRORS_KEPT:
            self.last.append(error)
        else:
            self.last[self.count % ERRORS_KEPT] = error
        self.mean = error if not self.count else self.mean + EWMA_SHARE * (error - self.mean)
        self.count += 1

    def median(self) -> float | None:
        """Of those kept; None before the first."""
        if not self.last:
            return None
        ordered = sorted(self.last)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass(slots=True)
class Calibration:
    """Predictions for one instance against what happened, and the correction that follows from it for TTFT.

    TTFT as announced = overhead + factor * (waited + queue) + factor * (pull + prefill), all three learned from
    outcomes; the parts are learned from the workers' samples and stay as they are. What queues are off by in a crowd
    says nothing of a request that finds its instance idle, hence two factors.
    """

    fit: LinearFit = field(default_factory=lambda: LinearFit.start(TTFT_PRIOR, TTFT_FORGETTING))
    ttft: Errors = field(default_factory=Errors)
    pull: Errors = field(default_factory=Errors)
    prefill: Errors = field(default_factory=Errors)
    seen_us: int = 0

    def ttft_us(self, queue_us: int, service_us: int, now_us: int) -> int:
        """Corrected TTFT. Grows with its arguments."""
        if self.fit.samples < CORRECTED_FROM_SAMPLES:
            return queue_us + service_us
        overhead_us, of_queue, of_service = self.correction(now_us)
        return int(overhead_us + of_queue * queue_us + of_service * service_us)

    def correction(self, now_us: int) -> tuple[float, float, float]:
        """Overhead in microseconds, factors of queue and service; nearer to none if the last outcome is long ago."""
        if self.fit.samples < CORRECTED_FROM_SAMPLES:
            return 0.0, 1.0, 1.0
        overhead_us, of_queue, of_service = self.fit.current()
        share = TRUSTED_US / max(now_us - self.seen_us, TRUSTED_US)
        return min(overhead_us, OVERHEAD_US_MAX) * share, _bounded(of_queue, share), _bounded(of_service, share)

    def observe_ttft(self, announced_us: int, queue_us: int, service_us: int, actual_us: int, now_us: int) -> None:
        """Args: announced_us: as corrected then; queue_us, service_us: before the correction."""
        if actual_us > 0:
            self.seen_us = now_us
            self.ttft.observe(announced_us, actual_us)
            self.fit.observe((1.0, float(max(queue_us, 0)), float(max(service_us, 1))), float(actual_us))


def _bounded(factor: float, share: float) -> float:
    return 1.0 + (min(max(factor, CORRECTION_MIN), CORRECTION_MAX) - 1.0) * share
