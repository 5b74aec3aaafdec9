"""What other schedulers say in the log, turned into events of this one's core.

A life line that a peer has gets a stream number here, and is then a life line like any other: suspect when it is
silent, gone when it stays so. Every second each peer says which lines it has and how far each is known; whatever
differs here was lost on the way, and is asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from kvpool.core.errors import KvpoolError
from kvpool.core.ids import Role
from kvpool.v1 import event_log_pb2
from scheduler.core import events
from scheduler.core.cluster import State
from scheduler.service.eventlog import messages
from scheduler.service.eventlog.speaker import Speaker
from scheduler.service.shell import Shell

log = logging.getLogger(__name__)

LogItem = event_log_pb2.LogItem
#: What was asked for is not asked for again before this.
ASK_AGAIN_US = 2_000_000
#: A snapshot that is on its way anyway gets this long.
SNAPSHOT_PATIENCE_US = 1_000_000
#: A line that the core closed (it was replaced, or there is no room) is not asked for again before this.
CLOSED_US = 5_000_000
#: Peers known at a time; above it the one heard of longest ago is forgotten.
PEERS_MAX = 64
ASKED_MAX = 65_536


@dataclass(slots=True)
class RemoteLine:
    """A life line that a peer has: the side on which the core answers."""

    kind: str  # "source" or "instance"
    stream: int  # here
    member_id: str
    closed: Callable[[], None]
    clock_us: Callable[[], int]
    #: Since when the core wants a snapshot; None = it does not.
    awaiting_us: int | None = None
    #: Whether what is said again is taken in.
    restating: bool = False

    def acknowledge(self, seq: int, want_snapshot: bool) -> None:
        if not want_snapshot:
            self.awaiting_us = None
        elif self.awaiting_us is None:
            self.awaiting_us = self.clock_us()

    def close(self, reason: str) -> None:
        self.closed()

    def change_role(self, role: Role) -> None:
        """Roles are changed by the scheduler that has the life line."""

    def end(self) -> events.Event:
        return events.SourceDetached(self.stream) if self.kind == "source" else events.InstanceLeft(self.stream)


@dataclass(slots=True)
class Peer:
    """Another scheduler, in one of its lives."""

    scheduler_id: str
    incarnation: int
    number: int  # of the last entry
    heard_us: int
    address: str = ""
    lines: dict[int, RemoteLine] = field(default_factory=dict)
    #: Stream there -> when it was asked for, or closed from here, and is left alone until.
    asked: dict[int, int] = field(default_factory=dict)
    wants: dict[int, None] = field(default_factory=dict)
    wants_placements: bool = False

    @property
    def key(self) -> str:
        """Names this life of the scheduler."""
        return f"{self.scheduler_id}#{self.incarnation:x}"

    def leave_alone(self, stream: int, until_us: int) -> None:
        self.asked.pop(stream, None)
        self.asked[stream] = until_us
        if len(self.asked) > ASKED_MAX:
            del self.asked[next(iter(self.asked))]


class Listener:
    """Takes in entries of the log, in order. `speaker` is told of own entries, and of what peers ask for."""

    def __init__(self, shell: Shell, scheduler_id: str, incarnation: int, speaker: Speaker) -> None:
        self._shell, self._scheduler_id, self._incarnation, self._speaker = shell, scheduler_id, incarnation, speaker
        self.peers: dict[tuple[str, int], Peer] = {}
        self.entries_read = 0
        self.entries_bad = 0
        self.gaps = 0
        self._versions_seen: dict[bytes, None] = {}

    # ------------------------------------------------------------ entries

    def receive(self, version: bytes | None, data: bytes | None) -> None:
        """Takes in one entry. One that is not understood is passed over with a word in the log."""
        if version != messages.VERSION:
            self._unknown_version(version)
            return
        try:
            entry = messages.entry_of(data or b"")
        except (KvpoolError, DecodeError) as error:
            self._bad(f"an entry of the event log is no message: {error}")
            return
        if entry.incarnation == self._incarnation and entry.scheduler_id == self._scheduler_id:
            self._speaker.read_back(entry)
            return
        peer = self._peer(entry)
        if peer is None:
            return
        self.entries_read += 1
        for item in entry.items:
            try:
                self._take(peer, item)
            except (KvpoolError, DecodeError, ValueError) as error:
                self._bad(f"scheduler {peer.scheduler_id} said something wrong: {error}")
            except Exception:
                self._bad(f"what scheduler {peer.scheduler_id} said could not be taken in", failed=True)

    def _unknown_version(self, version: bytes | None) -> None:
        self.entries_bad += 1
        shown = (version or b"")[:32]
        if shown not in self._versions_seen and len(self._versions_seen) < 64:
            self._versions_seen[shown] = None
            log.warning("entries of the event log of version %r are passed over: another release writes them", shown)

    def _bad(self, message: str, *, failed: bool = False) -> None:
        self.entries_bad += 1
        # The first few say what is wrong, the others only count.
        if self.entries_bad <= 20 or self.entries_bad % 1000 == 0:
            log.warning("%s", message, exc_info=failed)

    def _peer(self, entry: event_log_pb2.LogEntry) -> Peer | None:
        """Who speaks; None for what was said before."""
        now_us = self._shell.now_us()
        identity = (entry.scheduler_id, entry.incarnation)
        peer = self.peers.get(identity)
        if peer is None:
            peer = self._new_peer(entry, now_us)
        elif entry.number <= peer.number:
            return None
        elif entry.number > peer.number + 1:
            self.gaps += 1
            log.warning("%d entries of scheduler %s were lost", entry.number - peer.number - 1, peer.scheduler_id)
            self._shell.submit(events.PeerForgotten(peer.key))
            peer.wants_placements = True
        peer.number, peer.heard_us = entry.number, now_us
        return peer

    def _new_peer(self, entry: event_log_pb2.LogEntry, now_us: int) -> Peer:
        if len(self.peers) >= PEERS_MAX:
            self._forget(min(self.peers.values(), key=lambda p: (p.heard_us, p.key)))
        if entry.scheduler_id == self._scheduler_id:
            log.error("another scheduler is called %r too: give each its own --id", entry.scheduler_id)
        peer = Peer(entry.scheduler_id, entry.incarnation, entry.number, now_us)
        peer.wants_placements = entry.number > 1
        self.peers[entry.scheduler_id, entry.incarnation] = peer
        log.info("scheduler %s is heard in the event log", peer.scheduler_id)
        return peer

    # ------------------------------------------------------------ items

    def _take(self, peer: Peer, item: LogItem) -> None:
        kind = item.WhichOneof("item")
        take = _TAKERS.get(kind or "")
        if take is not None:  # else: of a later release, which counts on being passed over
            take(self, peer, item)

    def _begin(self, peer: Peer, item: LogItem, kind: str, member_id: str) -> RemoteLine | None:
        """A line for what joins, if it is to be taken in."""
        line = peer.lines.get(item.stream)
        if line is not None:
            # Known: what is said again is of interest only if it was asked for.
            line.restating = item.restated and line.awaiting_us is not None
            return None
        if item.restated:
            if peer.asked.get(item.stream, 0) > self._shell.now_us() + ASK_AGAIN_US:
                return None  # closed from here a moment ago
            known = self._shell.core.cluster.member(kind, member_id)
            if known is not None and known.state is State.ALIVE:
                return None  # it speaks by another life line by now
        line = RemoteLine(kind, 0, member_id, lambda: None, self._shell.now_us, restating=item.restated)
        line.stream = self._shell.open_stream(line)
        line.closed = lambda: self._closed(peer, item.stream)
        peer.lines[item.stream] = line
        return line

    def _source(self, peer: Peer, item: LogItem) -> None:
        messages.source_attached(item, 0, "")  # wrong ones open no line
        line = self._begin(peer, item, "source", item.source.source_id)
        if line is not None:
            self._shell.submit(messages.source_attached(item, line.stream, peer.scheduler_id))

    def _instance(self, peer: Peer, item: LogItem) -> None:
        messages.instance_joined(item, 0, "")  # wrong ones open no line
        line = self._begin(peer, item, "instance", item.instance.instance_id)
        if line is not None:
            self._shell.submit(messages.instance_joined(item, line.stream, peer.scheduler_id))

    def _changes(self, peer: Peer, item: LogItem) -> None:
        line = peer.lines.get(item.stream)
        if line is not None:
            self._shell.submit(messages.blocks_changed(item, line.stream))

    def _snapshot(self, peer: Peer, item: LogItem) -> None:
        line = peer.lines.get(item.stream)
        if line is None or (item.restated and not line.restating):
            return
        self._shell.submit(messages.snapshot_received(item, line.stream))
        if item.restated and item.snapshot.last:
            line.restating = False

    def _report(self, peer: Peer, item: LogItem) -> None:
        line = peer.lines.get(item.stream)
        if line is not None:
            self._shell.submit(messages.instance_reported(item, line.stream))

    def _ended(self, peer: Peer, item: LogItem) -> None:
        self._end_line(peer, item.stream)

    def _placed(self, peer: Peer, item: LogItem) -> None:
        event = messages.peer_placed(item.placed, peer.key)
        owner = (event.gateway_id, event.request_id)
        known = self._shell.core.book.placements.get(owner)
        # The order of the log decides: an own placement that is not read back yet comes after this one.
        if known is None or not (item.restated or self._speaker.said_later(owner)):
            self._shell.submit(event)

    def _over(self, peer: Peer, item: LogItem) -> None:
        over = item.over
        if not over.anyone:
            self._shell.submit(events.PeerEnded(over.gateway_id, over.request_id, peer.key))
        elif (over.gateway_id, over.request_id) in self._shell.core.book.placements:
            self._shell.submit(events.PeerEnded(over.gateway_id, over.request_id, None))

    def _want(self, peer: Peer, item: LogItem) -> None:
        want = item.want
        if want.scheduler_id in ("", self._scheduler_id) and want.incarnation in (0, self._incarnation):
            self._speaker.wanted(want)

    def _beat(self, peer: Peer, item: LogItem) -> None:
        beat, now_us = item.beat, self._shell.now_us()
        peer.address = beat.address[:512]
        spoken = dict.fromkeys(beat.instances)
        for source in beat.sources:
            spoken[source.stream] = None
        for stream in [stream for stream in peer.lines if stream not in spoken]:
            self._end_line(peer, stream)
        known = [(peer.lines[s.stream], s) for s in beat.sources if s.stream in peer.lines]
        known = [(line, source) for line, source in known if line.kind == "source"]
        heard = tuple((line.stream, source.bytes_used) for line, source in known if source.alive)
        if heard:
            self._shell.submit(events.SourcesHeard(heard))
        for line, source in known:
            self._source_beat(peer, line, source, now_us)
        for stream in spoken:
            if stream not in peer.lines:
                self._ask(peer, stream, now_us)

    def _source_beat(self, peer: Peer, line: RemoteLine, beat: event_log_pb2.SourceBeat, now_us: int) -> None:
        seq, synced = self._shell.core.directory.synced(line.member_id)
        if beat.settled and (seq != beat.seq or not synced) and line.awaiting_us is None:
            line.awaiting_us = now_us - SNAPSHOT_PATIENCE_US
        if beat.settled and line.awaiting_us is not None and now_us - line.awaiting_us >= SNAPSHOT_PATIENCE_US:
            self._ask(peer, beat.stream, now_us)

    def _ask(self, peer: Peer, stream: int, now_us: int) -> None:
        if peer.asked.get(stream, 0) <= now_us:
            peer.wants[stream] = None
            peer.leave_alone(stream, now_us + ASK_AGAIN_US)

    def take_wants(self) -> list[LogItem]:
        """What is to be asked of peers now."""
        items = []
        for peer in self.peers.values():
            if peer.wants or peer.wants_placements:
                want = event_log_pb2.Want(
                    scheduler_id=peer.scheduler_id, incarnation=peer.incarnation, streams=peer.wants,
                    placements=peer.wants_placements,
                )  # fmt: skip
                peer.wants, peer.wants_placements = {}, False
                items.append(LogItem(want=want))
        return items

    # ------------------------------------------------------------ ends

    def _end_line(self, peer: Peer, stream: int) -> None:
        """The peer says that a line has ended."""
        line = peer.lines.pop(stream, None)
        if line is not None:
            self._shell.close_stream(line.stream, line.end())

    def _closed(self, peer: Peer, stream: int) -> None:
        """The core has ended a line. Called while it handles an event, so the end is told later."""
        line = peer.lines.pop(stream, None)
        if line is not None:
            peer.leave_alone(stream, self._shell.now_us() + CLOSED_US)
            asyncio.get_running_loop().call_soon(self._shell.close_stream, line.stream, line.end())

    def _forget(self, peer: Peer) -> None:
        for stream in list(peer.lines):
            self._end_line(peer, stream)
        del self.peers[peer.scheduler_id, peer.incarnation]

    def forget_gone(self, gone_us: int) -> None:
        """Peers that were silent for `gone_us` and have no line left. Placements of theirs expire by themselves."""
        now_us = self._shell.now_us()
        for peer in list(self.peers.values()):
            if not peer.lines and now_us - peer.heard_us > gone_us:
                log.warning("scheduler %s is gone from the event log", peer.scheduler_id)
                self._forget(peer)

    def check_invariants(self) -> None:
        assert len(self.peers) <= PEERS_MAX
        streams = [line.stream for peer in self.peers.values() for line in peer.lines.values()]
        assert len(streams) == len(set(streams))
        for peer in self.peers.values():
            for line in peer.lines.values():
                speaks = self._shell.core.cluster.streams.get(line.stream)
                assert speaks == (line.kind, line.member_id), f"line {line.stream} speaks for {speaks}"


_TAKERS: dict[str, Callable[[Listener, Peer, LogItem], None]] = {
    "source": Listener._source,
    "changes": Listener._changes,
    "snapshot": Listener._snapshot,
    "instance": Listener._instance,
    "report": Listener._report,
    "ended": Listener._ended,
    "placed": Listener._placed,
    "over": Listener._over,
    "beat": Listener._beat,
    "want": Listener._want,
}
