"""What the scheduler core asks its shell to do, and its answers. Frozen plain data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kvpool.core.errors import Reason
from kvpool.core.ids import Fidelity, Role, Tier


@dataclass(frozen=True, slots=True)
class Target:
    instance_id: str
    address: str
    epoch: int


@dataclass(frozen=True, slots=True)
class PullRun:
    """`count` keys from key `first` on, to be had from a source at `address`."""

    source_id: str
    tier: Tier
    first: int
    count: int
    group: int
    shard: int
    fidelity: Fidelity
    address: str


@dataclass(frozen=True, slots=True)
class Placed:
    request_id: str
    gateway_id: str
    prefill: Target
    decode: Target
    split: bool
    pull: tuple[PullRun, ...]
    cached_tokens: int
    predicted_ttft_us: int
    handoff_source_id: str
    handoff_address: str
    ttl_ms: int
    waited_us: int = 0  # in the scheduler's queue; contained in the predicted TTFT


@dataclass(frozen=True, slots=True)
class Refused:
    request_id: str
    gateway_id: str
    reason: Reason
    message: str
    retry_after_ms: int


@dataclass(frozen=True, slots=True)
class PlacementEnded:
    """What a placement reserved is free again. `why` is one of ENDINGS."""

    request_id: str
    gateway_id: str
    why: str


#: outcome: the gateway reported it; expired: nobody did in time; the others: what it depended on is gone, or the same
#: gateway placed the same request again.
ENDINGS = ("outcome", "expired", "gateway_gone", "instance_gone", "replaced")


@dataclass(frozen=True, slots=True)
class AcknowledgeSource:
    """Answer on a source's life line."""

    stream: int
    seq: int
    want_snapshot: bool


@dataclass(frozen=True, slots=True)
class CloseStream:
    """End a life line: it was replaced, it was silent for too long, or there is no room for it."""

    stream: int
    reason: str


@dataclass(frozen=True, slots=True)
class StateChanged:
    """For logs and metrics. `kind` is "instance", "source" or "gateway"."""

    kind: str
    id: str
    state: str


@dataclass(frozen=True, slots=True)
class RoleProposed:
    """What would serve the load of late better; see `roles.Proposal`. For logs: `ChangeRole` does it."""

    model: str
    kind: str  # "flip", "add", "remove"
    instance_id: str  # empty for "add"
    role: Role  # to have instead, to add, or that is removed
    why: str


@dataclass(frozen=True, slots=True)
class ChangeRole:
    """Tell an instance on its life line to take a role."""

    stream: int
    instance_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class RoleChanged:
    """An instance has said that it has another role. For logs."""

    instance_id: str
    role: Role
    was: Role


@dataclass(frozen=True, slots=True)
class RoleChangeEnded:
    """For logs. `how`: done; unanswered: not taken in time; undrained: what it forbids goes on still; gone, moved."""

    instance_id: str
    role: Role
    how: str


@dataclass(frozen=True, slots=True)
class RoleRefused:
    """Answer to `RoleOrdered`: why it can't be done."""

    instance_id: str
    role: Role
    why: str


Command: TypeAlias = (
    Placed
    | Refused
    | PlacementEnded
    | AcknowledgeSource
    | CloseStream
    | StateChanged
    | RoleProposed
    | ChangeRole
    | RoleChanged
    | RoleChangeEnded
    | RoleRefused
)
