"""What was removed lately: so that a copy under way does not bring it back under the same name.

Objects only: a block is named by what it holds, and may always come back. Belongs to the event loop of the source.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ids import KeyArray
from kvpool.core.index import split_keys
from kvpool.core.source import SourceCore

#: Of notes; beyond it the oldest is forgotten, and whoever asks for that far back is told that all was removed.
NOTED_BYTES_MAX = 4 << 20
_NOTE_BYTES = 256


@dataclass(frozen=True, eq=False)
class _Note:
    """One removal of a namespace: of keys, or with None of all names that begin so."""

    number: int
    namespace_id: bytes
    keys: KeyArray | None
    name_prefix: bytes

    @property
    def size(self) -> int:
        return _NOTE_BYTES + len(self.name_prefix) + (0 if self.keys is None else self.keys.nbytes)


class Removals:
    """Removals in the order in which they were carried out, whether or not anything was there."""

    def __init__(self, bytes_max: int = NOTED_BYTES_MAX) -> None:
        self._notes: deque[_Note] = deque()
        self._bytes, self._bytes_max = 0, bytes_max
        self._last = self._forgotten = 0

    def mark(self) -> int:
        """Now, for `since`: taken before what may be removed is looked at."""
        return self._last

    def note(self, namespace_id: bytes, keys: KeyArray | None, name_prefix: bytes = b"") -> None:
        """To be called in the turn that removes: keys, or with None all of a namespace whose names begin so."""
        self._last += 1
        note = _Note(self._last, namespace_id, keys, name_prefix)
        self._notes.append(note)
        self._bytes += note.size
        while self._bytes > self._bytes_max:
            oldest = self._notes.popleft()
            self._bytes -= oldest.size
            self._forgotten = oldest.number

    def since(self, mark: int, namespace_id: bytes, keys: KeyArray, names: Sequence[bytes]) -> NDArray[np.bool_]:
        """Which objects were removed after a mark, or may have been; bool (keys,)."""
        removed = np.full(len(keys), mark < self._forgotten, dtype=np.bool_)
        rows = {key: row for row, key in enumerate(split_keys(keys))}
        halves = _first_halves(keys)
        for note in reversed(self._notes):
            if note.number <= mark or removed.all():
                break
            if note.namespace_id != namespace_id:
                continue
            if note.keys is None:
                removed |= np.fromiter((n.startswith(note.name_prefix) for n in names), np.bool_, len(names))
                continue
            # There may be 65536 of them; those that are none of ours are mostly told by their halves already.
            some = note.keys[np.isin(_first_halves(note.keys), halves)]
            removed[[rows[key] for key in split_keys(some) if key in rows]] = True
        return removed


def _first_halves(keys: KeyArray) -> NDArray[np.uint64]:
    return np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)[:, 0]


_OF_CORES: weakref.WeakKeyDictionary[SourceCore, Removals] = weakref.WeakKeyDictionary()


def removals_of(core: SourceCore) -> Removals:
    """The removals of a source, for all that serve it."""
    return _OF_CORES.setdefault(core, Removals())
