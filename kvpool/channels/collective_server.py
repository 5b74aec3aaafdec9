"""The collective channel, source side: a control connection, a process group and a thread for each client.

Like the tcp server it asks a `Gate` before and after, and decides nothing by itself. What arrives lies in messages
first, and is copied into a slot only in moments in which the gate says that the slot is the writer's: so no peer, late
or gone, ever has to be waited for before a slot is given to somebody else.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvpool.channels import collective_wire as wire
from kvpool.channels.base import ChannelError
from kvpool.channels.collective import load_group
from kvpool.channels.control import Control
from kvpool.channels.pieces import Chunk, cut, gather, scatter
from kvpool.channels.tcp_server import Gate
from kvpool.core.errors import KvpoolError, Reason, Unavailable

if TYPE_CHECKING:
    from kvpool.channels.collective_group import Group

log = logging.getLogger(__name__)

#: Clients at the same time. One more takes the place of the one that has been idle longest; if none is, it is refused.
PAIRS_MAX = 16
GREETING_TIMEOUT_S = 5.0
GROUP_TIMEOUT_S = 10.0
#: A pair without requests for this long is ended; the client makes another when it needs one.
IDLE_TIMEOUT_S = 300.0
#: After a failed accept (no file descriptors, say) the next one would fail at once.
ACCEPT_REST_S = 0.1
RANK = 0


class _Request:
    """Operation, hold and checked descriptors of a request."""

    def __init__(self, operation: int, hold: int, raw: bytes, count: int, end_s: float) -> None:
        self.operation, self.hold, self.end_s = operation, hold, end_s
        self.offsets, self.sizes, self.generations = wire.unpack_descriptors(raw, count)

    def fits(self, total: int, data_bytes: int) -> bool:
        # In Python's integers, which do not wrap around.
        sizes = self.sizes.tolist()
        inside = all(s > 0 and o + s <= data_bytes for o, s in zip(self.offsets.tolist(), sizes, strict=True))
        moves = self.operation in (wire.Operation.READ, wire.Operation.WRITE)
        return inside and sum(sizes) == total and moves


class Pair:
    """A client's pair. Its thread uses it; others may interrupt it."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.session = 0
        self.busy = True
        self.writing: int | None = None  # the reservation
        self.used_s = time.monotonic()

    def interrupt(self) -> None:
        """Ends the pair as soon as its thread notices, at the latest after the time of a message."""
        self.control.interrupt()


