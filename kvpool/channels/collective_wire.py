"""Bytes of the control connection of the collective channel; the blocks themselves go through a process group.

A connection begins with a greeting: magic and session token one way, one status byte the other. Then both sides make a
process group, with this connection as the store that it needs (see `STORE`). Then requests, one at a time: a header
and packed descriptors, offsets u64[n], sizes u64[n], generations u32[n]. The reply is a status and, if OK, n states.

 * If all n states are OK, the bytes of all blocks follow in the group as messages of MESSAGE_BYTES (the last one may be
   shorter): from the source for READ, to it for WRITE. Otherwise nothing follows.
 * After them the source sends n states again: whether the lease covered the block still, or the slot was written.

PING and SETTLE name no blocks; the reply is a status. SETTLE has it when no other pair of the session writes into the
reservation (or, for ANY_RESERVATION, into none) any more. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

MAGIC = b"KVPCOL01"
TOKEN_BYTES = 32
GREETING = struct.Struct(f"<8s{TOKEN_BYTES}s")
#: Bytes of a key and of its value; both follow. An empty key: this side's group is made.
STORE = struct.Struct("<HI")
#: Operation, blocks, lease or reservation, bytes of all blocks, milliseconds that the client will wait.
REQUEST = struct.Struct("<B3xIQQQ")
DESCRIPTOR_BYTES = 20

#: A dead peer is noticed by who receives, at once, but by who sends a longer message only at its timeout.
MESSAGE_BYTES = 2 << 20
BLOCKS_MAX = 8192  # of one request
REQUEST_MS_MAX = 600_000
ANY_RESERVATION = 0
STORE_BYTES_MAX = 64 << 10


class Operation(IntEnum):
    READ = 1
    WRITE = 2
    PING = 3
    SETTLE = 4


class Status(IntEnum):
    """Of a greeting, a reply or a block."""

    OK = 0
    REFUSED = 1  # no live lease or reservation covers it
    BAD_REQUEST = 2
    OVERLOADED = 3


def pack_descriptors(offsets: NDArray[np.uint64], sizes: NDArray[np.uint64], generations: NDArray[np.uint32]) -> bytes:
    return offsets.astype("<u8").tobytes() + sizes.astype("<u8").tobytes() + generations.astype("<u4").tobytes()


def unpack_descriptors(raw: bytes, count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint32]]:
    return (
        np.frombuffer(raw, "<u8", count),
        np.frombuffer(raw, "<u8", count, 8 * count),
        np.frombuffer(raw, "<u4", count, 16 * count),
    )


def pack_states(ok: NDArray[np.bool_]) -> bytes:
    return np.where(ok, np.uint8(Status.OK), np.uint8(Status.REFUSED)).tobytes()
