"""Places in a segment: slots of geometric size classes in spans of equal units. Knows sizes, not contents.

Holds arithmetic and arrays; no bytes of the segment, no clock. The segment is a heap of units; a class takes spans of
k units and cuts them into slots; a span whose last slot is freed returns to the heap, where free neighbours are one run
by nature. What is lost, and the bound of it:

* inside a slot: at most 1/16 of it above 1 KiB (16 classes a doubling), fewer than 64 bytes below; sizes m * 2^k with m
  in 16..32 are classes themselves and lose nothing.
* at the end of a span: at most 1/16 of it. Where the heap has no run of k units, a span is as long as the run that is
  left, and loses less than one slot; without that, a heap in pieces would refuse what fits.
* in open spans: allocation alone leaves at most one span a class with free slots. After frees, one live slot keeps its
  span; whoever needs the units evicts the span as a whole (`spans`, `span_of`).
* at the end of the segment: less than one unit.
* objects of more than LARGE_UNITS units have a span of their own, of exact units: less than 1/16.

Private memory: 28 bytes a unit (65536 at most), a bit a slot, and a bit a unit for each class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.kernels import restoring
from kvpool.core.kernels import spans as kernels

#: The smallest slot, and the step between classes up to 1 KiB.
SLOT_BYTES_MIN: Final = 64
#: Beyond so many units an object has a span of its own, and no class.
LARGE_UNITS: Final = 16
UNITS_MAX: Final = 65536
UNIT_BYTES_MIN: Final = 4096
#: Below this, units are smaller only if the segment is: one of few units would lose much at its end.
_UNIT_BYTES_USUAL: Final = 65536
#: A larger object is nobody's: beyond it class arithmetic would leave int64.
SIZE_BYTES_MAX: Final = 1 << 60
_WASTE_SHARE: Final = 16
_POOL_WORDS_FIRST: Final = 1024

Offsets = NDArray[np.int64]


def slot_class(size_bytes: int) -> int:
    """Class of an object of `size_bytes` >= 1 bytes. The same in every process and for every segment."""
    assert 1 <= size_bytes <= SIZE_BYTES_MAX, f"{size_bytes} bytes have no class"
    step = (size_bytes - 1) // SLOT_BYTES_MIN
    doublings = max(step.bit_length() - 5, 0)
    return 16 * doublings + (step >> doublings)


def class_bytes(slot_class: int) -> int:
    """Bytes of a slot of a class: the largest size that is of it."""
    if slot_class < 32:
        return SLOT_BYTES_MIN * (slot_class + 1)
    return SLOT_BYTES_MIN * (17 + slot_class % 16) << (slot_class // 16 - 1)


def slot_classes(sizes: NDArray[Any]) -> NDArray[np.int32]:
    """`slot_class` of each; any integer dtype (n) -> int32 (n)."""
    out = np.empty(len(sizes), dtype=np.int32)
    kernels.classes_of(np.ascontiguousarray(sizes, dtype=np.int64), out)
    return out


def classes_bytes(slot_classes: NDArray[np.int32]) -> NDArray[np.int64]:
    """`class_bytes` of each; int32 (n) -> int64 (n)."""
    wide = slot_classes.astype(np.int64)
    scaled = SLOT_BYTES_MIN * (17 + wide % 16) << np.maximum(wide // 16 - 1, 0)
    return np.where(wide < 32, SLOT_BYTES_MIN * (wide + 1), scaled)


#: Classes that there can be, of objects of all sizes; arrays over classes have this length.
CLASSES: Final = slot_class(SIZE_BYTES_MAX) + 1


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Bytes of a segment: total = used + free + span_waste.

    used: in slots; free: in free slots and free units; span_waste: ends of spans that hold no slot. largest_extent: the
    longest run of free units. fragmentation: 1 - largest_extent / free, so 0 where all that is free is one run.
    """

    bytes_total: int
    bytes_used: int
    bytes_free: int
    bytes_largest_extent: int
    fragmentation: float
    spans: int
    bytes_span_waste: int


