"""Size classes, runs of units and bitmaps of slots: the loops of the slot allocator. Functions over arrays only.

`spans` is int32 (7, units), a column a unit: row FIRST names the first unit of the span that a unit belongs to, or -1
where it is free; the other rows mean something in the column of a span's first unit. `partial` is uint64
(classes, words): a bit for each first unit of a span that has a free slot. `table` is int64 (5, classes). `pool` holds
the bitmaps of the spans, a set bit being a free slot, in chunks of 2^order words; free chunks are linked through their
first word. A span that holds one slot has no bitmap. `counters` is int64, see the names below.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

U64: TypeAlias = NDArray[np.uint64]
I64: TypeAlias = NDArray[np.int64]
I32: TypeAlias = NDArray[np.int32]

#: Rows of `spans`.
FIRST, UNITS, CLASS, SLOTS, USED, BITS, HINT = range(7)
SPAN_ROWS: Final = 7

#: Rows of `table`: bytes of a slot, units and slots of a fresh span, order of its bitmap, first word of `partial` that
#: may have a bit.
SLOT_BYTES, SPAN_UNITS, SPAN_SLOTS, ORDER, LOW_WORD = range(5)
TABLE_ROWS: Final = 5

#: `counters`: bytes in slots, spans, bytes of spans that no slot can use, a unit below which none is free, words of
#: the pool in use, 1 if the last call stopped because the pool is full; then heads of the lists of free chunks.
BYTES_USED, SPAN_COUNT, WASTE, LOW_UNIT, POOL_TOP, POOL_FULL, HEADS = range(7)
ORDERS: Final = 40

_ALL: Final = np.uint64(0xFFFFFFFFFFFFFFFF)

_jit = numba.njit(cache=True, nogil=True)


@_jit
def _lowest_bit(word: np.uint64) -> np.int64:
    """Number of zeros below the lowest set bit of a word that is not 0."""
    x = (word & (~word + np.uint64(1))) - np.uint64(1)
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@_jit
def class_of(size: np.int64) -> np.int64:
    """Class of a size: 16 steps a doubling, of 64 bytes at least."""
    step = (size - 1) >> 6
    doublings = 0
    while (step >> doublings) > 31:
        doublings += 1
    return (doublings << 4) + (step >> doublings)


@_jit
def classes_of(sizes: I64, out: I32) -> None:
    """out[i] = class of sizes[i] >= 1."""
    for i in range(len(sizes)):
        out[i] = class_of(sizes[i])


@_jit
def longest_run(spans: I32) -> np.int64:
    """Units of the longest run of free units."""
    longest = run = 0
    for unit in range(spans.shape[1]):
        run = run + 1 if spans[FIRST, unit] < 0 else 0
        longest = max(longest, run)
    return np.int64(longest)


# ---------------------------------------------------------------- runs of units


@_jit
def _first_free(spans: I32, counters: I64) -> np.int64:
    """The lowest free unit, or the number of units."""
    unit = counters[LOW_UNIT]
    while unit < spans.shape[1] and spans[FIRST, unit] >= 0:
        unit += spans[UNITS, unit]
    counters[LOW_UNIT] = unit
    return unit


@_jit
def _run_from(spans: I32, unit: np.int64, least: np.int64, most: np.int64) -> tuple[np.int64, np.int64]:
    """First run of at least `least` free units at `unit` or behind it: (its first, its length up to `most`), or -1."""
    units = spans.shape[1]
    while unit < units:
        if spans[FIRST, unit] >= 0:
            unit += spans[UNITS, unit]
            continue
        end = unit
        while end < units and end - unit < most and spans[FIRST, end] < 0:
            end += 1
        if end - unit >= least:
            return unit, end - unit
        unit = end
    return np.int64(-1), np.int64(0)


@_jit
def open_span(
    spans: I32, counters: I64, first: np.int64, units: np.int64, slot_class: np.int64, slots: np.int64
) -> None:
    for unit in range(first, first + units):
        spans[FIRST, unit] = first
    spans[UNITS, first] = units
    spans[CLASS, first] = slot_class
    spans[SLOTS, first] = slots
    spans[USED, first] = 0
    spans[BITS, first] = -1
    spans[HINT, first] = 0
    counters[SPAN_COUNT] += 1


@_jit
def _close(spans: I32, counters: I64, first: np.int64) -> None:
    for unit in range(first, first + spans[UNITS, first]):
        spans[FIRST, unit] = -1
    counters[SPAN_COUNT] -= 1
    counters[LOW_UNIT] = min(counters[LOW_UNIT], first)


# ---------------------------------------------------------------- bitmaps


@_jit
def take_chunk(pool: U64, counters: I64, order: np.int64) -> np.int64:
    """First word of a chunk of 2^order words; -1, and POOL_FULL set, if the pool must grow first."""
    head = counters[HEADS + order]
    if head >= 0:
        counters[HEADS + order] = np.int64(pool[head]) - 1
        return head
    start = counters[POOL_TOP]
    if start + (1 << order) > len(pool):
        counters[POOL_FULL] = 1
        return np.int64(-1)
    counters[POOL_TOP] = start + (1 << order)
    return start


@_jit
def _give_chunk(pool: U64, counters: I64, start: np.int64, order: np.int64) -> None:
    pool[start] = np.uint64(counters[HEADS + order] + 1)
    counters[HEADS + order] = start


@_jit
def mark_all_free(pool: U64, start: np.int64, slots: np.int64, order: np.int64) -> None:
    """Marks the first `slots` slots free and what the bitmap holds beyond them as taken."""
    for word in range(1 << order):
        left = slots - 64 * word
        if left >= 64:
            pool[start + word] = _ALL
        elif left > 0:
            pool[start + word] = (np.uint64(1) << np.uint64(left)) - np.uint64(1)
        else:
            pool[start + word] = np.uint64(0)


@_jit
def mark_partial(partial: U64, table: I64, slot_class: np.int64, first: np.int64) -> None:
    word = first >> 6
    partial[slot_class, word] |= np.uint64(1) << np.uint64(first & 63)
    table[LOW_WORD, slot_class] = min(table[LOW_WORD, slot_class], word)


@_jit
def _clear_partial(partial: U64, slot_class: np.int64, first: np.int64) -> None:
    partial[slot_class, first >> 6] &= ~(np.uint64(1) << np.uint64(first & 63))


@_jit
def _lowest_partial(partial: U64, table: I64, slot_class: np.int64) -> np.int64:
    """First unit of the lowest span of a class that has a free slot, or -1."""
    for word in range(table[LOW_WORD, slot_class], partial.shape[1]):
        if partial[slot_class, word] != 0:
            table[LOW_WORD, slot_class] = word
            return np.int64(64 * word + _lowest_bit(partial[slot_class, word]))
    table[LOW_WORD, slot_class] = partial.shape[1]
    return np.int64(-1)


# ---------------------------------------------------------------- taking


@_jit
def take_singles(
    slot_class: np.int64, units: np.int64, slot_bytes: np.int64, unit_bytes: np.int64, spans: I32, counters: I64,
    out: I64,
) -> np.int64:  # fmt: skip
    """Slots that have a span of `units` units each; returns how many of `out` are filled."""
    at = _first_free(spans, counters)
    for filled in range(len(out)):
        first, length = _run_from(spans, at, units, units)
        if first < 0:
            return np.int64(filled)
        open_span(spans, counters, first, length, slot_class, np.int64(1))
        spans[USED, first] = 1
        counters[BYTES_USED] += slot_bytes
        counters[WASTE] += units * unit_bytes - slot_bytes
        out[filled] = first * unit_bytes
        at = first + length
    return np.int64(len(out))


@_jit
def _fill(
    first: np.int64, slot_class: np.int64, unit_bytes: np.int64, spans: I32, partial: U64, table: I64, pool: U64,
    out: I64, filled: np.int64,
) -> np.int64:  # fmt: skip
    """Takes the lowest free slots of a span, as many as `out` wants; returns how many of `out` are filled."""
    size, start = table[SLOT_BYTES, slot_class], spans[BITS, first]
    word = spans[HINT, first]
    before = filled
    free = spans[SLOTS, first] - spans[USED, first]
    while filled < len(out) and filled - before < free:
        bits = pool[start + word]
        while bits != 0 and filled < len(out):
            out[filled] = first * unit_bytes + (64 * word + _lowest_bit(bits)) * size
            bits &= bits - np.uint64(1)
            filled += 1
        pool[start + word] = bits
        if bits == 0:
            word += 1
    spans[HINT, first] = word
    spans[USED, first] += filled - before
    if spans[USED, first] == spans[SLOTS, first]:
        _clear_partial(partial, slot_class, first)
    return filled


@_jit
def take_slots(
    slot_class: np.int64, unit_bytes: np.int64, spans: I32, partial: U64, table: I64, pool: U64, counters: I64,
    out: I64, filled: np.int64,
) -> np.int64:  # fmt: skip
    """Slots of a class whose spans hold several, the lowest first; returns how many of `out` are filled.

    Opens spans of full length while there is room for them, then shorter ones. Stops with POOL_FULL set if the pool
    must grow; the caller grows it and calls again with the number returned.
    """
    size, full = table[SLOT_BYTES, slot_class], table[SPAN_UNITS, slot_class]
    least = full
    before = filled
    counters[POOL_FULL] = 0
    at = _first_free(spans, counters)
    while filled < len(out):
        first = _lowest_partial(partial, table, slot_class)
        if first < 0:
            first, units = _run_from(spans, at, least, full)
            if first < 0:
                if least < full:
                    break
                least, at = (size + unit_bytes - 1) // unit_bytes, counters[LOW_UNIT]
                if least == full:
                    break
                continue
            start = take_chunk(pool, counters, table[ORDER, slot_class])
            if start < 0:
                break
            slots = units * unit_bytes // size
            # A short span takes no unit that holds no part of a slot.
            units = (slots * size + unit_bytes - 1) // unit_bytes
            open_span(spans, counters, first, units, slot_class, slots)
            spans[BITS, first] = start
            mark_all_free(pool, start, slots, table[ORDER, slot_class])
            mark_partial(partial, table, slot_class, first)
            counters[WASTE] += units * unit_bytes - slots * size
            at = first + units
        filled = _fill(first, slot_class, unit_bytes, spans, partial, table, pool, out, filled)
    counters[BYTES_USED] += (filled - before) * size
    return filled


# ---------------------------------------------------------------- giving back


@_jit
def free_slots(
    offsets: I64, sizes: I64, unit_bytes: np.int64, spans: I32, partial: U64, table: I64, pool: U64, counters: I64
) -> np.int64:
    """Takes slots back; returns how many, fewer than given if the next is no slot that is taken with that size."""
    classes = table.shape[1]
    for i in range(len(offsets)):
        offset = offsets[i]
        if offset < 0 or offset >= spans.shape[1] * unit_bytes or sizes[i] <= 0:
            return np.int64(i)
        slot_class = class_of(sizes[i])
        first = np.int64(spans[FIRST, offset // unit_bytes])
        if first < 0 or spans[CLASS, first] != slot_class:
            return np.int64(i)
        inside = offset - first * unit_bytes
        if slot_class >= classes or table[SPAN_SLOTS, slot_class] == 1:
            units = (sizes[i] + unit_bytes - 1) // unit_bytes
            slot_bytes = units * unit_bytes
            if slot_class < classes:
                slot_bytes = table[SLOT_BYTES, slot_class]
                units = table[SPAN_UNITS, slot_class]
            if inside != 0 or spans[UNITS, first] != units:
                return np.int64(i)
            counters[BYTES_USED] -= slot_bytes
            counters[WASTE] -= units * unit_bytes - slot_bytes
            _close(spans, counters, first)
            continue
        size = table[SLOT_BYTES, slot_class]
        slot = inside // size
        word, bit = spans[BITS, first] + (slot >> 6), np.uint64(1) << np.uint64(slot & 63)
        if slot * size != inside or slot >= spans[SLOTS, first] or pool[word] & bit:
            return np.int64(i)
        pool[word] |= bit
        spans[HINT, first] = min(spans[HINT, first], slot >> 6)
        counters[BYTES_USED] -= size
        if spans[USED, first] == spans[SLOTS, first]:
            mark_partial(partial, table, slot_class, first)
        spans[USED, first] -= 1
        if spans[USED, first] == 0:
            _clear_partial(partial, slot_class, first)
            counters[WASTE] -= spans[UNITS, first] * unit_bytes - spans[SLOTS, first] * size
            _give_chunk(pool, counters, np.int64(spans[BITS, first]), table[ORDER, slot_class])
            _close(spans, counters, first)
    return np.int64(len(offsets))
