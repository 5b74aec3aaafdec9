"""What operators and a node's own work ask of a source's core: removal, eviction, quotas, demotion, listing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import EntryState
from kvpool.core.changes import BlockChange
from kvpool.core.demotion import ColdBlocks
from kvpool.core.errors import BadArgument
from kvpool.core.ids import Fidelity, KeyArray, NamespaceId
from kvpool.core.index import NO_ENTRY, Entries
from kvpool.core.listing import BlockRecord, SourceCounts, count_source, list_blocks, record_of
from kvpool.core.namespace import SECTIONS_MAX, NamespaceSpec
from kvpool.core.quotas import NONE
from kvpool.core.results import QuotaRecord
from kvpool.core.source_base import SourceBase


class SourceUpkeep(SourceBase):
    """What neither readers nor writers call."""

    # ---------------------------------------------------------------- removal

    def remove(
        self, namespace_id: bytes, keys: KeyArray, now_us: int, *, digests: NDArray[np.uint64] | None = None
    ) -> int:
        """Drops readable blocks; those that are held lose their keys now and their bytes later. Returns how many.

        Args: digests: only what is `unchanged` goes.
        Raises: UnknownNamespace, BadArgument.
        """
        if digests is not None:
            keys = keys[self.unchanged(namespace_id, keys, digests)]
        return self._drop(self._readable(namespace_id, keys))

    def unchanged(self, namespace_id: bytes, keys: KeyArray, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which keys still name readable blocks with these digests, uint64 (keys, sections). Changes nothing.

        Raises: as `remove`.
        """
        self._bounds.keys(keys)
        if len(digests) != len(keys) or digests.shape[1] > SECTIONS_MAX:
            raise BadArgument(f"digests of {len(digests)} blocks do not run beside {len(keys)} keys")
        entries, same = self.store.readable(self.namespaces_known.number(namespace_id), keys)
        known = entries[same]
        same[same] = (self.arrays.digests[known, : digests.shape[1]] == digests[same]).all(axis=1)
        return same

    def remove_namespace(self, namespace_id: bytes, now_us: int) -> int:
        """As `remove`, for all of a namespace. Raises: UnknownNamespace."""
        return self._drop(self.store.readable_of(self.namespaces_known.number(namespace_id)))

    def remove_prefix(self, namespace_id: bytes, prefix: bytes, now_us: int) -> int:
        """As `remove`, for objects whose names begin so. Raises: UnknownNamespace."""
        mine = self.store.readable_of(self.namespaces_known.number(namespace_id))
        return self._drop(mine[self.names.begin_with(mine, prefix)])

    def evict_keys(self, namespace_id: bytes, keys: KeyArray, now_us: int) -> tuple[int, int]:
        """Evicts blocks that nobody holds. Returns how many, and the bytes of their slots. Raises: as `remove`."""
        mine = self._readable(namespace_id, keys)
        mine = mine[~self.holds.held(mine)]
        before = self.store.slots.bytes_used
        self.store.evict(mine)
        return len(mine), before - self.store.slots.bytes_used

    def evict_bytes(self, bytes_wanted: int, now_us: int) -> tuple[int, int]:
        """Evicts what would go next, for at least so many bytes of slots where so much may go. Returns as above."""
        self.store.drain_touches()
        return self.store.evict_to(max(0, self.store.slots.bytes_used - bytes_wanted))

    def drain_touches(self) -> int:
        """Takes note of what readers of the shared memory have read. Returns how many blocks that were."""
        return self.store.drain_touches()

    def release_inherited(self, now_us: int) -> int:
        """The writers of the process before are gone: the slots they may have written are free. Returns how many."""
        entries, self._inherited = self._inherited, self._inherited[:0]
        self.store.end_quarantine(entries)
        return len(entries)

    # ---------------------------------------------------------------- quotas

    def set_quota(self, bytes_max: int, *, namespace_id: bytes = b"", tenant: str = "") -> None:
        """Bytes of slots that a namespace or a tenant may have; 0 = no quota. The next `tick` enforces it.

        Raises: BadArgument, UnknownNamespace, Overloaded.
        """
        if bool(namespace_id) == bool(tenant) or bytes_max < 0:
            raise BadArgument("a quota is of a namespace or of a tenant, and at least 0 bytes")
        if namespace_id:
            holder = (self.namespaces_known.number(namespace_id), NONE)
        else:
            holder = (NONE, self._tenant(tenant))
        self.quotas_set.set(holder, bytes_max)
        self.catalog_changed = True

    def quotas(self) -> list[QuotaRecord]:
        """All quotas with what is used of them, in the order in which they were set."""
        return [
            QuotaRecord(
                b"" if namespace == NONE else self.namespaces_known.id_of(namespace),
                "" if tenant == NONE else self.tenants.name_of(tenant),
                bytes_max,
                bytes_used,
            )
            for (namespace, tenant), bytes_max, bytes_used in self.quotas_set.items()
        ]

    # ---------------------------------------------------------------- lower tier

    def mark_lower(self, keys: KeyArray, present: bool) -> None:
        """A lower tier has, or no longer has, copies of these blocks. Keys that are not here are passed over."""
        entries = self.index.lookup(keys)
        entries = entries[entries != NO_ENTRY]
        self.store.mark_lower(entries[self.arrays.states[entries] == EntryState.READABLE], present)

    def demotion_candidates(self, bytes_max: int, count_max: int) -> ColdBlocks:
        """The next blocks to be evicted of which no lower tier has a copy; of at most so many payload bytes together,
        but at least one if there is any. Holds nothing."""
        self.store.drain_touches()
        entries = self._demotion.next(bytes_max, count_max)
        blocks = self.index.describe(entries, SECTIONS_MAX)
        arrays = self.arrays
        return ColdBlocks(
            blocks.keys,
            blocks,
            [bytes(self.namespaces_known.id_of(n)) for n in arrays.namespaces[entries].tolist()],
            self.names.of(entries),
            [self.tenants.name_of(t) for t in arrays.tenants[entries].tolist()],
            arrays.fidelities[entries],
            arrays.section_counts[entries],
        )

    # ---------------------------------------------------------------- inspection

    def take_changes(self) -> list[BlockChange]:
        """What became readable or was removed since the last call, in order."""
        return self.store.take_changes()

    def snapshot_keys(self) -> list[tuple[KeyArray, Fidelity]]:
        """Keys of all readable blocks, by fidelity."""
        entries = np.flatnonzero(self.arrays.states == EntryState.READABLE).astype(np.int32)
        fidelities = self.arrays.fidelities[entries]
        return [
            (self.index.key_array(entries[fidelities == fidelity]), fidelity)
            for fidelity in Fidelity
            if (fidelities == fidelity).any()
        ]

    def namespaces(self) -> list[tuple[NamespaceId, NamespaceSpec, int, int]]:
        """All namespaces by number, each with its readable blocks and the bytes of all its slots."""
        known, usage = self.namespaces_known, self.usage
        return [
            (known.id_of(n), spec, int(usage.namespace_blocks[n]), int(usage.namespace_bytes[n]))
            for n, spec in enumerate(known.specs)
        ]

    def list_blocks(
        self, cursor: int, limit: int, *, namespace_id: bytes = b"", name_prefix: bytes = b""
    ) -> tuple[list[BlockRecord], int]:
        """A page of blocks, and the cursor of the next page (0 = end). A page may be short before the end.

        Args: namespace_id: empty = all; name_prefix: not empty = objects whose names begin so.
        Raises: BadArgument, UnknownNamespace.
        """
        if not 1 <= limit <= 10_000 or cursor < 0:
            raise BadArgument("limit must be 1 to 10000, cursor as it was returned")
        number = self.namespaces_known.number(namespace_id) if namespace_id else None
        return list_blocks(self, cursor, limit, number, name_prefix)

    def records_of(self, keys: KeyArray) -> list[BlockRecord]:
        """Those of `keys` that are here, in whatever namespace and state. Raises: BadArgument."""
        self._bounds.keys(keys)
        entries = self.index.lookup(keys)
        return [record_of(self, entry) for entry in entries[entries != NO_ENTRY].tolist()]

    def counts(self) -> SourceCounts:
        """Cheap, whatever the number of blocks."""
        return count_source(self)

    # ---------------------------------------------------------------- parts

    def _readable(self, namespace_id: bytes, keys: KeyArray) -> Entries:
        self._bounds.keys(keys)
        entries, found = self.store.readable(self.namespaces_known.number(namespace_id), keys)
        return np.unique(entries[found])

    def _drop(self, victims: Entries) -> int:
        self.store.drop(victims)
        return len(victims)
