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


def list_blocks(
    source: SourceCore, namespaces: Sequence[NamespaceId], cursor: int, limit: int
) -> tuple[list[BlockRecord], int]:
    """A page in entry order, quarantined slots last; the cursor is one more than the last entry shown."""
    arrays, holds = source.arrays, source.holds
    used = np.flatnonzero(arrays.states[cursor:] != EntryState.FREE)[: limit + 1] + cursor
    page = [
        BlockRecord(
            key=arrays.keys[e].tobytes(),
            namespace_id=namespaces[source.store.namespace_of(e)],
            fidelity=Fidelity(int(arrays.fidelities[e])),
            offset=int(arrays.offsets[e]),
            size=int(arrays.sizes[e]),
            generation=int(arrays.generations[e]),
            leases=int(holds.lease_counts[e]),
            pins=int(holds.pin_counts[e]),
            state=STATE_NAMES[EntryState(int(arrays.states[e]))],
        )
        for e in used[:limit].tolist()
    ]
    if len(used) > limit:
        return page, int(used[limit - 1]) + 1
    page += [
        BlockRecord(
            slot.key, NamespaceId(b""), Fidelity.EXACT, slot.offset, slot.size, slot.generation, 0, 0, "quarantined"
        )
        for slot in source.reservations.quarantined_slots()[: limit - len(page)]
    ]
    return page, 0
