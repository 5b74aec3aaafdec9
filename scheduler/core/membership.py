"""What the core does when members come, speak, fall silent and go: instances, sources, gateways. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvpool.core.directory import SourceRecord
from kvpool.core.errors import Reason
from scheduler.core import looking, placing, role_changes
from scheduler.core.cluster import Gateway, State
from scheduler.core.commands import AcknowledgeSource, CloseStream, Command, StateChanged
from scheduler.core.cost import link_class
from scheduler.core.events import (
    BlocksChanged,
    GatewayClosed,
    GatewayHeartbeat,
    GatewayOpened,
    InstanceInfo,
    InstanceJoined,
    InstanceLeft,
    InstanceReported,
    SnapshotReceived,
    SourceAttached,
    SourceDetached,
    SourceHeartbeat,
    SourcesHeard,
)

if TYPE_CHECKING:
    from scheduler.core.core import SchedulerCore

#: Instances that have changed and whose columns are stale still, at most.
TOUCHED_MAX = 16
#: Deadlines that are looked at so much later than they are due say nothing about those that they belong to.
LATE_US = 500_000
FULL = "no room: {count} {kind}s are the limit"
OLDER = "a newer process speaks for this id"
REPLACED = "replaced by a newer life line"
SILENT = "silent for too long"


def run_deadlines(core: SchedulerCore, commands: list[Command]) -> None:
    """Those that were silent for too long become suspect, or are gone."""
    cluster = core.cluster
    due_us = cluster.deadlines.next_us()
    if due_us is not None and core.now_us - due_us > LATE_US:
        # This process was held up: what was said meanwhile is still to be heard.
        while (late := cluster.deadlines.pop_due(core.now_us)) is not None:
            cluster.deadlines.set(late, core.now_us + core.config.heartbeat_interval_us)
    while (key := cluster.deadlines.pop_due(core.now_us)) is not None:
        kind, member_id = key
        if cluster.silent(key, core.now_us) is State.SUSPECT:
            commands.append(StateChanged(kind, member_id, State.SUSPECT.value))
        else:
            _close(core, kind, member_id, SILENT, commands)


def _close(core: SchedulerCore, kind: str, member_id: str, reason: str, commands: list[Command]) -> None:
    """Ends a life line from this side."""
    stream = core.cluster.stream_of(kind, member_id)
    assert stream is not None
    commands.append(CloseStream(stream, reason))
    _gone(core, kind, member_id, commands)


def _gone(core: SchedulerCore, kind: str, member_id: str, commands: list[Command]) -> None:
    """Forgets a member and all that depended on it."""
    core.cluster.remove(kind, member_id)
    commands.append(StateChanged(kind, member_id, "gone"))
    if kind == "source":
        core.directory.detach(member_id)
    elif kind == "gateway":
        for owner in core.book.of_gateway(member_id):
            # A gateway speaks to each scheduler: those that made the others say themselves when they end.
            if not core.book.placements[owner].peer:
                core.end_placement(owner, "gateway_gone", commands)
        for owner in core.room.of_gateway(member_id):
            placing.give_up(core, owner, Reason.UNREACHABLE, "its gateway is gone", commands)
    else:
        for owner in core.book.decoding_on(member_id):
            core.end_placement(owner, "instance_gone", commands)
        for owner in core.book.queued_on(member_id):
            core.book.finish_prefill(owner, core.now_us)
        core.costs.instance_gone(member_id)
        core.book.stalling.pop(member_id, None)
        core.calibrations.pop(member_id, None)
        core.pending.drop_instance(member_id)
        core.promises.drop_instance(member_id)
        role_changes.gone(core, member_id, commands)
        core.book.freed[member_id] = None  # those who planned to go there need another plan


def _takes_over(
    core: SchedulerCore, kind: str, member_id: str, stream: int, epochs: tuple[int, int] | None, commands: list[Command]
) -> bool:
    """Makes room for a new life line of an id that may have one. False if the new one is of an older process."""
    if core.cluster.stream_of(kind, member_id) is None:
        return True
    if epochs is not None and epochs[1] < epochs[0]:
        commands.append(CloseStream(stream, OLDER))
        return False
    _close(core, kind, member_id, REPLACED, commands)
    return True


def _no_room(kind: str, count: int, stream: int, commands: list[Command]) -> None:
    commands.append(CloseStream(stream, FULL.format(count=count, kind=kind)))


# ---------------------------------------------------------------- sources


def source_record(attached: SourceAttached) -> SourceRecord:
    """A source as the directory knows it."""
    return SourceRecord(
        source_id=attached.source_id,
        epoch=attached.epoch,
        tier=attached.tier,
        address=attached.address,
        host_id=attached.host_id,
        instance_id=attached.instance_id,
        bytes_total=attached.bytes_total,
    )


def source_attached(core: SchedulerCore, event: SourceAttached, commands: list[Command]) -> None:
    """A source's blocks are asked for at once: whatever was known of it ended with its last life line."""
    old = core.cluster.sources.get(event.source_id)
    epochs = None if old is None else (old.attached.epoch, event.epoch)
    if not _takes_over(core, "source", event.source_id, event.stream, epochs, commands):
        return
    if not core.cluster.add_source(event, core.now_us):
        _no_room("source", core.config.sources_max, event.stream, commands)
        return
    core.directory.attach(source_record(event), core.now_us)
    commands.append(StateChanged("source", event.source_id, State.ALIVE.value))
    commands.append(AcknowledgeSource(event.stream, 0, True))


