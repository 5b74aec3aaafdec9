"""The slot allocator against a list of intervals: no two overlap, none is lost, None only where nothing fits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.slots import ALIGN, SlotAllocator

SLAB_PAGES, SLABS = 4, 6
#: Bytes: below a page, whole pages, with waste inside the slab, one slab, more than one.
SIZES = [1, ALIGN, ALIGN + 1, 3 * ALIGN, 4 * ALIGN, 5 * ALIGN, 9 * ALIGN, 24 * ALIGN, 25 * ALIGN]

steps = st.lists(st.tuples(st.booleans(), st.integers(0, 1 << 16)), max_size=120)


def slot_pages(size: int) -> int:
    return -(-size // ALIGN)


def slabs_of(offset: int, size: int) -> range:
    first = offset // ALIGN // SLAB_PAGES
    return range(first, (offset // ALIGN + slot_pages(size) - 1) // SLAB_PAGES + 1)


def fits(live: dict[int, int], size: int) -> bool:
    """Whether a slot can be had: in a slab that serves this size and has room, or in enough free neighbours."""
    need = slot_pages(size)
    users: list[list[int]] = [[] for _ in range(SLABS)]
    for offset, other in live.items():
        for slab in slabs_of(offset, other):
            users[slab].append(slot_pages(other))
    if need <= SLAB_PAGES and any(u and u[0] == need and len(u) < SLAB_PAGES // need for u in users):
        return True
    count = -(-need // SLAB_PAGES)
    return any(not any(users[i : i + count]) for i in range(SLABS - count + 1))


@settings(max_examples=300, deadline=None)
@given(steps)
def test_agrees_with_a_list_of_intervals(steps: list[tuple[bool, int]]) -> None:
    slots = SlotAllocator(SLABS * SLAB_PAGES * ALIGN, SLAB_PAGES * ALIGN)
    live: dict[int, int] = {}
    for allocate, number in steps:
        if allocate or not live:
            size = SIZES[number % len(SIZES)]
            possible = fits(live, size)
            offset = slots.allocate(size)
            assert (offset is not None) == possible
            if offset is not None:
                assert offset % ALIGN == 0 and 0 <= offset <= slots.capacity_bytes - size
                assert all(offset + size <= o or o + s <= offset for o, s in live.items()), "overlap"
                mates = {slot_pages(s) for o, s in live.items() if {*slabs_of(o, s)} & {*slabs_of(offset, size)}}
                assert mates <= {slot_pages(size)}, "a slab serves one size"
                live[offset] = size
        else:
            offset = list(live)[number % len(live)]
            slots.free(offset, live.pop(offset))
        slots.check_invariants()
        occupancy = slots.occupancy()
        taken = {slab for o, s in live.items() for slab in slabs_of(o, s)}
        runs = "".join("x" if i in taken else "." for i in range(SLABS)).split("x")
        unit = SLAB_PAGES * ALIGN
        assert occupancy.bytes_used == sum(slot_pages(s) * ALIGN for s in live.values())
        assert occupancy.bytes_free_slabs == (SLABS - len(taken)) * unit
        assert occupancy.bytes_largest_extent == max(map(len, runs)) * unit
    for offset, size in live.items():
        slots.free(offset, size)
    assert slots.occupancy().bytes_largest_extent == slots.occupancy().bytes_total, "empty slabs return"


def test_a_run_of_blocks_lies_side_by_side() -> None:
    """Readers join neighbours into one copy."""
    slots = SlotAllocator(64 * ALIGN, 16 * ALIGN)
    assert [slots.allocate(2 * ALIGN) for _ in range(8)] == [2 * ALIGN * i for i in range(8)]


def test_what_never_fits_is_known() -> None:
    slots = SlotAllocator(SLABS * SLAB_PAGES * ALIGN, SLAB_PAGES * ALIGN)
    assert slots.can_ever_fit(24 * ALIGN) and not slots.can_ever_fit(24 * ALIGN + 1)


def test_a_segment_smaller_than_a_slab_is_one_slab() -> None:
    slots = SlotAllocator(3 * ALIGN + 100, 64 * ALIGN)
    assert slots.capacity_bytes == 3 * ALIGN
    assert [slots.allocate(ALIGN) for _ in range(4)] == [0, ALIGN, 2 * ALIGN, None]
