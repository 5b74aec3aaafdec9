"""XXH3-128 (seed 0) over 32-bit words and the block key chain, bit-exact with the xxhash library.

Only inputs of 17 bytes and more, in whole 32-bit words: a chained message is a 16-byte parent and at least one token.
Source: Yann Collet, xxHash 0.8, xxhash.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kvpool.core.kernels.atomics import array_address
from kvpool.core.kernels.stripes import load_64

_SECRET_BYTES = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
#: SECRET[i]: the 64-bit word that begins at byte i of the secret; the algorithm reads it at odd places too.
SECRET = np.array([int.from_bytes(_SECRET_BYTES[i : i + 8], "little") for i in range(185)], dtype=np.uint64)

P32_1, P32_2, P32_3 = np.uint64(0x9E3779B1), np.uint64(0x85EBCA77), np.uint64(0xC2B2AE3D)
P64_1, P64_2, P64_3 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
P64_4, P64_5 = np.uint64(0x85EBCA77C2B2AE63), np.uint64(0x27D4EB2F165667C5)
AVALANCHE = np.uint64(0x165667919E3779F9)
LOW32 = np.uint64(0xFFFFFFFF)
ACCUMULATORS = np.array([P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1], dtype=np.uint64)
STRIPE_WORDS = 16  # 64 bytes
BLOCK_STRIPES = 16  # (secret size - 64) / 8
#: Tokens of a block whose message is hashed in one of up to 128 bytes, no later half of which reaches into its parent.
SHORT_TOKENS_MIN, SHORT_TOKENS_MAX = 8, 28
_EIGHT = np.uint64(8)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def fold_multiply(typing_context: Any, left: Any, right: Any) -> Any:
    """Low half xor high half of the 128-bit product of two uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(arguments[0], wide), builder.zext(arguments[1], wide))
        high = builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))
        return builder.xor(builder.trunc(product, ir.IntType(64)), high)

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def swap_bytes(typing_context: Any, word: Any) -> Any:
    """A uint64 with its bytes in reverse order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bswap(arguments[0])

    return types.uint64(types.uint64), generate


@njit(inline="always")
def _word(message: NDArray[np.uint32], at: int) -> np.uint64:
    return np.uint64(message[at]) | (np.uint64(message[at + 1]) << np.uint64(32))


@njit(inline="always")
def _avalanche(h: np.uint64) -> np.uint64:
    h ^= h >> np.uint64(37)
    h *= AVALANCHE
    return h ^ (h >> np.uint64(32))


@njit(inline="always")
def _mix16(message: NDArray[np.uint32], at: int, secret: int) -> np.uint64:
    return fold_multiply(_word(message, at) ^ SECRET[secret], _word(message, at + 2) ^ SECRET[secret + 8])


@njit(inline="always")
def _mix32(
    low: np.uint64, high: np.uint64, message: NDArray[np.uint32], first: int, second: int, secret: int
) -> tuple[np.uint64, np.uint64]:
    low += _mix16(message, first, secret)
    low ^= _word(message, second) + _word(message, second + 2)
    high += _mix16(message, second, secret + 16)
    high ^= _word(message, first) + _word(message, first + 2)
    return low, high


@njit(inline="always")
def _finish_mid(low: np.uint64, high: np.uint64, size: np.uint64) -> tuple[np.uint64, np.uint64]:
    h_high = low * P64_1 + high * P64_4 + size * P64_2
    return _avalanche(low + high), np.uint64(0) - _avalanche(h_high)


@njit
def _hash_17_to_128(message: NDArray[np.uint32], words: int) -> tuple[np.uint64, np.uint64]:
    size = np.uint64(4 * words)
    low, high = size * P64_1, np.uint64(0)
    if words > 24:
        low, high = _mix32(low, high, message, 12, words - 16, 96)
    if words > 16:
        low, high = _mix32(low, high, message, 8, words - 12, 64)
    if words > 8:
        low, high = _mix32(low, high, message, 4, words - 8, 32)
    low, high = _mix32(low, high, message, 0, words - 4, 0)
    return _finish_mid(low, high, size)


@njit
def _hash_129_to_240(message: NDArray[np.uint32], words: int) -> tuple[np.uint64, np.uint64]:
    size = np.uint64(4 * words)
    low, high = size * P64_1, np.uint64(0)
    for i in range(4):
        low, high = _mix32(low, high, message, 8 * i, 8 * i + 4, 32 * i)
    low, high = _avalanche(low), _avalanche(high)
    for i in range(4, words // 8):
        low, high = _mix32(low, high, message, 8 * i, 8 * i + 4, 3 + 32 * (i - 4))
    low, high = _mix32(low, high, message, words - 4, words - 8, 103)
    return _finish_mid(low, high, size)


@njit(inline="always")
def _accumulate(accumulators: NDArray[np.uint64], message: NDArray[np.uint32], at: int, secret: int) -> None:
    for lane in range(8):
        data = _word(message, at + 2 * lane)
        key = data ^ SECRET[secret + 8 * lane]
        accumulators[lane ^ 1] += data
        accumulators[lane] += (key & LOW32) * (key >> np.uint64(32))


@njit(inline="always")
def _merge(accumulators: NDArray[np.uint64], secret: int, start: np.uint64) -> np.uint64:
    result = start
    for i in range(4):
        result += fold_multiply(
            accumulators[2 * i] ^ SECRET[secret + 16 * i], accumulators[2 * i + 1] ^ SECRET[secret + 16 * i + 8]
        )
    return _avalanche(result)


@njit
def _hash_long(
    message: NDArray[np.uint32], words: int, accumulators: NDArray[np.uint64]
) -> tuple[np.uint64, np.uint64]:
    for lane in range(8):
        accumulators[lane] = ACCUMULATORS[lane]
    stripes = (words - 1) // STRIPE_WORDS  # the last stripe is counted apart, from the end
    for stripe in range(stripes):
        _accumulate(accumulators, message, STRIPE_WORDS * stripe, 8 * (stripe % BLOCK_STRIPES))
        if stripe % BLOCK_STRIPES == BLOCK_STRIPES - 1:
            for lane in range(8):
                a = accumulators[lane]
                accumulators[lane] = (a ^ (a >> np.uint64(47)) ^ SECRET[128 + 8 * lane]) * P32_1
    _accumulate(accumulators, message, words - STRIPE_WORDS, 121)
    size = np.uint64(4 * words)
    low = _merge(accumulators, 11, size * P64_1)
    return low, _merge(accumulators, 117, ~(size * P64_2))


@njit
def _hash_128(message: NDArray[np.uint32], words: int, accumulators: NDArray[np.uint64]) -> tuple[np.uint64, np.uint64]:
    if words <= 32:
        return _hash_17_to_128(message, words)
    if words <= 60:
        return _hash_129_to_240(message, words)
    return _hash_long(message, words, accumulators)


@njit(inline="always")
def _mix16_at(address: np.uint64, secret: int) -> np.uint64:
    return fold_multiply(load_64(address) ^ SECRET[secret], load_64(address + _EIGHT) ^ SECRET[secret + 8])


@njit(inline="always")
def _mix32_at(
    low: np.uint64, high: np.uint64, first: np.uint64, second: np.uint64, secret: int
) -> tuple[np.uint64, np.uint64]:
    low += _mix16_at(first, secret)
    low ^= load_64(second) + load_64(second + _EIGHT)
    high += _mix16_at(second, secret + 16)
    high ^= load_64(first) + load_64(first + _EIGHT)
    return low, high


@njit
def _chain_short(
    first: np.uint64, second: np.uint64, tokens: NDArray[np.uint32], block_tokens: int, keys: NDArray[np.uint64]
) -> None:
    """`chain_keys` of messages whose parent is needed in the last round only: the CPU does the others ahead of it.

    The message is not put together: all but its parent is read where the tokens are.
    """
    words = 4 + block_tokens
    size = np.uint64(4 * words)
    # Where the message would begin, and the last 16 bytes of it.
    at = array_address(tokens) - np.uint64(16)
    for block in range(keys.shape[0]):
        last = at + size - np.uint64(16)
        low, high = size * P64_1, np.uint64(0)
        if words > 24:
            low, high = _mix32_at(low, high, at + np.uint64(48), last - np.uint64(48), 96)
        if words > 16:
            low, high = _mix32_at(low, high, at + np.uint64(32), last - np.uint64(32), 64)
        if words > 8:
            low, high = _mix32_at(low, high, at + np.uint64(16), last - np.uint64(16), 32)
        low += fold_multiply(first ^ SECRET[0], second ^ SECRET[8])
        low ^= load_64(last) + load_64(last + _EIGHT)
        high += _mix16_at(last, 16)
        high ^= first + second
        low, high = _finish_mid(low, high, size)
        first, second = swap_bytes(high), swap_bytes(low)
        keys[block, 0] = first
        keys[block, 1] = second
        at += size - np.uint64(16)


@njit(nogil=True, cache=True)
def chain_keys(
    parent_first: np.uint64, parent_second: np.uint64, tokens: NDArray[np.uint32], block_tokens: int,
    keys: NDArray[np.uint64],
) -> None:  # fmt: skip
    """Fills `keys` (blocks, 2) with the chained keys of the full blocks of `tokens`.

    A key's two words are the library's digest (big-endian) read as little-endian words, as the next message has it.
    """
    if SHORT_TOKENS_MIN <= block_tokens <= SHORT_TOKENS_MAX:
        _chain_short(parent_first, parent_second, tokens, block_tokens, keys)
        return
    words = 4 + block_tokens
    message = np.empty(words, dtype=np.uint32)
    accumulators = np.empty(8, dtype=np.uint64)
    first, second = parent_first, parent_second
    for block in range(keys.shape[0]):
        message[0] = np.uint32(first & LOW32)
        message[1] = np.uint32(first >> np.uint64(32))
        message[2] = np.uint32(second & LOW32)
        message[3] = np.uint32(second >> np.uint64(32))
        message[4:] = tokens[block * block_tokens : (block + 1) * block_tokens]
        low, high = _hash_128(message, words, accumulators)
        first, second = swap_bytes(high), swap_bytes(low)
        keys[block, 0] = first
        keys[block, 1] = second
