"""The coldest blocks of a selection: found by a scan of all entries, and mostly used up before the next scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import EntryState, SourceArrays
from kvpool.core.evictors import Evictor
from kvpool.core.index import Entries

#: Of a selection so large a share is remembered, within these bounds.
_KEPT_SHARE: Final = 8
_KEPT_MIN, _KEPT_MAX = 256, 8192
#: After so many changes for each entry it is scanned again, since something colder may have come: a scan is cheap where
#: there are few entries, and rare where there are many.
_CHANGES_SHARE: Final = 4096

_ALL: Final = slice(None)
Rows: TypeAlias = "Entries | slice"


class Coldest:
    """Blocks of a selection that nobody holds, coldest first.

    Args:
        chosen: which of the given readable entries are of the selection; bool (n). Given as an index or as a slice of
            all, of which the others do not matter: a scan looks at columns, not at rows.
        freshness: a number that rises when an entry may have come into the selection or become free to go: without
            such a change an empty selection is not scanned again.
    """

    def __init__(
        self,
        arrays: SourceArrays,
        evictor: Evictor,
        chosen: Callable[[Rows], NDArray[np.bool_]],
        freshness: Callable[[], int],
    ) -> None:
        self._arrays, self._evictor, self._chosen, self._freshness = arrays, evictor, chosen, freshness
        self._entries: Entries = np.empty(0, dtype=np.int32)
        self._generations = np.empty(0, dtype=np.uint32)
        self._hottest = np.uint64(0)
        self._scanned_at = -1  # freshness
        self._whole = False  # whether the last scan left nothing out
        self.scans = 0

    def candidates(self) -> Entries:
        """Some of the coldest, in order; empty if there are none."""
        changes = self._freshness() - self._scanned_at
        if changes and changes * _CHANGES_SHARE >= self._arrays.entries:
            self._scan()
        found = self._remembered()
        if not len(found) and (len(self._entries) or changes or not self._whole):
            self._scan()
            found = self._remembered()
        return found

    def all(self) -> Entries:
        """The whole selection, in no order, at the price of a scan."""
        chosen = (self._arrays.states == EntryState.READABLE) & self._chosen(_ALL)
        entries = np.flatnonzero(chosen).astype(np.int32)
        return entries[~self._evictor.hidden(entries)]

    def _remembered(self) -> Entries:
        """What was found and still is as it was, not used again meanwhile."""
        if not len(self._entries):
            return self._entries
        same = self._arrays.generations[self._entries] == self._generations
        same &= self._chosen(self._entries) & ~self._evictor.hidden(self._entries)
        self._entries, self._generations = self._entries[same], self._generations[same]
        ranks = self._evictor.rank(self._entries)
        order = np.argsort(ranks, kind="stable")
        return self._entries[order[: int(np.searchsorted(ranks[order], self._hottest, side="right"))]]

    def _scan(self) -> None:
        self.scans += 1
        entries = self.all()
        ranks = self._evictor.rank(entries)
        kept = min(max(len(entries) // _KEPT_SHARE, _KEPT_MIN), _KEPT_MAX)
        self._scanned_at, self._whole = self._freshness(), kept >= len(entries)
        if not self._whole:
            coldest = np.argpartition(ranks, kept)[:kept]
            entries, ranks = entries[coldest], ranks[coldest]
        self._entries, self._generations = entries, self._arrays.generations[entries]
        self._hottest = ranks.max() if len(ranks) else np.uint64(0)
