"""Blocks in their slots: allocation with eviction, section by section completion, removal, and the list of changes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import TOUCHES_MAX, Descriptors, EntryState
from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.evictors import EVICTORS
from kvpool.core.holds import Holds
from kvpool.core.ids import Fidelity, KeyArray
from kvpool.core.index import NO_ENTRY, BlockIndex, Entries, NewEntries
from kvpool.core.names import Names
from kvpool.core.results import ReserveStatus
from kvpool.core.room import Room
from kvpool.core.spans import CLASSES, LARGE_UNITS, SlotAllocator, slot_classes
from kvpool.core.usage import Usage

#: Blocks that are evicted before it is looked again which class has the coldest one.
_EVICTED_TOGETHER_MAX = 64


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What a reservation wants to store, beside its keys.

    sizes uint64 (n), payload bytes; names: one a key, or None for blocks.
    """

    namespace: int
    tenant: int
    fidelity: Fidelity
    section_count: int
    sizes: NDArray[np.uint64]
    names: list[bytes] | None

    @property
    def footprints(self) -> NDArray[np.int64]:
        """Bytes in a slot, names included; int64 (n)."""
        sizes = self.sizes.astype(np.int64)
        if self.names is None:
            return sizes
        return sizes + np.fromiter((len(name) for name in self.names), dtype=np.int64, count=len(self.names))


