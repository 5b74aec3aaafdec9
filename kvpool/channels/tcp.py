"""The tcp channel, client side: bytes go straight between several sockets and rows of the caller's memory."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.channels import tcp_wire as wire
from kvpool.channels.base import Bytes2D, Capabilities, ChannelError, Rows, check_memory, row_numbers
from kvpool.channels.sections import block_keys, bounds, digest_block
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument
from kvpool.core.hashing import section_digest

#: Streams of one call: two fill a loopback or a 10 Gbit link from Python.
STREAMS = 2
#: Below this a second stream costs more than it gains.
SHARE_BYTES_MIN = 2 << 20
CONNECTIONS_MAX = 8
CONNECT_TIMEOUT_S = 3.0
#: Received bytes that are hashed together: enough for a system call to pay, few enough to still be in the cache.
HASH_CHUNK_BYTES = 512 << 10


@dataclass(frozen=True)
class _Share:
    """The part of a call that one request carries."""

    first: int
    count: int
    bytes_total: int


class TcpChannel:
    """Connections to one source's data server, opened as they are needed and kept for the next call."""

    kind = "tcp"
    capabilities = Capabilities(same_host=False, through_source=True, threads_useful=2)

    def __init__(self, host: str, port: int, token: bytes, *, streams: int = STREAMS) -> None:
        self._address, self._token, self._streams = (host, port), token, streams
        self._idle: list[socket.socket] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        # At the bound a call waits, within its deadline, for another one's connection.
        self._slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._threads = ThreadPoolExecutor(max_workers=CONNECTIONS_MAX, thread_name_prefix="tcp-channel")
        self._closed = False

    @classmethod
    def open(cls, parameters: Mapping[str, str]) -> TcpChannel:
        """Opens what a source offered, with one connection to see that it works. Raises: Unavailable, BadArgument."""
        try:
            host, _, port = parameters["address"].rpartition(":")
            channel = cls(host, int(port), bytes.fromhex(parameters["token"]))
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
        out: Bytes2D,
        rows: Rows | None = None,
        *,
        deadline_s: float,
        verify: bool = True,
    ) -> NDArray[np.bool_]:
        check_memory(out, blocks.sizes)
        rows = row_numbers(rows, len(blocks.keys), len(out))
        good = np.zeros(len(rows), dtype=np.bool_)

        def transfer(sock: socket.socket, share: _Share, deadline: wire.Deadline) -> None:
            part = slice(share.first, share.first + share.count)
            self._request(sock, wire.Operation.READ, lease, blocks, share, deadline, payload=[])
            before = wire.receive_bytes(sock, share.count, deadline)
            if any(before):
                raise ChannelError(f"tcp: the lease does not cover {sum(map(bool, before))} of {share.count} blocks")
            good[part] = _receive(sock, blocks, out, rows, range(part.start, part.stop), verify, deadline)
            if any(wire.receive_bytes(sock, share.count, deadline)):
                raise ChannelError("tcp: the lease ended while the blocks were sent")

        self._run(transfer, blocks, deadline_s)
        return good

    def write(
        self, reservation: int, slots: Descriptors, data: Bytes2D, rows: Rows | None = None, *, deadline_s: float
    ) -> NDArray[np.uint64]:
        check_memory(data, slots.sizes)
        rows = row_numbers(rows, len(slots.keys), len(data))
        sizes, keys, section_count = slots.sizes.tolist(), block_keys(slots), slots.digests.shape[1]
        digests = np.zeros(slots.digests.shape, dtype=np.uint64)

        def transfer(sock: socket.socket, share: _Share, deadline: wire.Deadline) -> None:
            part = range(share.first, share.first + share.count)
            for i in part:
                digest_block(data[rows[i], : sizes[i]], keys[i], section_count, digests[i])
            payload = [memoryview(data[rows[i], : sizes[i]]) for i in part]
            self._request(sock, wire.Operation.WRITE, reservation, slots, share, deadline, payload)
            states = wire.receive_bytes(sock, share.count, deadline)
            if any(states):
                raise ChannelError(f"tcp: {sum(map(bool, states))} of {share.count} slots are not reserved any more")

        self._run(transfer, slots, deadline_s)
        return digests

    def close(self) -> None:
        with self._lock:
            self._closed = True
            sockets, self._idle = list(self._open), []
        for sock in sockets:
            _hang_up(sock)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ requests

    def _run(
        self, transfer: Callable[[socket.socket, _Share, wire.Deadline], None], blocks: Descriptors, deadline_s: float
    ) -> None:
        """Carries out a call in as many shares as there are streams to gain from; returns when all have ended."""
        if len(blocks.keys) == 0:
            return
        deadline = wire.Deadline(deadline_s)
        shares = _split(blocks.sizes, self._streams)

        def one(share: _Share) -> None:
            try:
                with self._connection(deadline) as sock:
                    transfer(sock, share, deadline)
            except wire.Closed:
                # A kept connection may have ended since its last use; a fresh one tells whether the source is there.
                with self._connection(deadline, fresh=True) as sock:
                    transfer(sock, share, deadline)

        if self._closed:
            raise ChannelError("tcp: the channel is closed")
        try:
            futures = [self._threads.submit(one, share) for share in shares[1:]]
        except RuntimeError as error:
            raise ChannelError("tcp: the channel is closed") from error
        errors = [error for error in [_failure(one, shares[0]), *(f.exception() for f in futures)] if error]
        if errors:
            raise errors[0]

    def _request(
        self,
        sock: socket.socket,
        operation: wire.Operation,
        hold: int,
        blocks: Descriptors,
        share: _Share,
        deadline: wire.Deadline,
        payload: list[memoryview],
    ) -> None:
        """Sends a request and receives the header of its reply. Raises: ChannelError."""
        part = slice(share.first, share.first + share.count)
        head = wire.REQUEST.pack(operation, share.count, hold, share.bytes_total)
        packed = wire.pack_descriptors(blocks.offsets[part], blocks.sizes[part], blocks.generations[part])
        wire.send_all(sock, [head + b"".join(packed), *payload], deadline)
        status, message_bytes = wire.REPLY.unpack(wire.receive_bytes(sock, wire.REPLY.size, deadline))
        if status != wire.Status.OK:
            message = wire.receive_bytes(sock, min(message_bytes, 4096), deadline).decode(errors="replace")
            raise ChannelError(f"tcp: refused: {message}")

    # ------------------------------------------------------------ connections

    @contextlib.contextmanager
    def _connection(self, deadline: wire.Deadline, *, fresh: bool = False) -> Iterator[socket.socket]:
        """A connection for one request; it is kept for the next one unless the request failed."""
        if not self._slots.acquire(timeout=deadline.left_s()):
            raise wire.TooSlow("tcp: all connections are busy")
        try:
            with self._lock:
                sock = self._idle.pop() if self._idle and not fresh else None
            if sock is None:
                sock = self._connect(deadline)
            try:
                yield sock
            except BaseException:
                self._discard(sock)
                raise
            with self._lock:
                if not self._closed:
                    self._idle.append(sock)
                    return
            self._discard(sock)
        finally:
            self._slots.release()

    def _connect(self, deadline: wire.Deadline) -> socket.socket:
        try:
            sock = socket.create_connection(self._address, timeout=min(deadline.left_s(), CONNECT_TIMEOUT_S))
        except OSError as error:
            raise ChannelError(f"tcp: nothing answers at {self._address[0]}:{self._address[1]}: {error}") from error
        try:
            wire.prepare(sock)
            wire.send_all(sock, [wire.GREETING.pack(wire.MAGIC, self._token)], deadline)
            status = wire.receive_bytes(sock, 1, deadline)[0]
            if status != wire.Status.OK:
                raise ChannelError(f"tcp: the source refused the connection (status {status})")
            with self._lock:
                if self._closed:
                    raise ChannelError("tcp: the channel is closed")
                self._open.add(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def _discard(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.discard(sock)
        sock.close()


def _failure(call: Callable[[_Share], None], share: _Share) -> BaseException | None:
    """What `call` raised: an error must not end the whole call before its other threads are out of the memory."""
    try:
        call(share)
    except BaseException as error:
        return error
    return None


def _hang_up(sock: socket.socket) -> None:
    """Ends a connection that a thread may be using: its calls return, and the thread closes the socket."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _split(sizes: NDArray[np.uint32], streams: int) -> list[_Share]:
    """Consecutive shares of about the same number of bytes, each within the bounds of a request."""
    total = int(sizes.sum(dtype=np.uint64))
    count = max(1, min(streams, len(sizes), total // SHARE_BYTES_MIN))
    limit = min(-(-total // count), wire.REQUEST_BYTES_MAX)
    shares: list[_Share] = []
    first = filled = 0
    for i, size in enumerate(sizes.tolist()):
        if i > first and (filled + size > limit or i - first == wire.BLOCKS_MAX):
            shares.append(_Share(first, i - first, filled))
            first, filled = i, 0
        filled += size
    shares.append(_Share(first, len(sizes) - first, filled))
    return shares


def _receive(
    sock: socket.socket,
    blocks: Descriptors,
    out: Bytes2D,
    rows: Rows,
    part: range,
    verify: bool,
    deadline: wire.Deadline,
) -> NDArray[np.bool_]:
    """Receives the blocks with these numbers into their rows, hashing as they come; which of them are intact."""
    intact = np.ones(len(part), dtype=np.bool_)
    keys, sizes = block_keys(blocks), blocks.sizes.tolist()
    chunk: list[memoryview] = []
    todo: list[tuple[int, int, NDArray[np.uint8]]] = []
    filled = 0

    def flush() -> None:
        wire.receive_all(sock, chunk, deadline)
        for i, section, piece in todo if verify else ():
            if section_digest(piece, keys[i], section) != blocks.digests[i, section]:
                intact[i - part.start] = False

    for i in part:
        row = out[rows[i]]
        for section, start, stop in bounds(sizes[i], blocks.digests.shape[1]):
            piece = row[start:stop]
            chunk.append(memoryview(piece))
            todo.append((i, section, piece))
            filled += stop - start
            if filled >= HASH_CHUNK_BYTES:
                flush()
                chunk, todo, filled = [], [], 0
    flush()
    return intact
