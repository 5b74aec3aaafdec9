"""Quantising KV to int8 and back, tile by tile in the cache, without the GIL.

A tile is the K or the V of one layer of one block: (tokens, kv_heads, head_dim). Blocks are named by addresses in this
process: the caller makes sure that the memory stays mapped and is as long as `shape` says. Every step is arithmetic in
float32 in a fixed order (round half to even, no contraction), so results do not depend on who computes them. The plain
oracle is in the tests. What the stored bytes mean is told in `kvpool.codecs.int8`. Numba's cache does not notice that a
function of another file has changed: touch this file after a change in `halves.py` or `stripes.py`.

`shape`: int64 (7,): sections, layers of a section, tokens, kv_heads, head_dim, dtype code, bytes of a stored section.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kvpool.core.kernels.halves import (
    bfloat16_bits,
    bits_of,
    float16_bits,
    float16_bits_in_range,
    float16_value,
    float_of,
)
from kvpool.core.kernels.stripes import move_bytes

U64: TypeAlias = NDArray[np.uint64]
I64: TypeAlias = NDArray[np.int64]
F32: TypeAlias = NDArray[np.float32]
U32: TypeAlias = NDArray[np.uint32]
Bools: TypeAlias = NDArray[np.bool_]

#: Codes of element types, as stored.
FLOAT32, FLOAT16, BFLOAT16 = 1, 2, 3

HEADER_BYTES: Final = 64
ALIGN_BYTES: Final = 64
SCALE_BYTES: Final = 2
STEPS: Final = 127  # on each side of zero

_INFINITE: Final = 0x7F800000
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SMALLEST_NORMAL: Final = 0x00800000
#: Largest scale whose 127 steps are finite in the element type.
_SCALE_MAX_F32 = np.float32(np.finfo(np.float32).max / STEPS)
_SCALE_MAX_F16 = np.float32(65504.0 / STEPS)
_SCALE_MAX_BF16 = np.float32(float(np.array(0x7F7F0000, dtype=np.uint32).view(np.float32)) / STEPS)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _pointer(typing_context: Any, address: Any) -> Any:
    """A uint64 address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.uint64), generate


# ------------------------------------------------------------ encoding


@njit
def _widen(source: np.uint64, code: int, tile: U32) -> None:
    """Fills `tile` with the float32 bits of the elements at `source`."""
    count = len(tile)
    if code == FLOAT32:
        words = carray(_pointer(source), count, np.uint32)
        for i in range(count):
            tile[i] = words[i]
        return
    halves = carray(_pointer(source), count, np.uint16)
    if code == BFLOAT16:
        for i in range(count):
            tile[i] = np.uint32(halves[i]) << np.uint32(16)
    else:
        for i in range(count):
            tile[i] = bits_of(float16_value(np.uint32(halves[i])))


@njit
def _channel_peaks(tile: U32, width: int, peaks: U32) -> None:
    """Bits of the largest magnitude of each channel over all tokens. As integers they are ordered like the numbers."""
    peaks[:width] = 0
    for begin in range(0, len(tile), width):
        row = tile[begin : begin + width]
        for i in range(width):
            peaks[i] = max(peaks[i], row[i] & _MAGNITUDE)


