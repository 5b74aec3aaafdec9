"""Blocks in their slots: allocation with eviction, section by section completion, removal, and the list of changes."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors, EntryState
from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.eviction import LruLists
from kvpool.core.holds import Holds
from kvpool.core.ids import Fidelity, KeyArray
from kvpool.core.index import NO_ENTRY, BlockIndex, Entries
from kvpool.core.reservations import QuarantinedSlot
from kvpool.core.results import ReserveStatus
from kvpool.core.slots import SlotAllocator


class BlockStore:
    """Where blocks lie and in which order they would go. Knows holds only as counts."""

    def __init__(self, index: BlockIndex, holds: Holds, capacity_bytes: int, slab_bytes: int) -> None:
        self.index, self.arrays, self._holds = index, index.arrays, holds
        self.slots = SlotAllocator(capacity_bytes, slab_bytes)
        self.lru = LruLists(self.arrays.entries)
        self.evictions = 0
        self._masks = np.zeros(self.arrays.entries, dtype=np.uint32)  # sections committed
        self._namespaces = np.zeros(self.arrays.entries, dtype=np.uint16)
        self._changes: list[tuple[ChangeKind, int, bytes]] = []

    # ---------------------------------------------------------------- space

    def allocate(self, keys: KeyArray, size: int) -> Entries:
        """Entries with slots for as many leading keys as there is room for, after evicting just what that needs."""
        slot_bytes = self.slots.slot_bytes(size)
        if not len(keys) or not self.slots.can_ever_fit(size) or not self.lru.open_class(slot_bytes):
            return np.empty(0, dtype=np.int32)
        offsets: list[int] = []
        for missing in range(len(keys), 0, -1):
            offset = self.slots.allocate(size)
            if offset is None and self._make_room(slot_bytes, missing):
                offset = self.slots.allocate(size)
            if offset is None:
                break
            # Making room may have given entries back; evict for an entry only once there is a slot for it.
            if self.index.free_count == len(offsets) and not self._evict_one_entry():
                self.slots.free(offset, size)
                break
            offsets.append(offset)
        entries = self.index.insert(keys[: len(offsets)])
        self.arrays.offsets[entries] = offsets
        self.arrays.sizes[entries] = size
        self._masks[entries] = 0
        self.lru.count(slot_bytes, len(entries))
        return entries

    def evict_to(self, bytes_used: int) -> None:
        """Evicts the oldest blocks until at most `bytes_used` are in slots, or nothing more can go."""
        while self.slots.bytes_used > bytes_used:
            slot_bytes = self.lru.oldest_class()
            if slot_bytes is None:
                return
            excess = -(-(self.slots.bytes_used - bytes_used) // slot_bytes)
            # A few at a time: another size may be the older one by then.
            self._evict(self.lru.oldest(slot_bytes, min(excess, 64)))

    def free_slots(self, slots: list[QuarantinedSlot]) -> None:
        for slot in slots:
            self.slots.free(slot.offset, slot.size)

    # ---------------------------------------------------------------- writing

    def sections_of(self, entry: int) -> list[int]:
        mask = int(self._masks[entry])
        return [s for s in range(self.arrays.sections) if mask >> s & 1]

    def commit_sections(self, entries: Entries, sections: NDArray[np.uint32], digests: NDArray[np.uint64]) -> None:
        """Notes digests of sections of blocks that are being written."""
        assert (self.arrays.states[entries] == EntryState.WRITING).all()
        self.arrays.digests[entries, sections] = digests
        np.bitwise_or.at(self._masks, entries, np.uint32(1) << sections)

    def publish(self, entries: Entries) -> None:
        """Makes blocks readable; those that nobody holds may be evicted from now on."""
        self.index.publish(entries)
        self._note(ChangeKind.STORED, entries)
        self._list(entries[~self._holds.held(entries)])

    def discard(self, entries: Entries) -> list[QuarantinedSlot]:
        """Drops blocks that were never completed; their slots are the caller's to free."""
        slots = self._slots(entries)
        self.index.unlink(entries)
        self._free_entries(entries)
        return slots

    # ---------------------------------------------------------------- holding and removal

    def guard(self, entries: Entries) -> None:
        """Keeps unheld blocks out of eviction's sight for the length of one call."""
        self.lru.unlink(entries)

    def unguard(self, entries: Entries) -> None:
        fresh = entries[~self._holds.held(entries)]
        self._list(np.fromiter(dict.fromkeys(fresh.tolist()), dtype=np.int32))

    def hold(self, entries: Entries) -> None:
        """Blocks are about to be held."""
        self.lru.unlink(entries)

    def unhold(self, entries: Entries) -> None:
        """Nobody holds these any more, in prompt order: readable ones are listed, removed ones are freed."""
        doomed = self.arrays.states[entries] == EntryState.DOOMED
        self._release(entries[doomed])
        self._list(entries[~doomed])

    def drop(self, entries: Entries) -> None:
        """Removes readable blocks; those under a hold keep their slots until it ends."""
        self._note(ChangeKind.REMOVED, entries)
        self.lru.unlink(entries)
        self.index.unlink(entries)
        self._release(entries[~self._holds.held(entries)])

    # ---------------------------------------------------------------- namespaces, changes

    def set_namespace(self, entries: Entries, number: int) -> None:
        self._namespaces[entries] = number

    def namespace_of(self, entry: int) -> int:
        return int(self._namespaces[entry])

    def in_namespace(self, entries: Entries, number: int) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = self._namespaces[entries] == number
        return inside

    def readable(self, number: int, keys: KeyArray) -> tuple[Entries, NDArray[np.bool_]]:
        """Entries of keys, and which of them are readable blocks of namespace `number`."""
        entries = self.index.lookup(keys)
        found = entries != NO_ENTRY
        known = entries[found]
        found[found] = (self.arrays.states[known] == EntryState.READABLE) & self.in_namespace(known, number)
        return entries, found

    def status(self, number: int, keys: KeyArray) -> tuple[NDArray[np.uint8], Entries]:
        """What a reserve finds: EXISTS, BEING_WRITTEN, NO_SPACE (the key is another namespace's) or 0; and entries."""
        entries = self.index.lookup(keys)
        status = np.zeros(len(keys), dtype=np.uint8)
        known = np.flatnonzero(entries != NO_ENTRY)
        readable = self.arrays.states[entries[known]] == EntryState.READABLE
        status[known] = np.where(readable, ReserveStatus.EXISTS, ReserveStatus.BEING_WRITTEN)
        status[known[~self.in_namespace(entries[known], number)]] = ReserveStatus.NO_SPACE
        return status, entries

    def describe(self, keys: KeyArray, entries: Entries, valid: NDArray[np.bool_], sections: int) -> Descriptors:
        """A row a key; rows that are not valid are zero."""
        rows = self.index.describe(np.where(valid, entries, 0), sections)
        for column in (rows.offsets, rows.sizes, rows.generations, rows.digests):
            column[~valid] = 0
        return Descriptors(keys, rows.offsets, rows.sizes, rows.generations, rows.digests)

    def readable_of(self, number: int) -> Entries:
        chosen = (self.arrays.states == EntryState.READABLE) & (self._namespaces == number)
        return np.flatnonzero(chosen).astype(np.int32)

    def take_changes(self) -> list[BlockChange]:
        """Neighbours of one kind and fidelity come as one change."""
        merged: list[tuple[ChangeKind, int, list[bytes]]] = []
        for kind, fidelity, keys in self._changes:
            if merged and merged[-1][:2] == (kind, fidelity):
                merged[-1][2].append(keys)
            else:
                merged.append((kind, fidelity, [keys]))
        self._changes = []
        return [BlockChange(kind, b"".join(keys), Fidelity(fidelity)) for kind, fidelity, keys in merged]

    def check_invariants(self, quarantined: list[QuarantinedSlot]) -> None:
        self.slots.check_invariants()
        self.lru.check_invariants()
        used = np.flatnonzero(self.arrays.states != EntryState.FREE).astype(np.int32)
        held = self._holds.held(used)
        states = self.arrays.states[used]
        listed = np.fromiter((self.lru.listed(e) for e in used.tolist()), dtype=bool, count=len(used))
        assert (listed == ((states == EntryState.READABLE) & ~held)).all()
        assert held[states == EntryState.DOOMED].all()
        assert not held[states == EntryState.WRITING].any()
        extents = [(int(self.arrays.offsets[e]), int(self.arrays.sizes[e])) for e in used.tolist()]
        extents = sorted(extents + [(slot.offset, slot.size) for slot in quarantined])
        for (offset, size), (after, _) in itertools.pairwise(extents):
            assert offset + size <= after, "two blocks in one place"
        assert sum(self.slots.slot_bytes(size) for _, size in extents) == self.slots.bytes_used

    # ---------------------------------------------------------------- parts

    def _make_room(self, slot_bytes: int, count: int) -> bool:
        """Evicts for at most `count` slots of this size; False if not one can be had now."""
        victims = self.lru.oldest(slot_bytes, count)
        if len(victims) and slot_bytes <= self.slots.slab_bytes:
            self._evict(victims)
            return True
        return self._empty_slabs(-(-slot_bytes // self.slots.slab_bytes))

    def _empty_slabs(self, count: int) -> bool:
        """Empties `count` neighbouring slabs of which each block may go: of such places the one with fewest blocks."""
        slab_count = self.slots.capacity_bytes // self.slots.slab_bytes
        used = np.flatnonzero(self.arrays.states != EntryState.FREE).astype(np.int32)
        first = self.arrays.offsets[used] // np.uint64(self.slots.slab_bytes)
        last = (self.arrays.offsets[used] + self.arrays.sizes[used] - np.uint64(1)) // np.uint64(self.slots.slab_bytes)
        free = np.fromiter((self.lru.listed(e) for e in used.tolist()), dtype=bool, count=len(used))
        best: tuple[int, int] | None = None
        for start in range(slab_count - count + 1):
            inside = (last >= start) & (first < start + count)
            usable = free[inside].all() and self.slots.bytes_touching(start, count) == self._bytes(used[inside])
            if usable:
                candidate = (int(inside.sum()), start)
                best = candidate if best is None else min(best, candidate)
        if best is None:
            return False
        inside = (last >= best[1]) & (first < best[1] + count)
        self._evict(used[inside])
        return True

    def _bytes(self, entries: Entries) -> int:
        sizes = self.arrays.sizes[entries].astype(np.int64)
        return sum(self.slots.slot_bytes(size) for size in sizes.tolist())

    def _evict_one_entry(self) -> bool:
        slot_bytes = self.lru.oldest_class()
        if slot_bytes is None:
            return False
        self._evict(self.lru.oldest(slot_bytes, 1))
        return True

    def _evict(self, entries: Entries) -> None:
        self.evictions += len(entries)
        self.drop(entries)

    def _release(self, entries: Entries) -> None:
        for slot in self._slots(entries):
            self.slots.free(slot.offset, slot.size)
        self._free_entries(entries)

    def _free_entries(self, entries: Entries) -> None:
        sizes = self.arrays.sizes[entries].tolist()
        self.index.free(entries)
        for size in sizes:
            self.lru.count(self.slots.slot_bytes(size), -1)

    def _slots(self, entries: Entries) -> list[QuarantinedSlot]:
        a = self.arrays
        return [
            QuarantinedSlot(int(a.offsets[e]), int(a.sizes[e]), int(a.generations[e]), a.keys[e].tobytes())
            for e in entries.tolist()
        ]

    def _list(self, entries: Entries) -> None:
        """Lists a run in prompt order as just used, by size."""
        if len(entries) == 0:
            return
        sizes = self.arrays.sizes[entries]
        for size in dict.fromkeys(sizes.tolist()):
            self.lru.append(entries[sizes == size], self.slots.slot_bytes(size))

    def _note(self, kind: ChangeKind, entries: Entries) -> None:
        fidelities = self.arrays.fidelities[entries]
        for fidelity in dict.fromkeys(fidelities.tolist()):
            self._changes.append((kind, fidelity, self.arrays.keys[entries[fidelities == fidelity]].tobytes()))