class CollectiveServer:
    """Accepts clients for one segment until `close`."""

    kind = "collective"

    def __init__(
        self,
        data: NDArray[np.uint8],
        gate: Gate,
        host: str,
        port: int,
        *,
        backend: str = "gloo",
        pairs_max: int = PAIRS_MAX,
    ) -> None:
        """Args: data: uint8 (bytes), mapped until `close`; host: an address of this machine that clients reach.

        Raises: Unsupported without torch, or without what it needs for the backend; BadArgument; Unavailable if the
        port is taken.
        """
        groups = load_group()
        groups.require(backend)
        self._group_of = groups.Group
        self._data, self._gate, self._backend, self._max = data, gate, backend, pairs_max
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._pairs: list[Pair] = []
        self._closed = threading.Event()
        try:
            self._listener = socket.create_server((host, port), backlog=16)
        except OSError as error:
            raise Unavailable(f"can't listen on {host}:{port} for collective channels: {error.strerror}") from error
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="collective-accept", daemon=True)
        self._thread.start()

    def offer(self, session: int, token: bytes) -> dict[str, str]:
        """Parameters with which a client of the session opens the channel."""
        return {"address": self.address, "token": token.hex(), "backend": self._backend}

    def close_session(self, session: int) -> None:
        """Ends the pairs of a session; returns at once."""
        with self._lock:
            mine = [pair for pair in self._pairs if pair.session == session]
        for pair in mine:
            pair.interrupt()

    @property
    def pair_count(self) -> int:
        return len(self._pairs)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Ends all pairs. False if a thread was still at work after `timeout_s`."""
        with self._lock:
            self._closed.set()
            pairs = list(self._pairs)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in pairs:
            pair.interrupt()
        self._thread.join(timeout_s)
        with self._lock:
            return self._ended.wait_for(lambda: not self._pairs, timeout_s)

    # ------------------------------------------------------------ threads

    def _accept(self) -> None:
        failed = False
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closed.is_set() or self._listener.fileno() < 0:
                    return
                if not failed:
                    log.warning("collective: no client can be taken now: %s", error)
                failed = True
                self._closed.wait(ACCEPT_REST_S)
                continue
            failed = False
            pair = Pair(Control(sock, "collective"))
            if self._admit(pair):
                threading.Thread(target=self._serve, args=(pair,), name="collective-pair", daemon=True).start()
            else:
                with contextlib.suppress(OSError):
                    sock.send(bytes([wire.Status.OVERLOADED]))
                sock.close()

    def _admit(self, pair: Pair) -> bool:
        """Makes room for a pair if there is none and another is idle."""
        with self._lock:
            if self._closed.is_set():
                return False
            if len(self._pairs) >= self._max:
                idle = [other for other in self._pairs if not other.busy]
                if not idle:
                    return False
                oldest = min(idle, key=lambda other: other.used_s)
                oldest.interrupt()
                if not self._ended.wait_for(lambda: oldest not in self._pairs, GREETING_TIMEOUT_S):
                    return False
            self._pairs.append(pair)
            return True

    def _serve(self, pair: Pair) -> None:
        group: Group | None = None
        try:
            end_s = time.monotonic() + GREETING_TIMEOUT_S
            self._greet(pair, end_s)
            group = self._group_of(self._backend, RANK, pair.control, time.monotonic() + GROUP_TIMEOUT_S)
            while True:
                self._set_busy(pair, False)
                raw = pair.control.receive(wire.REQUEST.size, time.monotonic() + IDLE_TIMEOUT_S)
                self._set_busy(pair, True)
                self._request(pair, group, raw)
        except KvpoolError as error:
            log.debug("collective: pair of session %d ended: %s", pair.session, error)
        finally:
            pair.control.close()
            if group is not None:
                group.close()
            with self._lock:
                self._pairs.remove(pair)
                self._ended.notify_all()

    def _set_busy(self, pair: Pair, busy: bool) -> None:
        with self._lock:
            pair.busy, pair.used_s, pair.writing = busy, time.monotonic(), None
            self._ended.notify_all()

    def _greet(self, pair: Pair, end_s: float) -> None:
        magic, token = wire.GREETING.unpack(pair.control.receive(wire.GREETING.size, end_s))
        session = self._gate.admit(token) if magic == wire.MAGIC else None
        if session is None:
            pair.control.send(bytes([wire.Status.REFUSED]), end_s)
            raise ChannelError("collective: unknown token")
        pair.session = session
        # The session may have ended between the two lines above, before its pairs could be told by session.
        if self._gate.admit(token) is None:
            raise ChannelError("collective: the session has ended")
        pair.control.send(bytes([wire.Status.OK]), end_s)

    # ------------------------------------------------------------ requests

    def _request(self, pair: Pair, group: Group, raw: bytes) -> None:
        operation, count, hold, total, left_ms = wire.REQUEST.unpack(raw)
        end_s = time.monotonic() + min(left_ms, wire.REQUEST_MS_MAX) / 1000
        if count == 0 and operation in (wire.Operation.PING, wire.Operation.SETTLE):
            if operation == wire.Operation.SETTLE:
                self._settle(pair, hold, end_s)
            pair.control.send(bytes([wire.Status.OK]), end_s)
            return
        if not 1 <= count <= wire.BLOCKS_MAX:
            self._refuse(pair, f"{count} blocks are out of bounds", end_s)
        request = _Request(operation, hold, pair.control.receive(count * wire.DESCRIPTOR_BYTES, end_s), count, end_s)
        if not request.fits(total, len(self._data)):
            self._refuse(pair, "descriptors outside the segment, or an unknown operation", end_s)
        if operation == wire.Operation.READ:
            self._send(pair, group, request)
        else:
            self._receive(pair, group, request)

    def _settle(self, pair: Pair, reservation: int, end_s: float) -> None:
        def settled() -> bool:
            mine = [other for other in self._pairs if other.session == pair.session and other is not pair]
            if reservation == wire.ANY_RESERVATION:
                return all(other.writing is None for other in mine)
            return all(other.writing != reservation for other in mine)

        with self._lock:
            if not self._ended.wait_for(settled, max(end_s - time.monotonic(), 0)):
                raise ChannelError("collective: a write is still under way", reason=Reason.DEADLINE)

    def _refuse(self, pair: Pair, message: str, end_s: float) -> None:
        """Answers, and ends the pair: who asks so does not speak this protocol."""
        pair.control.send(bytes([wire.Status.BAD_REQUEST]), end_s)
        raise ChannelError(f"collective: {message}")

    def _send(self, pair: Pair, group: Group, request: _Request) -> None:
        def readable() -> NDArray[np.bool_]:
            gate, r = self._gate, request
            return gate.readable(pair.session, r.hold, r.offsets, r.sizes, r.generations)

        before = readable()
        pair.control.send(bytes([wire.Status.OK]) + wire.pack_states(before), request.end_s)
        if not before.all():
            return
        where = self._addresses(request)
        chunks = cut(request.sizes, wire.MESSAGE_BYTES)
        group.send_all(chunks, lambda chunk, address: gather(chunk, where, address), request.end_s)
        pair.control.send(wire.pack_states(readable()), request.end_s)
        self._gate.count(bytes_read=int(request.sizes.sum()))

    def _receive(self, pair: Pair, group: Group, request: _Request) -> None:
        with self._lock:
            pair.writing = request.hold
        everything = np.arange(len(request.sizes))
        may = self._while_writable(pair, request, everything, lambda ok: None)
        pair.control.send(bytes([wire.Status.OK]) + wire.pack_states(may), request.end_s)
        if not may.all():
            return
        where = self._addresses(request)

        def take(chunk: Chunk, address: int) -> None:
            blocks = chunk.blocks
            may[blocks] &= self._while_writable(
                pair, request, blocks, lambda ok: scatter(chunk, address, where, ok & may[blocks])
            )

        group.receive_all(cut(request.sizes, wire.MESSAGE_BYTES), take, request.end_s)
        pair.control.send(wire.pack_states(may), request.end_s)
        self._gate.count(bytes_written=int(request.sizes[may].sum()))

    def _while_writable(
        self, pair: Pair, request: _Request, blocks: NDArray[np.int64], do: Callable[[NDArray[np.bool_]], None]
    ) -> NDArray[np.bool_]:
        """Which of these slots may be written; they stay so until `do`, which is told, returns."""
        offsets, sizes, generations = request.offsets[blocks], request.sizes[blocks], request.generations[blocks]
        may = self._gate.begin_write(pair.session, request.hold, offsets, sizes, generations, pair)  # type: ignore[arg-type]
        try:
            do(may)
        finally:
            self._gate.end_write(request.hold, pair)  # type: ignore[arg-type]
        return may

    def _addresses(self, request: _Request) -> NDArray[np.uint64]:
        return request.offsets + np.uint64(self._data.ctypes.data)
