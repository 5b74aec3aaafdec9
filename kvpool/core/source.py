"""The authority over one source's blocks: who writes, who reads, who holds, what is evicted, what is told to others.

Pure: every call takes the time, every effect is in the returned value, in `take_changes` or in `take_wakeups`. A shell
moves the bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.core.adoption import take_over
from kvpool.core.arrays import EntryState, SourceArrays
from kvpool.core.catalog import Catalog
from kvpool.core.errors import BadArgument
from kvpool.core.results import SourceConfig
from kvpool.core.source_reading import SourceReading
from kvpool.core.source_upkeep import SourceUpkeep
from kvpool.core.source_writing import SourceWriting


class SourceCore(SourceWriting, SourceReading, SourceUpkeep):
    """One source. Not thread-safe: one thread calls it."""

    @classmethod
    def adopt(
        cls, config: SourceConfig, arrays: SourceArrays, data: NDArray[np.uint8] | None, catalog: Catalog
    ) -> SourceCore:
        """The core of a process that takes over the segment of one that was killed at any point; see `adoption`.

        Slots that an old writer may know stay in quarantine until `release_inherited`.

        Args: catalog: as the old process last wrote it down.
        Raises: BadArgument if the index is damaged, or laid out for another configuration.
        """
        if arrays.entries != config.entries_max:
            raise BadArgument(f"an index of {arrays.entries} entries is not one of {config.entries_max}")
        taken = take_over(
            arrays, data, catalog.namespaces, len(catalog.tenants), config.capacity_bytes, config.unit_bytes
        )
        core = cls(config, arrays, data, slots=taken.slots)
        for spec in catalog.namespaces:
            core.register_namespace(spec)
        for name in catalog.tenants:
            core._tenant(name)
        for namespace, tenant, bytes_max in catalog.quotas:
            core.quotas_set.set((namespace, tenant), bytes_max)
        core._inherited = taken.quarantined
        core.index.relink()
        core.store.take_over(taken.readable, taken.quarantined)
        core.adopted = len(taken.readable)
        core.catalog_changed = False
        return core

    def check_invariants(self) -> None:
        """Everything agrees with everything. For tests: takes time."""
        self.index.check_invariants()
        self.holds.check_invariants()
        self.waits.check_invariants()
        self.reservations.check_invariants()
        self.store.check_invariants()
        writing = np.flatnonzero(self.arrays.states == EntryState.WRITING)
        assert np.array_equal(writing, self.reservations.entries_being_written())
        quarantined = np.sort(np.concatenate([self.reservations.quarantined_entries(), self._inherited]))
        assert np.array_equal(quarantined, np.flatnonzero(self.arrays.states == EntryState.QUARANTINED))
        owners = [lease.session for lease in self.holds.leases.values()]
        owners += [pin.session for pin in self.holds.pins.values() if pin.session]
        assert all(session in self.sessions for session in owners)