@dataclass(frozen=True, slots=True, eq=False)
class SpanTable:
    """All spans in order of address, a row each: first unit, units, class, slots that it has, slots taken; int32."""

    first: NDArray[np.int32]
    units: NDArray[np.int32]
    slot_class: NDArray[np.int32]
    slots: NDArray[np.int32]
    used: NDArray[np.int32]


def _fresh_span(slot_bytes: int, unit_bytes: int, units_max: int) -> tuple[int, int]:
    """Units and slots of a fresh span: the fewest units that lose at most 1/16, or else lose the smallest share."""
    best: tuple[int, int] | None = None
    for units in range(-(-slot_bytes // unit_bytes), units_max + 1):
        total = units * unit_bytes
        waste = total % slot_bytes
        if best is None or waste * best[0] < best[1] * units:
            best = units, waste
        if waste * _WASTE_SHARE <= total:
            break
    if best is None:
        # Larger than the segment: never allocated.
        return units_max + 1, 1
    return best[0], best[0] * unit_bytes // slot_bytes


class SlotAllocator:
    """Hands out offsets of a segment for objects of 1 byte up to all of it, the lowest first."""

    def __init__(self, capacity_bytes: int, unit_bytes: int | None = None) -> None:
        """Args: unit_bytes: a power of two >= 4096; None = `unit_for(capacity_bytes)`."""
        self.unit_bytes = self.unit_for(capacity_bytes) if unit_bytes is None else unit_bytes
        assert self.unit_bytes >= UNIT_BYTES_MIN and self.unit_bytes & (self.unit_bytes - 1) == 0
        self.units = capacity_bytes // self.unit_bytes
        assert 0 < self.units <= UNITS_MAX, f"{self.units} units of {self.unit_bytes} bytes"
        self.capacity_bytes = self.units * self.unit_bytes
        self._spans = np.zeros((kernels.SPAN_ROWS, self.units), dtype=np.int32)
        self._spans[kernels.FIRST] = -1
        self._table = self._class_table()
        self._partial = np.zeros((self._table.shape[1], -(-self.units // 64)), dtype=np.uint64)
        self._pool = np.zeros(_POOL_WORDS_FIRST, dtype=np.uint64)
        self._counters = np.zeros(kernels.HEADS + kernels.ORDERS, dtype=np.int64)
        self._counters[kernels.HEADS :] = -1

    @staticmethod
    def unit_for(capacity_bytes: int) -> int:
        """Bytes of a unit: at least 64 KiB, at most UNITS_MAX of them; smaller in segments of less than 1 MiB."""
        usual = min(_UNIT_BYTES_USUAL, max(UNIT_BYTES_MIN, 1 << max(capacity_bytes // 16, 1).bit_length() - 1))
        needed = 1 << (-(-capacity_bytes // UNITS_MAX) - 1).bit_length() if capacity_bytes > UNITS_MAX else 1
        return max(usual, needed)

    # ---------------------------------------------------------------- sizes

    def slot_bytes(self, size_bytes: int) -> int:
        """Bytes of the slot of an object."""
        if self._is_large(size_bytes):
            return -(-size_bytes // self.unit_bytes) * self.unit_bytes
        return class_bytes(slot_class(size_bytes))

    def slots_bytes(self, sizes: NDArray[Any]) -> NDArray[np.int64]:
        """`slot_bytes` of each; any integer dtype (n) -> int64 (n)."""
        wide = np.ascontiguousarray(sizes, dtype=np.int64)
        exact = -(-wide // self.unit_bytes) * self.unit_bytes
        return np.where(wide > LARGE_UNITS * self.unit_bytes, exact, classes_bytes(slot_classes(wide)))

    def units_needed(self, size_bytes: int) -> int:
        """Units of a fresh span for an object of this size; more than `units` if it never fits.

        A run of `units_least` serves as well where there is no such run, at the price of more waste in it.
        """
        if self._is_large(size_bytes):
            return -(-size_bytes // self.unit_bytes)
        return int(self._table[kernels.SPAN_UNITS, slot_class(size_bytes)])

    def units_least(self, size_bytes: int) -> int:
        """Neighbouring free units with which one object of this size certainly gets a slot."""
        return -(-self.slot_bytes(size_bytes) // self.unit_bytes)

    def can_ever_fit(self, size_bytes: int) -> bool:
        """Whether an empty segment has a slot for this size."""
        return 1 <= size_bytes <= self.capacity_bytes

    # ---------------------------------------------------------------- taking and giving back

    def allocate(self, size_bytes: int, count: int) -> Offsets:
        """Offsets of at most `count` slots for objects of this size, ascending within a span; int64 (<= count).

        Fewer only if not one more can be had without freeing something. Free slots of the class come first, the lowest
        first, so that a run of blocks lies side by side where there is room.
        """
        out = np.empty(count, dtype=np.int64)
        if not self.can_ever_fit(size_bytes):
            return out[:0]
        number, unit = slot_class(size_bytes), self.unit_bytes
        if self._is_large(size_bytes) or self._table[kernels.SPAN_SLOTS, number] == 1:
            units, slot_bytes = self.units_needed(size_bytes), self.slot_bytes(size_bytes)
            return out[: kernels.take_singles(number, units, slot_bytes, unit, self._spans, self._counters, out)]
        filled = 0
        while True:
            arrays = (self._spans, self._partial, self._table, self._pool, self._counters)
            filled = kernels.take_slots(number, unit, *arrays, out, filled)
            if not self._counters[kernels.POOL_FULL]:
                return out[:filled]
            self._grow_pool()

    def free(self, offsets: NDArray[Any], sizes: NDArray[Any]) -> None:
        """Takes slots back, with the sizes they were allocated for; integers (n)."""
        offsets = np.ascontiguousarray(offsets, dtype=np.int64)
        wide = np.ascontiguousarray(sizes, dtype=np.int64)
        assert len(offsets) == len(wide)
        arrays = (self._spans, self._partial, self._table, self._pool, self._counters)
        freed = kernels.free_slots(offsets, wide, self.unit_bytes, *arrays)
        assert freed == len(offsets), f"no slot is taken at {offsets[freed]} with {wide[freed]} bytes"

    def restore(self, offsets: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.bool_]:
        """Takes the given slots in an empty allocator; bool (n): True for those accepted.

        Refused is whatever an allocator of this segment can't have handed out beside the others: out of range, at no
        place of its class, or overlapping with an accepted one, of which the lower counts.
        """
        assert self._counters[kernels.SPAN_COUNT] == 0, "restored into an allocator that is in use"
        # Numbers of a damaged index may be beyond int64: they become 0 bytes, which is refused.
        offsets, sizes = np.asarray(offsets), np.asarray(sizes)
        sane = (offsets < SIZE_BYTES_MAX) & (sizes < SIZE_BYTES_MAX)
        wide, order = np.where(sane, sizes, 0).astype(np.int64), np.argsort(offsets, kind="stable")
        starts = np.where(sane, offsets, 0).astype(np.int64)[order]
        accepted = np.zeros(len(starts), dtype=np.int64)
        done = 0
        while True:
            arrays = (self._spans, self._table, self._pool, self._counters)
            done = restoring.restore_slots(starts, wide[order], self.unit_bytes, *arrays, accepted, done)
            if not self._counters[kernels.POOL_FULL]:
                break
            self._grow_pool()
        restoring.finish_restore(self.unit_bytes, self._spans, self._partial, self._table, self._pool, self._counters)
        mask = np.zeros(len(starts), dtype=np.bool_)
        mask[order] = accepted.astype(np.bool_)
        return mask

    # ---------------------------------------------------------------- what is where

    @property
    def bytes_used(self) -> int:
        """Bytes of all slots that are taken."""
        return int(self._counters[kernels.BYTES_USED])

    @property
    def unit_free(self) -> NDArray[np.bool_]:
        """Which units belong to no span; bool (units)."""
        free: NDArray[np.bool_] = self._spans[kernels.FIRST] < 0
        return free

    def unit_of(self, offsets: NDArray[Any]) -> NDArray[np.int64]:
        """Unit in which each slot begins."""
        return np.asarray(offsets).astype(np.int64) // self.unit_bytes

    def units_of(self, offsets: NDArray[Any], sizes: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last unit that each slot covers; int64 (n) each."""
        wide = np.asarray(offsets).astype(np.int64)
        return wide // self.unit_bytes, (wide + self.slots_bytes(sizes) - 1) // self.unit_bytes

    def span_of(self, offsets: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last unit of the span of each taken slot: all of that is free once all its slots are freed."""
        first = self._spans[kernels.FIRST, self.unit_of(offsets)].astype(np.int64)
        assert (first >= 0).all(), "an offset in no span"
        return first, first + self._spans[kernels.UNITS, first] - 1

    def spans(self) -> SpanTable:
        """All spans, by address. A copy."""
        owners = self._spans[kernels.FIRST]
        first = np.flatnonzero(owners == np.arange(self.units, dtype=np.int32))
        rows = (kernels.UNITS, kernels.CLASS, kernels.SLOTS, kernels.USED)
        units, classes, slots, used = (self._spans[row, first] for row in rows)
        return SpanTable(first.astype(np.int32), units, classes, slots, used)

    def occupancy(self) -> Occupancy:
        used, waste = self.bytes_used, int(self._counters[kernels.WASTE])
        free = self.capacity_bytes - used - waste
        extent = int(kernels.longest_run(self._spans)) * self.unit_bytes
        fragmentation = 1 - extent / free if free else 0.0
        spans = int(self._counters[kernels.SPAN_COUNT])
        return Occupancy(self.capacity_bytes, used, free, extent, fragmentation, spans, waste)

    def check_invariants(self) -> None:
        table = self.spans()
        covered = used = waste = words = 0
        for row in range(len(table.first)):
            first, units, slots = int(table.first[row]), int(table.units[row]), int(table.slots[row])
            number, taken = int(table.slot_class[row]), int(table.used[row])
            assert (self._spans[kernels.FIRST, first : first + units] == first).all()
            assert first >= covered and 0 < taken <= slots
            covered = first + units
            large = number >= self._table.shape[1]
            size = units * self.unit_bytes if large else class_bytes(number)
            assert slots * size <= units * self.unit_bytes
            used += taken * size
            waste += units * self.unit_bytes - slots * size
            if large or self._table[kernels.SPAN_SLOTS, number] == 1:
                assert slots == taken == 1
                continue
            start, order = int(self._spans[kernels.BITS, first]), int(self._table[kernels.ORDER, number])
            bits = np.unpackbits(self._pool[start : start + (1 << order)].view(np.uint8), bitorder="little")
            assert bits[:slots].sum() == slots - taken and not bits[slots:].any()
            lowest = int(bits.argmax()) // 64 if taken < slots else slots
            assert int(self._spans[kernels.HINT, first]) <= lowest
            listed = int(self._partial[number, first // 64]) >> (first % 64) & 1
            assert listed == (taken < slots)
            assert not listed or int(self._table[kernels.LOW_WORD, number]) <= first // 64
            words += 1 << order
        assert (used, waste) == (self.bytes_used, self._counters[kernels.WASTE])
        assert len(table.first) == self._counters[kernels.SPAN_COUNT]
        assert int(np.unpackbits(self._partial.view(np.uint8)).sum()) == int((table.used < table.slots).sum())
        assert self.units - int(self.unit_free.sum()) == int(table.units.sum())
        assert not self.unit_free[: int(self._counters[kernels.LOW_UNIT])].any()
        assert words <= self._counters[kernels.POOL_TOP] <= len(self._pool)

    # ---------------------------------------------------------------- parts

    def _is_large(self, size_bytes: int) -> bool:
        return size_bytes > LARGE_UNITS * self.unit_bytes

    def _class_table(self) -> NDArray[np.int64]:
        classes = slot_class(LARGE_UNITS * self.unit_bytes) + 1
        table = np.zeros((kernels.TABLE_ROWS, classes), dtype=np.int64)
        for number in range(classes):
            slot_bytes = class_bytes(number)
            units, slots = _fresh_span(slot_bytes, self.unit_bytes, self.units)
            order = (-(-slots // 64) - 1).bit_length()
            table[:, number] = (slot_bytes, units, slots, order, 0)
        return table

    def _grow_pool(self) -> None:
        self._pool = np.concatenate([self._pool, np.zeros_like(self._pool)])
