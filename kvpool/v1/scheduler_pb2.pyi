from kvpool.v1 import common_pb2 as _common_pb2
from kvpool.v1 import directory_pb2 as _directory_pb2
from kvpool.v1 import engine_pb2 as _engine_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InstanceMessage(_message.Message):
    __slots__ = ("info", "report")
    INFO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    info: _engine_pb2.EngineInfo
    report: InstanceReport
    def __init__(self, info: _Optional[_Union[_engine_pb2.EngineInfo, _Mapping]] = ..., report: _Optional[_Union[InstanceReport, _Mapping]] = ...) -> None: ...

class InstanceReport(_message.Message):
    __slots__ = ("running", "waiting", "kv_tokens_free", "prefill", "decode", "links", "finished_prefills", "draining", "role")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FREE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_PREFILLS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    kv_tokens_free: int
    prefill: _containers.RepeatedCompositeFieldContainer[PrefillSample]
    decode: _containers.RepeatedCompositeFieldContainer[DecodeSample]
    links: _containers.RepeatedCompositeFieldContainer[LinkSample]
    finished_prefills: _containers.RepeatedScalarFieldContainer[str]
    draining: bool
    role: _engine_pb2.Role
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_tokens_free: _Optional[int] = ..., prefill: _Optional[_Iterable[_Union[PrefillSample, _Mapping]]] = ..., decode: _Optional[_Iterable[_Union[DecodeSample, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[LinkSample, _Mapping]]] = ..., finished_prefills: _Optional[_Iterable[str]] = ..., draining: bool = ..., role: _Optional[_Union[_engine_pb2.Role, str]] = ...) -> None: ...

class PrefillSample(_message.Message):
    __slots__ = ("new_tokens", "cached_tokens", "duration_us")
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    new_tokens: int
    cached_tokens: int
    duration_us: int
    def __init__(self, new_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., duration_us: _Optional[int] = ...) -> None: ...

class DecodeSample(_message.Message):
    __slots__ = ("batch", "kv_tokens", "duration_us")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    batch: int
    kv_tokens: int
    duration_us: int
    def __init__(self, batch: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., duration_us: _Optional[int] = ...) -> None: ...

class LinkSample(_message.Message):
    __slots__ = ("source_id", "bytes", "duration_us", "failed", "channel_count")
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_COUNT_FIELD_NUMBER: _ClassVar[int]
    source_id: str
    bytes: int
    duration_us: int
    failed: bool
    channel_count: int
    def __init__(self, source_id: _Optional[str] = ..., bytes: _Optional[int] = ..., duration_us: _Optional[int] = ..., failed: bool = ..., channel_count: _Optional[int] = ...) -> None: ...

