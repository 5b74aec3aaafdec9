"""What came and went, kept in order until somebody asks. Bounded: beyond, all of it is lost and the reader is told."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.ids import Fidelity, KeyArray
from kvpool.core.ssd.records import SsdChanges


class ChangeFeed:
    """Changes since the last `take`, of at most `keys_max` keys."""

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._changes: list[BlockChange] = []
        self._keys = 0
        self._lost = False

    def stored(self, keys: KeyArray, fidelities: NDArray[np.uint8]) -> None:
        """Distinct keys that can be read now."""
        for fidelity in np.unique(fidelities).tolist():
            self._add(ChangeKind.STORED, keys[fidelities == fidelity], Fidelity(fidelity))

    def removed(self, keys: KeyArray) -> None:
        """Keys that can't be read any more."""
        self._add(ChangeKind.REMOVED, keys, Fidelity.EXACT)

    def take(self) -> SsdChanges:
        """All of them; they are forgotten here."""
        taken = SsdChanges(tuple(self._changes), self._lost)
        self._changes, self._keys, self._lost = [], 0, False
        return taken

    def _add(self, kind: ChangeKind, keys: KeyArray, fidelity: Fidelity) -> None:
        if self._lost or not len(keys):
            return
        self._keys += len(keys)
        if self._keys > self._keys_max:
            self._changes, self._lost = [], True
            return
        self._changes.append(BlockChange(kind, keys.tobytes(), fidelity))
