"""Keeps every request on one instance: the baseline without disaggregation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.core.cluster import Instance
from scheduler.core.options import Appraiser, Option
from scheduler.core.policies.cheapest import Cheapest


@dataclass(slots=True)
class AlwaysColocate(Cheapest):
    """The cheapest instance by our own costs, the pool included. Instances that only prefill are left idle."""

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> list[Option]:
        return [option for option in Cheapest.rank(self, appraiser, instances) if not option.split]
