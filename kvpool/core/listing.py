"""What a source shows of itself: pages of blocks, and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kvpool.core.arrays import EntryState
from kvpool.core.ids import Fidelity, NamespaceId

if TYPE_CHECKING:
    from kvpool.core.source import SourceCore

STATE_NAMES: Final = {EntryState.WRITING: "writing", EntryState.READABLE: "readable", EntryState.DOOMED: "removed"}


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One block, as `kvctl blocks` shows it."""

    key: bytes
    namespace_id: NamespaceId
    fidelity: Fidelity
    offset: int
    size: int
    generation: int
    leases: int
    pins: int
    state: str


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """How full a source is and what is held; fields as SourceStats on the wire."""

    bytes_total: int
    bytes_used: int
    blocks: int
    blocks_writing: int
    sessions: int
    leases: int
    pins: int
    reservations: int
    quarantined: int
    waiters: int
    hits: int
    misses: int
    evictions: int


def count_source(source: SourceCore) -> SourceCounts:
    """The counts of a source now."""
    states, store, holds = source.arrays.states, source.store, source.holds
    return SourceCounts(
        bytes_total=store.slots.capacity_bytes,
        bytes_used=store.slots.bytes_used,
        blocks=int(np.count_nonzero(states == EntryState.READABLE)),
        blocks_writing=int(np.count_nonzero(states == EntryState.WRITING)),
        sessions=len(source.sessions),
        leases=len(holds.leases),
        pins=len(holds.pins) + len(holds.handoffs),
        reservations=source.reservations.live,
        quarantined=source.reservations.quarantined,
        waiters=len(source.waits),
        hits=source.hits,
        misses=source.misses,
        evictions=store.evictions,
    )


def list_blocks(
    source: SourceCore, namespaces: Sequence[NamespaceId], cursor: int, limit: int
) -> tuple[list[BlockRecord], int]:
    """A page in entry order, quarantined slots last; the cursor says where the next page begins, 0 = nowhere."""
    entries = source.arrays.entries
    used = np.flatnonzero(source.arrays.states[cursor:] != EntryState.FREE)[: limit + 1] + cursor
    page = [_record(source, namespaces, int(entry)) for entry in used[:limit]]
    if len(used) > limit:
        return page, int(used[limit])
    begin = max(0, cursor - entries)
    slots = source.reservations.quarantined_slots()
    shown = slots[begin : begin + limit - len(page)]
    page += [
        BlockRecord(s.key, NamespaceId(b""), Fidelity.EXACT, s.offset, s.size, s.generation, 0, 0, "quarantined")
        for s in shown
    ]
    end = begin + len(shown)
    return page, entries + end if end < len(slots) else 0


def _record(source: SourceCore, namespaces: Sequence[NamespaceId], entry: int) -> BlockRecord:
    arrays, holds = source.arrays, source.holds
    return BlockRecord(
        key=arrays.keys[entry].tobytes(),
        namespace_id=namespaces[source.store.namespace_of(entry)],
        fidelity=Fidelity(int(arrays.fidelities[entry])),
        offset=int(arrays.offsets[entry]),
        size=int(arrays.sizes[entry]),
        generation=int(arrays.generations[entry]),
        leases=int(holds.lease_counts[entry]),
        pins=int(holds.pin_counts[entry]),
        state=STATE_NAMES[EntryState(int(arrays.states[entry]))],
    )
