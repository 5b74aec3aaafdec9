"""The tcp channel, client side: bytes go straight between several sockets and rows of the caller's memory."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.channels import tcp_wire as wire
from kvpool.channels import tls
from kvpool.channels.base import Capabilities, ChannelError, Memory, Rows, check_memory, row_numbers
from kvpool.channels.tcp_batch import Batch, Window, cut
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, Reason

#: Streams of one call: two keep two cores busy; where there are more, some hash while others receive.
STREAMS = 2 if (os.cpu_count() or 1) <= 4 else 4
#: Below this a second stream costs more than it gains.
WINDOW_BYTES_MIN = 1 << 20
#: Streams take windows of this size as they get through with them, so that a slow one does less.
WINDOW_BYTES_MAX = 16 << 20
WINDOW_BLOCKS_MAX = 4096
CONNECTIONS_MAX = 8
CONNECT_TIMEOUT_S = 3.0
#: Bytes that are received, or sent, between two rounds of hashing: each round lets the connection run dry, so they are
#: worth more than hashing what is still in the nearest cache.
CHUNK_BYTES = 8 << 20
#: Connections that failed in a write and were not settled yet. Beyond it the channel writes nothing any more.
UNSETTLED_MAX = 256

_WELCOMES = {
    wire.Status.REFUSED: (
        "the source does not know this session",
        "it ended: open another one",
        Reason.UNKNOWN_SESSION,
    ),
    wire.Status.OVERLOADED: ("the source has too many connections", "try again shortly", Reason.OVERLOADED),
    wire.Status.TLS_REQUIRED: ("the source wants TLS", "give this client a TlsConfig", Reason.UNAUTHENTICATED),
}


@dataclass(frozen=True, eq=False)
class _Connection:
    sock: socket.socket
    number: int  # that the source gave it


class TcpChannel:
    """Connections to one source's data server, opened as they are needed and kept for the next call."""

    kind = "tcp"
    capabilities = Capabilities(same_host=False, through_source=True, threads_useful=2)

    def __init__(
        self,
        host: str,
        port: int,
        token: bytes,
        *,
        streams: int = STREAMS,
        tls_config: tls.TlsConfig | None = None,
    ) -> None:
        """Raises: BadArgument if the TLS files are no good."""
        self._address, self._token, self._streams = (host, port), token, streams
        self._context = tls_config.client_context() if tls_config is not None else None
        self._server_name = tls_config.server_name or host if tls_config is not None else ""
        self._idle: list[_Connection] = []
        self._open: set[socket.socket] = set()
        self._unsettled: list[tuple[int, int]] = []  # reservation, number of the connection
        self._lock = threading.Lock()
        # At the bound a call waits, within its deadline, for another one's connection.
        self._slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._threads = ThreadPoolExecutor(max_workers=CONNECTIONS_MAX, thread_name_prefix="tcp-channel")
        self._closed = False

    @classmethod
    def open(cls, parameters: Mapping[str, str], *, tls_config: tls.TlsConfig | None = None) -> TcpChannel:
        """Opens what a source offered, with one connection to see that it works.

        Both sides speak TLS or neither does: a client that has a TlsConfig takes no plain channel.

        Raises: Unavailable, BadArgument.
        """
        encrypted = parameters.get("tls") == "1"
        if encrypted != (tls_config is not None):
            raise BadArgument(
                "the source wants TLS, this client has none"
                if encrypted
                else "this client wants TLS, the source has none",
                hint="give both a TlsConfig, or neither",
            )
        try:
            host, _, port = parameters["address"].rpartition(":")
            channel = cls(host, int(port), bytes.fromhex(parameters["token"]), tls_config=tls_config)
        except (KeyError, ValueError) as error:
            raise BadArgument(f"a bad tcp offer: {error}") from error
        try:
            with channel._connection(wire.Deadline(CONNECT_TIMEOUT_S)):
                pass
        except BaseException:
            channel.close()
            raise
        return channel

    def read(
        self,
        lease: int,
        blocks: Descriptors,
        out: Memory,
        rows: Rows | None = None,
        *,
        deadline_s: float,
        verify: bool = True,
    ) -> NDArray[np.bool_]:
        rows = row_numbers(rows, len(blocks), len(out))
        check_memory(out, rows, blocks.sizes, to_write=True)
        batch = Batch(blocks, out, rows)
        good = np.zeros(len(rows) * batch.section_count, dtype=np.bool_)

        def transfer(connection: _Connection, window: Window, deadline: wire.Deadline) -> None:
            sock = connection.sock
            wire.send_all(sock, [_request(wire.Operation.READ, lease, batch, window)], deadline)
            _reply(sock, deadline, Reason.UNKNOWN_LEASE)
            if window.part:
                wire.receive_all(sock, batch.part(window), deadline)
            else:
                for first, stop in batch.chunks(window, CHUNK_BYTES):
                    wire.receive_all(sock, batch.views(first, stop), deadline)
                    if verify:
                        batch.check(first, stop, good)
                    else:
                        good[first:stop] = True
            if wire.receive_bytes(sock, 1, deadline) != bytes([wire.Status.OK]):
                raise ChannelError("tcp: the lease ended while the blocks were sent", reason=Reason.UNKNOWN_LEASE)

        parted = self._run(transfer, batch, deadline_s)
        for window in parted:
            first, stop = batch.sections(window)
            if verify:
                batch.check(first, stop, good)
            else:
                good[first:stop] = True
        return np.asarray(good.reshape(-1, batch.section_count).all(axis=1))

    def write(
        self, reservation: int, slots: Descriptors, data: Memory, rows: Rows | None = None, *, deadline_s: float
    ) -> NDArray[np.uint64]:
        rows = row_numbers(rows, len(slots), len(data))
        check_memory(data, rows, slots.sizes)
        batch = Batch(slots, data, rows)
        digests = np.zeros((len(slots) * batch.section_count, 1), dtype=np.uint64)
        deadline = wire.Deadline(deadline_s)
        self._settle(reservation, deadline)

        def transfer(connection: _Connection, window: Window, deadline: wire.Deadline) -> None:
            pending: list[memoryview | bytes] = [_request(wire.Operation.WRITE, reservation, batch, window)]
            try:
                if window.part:
                    pending += batch.part(window)
                else:
                    for first, stop in batch.chunks(window, CHUNK_BYTES):
                        batch.digest(first, stop, digests)
                        wire.send_all(connection.sock, [*pending, *batch.views(first, stop)], deadline)
                        pending = []
                wire.send_all(connection.sock, pending, deadline)
                _reply(connection.sock, deadline, Reason.UNKNOWN_RESERVATION)
            except BaseException as error:
                if not _is_answered(error):
                    self._note_unsettled(reservation, connection)
                raise

        parted = self._run(transfer, batch, deadline.left_s(), before_retry=lambda d: self._settle(reservation, d))
        for window in parted:
            batch.digest(*batch.sections(window), digests)
        return digests.reshape(slots.digests.shape)

    def probe(self, *, deadline_s: float) -> None:
        """Asks the source for a sign of life; takes no place of a transfer. Raises: ChannelError."""
        deadline = wire.Deadline(deadline_s)

        def ping(fresh: bool) -> None:
            with self._connection(deadline, fresh=fresh, counted=False) as connection:
                wire.send_all(connection.sock, [wire.REQUEST.pack(wire.Operation.PING, 0, 0, 0, 0)], deadline)
                _reply(connection.sock, deadline)

        try:
            ping(fresh=False)
        except wire.Closed:
            ping(fresh=True)

    def settle(self, reservation: int, slots: Descriptors, *, deadline_s: float) -> None:
        """Returns once nothing of failed writes into the reservation is on its way any more. Raises: ChannelError."""
        self._settle(reservation, wire.Deadline(deadline_s))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            sockets, idle = list(self._open), self._idle
            self._idle = []
        for sock in sockets:
            # A thread that is using it gets an error, and closes the socket.
            with contextlib.suppress(OSError):
                wire.hang_up(sock)
        for connection in idle:
            self._discard(connection.sock)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ requests

    def _run(
        self,
        transfer: Callable[[_Connection, Window, wire.Deadline], None],
        batch: Batch,
        deadline_s: float,
        before_retry: Callable[[wire.Deadline], None] = lambda _: None,
    ) -> list[Window]:
        """Carries out a call over as many streams as gain from it; returns when all have ended.

        Returns: the first windows of blocks that were moved in parts.
        """
        if len(batch.sizes) == 0:
            return []
        deadline = wire.Deadline(deadline_s)
        total = int(batch.sizes.sum(dtype=np.uint64))
        share = -(-total // self._streams)
        windows = cut(batch.sizes, min(max(share, WINDOW_BYTES_MIN), WINDOW_BYTES_MAX), WINDOW_BLOCKS_MAX)
        queue = deque(windows)

        def stream() -> None:
            try:
                while (window := _next(queue)) is not None:
                    self._move(transfer, window, deadline, before_retry)
            except BaseException:
                queue.clear()
                raise

        self._check_open()
        futures: list[Future[None]] = []
        errors: list[BaseException | None] = []
        try:
            for _ in range(min(self._streams, len(windows)) - 1):
                futures.append(self._threads.submit(stream))  # noqa: PERF401 (keeps those before one that fails)
        except RuntimeError:
            queue.clear()
            errors.append(ChannelError("tcp: the channel is closed"))
        errors += [_failure(stream), *map(_outcome, futures)]
        for error in errors:
            if error is not None:
                raise error
        return [window for window in windows if window.part and window.skip == 0]

    def _move(
        self,
        transfer: Callable[[_Connection, Window, wire.Deadline], None],
        window: Window,
        deadline: wire.Deadline,
        before_retry: Callable[[wire.Deadline], None],
    ) -> None:
        try:
            with self._connection(deadline) as connection:
                transfer(connection, window, deadline)
        except wire.Closed:
            # A kept connection may have ended since its last use; a fresh one tells whether the source is there.
            self._check_open()
            before_retry(deadline)
            with self._connection(deadline, fresh=True) as connection:
                transfer(connection, window, deadline)

    def _note_unsettled(self, reservation: int, connection: _Connection) -> None:
        with self._lock:
            self._unsettled.append((reservation, connection.number))

    def _settle(self, reservation: int, deadline: wire.Deadline) -> None:
        """Has the source end the connections over which writes into the reservation failed."""
        with self._lock:
            numbers = [number for r, number in self._unsettled if r == reservation]
            full = len(self._unsettled) > UNSETTLED_MAX
        for number in numbers:
            with self._connection(deadline, fresh=True) as connection:
                request = wire.REQUEST.pack(wire.Operation.SETTLE, 0, number, 0, 0)
                wire.send_all(connection.sock, [request], deadline)
                _reply(connection.sock, deadline)
            with self._lock, contextlib.suppress(ValueError):  # another thread may have done the same
                self._unsettled.remove((reservation, number))
        if full and not numbers:
            raise ChannelError("tcp: too many writes failed", hint="give their reservations back, open another channel")

    # ------------------------------------------------------------ connections

    @contextlib.contextmanager
    def _connection(
        self, deadline: wire.Deadline, *, fresh: bool = False, counted: bool = True
    ) -> Iterator[_Connection]:
        """A connection for one request; it is kept for the next one unless the request failed."""
        if counted and not self._slots.acquire(timeout=deadline.left_s()):
            raise wire.TooSlow("tcp: all connections are busy")
        try:
            with self._lock:
                connection = self._idle.pop() if self._idle and not fresh else None
            if connection is None:
                connection = self._connect(deadline)
            try:
                yield connection
            except BaseException as error:
                if _is_answered(error):
                    self._keep(connection)
                else:
                    self._discard(connection.sock)
                raise
            self._keep(connection)
        finally:
            if counted:
                self._slots.release()

    def _connect(self, deadline: wire.Deadline) -> _Connection:
        try:
            sock = socket.create_connection(self._address, timeout=min(deadline.left_s(), CONNECT_TIMEOUT_S))
        except OSError as error:
            if isinstance(error, TimeoutError):
                deadline.left_s()  # no fault of the link where it was the caller's time that was over
            raise ChannelError(f"tcp: nothing answers at {self._address[0]}:{self._address[1]}: {error}") from error
        try:
            wire.prepare(sock)
            if self._context is not None:
                sock = tls.wrap(sock, self._context, self._server_name)
            with self._lock:
                self._check_open()
                self._open.add(sock)
            if isinstance(sock, ssl.SSLSocket):
                tls.handshake(sock, deadline.left_s())
            return _Connection(sock, self._greet(sock, deadline))
        except BaseException:
            self._discard(sock)
            raise

    def _greet(self, sock: socket.socket, deadline: wire.Deadline) -> int:
        """The number of the connection. Raises: ChannelError."""
        try:
            wire.send_all(sock, [wire.GREETING.pack(wire.MAGIC, self._token)], deadline)
            status, number = wire.WELCOME.unpack(wire.receive_bytes(sock, wire.WELCOME.size, deadline))
        except wire.Closed as error:
            if not isinstance(sock, ssl.SSLSocket):
                raise
            # A source judges a client's certificate after the client believes that the handshake is over.
            raise ChannelError(
                f"{error}, before it said welcome",
                hint="does the source want a certificate of this client, signed by its ca?",
                reason=Reason.UNAUTHENTICATED,
            ) from error
        if status != wire.Status.OK:
            what, hint, reason = _WELCOMES.get(status, (f"an unknown answer {status}", "", Reason.PROTOCOL_MISMATCH))
            raise ChannelError(f"tcp: {what}", hint=hint, reason=reason)
        return int(number)

    def _keep(self, connection: _Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < CONNECTIONS_MAX:
                self._idle.append(connection)
                return
        self._discard(connection.sock)

    def _discard(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.discard(sock)
        sock.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelError("tcp: the channel is closed")


def _outcome(stream: Future[None]) -> BaseException | None:
    """What a stream raised, once it is over. One that was cancelled never began: others did its part, or failed."""
    try:
        return stream.exception()
    except CancelledError:
        return None


def _is_answered(error: BaseException) -> bool:
    """Whether the source said so in a reply: the connection is then ready for the next request."""
    return isinstance(error, ChannelError) and error.reason in (Reason.UNKNOWN_LEASE, Reason.UNKNOWN_RESERVATION)


def _next(queue: deque[Window]) -> Window | None:
    try:
        return queue.popleft()
    except IndexError:
        return None


def _request(operation: wire.Operation, hold: int, batch: Batch, window: Window) -> bytes:
    head = wire.REQUEST.pack(operation, window.count, hold, window.skip, window.total)
    return head + b"".join(wire.pack_descriptors(*batch.descriptors(window)))


def _reply(sock: socket.socket, deadline: wire.Deadline, refused: Reason = Reason.OVERLOADED) -> None:
    """Receives the header of a reply. Raises: ChannelError, for this reason if the source refused."""
    status, message_bytes = wire.REPLY.unpack(wire.receive_bytes(sock, wire.REPLY.size, deadline))
    if status == wire.Status.OK:
        return
    message = wire.receive_bytes(sock, min(message_bytes, wire.MESSAGE_BYTES_MAX), deadline).decode(errors="replace")
    raise ChannelError(f"tcp: refused: {message}", reason=refused if status == wire.Status.REFUSED else None)


def _failure(call: Callable[[], None]) -> BaseException | None:
    """What `call` raised: an error must not end the whole call before its other threads are out of the memory."""
    try:
        call()
    except BaseException as error:
        return error
    return None
