"""The tcp channel, source side: a data server with a thread for each connection.

It moves bytes between sockets and the segment, and asks a `Gate` before and after: it decides nothing by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import ssl
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from kvpool.channels import tcp_wire as wire
from kvpool.channels import tls
from kvpool.channels.base import ChannelError
from kvpool.core.errors import Unavailable

log = logging.getLogger(__name__)

#: After a failed accept (no file descriptors, say) the next one would fail at once.
ACCEPT_REST_S = 0.1
#: Beyond these a connection is answered OVERLOADED and closed.
CONNECTIONS_MAX = 256
SESSION_CONNECTIONS_MAX = 32
GREETING_TIMEOUT_S = 5.0
#: A request that is under way for longer has a peer that is gone or stuck.
REQUEST_TIMEOUT_S = 60.0
#: A connection without requests for this long is closed; the client opens another when it needs one.
IDLE_TIMEOUT_S = 300.0
_SCRATCH_BYTES = 1 << 20
#: Connections that were turned away stay open for a while, so that the peer can read why.
_TURNED_AWAY_MAX = 16
_FAREWELL_TIMEOUT_S = 1.0


class Gate(Protocol):
    """Who may read and write what. Called from the threads of all connections."""

    def admit(self, token: bytes) -> int | None:
        """The session that the token belongs to, or None."""
        ...

    def readable(
        self,
        session: int,
        lease: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        generations: NDArray[np.uint32],
    ) -> NDArray[np.bool_]:
        """For each described block whether a live lease of the session covers exactly it, at this moment."""
        ...

    def begin_write(
        self,
        session: int,
        reservation: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        generations: NDArray[np.uint32],
        connection: Connection,
    ) -> NDArray[np.bool_]:
        """For each described slot whether it may be written now. Each call is followed by `end_write`.

        Whoever takes the slots away meanwhile interrupts `connection` and waits for its `end_write`.
        """
        ...

    def end_write(self, reservation: int, connection: Connection) -> None: ...

    def count(self, *, bytes_read: int = 0, bytes_written: int = 0) -> None: ...


class Connection:
    """One accepted connection."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock, self.number = sock, number
        self.session = 0

    def interrupt(self) -> None:
        """Makes the thread that serves the connection end soon, whatever it waits for."""
        with contextlib.suppress(OSError):
            wire.hang_up(self.sock)


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """A request whose blocks lie inside the segment."""

    operation: int
    hold: int
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    generations: NDArray[np.uint32]
    starts: NDArray[np.uint64]  # of the bytes that it is about; those of whole blocks, or of a part of the only one
    stops: NDArray[np.uint64]

    @property
    def bytes_total(self) -> int:
        return int((self.stops - self.starts).sum(dtype=np.uint64))


