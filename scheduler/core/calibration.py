"""How far predictions were off, and by how much they are put right. Pure; plain arithmetic, medians by sorting."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.core.robust import RobustFit

#: Errors kept of each kind; the median is of these.
ERRORS_KEPT = 64
EWMA_SHARE = 0.05
#: What lies between prediction and first token besides queue, pull and prefill: gateway, network, steps of others.
TTFT_CENTRE = (5_000.0, 1.0, 1.0)
#: How strongly a model's correction is drawn to none, and an instance's to that of its model, in samples.
MODEL_PULL, INSTANCE_PULL = (0.001, 0.3, 0.3), (0.01, 3.0, 3.0)
#: Predictions are put right from this many outcomes of a model on, by an instance's own from as many of its own on, and
#: by no more than these factors.
CORRECTED_FROM_SAMPLES = 4
CORRECTION_MIN, CORRECTION_MAX = 0.5, 3.0
OVERHEAD_US_MAX = 1e6
#: Further off than twice what can be put right is taken for that.
TAKEN_MAX = 2.0
#: A correction that no outcome has confirmed for this long loses its weight: one that refuses everybody would stay.
TRUSTED_US = 10_000_000
#: An error counts as this much at most: one stall is not worth a hundred good predictions.
ERROR_MAX = 10.0


def model_correction() -> RobustFit:
    """Of all instances of a model, before any outcome."""
    return RobustFit.start(TTFT_CENTRE, MODEL_PULL)


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


@dataclass(frozen=True, slots=True)
class TtftParts:
    """A prediction of TTFT before its correction. Sums to it; microseconds.

    Fields:
        waited_us: in the scheduler, until it was placed: known, not predicted.
        queue_us, service_us: predicted; service is pull and prefill.
    """

    waited_us: int
    queue_us: int
    service_us: int


@dataclass(slots=True)
class Calibration:
    """Predictions for one instance against what happened, and the correction that follows from it for TTFT.

    TTFT as announced = waited + overhead + factor * queue + factor * (pull + prefill), with overhead and factors
    learned from outcomes. What queues are off by in a crowd says nothing of a request that finds its instance idle,
    hence two factors. All instances of a model teach one correction, each its own too, which is drawn to that one.
    """

    correction: RobustFit = field(default_factory=lambda: RobustFit.start(TTFT_CENTRE, INSTANCE_PULL))
    outcomes: int = 0  # of the model, when the last one here came
    ttft: Errors = field(default_factory=Errors)
    pull: Errors = field(default_factory=Errors)
    prefill: Errors = field(default_factory=Errors)
    seen_us: int = 0

    def ttft_us(self, queue_us: int, service_us: int, now_us: int) -> int:
        """Corrected TTFT from when it is placed. Grows with its arguments."""
        overhead_us, of_queue, of_service = self.factors(now_us)
        return int(overhead_us + of_queue * queue_us + of_service * service_us)

    def factors(self, now_us: int) -> tuple[float, float, float]:
        """Overhead in microseconds, factors of queue and service; nearer to none if the last outcome is long ago."""
        if self.outcomes < CORRECTED_FROM_SAMPLES:
            return 0.0, 1.0, 1.0
        own = len(self.correction.samples) >= CORRECTED_FROM_SAMPLES
        overhead_us, of_queue, of_service = self.correction.coefficients if own else self.correction.centre
        share = TRUSTED_US / max(now_us - self.seen_us, TRUSTED_US)
        return min(overhead_us, OVERHEAD_US_MAX) * share, _bounded(of_queue, share), _bounded(of_service, share)

    def observe_ttft(
        self, announced_us: int, parts: TtftParts, drift: float, actual_us: int, now_us: int, of_model: RobustFit
    ) -> None:
        """Takes in how long a first token took.

        Args:
            announced_us: TTFT as corrected then.
            drift: what the fits say now of the same prefill, over what they said then. What they have learned since
                must not be corrected once more.
            of_model: the correction of all instances of the model, which learns too.
        """
        if actual_us <= 0:
            return
        self.seen_us = now_us
        self.ttft.observe(announced_us, actual_us)
        x = (1.0, drift * max(parts.queue_us, 0), drift * max(parts.service_us, 1))
        y_max = TAKEN_MAX * (OVERHEAD_US_MAX + CORRECTION_MAX * (x[1] + x[2]))
        y = min(float(max(actual_us - parts.waited_us, 1)), y_max)
        of_model.observe(x, y)
        self.outcomes = len(of_model.samples)
        self.correction.drawn_to(of_model.coefficients)
        self.correction.observe(x, y)


def _bounded(factor: float, share: float) -> float:
    return 1.0 + (min(max(factor, CORRECTION_MIN), CORRECTION_MAX) - 1.0) * share
