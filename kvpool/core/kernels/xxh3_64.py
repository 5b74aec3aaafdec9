"""XXH3-64 with a seed over bytes at an address, which are stored while they are hashed; bit-exact with xxhash.

What is hashed is what was stored, also when somebody changes the source meanwhile. Numba's cache does not notice that
a function of another file has changed: touch `copying.py` and `tiers/ssd/read_loop.py` after a change here or in
`stripes.py`, and `xxh3.py` after one there.
Source: Yann Collet, xxHash 0.8, xxhash.h.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvpool.core.kernels.atomics import array_address
from kvpool.core.kernels.stripes import (
    BLOCK_BYTES,
    STRIPE_BYTES,
    hash_blocks,
    hash_blocks_storing,
    hash_blocks_streaming,
    hash_stripes,
    hash_stripes_storing,
    hash_stripes_streaming,
    load_8,
    load_32,
    load_64,
    move_bytes,
)
from kvpool.core.kernels.xxh3 import (
    ACCUMULATORS,
    AVALANCHE,
    LOW32,
    P64_1,
    P64_2,
    P64_3,
    SECRET,
    fold_multiply,
    swap_bytes,
)

#: Words that a caller lends to `move_and_hash`: accumulators (8), the seeded secret (24), a short message (32).
SCRATCH_WORDS: Final = 64
_SECRET_AT, _MESSAGE_AT = 8, 32
_SHORT_BYTES: Final = 240

#: What happens to the bytes besides being hashed. STREAM bypasses the caches; target and size are then multiples of 64.
HASH_ONLY, STORE, STREAM = 0, 1, 2

_RRMXMX = np.uint64(0x9FB21C651E98DF25)
_STRIPE = np.uint64(STRIPE_BYTES)
_BLOCK = np.uint64(BLOCK_BYTES)
_ONE = np.uint64(1)


@njit(inline="always")
def _avalanche(h: np.uint64) -> np.uint64:
    h ^= h >> np.uint64(37)
    h *= AVALANCHE
    return h ^ (h >> np.uint64(32))


@njit(inline="always")
def _avalanche_64(h: np.uint64) -> np.uint64:
    h ^= h >> np.uint64(33)
    h *= P64_2
    h ^= h >> np.uint64(29)
    h *= P64_3
    return h ^ (h >> np.uint64(32))


@njit(inline="always")
def _rotated(h: np.uint64, bits: int) -> np.uint64:
    return (h << np.uint64(bits)) | (h >> np.uint64(64 - bits))


@njit(inline="always")
def _mix16(at: np.uint64, secret: int, seed: np.uint64) -> np.uint64:
    low, high = load_64(at), load_64(at + np.uint64(8))
    return fold_multiply(low ^ (SECRET[secret] + seed), high ^ (SECRET[secret + 8] - seed))


@njit
def _hash_to_16(at: np.uint64, size: np.uint64, seed: np.uint64) -> np.uint64:
    if size > np.uint64(8):
        low = load_64(at) ^ ((SECRET[24] ^ SECRET[32]) + seed)
        high = load_64(at + size - np.uint64(8)) ^ ((SECRET[40] ^ SECRET[48]) - seed)
        return _avalanche(size + swap_bytes(low) + high + fold_multiply(low, high))
    if size >= np.uint64(4):
        seed ^= swap_bytes(seed & LOW32)  # its low half, reversed, lands in the high half
        word = load_32(at + size - np.uint64(4)) + (load_32(at) << np.uint64(32))
        h = word ^ ((SECRET[8] ^ SECRET[16]) - seed)
        h ^= _rotated(h, 49) ^ _rotated(h, 24)
        h *= _RRMXMX
        h ^= (h >> np.uint64(35)) + size
        h *= _RRMXMX
        return h ^ (h >> np.uint64(28))
    if size > np.uint64(0):
        first, middle, last = load_8(at), load_8(at + (size >> _ONE)), load_8(at + size - _ONE)
        word = (first << np.uint64(16)) | (middle << np.uint64(24)) | last | (size << np.uint64(8))
        return _avalanche_64(word ^ (((SECRET[0] & LOW32) ^ (SECRET[4] & LOW32)) + seed))
    return _avalanche_64(seed ^ SECRET[56] ^ SECRET[64])


@njit
def _hash_to_128(at: np.uint64, size: np.uint64, seed: np.uint64) -> np.uint64:
    h = size * P64_1
    pairs = np.int64((size - _ONE) >> np.uint64(5))
    for i in range(pairs, -1, -1):
        h += _mix16(at + np.uint64(16 * i), 32 * i, seed)
        h += _mix16(at + size - np.uint64(16 * (i + 1)), 32 * i + 16, seed)
    return _avalanche(h)


@njit
def _hash_to_240(at: np.uint64, size: np.uint64, seed: np.uint64) -> np.uint64:
    h = size * P64_1
    for i in range(8):
        h += _mix16(at + np.uint64(16 * i), 16 * i, seed)
    h = _avalanche(h)
    for i in range(8, np.int64(size >> np.uint64(4))):
        h += _mix16(at + np.uint64(16 * i), 16 * (i - 8) + 3, seed)
    h += _mix16(at + size - np.uint64(16), 119, seed)
    return _avalanche(h)


@njit
def _hash_short(
    source: np.uint64, target: np.uint64, size: np.uint64, seed: np.uint64, store: int, scratch: NDArray[np.uint64]
) -> np.uint64:
    """Up to 240 bytes, by way of a private copy."""
    message = array_address(scratch) + np.uint64(8 * _MESSAGE_AT)
    move_bytes(source, message, size)
    if store != HASH_ONLY:
        move_bytes(message, target, size)
    if size <= np.uint64(16):
        return _hash_to_16(message, size, seed)
    if size <= np.uint64(128):
        return _hash_to_128(message, size, seed)
    return _hash_to_240(message, size, seed)


@njit
def _hash_long(
    source: np.uint64, target: np.uint64, size: np.uint64, seed: np.uint64, store: int, scratch: NDArray[np.uint64]
) -> np.uint64:
    for i in range(8):
        scratch[i] = ACCUMULATORS[i]
    for i in range(12):
        scratch[_SECRET_AT + 2 * i] = SECRET[16 * i] + seed
        scratch[_SECRET_AT + 2 * i + 1] = SECRET[16 * i + 8] - seed
    state = array_address(scratch)
    secret = state + np.uint64(8 * _SECRET_AT)
    blocks = (size - _ONE) // _BLOCK
    at = blocks * _BLOCK
    stripes = (size - _ONE - at) // _STRIPE
    # The last stripe overlaps the one before: it is loaded again, hashed and stored over it as it is then. Should the
    # source have changed in between, both versions are in the digest, and it does not verify.
    last = size - _STRIPE
    last_secret = secret + np.uint64(121)
    if store == STREAM:
        hash_blocks_streaming(source, target, blocks, state, secret)
        hash_stripes_streaming(source + at, target + at, stripes, state, secret)
        hash_stripes_streaming(source + last, target + last, _ONE, state, last_secret)
    elif store == STORE:
        hash_blocks_storing(source, target, blocks, state, secret)
        hash_stripes_storing(source + at, target + at, stripes, state, secret)
        hash_stripes_storing(source + last, target + last, _ONE, state, last_secret)
    else:
        hash_blocks(source, target, blocks, state, secret)
        hash_stripes(source + at, target + at, stripes, state, secret)
        hash_stripes(source + last, target + last, _ONE, state, last_secret)
    h = size * P64_1
    for i in range(4):
        word = secret + np.uint64(11 + 16 * i)
        h += fold_multiply(scratch[2 * i] ^ load_64(word), scratch[2 * i + 1] ^ load_64(word + np.uint64(8)))
    return _avalanche(h)


@njit
def move_and_hash(
    source: np.uint64, target: np.uint64, size: np.uint64, seed: np.uint64, store: int, scratch: NDArray[np.uint64]
) -> np.uint64:
    """XXH3-64 of `size` bytes at the address `source`, which `store` says what to do with besides.

    Args: scratch uint64 (SCRATCH_WORDS), private to the call.
    Returns: the digest of the bytes as they now are at `target` (of the bytes as they were read, with HASH_ONLY).
    """
    if size <= np.uint64(_SHORT_BYTES):
        return _hash_short(source, target, size, seed, store, scratch)
    return _hash_long(source, target, size, seed, store, scratch)