@njit
def _row_peaks(tile: U32, head_dim: int, peaks: U32) -> None:
    """Bits of the largest magnitude of each head of each token."""
    for row in range(len(tile) // head_dim):
        values = tile[row * head_dim : (row + 1) * head_dim]
        peak = np.uint32(0)
        for i in range(head_dim):
            peak = max(peak, values[i] & _MAGNITUDE)
        peaks[row] = peak


@njit
def _scale_of(peak: np.uint32) -> np.uint32:
    """float32 bits of the scale: bfloat16, rounded up so that no value needs more than 127 steps.

    Never subnormal, so that its inverse is finite; zero for zero.
    """
    if peak == np.uint32(0):
        return np.uint32(0)
    step = bits_of(float_of(peak) / np.float32(STEPS))
    step = (step + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    return max(step, np.uint32(_SMALLEST_NORMAL))


@njit
def _scales(peaks: U32, count: int, scale_max: np.float32, stored: np.uint64, scales: F32, inverses: F32) -> bool:
    """Fills in scales, their inverses and what is stored of them. False if a value is not finite or a step too big."""
    target = carray(_pointer(stored), count, np.uint16)
    good = True
    for i in range(count):
        bits = _scale_of(min(peaks[i], np.uint32(_INFINITE)))
        scale = float_of(bits)
        good &= peaks[i] < np.uint32(_INFINITE) and scale <= scale_max
        target[i] = np.uint16(bits >> np.uint32(16))
        scales[i] = scale
        inverses[i] = np.float32(1) / scale if bits else np.float32(0)
    return good


@njit
def _unit(peaks: U32, count: int) -> np.float32:
    """The power of two that brings the largest magnitude near 1: squares then neither overflow nor vanish."""
    peak = np.uint32(0)
    for i in range(count):
        peak = max(peak, peaks[i])
    exponent = max(np.int64(254) - np.int64(peak >> np.uint32(23)), np.int64(1))
    return float_of(np.uint32(exponent << 23))


@njit
def _quantise_row(
    row: F32,
    scales: F32,
    inverses: F32,
    unit: np.float32,
    code: int,
    values: NDArray[np.int8],
    errors: F32,
    powers: F32,
) -> None:
    """values = nearest step; adds the squares of what decoding will miss, and of the row itself, in units of `unit`."""
    width = len(row)
    if code == FLOAT32:
        for i in range(width):
            step = np.rint(row[i] * inverses[i])
            values[i] = np.int8(np.int32(step))
            error, power = (row[i] - step * scales[i]) * unit, row[i] * unit
            errors[i] += error * error
            powers[i] += power * power
    elif code == BFLOAT16:
        for i in range(width):
            step = np.rint(row[i] * inverses[i])
            values[i] = np.int8(np.int32(step))
            decoded = float_of(bfloat16_bits(step * scales[i]))
            error, power = (row[i] - decoded) * unit, row[i] * unit
            errors[i] += error * error
            powers[i] += power * power
    else:
        for i in range(width):
            step = np.rint(row[i] * inverses[i])
            values[i] = np.int8(np.int32(step))
            decoded = float16_value(float16_bits_in_range(step * scales[i]))
            error, power = (row[i] - decoded) * unit, row[i] * unit
            errors[i] += error * error
            powers[i] += power * power


@njit
def _fold(values: F32, count: int) -> np.float32:
    """Sum, in an order that vectors can follow: halves are added to each other until one is left."""
    while count > 1:
        half = (count + 1) // 2
        low, high = values[:half], values[half:count]
        for i in range(count - half):
            low[i] += high[i]
        count = half
    return values[0]


@njit
def _spread(heads: F32, head_dim: int, row: F32) -> None:
    """row[h, d] = heads[h]"""
    for head in range(len(heads)):
        part = row[head * head_dim : (head + 1) * head_dim]
        for i in range(head_dim):
            part[i] = heads[head]


@njit
def _scale_max(code: int) -> np.float32:
    if code == FLOAT32:
        return _SCALE_MAX_F32
    return _SCALE_MAX_BF16 if code == BFLOAT16 else _SCALE_MAX_F16


@njit
def _encode_tile(
    tile: U32, kv_heads: int, head_dim: int, code: int, by_channel: bool, stored: np.uint64, target: np.uint64,
    peaks: U32, scratch: F32,
) -> float:  # fmt: skip
    """Writes scales at `stored` and values at `target`. Returns: relative RMS error; infinite if it can't be said."""
    width = kv_heads * head_dim
    tokens = len(tile) // width
    count = width if by_channel else tokens * kv_heads
    floats = tile.view(np.float32)
    values = carray(_pointer(target), len(tile), np.int8)
    # scratch: (6, max(width, tokens * kv_heads)), flat
    room = len(scratch) // 6
    scales, inverses = scratch[:room], scratch[room : 2 * room]
    errors, powers = scratch[2 * room : 2 * room + width], scratch[3 * room : 3 * room + width]
    if by_channel:
        _channel_peaks(tile, width, peaks)
    else:
        _row_peaks(tile, head_dim, peaks)
    if not _scales(peaks, count, _scale_max(code), stored, scales, inverses):
        return np.inf
    unit = _unit(peaks, count)
    errors[:], powers[:] = 0, 0
    row_scales, row_inverses = scales[:width], inverses[:width]
    if not by_channel:
        row_scales, row_inverses = scratch[4 * room : 4 * room + width], scratch[5 * room : 5 * room + width]
    for token in range(tokens):
        if not by_channel:
            _spread(scales[token * kv_heads : (token + 1) * kv_heads], head_dim, row_scales)
            _spread(inverses[token * kv_heads : (token + 1) * kv_heads], head_dim, row_inverses)
        a, b = token * width, (token + 1) * width
        _quantise_row(floats[a:b], row_scales, row_inverses, unit, code, values[a:b], errors, powers)
    power = np.float64(_fold(powers, width))
    return np.sqrt(np.float64(_fold(errors, width)) / power) if power > 0 else 0.0


@njit
def _padded(size: int) -> int:
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


@njit
def _zero(begin: np.uint64, end: np.uint64) -> None:
    area = carray(_pointer(begin), np.int64(end - begin), np.uint8)
    area[:] = 0


@njit
def _encode_section(source: np.uint64, target: np.uint64, shape: I64, tile: U32, peaks: U32, scratch: F32) -> float:
    """Writes all but the header of a stored section. Returns: the worst error of its tiles."""
    layers, tokens, kv_heads, head_dim, code = shape[1], shape[2], shape[3], shape[4], shape[5]
    width = kv_heads * head_dim
    tile_bytes = np.uint64(len(tile) * (4 if code == FLOAT32 else 2))
    k_scales = target + np.uint64(HEADER_BYTES)
    v_scales = k_scales + np.uint64(layers * width * SCALE_BYTES)
    scales_end = v_scales + np.uint64(layers * tokens * kv_heads * SCALE_BYTES)
    values = target + np.uint64(_padded(np.int64(scales_end - target)))
    worst = 0.0
    for layer in range(layers):
        for kind in range(2):
            number = np.uint64(2 * layer + kind)
            _widen(source + number * tile_bytes, code, tile)
            by_channel = kind == 0
            stored = (
                k_scales + np.uint64(layer * width * SCALE_BYTES)
                if by_channel
                else v_scales + np.uint64(layer * tokens * kv_heads * SCALE_BYTES)
            )
            at = values + number * np.uint64(len(tile))
            error = _encode_tile(tile, kv_heads, head_dim, code, by_channel, stored, at, peaks, scratch)
            worst = max(worst, error)
    _zero(scales_end, values)
    _zero(values + np.uint64(2 * layers * len(tile)), target + np.uint64(shape[6]))
    return worst


@njit
def _buffers(shape: I64) -> tuple[U32, U32, F32]:
    tokens, kv_heads, head_dim = shape[2], shape[3], shape[4]
    room = max(kv_heads * head_dim, tokens * kv_heads)
    tile = np.empty(tokens * kv_heads * head_dim, dtype=np.uint32)
    return tile, np.empty(room, dtype=np.uint32), np.empty(6 * room, dtype=np.float32)


@njit(nogil=True, cache=True)
def encode_blocks(
    sources: U64, targets: U64, shape: I64, error_max: float, mixed: bool, errors: F32, raw: Bools, offsets: I64
) -> None:
    """Encodes blocks; the header of each section (64 bytes at `offsets`) is left to the caller.

    Args:
        sources, targets: uint64 (n): where blocks lie, and where their stored form goes.
        mixed: whether a section that breaks the bound is stored as it is, after its header and padded to 64 bytes,
            and later sections follow it; else sections lie a stored section apart and such a one holds nothing useful.
        errors, raw, offsets: (n, sections), filled in: error that int8 has, whether it breaks the bound, first byte.
    """
    sections = shape[0]
    tile, peaks, scratch = _buffers(shape)
    section_bytes = 2 * shape[1] * len(tile) * (4 if shape[5] == FLOAT32 else 2)
    for i in range(len(sources)):
        at = 0
        for section in range(sections):
            source, target = sources[i] + np.uint64(section * section_bytes), targets[i] + np.uint64(at)
            error = np.float32(_encode_section(source, target, shape, tile, peaks, scratch))
            errors[i, section] = error
            raw[i, section] = not error <= np.float32(error_max)
            offsets[i, section] = at
            if mixed and raw[i, section]:
                end = HEADER_BYTES + section_bytes
                move_bytes(source, target + np.uint64(HEADER_BYTES), np.uint64(section_bytes))
                at += _padded(end)
                _zero(target + np.uint64(end), target + np.uint64(_padded(end)))
            else:
                at += shape[6]


# ------------------------------------------------------------ decoding


@njit
def _decode_row(values: NDArray[np.int8], scales: F32, code: int, target: np.uint64) -> None:
    width = len(values)
    if code == FLOAT32:
        words = carray(_pointer(target), width, np.float32)
        for i in range(width):
            words[i] = np.float32(values[i]) * scales[i]
        return
    halves = carray(_pointer(target), width, np.uint16)
    if code == BFLOAT16:
        for i in range(width):
            halves[i] = np.uint16(bfloat16_bits(np.float32(values[i]) * scales[i]) >> np.uint32(16))
    else:
        for i in range(width):
            halves[i] = np.uint16(float16_bits(np.float32(values[i]) * scales[i]))


@njit
def _load_scales(stored: np.uint64, scales: F32) -> None:
    words = carray(_pointer(stored), len(scales), np.uint16)
    for i in range(len(scales)):
        scales[i] = float_of(np.uint32(words[i]) << np.uint32(16))


@njit
def _decode_section(source: np.uint64, target: np.uint64, shape: I64, scales: F32, row: F32) -> None:
    layers, tokens, kv_heads, head_dim, code = shape[1], shape[2], shape[3], shape[4], shape[5]
    width = kv_heads * head_dim
    row_bytes = width * (4 if code == FLOAT32 else 2)
    scales_bytes = SCALE_BYTES * layers * (width + tokens * kv_heads)
    k_scales = source + np.uint64(HEADER_BYTES)
    v_scales = k_scales + np.uint64(SCALE_BYTES * layers * width)
    values = carray(
        _pointer(source + np.uint64(_padded(HEADER_BYTES + scales_bytes))), 2 * layers * tokens * width, np.int8
    )
    for layer in range(layers):
        _load_scales(k_scales + np.uint64(SCALE_BYTES * layer * width), row)
        for token in range(tokens):
            at = 2 * layer * tokens + token
            _decode_row(values[at * width : (at + 1) * width], row, code, target + np.uint64(at * row_bytes))
        _load_scales(v_scales + np.uint64(SCALE_BYTES * layer * tokens * kv_heads), scales)
        for token in range(tokens):
            at = (2 * layer + 1) * tokens + token
            _spread(scales[token * kv_heads : (token + 1) * kv_heads], head_dim, row)
            _decode_row(values[at * width : (at + 1) * width], row, code, target + np.uint64(at * row_bytes))


@njit(nogil=True, cache=True)
def decode_blocks(sources: U64, targets: U64, shape: I64, raw: Bools, offsets: I64) -> None:
    """The inverse of `encode_blocks`, for sections whose headers were checked.

    Args: raw, offsets: (n, sections): form and first byte of each stored section.
    """
    sections = shape[0]
    tokens, kv_heads, width = shape[2], shape[3], shape[3] * shape[4]
    section_bytes = 2 * shape[1] * tokens * width * (4 if shape[5] == FLOAT32 else 2)
    scales, row = np.empty(tokens * kv_heads, dtype=np.float32), np.empty(width, dtype=np.float32)
    for i in range(len(sources)):
        for section in range(sections):
            source = sources[i] + np.uint64(offsets[i, section])
            target = targets[i] + np.uint64(section * section_bytes)
            if raw[i, section]:
                move_bytes(source + np.uint64(HEADER_BYTES), target, np.uint64(section_bytes))
            else:
                _decode_section(source, target, shape, scales, row)


def warm_up() -> None:
    """Runs each kernel once: compiled, or loaded from the cache."""
    shape = np.array([1, 1, 1, 1, 1, FLOAT32, 2 * ALIGN_BYTES + HEADER_BYTES], dtype=np.int64)
    block, out = np.ones(2, dtype=np.float32), np.zeros(3 * ALIGN_BYTES, dtype=np.uint8)
    sources = np.array([block.ctypes.data], dtype=np.uint64)
    targets = np.array([out.ctypes.data], dtype=np.uint64)
    errors, raw = np.zeros((1, 1), dtype=np.float32), np.zeros((1, 1), dtype=np.bool_)
    offsets = np.zeros((1, 1), dtype=np.int64)
    encode_blocks(sources, targets, shape, 0.5, False, errors, raw, offsets)
    decode_blocks(targets, sources, shape, raw, offsets)
    assert not raw[0, 0] and abs(float(block[0]) - 1) < 0.02