class BlockStore:
    """Where blocks lie and in which order they would go. Knows holds only as counts."""

    def __init__(
        self, index: BlockIndex, holds: Holds, slots: SlotAllocator, names: Names, usage: Usage, eviction: str
    ) -> None:
        self.index, self.arrays, self.slots, self.usage, self._names = index, index.arrays, slots, usage, names
        self._holds = holds
        self.evictor = EVICTORS[eviction](self.arrays.entries, CLASSES)
        self._room = Room(self.arrays, slots, self.evictor)
        self.evictions = 0
        self.evictions_unsaved = 0  # of them without a copy in a lower tier
        self.touches = 0
        self.freshness = 0  # changes when a block may have become free to go; see `coldest`
        self.on_lower = np.zeros(self.arrays.entries, dtype=np.bool_)
        self.not_on_lower = 0  # readable blocks
        self._masks = np.zeros(self.arrays.entries, dtype=np.uint8)  # sections committed
        self._changes: list[tuple[ChangeKind, int, bytes]] = []

    # ---------------------------------------------------------------- space

    def allocate(self, keys: KeyArray, rows: NDArray[np.int64], demand: Demand) -> tuple[NDArray[np.int64], Entries]:
        """Entries with slots for as many of `rows` as there is room for, after evicting just what that needs.

        Of equal sizes the leading ones get it. What is stored under such a key already is dropped.

        Returns: those of `rows` that have a slot now, ascending, and their entries.
        """
        footprints = demand.footprints[rows]
        offsets = np.full(len(rows), -1, dtype=np.int64)
        # One call of the allocator for all sizes that can take each other's slots.
        large = footprints > LARGE_UNITS * self.slots.unit_bytes
        kinds = np.where(large, footprints, -slot_classes(footprints).astype(np.int64))
        for kind in dict.fromkeys(kinds.tolist()):
            alike = np.flatnonzero(kinds == kind)
            mine = self._allocate_alike(int(footprints[alike[0]]), len(alike))
            offsets[alike[: len(mine)]] = mine
        self._keep_as_many_as_entries(offsets, footprints)
        got = offsets >= 0
        rows, offsets = rows[got], offsets[got]
        replaced = self.index.lookup(keys[rows])
        self.drop(replaced[replaced != NO_ENTRY])
        names = None if demand.names is None else [demand.names[row] for row in rows.tolist()]
        name_bytes = np.zeros(len(rows), dtype=np.uint16)
        if names is not None:
            name_bytes[:] = [len(name) for name in names]
        entries = self.index.insert(
            NewEntries(
                keys[rows], offsets, demand.sizes[rows], name_bytes, demand.namespace, demand.tenant, demand.fidelity,
                demand.section_count,
            )
        )  # fmt: skip
        if names is not None:
            self._names.write(entries, names)
        self._masks[entries] = 0
        self.on_lower[entries] = False
        self._account(entries, 1)
        return rows, entries

    def evict_to(self, bytes_used: int) -> tuple[int, int]:
        """Evicts the coldest blocks until at most `bytes_used` are in slots, or nothing more can go.

        Returns: blocks evicted, and the bytes of their slots.
        """
        before, evictions = self.slots.bytes_used, self.evictions
        while self.slots.bytes_used > bytes_used:
            victims = self._room.next_victims(_EVICTED_TOGETHER_MAX)
            if not len(victims):
                break
            freed = np.cumsum(self.slots.slots_bytes(self.footprints(victims)))
            self.evict(victims[: int(np.searchsorted(freed, self.slots.bytes_used - bytes_used)) + 1])
        return self.evictions - evictions, before - self.slots.bytes_used

    def evict(self, entries: Entries) -> None:
        """Drops blocks that nobody holds, to make room."""
        self.evictions += len(entries)
        self.evictions_unsaved += int((~self.on_lower[entries]).sum())
        self._room.evicted(len(entries))
        self.drop(entries)

    # ---------------------------------------------------------------- writing

    def sections_of(self, entry: int) -> list[int]:
        mask = int(self._masks[entry])
        return [s for s in range(self.arrays.sections) if mask >> s & 1]

    def sections_committed(self, entries: Entries) -> NDArray[np.uint8]:
        """Of blocks that are being written, or readable: all their sections; bits, uint8 (n)."""
        whole = (np.uint16(1) << self.arrays.section_counts[entries].astype(np.uint16)) - np.uint16(1)
        writing = self.arrays.states[entries] == EntryState.WRITING
        return np.where(writing, self._masks[entries], whole.astype(np.uint8))

    def commit_sections(self, entries: Entries, sections: NDArray[np.uint32], digests: NDArray[np.uint64]) -> None:
        """Notes digests of sections of blocks that are being written."""
        assert (self.arrays.states[entries] == EntryState.WRITING).all()
        self.arrays.digests[entries, sections] = digests
        np.bitwise_or.at(self._masks, entries, (np.uint8(1) << sections.astype(np.uint8)))

    def publish(self, entries: Entries, parents: Entries, weights: NDArray[np.uint32]) -> None:
        """Makes blocks readable; those that nobody holds may be evicted from now on.

        Args: parents: entry of the block before in its prefix, or NO_ENTRY; weights: see `Evictor.insert`.
        """
        self.index.publish(entries)
        self._note(ChangeKind.STORED, entries)
        self.count_readable(entries, 1)
        self.list_readable(entries, parents, weights)

    def list_readable(self, entries: Entries, parents: Entries, weights: NDArray[np.uint32]) -> None:
        """Tells the eviction policy of readable blocks."""
        classes = slot_classes(self.footprints(entries))
        prints = self.arrays.keys[entries, 0] ^ self.arrays.keys[entries, 1]
        self.evictor.insert(entries, classes, parents, weights, prints)
        self.evictor.hide(entries[self._holds.held(entries)])
        self.freshness += 1

    def discard(self, entries: Entries) -> None:
        """Drops blocks that were never completed and whose writer has stopped; their readers keep the slots."""
        self.index.discard(entries)
        self._release(entries[~self._holds.held(entries)])

    def quarantine(self, entries: Entries) -> None:
        """Drops blocks that were never completed; nobody gets their slots before `end_quarantine`."""
        self.index.quarantine(entries)

    def end_quarantine(self, entries: Entries) -> None:
        """Their writers have stopped; where they have readers, these keep the slots."""
        held = self._holds.held(entries)
        self.index.doom(entries[held])
        self._release(entries[~held])

    # ---------------------------------------------------------------- holding, use and removal

    def guard(self, entries: Entries) -> Entries:
        """Keeps readable blocks that nobody holds out of eviction's sight. Returns what to give to `unguard`."""
        mine = np.unique(entries[~self._holds.held(entries)])
        self.evictor.hide(mine)
        return mine

    def unguard(self, guarded: Entries) -> None:
        self.evictor.show(guarded[~self._holds.held(guarded)])
        self.freshness += 1

    def touch(self, entries: Entries) -> None:
        """Readable blocks were used, in prompt order."""
        self.evictor.touch(entries)

    def drain_touches(self) -> int:
        """Takes note of what readers of the shared memory have read. Returns how many blocks that were."""
        marks = self.arrays.touches
        whole = len(marks) // 8 * 8
        # Of a copy: readers set marks meanwhile, and numpy refuses to search what changes under its hands.
        words = np.flatnonzero(marks[:whole].view(np.uint64).copy())
        marked = (words[:, None] * 8 + np.arange(8)).ravel()
        marked = np.concatenate([marked, np.arange(whole, len(marks))])
        marked = marked[marks[marked] != 0].astype(np.int32)
        if not len(marked):
            return 0
        reads = np.minimum(marks[marked], TOUCHES_MAX)
        marks[marked] = 0
        readable = self.arrays.states[marked] == EntryState.READABLE
        used, reads = marked[readable], reads[readable]
        # Each read counts: a policy may want several before it takes a block for one that is used again.
        for read in range(TOUCHES_MAX):
            self.evictor.touch(used[reads > read])
        self.touches += len(used)
        return len(used)

    def hold(self, entries: Entries) -> None:
        """Blocks are about to be held."""
        fresh = entries[(self.arrays.states[entries] == EntryState.READABLE) & ~self._holds.held(entries)]
        self.evictor.hide(np.unique(fresh[~self.evictor.hidden(fresh)]))

    def unhold(self, entries: Entries) -> None:
        """Nobody holds these any more: readable ones may go again, removed ones are freed.

        Those that are being written, or in quarantine, are their writer's still.
        """
        states = self.arrays.states[entries]
        self._release(entries[states == EntryState.DOOMED])
        self.evictor.show(entries[states == EntryState.READABLE])
        self.freshness += 1

    def drop(self, entries: Entries) -> None:
        """Removes readable blocks; those under a hold keep their slots until it ends."""
        if not len(entries):
            return
        self._note(ChangeKind.REMOVED, entries)
        self.count_readable(entries, -1)
        self.evictor.remove(entries)
        self.index.unlink(entries)
        self._release(entries[~self._holds.held(entries)])

    def mark_lower(self, entries: Entries, present: bool) -> None:
        """A lower tier has, or no longer has, copies of these readable blocks."""
        entries = np.unique(entries)
        changed = entries[self.on_lower[entries] != present]
        self.on_lower[changed] = present
        self.not_on_lower += -len(changed) if present else len(changed)
        self.freshness += 1

    # ---------------------------------------------------------------- what is there

    def footprints(self, entries: Entries) -> NDArray[np.int64]:
        return self._room.footprints(entries)

    def in_namespace(self, entries: Entries, number: int) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = self.arrays.namespaces[entries] == number
        return inside

    def readable(
        self, number: int, keys: KeyArray, names: list[bytes] | None = None, fidelity_min: Fidelity = Fidelity.INT8
    ) -> tuple[Entries, NDArray[np.bool_]]:
        """Entries of keys, and which of them are readable blocks of namespace `number`.

        With `names`, only those with that whole name; `fidelity_min` EXACT leaves lossy copies out.
        """
        entries = self.index.lookup(keys)
        found = entries != NO_ENTRY
        found[found] = self.arrays.states[entries[found]] == EntryState.READABLE
        return entries, self._wanted(entries, found, number, names, fidelity_min)

    def readable_in_part(
        self, number: int, keys: KeyArray, names: list[bytes] | None = None, fidelity_min: Fidelity = Fidelity.INT8
    ) -> tuple[Entries, NDArray[np.bool_]]:
        """As `readable`, and blocks that are being written of which a section is committed."""
        entries = self.index.lookup(keys)
        found = entries != NO_ENTRY
        known = entries[found]
        states = self.arrays.states[known]
        begun = (states == EntryState.WRITING) & (self._masks[known] != 0)
        found[found] = begun | (states == EntryState.READABLE)
        return entries, self._wanted(entries, found, number, names, fidelity_min)

    def status(self, demand: Demand, keys: KeyArray) -> tuple[NDArray[np.uint8], Entries]:
        """What a reserve finds: EXISTS, BEING_WRITTEN, NO_SPACE (something else has the key) or 0; and entries.

        A lossy copy is nothing to somebody who brings an exact one.
        """
        entries = self.index.lookup(keys)
        status = np.zeros(len(keys), dtype=np.uint8)
        rows = np.flatnonzero(entries != NO_ENTRY)
        known = entries[rows]
        readable = self.arrays.states[known] == EntryState.READABLE
        worse = readable & (self.arrays.fidelities[known] > demand.fidelity)
        status[rows] = np.where(readable, np.where(worse, 0, ReserveStatus.EXISTS), ReserveStatus.BEING_WRITTEN)
        mine = self.in_namespace(known, demand.namespace)
        if demand.names is not None:
            mine &= self._names.equal(known, [demand.names[row] for row in rows.tolist()])
        status[rows[~mine]] = ReserveStatus.NO_SPACE
        return status, entries

    def describe(self, keys: KeyArray, entries: Entries, valid: NDArray[np.bool_], sections: int) -> Descriptors:
        """A row a key; rows that are not valid are zero."""
        rows = self.index.describe(np.where(valid, entries, 0), sections)
        for column in (rows.offsets, rows.sizes, rows.generations, rows.digests):
            column[~valid] = 0
        return Descriptors(keys, rows.offsets, rows.sizes, rows.generations, rows.digests)

    def readable_of(self, number: int) -> Entries:
        chosen = (self.arrays.states == EntryState.READABLE) & (self.arrays.namespaces == number)
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

    def count_readable(self, entries: Entries, change: int) -> None:
        """Blocks became readable (1) or stopped being so (-1)."""
        self.usage.add_blocks(self.arrays.namespaces[entries], change)
        self.not_on_lower += change * int((~self.on_lower[entries]).sum())

    def take_over(self, readable: Entries, quarantined: Entries) -> None:
        """Begins with blocks of a process before, whose slots are taken already; what was used when is not known."""
        self._account(readable, 1)
        self._account(quarantined, 1)
        self.count_readable(readable, 1)
        parents = np.full(len(readable), NO_ENTRY, dtype=np.int32)
        self.list_readable(readable, parents, np.ones(len(readable), dtype=np.uint32))

    def check_invariants(self) -> None:
        self.slots.check_invariants()
        self.evictor.check_invariants()
        arrays, every = self.arrays, np.arange(self.arrays.entries, dtype=np.int32)
        readable, held = arrays.states == EntryState.READABLE, self._holds.held(every)
        assert (self.evictor.hidden(every) == (readable & held)).all()
        assert held[arrays.states == EntryState.DOOMED].all()
        assert not held[arrays.states == EntryState.FREE].any()
        used = np.flatnonzero(arrays.states != EntryState.FREE).astype(np.int32)
        begins, slots_bytes = arrays.offsets[used].astype(np.int64), self.slots.slots_bytes(self.footprints(used))
        order = np.argsort(begins)
        ends = (begins + slots_bytes)[order]
        assert (ends[:-1] <= begins[order][1:]).all(), "two blocks in one place"
        assert int(slots_bytes.sum()) == self.slots.bytes_used
        usage = Usage(len(self.usage.tenant_bytes) - 1)
        usage.add_bytes(arrays.namespaces[used], arrays.tenants[used], slots_bytes)
        usage.add_blocks(arrays.namespaces[readable], 1)
        for mine, counted in zip(vars(self.usage).values(), vars(usage).values(), strict=True):
            assert (mine == counted).all()
        assert self.not_on_lower == int((readable & ~self.on_lower).sum())

    # ---------------------------------------------------------------- parts

    def _wanted(
        self, entries: Entries, found: NDArray[np.bool_], number: int, names: list[bytes] | None, fidelity_min: Fidelity
    ) -> NDArray[np.bool_]:
        """Those of `found` that are of a namespace, good enough and, with `names`, have that whole name."""
        known = entries[found]
        found[found] = self.in_namespace(known, number) & (self.arrays.fidelities[known] <= fidelity_min)
        if names is not None:
            found[found] = self._names.equal(entries[found], [names[row] for row in np.flatnonzero(found).tolist()])
        return found

    def _allocate_alike(self, size: int, count: int) -> NDArray[np.int64]:
        """Offsets of at most `count` slots of one size; evicts for what is missing."""
        parts = [self.slots.allocate(size, count)]
        missing = count - len(parts[0])
        if missing and self.slots.can_ever_fit(size):
            self.drain_touches()
            while missing:
                victims = self._room.victims(size, missing)
                if not len(victims):
                    break
                self.evict(victims)
                parts.append(self.slots.allocate(size, missing))
                assert len(parts[-1]), "room was made, and is not there"
                missing -= len(parts[-1])
        return np.concatenate(parts)

    def _keep_as_many_as_entries(self, offsets: NDArray[np.int64], footprints: NDArray[np.int64]) -> None:
        """Evicts for entries that are missing; where that fails, gives the last slots back: their offsets become -1."""
        missing = int((offsets >= 0).sum()) - self.index.free_count
        if missing > 0:
            self.drain_touches()
        while missing > 0:
            victims = self._room.next_victims(min(missing, _EVICTED_TOGETHER_MAX))
            if not len(victims):
                break
            self.evict(victims)
            missing -= len(victims)
        if missing > 0:
            last = np.flatnonzero(offsets >= 0)[-missing:]
            self.slots.free(offsets[last], footprints[last])
            offsets[last] = -1

    def _release(self, entries: Entries) -> None:
        self._give_back(entries)
        self.index.free(entries)

    def _give_back(self, entries: Entries) -> None:
        self._account(entries, -1)
        self.slots.free(self.arrays.offsets[entries], self.footprints(entries))

    def _account(self, entries: Entries, sign: int) -> None:
        arrays = self.arrays
        slots_bytes = sign * self.slots.slots_bytes(self.footprints(entries))
        self.usage.add_bytes(arrays.namespaces[entries], arrays.tenants[entries], slots_bytes)

    def _note(self, kind: ChangeKind, entries: Entries) -> None:
        fidelities = self.arrays.fidelities[entries]
        for fidelity in dict.fromkeys(fidelities.tolist()):
            self._changes.append((kind, fidelity, self.arrays.keys[entries[fidelities == fidelity]].tobytes()))
