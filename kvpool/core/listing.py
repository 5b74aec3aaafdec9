"""What a source shows of itself: pages of blocks, and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kvpool.core.arrays import EntryState
from kvpool.core.ids import Fidelity, NamespaceId

if TYPE_CHECKING:
    from kvpool.core.source_base import SourceBase

STATE_NAMES: Final = {
    EntryState.WRITING: "writing",
    EntryState.READABLE: "readable",
    EntryState.DOOMED: "removed",
    EntryState.QUARANTINED: "quarantined",
}
#: Objects whose names are looked at for one page.
_NAMES_PER_PAGE: Final = 65_536


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
    name: bytes
    tenant: str
    section_count: int
    on_lower: bool


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """How full a source is and what is held; fields as SourceStats on the wire.

    evictions_unsaved: of the evictions, those of blocks that no lower tier had.
    """

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
    bytes_free: int
    bytes_largest_extent: int
    fragmentation: float
    entries_total: int
    pins_detached: int
    eviction: str
    draining: bool
    adopted: int
    touches: int
    expired: int
    evictions_unsaved: int


def count_source(source: SourceBase) -> SourceCounts:
    """The counts of a source now."""
    index, store, holds = source.index, source.store, source.holds
    occupancy = store.slots.occupancy()
    return SourceCounts(
        bytes_total=occupancy.bytes_total,
        bytes_used=occupancy.bytes_used,
        blocks=index.count(EntryState.READABLE),
        blocks_writing=index.count(EntryState.WRITING),
        sessions=len(source.sessions),
        leases=len(holds.leases),
        pins=len(holds.pins) + len(holds.handoffs),
        reservations=source.reservations.live,
        quarantined=index.count(EntryState.QUARANTINED),
        waiters=len(source.waits),
        hits=source.hits,
        misses=source.misses,
        evictions=store.evictions,
        bytes_free=occupancy.bytes_free,
        bytes_largest_extent=occupancy.bytes_largest_extent,
        fragmentation=occupancy.fragmentation,
        entries_total=source.arrays.entries,
        pins_detached=holds.detached,
        eviction=store.evictor.name,
        draining=source.draining,
        adopted=source.adopted,
        touches=store.touches,
        expired=source.expired,
        evictions_unsaved=store.evictions_unsaved,
    )


def list_blocks(
    source: SourceBase, cursor: int, limit: int, namespace: int | None, name_prefix: bytes
) -> tuple[list[BlockRecord], int]:
    """A page in entry order; the cursor is the entry at which the next page begins, 0 = there is none."""
    arrays = source.arrays
    chosen = arrays.states[cursor:] != EntryState.FREE
    if namespace is not None:
        chosen &= arrays.namespaces[cursor:] == namespace
    if name_prefix:
        chosen &= arrays.name_bytes[cursor:] >= len(name_prefix)
    entries = (np.flatnonzero(chosen)[: (_NAMES_PER_PAGE if name_prefix else limit) + 1] + cursor).astype(np.int32)
    following = 0
    if name_prefix:
        if len(entries) > _NAMES_PER_PAGE:
            following, entries = int(entries[-1]), entries[:-1]
        entries = entries[source.names.begin_with(entries, name_prefix)]
    if len(entries) > limit:
        following = int(entries[limit])
    return [record_of(source, entry) for entry in entries[:limit].tolist()], following


def record_of(source: SourceBase, entry: int) -> BlockRecord:
    """What there is to say about an entry in use."""
    arrays, holds = source.arrays, source.holds
    return BlockRecord(
        key=arrays.keys[entry].tobytes(),
        namespace_id=source.namespaces_known.id_of(int(arrays.namespaces[entry])),
        fidelity=Fidelity(int(arrays.fidelities[entry])),
        offset=int(arrays.offsets[entry]),
        size=int(arrays.sizes[entry]),
        generation=int(arrays.generations[entry]),
        leases=int(holds.lease_counts[entry]),
        pins=int(holds.pin_counts[entry]),
        state=STATE_NAMES[EntryState(int(arrays.states[entry]))],
        name=source.names.of(np.array([entry], dtype=np.int32))[0],
        tenant=source.tenants.name_of(int(arrays.tenants[entry])),
        section_count=int(arrays.section_counts[entry]),
        on_lower=bool(source.store.on_lower[entry]),
    )
