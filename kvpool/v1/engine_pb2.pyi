from kvpool.v1 import common_pb2 as _common_pb2
from kvpool.v1 import directory_pb2 as _directory_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_BOTH: _ClassVar[Phase]
    PHASE_PREFILL: _ClassVar[Phase]
    PHASE_DECODE: _ClassVar[Phase]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
    FINISH_REASON_HANDED_OFF: _ClassVar[FinishReason]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_BOTH: _ClassVar[Role]
PHASE_UNSPECIFIED: Phase
PHASE_BOTH: Phase
PHASE_PREFILL: Phase
PHASE_DECODE: Phase
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_ERROR: FinishReason
FINISH_REASON_HANDED_OFF: FinishReason
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_BOTH: Role

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "seed", "stop_token_ids", "ignore_eos", "logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., logprobs: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "token_ids", "phase", "sampling", "root_key", "namespace_id", "pull", "publish_to", "handoff", "use_pool", "deadline_ms", "handoff_source")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ROOT_KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_TO_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    USE_POOL_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_SOURCE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: bytes
    phase: Phase
    sampling: Sampling
    root_key: bytes
    namespace_id: bytes
    pull: _containers.RepeatedCompositeFieldContainer[_directory_pb2.Run]
    publish_to: str
    handoff: _common_pb2.HandoffHold
    use_pool: bool
    deadline_ms: int
    handoff_source: str
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., phase: _Optional[_Union[Phase, str]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., root_key: _Optional[bytes] = ..., namespace_id: _Optional[bytes] = ..., pull: _Optional[_Iterable[_Union[_directory_pb2.Run, _Mapping]]] = ..., publish_to: _Optional[str] = ..., handoff: _Optional[_Union[_common_pb2.HandoffHold, _Mapping]] = ..., use_pool: bool = ..., deadline_ms: _Optional[int] = ..., handoff_source: _Optional[str] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("request_id", "token_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_id: int
    def __init__(self, request_id: _Optional[str] = ..., token_id: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class EngineCommand(_message.Message):
    __slots__ = ("hello", "submit", "first_token", "abort")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    hello: str
    submit: Submit
    first_token: FirstToken
    abort: Abort
    def __init__(self, hello: _Optional[str] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ...) -> None: ...

class RequestEvent(_message.Message):
    __slots__ = ("request_id", "token_ids", "finish_reason", "error", "times", "logprobs", "top2_gaps")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP2_GAPS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: FinishReason
    error: str
    times: RequestTimes
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top2_gaps: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., error: _Optional[str] = ..., times: _Optional[_Union[RequestTimes, _Mapping]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top2_gaps: _Optional[_Iterable[float]] = ...) -> None: ...

class RequestTimes(_message.Message):
    __slots__ = ("queue_us", "pull_us", "prefill_us", "cached_tokens_hbm", "cached_tokens_pool", "bytes_pulled", "computed_tokens", "blocks_published", "pull_failures", "read_us", "exposed_us", "publish_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    PULL_US_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_HBM_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_POOL_FIELD_NUMBER: _ClassVar[int]
    BYTES_PULLED_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    PULL_FAILURES_FIELD_NUMBER: _ClassVar[int]
    READ_US_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_US_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    pull_us: int
    prefill_us: int
    cached_tokens_hbm: int
    cached_tokens_pool: int
    bytes_pulled: int
    computed_tokens: int
    blocks_published: int
    pull_failures: int
    read_us: int
    exposed_us: int
    publish_us: int
    def __init__(self, queue_us: _Optional[int] = ..., pull_us: _Optional[int] = ..., prefill_us: _Optional[int] = ..., cached_tokens_hbm: _Optional[int] = ..., cached_tokens_pool: _Optional[int] = ..., bytes_pulled: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., blocks_published: _Optional[int] = ..., pull_failures: _Optional[int] = ..., read_us: _Optional[int] = ..., exposed_us: _Optional[int] = ..., publish_us: _Optional[int] = ...) -> None: ...

class EngineEvents(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[RequestEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[RequestEvent, _Mapping]]] = ...) -> None: ...

class GetEngineInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineInfo(_message.Message):
    __slots__ = ("instance_id", "epoch", "role", "model", "namespace", "context_tokens_max", "kv_tokens_total", "batch_max", "address", "host_id", "hbm_source_id", "node_source_id", "node_address", "tokenizer", "eos_token_ids", "chunk_tokens", "deterministic", "version", "gpu", "tp", "price_per_hour", "role_changeable", "protocol")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BATCH_MAX_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    HBM_SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    PRICE_PER_HOUR_FIELD_NUMBER: _ClassVar[int]
    ROLE_CHANGEABLE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    epoch: int
    role: Role
    model: str
    namespace: _common_pb2.NamespaceSpec
    context_tokens_max: int
    kv_tokens_total: int
    batch_max: int
    address: str
    host_id: str
    hbm_source_id: str
    node_source_id: str
    node_address: str
    tokenizer: str
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    chunk_tokens: int
    deterministic: bool
    version: str
    gpu: str
    tp: int
    price_per_hour: float
    role_changeable: bool
    protocol: str
    def __init__(self, instance_id: _Optional[str] = ..., epoch: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., model: _Optional[str] = ..., namespace: _Optional[_Union[_common_pb2.NamespaceSpec, _Mapping]] = ..., context_tokens_max: _Optional[int] = ..., kv_tokens_total: _Optional[int] = ..., batch_max: _Optional[int] = ..., address: _Optional[str] = ..., host_id: _Optional[str] = ..., hbm_source_id: _Optional[str] = ..., node_source_id: _Optional[str] = ..., node_address: _Optional[str] = ..., tokenizer: _Optional[str] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., chunk_tokens: _Optional[int] = ..., deterministic: bool = ..., version: _Optional[str] = ..., gpu: _Optional[str] = ..., tp: _Optional[int] = ..., price_per_hour: _Optional[float] = ..., role_changeable: bool = ..., protocol: _Optional[str] = ...) -> None: ...
