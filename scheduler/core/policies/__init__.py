"""Policies by name. Each ranks the ways to serve a request; the core takes the first feasible one."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.core.config import SchedulerConfig
from scheduler.core.policies.always_colocate import AlwaysColocate
from scheduler.core.policies.always_split import AlwaysSplit
from scheduler.core.policies.base import Policy
from scheduler.core.policies.cheapest import Cheapest
from scheduler.core.policies.dynamo import Dynamo
from scheduler.core.policies.least_loaded import LeastLoaded
from scheduler.core.policies.llmd import LlmD
from scheduler.core.policies.mooncake import MooncakeAlgorithm1
from scheduler.core.policies.random_choice import RandomChoice
from scheduler.core.policies.round_robin import RoundRobin
from scheduler.core.policies.sglang import SglangCacheAware
from scheduler.core.policies.sticky import Sticky

#: Name -> how to make one. A scheduler has one of each, since a request may name its policy.
POLICIES: dict[str, Callable[[SchedulerConfig], Policy]] = {
    "kvpool": Cheapest,
    "mooncake_algorithm1": MooncakeAlgorithm1,
    "dynamo": Dynamo,
    "sglang_cache_aware": SglangCacheAware,
    "llmd": LlmD,
    "always_split": AlwaysSplit,
    "always_colocate": AlwaysColocate,
    "round_robin": RoundRobin,
    "sticky": Sticky,
    "random": RandomChoice,
    "least_loaded": LeastLoaded,
}

#: Those that refuse what they predict to miss its objectives. What the others stand for queues such requests instead:
#: a fair comparison gives requests under them no objectives.
REFUSES_EARLY = ("kvpool", "mooncake_algorithm1", "always_split", "always_colocate")

__all__ = ["POLICIES", "REFUSES_EARLY", "Policy"]
