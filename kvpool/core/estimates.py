"""Means that follow what is measured, in one pass and constant memory. Pure arithmetic: + - * / in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CLIP: Final = 4.0  # a sample counts at most as if it were this factor off
CLIP_FROM_SAMPLES: Final = 4
CHANGED_FROM: Final = 3  # so many in a row that are further off are a change, and no noise
STALE_US: Final = 5_000_000
_RECENT_WEIGHT_MIN, _USUAL_WEIGHT_MIN = 0.125, 0.015625  # of a new sample


@dataclass(slots=True)
class Recent:
    """What to expect now: not thrown off by single samples, quick to follow changes, without memory of what is stale.

    Positive samples only. After `STALE_US` without any it begins anew.
    """

    value: float = 0.0
    samples: int = 0  # since it began
    heard_us: int = 0
    far_off: int = 0  # samples in a row that were too large (> 0) or too small (< 0) by more than the factor

    def add(self, sample: float, now_us: int, took_us: int = 0) -> None:
        """Args: took_us: how long it took to measure; until it began, it could not be heard of."""
        if now_us - took_us - self.heard_us > STALE_US:
            self.samples = 0
        low, high = self.value / CLIP, self.value * CLIP
        if self.samples < CLIP_FROM_SAMPLES or low <= sample <= high:
            self.far_off = 0
        else:
            self.far_off = max(self.far_off, 0) + 1 if sample > high else min(self.far_off, 0) - 1
            if abs(self.far_off) >= CHANGED_FROM:
                self.samples = self.far_off = 0
            else:
                sample = min(max(sample, low), high)
        self.samples, self.heard_us = self.samples + 1, now_us
        self.value = self.value + max(1.0 / self.samples, _RECENT_WEIGHT_MIN) * (sample - self.value)


@dataclass(slots=True)
class Usual:
    """What is normal: takes a change for the new normal only after about a hundred samples."""

    value: float = 0.0
    samples: int = 0

    def add(self, sample: float) -> None:
        if self.samples >= CLIP_FROM_SAMPLES:
            sample = min(max(sample, self.value / CLIP), self.value * CLIP)
        self.samples += 1
        self.value = self.value + max(1.0 / self.samples, _USUAL_WEIGHT_MIN) * (sample - self.value)
