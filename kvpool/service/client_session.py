"""A client's session with one source: keeps the life line up, opens the best data channel, begins anew when lost.

The life line has a thread of its own. Whoever wants to call asks for the live `Session` and gets it or an error, at the
latest after the time that it is willing to wait; a source known to be gone is an error at once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from kvpool.channels.base import Offer, Opener
from kvpool.channels.failover import FailoverChannel
from kvpool.channels.links import Links
from kvpool.channels.shared_index import SharedIndex
from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import DeadlineExceeded, KvpoolError, ReservationExpired, Unavailable
from kvpool.core.ids import NamespaceId
from kvpool.service import wire
from kvpool.service.host import host_id
from kvpool.service.rpc import from_rpc_error, make_channel
from kvpool.service.writer_lock import WriterLock
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import block_source_pb2_grpc, source_admin_pb2, source_admin_pb2_grpc

log = logging.getLogger(__name__)

BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 1.0
CLOSE_TIMEOUT_S = 5.0
_SLOW_HINT = "is it overloaded, or the channel slow to open? give a longer timeout_s"


class WritesUnderWay:
    """Which reservations of a session are being written, as its pings tell the source. Thread-safe.

    The source frees an expired reservation once a ping does not name it that answers a pong sent after the expiry. That
    is sound because no write begins after the expiry: one that began before is named from before the pong came.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen = 0
        self._writers: dict[int, int] = {}  # by reservation

    @contextlib.contextmanager
    def during(self, reservation: int, expires_s: float) -> Iterator[None]:
        """Around one write. Raises: ReservationExpired if the reservation's time, monotonic seconds, is over."""
        with self._lock:
            # Under the lock, so that no ping that does not name it can be newer than this look at the clock.
            if time.monotonic() >= expires_s:
                raise ReservationExpired(f"reservation {reservation} has expired", hint="abort it and reserve again")
            self._writers[reservation] = self._writers.get(reservation, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._writers[reservation] -= 1
                if not self._writers[reservation]:
                    del self._writers[reservation]

    def saw(self, pong: int) -> None:
        """A pong has come; 0 = from a source that does not number them."""
        with self._lock:
            self._seen = pong

    def ping(self) -> pb.SessionPing:
        with self._lock:
            return pb.SessionPing(seen=self._seen, writing=list(self._writers))


@dataclass
class Session:
    """A live session; once `lost`, nothing may be written in its name."""

    id: int
    epoch: int
    source_id: str
    stub: Any
    channel: FailoverChannel
    shared: SharedIndex | None  # the source's own index, where it is on this host
    numbers: dict[NamespaceId, int]  # by which the source's index names namespaces
    lock: WriterLock | None
    writes: WritesUnderWay
    lost: bool = False


class SessionKeeper:
    """Owns the gRPC channel and the thread of the life line."""

    def __init__(
        self,
        address: str,
        client: str,
        credential: str,
        openers: Mapping[str, Opener],
        on_open: Callable[[Any], dict[NamespaceId, int]],
        timeout_s: float,
        links: Links,
        tls: TlsConfig | None = None,
    ) -> None:
        """Args: on_open: told the stub of each new session; returns the numbers of the namespaces it registered."""
        self.address, self._client, self._credential, self._links = address, client, credential, links
        self._tls = tls
        self._openers, self._on_open, self._timeout_s = openers, on_open, timeout_s
        self._changed = threading.Condition()
        self._session: Session | None = None
        self._error: KvpoolError | None = None
        self._stopping = threading.Event()
        self._cut: Any = None
        self._thread: threading.Thread | None = None
        self.sessions_opened = 0

    @property
    def current(self) -> Session | None:
        return self._session

    def session(self, timeout_s: float) -> Session:
        """The live session; the first call begins to connect. Raises: Unavailable."""
        with self._changed:
            if self._thread is None and not self._stopping.is_set():
                self._thread = threading.Thread(target=self._run, name="pool-session", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._session or self._error or self._stopping.is_set(), timeout_s)
            if self._session is not None:
                return self._session
            if self._stopping.is_set():
                raise Unavailable("this client is closed")
            raise self._error or Unavailable(
                f"no answer from {self.address} within {timeout_s:.1f} s",
                hint=_SLOW_HINT,
            )

    def forget(self, session: Session) -> None:
        """The source does not know this session any more: opens another."""
        with self._changed:
            if self._session is session and self._cut is not None:
                self._cut.cancel()

    def close(self) -> None:
        with self._changed:
            self._stopping.set()
            if self._session is not None and self._session.lock is not None:
                # Before the life line ends, so that the source sees at once that nothing writes any more.
                self._session.lock.retire()
            if self._cut is not None:
                self._cut.cancel()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        backoff_s = BACKOFF_MIN_S
        while not self._stopping.is_set():
            opened = self.sessions_opened
            try:
                self._live_once()
                error: KvpoolError = Unavailable(f"{self.address} ended the session")
            except grpc.RpcError as rpc_error:
                error = _no_session(from_rpc_error(rpc_error, self.address))
            except KvpoolError as kvpool_error:
                error = kvpool_error
            except OSError as os_error:
                error = Unavailable(f"no session with {self.address}: {os_error}")
            except Exception as bug:
                # It must not end the life line for good: say so, and begin again.
                log.exception("%s: the session with %s failed", self._client, self.address)
                error = Unavailable(f"no session with {self.address}: {type(bug).__name__}: {bug}")
            with self._changed:
                self._session, self._error, self._cut = None, error, None
                self._changed.notify_all()
            if self.sessions_opened > opened and not self._stopping.is_set():
                log.warning("%s: session with %s lost: %s", self._client, self.address, error)
                backoff_s = BACKOFF_MIN_S
            self._stopping.wait(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    def _live_once(self) -> None:
        """Opens a session and stays in it until it ends."""
        wake = threading.Event()
        lock, writes = self._writer_lock(), WritesUnderWay()
        grpc_channel = make_channel(self.address, credential=self._credential, tls=self._tls)
        session: Session | None = None
        try:
            stub = block_source_pb2_grpc.BlockSourceStub(grpc_channel)
            # Fails fast, with a deadline, where the stream below would wait for a first answer without one.
            info = stub.GetSourceInfo(pb.GetSourceInfoRequest(), timeout=self._timeout_s)
            interval_s = [1.0]
            call = stub.OpenSession(self._pings(wake, interval_s, lock, writes))
            with self._changed:
                self._cut = call
                if self._stopping.is_set():
                    return
            watchdog = threading.Timer(self._timeout_s, call.cancel)
            watchdog.daemon = True
            watchdog.start()
            first = next(call)
            writes.saw(first.number)
            interval_s[0] = max(first.ping_interval_ms, 10) / 1000
            numbers = self._on_open(stub)
            channel, shared = self._open_channels(stub, first.session_id, info.source_id)
            watchdog.cancel()
            session = Session(
                first.session_id, first.epoch, info.source_id, stub, channel, shared, numbers, lock, writes
            )  # fmt: skip
            with self._changed:
                self._session, self._error = session, None
                self.sessions_opened += 1
                self._changed.notify_all()
            # No deadline here: the channel's keepalive ends the stream of a source that is gone or stuck.
            for pong in call:
                writes.saw(pong.number)
                self._report_links(session, grpc_channel)
        except StopIteration:
            raise Unavailable(f"{self.address} opened no session") from None
        finally:
            wake.set()
            if session is not None:
                session.lost = True
                session.channel.close()
                if session.shared is not None:
                    session.shared.close()
            if lock is not None:
                lock.retire()
            grpc_channel.close()

    def _report_links(self, session: Session, grpc_channel: grpc.Channel) -> None:
        """Tells the source how its links do, so that `kvctl links` can show them. Once a pong; a loss does no harm."""
        request = source_admin_pb2.ReportLinksRequest(
            session_id=session.id,
            links=[
                wire.link_to_proto(link, self._client, active=link.channel == session.channel.kind)
                for link in self._links.snapshot(session.source_id)
            ],
        )
        stub = source_admin_pb2_grpc.SourceAdminStub(grpc_channel)
        with contextlib.suppress(grpc.RpcError, ValueError):
            stub.ReportLinks(request, timeout=self._timeout_s)

    def _writer_lock(self) -> WriterLock | None:
        with contextlib.suppress(OSError):
            return WriterLock()
        return None

    def _pings(
        self, wake: threading.Event, interval_s: list[float], lock: WriterLock | None, writes: WritesUnderWay
    ) -> Iterator[pb.SessionPing]:
        path = str(lock.path) if lock is not None else ""
        yield pb.SessionPing(hello=pb.SessionPing.Hello(client=self._client, host_id=host_id(), writer_lock=path))
        while not wake.wait(interval_s[0]):
            yield writes.ping()

    def _open_channels(self, stub: Any, session_id: int, source_id: str) -> tuple[FailoverChannel, SharedIndex | None]:
        request = pb.OpenChannelRequest(session_id=session_id, host_id=host_id(), channels=list(self._openers))
        reply = stub.OpenChannel(request, timeout=self._timeout_s)
        offers = [Offer(o.kind, dict(o.parameters)) for o in reply.offers]
        channel = FailoverChannel.open(source_id, offers, self._openers, self._links, deadline_s=self._timeout_s)
        shared = None
        for offer in offers:
            if offer.kind == "shm":
                try:
                    shared = SharedIndex.open(offer.parameters)
                except (KvpoolError, OSError) as error:
                    log.warning("%s: the index of %s can't be read here: %s", self._client, source_id, error)
                except BaseException:
                    channel.close()
                    raise
        return channel, shared


def _no_session(error: KvpoolError) -> KvpoolError:
    """What callers hear: why the source refuses, if it said so; else `Unavailable`, however gRPC came to notice it."""
    if isinstance(error, DeadlineExceeded):
        return Unavailable(str(error), hint=_SLOW_HINT)
    said = type(error) is not KvpoolError or error.reason is not KvpoolError.reason
    return error if said else Unavailable(str(error), hint=error.hint)
