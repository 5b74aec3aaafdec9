from kvpool.v1 import directory_pb2 as _directory_pb2
from kvpool.v1 import engine_pb2 as _engine_pb2
from kvpool.v1 import scheduler_pb2 as _scheduler_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogEntry(_message.Message):
    __slots__ = ("scheduler_id", "incarnation", "number", "items")
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    scheduler_id: str
    incarnation: int
    number: int
    items: _containers.RepeatedCompositeFieldContainer[LogItem]
    def __init__(self, scheduler_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., number: _Optional[int] = ..., items: _Optional[_Iterable[_Union[LogItem, _Mapping]]] = ...) -> None: ...

class LogItem(_message.Message):
    __slots__ = ("stream", "restated", "source", "changes", "snapshot", "instance", "report", "ended", "placed", "over", "beat", "want")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    RESTATED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    stream: int
    restated: bool
    source: _directory_pb2.SourceHello
    changes: _directory_pb2.EventBatch
    snapshot: _directory_pb2.Snapshot
    instance: _engine_pb2.EngineInfo
    report: _scheduler_pb2.InstanceReport
    ended: LineEnded
    placed: PlacementMade
    over: PlacementOver
    beat: Beat
    want: Want
    def __init__(self, stream: _Optional[int] = ..., restated: bool = ..., source: _Optional[_Union[_directory_pb2.SourceHello, _Mapping]] = ..., changes: _Optional[_Union[_directory_pb2.EventBatch, _Mapping]] = ..., snapshot: _Optional[_Union[_directory_pb2.Snapshot, _Mapping]] = ..., instance: _Optional[_Union[_engine_pb2.EngineInfo, _Mapping]] = ..., report: _Optional[_Union[_scheduler_pb2.InstanceReport, _Mapping]] = ..., ended: _Optional[_Union[LineEnded, _Mapping]] = ..., placed: _Optional[_Union[PlacementMade, _Mapping]] = ..., over: _Optional[_Union[PlacementOver, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., want: _Optional[_Union[Want, _Mapping]] = ...) -> None: ...

class LineEnded(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PlacementMade(_message.Message):
    __slots__ = ("gateway_id", "request_id", "model", "max_tokens", "prefill_id", "decode_id", "split", "kv_tokens", "prefill_kv_tokens", "prefill_holds", "prefill_us", "prefill_done", "context_tokens", "expected_tokens", "age_us", "decode_ends_in_us", "expires_in_us")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_ID_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_HOLDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    PREFILL_DONE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_ENDS_IN_US_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_US_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, gateway_id: _Optional[str] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ..., max_tokens: _Optional[int] = ..., prefill_id: _Optional[str] = ..., decode_id: _Optional[str] = ..., split: bool = ..., kv_tokens: _Optional[int] = ..., prefill_kv_tokens: _Optional[int] = ..., prefill_holds: bool = ..., prefill_us: _Optional[int] = ..., prefill_done: bool = ..., context_tokens: _Optional[int] = ..., expected_tokens: _Optional[int] = ..., age_us: _Optional[int] = ..., decode_ends_in_us: _Optional[int] = ..., expires_in_us: _Optional[int] = ...) -> None: ...

class PlacementOver(_message.Message):
    __slots__ = ("gateway_id", "request_id", "anyone")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ANYONE_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    request_id: str
    anyone: bool
    def __init__(self, gateway_id: _Optional[str] = ..., request_id: _Optional[str] = ..., anyone: bool = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("address", "sources", "instances")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    address: str
    sources: _containers.RepeatedCompositeFieldContainer[SourceBeat]
    instances: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, address: _Optional[str] = ..., sources: _Optional[_Iterable[_Union[SourceBeat, _Mapping]]] = ..., instances: _Optional[_Iterable[int]] = ...) -> None: ...

class SourceBeat(_message.Message):
    __slots__ = ("stream", "alive", "settled", "seq", "bytes_used", "blocks")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    stream: int
    alive: bool
    settled: bool
    seq: int
    bytes_used: int
    blocks: int
    def __init__(self, stream: _Optional[int] = ..., alive: bool = ..., settled: bool = ..., seq: _Optional[int] = ..., bytes_used: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("scheduler_id", "incarnation", "streams", "everything", "placements")
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    scheduler_id: str
    incarnation: int
    streams: _containers.RepeatedScalarFieldContainer[int]
    everything: bool
    placements: bool
    def __init__(self, scheduler_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., streams: _Optional[_Iterable[int]] = ..., everything: bool = ..., placements: bool = ...) -> None: ...
