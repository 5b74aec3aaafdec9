"""Tells a directory what a source holds: the life line `Directory.Attach`, for a node's DRAM as for a worker's HBM.

It has threads of its own, so that no data work, no computing and no event loop can starve its heartbeats. It connects
again by itself, with back-off; nothing that it does blocks the source.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from kvpool.channels.tls import TlsConfig
from kvpool.core.changes import BlockChange
from kvpool.core.ids import Fidelity, KeyArray, Tier
from kvpool.service.event_log import EventLog
from kvpool.service.rpc import make_channel
from kvpool.service.scheduler_list import Rotation
from kvpool.service.wire import change_to_proto
from kvpool.v1 import common_pb2, directory_pb2, directory_pb2_grpc

log = logging.getLogger(__name__)

SNAPSHOT_PART_KEYS = 65_536
BATCH_KEYS_MAX = 16_384
#: Changes wait this long for company, so that a burst of commits is one message.
GATHER_S = 0.005
HEARTBEAT_DEFAULT_S = 1.0
CONNECT_TIMEOUT_S = 3.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 1.0
#: A directory that speaks every second and is silent for this long hangs: the next one is tried.
SILENT_S = 10.0

Message = directory_pb2.SourceMessage
#: What is held, a list for each fidelity, and the number of the last `publish` that it includes.
Snapshot = tuple[Sequence[tuple[KeyArray, Fidelity]], int]


@dataclass(frozen=True)
class SourceFacts:
    """What a source says about itself when it attaches."""

    source_id: str
    epoch: int
    tier: Tier
    address: str = ""  # of its BlockSource service; empty where blocks can't be pulled from it
    host_id: str = ""
    instance_id: str = ""
    bytes_total: int = 0


class Announcer:
    """The life line of one source to one directory.

    Args:
        snapshot: called in another thread.
        usage: (bytes used, blocks); called in another thread, must be quick.
    """

    def __init__(
        self,
        address: str,
        facts: SourceFacts,
        *,
        snapshot: Callable[[], Snapshot],
        usage: Callable[[], tuple[int, int]] = lambda: (0, 0),
        credential: str = "",
        tls: TlsConfig | None = None,
    ) -> None:
        self._schedulers, self._facts, self._credential, self._tls = Rotation(address), facts, credential, tls
        self._snapshot, self._usage = snapshot, usage
        self._log = EventLog()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._attached = threading.Event()
        self._attachments = 0
        self._lock = threading.Lock()
        self._cut: Any = None
        # For snapshots, which may take long: heartbeats go on meanwhile.
        self._snapshots = ThreadPoolExecutor(1, thread_name_prefix="announcer-snapshot")
        self._thread = threading.Thread(target=self._keep_attached, name="announcer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def publish(self, changes: Sequence[BlockChange]) -> int:
        """Queues changes, in order. Returns the number of this batch. Never blocks; from any thread."""
        number = self._log.append(changes)
        self._wake.set()
        return number

    def lose(self) -> None:
        """Some changes were lost: the directory gets a snapshot. From any thread."""
        self._log.lose()
        self._wake.set()

    @property
    def last_number(self) -> int:
        """Number of the last batch published; 0 before the first."""
        return self._log.last_number

    @property
    def attached(self) -> bool:
        """Whether the directory knows this source and was sent its snapshot."""
        return self._attached.is_set()

    @property
    def attachments(self) -> int:
        """Times the source was attached since the start."""
        return self._attachments

    def wait_attached(self, timeout_s: float) -> bool:
        return self._attached.wait(timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        """Ends the life line: the directory forgets the source at once."""
        self._stopping.set()
        self._wake.set()
        with self._lock:
            if self._cut is not None:
                self._cut.cancel()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._snapshots.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ the life line's thread

    def _keep_attached(self) -> None:
        backoff_s = BACKOFF_MIN_S
        while not self._stopping.is_set():
            try:
                self._attach()
                why = "the directory ended the stream"
            except grpc.RpcError as error:
                why = f"{error.code().name}: {error.details()}" if hasattr(error, "code") else str(error)
            except grpc.FutureTimeoutError:
                why = "no answer"
            except Exception:
                # A bug of ours must not end the life line for good: say so, and begin again.
                log.exception("%s: the life line failed", self._facts.source_id)
                why = "failed"
            if self._stopping.is_set():
                return
            level = logging.INFO if self._attached.is_set() else logging.DEBUG
            log.log(
                level, "%s: life line to the directory at %s: %s", self._facts.source_id, self._schedulers.address, why
            )
            if self._attached.is_set():
                self._attached.clear()
                backoff_s = BACKOFF_MIN_S
            if self._schedulers.next():
                self._stopping.wait(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)

    def _attach(self) -> None:
        """Attaches, and stays until the stream ends."""
        channel = make_channel(self._schedulers.address, credential=self._credential, tls=self._tls)
        line = _Line()
        try:
            grpc.channel_ready_future(channel).result(CONNECT_TIMEOUT_S)
            call = directory_pb2_grpc.DirectoryStub(channel).Attach(self._messages(line))
            with self._lock:
                self._cut = call
            if self._stopping.is_set():
                call.cancel()
            # The first answer has a deadline; later on a directory that is gone or stuck is found by the keepalive.
            watchdog = threading.Timer(CONNECT_TIMEOUT_S, call.cancel)
            watchdog.daemon = True
            watchdog.start()
            for message in call:
                watchdog.cancel()
                line.receive(message)
                self._wake.set()
        finally:
            line.ended = True
            self._wake.set()
            with self._lock:
                self._cut = None
            channel.close()

    # ------------------------------------------------------------ what is sent, in a thread of gRPC

    def _messages(self, line: _Line) -> Iterator[Message]:
        """Hello, a snapshot once the directory has answered, then changes and heartbeats until the line ends."""
        yield Message(hello=self._hello())
        snapshot: Future[Snapshot] | None = None
        beat_due_s = 0.0
        while not (line.ended or self._stopping.is_set()):
            self._wake.clear()
            now_s = time.monotonic()
            if now_s >= beat_due_s:
                beat_due_s = now_s + line.heartbeat_s
                if line.silent(now_s):
                    self._cut_line()
                    return
                yield self._heartbeat()
            if snapshot is not None and snapshot.done():
                yield from self._snapshot_parts(line, snapshot.result())
                snapshot = None
                self._say_attached(line)
            if snapshot is None and line.answered:
                changes = None if line.snapshot_wanted else self._log.take(BATCH_KEYS_MAX)
                if changes is None:
                    line.snapshot_wanted = False
                    snapshot = self._snapshots.submit(self._snapshot)
                    snapshot.add_done_callback(lambda _: self._wake.set())
                elif changes:
                    line.seq += 1
                    events = [change_to_proto(change) for change in changes]
                    yield Message(events=directory_pb2.EventBatch(seq=line.seq, events=events))
                    continue
            if self._wake.wait(max(0.0, beat_due_s - time.monotonic())):
                self._stopping.wait(GATHER_S)

    def _cut_line(self) -> None:
        log.warning("%s: the directory has been silent for %.0f s", self._facts.source_id, SILENT_S)
        with self._lock:
            if self._cut is not None:
                self._cut.cancel()

    def _snapshot_parts(self, line: _Line, snapshot: Snapshot) -> Iterator[Message]:
        """All keys, in parts, as of the batches sent so far."""
        held, number = snapshot
        self._log.snapshot_taken(number)
        pieces = [
            (np.ascontiguousarray(keys[first : first + SNAPSHOT_PART_KEYS]), fidelity)
            for keys, fidelity in held
            for first in range(0, len(keys), SNAPSHOT_PART_KEYS)
        ] or [(np.empty((0, 16), dtype=np.uint8), Fidelity.EXACT)]
        for part, (piece, fidelity) in enumerate(pieces):
            yield Message(
                snapshot=directory_pb2.Snapshot(
                    seq=line.seq, part=part, last=part == len(pieces) - 1,
                    keys=common_pb2.KeyList(keys=piece.tobytes()), fidelity=int(fidelity),
                )
            )  # fmt: skip

    def _say_attached(self, line: _Line) -> None:
        if not line.told:
            line.told = True
            self._attachments += 1
            self._attached.set()
            log.info("%s: attached to the directory at %s", self._facts.source_id, self._schedulers.address)

    def _hello(self) -> directory_pb2.SourceHello:
        f = self._facts
        return directory_pb2.SourceHello(
            source_id=f.source_id, epoch=f.epoch, tier=int(f.tier), address=f.address, host_id=f.host_id,
            instance_id=f.instance_id, bytes_total=f.bytes_total,
        )  # fmt: skip

    def _heartbeat(self) -> Message:
        bytes_used, blocks = self._usage()
        return Message(heartbeat=directory_pb2.SourceHeartbeat(bytes_used=bytes_used, blocks=blocks))


class _Line:
    """One attached stream: its numbers, and what the directory last said."""

    def __init__(self) -> None:
        self.heartbeat_s = HEARTBEAT_DEFAULT_S
        self.seq = 0
        self.answered = False
        self.told = False
        self.ended = False
        # A new stream begins with a snapshot, whether the directory asks for it or not.
        self.snapshot_wanted = True
        self._heard_s = time.monotonic()
        self._beats = False

    def receive(self, message: directory_pb2.DirectoryMessage) -> None:
        self._heard_s = time.monotonic()
        # Only to show that it is there.
        self._beats |= not message.heartbeat_interval_ms
        if self.answered:
            self.snapshot_wanted |= message.want_snapshot
        self.answered = True
        if message.heartbeat_interval_ms:
            self.heartbeat_s = message.heartbeat_interval_ms / 1000

    def silent(self, now_s: float) -> bool:
        """Whether a directory that has something to say every second has said nothing for long."""
        return self._beats and now_s - self._heard_s > SILENT_S
