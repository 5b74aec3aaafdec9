"""Policies by name. Each ranks the ways to serve a request; the core takes the first feasible one."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.core.config import SchedulerConfig
from scheduler.core.policies.always_split import AlwaysSplit
from scheduler.core.policies.base import Policy
from scheduler.core.policies.cheapest import Cheapest
from scheduler.core.policies.least_loaded import LeastLoaded
from scheduler.core.policies.mooncake import MooncakeAlgorithm1
from scheduler.core.policies.random_choice import RandomChoice
from scheduler.core.policies.round_robin import RoundRobin
from scheduler.core.policies.sticky import Sticky

#: Name -> how to make one. A scheduler has one of each, since a request may name its policy.
POLICIES: dict[str, Callable[[SchedulerConfig], Policy]] = {
    "kvpool": Cheapest,
    "mooncake_algorithm1": MooncakeAlgorithm1,
    "always_split": AlwaysSplit,
    "round_robin": RoundRobin,
    "sticky": Sticky,
    "random": RandomChoice,
    "least_loaded": LeastLoaded,
}

__all__ = ["POLICIES", "Policy"]
