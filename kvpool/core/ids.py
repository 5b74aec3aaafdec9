"""Names and small types of the pool. Plain data only."""

from __future__ import annotations

from enum import IntEnum
from typing import NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import BadKeyLength

KEY_BYTES = 16

#: Block keys in prompt order: uint8 (keys, 16), C-contiguous.
KeyArray: TypeAlias = NDArray[np.uint8]

SourceId = NewType("SourceId", str)
InstanceId = NewType("InstanceId", str)
RequestId = NewType("RequestId", str)
NamespaceId = NewType("NamespaceId", bytes)
SessionId = NewType("SessionId", int)
ReservationId = NewType("ReservationId", int)
LeaseId = NewType("LeaseId", int)
PinId = NewType("PinId", int)
WaitId = NewType("WaitId", int)


class Tier(IntEnum):
    """Where bytes lie; numbers as on the wire."""

    HBM = 1
    DRAM = 2
    SSD = 3


class Fidelity(IntEnum):
    """How faithful a stored copy is; numbers as on the wire."""

    EXACT = 1
    INT8 = 2


class Role(IntEnum):
    """What the scheduler may place on an instance; numbers as on the wire."""

    PREFILL = 1
    DECODE = 2
    BOTH = 3


def unpack_keys(packed: bytes) -> KeyArray:
    """Keys of a packed field, as a read-only view.

    Raises: BadKeyLength if the length is not a multiple of 16.
    """
    if len(packed) % KEY_BYTES:
        raise BadKeyLength(f"{len(packed)} bytes are not a whole number of {KEY_BYTES}-byte keys")
    return np.frombuffer(packed, dtype=np.uint8).reshape(-1, KEY_BYTES)


def pack_keys(keys: KeyArray) -> bytes:
    """The inverse of `unpack_keys`."""
    return keys.tobytes()


_SPLITMIX_A = 0x9E3779B97F4A7C15
_SPLITMIX_B = 0xBF58476D1CE4E5B9
_MASK64 = (1 << 64) - 1


def qualify(keys: KeyArray, group: int, shard: int) -> KeyArray:
    """Keys under which one shard of one group is stored: group and shard folded in, (0, 0) leaves them as they are.

    Its own inverse, so that a listing can be shown with the keys that clients know.
    """
    if group == 0 and shard == 0:
        return keys
    x = ((group << 32 | shard) * _SPLITMIX_A) & _MASK64
    x = ((x ^ (x >> 30)) * _SPLITMIX_B) & _MASK64
    words = keys.view(np.uint64).copy()
    words[:, 1] ^= np.uint64(x ^ (x >> 27))
    return words.view(np.uint8)
