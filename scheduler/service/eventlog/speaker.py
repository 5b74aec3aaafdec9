"""What this scheduler says in the log: news of the life lines it has and of its placements, and again on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kvpool.core.ids import Fidelity, pack_keys
from kvpool.v1 import event_log_pb2
from scheduler.core import events
from scheduler.core.cluster import State
from scheduler.core.commands import CloseStream, Command, Placed, PlacementEnded
from scheduler.service.eventlog import messages
from scheduler.service.eventlog.outgoing import Outgoing
from scheduler.service.shell import Shell

#: Keys of one part of a snapshot that is said again.
PART_KEYS = 16_384
#: What is said again waits while more than this is queued, or more entries than this are not read back yet: readers
#: must be able to follow before the log is trimmed.
RESTATE_BYTES_AHEAD = 1 << 20
RESTATE_ENTRIES_AHEAD = 64
#: Streams that may be asked for at a time; those beyond it are asked for again by whoever misses them.
WANTED_MAX = 65_536

_ENDS = (events.SourceDetached, events.InstanceLeft)


class Speaker:
    """Observes the shell; puts what others should know into `outgoing`."""

    def __init__(self, shell: Shell, outgoing: Outgoing, address: Callable[[], str]) -> None:
        self._shell, self._outgoing, self._address = shell, outgoing, address
        #: Life lines of sources and instances that this scheduler has, by stream.
        self._lines: dict[int, None] = {}
        self._wanted: dict[int, None] = {}
        self._placements_wanted = False
        self._restating: Iterator[event_log_pb2.LogItem] | None = None
        #: The last own entry that came back from the log.
        self.confirmed = 0
        #: Placements that were said and did not come back yet: what others have said before them is older.
        self._unread: dict[tuple[str, str], None] = {}

    # ------------------------------------------------------------ news

    def observe(self, event: events.Event, commands: list[Command]) -> None:
        """Called after each event that the core has handled."""
        say = _SAYINGS.get(type(event))
        if say is not None:
            say(self, event)
        ended: dict[tuple[str, str], None] = {}
        for command in commands:
            if isinstance(command, CloseStream):
                self._line_ended(command.stream)
            elif isinstance(command, Placed):
                self._placed((command.gateway_id, command.request_id))
            elif isinstance(command, PlacementEnded):
                ended[command.gateway_id, command.request_id] = None
        if isinstance(event, events.PeerPlaced | events.PeerEnded):
            # The others know. What has ended besides it, because its time was over, they do not.
            ended.pop((event.gateway_id, event.request_id), None)
        for gateway_id, request_id in ended:
            self._unread.pop((gateway_id, request_id), None)
            if (gateway_id, request_id) not in self._shell.core.book.placements:
                self._outgoing.append(messages.over_item(gateway_id, request_id, anyone=False))
        if isinstance(event, events.OutcomeReported) and not event.first_token:
            self._outcome(event, ended)

    def _source_attached(self, event: events.SourceAttached) -> None:
        if not event.peer and event.stream in self._shell.core.cluster.streams:
            self._lines[event.stream] = None
            self._outgoing.append(messages.source_item(event, event.stream))

    def _instance_joined(self, event: events.InstanceJoined) -> None:
        if not event.peer and event.stream in self._shell.core.cluster.streams:
            self._lines[event.stream] = None
            self._outgoing.append(messages.instance_item(event.info, event.stream))

    def _blocks_changed(self, event: events.BlocksChanged) -> None:
        if event.stream in self._lines:
            self._outgoing.append(messages.changes_item(event))

    def _snapshot_received(self, event: events.SnapshotReceived) -> None:
        if event.stream in self._lines:
            self._outgoing.append(messages.snapshot_item(event))

    def _instance_reported(self, event: events.InstanceReported) -> None:
        if event.stream in self._lines:
            self._outgoing.append(messages.report_item(event))

    def _stream_ended(self, event: events.SourceDetached | events.InstanceLeft) -> None:
        self._line_ended(event.stream)

    def _line_ended(self, stream: int) -> None:
        if stream in self._lines:
            del self._lines[stream]
            self._wanted.pop(stream, None)
            self._outgoing.append(messages.ended_item(stream))

    def _placed(self, owner: tuple[str, str]) -> None:
        placement = self._shell.core.book.placements.get(owner)
        if placement is not None and not placement.peer:
            self._outgoing.append(messages.placed_item(placement, self._shell.core.now_us))
            self._unread[owner] = None

    def _outcome(self, event: events.OutcomeReported, ended: dict[tuple[str, str], None]) -> None:
        """An outcome of a request that was placed by another scheduler: that one may be gone, so all are told."""
        gateway = self._shell.core.cluster.gateway_of(event.stream)
        if gateway is not None and (gateway.opened.gateway_id, event.request_id) not in ended:
            self._outgoing.append(messages.over_item(gateway.opened.gateway_id, event.request_id, anyone=True))

    # ------------------------------------------------------------ read back

    def read_back(self, entry: event_log_pb2.LogEntry) -> None:
        """An own entry has come back: what is read from now on was written after it."""
        self.confirmed = max(self.confirmed, entry.number)
        for item in entry.items:
            if item.HasField("placed") and not item.restated:
                self._unread.pop((item.placed.gateway_id, item.placed.request_id), None)

    def said_later(self, owner: tuple[str, str]) -> bool:
        """Whether this scheduler has placed a request after what is being read."""
        return owner in self._unread

    def interrupted(self) -> None:
        """The log went down: what did not come back may never do so."""
        self._unread.clear()

    # ------------------------------------------------------------ every second

    def beat(self) -> None:
        """Says which life lines there are, and how far each source's changes are known."""
        core = self._shell.core
        beat = event_log_pb2.Beat(address=self._address())
        for stream in self._lines:
            kind, member_id = core.cluster.streams[stream]
            if kind == "instance":
                beat.instances.append(stream)
                continue
            source = core.cluster.sources[member_id]
            seq, synced = core.directory.synced(member_id)
            beat.sources.add(
                stream=stream,
                alive=source.state is State.ALIVE,
                settled=synced and not source.awaits_snapshot,
                seq=seq,
                bytes_used=source.bytes_used,
                blocks=core.directory.held_count(member_id),
            )
        self._outgoing.append(messages.LogItem(beat=beat))

    # ------------------------------------------------------------ again

    def wanted(self, want: event_log_pb2.Want) -> None:
        """Somebody misses something of what was said."""
        if want.everything:
            self._wanted.update(dict.fromkeys(self._lines))
        for stream in want.streams[:WANTED_MAX]:
            if stream in self._lines:
                self._wanted[stream] = None
        self._placements_wanted |= want.everything or want.placements

    @property
    def restates(self) -> bool:
        """Whether something is still to be said again."""
        return self._restating is not None or bool(self._wanted) or self._placements_wanted

    def restate(self) -> None:
        """Says again what was asked for, as much as readers can be expected to follow."""
        while (
            self._outgoing.bytes < RESTATE_BYTES_AHEAD
            and self._outgoing.number - self.confirmed < RESTATE_ENTRIES_AHEAD
        ):
            if self._restating is None:
                self._restating = self._next_restatement()
                if self._restating is None:
                    return
            item = next(self._restating, None)
            if item is None:
                self._restating = None
            else:
                self._outgoing.append(item)

    def _next_restatement(self) -> Iterator[event_log_pb2.LogItem] | None:
        core = self._shell.core
        for stream in self._wanted:
            kind, member_id = core.cluster.streams[stream]
            # What a source half through a snapshot holds is not known; that snapshot goes into the log as it comes.
            if kind == "source" and core.cluster.sources[member_id].awaits_snapshot:
                continue
            del self._wanted[stream]
            return (
                self._source_again(stream, member_id) if kind == "source" else self._instance_again(stream, member_id)
            )
        if self._placements_wanted:
            self._placements_wanted = False
            return self._placements_again()
        return None

    def _source_again(self, stream: int, source_id: str) -> Iterator[event_log_pb2.LogItem]:
        core = self._shell.core
        keys, fidelities = core.directory.held(source_id, in_order=False)
        held = [(f, pack_keys(keys[fidelities == f])) for f in Fidelity if (fidelities == f).any()]
        parts = messages.snapshot_parts(stream, core.directory.synced(source_id)[0], held, PART_KEYS)
        hello = messages.source_item(core.cluster.sources[source_id].attached, stream, restated=True)
        # Taken now, all of it; said bit by bit. Changes that come meanwhile have later numbers.
        items = [hello, *(messages.snapshot_item(part, restated=True) for part in parts)]
        return iter(items)

    def _instance_again(self, stream: int, instance_id: str) -> Iterator[event_log_pb2.LogItem]:
        instance = self._shell.core.cluster.instances[instance_id]
        report = events.InstanceReported(
            stream=stream, running=instance.running, waiting=instance.waiting, kv_tokens_free=instance.kv_tokens_free,
            prefill=(), decode=(), links=(), finished_prefills=(), draining=instance.draining,
        )  # fmt: skip
        joined = messages.instance_item(instance.info, stream, restated=True)
        return iter([joined, messages.report_item(report, restated=True)])

    def _placements_again(self) -> Iterator[event_log_pb2.LogItem]:
        core = self._shell.core
        for owner in list(core.book.placements):
            placement = self._shell.core.book.placements.get(owner)
            if placement is not None and not placement.peer:
                yield messages.placed_item(placement, self._shell.core.now_us, restated=True)

    def check_invariants(self) -> None:
        streams = self._shell.core.cluster.streams
        assert all(stream in streams for stream in self._lines), "a life line that is gone is still spoken of"
        assert all(stream in self._lines for stream in self._wanted)


_SAYINGS: dict[type, Callable[[Speaker, Any], None]] = {
    events.SourceAttached: Speaker._source_attached,
    events.InstanceJoined: Speaker._instance_joined,
    events.BlocksChanged: Speaker._blocks_changed,
    events.SnapshotReceived: Speaker._snapshot_received,
    events.InstanceReported: Speaker._instance_reported,
    events.SourceDetached: Speaker._stream_ended,
    events.InstanceLeft: Speaker._stream_ended,
}
