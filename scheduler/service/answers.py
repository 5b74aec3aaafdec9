"""The core's answers and state to messages of the contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvpool.core.namespace import NamespaceSpec
from kvpool.v1 import common_pb2, directory_pb2, engine_pb2, scheduler_pb2
from scheduler.core import events, role_changes
from scheduler.core.calibration import Calibration
from scheduler.core.commands import Placed, PullRun, Refused, Target
from scheduler.core.core import SchedulerCore
from scheduler.core.ledger import Candidate, LedgerEntry
from scheduler.core.roles import RoleBook
from scheduler.core.waiting import Waiting

_TIMES = tuple(events.RequestTimes.__dataclass_fields__)


def source_hello(attached: events.SourceAttached) -> directory_pb2.SourceHello:
    return directory_pb2.SourceHello(
        source_id=attached.source_id,
        epoch=attached.epoch,
        tier=int(attached.tier),  # type: ignore[arg-type]
        address=attached.address,
        host_id=attached.host_id,
        instance_id=attached.instance_id,
        bytes_total=attached.bytes_total,
    )


def namespace_message(spec: NamespaceSpec) -> common_pb2.NamespaceSpec:
    return common_pb2.NamespaceSpec(
        model=spec.model,
        revision=spec.revision,
        dtype=spec.dtype,
        backend=spec.backend,
        layout=spec.layout,
        hash=spec.hash,
        groups=[
            common_pb2.GroupSpec(
                id=g.id,
                kind=int(g.kind),  # type: ignore[arg-type]
                layers=g.layers,
                block_tokens=g.block_tokens,
                shard_count=g.shard_count,
                section_count=g.section_count,
                block_bytes=g.block_bytes,
                kv_heads=g.kv_heads,
                head_dim=g.head_dim,
                window_tokens=g.window_tokens,
            )
            for g in spec.groups
        ],
    )


def engine_info(info: events.InstanceInfo) -> engine_pb2.EngineInfo:
    return engine_pb2.EngineInfo(
        instance_id=info.instance_id,
        epoch=info.epoch,
        role=int(info.role),  # type: ignore[arg-type]
        model=info.model,
        namespace=namespace_message(info.namespace),
        context_tokens_max=info.context_tokens_max,
        kv_tokens_total=info.kv_tokens_total,
        batch_max=info.batch_max,
        address=info.address,
        host_id=info.host_id,
        hbm_source_id=info.hbm_source_id,
        node_source_id=info.node_source_id,
        node_address=info.node_address,
        tokenizer=info.tokenizer,
        eos_token_ids=info.eos_token_ids,
        chunk_tokens=info.chunk_tokens,
        deterministic=info.deterministic,
        version=info.version,
        gpu=info.gpu,
        tp=info.tp,
        price_per_hour=info.price_per_hour,
        role_changeable=info.role_changeable,
        protocol=info.protocol,
    )


def outcome_message(outcome: events.OutcomeReported) -> scheduler_pb2.Outcome:
    return scheduler_pb2.Outcome(
        request_id=outcome.request_id,
        first_token=outcome.first_token,
        ttft_us=outcome.ttft_us,
        duration_us=outcome.duration_us,
        tokens=outcome.tokens,
        finish_reason=outcome.finish_reason,
        error=outcome.error,
        prefill=engine_pb2.RequestTimes(**{f: getattr(outcome.prefill, f) for f in _TIMES}),
        decode=engine_pb2.RequestTimes(**{f: getattr(outcome.decode, f) for f in _TIMES}),
    )


def run_messages(runs: Iterable[PullRun]) -> list[directory_pb2.Run]:
    return [
        directory_pb2.Run(
            source_id=r.source_id,
            tier=int(r.tier),  # type: ignore[arg-type]
            first=r.first,
            count=r.count,
            group=r.group,
            shard=r.shard,
            fidelity=int(r.fidelity),  # type: ignore[arg-type]
            address=r.address,
        )
        for r in runs
    ]


def _target(target: Target) -> scheduler_pb2.Target:
    return scheduler_pb2.Target(instance_id=target.instance_id, address=target.address, epoch=target.epoch)


def place_reply(choice: Placed | Refused) -> scheduler_pb2.PlaceReply:
    if isinstance(choice, Refused):
        return scheduler_pb2.PlaceReply(
            refusal=scheduler_pb2.Refusal(
                reason=int(choice.reason),  # type: ignore[arg-type]
                message=choice.message,
                retry_after_ms=choice.retry_after_ms,
            )
        )
    return scheduler_pb2.PlaceReply(
        placement=scheduler_pb2.Placement(
            prefill=_target(choice.prefill),
            decode=_target(choice.decode),
            split=choice.split,
            pull=run_messages(choice.pull),
            cached_tokens=choice.cached_tokens,
            predicted_ttft_us=choice.predicted_ttft_us,
            handoff_source_id=choice.handoff_source_id,
            handoff_address=choice.handoff_address,
            ttl_ms=choice.ttl_ms,
            waited_us=choice.waited_us,
        )
    )


def _candidates(candidates: Sequence[Candidate]) -> list[scheduler_pb2.Candidate]:
    return [scheduler_pb2.Candidate(**c._asdict()) for c in candidates]


def explanation(entry: LedgerEntry, now_us: int, known: Calibration | None) -> scheduler_pb2.Explanation:
    """Args: known: what predictions for the prefill instance were worth."""
    outcome, choice = entry.outcome, entry.choice
    error_ratio = 0.0
    if outcome is not None and outcome.ttft_us and isinstance(choice, Placed):
        error_ratio = abs(choice.predicted_ttft_us - outcome.ttft_us) / outcome.ttft_us
    return scheduler_pb2.Explanation(
        request_id=entry.request_id,
        policy=entry.policy,
        prompt_tokens=entry.prompt_tokens,
        max_tokens=entry.max_tokens,
        candidates=_candidates(entry.candidates),
        choice=place_reply(choice),
        outcome=None if outcome is None else outcome_message(outcome),
        placed_age_ms=(now_us - entry.placed_us) // 1000,
        candidates_total=entry.candidates_total,
        waited_us=entry.waited_us,
        priority=entry.priority,
        tenant=entry.tenant,
        ttft_error_ratio=error_ratio,
        prediction_errors=prediction_errors(known),
    )


def waiting_explanation(waiting: Waiting, policy: str, now_us: int) -> scheduler_pb2.Explanation:
    """Of a request that has no place yet."""
    request = waiting.request
    return scheduler_pb2.Explanation(
        request_id=request.request_id,
        policy=request.policy or policy,
        prompt_tokens=request.prompt_tokens,
        max_tokens=request.max_tokens,
        waited_us=now_us - waiting.arrived_us,
        priority=request.priority,
        tenant=request.tenant,
        waiting=True,
    )


def prediction_errors(known: Calibration | None) -> list[scheduler_pb2.PredictionError]:
    if known is None:
        return []
    return [
        scheduler_pb2.PredictionError(kind=kind, median=errors.median() or 0.0, mean=errors.mean, count=errors.count)
        for kind, errors in (("ttft", known.ttft), ("pull", known.pull), ("prefill", known.prefill))
        if errors.count
    ]


def role_ordered(book: RoleBook, instance_id: str) -> Any:
    """What an instance was told and has not taken yet; unspecified for nothing."""
    orders = [c.role for c in book.changes.values() if c.instance_id == instance_id and c.taken_us is None]
    return int(orders[0]) if orders else 0


def plan_message(core: SchedulerCore, now_us: int) -> scheduler_pb2.Plan:
    roles, plan = core.roles, scheduler_pb2.Plan()
    for model in sorted(roles.proposals):
        proposal = roles.proposals[model]
        flips = proposal.kind == "flip"
        blocked = role_changes.blocked_for_plan(core, proposal.instance_id, proposal.role) if flips else ""
        plan.proposals.add(
            model=model,
            kind=proposal.kind,
            instance_id=proposal.instance_id,
            role=int(proposal.role),
            why=proposal.why,
            age_ms=(now_us - proposal.since_us) // 1000,
            executable=flips and not blocked,
            blocked=blocked,
        )
    for model in sorted(roles.changes):
        change = roles.changes[model]
        plan.changes.add(
            model=model,
            instance_id=change.instance_id,
            was=int(change.was),
            role=int(change.role),
            state="told" if change.taken_us is None else "draining",
            drains=role_changes.drains(core, core.cluster.instances[change.instance_id]),
            age_ms=(now_us - change.ordered_us) // 1000,
            why=change.why,
        )
    for model in sorted(roles.loads):
        load, line = roles.loads[model], core.room.lines.get(model)
        plan.loads.add(
            model=model,
            prefill_instances=load.prefill_count,
            decode_instances=load.decode_count,
            prefill_utilisation=load.prefill,
            decode_utilisation=load.decode,
            waiting=len(line.order) if line is not None else 0,
        )
    return plan