class SchedulerMessage(_message.Message):
    __slots__ = ("report_interval_ms", "scheduler_id", "role")
    REPORT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    report_interval_ms: int
    scheduler_id: str
    role: _engine_pb2.Role
    def __init__(self, report_interval_ms: _Optional[int] = ..., scheduler_id: _Optional[str] = ..., role: _Optional[_Union[_engine_pb2.Role, str]] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("gateway_id",)
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    def __init__(self, gateway_id: _Optional[str] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("request_id", "ttft_us", "duration_us", "tokens", "finish_reason", "error", "prefill", "decode", "first_token")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TTFT_US_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    ttft_us: int
    duration_us: int
    tokens: int
    finish_reason: str
    error: str
    prefill: _engine_pb2.RequestTimes
    decode: _engine_pb2.RequestTimes
    first_token: bool
    def __init__(self, request_id: _Optional[str] = ..., ttft_us: _Optional[int] = ..., duration_us: _Optional[int] = ..., tokens: _Optional[int] = ..., finish_reason: _Optional[str] = ..., error: _Optional[str] = ..., prefill: _Optional[_Union[_engine_pb2.RequestTimes, _Mapping]] = ..., decode: _Optional[_Union[_engine_pb2.RequestTimes, _Mapping]] = ..., first_token: bool = ...) -> None: ...

class GatewayMessage(_message.Message):
    __slots__ = ("hello", "outcome", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    outcome: Outcome
    heartbeat: GatewayHeartbeat
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., heartbeat: _Optional[_Union[GatewayHeartbeat, _Mapping]] = ...) -> None: ...

class GatewayHeartbeat(_message.Message):
    __slots__ = ("active_requests",)
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    active_requests: int
    def __init__(self, active_requests: _Optional[int] = ...) -> None: ...

class PlaceRequest(_message.Message):
    __slots__ = ("request_id", "gateway_id", "model", "keys", "prompt_tokens", "max_tokens", "ttft_slo_ms", "tpot_slo_ms", "policy", "use_pool", "sticky_key", "exclude_instances", "fidelity_min", "namespace_id", "priority", "tenant", "tenant_weight", "wait_ms_max")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    TPOT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    USE_POOL_FIELD_NUMBER: _ClassVar[int]
    STICKY_KEY_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_INSTANCES_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_MIN_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TENANT_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    gateway_id: str
    model: str
    keys: _containers.RepeatedCompositeFieldContainer[_common_pb2.KeyList]
    prompt_tokens: int
    max_tokens: int
    ttft_slo_ms: int
    tpot_slo_ms: int
    policy: str
    use_pool: bool
    sticky_key: str
    exclude_instances: _containers.RepeatedScalarFieldContainer[str]
    fidelity_min: _common_pb2.Fidelity
    namespace_id: bytes
    priority: int
    tenant: str
    tenant_weight: float
    wait_ms_max: int
    def __init__(self, request_id: _Optional[str] = ..., gateway_id: _Optional[str] = ..., model: _Optional[str] = ..., keys: _Optional[_Iterable[_Union[_common_pb2.KeyList, _Mapping]]] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., ttft_slo_ms: _Optional[int] = ..., tpot_slo_ms: _Optional[int] = ..., policy: _Optional[str] = ..., use_pool: bool = ..., sticky_key: _Optional[str] = ..., exclude_instances: _Optional[_Iterable[str]] = ..., fidelity_min: _Optional[_Union[_common_pb2.Fidelity, str]] = ..., namespace_id: _Optional[bytes] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., tenant_weight: _Optional[float] = ..., wait_ms_max: _Optional[int] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("instance_id", "address", "epoch")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    address: str
    epoch: int
    def __init__(self, instance_id: _Optional[str] = ..., address: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("prefill", "decode", "split", "pull", "cached_tokens", "predicted_ttft_us", "handoff_source_id", "handoff_address", "ttl_ms", "waited_us")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_US_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    WAITED_US_FIELD_NUMBER: _ClassVar[int]
    prefill: Target
    decode: Target
    split: bool
    pull: _containers.RepeatedCompositeFieldContainer[_directory_pb2.Run]
    cached_tokens: int
    predicted_ttft_us: int
    handoff_source_id: str
    handoff_address: str
    ttl_ms: int
    waited_us: int
    def __init__(self, prefill: _Optional[_Union[Target, _Mapping]] = ..., decode: _Optional[_Union[Target, _Mapping]] = ..., split: bool = ..., pull: _Optional[_Iterable[_Union[_directory_pb2.Run, _Mapping]]] = ..., cached_tokens: _Optional[int] = ..., predicted_ttft_us: _Optional[int] = ..., handoff_source_id: _Optional[str] = ..., handoff_address: _Optional[str] = ..., ttl_ms: _Optional[int] = ..., waited_us: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "message", "retry_after_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.ErrorDetail.Reason
    message: str
    retry_after_ms: int
    def __init__(self, reason: _Optional[_Union[_common_pb2.ErrorDetail.Reason, str]] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class PlaceReply(_message.Message):
    __slots__ = ("placement", "refusal")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    placement: Placement
    refusal: Refusal
    def __init__(self, placement: _Optional[_Union[Placement, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("model", "namespace", "tokenizer", "context_tokens_max", "instances", "eos_token_ids", "protocol")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    model: str
    namespace: _common_pb2.NamespaceSpec
    tokenizer: str
    context_tokens_max: int
    instances: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    protocol: str
    def __init__(self, model: _Optional[str] = ..., namespace: _Optional[_Union[_common_pb2.NamespaceSpec, _Mapping]] = ..., tokenizer: _Optional[str] = ..., context_tokens_max: _Optional[int] = ..., instances: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., protocol: _Optional[str] = ...) -> None: ...

class ListModelsReply(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class ListInstancesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InstanceStatus(_message.Message):
    __slots__ = ("info", "state", "running", "waiting", "kv_tokens_free", "kv_tokens_reserved", "queue_us", "report_age_ms", "hbm_blocks", "prefill_base_us", "prefill_per_token_us", "prefill_attention_us", "decode_base_us", "decode_per_sequence_us", "decode_per_kv_token_us", "prediction_errors", "ttft_overhead_us", "ttft_factor", "requests_waiting", "role_ordered", "role_drains")
    INFO_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_RESERVED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    REPORT_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    HBM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BASE_US_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PER_TOKEN_US_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ATTENTION_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_BASE_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_PER_SEQUENCE_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_PER_KV_TOKEN_US_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_ERRORS_FIELD_NUMBER: _ClassVar[int]
    TTFT_OVERHEAD_US_FIELD_NUMBER: _ClassVar[int]
    TTFT_FACTOR_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    ROLE_ORDERED_FIELD_NUMBER: _ClassVar[int]
    ROLE_DRAINS_FIELD_NUMBER: _ClassVar[int]
    info: _engine_pb2.EngineInfo
    state: str
    running: int
    waiting: int
    kv_tokens_free: int
    kv_tokens_reserved: int
    queue_us: int
    report_age_ms: int
    hbm_blocks: int
    prefill_base_us: float
    prefill_per_token_us: float
    prefill_attention_us: float
    decode_base_us: float
    decode_per_sequence_us: float
    decode_per_kv_token_us: float
    prediction_errors: _containers.RepeatedCompositeFieldContainer[PredictionError]
    ttft_overhead_us: float
    ttft_factor: float
    requests_waiting: int
    role_ordered: _engine_pb2.Role
    role_drains: int
    def __init__(self, info: _Optional[_Union[_engine_pb2.EngineInfo, _Mapping]] = ..., state: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_tokens_free: _Optional[int] = ..., kv_tokens_reserved: _Optional[int] = ..., queue_us: _Optional[int] = ..., report_age_ms: _Optional[int] = ..., hbm_blocks: _Optional[int] = ..., prefill_base_us: _Optional[float] = ..., prefill_per_token_us: _Optional[float] = ..., prefill_attention_us: _Optional[float] = ..., decode_base_us: _Optional[float] = ..., decode_per_sequence_us: _Optional[float] = ..., decode_per_kv_token_us: _Optional[float] = ..., prediction_errors: _Optional[_Iterable[_Union[PredictionError, _Mapping]]] = ..., ttft_overhead_us: _Optional[float] = ..., ttft_factor: _Optional[float] = ..., requests_waiting: _Optional[int] = ..., role_ordered: _Optional[_Union[_engine_pb2.Role, str]] = ..., role_drains: _Optional[int] = ...) -> None: ...

class PredictionError(_message.Message):
    __slots__ = ("kind", "median", "mean", "count")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    median: float
    mean: float
    count: int
    def __init__(self, kind: _Optional[str] = ..., median: _Optional[float] = ..., mean: _Optional[float] = ..., count: _Optional[int] = ...) -> None: ...

class ListInstancesReply(_message.Message):
    __slots__ = ("instances",)
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedCompositeFieldContainer[InstanceStatus]
    def __init__(self, instances: _Optional[_Iterable[_Union[InstanceStatus, _Mapping]]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("prefill_instance", "decode_instance", "split", "queue_us", "pull_us", "prefill_us", "handoff_us", "decode_harm_us", "cost_us", "cached_tokens", "feasible", "reason")
    PREFILL_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DECODE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    PULL_US_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_HARM_US_FIELD_NUMBER: _ClassVar[int]
    COST_US_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FEASIBLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    prefill_instance: str
    decode_instance: str
    split: bool
    queue_us: int
    pull_us: int
    prefill_us: int
    handoff_us: int
    decode_harm_us: int
    cost_us: int
    cached_tokens: int
    feasible: bool
    reason: str
    def __init__(self, prefill_instance: _Optional[str] = ..., decode_instance: _Optional[str] = ..., split: bool = ..., queue_us: _Optional[int] = ..., pull_us: _Optional[int] = ..., prefill_us: _Optional[int] = ..., handoff_us: _Optional[int] = ..., decode_harm_us: _Optional[int] = ..., cost_us: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., feasible: bool = ..., reason: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("request_id", "policy", "prompt_tokens", "max_tokens", "candidates", "choice", "outcome", "placed_age_ms", "candidates_total", "waited_us", "priority", "tenant", "waiting", "ttft_error_ratio", "prediction_errors")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    PLACED_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    WAITED_US_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TTFT_ERROR_RATIO_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_ERRORS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    policy: str
    prompt_tokens: int
    max_tokens: int
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    choice: PlaceReply
    outcome: Outcome
    placed_age_ms: int
    candidates_total: int
    waited_us: int
    priority: int
    tenant: str
    waiting: bool
    ttft_error_ratio: float
    prediction_errors: _containers.RepeatedCompositeFieldContainer[PredictionError]
    def __init__(self, request_id: _Optional[str] = ..., policy: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., choice: _Optional[_Union[PlaceReply, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., placed_age_ms: _Optional[int] = ..., candidates_total: _Optional[int] = ..., waited_us: _Optional[int] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., waiting: bool = ..., ttft_error_ratio: _Optional[float] = ..., prediction_errors: _Optional[_Iterable[_Union[PredictionError, _Mapping]]] = ...) -> None: ...

class GetPlanRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RoleProposal(_message.Message):
    __slots__ = ("model", "kind", "instance_id", "role", "why", "age_ms", "executable", "blocked")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    EXECUTABLE_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_FIELD_NUMBER: _ClassVar[int]
    model: str
    kind: str
    instance_id: str
    role: _engine_pb2.Role
    why: str
    age_ms: int
    executable: bool
    blocked: str
    def __init__(self, model: _Optional[str] = ..., kind: _Optional[str] = ..., instance_id: _Optional[str] = ..., role: _Optional[_Union[_engine_pb2.Role, str]] = ..., why: _Optional[str] = ..., age_ms: _Optional[int] = ..., executable: bool = ..., blocked: _Optional[str] = ...) -> None: ...

class RoleChange(_message.Message):
    __slots__ = ("model", "instance_id", "was", "role", "state", "drains", "age_ms", "why")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    WAS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DRAINS_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    model: str
    instance_id: str
    was: _engine_pb2.Role
    role: _engine_pb2.Role
    state: str
    drains: int
    age_ms: int
    why: str
    def __init__(self, model: _Optional[str] = ..., instance_id: _Optional[str] = ..., was: _Optional[_Union[_engine_pb2.Role, str]] = ..., role: _Optional[_Union[_engine_pb2.Role, str]] = ..., state: _Optional[str] = ..., drains: _Optional[int] = ..., age_ms: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class PhaseLoad(_message.Message):
    __slots__ = ("model", "prefill_instances", "decode_instances", "prefill_utilisation", "decode_utilisation", "waiting")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INSTANCES_FIELD_NUMBER: _ClassVar[int]
    DECODE_INSTANCES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_UTILISATION_FIELD_NUMBER: _ClassVar[int]
    DECODE_UTILISATION_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    model: str
    prefill_instances: int
    decode_instances: int
    prefill_utilisation: float
    decode_utilisation: float
    waiting: int
    def __init__(self, model: _Optional[str] = ..., prefill_instances: _Optional[int] = ..., decode_instances: _Optional[int] = ..., prefill_utilisation: _Optional[float] = ..., decode_utilisation: _Optional[float] = ..., waiting: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("proposals", "loads", "changes")
    PROPOSALS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    proposals: _containers.RepeatedCompositeFieldContainer[RoleProposal]
    loads: _containers.RepeatedCompositeFieldContainer[PhaseLoad]
    changes: _containers.RepeatedCompositeFieldContainer[RoleChange]
    def __init__(self, proposals: _Optional[_Iterable[_Union[RoleProposal, _Mapping]]] = ..., loads: _Optional[_Iterable[_Union[PhaseLoad, _Mapping]]] = ..., changes: _Optional[_Iterable[_Union[RoleChange, _Mapping]]] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("instance_id", "role")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    role: _engine_pb2.Role
    def __init__(self, instance_id: _Optional[str] = ..., role: _Optional[_Union[_engine_pb2.Role, str]] = ...) -> None: ...

class SetRoleReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("scheduler_id", "version", "uptime_ms", "instances_alive", "instances_suspect", "sources_alive", "sources_suspect", "directory_blocks", "directory_replicas", "placements", "refusals", "splits", "active_requests", "kv_tokens_reserved", "gateways", "policies", "journal", "journal_bytes", "hashes", "waiting_requests", "event_log")
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_ALIVE_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_SUSPECT_FIELD_NUMBER: _ClassVar[int]
    SOURCES_ALIVE_FIELD_NUMBER: _ClassVar[int]
    SOURCES_SUSPECT_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    SPLITS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_RESERVED_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    EVENT_LOG_FIELD_NUMBER: _ClassVar[int]
    scheduler_id: str
    version: str
    uptime_ms: int
    instances_alive: int
    instances_suspect: int
    sources_alive: int
    sources_suspect: int
    directory_blocks: int
    directory_replicas: int
    placements: int
    refusals: int
    splits: int
    active_requests: int
    kv_tokens_reserved: int
    gateways: int
    policies: _containers.RepeatedScalarFieldContainer[str]
    journal: str
    journal_bytes: int
    hashes: _containers.RepeatedScalarFieldContainer[str]
    waiting_requests: int
    event_log: EventLogStatus
    def __init__(self, scheduler_id: _Optional[str] = ..., version: _Optional[str] = ..., uptime_ms: _Optional[int] = ..., instances_alive: _Optional[int] = ..., instances_suspect: _Optional[int] = ..., sources_alive: _Optional[int] = ..., sources_suspect: _Optional[int] = ..., directory_blocks: _Optional[int] = ..., directory_replicas: _Optional[int] = ..., placements: _Optional[int] = ..., refusals: _Optional[int] = ..., splits: _Optional[int] = ..., active_requests: _Optional[int] = ..., kv_tokens_reserved: _Optional[int] = ..., gateways: _Optional[int] = ..., policies: _Optional[_Iterable[str]] = ..., journal: _Optional[str] = ..., journal_bytes: _Optional[int] = ..., hashes: _Optional[_Iterable[str]] = ..., waiting_requests: _Optional[int] = ..., event_log: _Optional[_Union[EventLogStatus, _Mapping]] = ...) -> None: ...

class EventLogStatus(_message.Message):
    __slots__ = ("up", "changed_age_ms", "url", "error", "peers", "entries_written", "entries_read", "entries_bad", "gaps", "items_dropped")
    UP_FIELD_NUMBER: _ClassVar[int]
    CHANGED_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_READ_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_BAD_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    ITEMS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    up: bool
    changed_age_ms: int
    url: str
    error: str
    peers: _containers.RepeatedCompositeFieldContainer[PeerStatus]
    entries_written: int
    entries_read: int
    entries_bad: int
    gaps: int
    items_dropped: int
    def __init__(self, up: bool = ..., changed_age_ms: _Optional[int] = ..., url: _Optional[str] = ..., error: _Optional[str] = ..., peers: _Optional[_Iterable[_Union[PeerStatus, _Mapping]]] = ..., entries_written: _Optional[int] = ..., entries_read: _Optional[int] = ..., entries_bad: _Optional[int] = ..., gaps: _Optional[int] = ..., items_dropped: _Optional[int] = ...) -> None: ...

class PeerStatus(_message.Message):
    __slots__ = ("scheduler_id", "address", "state", "heard_age_ms", "sources", "instances", "placements")
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HEARD_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    scheduler_id: str
    address: str
    state: str
    heard_age_ms: int
    sources: int
    instances: int
    placements: int
    def __init__(self, scheduler_id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., heard_age_ms: _Optional[int] = ..., sources: _Optional[int] = ..., instances: _Optional[int] = ..., placements: _Optional[int] = ...) -> None: ...
