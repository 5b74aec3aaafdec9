"""Facts that enter the scheduler core. Frozen plain data only: what is here can be journalled and replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kvpool.core.changes import BlockChange
from kvpool.core.ids import Fidelity, Role, Tier
from kvpool.core.namespace import NamespaceSpec

# A `stream` is a number that the shell gives to each life line, never twice. An end of a stream then can't be
# mistaken for the end of the newer one by which the same process has come back.


@dataclass(frozen=True, slots=True)
class SourceAttached:
    stream: int
    source_id: str
    epoch: int
    tier: Tier
    address: str
    host_id: str
    instance_id: str
    bytes_total: int
    peer: str = ""  # scheduler whose life line this is; empty = this one's


@dataclass(frozen=True, slots=True)
class BlocksChanged:
    stream: int
    seq: int
    changes: tuple[BlockChange, ...]


@dataclass(frozen=True, slots=True)
class SnapshotReceived:
    """One part of all that a source holds, as of batch `seq`. Keys are packed and qualified."""

    stream: int
    seq: int
    part: int
    last: bool
    keys: bytes
    fidelity: Fidelity


@dataclass(frozen=True, slots=True)
class SourceHeartbeat:
    stream: int
    bytes_used: int
    blocks: int


@dataclass(frozen=True, slots=True)
class SourcesHeard:
    """Another scheduler hears these sources still: (life line here, bytes used) of each."""

    heard: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SourceDetached:
    stream: int


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """What an instance says of itself when it joins; see EngineInfo in the .proto for each field."""

    instance_id: str
    epoch: int
    role: Role
    model: str
    namespace: NamespaceSpec
    context_tokens_max: int
    kv_tokens_total: int
    batch_max: int
    address: str
    host_id: str
    hbm_source_id: str
    node_source_id: str
    node_address: str
    tokenizer: str = ""
    eos_token_ids: tuple[int, ...] = ()
    chunk_tokens: int = 0
    deterministic: bool = False
    version: str = ""
    namespace_id: bytes = b""  # id of `namespace`
    gpu: str = ""
    tp: int = 1  # GPUs that serve one copy of the model
    price_per_hour: float = 0.0  # of the whole instance
    role_changeable: bool = False  # whether a proposal of another role may be carried out
    protocol: str = "kvpool"  # how requests reach it


@dataclass(frozen=True, slots=True)
class InstanceJoined:
    stream: int
    info: InstanceInfo
    peer: str = ""  # scheduler whose life line this is; empty = this one's


@dataclass(frozen=True, slots=True)
class PrefillSample:
    new_tokens: int
    cached_tokens: int
    duration_us: int


@dataclass(frozen=True, slots=True)
class DecodeSample:
    batch: int
    kv_tokens: int
    duration_us: int


@dataclass(frozen=True, slots=True)
class LinkSample:
    source_id: str
    bytes: int
    duration_us: int
    failed: bool
    channel_count: int


@dataclass(frozen=True, slots=True)
class InstanceReported:
    stream: int
    running: int
    waiting: int
    kv_tokens_free: int
    prefill: tuple[PrefillSample, ...]
    decode: tuple[DecodeSample, ...]
    links: tuple[LinkSample, ...]
    finished_prefills: tuple[str, ...]
    draining: bool
    role: Role | None = None  # that it has now; None = it does not say


@dataclass(frozen=True, slots=True)
class InstanceLeft:
    stream: int


@dataclass(frozen=True, slots=True)
class RoleOrdered:
    """An operator wants an instance to have a role."""

    instance_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class GatewayOpened:
    stream: int
    gateway_id: str


@dataclass(frozen=True, slots=True)
class GatewayHeartbeat:
    stream: int
    active_requests: int


@dataclass(frozen=True, slots=True)
class GatewayClosed:
    stream: int


@dataclass(frozen=True, slots=True)
class KeyBatch:
    """Full blocks of a prompt, of one group and shard. Keys are packed and qualified."""

    group: int
    shard: int
    keys: bytes


@dataclass(frozen=True, slots=True)
class PlaceRequested:
    request_id: str
    gateway_id: str
    model: str
    keys: tuple[KeyBatch, ...]
    prompt_tokens: int
    max_tokens: int
    ttft_slo_us: int
    tpot_slo_us: int
    policy: str
    use_pool: bool
    sticky_key: str
    exclude_instances: tuple[str, ...]
    fidelity_min: Fidelity
    namespace_id: bytes = b""  # of the keys; empty = any
    priority: int = 0  # higher first
    tenant: str = ""
    tenant_weight: float = 1.0  # share against other tenants while there is a queue
    wait_us_max: int | None = None  # longest wait for a place; None = the scheduler's own, 0 = now or never


@dataclass(frozen=True, slots=True)
class PlaceCancelled:
    """Nobody waits for this placement any more. One that was made already is not touched: its outcome ends it."""

    request_id: str
    gateway_id: str


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """What a request cost on one instance; see RequestTimes in the .proto."""

    queue_us: int = 0
    pull_us: int = 0
    prefill_us: int = 0
    cached_tokens_hbm: int = 0
    cached_tokens_pool: int = 0
    bytes_pulled: int = 0
    computed_tokens: int = 0
    blocks_published: int = 0
    pull_failures: int = 0
    read_us: int = 0
    exposed_us: int = 0
    publish_us: int = 0


@dataclass(frozen=True, slots=True)
class OutcomeReported:
    """How a request went. With `first_token` the end is still to come."""

    stream: int
    request_id: str
    first_token: bool
    ttft_us: int
    duration_us: int
    tokens: int
    finish_reason: str
    error: str
    prefill: RequestTimes
    decode: RequestTimes


@dataclass(frozen=True, slots=True)
class PeerPlaced:
    """Another scheduler placed a request: what that holds is held here too. Times are relative: clocks differ."""

    peer: str
    gateway_id: str
    request_id: str
    model: str
    max_tokens: int
    prefill_id: str
    decode_id: str
    split: bool
    kv_tokens: int
    prefill_kv_tokens: int
    prefill_holds: bool
    prefill_us: int
    prefill_done: bool
    context_tokens: int
    expected_tokens: int
    age_us: int
    decode_ends_in_us: int
    expires_in_us: int


@dataclass(frozen=True, slots=True)
class PeerEnded:
    """Another scheduler knows that a placement has ended. `peer` made it: empty = this one, None = whoever did."""

    gateway_id: str
    request_id: str
    peer: str | None


@dataclass(frozen=True, slots=True)
class PeerForgotten:
    """Some of what a scheduler said was lost: its placements are forgotten until it has said them again."""

    peer: str


@dataclass(frozen=True, slots=True)
class EventLogChanged:
    """Whether other schedulers can be heard."""

    up: bool


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing happened but time; the shell sends it when `next_deadline_us` is due."""


Event: TypeAlias = (
    SourceAttached
    | BlocksChanged
    | SnapshotReceived
    | SourceHeartbeat
    | SourcesHeard
    | SourceDetached
    | InstanceJoined
    | InstanceReported
    | InstanceLeft
    | RoleOrdered
    | GatewayOpened
    | GatewayHeartbeat
    | GatewayClosed
    | PlaceRequested
    | PlaceCancelled
    | OutcomeReported
    | PeerPlaced
    | PeerEnded
    | PeerForgotten
    | EventLogChanged
    | TimePassed
)