def _source_seen(core: SchedulerCore, stream: int, commands: list[Command]) -> str | None:
    source = core.cluster.source_of(stream)
    if source is None:
        return None
    if core.cluster.seen(source, ("source", source.id), core.now_us):
        commands.append(StateChanged("source", source.id, State.ALIVE.value))
    return source.id


def blocks_changed(core: SchedulerCore, event: BlocksChanged, commands: list[Command]) -> None:
    source_id = _source_seen(core, event.stream, commands)
    if source_id is None:
        return
    source = core.cluster.sources[source_id]
    applied = core.directory.apply(source_id, source.attached.epoch, event.seq, event.changes, core.now_us)
    _acknowledge(core, source_id, applied.acknowledged, applied.want_snapshot, commands)
    if core.room.awaiting:
        looking.blocks_came(core, source_id, commands)


def snapshot_received(core: SchedulerCore, event: SnapshotReceived, commands: list[Command]) -> None:
    source_id = _source_seen(core, event.stream, commands)
    if source_id is None:
        return
    source = core.cluster.sources[source_id]
    source.awaits_snapshot = True
    applied = core.directory.apply_snapshot_part(
        source_id, source.attached.epoch, event.seq, event.part, event.last, event.keys, event.fidelity, core.now_us
    )
    if event.last and not applied.want_snapshot:
        # One that was passed over for being older than what is known is asked for again.
        source.awaits_snapshot = applied.acknowledged < event.seq
    if event.last or applied.want_snapshot:
        _acknowledge(core, source_id, applied.acknowledged, source.awaits_snapshot, commands)


def _acknowledge(
    core: SchedulerCore, source_id: str, acknowledged: int, want_snapshot: bool, commands: list[Command]
) -> None:
    source = core.cluster.sources[source_id]
    source.seq = acknowledged
    if want_snapshot:
        source.gaps += 1
        source.awaits_snapshot = True
    commands.append(AcknowledgeSource(source.attached.stream, acknowledged, want_snapshot))


def source_heartbeat(core: SchedulerCore, event: SourceHeartbeat, commands: list[Command]) -> None:
    source_id = _source_seen(core, event.stream, commands)
    if source_id is not None:
        core.cluster.sources[source_id].bytes_used = event.bytes_used


def sources_heard(core: SchedulerCore, event: SourcesHeard, commands: list[Command]) -> None:
    for stream, bytes_used in event.heard:
        source_id = _source_seen(core, stream, commands)
        if source_id is not None:
            core.cluster.sources[source_id].bytes_used = bytes_used


# ---------------------------------------------------------------- instances


def _same_process(old: InstanceInfo, new: InstanceInfo) -> bool:
    """Whether an instance only comes by another life line: what is placed there then goes on."""
    return (old.epoch, old.model, old.kv_tokens_total) == (new.epoch, new.model, new.kv_tokens_total)


def instance_joined(core: SchedulerCore, event: InstanceJoined, commands: list[Command]) -> None:
    info = event.info
    old = core.cluster.instances.get(info.instance_id)
    if old is not None and _same_process(old.info, info):
        commands.append(CloseStream(old.stream, REPLACED))
        role_changes.took(core, old, info.role, commands)
        core.cluster.instance_moved(event)
        role_changes.rejoined(core, old, commands)
        core.cluster.seen(old, ("instance", old.id), core.now_us)
        commands.append(StateChanged("instance", old.id, State.ALIVE.value))
        core.book.freed[old.id] = None
        return
    epochs = None if old is None else (old.info.epoch, info.epoch)
    if not _takes_over(core, "instance", info.instance_id, event.stream, epochs, commands):
        return
    if not core.cluster.add_instance(event, core.now_us):
        _no_room("instance", core.config.instances_max, event.stream, commands)
        return
    core.costs.instance_joined(info.instance_id, info.model)
    for model in core.cluster.forgotten_models():
        core.costs.forget_model(model)
        core.outputs.pop(model, None)
        core.arrivals.pop(model, None)
        core.corrections.pop(model, None)
        core.room.forget_model(model)
    commands.append(StateChanged("instance", info.instance_id, State.ALIVE.value))
    core.book.freed[info.instance_id] = None


