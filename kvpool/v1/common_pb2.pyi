from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_HBM: _ClassVar[Tier]
    TIER_DRAM: _ClassVar[Tier]
    TIER_SSD: _ClassVar[Tier]

class Fidelity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIDELITY_UNSPECIFIED: _ClassVar[Fidelity]
    FIDELITY_EXACT: _ClassVar[Fidelity]
    FIDELITY_INT8: _ClassVar[Fidelity]

class GroupKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GROUP_KIND_UNSPECIFIED: _ClassVar[GroupKind]
    GROUP_KIND_FULL: _ClassVar[GroupKind]
    GROUP_KIND_WINDOW: _ClassVar[GroupKind]
    GROUP_KIND_MLA: _ClassVar[GroupKind]
    GROUP_KIND_STATE: _ClassVar[GroupKind]
TIER_UNSPECIFIED: Tier
TIER_HBM: Tier
TIER_DRAM: Tier
TIER_SSD: Tier
FIDELITY_UNSPECIFIED: Fidelity
FIDELITY_EXACT: Fidelity
FIDELITY_INT8: Fidelity
GROUP_KIND_UNSPECIFIED: GroupKind
GROUP_KIND_FULL: GroupKind
GROUP_KIND_WINDOW: GroupKind
GROUP_KIND_MLA: GroupKind
GROUP_KIND_STATE: GroupKind

class GroupSpec(_message.Message):
    __slots__ = ("id", "kind", "layers", "block_tokens", "shard_count", "section_count", "block_bytes", "kv_heads", "head_dim", "window_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHARD_COUNT_FIELD_NUMBER: _ClassVar[int]
    SECTION_COUNT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: int
    kind: GroupKind
    layers: _containers.RepeatedScalarFieldContainer[int]
    block_tokens: int
    shard_count: int
    section_count: int
    block_bytes: int
    kv_heads: int
    head_dim: int
    window_tokens: int
    def __init__(self, id: _Optional[int] = ..., kind: _Optional[_Union[GroupKind, str]] = ..., layers: _Optional[_Iterable[int]] = ..., block_tokens: _Optional[int] = ..., shard_count: _Optional[int] = ..., section_count: _Optional[int] = ..., block_bytes: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., window_tokens: _Optional[int] = ...) -> None: ...

class NamespaceSpec(_message.Message):
    __slots__ = ("model", "revision", "dtype", "backend", "layout", "hash", "groups")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    dtype: str
    backend: str
    layout: str
    hash: str
    groups: _containers.RepeatedCompositeFieldContainer[GroupSpec]
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., backend: _Optional[str] = ..., layout: _Optional[str] = ..., hash: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[GroupSpec, _Mapping]]] = ...) -> None: ...

class KeyList(_message.Message):
    __slots__ = ("group", "shard", "keys", "parent")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    group: int
    shard: int
    keys: bytes
    parent: bytes
    def __init__(self, group: _Optional[int] = ..., shard: _Optional[int] = ..., keys: _Optional[bytes] = ..., parent: _Optional[bytes] = ...) -> None: ...

class HandoffHold(_message.Message):
    __slots__ = ("request_id", "ttl_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    ttl_ms: int
    def __init__(self, request_id: _Optional[str] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "hint")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[ErrorDetail.Reason]
        BAD_KEY_LENGTH: _ClassVar[ErrorDetail.Reason]
        BAD_ARGUMENT: _ClassVar[ErrorDetail.Reason]
        UNKNOWN_NAMESPACE: _ClassVar[ErrorDetail.Reason]
        NAMESPACE_MISMATCH: _ClassVar[ErrorDetail.Reason]
        UNKNOWN_SESSION: _ClassVar[ErrorDetail.Reason]
        UNKNOWN_RESERVATION: _ClassVar[ErrorDetail.Reason]
        RESERVATION_EXPIRED: _ClassVar[ErrorDetail.Reason]
        UNKNOWN_LEASE: _ClassVar[ErrorDetail.Reason]
        NO_SPACE: _ClassVar[ErrorDetail.Reason]
        OVERLOADED: _ClassVar[ErrorDetail.Reason]
        PROTOCOL_MISMATCH: _ClassVar[ErrorDetail.Reason]
        UNAUTHENTICATED: _ClassVar[ErrorDetail.Reason]
        UNKNOWN_MODEL: _ClassVar[ErrorDetail.Reason]
        NO_INSTANCE: _ClassVar[ErrorDetail.Reason]
        CONTEXT_TOO_LONG: _ClassVar[ErrorDetail.Reason]
        UNKNOWN_REQUEST: _ClassVar[ErrorDetail.Reason]
        ALREADY_COMMITTED: _ClassVar[ErrorDetail.Reason]
        UNSUPPORTED: _ClassVar[ErrorDetail.Reason]
        SLO_UNREACHABLE: _ClassVar[ErrorDetail.Reason]
        NO_CAPACITY: _ClassVar[ErrorDetail.Reason]
        DEADLINE: _ClassVar[ErrorDetail.Reason]
        QUOTA_EXCEEDED: _ClassVar[ErrorDetail.Reason]
        DRAINING: _ClassVar[ErrorDetail.Reason]
        NO_SSD: _ClassVar[ErrorDetail.Reason]
        UNREACHABLE: _ClassVar[ErrorDetail.Reason]
    REASON_UNSPECIFIED: ErrorDetail.Reason
    BAD_KEY_LENGTH: ErrorDetail.Reason
    BAD_ARGUMENT: ErrorDetail.Reason
    UNKNOWN_NAMESPACE: ErrorDetail.Reason
    NAMESPACE_MISMATCH: ErrorDetail.Reason
    UNKNOWN_SESSION: ErrorDetail.Reason
    UNKNOWN_RESERVATION: ErrorDetail.Reason
    RESERVATION_EXPIRED: ErrorDetail.Reason
    UNKNOWN_LEASE: ErrorDetail.Reason
    NO_SPACE: ErrorDetail.Reason
    OVERLOADED: ErrorDetail.Reason
    PROTOCOL_MISMATCH: ErrorDetail.Reason
    UNAUTHENTICATED: ErrorDetail.Reason
    UNKNOWN_MODEL: ErrorDetail.Reason
    NO_INSTANCE: ErrorDetail.Reason
    CONTEXT_TOO_LONG: ErrorDetail.Reason
    UNKNOWN_REQUEST: ErrorDetail.Reason
    ALREADY_COMMITTED: ErrorDetail.Reason
    UNSUPPORTED: ErrorDetail.Reason
    SLO_UNREACHABLE: ErrorDetail.Reason
    NO_CAPACITY: ErrorDetail.Reason
    DEADLINE: ErrorDetail.Reason
    QUOTA_EXCEEDED: ErrorDetail.Reason
    DRAINING: ErrorDetail.Reason
    NO_SSD: ErrorDetail.Reason
    UNREACHABLE: ErrorDetail.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    reason: ErrorDetail.Reason
    hint: str
    def __init__(self, reason: _Optional[_Union[ErrorDetail.Reason, str]] = ..., hint: _Optional[str] = ...) -> None: ...
