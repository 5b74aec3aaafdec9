from kvpool.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetSourceInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SourceInfo(_message.Message):
    __slots__ = ("source_id", "epoch", "tier", "host_id", "version", "hashes")
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    source_id: str
    epoch: int
    tier: _common_pb2.Tier
    host_id: str
    version: str
    hashes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, source_id: _Optional[str] = ..., epoch: _Optional[int] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., host_id: _Optional[str] = ..., version: _Optional[str] = ..., hashes: _Optional[_Iterable[str]] = ...) -> None: ...

class SessionPing(_message.Message):
    __slots__ = ("hello", "seen", "writing")
    class Hello(_message.Message):
        __slots__ = ("client", "host_id", "writer_lock")
        CLIENT_FIELD_NUMBER: _ClassVar[int]
        HOST_ID_FIELD_NUMBER: _ClassVar[int]
        WRITER_LOCK_FIELD_NUMBER: _ClassVar[int]
        client: str
        host_id: str
        writer_lock: str
        def __init__(self, client: _Optional[str] = ..., host_id: _Optional[str] = ..., writer_lock: _Optional[str] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    WRITING_FIELD_NUMBER: _ClassVar[int]
    hello: SessionPing.Hello
    seen: int
    writing: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hello: _Optional[_Union[SessionPing.Hello, _Mapping]] = ..., seen: _Optional[int] = ..., writing: _Optional[_Iterable[int]] = ...) -> None: ...

class SessionPong(_message.Message):
    __slots__ = ("session_id", "epoch", "ping_interval_ms", "number")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PING_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    epoch: int
    ping_interval_ms: int
    number: int
    def __init__(self, session_id: _Optional[int] = ..., epoch: _Optional[int] = ..., ping_interval_ms: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class RegisterNamespaceRequest(_message.Message):
    __slots__ = ("namespace",)
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace: _common_pb2.NamespaceSpec
    def __init__(self, namespace: _Optional[_Union[_common_pb2.NamespaceSpec, _Mapping]] = ...) -> None: ...

class RegisterNamespaceReply(_message.Message):
    __slots__ = ("namespace_id", "number")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    number: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., number: _Optional[int] = ...) -> None: ...

class OpenChannelRequest(_message.Message):
    __slots__ = ("session_id", "host_id", "channels")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    host_id: str
    channels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_id: _Optional[int] = ..., host_id: _Optional[str] = ..., channels: _Optional[_Iterable[str]] = ...) -> None: ...

class OpenChannelReply(_message.Message):
    __slots__ = ("offers",)
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    offers: _containers.RepeatedCompositeFieldContainer[ChannelOffer]
    def __init__(self, offers: _Optional[_Iterable[_Union[ChannelOffer, _Mapping]]] = ...) -> None: ...

