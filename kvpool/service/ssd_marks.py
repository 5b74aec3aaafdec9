"""What memory knows of the SSD: which of its blocks have a copy there, and what a directory is told of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import EntryState
from kvpool.core.changes import ChangeKind
from kvpool.core.ids import Fidelity, KeyArray
from kvpool.core.index import NO_ENTRY
from kvpool.core.source import SourceCore
from kvpool.core.ssd.records import SsdListing
from kvpool.service.announcer import Announcer
from kvpool.tiers.ssd.store import SsdStore

LIST_PAGE = 65_536


class SsdMarks:
    """Belongs to the event loop. A mark says that a block may be evicted without losing it."""

    def __init__(self, store: SsdStore, core: SourceCore) -> None:
        self._store, self._core = store, core
        self.announcer: Announcer | None = None

    def settle(self) -> None:
        """Passes on what the store has gained and lost. Marks go; who copies blocks sets them, with `mark`."""
        changes = self._store.take_changes()
        for change in changes.changes:
            if change.kind is ChangeKind.REMOVED:
                self._core.mark_lower(np.frombuffer(change.keys, dtype=np.uint8).reshape(-1, 16), False)
        if changes.lost:
            # Those that are still there will be marked again when they are next looked at.
            self._core.mark_lower(self._readable(), False)
        if self.announcer is None:
            return
        if changes.lost:
            self.announcer.lose()
        elif changes.changes:
            self.announcer.publish(changes.changes)

    def mark(self, keys: KeyArray) -> NDArray[np.bool_]:
        """Marks those blocks in memory of which the SSD has a copy that is at least as good; bool (n), which.

        A block is named by its content. For objects the caller must know that the SSD has the same one.
        """
        # First: a removal that is still on its way must not take away the mark of what came after it.
        self.settle()
        index, arrays = self._core.index, self._core.arrays
        facts, entries = self._store.describe(keys), index.lookup(keys)
        there: NDArray[np.bool_] = facts.present & (entries != NO_ENTRY)
        known = entries[there]
        namespaces = np.zeros((len(known), 16), dtype=np.uint8)
        for number in np.unique(arrays.namespaces[known]).tolist():
            rows = arrays.namespaces[known] == number
            namespaces[rows] = np.frombuffer(self._core.namespaces_known.id_of(number), dtype=np.uint8)
        there[there] = (
            (arrays.states[known] == EntryState.READABLE)
            & (facts.fidelities[there] <= arrays.fidelities[known])
            & (facts.namespace_ids[there] == namespaces).all(axis=1)
        )
        self._core.mark_lower(keys[there], True)
        return there

    def pages(self) -> Iterator[SsdListing]:
        """All that can be read from the SSD. For any thread."""
        cursor: int | None = 0
        while cursor is not None:
            listing = self._store.list(cursor, LIST_PAGE)
            yield listing
            cursor = listing.next_cursor

    def held(self) -> list[tuple[KeyArray, Fidelity]]:
        """Keys of all that can be read from the SSD. For any thread."""
        return [
            (listing.keys[listing.facts.fidelities == fidelity], fidelity)
            for listing in self.pages()
            for fidelity in Fidelity
        ]

    def _readable(self) -> KeyArray:
        readable = np.flatnonzero(self._core.arrays.states == EntryState.READABLE).astype(np.int32)
        return self._core.index.key_array(readable)
