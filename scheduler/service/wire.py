"""Messages of the contract to events. Whatever comes in is checked here: the core may trust its events."""

from __future__ import annotations

import math

from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.errors import BadArgument
from kvpool.core.ids import Fidelity, Role, Tier, pack_keys, qualify, unpack_keys
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.v1 import common_pb2, directory_pb2, engine_pb2, scheduler_pb2
from scheduler.core import events
from scheduler.core.events import RequestTimes

ID_LENGTH_MAX = 512
SAMPLES_MAX = 4096
KEYS_A_MESSAGE_MAX = 1 << 20
EXCLUDED_MAX = 1024
EVENTS_A_BATCH_MAX = 65_536


def _name(value: str, field: str) -> str:
    if not value:
        raise BadArgument(f"{field} must not be empty")
    return _text(value, field)


def _text(value: str, field: str) -> str:
    if len(value) > ID_LENGTH_MAX:
        raise BadArgument(f"{field} is longer than {ID_LENGTH_MAX} characters")
    return value


def _amount(value: float, field: str) -> float:
    if not 0 <= value < math.inf:
        raise BadArgument(f"{field} must be a number of at least 0")
    return value


def at_most(count: int, limit: int, field: str) -> None:
    if count > limit:
        raise BadArgument(f"{field}: {count} entries, the limit is {limit}")


def _tier(value: int) -> Tier:
    if value not in Tier.__members__.values():
        raise BadArgument(f"tier {value} is unknown")
    return Tier(value)


def fidelity(value: int) -> Fidelity:
    """Unspecified means exact."""
    if value == 0:
        return Fidelity.EXACT
    if value not in Fidelity.__members__.values():
        raise BadArgument(f"fidelity {value} is unknown")
    return Fidelity(value)


def qualified(keys: common_pb2.KeyList) -> bytes:
    """Packed keys under which the blocks are stored.

    Raises: BadKeyLength, BadArgument if there are too many.
    """
    unpacked = unpack_keys(keys.keys)
    at_most(len(unpacked), KEYS_A_MESSAGE_MAX, "keys")
    if keys.group == 0 and keys.shard == 0:
        return bytes(keys.keys)
    return pack_keys(qualify(unpacked, keys.group, keys.shard))


# ---------------------------------------------------------------- sources


def hello_of(message: directory_pb2.SourceMessage) -> directory_pb2.SourceHello:
    """Raises: BadArgument if a life line begins with anything else."""
    if message.WhichOneof("message") != "hello":
        raise BadArgument("the first message of a source must be its hello")
    return message.hello


def source_attached(hello: directory_pb2.SourceHello, stream: int) -> events.SourceAttached:
    return events.SourceAttached(
        stream=stream,
        source_id=_name(hello.source_id, "source_id"),
        epoch=hello.epoch,
        tier=_tier(hello.tier),
        address=_text(hello.address, "address"),
        host_id=_text(hello.host_id, "host_id"),
        instance_id=_text(hello.instance_id, "instance_id"),
        bytes_total=hello.bytes_total,
    )


def source_message(message: directory_pb2.SourceMessage, stream: int) -> events.Event:
    """Raises: BadArgument for a second hello or an empty message."""
    kind = message.WhichOneof("message")
    if kind == "events":
        return _blocks_changed(message.events, stream)
    if kind == "snapshot":
        part = message.snapshot
        return events.SnapshotReceived(
            stream, part.seq, part.part, part.last, qualified(part.keys), fidelity(part.fidelity)
        )
    if kind == "heartbeat":
        return events.SourceHeartbeat(stream, message.heartbeat.bytes_used, message.heartbeat.blocks)
    raise BadArgument("expected events, a snapshot or a heartbeat")


def _blocks_changed(batch: directory_pb2.EventBatch, stream: int) -> events.BlocksChanged:
    at_most(len(batch.events), EVENTS_A_BATCH_MAX, "events")
    changes = []
    for event in batch.events:
        if event.kind not in ChangeKind.__members__.values():
            raise BadArgument(f"event kind {event.kind} is unknown")
        changes.append(BlockChange(ChangeKind(event.kind), qualified(event.keys), fidelity(event.fidelity)))
    return events.BlocksChanged(stream, batch.seq, tuple(changes))


# ---------------------------------------------------------------- instances


def role(value: int) -> Role:
    """Raises: BadArgument if it is none."""
    if value not in Role.__members__.values():
        raise BadArgument(f"role {value} is unknown")
    return Role(value)


def namespace_spec(spec: common_pb2.NamespaceSpec) -> NamespaceSpec:
    """Raises: BadArgument if the specification is not a valid one."""
    groups = []
    for g in spec.groups:
        if g.kind not in GroupKind.__members__.values():
            raise BadArgument(f"group {g.id}: kind {g.kind} is unknown")
        groups.append(
            GroupSpec(
                id=g.id,
                kind=GroupKind(g.kind),
                layers=tuple(g.layers),
                block_tokens=g.block_tokens,
                shard_count=g.shard_count,
                section_count=g.section_count,
                block_bytes=g.block_bytes,
                kv_heads=g.kv_heads,
                head_dim=g.head_dim,
                window_tokens=g.window_tokens,
            )
        )
    result = NamespaceSpec(spec.model, spec.revision, spec.dtype, spec.backend, spec.layout, spec.hash, tuple(groups))
    result.validate()
    return result


