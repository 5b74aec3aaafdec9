from kvpool.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SourceHello(_message.Message):
    __slots__ = ("source_id", "epoch", "tier", "address", "host_id", "instance_id", "bytes_total")
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    source_id: str
    epoch: int
    tier: _common_pb2.Tier
    address: str
    host_id: str
    instance_id: str
    bytes_total: int
    def __init__(self, source_id: _Optional[str] = ..., epoch: _Optional[int] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., address: _Optional[str] = ..., host_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., bytes_total: _Optional[int] = ...) -> None: ...

class SourceMessage(_message.Message):
    __slots__ = ("hello", "events", "snapshot", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: SourceHello
    events: EventBatch
    snapshot: Snapshot
    heartbeat: SourceHeartbeat
    def __init__(self, hello: _Optional[_Union[SourceHello, _Mapping]] = ..., events: _Optional[_Union[EventBatch, _Mapping]] = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., heartbeat: _Optional[_Union[SourceHeartbeat, _Mapping]] = ...) -> None: ...

class EventBatch(_message.Message):
    __slots__ = ("seq", "events")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    events: _containers.RepeatedCompositeFieldContainer[BlockEvent]
    def __init__(self, seq: _Optional[int] = ..., events: _Optional[_Iterable[_Union[BlockEvent, _Mapping]]] = ...) -> None: ...

class BlockEvent(_message.Message):
    __slots__ = ("kind", "keys", "fidelity")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[BlockEvent.Kind]
        STORED: _ClassVar[BlockEvent.Kind]
        REMOVED: _ClassVar[BlockEvent.Kind]
        CLEARED: _ClassVar[BlockEvent.Kind]
    KIND_UNSPECIFIED: BlockEvent.Kind
    STORED: BlockEvent.Kind
    REMOVED: BlockEvent.Kind
    CLEARED: BlockEvent.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    kind: BlockEvent.Kind
    keys: _common_pb2.KeyList
    fidelity: _common_pb2.Fidelity
    def __init__(self, kind: _Optional[_Union[BlockEvent.Kind, str]] = ..., keys: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., fidelity: _Optional[_Union[_common_pb2.Fidelity, str]] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("seq", "part", "last", "keys", "fidelity")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    seq: int
    part: int
    last: bool
    keys: _common_pb2.KeyList
    fidelity: _common_pb2.Fidelity
    def __init__(self, seq: _Optional[int] = ..., part: _Optional[int] = ..., last: bool = ..., keys: _Optional[_Union[_common_pb2.KeyList, _Mapping]] = ..., fidelity: _Optional[_Union[_common_pb2.Fidelity, str]] = ...) -> None: ...

class SourceHeartbeat(_message.Message):
    __slots__ = ("bytes_used", "blocks")
    BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    bytes_used: int
    blocks: int
    def __init__(self, bytes_used: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class DirectoryMessage(_message.Message):
    __slots__ = ("acknowledged_seq", "want_snapshot", "heartbeat_interval_ms")
    ACKNOWLEDGED_SEQ_FIELD_NUMBER: _ClassVar[int]
    WANT_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    acknowledged_seq: int
    want_snapshot: bool
    heartbeat_interval_ms: int
    def __init__(self, acknowledged_seq: _Optional[int] = ..., want_snapshot: bool = ..., heartbeat_interval_ms: _Optional[int] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[_common_pb2.KeyList]
    def __init__(self, keys: _Optional[_Iterable[_Union[_common_pb2.KeyList, _Mapping]]] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("source_id", "tier", "first", "count", "group", "shard", "fidelity", "address")
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    source_id: str
    tier: _common_pb2.Tier
    first: int
    count: int
    group: int
    shard: int
    fidelity: _common_pb2.Fidelity
    address: str
    def __init__(self, source_id: _Optional[str] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., first: _Optional[int] = ..., count: _Optional[int] = ..., group: _Optional[int] = ..., shard: _Optional[int] = ..., fidelity: _Optional[_Union[_common_pb2.Fidelity, str]] = ..., address: _Optional[str] = ...) -> None: ...

class MatchReply(_message.Message):
    __slots__ = ("covered", "runs")
    COVERED_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    covered: int
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    def __init__(self, covered: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[Run, _Mapping]]] = ...) -> None: ...

class ListSourcesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SourceStatus(_message.Message):
    __slots__ = ("source", "state", "blocks", "bytes_used", "seq", "heartbeat_age_ms", "gaps")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    source: SourceHello
    state: str
    blocks: int
    bytes_used: int
    seq: int
    heartbeat_age_ms: int
    gaps: int
    def __init__(self, source: _Optional[_Union[SourceHello, _Mapping]] = ..., state: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes_used: _Optional[int] = ..., seq: _Optional[int] = ..., heartbeat_age_ms: _Optional[int] = ..., gaps: _Optional[int] = ...) -> None: ...

class ListSourcesReply(_message.Message):
    __slots__ = ("sources",)
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedCompositeFieldContainer[SourceStatus]
    def __init__(self, sources: _Optional[_Iterable[_Union[SourceStatus, _Mapping]]] = ...) -> None: ...
