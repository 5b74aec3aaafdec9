"""Bytes of the tcp channel, and socket operations that move them without a copy in Python.

A connection begins with a greeting: magic and session token one way, a welcome the other, with the number that the
source gave the connection. Then requests, one at a time on a connection. A request is a header and packed descriptors:
offsets u64[n], sizes u64[n], generations u32[n]. It is about all bytes of its n blocks, or about a part of one block
(`skip`, `total`).

 * READ: the reply is a header, the bytes, and one status byte: whether the lease still covered them after they were
   sent.
 * WRITE: the bytes follow the descriptors; the reply is a header.
 * SETTLE: no blocks; ends the connection of the session that `hold` numbers. The reply is a header, once nothing that
   came over that connection can reach the segment any more.
 * PING: no blocks; the reply is a header.

A reply whose status is not OK carries a message instead. All numbers are little-endian. Under TLS the same bytes pass
inside.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError
from kvpool.core.errors import Reason

MAGIC = b"KVPTCP02"
TOKEN_BYTES = 32
GREETING = struct.Struct(f"<8s{TOKEN_BYTES}s")
WELCOME = struct.Struct("<B7xQ")  # status, number of the connection
REQUEST = struct.Struct("<B3xIQQQ")  # operation, blocks, hold (lease, reservation), skip, total
REPLY = struct.Struct("<B3xI")  # status, bytes of the message that follows
DESCRIPTOR_BYTES = 20

BLOCKS_MAX = 8192  # of one request
#: Of one request, and so in flight on one connection. Whoever wants more asks several times.
REQUEST_BYTES_MAX = 64 << 20
MESSAGE_BYTES_MAX = 4096
#: iovecs of one system call; the kernel allows 1024.
_VECTORS_MAX = 1000
_CALL_BYTES_MAX = 8 << 20
#: Of sockets whose peer is on this host: bytes on their way then stay in the CPU's cache, which doubles the speed. To
#: other hosts the kernel sizes the buffers by what the path needs.
_LOCAL_BUFFER_BYTES = 256 << 10


class Operation(IntEnum):
    READ = 1
    WRITE = 2
    PING = 3
    SETTLE = 4


class Status(IntEnum):
    """Of a greeting or a reply."""

    OK = 0
    REFUSED = 1  # unknown token; no live lease or reservation covers the blocks
    BAD_REQUEST = 2
    OVERLOADED = 3
    TLS_REQUIRED = 4


class Closed(ChannelError):
    """The peer closed the connection, or it broke."""


class TooSlow(ChannelError):
    """The deadline passed before the bytes had moved."""

    reason = Reason.DEADLINE


class Deadline:
    """A point in time that each operation of a request has to meet."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    def arm(self, sock: socket.socket) -> None:
        """Ends a blocked call on `sock` at the deadline. Raises: TooSlow if it has passed."""
        left_s = self.left_s()
        try:
            if isinstance(sock, ssl.SSLSocket):
                # The library would go on waiting when the kernel says that the time is over.
                sock.settimeout(left_s)
                return
            value = struct.pack("ll", int(left_s), int(left_s % 1 * 1e6) or 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        except OSError as error:
            raise Closed(f"tcp: {error.strerror}") from error

    def left_s(self) -> float:
        """Raises: TooSlow if nothing is left."""
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise TooSlow("tcp: the deadline passed")
        return left_s


def prepare(sock: socket.socket) -> None:
    """Blocking, with deadlines kept by the kernel: a read of many bytes is then one system call, not one a segment.

    Raises: Closed.
    """
    try:
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sock.getpeername()[0] == sock.getsockname()[0]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LOCAL_BUFFER_BYTES)
    except OSError as error:
        raise Closed(f"tcp: {error.strerror}") from error


def send_all(sock: socket.socket, buffers: Sequence[memoryview | bytes], deadline: Deadline) -> None:
    """Sends all buffers, many to a system call. Raises: Closed, TooSlow."""
    pending = [memoryview(b) for b in buffers if len(b)]
    encrypted = isinstance(sock, ssl.SSLSocket)
    while pending:
        deadline.arm(sock)
        try:
            sent = sock.send(pending[0][:_CALL_BYTES_MAX]) if encrypted else sock.sendmsg(_batch(pending))
        except (BlockingIOError, TimeoutError) as error:
            raise TooSlow("tcp: the peer takes no bytes") from error
        except OSError as error:
            raise Closed(f"tcp: connection lost while sending: {error.strerror or error}") from error
        _advance(pending, sent)


def receive_all(sock: socket.socket, buffers: Sequence[memoryview], deadline: Deadline) -> None:
    """Fills all buffers, many to a system call. Raises: Closed, TooSlow."""
    pending = [b for b in buffers if len(b)]
    encrypted = isinstance(sock, ssl.SSLSocket)
    while pending:
        deadline.arm(sock)
        try:
            if encrypted:
                received = sock.recv_into(pending[0])
            else:
                received = sock.recvmsg_into(_batch(pending), 0, socket.MSG_WAITALL)[0]
        except (BlockingIOError, TimeoutError) as error:
            raise TooSlow("tcp: the peer sends no bytes") from error
        except OSError as error:
            raise Closed(f"tcp: connection lost while receiving: {error.strerror or error}") from error
        if received == 0:
            raise Closed("tcp: the peer closed the connection")
        _advance(pending, received)


def receive_bytes(sock: socket.socket, count: int, deadline: Deadline) -> bytes:
    buffer = bytearray(count)
    receive_all(sock, [memoryview(buffer)], deadline)
    return bytes(buffer)


def hang_up(sock: socket.socket) -> None:
    """Ends a connection that a thread may be using: its calls return, and the thread closes the socket.

    Raises: OSError if it has ended already.
    """
    # Not the method of SSLSocket: it forgets the encryption first, and the thread would go on in plain bytes.
    socket.socket.shutdown(sock, socket.SHUT_RDWR)


def pack_descriptors(
    offsets: NDArray[np.uint64], sizes: NDArray[np.uint64], generations: NDArray[np.uint32]
) -> list[bytes]:
    return [offsets.astype("<u8").tobytes(), sizes.astype("<u8").tobytes(), generations.astype("<u4").tobytes()]


def unpack_descriptors(raw: bytes, count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint32]]:
    return (
        np.frombuffer(raw, "<u8", count),
        np.frombuffer(raw, "<u8", count, 8 * count),
        np.frombuffer(raw, "<u4", count, 16 * count),
    )


def _batch(pending: list[memoryview]) -> list[memoryview]:
    """As many buffers as one call takes; the last may be cut."""
    batch: list[memoryview] = []
    room = _CALL_BYTES_MAX
    for view in pending[:_VECTORS_MAX]:
        batch.append(view[:room])
        room -= len(view)
        if room <= 0:
            break
    return batch


def _advance(pending: list[memoryview], count: int) -> None:
    """Drops the first `count` bytes."""
    done = 0
    while done < len(pending) and count >= len(pending[done]):
        count -= len(pending[done])
        done += 1
    del pending[:done]
    if count:
        pending[0] = pending[0][count:]