def instance_joined(info: engine_pb2.EngineInfo, stream: int) -> events.InstanceJoined:
    for field in ("context_tokens_max", "kv_tokens_total", "batch_max"):
        if not getattr(info, field):
            raise BadArgument(f"{field} must be at least 1")
    namespace = namespace_spec(info.namespace)
    return events.InstanceJoined(
        stream,
        events.InstanceInfo(
            instance_id=_name(info.instance_id, "instance_id"),
            epoch=info.epoch,
            role=role(info.role),
            model=_name(info.model, "model"),
            namespace=namespace,
            context_tokens_max=info.context_tokens_max,
            kv_tokens_total=info.kv_tokens_total,
            batch_max=info.batch_max,
            address=_name(info.address, "address"),
            host_id=_text(info.host_id, "host_id"),
            hbm_source_id=_text(info.hbm_source_id, "hbm_source_id"),
            node_source_id=_text(info.node_source_id, "node_source_id"),
            node_address=_text(info.node_address, "node_address"),
            tokenizer=info.tokenizer,
            eos_token_ids=tuple(info.eos_token_ids),
            chunk_tokens=info.chunk_tokens,
            deterministic=info.deterministic,
            version=info.version,
            namespace_id=bytes(namespace.id()),
            gpu=_text(info.gpu, "gpu"),
            tp=info.tp or 1,
            price_per_hour=_amount(info.price_per_hour, "price_per_hour"),
            role_changeable=info.role_changeable,
            protocol=_text(info.protocol, "protocol") or "kvpool",
        ),
    )


def instance_reported(report: scheduler_pb2.InstanceReport, stream: int) -> events.InstanceReported:
    for field in ("prefill", "decode", "links", "finished_prefills"):
        at_most(len(getattr(report, field)), SAMPLES_MAX, field)
    return events.InstanceReported(
        stream=stream,
        running=report.running,
        waiting=report.waiting,
        kv_tokens_free=report.kv_tokens_free,
        prefill=tuple(events.PrefillSample(s.new_tokens, s.cached_tokens, s.duration_us) for s in report.prefill),
        decode=tuple(events.DecodeSample(s.batch, s.kv_tokens, s.duration_us) for s in report.decode),
        links=tuple(
            events.LinkSample(s.source_id, s.bytes, s.duration_us, s.failed, s.channel_count) for s in report.links
        ),
        finished_prefills=tuple(report.finished_prefills),
        draining=report.draining,
        role=role(report.role) if report.role else None,
    )


def role_ordered(request: scheduler_pb2.SetRoleRequest) -> events.RoleOrdered:
    return events.RoleOrdered(_name(request.instance_id, "instance_id"), role(request.role))


# ---------------------------------------------------------------- gateways


def gateway_opened(hello: scheduler_pb2.GatewayHello, stream: int) -> events.GatewayOpened:
    return events.GatewayOpened(stream, _name(hello.gateway_id, "gateway_id"))


def gateway_message(message: scheduler_pb2.GatewayMessage, stream: int) -> events.Event:
    """Raises: BadArgument for a second hello or an empty message."""
    kind = message.WhichOneof("message")
    if kind == "heartbeat":
        return events.GatewayHeartbeat(stream, message.heartbeat.active_requests)
    if kind == "outcome":
        return _outcome_reported(message.outcome, stream)
    raise BadArgument("expected an outcome or a heartbeat")


def _outcome_reported(outcome: scheduler_pb2.Outcome, stream: int) -> events.OutcomeReported:
    return events.OutcomeReported(
        stream=stream,
        request_id=_name(outcome.request_id, "request_id"),
        first_token=outcome.first_token,
        ttft_us=outcome.ttft_us,
        duration_us=outcome.duration_us,
        tokens=outcome.tokens,
        finish_reason=_text(outcome.finish_reason, "finish_reason"),
        error=outcome.error[:ID_LENGTH_MAX],
        prefill=_times(outcome.prefill),
        decode=_times(outcome.decode),
    )


_TIMES = tuple(RequestTimes.__dataclass_fields__)


def _times(times: engine_pb2.RequestTimes) -> RequestTimes:
    return RequestTimes(*(getattr(times, field) for field in _TIMES))


def place_requested(request: scheduler_pb2.PlaceRequest) -> events.PlaceRequested:
    at_most(len(request.exclude_instances), EXCLUDED_MAX, "exclude_instances")
    return events.PlaceRequested(
        request_id=_name(request.request_id, "request_id"),
        gateway_id=_name(request.gateway_id, "gateway_id"),
        model=_text(request.model, "model"),
        keys=tuple(events.KeyBatch(k.group, k.shard, qualified(k)) for k in request.keys),
        prompt_tokens=request.prompt_tokens,
        max_tokens=request.max_tokens,
        ttft_slo_us=request.ttft_slo_ms * 1000,
        tpot_slo_us=request.tpot_slo_ms * 1000,
        policy=_text(request.policy, "policy"),
        use_pool=request.use_pool,
        sticky_key=_text(request.sticky_key, "sticky_key"),
        exclude_instances=tuple(request.exclude_instances),
        fidelity_min=fidelity(request.fidelity_min),
        namespace_id=request.namespace_id,
        priority=request.priority,
        tenant=_text(request.tenant, "tenant"),
        tenant_weight=_amount(request.tenant_weight, "tenant_weight") or 1.0,
        wait_us_max=request.wait_ms_max * 1000 if request.HasField("wait_ms_max") else None,
    )
