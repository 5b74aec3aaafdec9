"""The slot allocator against a list of intervals: none overlap, none is lost, None only where nothing fits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.spans import (
    CLASSES,
    LARGE_UNITS,
    SLOT_BYTES_MIN,
    UNITS_MAX,
    SlotAllocator,
    class_bytes,
    classes_bytes,
    slot_class,
    slot_classes,
)  # fmt: skip

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNIT, UNITS = 4096, 40
#: Below a class step, exact classes, spans of several units, one slot a span, large ones, all of it, too much.
SIZES = [1, 64, 100, 1000, 1100, 2048, 4096, 4352, 5000, 6144, 9000, 17 * 4096 // 4, 65536, 70000, 40 * 4096, 200000]


def array(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


class Plain:
    """The oracle: live slots by offset, and by first unit the spans, of which it knows class and units."""

    def __init__(self, slots: SlotAllocator) -> None:
        self.slots = slots
        self.live: dict[int, int] = {}

    def add(self, offset: int, size: int) -> None:
        need = self.slots.slot_bytes(size)
        assert need >= size and offset >= 0 and offset + need <= self.slots.capacity_bytes
        for other, taken in self.live.items():
            assert offset + need <= other or other + self.slots.slot_bytes(taken) <= offset, "overlap"
        self.live[offset] = size

    def check(self) -> None:
        self.slots.check_invariants()
        spans = self.slots.spans()
        owner = {
            unit: row
            for row in range(len(spans.first))
            for unit in range(int(spans.first[row]), int(spans.first[row] + spans.units[row]))
        }
        used = dict.fromkeys(range(len(spans.first)), 0)
        for offset, size in self.live.items():
            row = owner[offset // self.slots.unit_bytes]
            used[row] += 1
            assert slot_class(size) == spans.slot_class[row], "a span serves one class"
            inside = offset - int(spans.first[row]) * self.slots.unit_bytes
            assert inside % self.slots.slot_bytes(size) == 0
        assert list(used.values()) == spans.used.tolist() and 0 not in used.values(), "a span without a slot is kept"
        free = [unit not in owner for unit in range(self.slots.units)]
        assert self.slots.unit_free.tolist() == free
        runs = [len(list(group)) for is_free, group in itertools.groupby(free) if is_free]
        seen = self.slots.occupancy()
        assert seen.bytes_used == self.slots.bytes_used == sum(map(self.slots.slot_bytes, self.live.values()))
        assert seen.bytes_largest_extent == max(runs, default=0) * self.slots.unit_bytes
        assert seen.bytes_total == seen.bytes_used + seen.bytes_free + seen.bytes_span_waste
        assert seen.spans == len(used) and 0 <= seen.fragmentation <= 1

    def fits(self, size: int) -> bool:
        """Whether one more can be had: a free slot of its class, or enough free neighbours."""
        spans = self.slots.spans()
        if ((spans.slot_class == slot_class(size)) & (spans.used < spans.slots)).any():
            return True
        need = -(-self.slots.slot_bytes(size) // self.slots.unit_bytes)
        return "." * need in "".join(".x"[not free] for free in self.slots.unit_free.tolist())


steps = st.lists(
    st.tuples(st.sampled_from(["take", "take", "give", "clear"]), st.integers(0, 1 << 16), st.integers(1, 90)),
    max_size=40,
)


@settings(max_examples=250, deadline=None)
@given(steps)
def test_agrees_with_a_list_of_intervals(steps: list[tuple[str, int, int]]) -> None:
    plain = Plain(slots := SlotAllocator(UNITS * UNIT, UNIT))
    for verb, number, count in steps:
        if verb == "take":
            size = SIZES[number % len(SIZES)]
            lowest_free = plain.fits(size)
            got = slots.allocate(size, count).tolist()
            assert bool(got) == lowest_free and len(got) <= count
            for offset in got:
                plain.add(offset, size)
            assert len(got) == count or not plain.fits(size), "stopped although there is room"
        else:
            offsets = list(plain.live)
            chosen = offsets if verb == "clear" else offsets[number % 7 :: 1 + number % 5][:count]
            slots.free(array(chosen), array([plain.live.pop(offset) for offset in chosen]).astype(np.uint64))
        plain.check()
    slots.free(array(list(plain.live)), array(list(plain.live.values())))
    seen = slots.occupancy()
    assert seen.bytes_largest_extent == seen.bytes_free == seen.bytes_total and seen.spans == 0, "all returns"


@settings(max_examples=150, deadline=None)
@given(steps, st.randoms(use_true_random=False))
def test_an_allocator_is_rebuilt_from_its_live_slots(steps: list[tuple[str, int, int]], random: object) -> None:
    """All slots are taken again, whatever was freed in between, and the two allocators go on as sound ones."""
    plain = Plain(slots := SlotAllocator(UNITS * UNIT, UNIT))
    for verb, number, count in steps:
        if verb == "take":
            size = SIZES[number % len(SIZES)]
            for offset in slots.allocate(size, count).tolist():
                plain.live[offset] = size
        else:
            chosen = list(plain.live)[number % 7 :: 1 + number % 5][:count]
            slots.free(array(chosen), array([plain.live.pop(offset) for offset in chosen]))
    order = list(plain.live)
    random.shuffle(order)  # type: ignore[attr-defined]
    again = Plain(SlotAllocator(UNITS * UNIT, UNIT))
    sizes = array([plain.live[offset] for offset in order]).astype(np.uint64)
    assert again.slots.restore(array(order).astype(np.uint64), sizes).all()
    again.live = dict(plain.live)
    again.check()
    for size in SIZES:
        for offset in again.slots.allocate(size, 3).tolist():
            again.add(offset, size)
    again.check()
    again.slots.free(array(list(again.live)), array(list(again.live.values())))
    assert again.slots.occupancy().bytes_largest_extent == again.slots.capacity_bytes


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, UNITS * UNIT // 64).map(lambda n: n * 64), st.integers(0, 2**64 - 1)),
            st.one_of(st.sampled_from([0, *SIZES]), st.integers(0, 2**64 - 1)),
        ),
        max_size=60,
    )
)
def test_what_no_allocator_can_have_handed_out_is_refused(rows: list[tuple[int, int]]) -> None:
    plain = Plain(slots := SlotAllocator(UNITS * UNIT, UNIT))
    offsets = np.array([offset for offset, _ in rows], dtype=np.uint64)
    mask = slots.restore(offsets, np.array([size for _, size in rows], dtype=np.uint64))
    for (offset, size), accepted in zip(rows, mask.tolist(), strict=True):
        if accepted:
            plain.add(offset, size)
    plain.check()


def test_refused_are_overlaps_places_off_the_class_and_places_outside() -> None:
    slots = SlotAllocator(UNITS * UNIT, UNIT)
    rows = [
        (0, 2048, True), (2048, 2048, True), (2048, 1024, False), (3072, 64, False), (4096 + 64, 2048, False),
        (8192, 80000, True), (12288, 4096, False), (UNITS * UNIT - 4096, 4097, False), (UNITS * UNIT, 64, False),
        (120 * KIB, 0, False), (124 * KIB, 64, True), (124 * KIB, 64, False),
    ]  # fmt: skip
    assert slots.restore(array([r[0] for r in rows]), array([r[1] for r in rows])).tolist() == [r[2] for r in rows]
    slots.check_invariants()


def test_a_free_that_is_none_is_our_bug() -> None:
    slots = SlotAllocator(MIB)
    (offset,) = slots.allocate(1000, 1).tolist()
    for wrong, size in ((offset + 64, 1000), (offset, 2000), (offset + 1024, 1000), (64 * KIB, 1000), (-64, 1000)):
        with pytest.raises(AssertionError):
            slots.free(array([wrong]), array([size]))
    with pytest.raises(AssertionError):
        slots.free(array([offset, offset]), array([1000, 1000]))


def test_classes_are_geometric_and_lose_little() -> None:
    sizes = [*range(1, 5000), *(m << k for m in range(16, 33) for k in range(2, 40))]
    sizes += [(1 << k) + d for k in range(7, 60) for d in (-1, 0, 1) if k < 60 or d < 1]
    classes = [slot_class(size) for size in sizes]
    for size, number in zip(sizes, classes, strict=True):
        slot = class_bytes(number)
        assert slot >= size and (number == 0 or class_bytes(number - 1) < size), "the smallest class that holds it"
        assert slot - size < SLOT_BYTES_MIN or (slot - size) * 16 <= slot
        assert slot % (4096 if size > 64 * KIB else 64) == 0
    exact = [m << k for m in range(16, 33) for k in range(6, 40)]
    assert all(class_bytes(slot_class(size)) == size for size in exact), "typical sizes of KV blocks"
    assert slot_classes(np.array(sizes, dtype=np.uint64)).tolist() == classes and max(classes) < CLASSES
    everything = np.arange(CLASSES, dtype=np.int32)
    assert classes_bytes(everything).tolist() == [class_bytes(number) for number in range(CLASSES)]


@pytest.mark.parametrize("capacity", [4096, 9000, 64 * KIB, MIB - 1, MIB, 100 * MIB + 5, 4 * GIB, 4 * GIB + 1, 1 << 40])
def test_units_follow_from_the_capacity(capacity: int) -> None:
    unit = SlotAllocator.unit_for(capacity)
    slots = SlotAllocator(capacity)
    assert slots.unit_bytes == unit and slots.units <= UNITS_MAX and capacity - slots.capacity_bytes < unit
    assert unit & (unit - 1) == 0 and (unit >= 64 * KIB or capacity < MIB)
    assert slots.can_ever_fit(slots.capacity_bytes) and not slots.can_ever_fit(slots.capacity_bytes + 1)
    assert slots.allocate(slots.capacity_bytes, 2).tolist() == [0], "one object may take all of it"


def test_each_fresh_span_loses_a_sixteenth_at_most() -> None:
    slots = SlotAllocator(64 * MIB)
    for number in range(slot_class(LARGE_UNITS * slots.unit_bytes) + 1):
        size = class_bytes(number)
        units = slots.units_needed(size)
        total = units * slots.unit_bytes
        assert total % size * 16 <= total and units <= 16 and slots.units_least(size) <= units
    for size in range(LARGE_UNITS * slots.unit_bytes + 1, 4 * MIB, 10007):
        assert (slots.slot_bytes(size) - size) * 16 < size
        assert slots.units_needed(size) == slots.units_least(size) == -(-size // slots.unit_bytes)


@pytest.mark.parametrize("seed", range(4))
def test_allocation_alone_leaves_one_open_span_a_class(seed: int) -> None:
    """The bound of what is lost without frees: 1/16 in slots and spans each, and the free slots of one span a class."""
    random = np.random.default_rng(seed)
    slots = SlotAllocator(64 * MIB)
    asked = 0
    while True:
        size = int(2 ** random.uniform(0, 19))
        if not len(slots.allocate(size, 1)):
            break
        asked += size
    spans = slots.spans()
    open_classes = spans.slot_class[spans.used < spans.slots].tolist()
    seen = slots.occupancy()
    assert len(open_classes) == len(set(open_classes)), f"seed {seed}"
    assert seen.bytes_span_waste * 16 <= seen.bytes_total + 16 * slots.unit_bytes, f"seed {seed}"
    assert asked >= 0.84 * seen.bytes_used, f"seed {seed}"


def test_a_heap_in_pieces_still_serves_what_fits() -> None:
    slots = SlotAllocator(UNITS * UNIT, UNIT)
    size = 4352  # 17/16 of a unit: fresh spans have 9 units
    assert slots.units_needed(size) == 9 and slots.units_least(size) == 2
    whole = slots.allocate(UNIT, UNITS)
    keep = np.arange(UNITS) % 4 == 3  # runs of three free units
    slots.free(whole[~keep], np.full(int((~keep).sum()), UNIT))
    got = slots.allocate(size, 100)
    assert got.tolist() == [16384 * run + slot * size for run in range(10) for slot in range(2)]
    slots.check_invariants()
    again = SlotAllocator(UNITS * UNIT, UNIT)
    live = np.concatenate([whole[keep], got])
    assert again.restore(live, np.array([UNIT] * 10 + [size] * 20)).all()
    again.check_invariants()


def test_a_run_of_blocks_lies_side_by_side() -> None:
    """Readers join neighbours into one copy; holes are filled from the lowest on."""
    slots = SlotAllocator(64 * MIB)
    for size in (2 * MIB, 72 * KIB, 9216, 64):
        offsets = slots.allocate(size, 9)
        step = slots.slot_bytes(size)
        assert (np.diff(offsets) == step).sum() >= 7, size
        slots.free(offsets[[6, 2, 4]], np.full(3, size))
        assert slots.allocate(size, 4).tolist()[:3] == offsets[[2, 4, 6]].tolist()
    slots.check_invariants()


def test_units_and_spans_of_slots() -> None:
    slots = SlotAllocator(UNITS * UNIT, UNIT)
    size = 4352
    offsets = slots.allocate(size, 8)
    assert slots.unit_of(offsets).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    first, last = slots.units_of(offsets, np.full(8, size, dtype=np.uint64))
    assert first.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and last.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    first, last = slots.span_of(offsets)
    assert set(first.tolist()) == {0} and set(last.tolist()) == {8}
    assert slots.spans().used.tolist() == [8] and slots.unit_free.sum() == UNITS - 9


def test_a_million_slots_cost_less_than_sixteen_bytes_each() -> None:
    slots = SlotAllocator(4 * GIB)
    assert len(slots.allocate(4096, 1 << 20)) == 1 << 20
    owned = [value.nbytes for value in vars(slots).values() if isinstance(value, np.ndarray)]
    assert sum(owned) <= 16 << 20
    slots.check_invariants()