def instance_reported(core: SchedulerCore, event: InstanceReported, commands: list[Command]) -> None:
    instance = core.cluster.instance_of(event.stream)
    if instance is None:
        return
    if core.cluster.seen(instance, ("instance", instance.id), core.now_us):
        commands.append(StateChanged("instance", instance.id, State.ALIVE.value))
        core.book.freed[instance.id] = None
    was_draining, foreign, waited = instance.draining, instance.kv_tokens_foreign, instance.waiting
    core.cluster.take_report(instance, event)
    if event.role is not None:
        role_changes.took(core, instance, event.role, commands)
    core.book.touched[instance.id] = None
    if instance.draining != was_draining:
        state = "draining" if instance.draining else State.ALIVE.value
        commands.append(StateChanged("instance", instance.id, state))
    if event.finished_prefills:
        queued = {owner[1]: owner for owner in core.book.queued_on(instance.id)}
        for request_id in event.finished_prefills:
            if request_id in queued:
                core.book.finish_prefill(queued[request_id], core.now_us)
    settled = core.book.kv_tokens_settled(instance.id, core.now_us - core.config.settle_us)
    holdings = core.book.on(instance.id)
    instance.fit_foreign(holdings.kv_tokens + holdings.kv_tokens_passing, settled)
    if instance.kv_tokens_foreign < foreign or instance.waiting < waited or was_draining != instance.draining:
        core.book.freed[instance.id] = None
    _learn(core, instance.id, event)
    if len(core.book.touched) >= TOUCHED_MAX:
        core.fleet_now(instance.info.model)  # fitted and filled in here, not while somebody waits for a place


def _learn(core: SchedulerCore, instance_id: str, event: InstanceReported) -> None:
    instance = core.cluster.instances[instance_id]
    for prefill in event.prefill:
        core.costs.observe_prefill(instance_id, instance.info.model, prefill)
    for decode in event.decode:
        core.costs.observe_decode(instance_id, instance.info.model, decode)
    for link in event.links:
        source = core.cluster.sources.get(link.source_id)
        if source is not None:
            kind = link_class(source.attached.host_id == instance.info.host_id, source.attached.tier)
            core.costs.observe_link(
                instance_id, source.id, kind, link.bytes, link.duration_us, link.failed, core.now_us, link.channel_count
            )


# ---------------------------------------------------------------- gateways


def gateway_opened(core: SchedulerCore, event: GatewayOpened, commands: list[Command]) -> None:
    if not _takes_over(core, "gateway", event.gateway_id, event.stream, None, commands):
        return
    if not core.cluster.add_gateway(event, core.now_us):
        _no_room("gateway", core.config.gateways_max, event.stream, commands)
        return
    commands.append(StateChanged("gateway", event.gateway_id, State.ALIVE.value))


def gateway_seen(core: SchedulerCore, gateway: Gateway, commands: list[Command]) -> None:
    gateway_id = gateway.opened.gateway_id
    if core.cluster.seen(gateway, ("gateway", gateway_id), core.now_us):
        commands.append(StateChanged("gateway", gateway_id, State.ALIVE.value))


def gateway_heartbeat(core: SchedulerCore, event: GatewayHeartbeat, commands: list[Command]) -> None:
    gateway = core.cluster.gateway_of(event.stream)
    if gateway is not None:
        gateway.active_requests = event.active_requests
        gateway_seen(core, gateway, commands)


def stream_ended(
    core: SchedulerCore, event: SourceDetached | InstanceLeft | GatewayClosed, commands: list[Command]
) -> None:
    """A life line that still speaks for somebody has ended: gone at once, no suspicion."""
    kind, member_id = core.cluster.streams.get(event.stream, ("", ""))
    if kind:
        _gone(core, kind, member_id, commands)


HANDLERS: dict[type, Callable[[SchedulerCore, Any, list[Command]], None]] = {
    SourceAttached: source_attached,
    BlocksChanged: blocks_changed,
    SnapshotReceived: snapshot_received,
    SourceHeartbeat: source_heartbeat,
    SourcesHeard: sources_heard,
    SourceDetached: stream_ended,
    InstanceJoined: instance_joined,
    InstanceReported: instance_reported,
    InstanceLeft: stream_ended,
    GatewayOpened: gateway_opened,
    GatewayHeartbeat: gateway_heartbeat,
    GatewayClosed: stream_ended,
}
