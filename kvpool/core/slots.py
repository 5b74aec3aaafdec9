"""Places in a segment. The segment is cut in slabs; a slab serves slots of one size, and returns when it is empty.

Fragmentation is bounded: a slot wastes less than ALIGN bytes, a size class at most one slab that is not full plus what
its freed slots leave; slabs of objects larger than a slab lie side by side.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Final

#: Slots begin on page boundaries: O_DIRECT, device registration and fast copies all want that.
ALIGN: Final = 4096


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Bytes of a segment: all, in slots, in slabs without a slot, and the longest run of such slabs."""

    bytes_total: int
    bytes_used: int
    bytes_free_slabs: int
    bytes_largest_extent: int


@dataclass(slots=True)
class _Slab:
    slot_bytes: int
    free: list[int] = field(default_factory=list)  # slot numbers, the lowest last
    used: int = 0


class SlotAllocator:
    """Hands out offsets. Knows sizes, not contents."""

    def __init__(self, capacity_bytes: int, slab_bytes: int) -> None:
        assert slab_bytes % ALIGN == 0 and slab_bytes > 0
        # A segment smaller than a slab is one slab.
        self.slab_bytes = min(slab_bytes, capacity_bytes // ALIGN * ALIGN)
        assert self.slab_bytes > 0, "a segment has at least one page"
        self.capacity_bytes = capacity_bytes // self.slab_bytes * self.slab_bytes
        self._slabs: list[_Slab | None] = [None] * (self.capacity_bytes // self.slab_bytes)
        self._partial: dict[int, list[int]] = {}  # slot bytes -> slabs with a free slot, ascending
        self._large: dict[int, int] = {}  # first slab -> number of slabs
        self.bytes_used = 0

    @staticmethod
    def slot_bytes(size: int) -> int:
        """Bytes that an object of `size` bytes occupies."""
        return -(-size // ALIGN) * ALIGN

    def allocate(self, size: int) -> int | None:
        """Offset of a slot for `size` bytes, or None."""
        need = self.slot_bytes(size)
        if need > self.slab_bytes:
            return self._allocate_large(need)
        partial = self._partial.setdefault(need, [])
        if not partial:
            index = next((i for i, slab in enumerate(self._slabs) if slab is None), None)
            if index is None:
                return None
            self._slabs[index] = _Slab(need, list(range(self.slab_bytes // need))[::-1])
            partial.append(index)
        index = partial[0]
        slab = self._slabs[index]
        assert slab is not None
        slot = slab.free.pop()
        slab.used += 1
        if not slab.free:
            partial.pop(0)
        self.bytes_used += need
        return index * self.slab_bytes + slot * need

    def free(self, offset: int, size: int) -> None:
        """Takes a slot back."""
        need = self.slot_bytes(size)
        index, within = divmod(offset, self.slab_bytes)
        self.bytes_used -= need
        if need > self.slab_bytes:
            count = self._large.pop(index)
            self._slabs[index : index + count] = [None] * count
            return
        slab = self._slabs[index]
        assert slab is not None and slab.slot_bytes == need, "freed with another size"
        partial = self._partial[need]
        if not slab.free:
            insort(partial, index)
        slab.free.append(within // need)
        slab.used -= 1
        if slab.used == 0:
            partial.remove(index)
            self._slabs[index] = None

    def can_ever_fit(self, size: int) -> bool:
        return self.slot_bytes(size) <= self.capacity_bytes

    def bytes_touching(self, first: int, count: int) -> int:
        """Bytes of all slots that lie in these slabs, those that reach beyond them included whole."""
        used = 0
        for slab in self._slabs[first : first + count]:
            if slab is not None and slab.slot_bytes <= self.slab_bytes:
                used += slab.used * slab.slot_bytes
        for begin, slabs in self._large.items():
            large = self._slabs[begin]
            if begin < first + count and begin + slabs > first and large is not None:
                used += large.slot_bytes
        return used

    def occupancy(self) -> Occupancy:
        free = longest = run = 0
        for slab in self._slabs:
            run = run + 1 if slab is None else 0
            free += slab is None
            longest = max(longest, run)
        unit = self.slab_bytes
        return Occupancy(self.capacity_bytes, self.bytes_used, free * unit, longest * unit)

    def check_invariants(self) -> None:
        used = 0
        inside_large = {i for first, count in self._large.items() for i in range(first, first + count)}
        for index, slab in enumerate(self._slabs):
            if slab is None or index in inside_large:
                continue
            assert slab.used + len(slab.free) == self.slab_bytes // slab.slot_bytes
            assert len(set(slab.free)) == len(slab.free) and slab.used > 0
            assert (index in self._partial[slab.slot_bytes]) == bool(slab.free)
            used += slab.used * slab.slot_bytes
        for first in self._large:
            slab = self._slabs[first]
            assert slab is not None
            used += slab.slot_bytes
        assert used == self.bytes_used

    def _allocate_large(self, need: int) -> int | None:
        count = -(-need // self.slab_bytes)
        run = 0
        for index, slab in enumerate(self._slabs):
            run = run + 1 if slab is None else 0
            if run == count:
                first = index - count + 1
                for i in range(first, index + 1):
                    self._slabs[i] = _Slab(need, used=1)
                self._large[first] = count
                self.bytes_used += need
                return first * self.slab_bytes
        return None