class ChannelOffer(_message.Message):
    __slots__ = ("kind", "parameters")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    parameters: _containers.ScalarMap[str, str]
    def __init__(self, kind: _Optional[str] = ..., parameters: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Descriptors(_message.Message):
    __slots__ = ("offsets", "sizes", "generations", "digests")
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    sizes: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, offsets: _Optional[_Iterable[int]] = ..., sizes: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[int]] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("session_id", "namespace_id", "keys", "ttl_ms", "hold", "fidelity", "sizes", "names", "tenant")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    namespace_id: bytes
    keys: _common_pb2.KeyList
    ttl_ms: int
    hold: _common_pb2.HandoffHold
    fidelity: _common_pb2.Fidelity
    sizes: _containers.RepeatedScalarFieldContainer[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    tenant: str
    def __init__(self, session_id: _Optional[int] = ..., namespace_id: _Optional[bytes] = ..., keys: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., ttl_ms: _Optional[int] = ..., hold: _Optional[_Union[_common_pb2.HandoffHold, _Mapping]] = ..., fidelity: _Optional[_Union[_common_pb2.Fidelity, str]] = ..., sizes: _Optional[_Iterable[int]] = ..., names: _Optional[_Iterable[str]] = ..., tenant: _Optional[str] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("reservation_id", "status", "slots")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[ReserveReply.Status]
        RESERVED: _ClassVar[ReserveReply.Status]
        EXISTS: _ClassVar[ReserveReply.Status]
        BEING_WRITTEN: _ClassVar[ReserveReply.Status]
        NO_SPACE: _ClassVar[ReserveReply.Status]
        OVER_QUOTA: _ClassVar[ReserveReply.Status]
    STATUS_UNSPECIFIED: ReserveReply.Status
    RESERVED: ReserveReply.Status
    EXISTS: ReserveReply.Status
    BEING_WRITTEN: ReserveReply.Status
    NO_SPACE: ReserveReply.Status
    OVER_QUOTA: ReserveReply.Status
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    status: _containers.RepeatedScalarFieldContainer[ReserveReply.Status]
    slots: Descriptors
    def __init__(self, reservation_id: _Optional[int] = ..., status: _Optional[_Iterable[_Union[ReserveReply.Status, str]]] = ..., slots: _Optional[_Union[Descriptors, _Mapping]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("session_id", "reservation_id", "indices", "sections", "digests")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    reservation_id: int
    indices: _containers.RepeatedScalarFieldContainer[int]
    sections: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[int] = ..., reservation_id: _Optional[int] = ..., indices: _Optional[_Iterable[int]] = ..., sections: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[int]] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("blocks_complete",)
    BLOCKS_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    blocks_complete: int
    def __init__(self, blocks_complete: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("session_id", "reservation_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    reservation_id: int
    def __init__(self, session_id: _Optional[int] = ..., reservation_id: _Optional[int] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ("blocks_dropped",)
    BLOCKS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    blocks_dropped: int
    def __init__(self, blocks_dropped: _Optional[int] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("session_id", "namespace_id", "keys", "ttl_ms", "handoff_request_id", "fidelity_min", "promote_ms", "names", "incomplete")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_MIN_FIELD_NUMBER: _ClassVar[int]
    PROMOTE_MS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    namespace_id: bytes
    keys: _common_pb2.KeyList
    ttl_ms: int
    handoff_request_id: str
    fidelity_min: _common_pb2.Fidelity
    promote_ms: int
    names: _containers.RepeatedScalarFieldContainer[str]
    incomplete: bool
    def __init__(self, session_id: _Optional[int] = ..., namespace_id: _Optional[bytes] = ..., keys: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., ttl_ms: _Optional[int] = ..., handoff_request_id: _Optional[str] = ..., fidelity_min: _Optional[_Union[_common_pb2.Fidelity, str]] = ..., promote_ms: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., incomplete: bool = ...) -> None: ...

class LeaseReply(_message.Message):
    __slots__ = ("lease_id", "found", "blocks", "fidelity", "tiers", "sections")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    found: _containers.RepeatedScalarFieldContainer[bool]
    blocks: Descriptors
    fidelity: _containers.RepeatedScalarFieldContainer[_common_pb2.Fidelity]
    tiers: _containers.RepeatedScalarFieldContainer[_common_pb2.Tier]
    sections: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_id: _Optional[int] = ..., found: _Optional[_Iterable[bool]] = ..., blocks: _Optional[_Union[Descriptors, _Mapping]] = ..., fidelity: _Optional[_Iterable[_Union[_common_pb2.Fidelity, str]]] = ..., tiers: _Optional[_Iterable[_Union[_common_pb2.Tier, str]]] = ..., sections: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("session_id", "lease_ids", "corrupt", "namespace_id", "handoff_request_id", "handed_off")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HANDED_OFF_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    corrupt: _common_pb2.KeyList
    namespace_id: bytes
    handoff_request_id: str
    handed_off: _common_pb2.KeyList
    def __init__(self, session_id: _Optional[int] = ..., lease_ids: _Optional[_Iterable[int]] = ..., corrupt: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., namespace_id: _Optional[bytes] = ..., handoff_request_id: _Optional[str] = ..., handed_off: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AwaitRequest(_message.Message):
    __slots__ = ("session_id", "namespace_id", "keys", "deadline_ms", "absent_is_abandoned")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    ABSENT_IS_ABANDONED_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    namespace_id: bytes
    keys: _common_pb2.KeyList
    deadline_ms: int
    absent_is_abandoned: bool
    def __init__(self, session_id: _Optional[int] = ..., namespace_id: _Optional[bytes] = ..., keys: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., deadline_ms: _Optional[int] = ..., absent_is_abandoned: bool = ...) -> None: ...

class AwaitReply(_message.Message):
    __slots__ = ("indices", "states", "sections")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[AwaitReply.State]
        COMMITTED: _ClassVar[AwaitReply.State]
        ABANDONED: _ClassVar[AwaitReply.State]
        DEADLINE: _ClassVar[AwaitReply.State]
        SECTION: _ClassVar[AwaitReply.State]
    STATE_UNSPECIFIED: AwaitReply.State
    COMMITTED: AwaitReply.State
    ABANDONED: AwaitReply.State
    DEADLINE: AwaitReply.State
    SECTION: AwaitReply.State
    INDICES_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    indices: _containers.RepeatedScalarFieldContainer[int]
    states: _containers.RepeatedScalarFieldContainer[AwaitReply.State]
    sections: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, indices: _Optional[_Iterable[int]] = ..., states: _Optional[_Iterable[_Union[AwaitReply.State, str]]] = ..., sections: _Optional[_Iterable[int]] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("session_id", "namespace_id", "keys", "ttl_ms", "owner")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    namespace_id: bytes
    keys: _common_pb2.KeyList
    ttl_ms: int
    owner: str
    def __init__(self, session_id: _Optional[int] = ..., namespace_id: _Optional[bytes] = ..., keys: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., ttl_ms: _Optional[int] = ..., owner: _Optional[str] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("pin_id", "found")
    PIN_ID_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    pin_id: int
    found: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, pin_id: _Optional[int] = ..., found: _Optional[_Iterable[bool]] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("session_id", "pin_id", "owner")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PIN_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    pin_id: int
    owner: str
    def __init__(self, session_id: _Optional[int] = ..., pin_id: _Optional[int] = ..., owner: _Optional[str] = ...) -> None: ...

class UnpinReply(_message.Message):
    __slots__ = ("pins_released",)
    PINS_RELEASED_FIELD_NUMBER: _ClassVar[int]
    pins_released: int
    def __init__(self, pins_released: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("namespace_id", "keys", "names")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    keys: _common_pb2.KeyList
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, namespace_id: _Optional[bytes] = ..., keys: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("found", "tiers")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    found: _containers.RepeatedScalarFieldContainer[bool]
    tiers: _containers.RepeatedScalarFieldContainer[_common_pb2.Tier]
    def __init__(self, found: _Optional[_Iterable[bool]] = ..., tiers: _Optional[_Iterable[_Union[_common_pb2.Tier, str]]] = ...) -> None: ...

class RemoveRequest(_message.Message):
    __slots__ = ("namespace_id", "keys", "all", "name_prefix", "digests")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    NAME_PREFIX_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    keys: _common_pb2.KeyList
    all: bool
    name_prefix: str
    digests: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, namespace_id: _Optional[bytes] = ..., keys: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., all: bool = ..., name_prefix: _Optional[str] = ..., digests: _Optional[_Iterable[int]] = ...) -> None: ...

class RemoveReply(_message.Message):
    __slots__ = ("blocks_removed",)
    BLOCKS_REMOVED_FIELD_NUMBER: _ClassVar[int]
    blocks_removed: int
    def __init__(self, blocks_removed: _Optional[int] = ...) -> None: ...

class ListBlocksRequest(_message.Message):
    __slots__ = ("cursor", "limit", "namespace_id", "name_prefix", "keys", "below")
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_PREFIX_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    cursor: int
    limit: int
    namespace_id: bytes
    name_prefix: str
    keys: bytes
    below: bool
    def __init__(self, cursor: _Optional[int] = ..., limit: _Optional[int] = ..., namespace_id: _Optional[bytes] = ..., name_prefix: _Optional[str] = ..., keys: _Optional[bytes] = ..., below: bool = ...) -> None: ...

class BlockInfo(_message.Message):
    __slots__ = ("key", "namespace_id", "tier", "fidelity", "offset", "size", "generation", "leases", "pins", "state", "name", "tenant", "section_count", "on_ssd")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SECTION_COUNT_FIELD_NUMBER: _ClassVar[int]
    ON_SSD_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    namespace_id: bytes
    tier: _common_pb2.Tier
    fidelity: _common_pb2.Fidelity
    offset: int
    size: int
    generation: int
    leases: int
    pins: int
    state: str
    name: str
    tenant: str
    section_count: int
    on_ssd: bool
    def __init__(self, key: _Optional[bytes] = ..., namespace_id: _Optional[bytes] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., fidelity: _Optional[_Union[_common_pb2.Fidelity, str]] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ..., generation: _Optional[int] = ..., leases: _Optional[int] = ..., pins: _Optional[int] = ..., state: _Optional[str] = ..., name: _Optional[str] = ..., tenant: _Optional[str] = ..., section_count: _Optional[int] = ..., on_ssd: bool = ...) -> None: ...

class ListBlocksReply(_message.Message):
    __slots__ = ("blocks", "next_cursor")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockInfo]
    next_cursor: int
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockInfo, _Mapping]]] = ..., next_cursor: _Optional[int] = ...) -> None: ...

class GetSourceStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SourceStats(_message.Message):
    __slots__ = ("bytes_total", "bytes_used", "blocks", "blocks_writing", "sessions", "leases", "pins", "reservations", "quarantined", "waiters", "hits", "misses", "evictions", "bytes_read", "bytes_written", "digest_errors", "bytes_free", "bytes_largest_extent", "fragmentation", "entries_total", "pins_detached", "eviction", "draining", "adopted", "touches", "expired", "ssd")
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_WRITING_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    WAITERS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    BYTES_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_ERRORS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    BYTES_LARGEST_EXTENT_FIELD_NUMBER: _ClassVar[int]
    FRAGMENTATION_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PINS_DETACHED_FIELD_NUMBER: _ClassVar[int]
    EVICTION_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    TOUCHES_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    SSD_FIELD_NUMBER: _ClassVar[int]
    bytes_total: int
    bytes_used: int
    blocks: int
    blocks_writing: int
    sessions: int
    leases: int
    pins: int
    reservations: int
    quarantined: int
    waiters: int
    hits: int
    misses: int
    evictions: int
    bytes_read: int
    bytes_written: int
    digest_errors: int
    bytes_free: int
    bytes_largest_extent: int
    fragmentation: float
    entries_total: int
    pins_detached: int
    eviction: str
    draining: bool
    adopted: int
    touches: int
    expired: int
    ssd: SsdStats
    def __init__(self, bytes_total: _Optional[int] = ..., bytes_used: _Optional[int] = ..., blocks: _Optional[int] = ..., blocks_writing: _Optional[int] = ..., sessions: _Optional[int] = ..., leases: _Optional[int] = ..., pins: _Optional[int] = ..., reservations: _Optional[int] = ..., quarantined: _Optional[int] = ..., waiters: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., evictions: _Optional[int] = ..., bytes_read: _Optional[int] = ..., bytes_written: _Optional[int] = ..., digest_errors: _Optional[int] = ..., bytes_free: _Optional[int] = ..., bytes_largest_extent: _Optional[int] = ..., fragmentation: _Optional[float] = ..., entries_total: _Optional[int] = ..., pins_detached: _Optional[int] = ..., eviction: _Optional[str] = ..., draining: bool = ..., adopted: _Optional[int] = ..., touches: _Optional[int] = ..., expired: _Optional[int] = ..., ssd: _Optional[_Union[SsdStats, _Mapping]] = ...) -> None: ...

class SsdStats(_message.Message):
    __slots__ = ("state", "bytes_total", "bytes_live", "bytes_dead", "bytes_free", "records", "hits", "demotions", "evictions", "io_errors", "digest_errors", "recovery_s", "recovered_bytes", "reason", "evictions_unsaved")
    STATE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_LIVE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DEAD_FIELD_NUMBER: _ClassVar[int]
    BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    DEMOTIONS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    IO_ERRORS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_ERRORS_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_S_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_UNSAVED_FIELD_NUMBER: _ClassVar[int]
    state: str
    bytes_total: int
    bytes_live: int
    bytes_dead: int
    bytes_free: int
    records: int
    hits: int
    demotions: int
    evictions: int
    io_errors: int
    digest_errors: int
    recovery_s: float
    recovered_bytes: int
    reason: str
    evictions_unsaved: int
    def __init__(self, state: _Optional[str] = ..., bytes_total: _Optional[int] = ..., bytes_live: _Optional[int] = ..., bytes_dead: _Optional[int] = ..., bytes_free: _Optional[int] = ..., records: _Optional[int] = ..., hits: _Optional[int] = ..., demotions: _Optional[int] = ..., evictions: _Optional[int] = ..., io_errors: _Optional[int] = ..., digest_errors: _Optional[int] = ..., recovery_s: _Optional[float] = ..., recovered_bytes: _Optional[int] = ..., reason: _Optional[str] = ..., evictions_unsaved: _Optional[int] = ...) -> None: ...
