"""What a call may say about the copies of what it stores: `ReplicateConfig` and its enums, as Mooncake has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from engines.mooncake.codes import Code


class SoftPinAction(IntEnum):
    """What a put does about the soft pin of its object."""

    PRESERVE = 0
    ENABLE = 1
    DISABLE = 2


class ObjectDataType(IntEnum):
    """What an object is said to hold; kvpool keeps no note of it."""

    UNKNOWN = 0
    KVCACHE = 1
    TENSOR = 2
    WEIGHT = 3
    SAMPLE = 4
    ACTIVATION = 5
    GRADIENT = 6
    OPTIMIZER_STATE = 7
    METADATA = 8
    GENERAL = 9


@dataclass(slots=True, eq=False)
class ReplicateConfig:
    """How an object is to be kept. An attribute that Mooncake's class does not have can't be set.

    Used: replica_num (copies on distinct nodes, where the store knows several), with_hard_pin, soft_pin_action and
    soft_pin_ttl_ms (pins against eviction). Checked: group_ids, one a key. All others are accepted and have no effect:
    the pool places copies by itself.
    """

    replica_num: int = 1
    nof_replica_num: int = 0
    dfs_replica_num: int = 0
    soft_pin_action: SoftPinAction = SoftPinAction.PRESERVE
    soft_pin_ttl_ms: int | None = None
    with_hard_pin: bool = False
    preferred_segment: str = ""
    preferred_segments: list[str] = field(default_factory=list)
    preferred_nof_segments: list[str] = field(default_factory=list)
    prefer_alloc_in_same_node: bool = False
    group_ids: list[str] | None = None
    data_type: ObjectDataType = ObjectDataType.UNKNOWN

    def check(self, count: int) -> int:
        """Whether this may be said of `count` keys."""
        if self.replica_num < 1:
            return Code.INVALID_PARAMS
        if self.soft_pin_ttl_ms is not None and self.soft_pin_action is not SoftPinAction.ENABLE:
            return Code.INVALID_PARAMS
        if self.group_ids is not None and len(self.group_ids) != count:
            return Code.INVALID_PARAMS
        return Code.OK


#: For calls that say nothing.
DEFAULT_CONFIG = ReplicateConfig()
