"""Which blocks a lower tier should get a copy of before they are evicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors
from kvpool.core.coldest import Coldest, Rows
from kvpool.core.ids import KeyArray
from kvpool.core.index import Entries
from kvpool.core.store import BlockStore


@dataclass(frozen=True, slots=True, eq=False)
class ColdBlocks:
    """Blocks in the order in which they would be evicted, a row each.

    blocks: digests (n, sections); names: b"" for blocks that are no objects; fidelities, section_counts: uint8 (n).
    """

    keys: KeyArray
    blocks: Descriptors
    namespace_ids: list[bytes]
    names: list[bytes]
    tenants: list[str]
    fidelities: NDArray[np.uint8]
    section_counts: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> ColdBlocks:
        """The rows named by an index or a mask."""
        numbers = np.arange(len(self))[rows].tolist()
        return ColdBlocks(
            self.keys[rows],
            self.blocks.take(rows),
            [self.namespace_ids[i] for i in numbers],
            [self.names[i] for i in numbers],
            [self.tenants[i] for i in numbers],
            self.fidelities[rows],
            self.section_counts[rows],
        )


class Demotion:
    """Finds the coldest blocks that no lower tier has."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._coldest = Coldest(store.arrays, store.evictor, self._chosen, lambda: store.freshness)

    def next(self, bytes_max: int, count_max: int) -> Entries:
        """At most so many blocks of at most so many payload bytes together, at least one if there is any."""
        if not self._store.not_on_lower:
            return np.empty(0, dtype=np.int32)
        entries = self._coldest.candidates()[:count_max]
        fits = int(np.searchsorted(np.cumsum(self._store.arrays.sizes[entries]), np.uint64(bytes_max), side="right"))
        return entries[: max(fits, 1)]

    def _chosen(self, entries: Rows) -> NDArray[np.bool_]:
        return ~self._store.on_lower[entries]
