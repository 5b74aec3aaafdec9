"""Splits every request that can be split: the baseline of disaggregation without a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.core.cluster import Instance
from scheduler.core.options import Appraiser, Option
from scheduler.core.policies.cheapest import Cheapest


@dataclass(slots=True)
class AlwaysSplit(Cheapest):
    """The cheapest split; staying on one instance only where no split is feasible."""

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> list[Option]:
        options = Cheapest.rank(self, appraiser, instances)
        options.sort(key=lambda o: (not o.feasible, not o.split, *o.order))
        return options
