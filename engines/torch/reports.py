"""A worker's life lines: what it is and how loaded (to the scheduler), which blocks its HBM holds (to the directory).

Both run on threads of their own, so that neither computing nor I/O can starve a heartbeat, and connect again by
themselves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import grpc
import numpy as np

from kvpool.channels.tls import TlsConfig
from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import KEY_BYTES, Fidelity, Role
from kvpool.service.announcer import Announcer, Snapshot, SourceFacts
from kvpool.service.rpc import from_rpc_error, make_channel
from kvpool.service.scheduler_list import Rotation
from kvpool.v1 import engine_pb2, scheduler_pb2, scheduler_pb2_grpc

log = logging.getLogger(__name__)

INTERVAL_DEFAULT_S = 0.5
#: News are reported at once, but not more often than this.
INTERVAL_MIN_S = 0.02
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 1.0
CONNECT_TIMEOUT_S = 3.0
#: A scheduler that speaks every second and is silent for this long hangs: the next one is tried.
SILENT_S = 10.0


class SchedulerLink:
    """The life line `Scheduler.Join`: the instance's facts, then reports.

    Args:
        info: asked at each (re)connection.
        report: asked for each report; what it returns counts as delivered.
        on_role: told, from a thread of the life line, which role the scheduler wants the instance to have.
    """

    def __init__(
        self,
        address: str,
        *,
        info: Callable[[], engine_pb2.EngineInfo],
        report: Callable[[], scheduler_pb2.InstanceReport],
        on_role: Callable[[Role], None] = lambda role: None,
        credential: str = "",
        tls: TlsConfig | None = None,
    ) -> None:
        self._schedulers, self._credential, self._tls = Rotation(address), credential, tls
        self._info, self._report, self._on_role = info, report, on_role
        self._interval_s = INTERVAL_DEFAULT_S
        self._heard_s, self._beats = 0.0, False
        self._rejoining = False
        self._closing = threading.Event()
        self._joined = threading.Event()
        self._call: grpc.Future | None = None
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler-link", daemon=True)

    @property
    def joined(self) -> bool:
        return self._joined.is_set()

    def wait_joined(self, timeout_s: float) -> bool:
        return self._joined.wait(timeout_s)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is news: report soon."""
        self._news.set()

    def rejoin(self) -> None:
        """The facts have changed: ends this connection and begins another, to the same scheduler."""
        self._rejoining = True
        self._cut()

    def _cut(self) -> None:
        call = self._call
        if call is not None:
            call.cancel()

    def close(self) -> None:
        """The scheduler forgets the instance at once."""
        self._closing.set()
        self._news.set()
        self.rejoin()
        self._thread.join(5.0)

    def _run(self) -> None:
        backoff_s = BACKOFF_MIN_S
        while not self._closing.is_set():
            try:
                with make_channel(self._schedulers.address, credential=self._credential, tls=self._tls) as channel:
                    grpc.channel_ready_future(channel).result(CONNECT_TIMEOUT_S)
                    self._join(channel)
            except grpc.RpcError as error:
                why = from_rpc_error(error, self._schedulers.address)
                log.log(logging.INFO if self.joined else logging.DEBUG, "life line to the scheduler: %s", why)
            except grpc.FutureTimeoutError:
                log.debug("the scheduler at %s does not answer", self._schedulers.address)
            except Exception:
                # A bug of ours must not end the life line for good: say so, and begin again.
                log.exception("the life line to the scheduler failed")
            if self._joined.is_set():
                self._joined.clear()
                backoff_s = BACKOFF_MIN_S
            rejoining, self._rejoining = self._rejoining, False
            if rejoining or self._schedulers.next():
                self._closing.wait(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)

    def _join(self, channel: grpc.Channel) -> None:
        ended = threading.Event()
        self._heard_s, self._beats = time.monotonic(), False
        self._rejoining = False  # what has changed before this call is said by it
        call = scheduler_pb2_grpc.SchedulerStub(channel).Join(self._messages(ended))
        self._call = call
        try:
            # While there was no call to cut: its facts may be those of before.
            if self._closing.is_set() or self._rejoining:
                return
            for message in call:
                self._joined.set()
                self._heard_s = time.monotonic()
                if message.report_interval_ms:
                    self._interval_s = message.report_interval_ms / 1000
                else:
                    self._beats = True  # it only shows that it is there
                if message.role in Role.__members__.values():
                    self._on_role(Role(message.role))
        finally:
            ended.set()
            self._news.set()
            call.cancel()

    def _messages(self, ended: threading.Event) -> Iterator[scheduler_pb2.InstanceMessage]:
        """Called by gRPC in a thread of its own, one a connection."""
        yield scheduler_pb2.InstanceMessage(info=self._info())
        while True:
            self._news.wait(self._interval_s)
            if ended.is_set() or self._closing.is_set():
                return
            self._news.clear()
            if self._beats and time.monotonic() - self._heard_s > SILENT_S:
                log.warning("the scheduler at %s has been silent for %.0f s", self._schedulers.address, SILENT_S)
                self._cut()
                return
            yield scheduler_pb2.InstanceMessage(report=self._report())
            if ended.wait(INTERVAL_MIN_S):
                return


