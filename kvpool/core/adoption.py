"""Taking over the index of a process that was killed at any point: keeps exactly what was committed (G10).

What the order of statements in `index` makes sure of:

* READABLE with an even generation: each section was committed, and nothing has been done to the block since. Kept,
  unless its fields can't be right or another one has its key or its place; then all of these go, since nothing here
  tells which one is right, and a block too few costs a recomputation only.
* WRITING, QUARANTINED, or an odd generation in any other state than DOOMED and FREE: a writer may know the slot, and
  may still be at work. In quarantine until it is proven gone. Its fields were complete before it was told, so one
  whose extent can't be right means that the index is damaged, and nothing in it can be believed.
* DOOMED: committed once and removed, so no writer knows it any more; its readers held their leases from a process
  that is no more. Freed.

Taking over may itself be killed anywhere and begun again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import FLAGS, EntryState, SourceArrays
from kvpool.core.errors import BadArgument
from kvpool.core.hashing import NAME_BYTES_MAX, object_key
from kvpool.core.ids import Fidelity
from kvpool.core.index import Entries
from kvpool.core.names import Names
from kvpool.core.namespace import NAMESPACES_MAX, NamespaceSpec
from kvpool.core.spans import SlotAllocator

_DAMAGED: Final = "remove the segment's file; its blocks are computed again"


@dataclass(frozen=True, slots=True, eq=False)
class TakenOver:
    """What an index holds: the allocator knows the slots of both kinds of entries."""

    slots: SlotAllocator
    readable: Entries
    quarantined: Entries


def take_over(
    arrays: SourceArrays,
    data: NDArray[np.uint8] | None,
    namespaces: Sequence[NamespaceSpec],
    tenants: int,
    capacity_bytes: int,
    unit_bytes: int | None,
) -> TakenOver:
    """Brings `arrays` into a consistent state, but for the table, which is to be made anew.

    Args: namespaces: by number; tenants: how many numbers were given out.
    Raises: BadArgument if the index is damaged.
    """
    even = arrays.generations & np.uint32(1) == 0
    free, doomed = arrays.states == EntryState.FREE, arrays.states == EntryState.DOOMED
    committed = (arrays.states == EntryState.READABLE) & even
    suspects = np.flatnonzero(~(free | doomed | committed)).astype(np.int32)
    readable = np.flatnonzero(committed).astype(np.int32)
    readable = readable[_is_plausible(arrays, readable, namespaces, tenants, capacity_bytes)]
    readable = readable[_has_own_key(arrays, readable)]
    readable = readable[_is_named_right(arrays, Names(arrays, data), readable, namespaces)]
    slots, readable = _place(arrays, readable, suspects, capacity_bytes, unit_bytes)
    kept = np.zeros(arrays.entries, dtype=np.bool_)
    kept[readable] = kept[suspects] = True
    _free(arrays, ~kept)
    _quarantine(arrays, suspects, len(namespaces), tenants)
    arrays.touches[:] = 0
    arrays.header[FLAGS] = 0
    return TakenOver(slots, readable, suspects)


def _footprints(arrays: SourceArrays, entries: Entries) -> NDArray[np.uint64]:
    """Bytes of slots; those of fields that can't be right become 0."""
    sizes, lengths = arrays.sizes[entries], arrays.name_bytes[entries]
    sane = (sizes >= 1) & (sizes < np.uint64(1 << 60)) & (lengths <= NAME_BYTES_MAX)
    return np.where(sane, sizes + lengths.astype(np.uint64), np.uint64(0))


def _is_plausible(
    arrays: SourceArrays, entries: Entries, namespaces: Sequence[NamespaceSpec], tenants: int, capacity_bytes: int
) -> NDArray[np.bool_]:
    """Whether the fields of entries can have been written by a source of these namespaces and tenants."""
    is_objects = np.zeros(1 << 16, dtype=np.bool_)
    is_objects[: len(namespaces)] = [spec.is_objects for spec in namespaces]
    numbers, sections = arrays.namespaces[entries], arrays.section_counts[entries].astype(np.uint64)
    right: NDArray[np.bool_] = (numbers < len(namespaces)) & (arrays.tenants[entries] < tenants)
    right &= (sections >= 1) & (sections <= arrays.sections)
    right &= arrays.sizes[entries] % np.maximum(sections, np.uint64(1)) == 0
    right &= np.isin(arrays.fidelities[entries], list(Fidelity))
    right &= (arrays.name_bytes[entries] > 0) == is_objects[numbers]
    footprints = _footprints(arrays, entries)
    right &= (footprints > 0) & (footprints <= capacity_bytes)
    right &= arrays.offsets[entries] <= np.uint64(capacity_bytes) - np.minimum(footprints, np.uint64(capacity_bytes))
    return right


