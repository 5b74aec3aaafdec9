"""The tcp channel, source side: a data server with a thread for each connection.

It moves bytes between sockets and the segment, and asks a `Gate` before and after: it decides nothing by itself.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvpool.channels import tcp_wire as wire
from kvpool.channels.base import ChannelError
from kvpool.core.errors import Unavailable

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 256
GREETING_TIMEOUT_S = 5.0
#: A request that is under way for longer has a peer that is gone or stuck.
REQUEST_TIMEOUT_S = 60.0
#: A connection without requests for this long is closed; the client opens another when it needs one.
IDLE_TIMEOUT_S = 300.0
_SCRATCH_BYTES = 1 << 20


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
        sizes: NDArray[np.uint32],
        generations: NDArray[np.uint32],
    ) -> NDArray[np.bool_]:
        """For each described block whether a live lease of the session covers exactly it, at this moment."""
        ...

    def begin_write(
        self,
        session: int,
        reservation: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint32],
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

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.session = 0

    def interrupt(self) -> None:
        """Makes the thread that serves the connection end soon, whatever it waits for."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class TcpDataServer:
    """Accepts connections for one segment until `close`."""

    def __init__(
        self, data: NDArray[np.uint8], gate: Gate, host: str, port: int, *, connections_max: int = CONNECTIONS_MAX
    ) -> None:
        self._data, self._gate, self._max = memoryview(data), gate, connections_max
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._connections: set[Connection] = set()
        self._closing = False
        try:
            self._listener = socket.create_server((host, port), backlog=128)
        except OSError as error:
            raise Unavailable(
                f"can't listen on {host}:{port} for data: {error.strerror}", hint="choose another --data-listen"
            ) from error
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="tcp-accept", daemon=True)
        self._thread.start()

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
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in connections:
            connection.interrupt()
        self._thread.join(timeout_s)
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
                if self._listener.fileno() < 0:
                    return
                continue
            connection = Connection(sock)
            with self._lock:
                full = len(self._connections) >= self._max or self._closing
                if not full:
                    self._connections.add(connection)
            if full:
                with contextlib.suppress(OSError):
                    sock.send(bytes([wire.Status.OVERLOADED]))
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="tcp-data", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            self._greet(connection)
            while True:
                raw = wire.receive_bytes(connection.sock, wire.REQUEST.size, wire.Deadline(IDLE_TIMEOUT_S))
                self._request(connection, raw, wire.Deadline(REQUEST_TIMEOUT_S))
        except ChannelError as error:
            log.debug("tcp: connection of session %d ended: %s", connection.session, error)
        finally:
            connection.sock.close()
            with self._lock:
                self._connections.discard(connection)
                self._ended.notify_all()

    def _greet(self, connection: Connection) -> None:
        deadline = wire.Deadline(GREETING_TIMEOUT_S)
        wire.prepare(connection.sock)
        magic, token = wire.GREETING.unpack(wire.receive_bytes(connection.sock, wire.GREETING.size, deadline))
        session = self._gate.admit(token) if magic == wire.MAGIC else None
        if session is None:
            wire.send_all(connection.sock, [bytes([wire.Status.REFUSED])], deadline)
            raise ChannelError("tcp: unknown token")
        connection.session = session
        # The session may have ended between the two lines above, before its connections could be told by session.
        if self._gate.admit(token) is None:
            raise ChannelError("tcp: the session has ended")
        wire.send_all(connection.sock, [bytes([wire.Status.OK])], deadline)

    def _request(self, connection: Connection, raw: bytes, deadline: wire.Deadline) -> None:
        operation, count, hold, total = wire.REQUEST.unpack(raw)
        if not 1 <= count <= wire.BLOCKS_MAX or total > wire.REQUEST_BYTES_MAX:
            self._refuse(connection, f"{count} blocks of {total} bytes are out of bounds", deadline)
        packed = wire.receive_bytes(connection.sock, count * wire.DESCRIPTOR_BYTES, deadline)
        offsets, sizes, generations = wire.unpack_descriptors(packed, count)
        # In Python's integers, which do not wrap around.
        inside = all(o + s <= len(self._data) for o, s in zip(offsets.tolist(), sizes.tolist(), strict=True))
        if not inside or sum(sizes.tolist()) != total:
            self._refuse(connection, "descriptors outside the segment", deadline)
        if operation == wire.Operation.READ:
            self._send(connection, hold, offsets, sizes, generations, deadline)
        elif operation == wire.Operation.WRITE:
            self._receive(connection, hold, offsets, sizes, generations, deadline)
        else:
            self._refuse(connection, f"unknown operation {operation}", deadline)

    def _refuse(self, connection: Connection, message: str, deadline: wire.Deadline) -> None:
        """Answers, and ends the connection: where the next request begins is not certain any more."""
        text = message.encode()
        wire.send_all(connection.sock, [wire.REPLY.pack(wire.Status.BAD_REQUEST, len(text)) + text], deadline)
        raise ChannelError(f"tcp: {message}")

    # ------------------------------------------------------------ bytes

    def _send(
        self,
        connection: Connection,
        lease: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint32],
        generations: NDArray[np.uint32],
        deadline: wire.Deadline,
    ) -> None:
        def readable() -> NDArray[np.bool_]:
            return self._gate.readable(connection.session, lease, offsets, sizes, generations)

        before = readable()
        views = [
            self._data[offset : offset + size]
            for offset, size, ok in zip(offsets.tolist(), sizes.tolist(), before.tolist(), strict=True)
            if ok
        ]
        head = wire.REPLY.pack(wire.Status.OK, 0) + _states(before)
        wire.send_all(connection.sock, [head, *_merge(views, offsets[before], sizes[before], self._data)], deadline)
        wire.send_all(connection.sock, [_states(before & readable())], deadline)
        self._gate.count(bytes_read=sum(map(len, views)))

    def _receive(
        self,
        connection: Connection,
        reservation: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint32],
        generations: NDArray[np.uint32],
        deadline: wire.Deadline,
    ) -> None:
        may = self._gate.begin_write(connection.session, reservation, offsets, sizes, generations, connection)
        try:
            self._fill(connection, offsets, sizes, may, deadline)
        finally:
            self._gate.end_write(reservation, connection)
        self._gate.count(bytes_written=int(sizes[may].sum(dtype=np.uint64)))
        wire.send_all(connection.sock, [wire.REPLY.pack(wire.Status.OK, 0) + _states(may)], deadline)

    def _fill(
        self,
        connection: Connection,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint32],
        may: NDArray[np.bool_],
        deadline: wire.Deadline,
    ) -> None:
        """Receives each block into its slot, or into nothing where it may not be written."""
        views: list[memoryview] = []
        scratch = memoryview(bytearray(_SCRATCH_BYTES if not may.all() else 0))
        for offset, size, ok in zip(offsets.tolist(), sizes.tolist(), may.tolist(), strict=True):
            if ok:
                views.append(self._data[offset : offset + size])
                continue
            while size:
                views.append(scratch[: min(size, len(scratch))])
                size -= len(views[-1])
        wire.receive_all(connection.sock, views, deadline)


def _states(ok: NDArray[np.bool_]) -> bytes:
    return np.where(ok, np.uint8(wire.Status.OK), np.uint8(wire.Status.REFUSED)).tobytes()


def _merge(
    views: list[memoryview], offsets: NDArray[np.uint64], sizes: NDArray[np.uint32], data: memoryview
) -> list[memoryview]:
    """Neighbours in the segment as one piece: fewer vectors a system call for small blocks."""
    if len(views) < 2:
        return views
    ends = offsets + sizes
    breaks = np.flatnonzero(offsets[1:] != ends[:-1]) + 1
    firsts = np.concatenate([[0], breaks]).tolist()
    lasts = np.concatenate([breaks - 1, [len(views) - 1]]).tolist()
    return [data[int(offsets[a]) : int(ends[b])] for a, b in zip(firsts, lasts, strict=True)]
