"""Bytes of the tcp channel, and socket operations that move them without a copy in Python.

A connection begins with a greeting: magic and session token one way, one status byte the other. Then requests, one at
a time on a connection. A request is a header and packed descriptors: offsets u64[n], sizes u32[n], generations u32[n].

 * READ: the reply is a header, n states, the bytes of each block whose state is OK, and n states again: whether the
   lease still covered the block after it was sent.
 * WRITE: the bytes of all blocks follow the descriptors; the reply is a header and n states.

A reply whose status is not OK carries a message instead. All numbers are little-endian.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError

MAGIC = b"KVPTCP01"
TOKEN_BYTES = 32
GREETING = struct.Struct(f"<8s{TOKEN_BYTES}s")
REQUEST = struct.Struct("<B3xIQQ")  # operation, blocks, lease or reservation, bytes of all blocks
REPLY = struct.Struct("<B3xI")  # status, bytes of the message that follows
DESCRIPTOR_BYTES = 16

BLOCKS_MAX = 8192  # of one request
REQUEST_BYTES_MAX = 1 << 30
#: iovecs of one system call; the kernel allows 1024.
_VECTORS_MAX = 512
_CALL_BYTES_MAX = 8 << 20


class Operation(IntEnum):
    READ = 1
    WRITE = 2


class Status(IntEnum):
    """Of a greeting, a reply or a block."""

    OK = 0
    REFUSED = 1  # no live lease or reservation covers it
    BAD_REQUEST = 2
    OVERLOADED = 3


class Closed(ChannelError):
    """The peer closed the connection, or it broke."""


class TooSlow(ChannelError):
    """The deadline passed before the bytes had moved."""


class Deadline:
    """A point in time that each operation of a request has to meet."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    def arm(self, sock: socket.socket) -> None:
        """Lets the kernel end a blocked call on `sock` at the deadline. Raises: TooSlow if it has passed."""
        left_s = self.left_s()
        value = struct.pack("ll", int(left_s), int(left_s % 1 * 1e6) or 1)
        try:
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
    """Blocking, with deadlines kept by the kernel: a read of many bytes is then one system call, not one a segment."""
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def send_all(sock: socket.socket, buffers: Sequence[memoryview | bytes], deadline: Deadline) -> None:
    """Sends all buffers, many to a system call. Raises: Closed, TooSlow."""
    pending = [memoryview(b) for b in buffers if len(b)]
    while pending:
        batch = _batch(pending)
        deadline.arm(sock)
        try:
            sent = sock.sendmsg(batch)
        except BlockingIOError as error:
            raise TooSlow("tcp: the peer takes no bytes") from error
        except OSError as error:
            raise Closed(f"tcp: connection lost while sending: {error.strerror}") from error
        _advance(pending, sent)


def receive_all(sock: socket.socket, buffers: Sequence[memoryview], deadline: Deadline) -> None:
    """Fills all buffers, many to a system call. Raises: Closed, TooSlow."""
    pending = [b for b in buffers if len(b)]
    while pending:
        batch = _batch(pending)
        deadline.arm(sock)
        try:
            received = sock.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError as error:
            raise TooSlow("tcp: the peer sends no bytes") from error
        except OSError as error:
            raise Closed(f"tcp: connection lost while receiving: {error.strerror}") from error
        if received == 0:
            raise Closed("tcp: the peer closed the connection")
        _advance(pending, received)


def receive_bytes(sock: socket.socket, count: int, deadline: Deadline) -> bytes:
    buffer = bytearray(count)
    receive_all(sock, [memoryview(buffer)], deadline)
    return bytes(buffer)


def pack_descriptors(
    offsets: NDArray[np.uint64], sizes: NDArray[np.uint32], generations: NDArray[np.uint32]
) -> list[bytes]:
    return [offsets.astype("<u8").tobytes(), sizes.astype("<u4").tobytes(), generations.astype("<u4").tobytes()]


def unpack_descriptors(raw: bytes, count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.uint32]]:
    return (
        np.frombuffer(raw, "<u8", count),
        np.frombuffer(raw, "<u4", count, 8 * count),
        np.frombuffer(raw, "<u4", count, 12 * count),
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
