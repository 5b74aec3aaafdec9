"""Events to items of the log and back. What comes in is checked as if it came from the source itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from kvpool.core.errors import BadArgument
from kvpool.core.ids import Fidelity
from kvpool.v1 import common_pb2, directory_pb2, event_log_pb2, scheduler_pb2
from scheduler.core import events
from scheduler.core.placements import Placement
from scheduler.service import answers, wire

VERSION = b"1"
#: Of an entry that is read; a larger one is passed over.
ENTRY_BYTES_MAX = 80 << 20
ITEMS_MAX = 65_536
STREAMS_MAX = 65_536
#: Largest number that a placement may hold, of tokens or microseconds.
AMOUNT_MAX = 1 << 53

LogItem = event_log_pb2.LogItem


# ---------------------------------------------------------------- events to items


def source_item(event: events.SourceAttached, stream: int, *, restated: bool = False) -> LogItem:
    return LogItem(stream=stream, restated=restated, source=answers.source_hello(event))


def instance_item(info: events.InstanceInfo, stream: int, *, restated: bool = False) -> LogItem:
    return LogItem(stream=stream, restated=restated, instance=answers.engine_info(info))


def changes_item(event: events.BlocksChanged) -> LogItem:
    batch = directory_pb2.EventBatch(seq=event.seq)
    for change in event.changes:
        batch.events.add(
            kind=int(change.kind),
            keys=common_pb2.KeyList(keys=change.keys),
            fidelity=int(change.fidelity),
        )
    return LogItem(stream=event.stream, changes=batch)


def snapshot_item(event: events.SnapshotReceived, *, restated: bool = False) -> LogItem:
    part = directory_pb2.Snapshot(
        seq=event.seq,
        part=event.part,
        last=event.last,
        keys=common_pb2.KeyList(keys=event.keys),
        fidelity=int(event.fidelity),  # type: ignore[arg-type]
    )
    return LogItem(stream=event.stream, restated=restated, snapshot=part)


def report_item(event: events.InstanceReported, *, restated: bool = False) -> LogItem:
    report = scheduler_pb2.InstanceReport(
        running=event.running,
        waiting=event.waiting,
        kv_tokens_free=event.kv_tokens_free,
        finished_prefills=event.finished_prefills,
        draining=event.draining,
        role=None if event.role is None else int(event.role),  # type: ignore[arg-type]
    )
    for p in event.prefill:
        report.prefill.add(new_tokens=p.new_tokens, cached_tokens=p.cached_tokens, duration_us=p.duration_us)
    for d in event.decode:
        report.decode.add(batch=d.batch, kv_tokens=d.kv_tokens, duration_us=d.duration_us)
    for link in event.links:
        report.links.add(
            source_id=link.source_id,
            bytes=link.bytes,
            duration_us=link.duration_us,
            failed=link.failed,
            channel_count=link.channel_count,
        )
    return LogItem(stream=event.stream, restated=restated, report=report)


def placed_item(placement: Placement, now_us: int, *, restated: bool = False) -> LogItem:
    gateway_id, request_id = placement.owner
    made = event_log_pb2.PlacementMade(
        gateway_id=gateway_id,
        request_id=request_id,
        model=placement.model,
        max_tokens=placement.max_tokens,
        prefill_id=placement.prefill_id,
        decode_id=placement.decode_id,
        split=placement.split,
        kv_tokens=placement.kv_tokens,
        prefill_kv_tokens=placement.prefill_kv_tokens,
        prefill_holds=placement.prefill_holds,
        prefill_us=placement.prefill_us,
        prefill_done=placement.prefill_done,
        context_tokens=placement.context_tokens,
        expected_tokens=placement.expected_tokens,
        age_us=max(now_us - placement.placed_us, 0),
        decode_ends_in_us=max(placement.decode_ends_us - now_us, 0),
        expires_in_us=max(placement.expires_us - now_us, 1),
    )
    return LogItem(restated=restated, placed=made)


def over_item(gateway_id: str, request_id: str, *, anyone: bool) -> LogItem:
    over = event_log_pb2.PlacementOver(gateway_id=gateway_id, request_id=request_id, anyone=anyone)
    return LogItem(over=over)


def ended_item(stream: int) -> LogItem:
    return LogItem(stream=stream, ended=event_log_pb2.LineEnded())


# ---------------------------------------------------------------- items to events


def source_attached(item: LogItem, stream: int, peer: str) -> events.SourceAttached:
    """Raises: BadArgument."""
    return replace(wire.source_attached(item.source, stream), peer=peer)


def instance_joined(item: LogItem, stream: int, peer: str) -> events.InstanceJoined:
    """Raises: BadArgument."""
    return replace(wire.instance_joined(item.instance, stream), peer=peer)


def blocks_changed(item: LogItem, stream: int) -> events.Event:
    """Raises: BadArgument, BadKeyLength."""
    return wire.source_message(directory_pb2.SourceMessage(events=item.changes), stream)


def snapshot_received(item: LogItem, stream: int) -> events.Event:
    """Raises: BadArgument, BadKeyLength."""
    return wire.source_message(directory_pb2.SourceMessage(snapshot=item.snapshot), stream)


def instance_reported(item: LogItem, stream: int) -> events.InstanceReported:
    """Raises: BadArgument."""
    return wire.instance_reported(item.report, stream)


def peer_placed(made: event_log_pb2.PlacementMade, peer: str) -> events.PeerPlaced:
    """Raises: BadArgument."""
    amounts = (
        "max_tokens", "kv_tokens", "prefill_kv_tokens", "prefill_us", "context_tokens", "expected_tokens", "age_us",
        "decode_ends_in_us", "expires_in_us",
    )  # fmt: skip
    for name in amounts:
        _amount(getattr(made, name), name)
    if not made.max_tokens:
        raise BadArgument("max_tokens must be at least 1")
    return events.PeerPlaced(
        peer=peer,
        gateway_id=_name(made.gateway_id, "gateway_id"),
        request_id=_name(made.request_id, "request_id"),
        model=_name(made.model, "model"),
        max_tokens=made.max_tokens,
        prefill_id=_name(made.prefill_id, "prefill_id"),
        decode_id=_name(made.decode_id, "decode_id"),
        split=made.split,
        kv_tokens=made.kv_tokens,
        prefill_kv_tokens=made.prefill_kv_tokens,
        prefill_holds=made.prefill_holds,
        prefill_us=made.prefill_us,
        prefill_done=made.prefill_done,
        context_tokens=made.context_tokens,
        expected_tokens=made.expected_tokens,
        age_us=made.age_us,
        decode_ends_in_us=made.decode_ends_in_us,
        expires_in_us=made.expires_in_us,
    )


def _amount(value: int, field: str) -> None:
    if value > AMOUNT_MAX:
        raise BadArgument(f"{field} is out of range: {value}")


def _name(value: str, field: str) -> str:
    if not 0 < len(value) <= wire.ID_LENGTH_MAX:
        raise BadArgument(f"{field} has {len(value)} characters; 1 to {wire.ID_LENGTH_MAX} are allowed")
    return value


def entry_of(data: bytes) -> event_log_pb2.LogEntry:
    """Raises: BadArgument if these are not the bytes of an entry; DecodeError if they are no message at all."""
    if len(data) > ENTRY_BYTES_MAX:
        raise BadArgument(f"an entry of {len(data)} bytes; the limit is {ENTRY_BYTES_MAX}")
    entry: event_log_pb2.LogEntry = event_log_pb2.LogEntry.FromString(data)
    _name(entry.scheduler_id, "scheduler_id")
    if not entry.incarnation or not entry.number:
        raise BadArgument("an entry without a number")
    wire.at_most(len(entry.items), ITEMS_MAX, "items")
    return entry


def snapshot_parts(
    stream: int, seq: int, held: Iterable[tuple[Fidelity, bytes]], part_keys: int
) -> list[events.SnapshotReceived]:
    """All that a source holds as of batch `seq`, in parts of at most `part_keys` keys; one empty part for nothing."""
    pieces = [
        (fidelity, packed[first : first + 16 * part_keys])
        for fidelity, packed in held
        for first in range(0, len(packed), 16 * part_keys)
    ] or [(Fidelity.EXACT, b"")]
    last = len(pieces) - 1
    return [
        events.SnapshotReceived(stream, seq, part, part == last, packed, fidelity)
        for part, (fidelity, packed) in enumerate(pieces)
    ]