class HbmAnnouncements:
    """What the engine's cache holds, mirrored for the directory: the engine's own tables belong to its thread."""

    def __init__(
        self, address: str, facts: SourceFacts, *, block_bytes: int, credential: str = "",
        tls: TlsConfig | None = None,
    ) -> None:  # fmt: skip
        self._lock = threading.Lock()
        self._keys: dict[bytes, None] = {}
        self._number = 0
        self._block_bytes = block_bytes
        self._announcer = Announcer(
            address, facts, snapshot=self._snapshot, usage=self._usage, credential=credential, tls=tls
        )

    def start(self) -> None:
        self._announcer.start()

    def wait_attached(self, timeout_s: float) -> bool:
        return self._announcer.wait_attached(timeout_s)

    def publish(self, changes: Sequence[tuple[bool, bytes]]) -> None:
        """(stored or removed, key), in order."""
        if not changes:
            return
        with self._lock:
            for stored, key in changes:
                if stored:
                    self._keys[key] = None
                else:
                    self._keys.pop(key, None)
            self._number = self._announcer.publish(_runs(changes))

    def close(self) -> None:
        self._announcer.close()

    def _snapshot(self) -> Snapshot:
        with self._lock:
            packed = np.frombuffer(b"".join(self._keys), dtype=np.uint8)
            return [(packed.reshape(-1, KEY_BYTES), Fidelity.EXACT)], self._number

    def _usage(self) -> tuple[int, int]:
        count = len(self._keys)
        return count * self._block_bytes, count


def _runs(changes: Sequence[tuple[bool, bytes]]) -> list[BlockChange]:
    """Neighbours of one kind become one change."""
    runs: list[tuple[ChangeKind, list[bytes]]] = []
    for stored, key in changes:
        kind = ChangeKind.STORED if stored else ChangeKind.REMOVED
        if not runs or runs[-1][0] is not kind:
            runs.append((kind, []))
        runs[-1][1].append(key)
    return [BlockChange(kind, b"".join(keys)) for kind, keys in runs]


class NodeWatch:
    """Finds out what the worker's node is called, however late it starts."""

    def __init__(self, ask: Callable[[], str], on_found: Callable[[], None]) -> None:
        """Args: ask: the node's source id; raises KvpoolError while nothing answers."""
        self._ask, self._on_found = ask, on_found
        self.source_id = ""
        self._closing = threading.Event()
        self._found = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        return self._found.wait(timeout_s)

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self.source_id = self._ask()
            except KvpoolError as error:
                log.debug("the node does not answer yet: %s", error)
                self._closing.wait(BACKOFF_MAX_S)
                continue
            except Exception:
                # Without its node a worker never shares anything: a bug of ours costs another try.
                log.exception("asking the node failed")
                self._closing.wait(BACKOFF_MAX_S)
                continue
            self._found.set()
            self._on_found()
            return
