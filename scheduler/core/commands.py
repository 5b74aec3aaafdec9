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
    """What would serve the load of late better; see `roles.Proposal`. Nothing is done about it by the core."""

    model: str
    kind: str  # "flip", "add", "remove"
    instance_id: str  # empty for "add"
    role: Role  # to have instead, to add, or that is removed
    why: str


Command: TypeAlias = Placed | Refused | PlacementEnded | AcknowledgeSource | CloseStream | StateChanged | RoleProposed
