"""Rebuilding the spans of a segment from its live slots. Functions over the arrays of `kernels.spans`."""

from __future__ import annotations

import numba
import numpy as np

from kvpool.core.kernels.spans import (
    BITS,
    BYTES_USED,
    CLASS,
    FIRST,
    I32,
    I64,
    LOW_UNIT,
    ORDER,
    POOL_FULL,
    SLOT_BYTES,
    SLOTS,
    SPAN_SLOTS,
    SPAN_UNITS,
    U64,
    UNITS,
    USED,
    WASTE,
    class_of,
    mark_all_free,
    mark_partial,
    open_span,
    take_chunk,
)

_jit = numba.njit(cache=True, nogil=True)


@_jit
def _span_of_slot(offset: np.int64, slot_class: np.int64, unit_bytes: np.int64, table: I64) -> np.int64:
    """First unit of the span that a slot of a class lies in, or -1 if no span can put a slot there.

    There is one answer at most: slots begin at the same place of a unit only after a whole number of units without
    waste, and a fresh span is not longer than that.
    """
    size = table[SLOT_BYTES, slot_class]
    unit = offset // unit_bytes
    for first in range(unit, max(unit - table[SPAN_UNITS, slot_class], -1), -1):
        inside = offset - first * unit_bytes
        if inside % size == 0 and inside // size < table[SPAN_SLOTS, slot_class]:
            return np.int64(first)
    return np.int64(-1)


@_jit
def _claim(spans: I32, first: np.int64, begin: np.int64, end: np.int64) -> bool:
    """Gives units begin..end to the span at `first` if they are free or its own already."""
    if begin < 0 or end > spans.shape[1]:
        return False
    for unit in range(begin, end):
        if spans[FIRST, unit] >= 0 and spans[FIRST, unit] != first:
            return False
    for unit in range(begin, end):
        spans[FIRST, unit] = first
    return True


@_jit
def restore_slots(
    offsets: I64, sizes: I64, unit_bytes: np.int64, spans: I32, table: I64, pool: U64, counters: I64, accepted: I64,
    start: np.int64,
) -> np.int64:  # fmt: skip
    """Takes given slots, in ascending order of offset, from number `start` on; accepted[i] = 1 for those that fit.

    Spans get the units that their slots need; `finish_restore` lengthens them. Returns the number to go on with:
    fewer than all only with POOL_FULL set. The allocator was empty at the first call.
    """
    classes, units_total = table.shape[1], spans.shape[1]
    counters[POOL_FULL] = 0
    for i in range(start, len(offsets)):
        offset = offsets[i]
        if sizes[i] <= 0 or offset < 0 or offset >= units_total * unit_bytes or sizes[i] > units_total * unit_bytes:
            continue
        slot_class = class_of(sizes[i])
        if slot_class >= classes or table[SPAN_SLOTS, slot_class] == 1:
            first = offset // unit_bytes
            units = (sizes[i] + unit_bytes - 1) // unit_bytes
            slot_bytes = units * unit_bytes
            if slot_class < classes:
                slot_bytes, units = table[SLOT_BYTES, slot_class], table[SPAN_UNITS, slot_class]
            if offset % unit_bytes != 0 or spans[FIRST, first] >= 0 or not _claim(spans, first, first, first + units):
                continue
            open_span(spans, counters, first, units, slot_class, np.int64(1))
            spans[USED, first] = 1
            counters[WASTE] += units * unit_bytes - slot_bytes
            counters[BYTES_USED] += slot_bytes
            accepted[i] = 1
            continue
        first = _span_of_slot(offset, slot_class, unit_bytes, table)
        if first < 0:
            continue
        size = table[SLOT_BYTES, slot_class]
        end = (offset + size + unit_bytes - 1) // unit_bytes
        if spans[FIRST, first] == first:
            slot = (offset - first * unit_bytes) // size
            word, bit = spans[BITS, first] + (slot >> 6), np.uint64(1) << np.uint64(slot & 63)
            if spans[CLASS, first] != slot_class or not pool[word] & bit or not _claim(spans, first, first, end):
                continue
        else:
            if end > units_total or spans[FIRST, first] >= 0:
                continue
            taken = False
            for unit in range(first, end):
                taken = taken or spans[FIRST, unit] >= 0
            if taken:
                continue
            chunk = take_chunk(pool, counters, table[ORDER, slot_class])
            if chunk < 0:
                return np.int64(i)
            open_span(spans, counters, first, end - first, slot_class, table[SPAN_SLOTS, slot_class])
            spans[BITS, first] = chunk
            mark_all_free(pool, chunk, table[SPAN_SLOTS, slot_class], table[ORDER, slot_class])
            slot = (offset - first * unit_bytes) // size
            word, bit = chunk + (slot >> 6), np.uint64(1) << np.uint64(slot & 63)
        pool[word] &= ~bit
        spans[UNITS, first] = max(spans[UNITS, first], end - first)
        spans[USED, first] += 1
        counters[BYTES_USED] += size
        accepted[i] = 1
    return np.int64(len(offsets))


@_jit
def finish_restore(unit_bytes: np.int64, spans: I32, partial: U64, table: I64, pool: U64, counters: I64) -> None:
    """Lengthens the spans that `restore_slots` opened to full length, or as far as units are free."""
    classes, unit = table.shape[1], 0
    while unit < spans.shape[1]:
        if spans[FIRST, unit] < 0:
            unit += 1
            continue
        first, slot_class = unit, spans[CLASS, unit]
        if slot_class < classes and table[SPAN_SLOTS, slot_class] > 1:
            size, end = table[SLOT_BYTES, slot_class], first + spans[UNITS, first]
            most = min(first + table[SPAN_UNITS, slot_class], spans.shape[1])
            while end < most and spans[FIRST, end] < 0:
                end += 1
            slots = (end - first) * unit_bytes // size
            end = first + (slots * size + unit_bytes - 1) // unit_bytes
            _claim(spans, np.int64(first), np.int64(first), np.int64(end))
            spans[UNITS, first], spans[SLOTS, first] = end - first, slots
            for slot in range(slots, table[SPAN_SLOTS, slot_class]):
                pool[spans[BITS, first] + (slot >> 6)] &= ~(np.uint64(1) << np.uint64(slot & 63))
            counters[WASTE] += (end - first) * unit_bytes - slots * size
            if spans[USED, first] < slots:
                mark_partial(partial, table, slot_class, first)
        unit = first + spans[UNITS, first]
    counters[LOW_UNIT] = 0