class TcpDataServer:
    """Accepts connections for one segment until `close`."""

    def __init__(
        self,
        data: NDArray[np.uint8],
        gate: Gate,
        host: str,
        port: int,
        *,
        connections_max: int = CONNECTIONS_MAX,
        session_connections_max: int = SESSION_CONNECTIONS_MAX,
        tls_config: tls.TlsConfig | None = None,
    ) -> None:
        """Raises: Unavailable if it can't listen there; BadArgument if the TLS files are no good."""
        self._context = tls_config.server_context() if tls_config is not None else None
        self._data, self._gate = memoryview(data), gate  # type: ignore[arg-type]
        self._max, self._session_max = connections_max, session_connections_max
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._connections: set[Connection] = set()
        self._numbers = itertools.count(1)
        self._turned_away: deque[socket.socket] = deque()
        self._closing = False
        try:
            self._listener = socket.create_server((host, port), backlog=128)
        except OSError as error:
            raise Unavailable(
                f"can't listen on {host}:{port} for data: {error.strerror}", hint="choose another --data-listen"
            ) from error
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="tcp-accept", daemon=True)
        self._thread.start()

    @property
    def offer_parameters(self) -> dict[str, str]:
        """What a client needs to open a channel, besides its token; the address may have to be made reachable."""
        return {"address": self.address} if self._context is None else {"address": self.address, "tls": "1"}

    def close_session(self, session: int) -> None:
        """Ends all connections of a session; returns at once."""
        with self._lock:
            mine = [c for c in self._connections if c.session == session]
        for connection in mine:
            connection.interrupt()

    def close(self, timeout_s: float = 5.0) -> bool:
        """Ends all connections. False if a thread was still under way after `timeout_s`."""
        with self._lock:
            self._closing = True
            connections = list(self._connections)
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in connections:
            connection.interrupt()
        self._thread.join(timeout_s)
        while self._turned_away:
            self._turned_away.popleft().close()
        with self._lock:
            return self._ended.wait_for(lambda: not self._connections, timeout_s)

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    # ------------------------------------------------------------ threads

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("tcp: accept failed: %s", error)
                if self._listener.fileno() < 0 or self._closed.wait(ACCEPT_REST_S):
                    return
                continue
            connection = Connection(sock, next(self._numbers))
            with self._lock:
                full = len(self._connections) >= self._max or self._closing
                if not full:
                    self._connections.add(connection)
            if full:
                self._turn_away(sock)
            else:
                threading.Thread(target=self._serve, args=(connection,), name="tcp-data", daemon=True).start()

    def _turn_away(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.send(wire.WELCOME.pack(wire.Status.OVERLOADED, 0))
        self._turned_away.append(sock)
        if len(self._turned_away) > _TURNED_AWAY_MAX:
            self._turned_away.popleft().close()

    def _serve(self, connection: Connection) -> None:
        try:
            self._greet(connection)
            while True:
                raw = wire.receive_bytes(connection.sock, wire.REQUEST.size, wire.Deadline(IDLE_TIMEOUT_S))
                self._handle(connection, raw, wire.Deadline(REQUEST_TIMEOUT_S))
        except ChannelError as error:
            log.debug("tcp: connection of session %d ended: %s", connection.session, error)
        finally:
            connection.sock.close()
            with self._lock:
                self._connections.discard(connection)
                self._ended.notify_all()

    # ------------------------------------------------------------ greeting

    def _greet(self, connection: Connection) -> None:
        deadline = wire.Deadline(GREETING_TIMEOUT_S)
        wire.prepare(connection.sock)
        self._encrypt(connection, deadline)
        magic, token = wire.GREETING.unpack(wire.receive_bytes(connection.sock, wire.GREETING.size, deadline))
        session = self._gate.admit(token) if magic == wire.MAGIC else None
        if session is None:
            self._part(connection.sock, wire.WELCOME.pack(wire.Status.REFUSED, 0), "unknown token")
        with self._lock:
            full = sum(c.session == session for c in self._connections) >= self._session_max
            if not full:
                connection.session = session
        if full:
            farewell = wire.WELCOME.pack(wire.Status.OVERLOADED, 0)
            self._part(connection.sock, farewell, f"session {session} has too many connections")
        # The session may have ended between the two lines above, before its connections could be told by session.
        if self._gate.admit(token) is None:
            raise ChannelError("tcp: the session has ended")
        wire.send_all(connection.sock, [wire.WELCOME.pack(wire.Status.OK, connection.number)], deadline)

    def _encrypt(self, connection: Connection, deadline: wire.Deadline) -> None:
        """The TLS handshake, where this server speaks TLS; whoever speaks the other language is told so at once."""
        deadline.arm(connection.sock)
        try:
            first = connection.sock.recv(1, socket.MSG_PEEK)
        except OSError as error:
            raise wire.Closed(f"tcp: no greeting: {error.strerror}") from error
        speaks_tls = first == bytes([tls.HANDSHAKE_BYTE])
        if self._context is None:
            if speaks_tls:
                self._part(connection.sock, tls.PLAIN_ALERT, "a peer wants TLS, which is not configured")
            return
        if not speaks_tls:
            self._part(connection.sock, wire.WELCOME.pack(wire.Status.TLS_REQUIRED, 0), "a peer does not speak TLS")
        connection.sock = encrypted = tls.wrap(connection.sock, self._context)
        if self._closing:  # before it could interrupt the new socket
            raise ChannelError("tcp: the server stops")
        tls.handshake(encrypted, deadline.left_s())

    def _part(self, sock: socket.socket, last: bytes, why: str) -> NoReturn:
        """Says a last word and makes sure that the peer can read it: closing on unread bytes would take it back.

        Raises: ChannelError always.
        """
        deadline = wire.Deadline(_FAREWELL_TIMEOUT_S)
        with contextlib.suppress(ChannelError, OSError):
            wire.send_all(sock, [last], deadline)
            if not isinstance(sock, ssl.SSLSocket):
                sock.shutdown(socket.SHUT_WR)
            deadline.arm(sock)
            unread = _SCRATCH_BYTES
            while unread > 0 and (got := sock.recv(64 << 10)):
                unread -= len(got)
                deadline.arm(sock)
        raise ChannelError(f"tcp: {why}")

    # ------------------------------------------------------------ requests

    def _handle(self, connection: Connection, raw: bytes, deadline: wire.Deadline) -> None:
        operation, count, hold, skip, total = wire.REQUEST.unpack(raw)
        if operation == wire.Operation.PING and count == skip == total == 0:
            self._answer(connection, wire.Status.OK, "", deadline)
            return
        if operation == wire.Operation.SETTLE and count == skip == total == 0:
            self._settle(connection, hold, deadline)
            return
        if not 1 <= count <= wire.BLOCKS_MAX:
            self._refuse(connection, f"{count} blocks are out of bounds")
        packed = wire.receive_bytes(connection.sock, count * wire.DESCRIPTOR_BYTES, deadline)
        request = self._parse(operation, hold, skip, total, *wire.unpack_descriptors(packed, count))
        if isinstance(request, str):
            self._refuse(connection, request)
        if operation == wire.Operation.READ:
            self._send(connection, request, deadline)
        else:
            self._receive(connection, request, deadline)

    def _parse(
        self,
        operation: int,
        hold: int,
        skip: int,
        total: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        generations: NDArray[np.uint32],
    ) -> _Request | str:
        """The request, or what is wrong with it. Sums are made in ways that can't wrap around."""
        room = np.uint64(len(self._data))
        if operation not in (wire.Operation.READ, wire.Operation.WRITE):
            return f"unknown operation {operation}"
        if not ((sizes > 0) & (sizes <= room) & (offsets <= room - np.minimum(sizes, room))).all():
            return "descriptors outside the segment"
        whole = sum(sizes.tolist())
        if total < 1 or (skip + total > whole if len(sizes) == 1 else skip or total != whole):
            return f"{total} bytes from {skip} are not the bytes of {len(sizes)} blocks, nor a part of one"
        if total > wire.REQUEST_BYTES_MAX:
            return f"{total} bytes are more than {wire.REQUEST_BYTES_MAX} of a request"
        starts, stops = offsets, offsets + sizes
        if len(sizes) == 1:
            starts = offsets + np.uint64(skip)
            stops = starts + np.uint64(total)
        return _Request(operation, hold, offsets, sizes, generations, starts, stops)

    def _answer(self, connection: Connection, status: wire.Status, message: str, deadline: wire.Deadline) -> None:
        text = message.encode()
        wire.send_all(connection.sock, [wire.REPLY.pack(status, len(text)) + text], deadline)

    def _refuse(self, connection: Connection, message: str) -> NoReturn:
        """Answers, and ends the connection: where the next request begins is not certain any more."""
        text = message.encode()
        self._part(connection.sock, wire.REPLY.pack(wire.Status.BAD_REQUEST, len(text)) + text, message)

    # ------------------------------------------------------------ bytes

    def _send(self, connection: Connection, request: _Request, deadline: wire.Deadline) -> None:
        def unreadable() -> int:
            r = request
            return int((~self._gate.readable(connection.session, r.hold, r.offsets, r.sizes, r.generations)).sum())

        count = unreadable()
        if count:
            message = f"the lease does not cover {count} of {len(request.sizes)} blocks"
            self._answer(connection, wire.Status.REFUSED, message, deadline)
            return
        wire.send_all(connection.sock, [wire.REPLY.pack(wire.Status.OK, 0), *self._views(request)], deadline)
        status = wire.Status.REFUSED if unreadable() else wire.Status.OK
        wire.send_all(connection.sock, [bytes([status])], deadline)
        self._gate.count(bytes_read=request.bytes_total)

    def _receive(self, connection: Connection, request: _Request, deadline: wire.Deadline) -> None:
        r = request
        may = self._gate.begin_write(connection.session, r.hold, r.offsets, r.sizes, r.generations, connection)
        try:
            views = list(self._views(request)) if may.all() else _nowhere(request.bytes_total)
            wire.receive_all(connection.sock, views, deadline)
        finally:
            self._gate.end_write(r.hold, connection)
        if not may.all():
            message = f"{int((~may).sum())} of {len(may)} slots are not reserved any more"
            self._answer(connection, wire.Status.REFUSED, message, deadline)
            return
        self._gate.count(bytes_written=request.bytes_total)
        self._answer(connection, wire.Status.OK, "", deadline)

    def _settle(self, connection: Connection, number: int, deadline: wire.Deadline) -> None:
        """Ends another connection of the session: once it is gone, nothing that came over it reaches the segment."""
        with self._lock:
            others = [c for c in self._connections if c.number == number and c.session == connection.session]
        if connection in others:
            self._refuse(connection, "a connection can't settle itself")
        for other in others:
            other.interrupt()
        with self._lock:
            settled = self._ended.wait_for(lambda: not any(c in self._connections for c in others), deadline.left_s())
        status = wire.Status.OK if settled else wire.Status.OVERLOADED
        self._answer(connection, status, "" if settled else "the connection does not end", deadline)

    def _views(self, request: _Request) -> Iterator[memoryview]:
        """The bytes of a request, neighbours as one piece: fewer vectors a system call for small blocks."""
        breaks = np.flatnonzero(request.starts[1:] != request.stops[:-1])
        firsts = [0, *(breaks + 1).tolist()]
        lasts = [*breaks.tolist(), len(request.starts) - 1]
        for start, stop in zip(request.starts[firsts].tolist(), request.stops[lasts].tolist(), strict=True):
            yield self._data[start:stop]


def _nowhere(size: int) -> list[memoryview]:
    """Memory to receive bytes into that nobody wants."""
    scratch = memoryview(bytearray(min(size, _SCRATCH_BYTES)))
    return [scratch[: min(len(scratch), size - at)] for at in range(0, size, len(scratch))]
