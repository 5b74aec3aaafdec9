from kvpool.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EvictRequest(_message.Message):
    __slots__ = ("namespace_id", "keys", "bytes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    keys: _common_pb2.KeyList
    bytes: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., keys: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., bytes: _Optional[int] = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("blocks", "bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("blocks_total", "blocks_done", "bytes_done", "blocks_failed", "blocks_bad", "done", "message")
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FAILED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_BAD_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    blocks_total: int
    blocks_done: int
    bytes_done: int
    blocks_failed: int
    blocks_bad: int
    done: bool
    message: str
    def __init__(self, blocks_total: _Optional[int] = ..., blocks_done: _Optional[int] = ..., bytes_done: _Optional[int] = ..., blocks_failed: _Optional[int] = ..., blocks_bad: _Optional[int] = ..., done: bool = ..., message: _Optional[str] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("namespace_id", "bytes_per_s_max")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_MAX_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    bytes_per_s_max: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., bytes_per_s_max: _Optional[int] = ...) -> None: ...

class CopyRequest(_message.Message):
    __slots__ = ("from_address", "namespace_id", "keys", "move")
    FROM_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    from_address: str
    namespace_id: bytes
    keys: _common_pb2.KeyList
    move: bool
    def __init__(self, from_address: _Optional[str] = ..., namespace_id: _Optional[bytes] = ..., keys: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., move: bool = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("target_addresses", "undo", "below")
    TARGET_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    target_addresses: _containers.RepeatedScalarFieldContainer[str]
    undo: bool
    below: bool
    def __init__(self, target_addresses: _Optional[_Iterable[str]] = ..., undo: bool = ..., below: bool = ...) -> None: ...

class Quota(_message.Message):
    __slots__ = ("namespace_id", "tenant", "bytes_max", "bytes_used")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    tenant: str
    bytes_max: int
    bytes_used: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., tenant: _Optional[str] = ..., bytes_max: _Optional[int] = ..., bytes_used: _Optional[int] = ...) -> None: ...

class ListQuotasRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListQuotasReply(_message.Message):
    __slots__ = ("quotas",)
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    quotas: _containers.RepeatedCompositeFieldContainer[Quota]
    def __init__(self, quotas: _Optional[_Iterable[_Union[Quota, _Mapping]]] = ...) -> None: ...

class ListPinsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PinInfo(_message.Message):
    __slots__ = ("pin_id", "owner", "session_id", "blocks", "bytes", "expires_in_ms", "kind")
    PIN_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    pin_id: int
    owner: str
    session_id: int
    blocks: int
    bytes: int
    expires_in_ms: int
    kind: str
    def __init__(self, pin_id: _Optional[int] = ..., owner: _Optional[str] = ..., session_id: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., expires_in_ms: _Optional[int] = ..., kind: _Optional[str] = ...) -> None: ...

class ListPinsReply(_message.Message):
    __slots__ = ("pins",)
    PINS_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedCompositeFieldContainer[PinInfo]
    def __init__(self, pins: _Optional[_Iterable[_Union[PinInfo, _Mapping]]] = ...) -> None: ...

class ListNamespacesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NamespaceInfo(_message.Message):
    __slots__ = ("namespace_id", "spec", "blocks", "bytes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    spec: _common_pb2.NamespaceSpec
    blocks: int
    bytes: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., spec: _Optional[_Union[_common_pb2.NamespaceSpec, _Mapping]] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class ListNamespacesReply(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceInfo]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceInfo, _Mapping]]] = ...) -> None: ...

class LinkInfo(_message.Message):
    __slots__ = ("to", "kind", "state", "latency_us", "bytes_per_s", "transfers", "bytes", "errors", "age_ms", "active")
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    to: str
    kind: str
    state: str
    latency_us: float
    bytes_per_s: float
    transfers: int
    bytes: int
    errors: int
    age_ms: int
    active: bool
    def __init__(self, to: _Optional[str] = ..., kind: _Optional[str] = ..., state: _Optional[str] = ..., latency_us: _Optional[float] = ..., bytes_per_s: _Optional[float] = ..., transfers: _Optional[int] = ..., bytes: _Optional[int] = ..., errors: _Optional[int] = ..., age_ms: _Optional[int] = ..., active: bool = ..., **kwargs) -> None: ...

class ListLinksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLinksReply(_message.Message):
    __slots__ = ("links",)
    LINKS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[LinkInfo]
    def __init__(self, links: _Optional[_Iterable[_Union[LinkInfo, _Mapping]]] = ...) -> None: ...

class ReportLinksRequest(_message.Message):
    __slots__ = ("session_id", "links")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    links: _containers.RepeatedCompositeFieldContainer[LinkInfo]
    def __init__(self, session_id: _Optional[int] = ..., links: _Optional[_Iterable[_Union[LinkInfo, _Mapping]]] = ...) -> None: ...

class ReportLinksReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