def _has_own_key(arrays: SourceArrays, entries: Entries) -> NDArray[np.bool_]:
    """Whether no other of these entries has the same key."""
    low, high = arrays.keys[entries, 0], arrays.keys[entries, 1]
    order = np.lexsort((high, low))
    low, high = low[order], high[order]
    as_next = (low[1:] == low[:-1]) & (high[1:] == high[:-1])
    own = np.ones(len(entries), dtype=np.bool_)
    own[order[1:][as_next]] = False
    own[order[:-1][as_next]] = False
    return own


def _is_named_right(
    arrays: SourceArrays, names: Names, entries: Entries, namespaces: Sequence[NamespaceSpec]
) -> NDArray[np.bool_]:
    """Whether the names of objects are those that their keys were made of; True for blocks."""
    right = np.ones(len(entries), dtype=np.bool_)
    rows = np.flatnonzero(arrays.name_bytes[entries] > 0)
    ids = [spec.id() for spec in namespaces]
    objects = entries[rows]
    texts, numbers = names.of(objects), arrays.namespaces[objects].tolist()
    for row, entry, name, number in zip(rows.tolist(), objects.tolist(), texts, numbers, strict=True):
        right[row] = bool(name) and object_key(ids[number], name) == arrays.keys[entry].tobytes()
    return right


def _place(
    arrays: SourceArrays, readable: Entries, suspects: Entries, capacity_bytes: int, unit_bytes: int | None
) -> tuple[SlotAllocator, Entries]:
    """An allocator with the slots of all suspects, and of those readable entries that get in nobody's way.

    Raises: BadArgument if suspects have no consistent places.
    """
    while True:
        slots = SlotAllocator(capacity_bytes, unit_bytes)
        everybody = np.concatenate([suspects, readable])
        accepted = slots.restore(arrays.offsets[everybody], _footprints(arrays, everybody))
        refused = suspects[~accepted[: len(suspects)]]
        if not len(refused):
            kept = readable[accepted[len(suspects) :]]
            return slots, kept
        # Whoever is in the way of a slot that somebody may be writing has to go.
        in_the_way = _overlapping(arrays, readable, refused, slots.unit_bytes)
        if not in_the_way.any():
            raise BadArgument("the segment's index is damaged", hint=_DAMAGED)
        readable = readable[~in_the_way]


def _overlapping(arrays: SourceArrays, entries: Entries, others: Entries, unit_bytes: int) -> NDArray[np.bool_]:
    """Which entries have a unit of the segment in common with one of `others`, or lie in the same spans beside it."""
    # A span is at most 16 units and one slot long: wider than needed, and damage is rare.
    margin = np.int64(64 * unit_bytes)
    begins, sizes = arrays.offsets[entries].astype(np.int64), _footprints(arrays, entries).astype(np.int64)
    result = np.zeros(len(entries), dtype=np.bool_)
    for other in others.tolist():
        begin = int(arrays.offsets[other])
        end = begin + int(_footprints(arrays, np.array([other], dtype=np.int32))[0])
        if end < 1 << 60:
            result |= (begins < end + margin) & (begins + sizes > begin - margin)
    return result


def _free(arrays: SourceArrays, chosen: NDArray[np.bool_]) -> None:
    """Frees entries that nobody writes, in the order of `BlockIndex.unlink` and `free`."""
    used = np.flatnonzero(chosen & (arrays.states != EntryState.FREE))
    arrays.generations[used] |= np.uint32(1)
    arrays.states[used] = EntryState.DOOMED
    arrays.states[used] = EntryState.FREE
    # Those too that were being handed out or taken back.
    odd = np.flatnonzero((arrays.states == EntryState.FREE) & (arrays.generations & np.uint32(1) == 1))
    arrays.generations[odd] += np.uint32(1)


def _quarantine(arrays: SourceArrays, suspects: Entries, namespaces: int, tenants: int) -> None:
    arrays.generations[suspects] |= np.uint32(1)
    arrays.states[suspects] = EntryState.QUARANTINED
    strange = suspects[arrays.tenants[suspects] >= tenants]
    arrays.tenants[strange] = 0
    strange = suspects[arrays.namespaces[suspects] >= namespaces]
    arrays.namespaces[strange] = NAMESPACES_MAX
    # What a listing shows must be one of its kind.
    odd = suspects[~np.isin(arrays.fidelities[suspects], list(Fidelity))]
    arrays.fidelities[odd] = Fidelity.EXACT
