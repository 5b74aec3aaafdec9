"""Names of objects: they lie in an object's slot, behind its bytes, so that they outlive the process with it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import SourceArrays
from kvpool.core.errors import Unsupported
from kvpool.core.index import Entries

#: Names whose beginnings are compared at a time.
_CHUNK = 65_536


class Names:
    """Reads and writes names in a segment. `data`: uint8, the segment's; None = it holds no objects."""

    def __init__(self, arrays: SourceArrays, data: NDArray[np.uint8] | None) -> None:
        self._arrays, self._data = arrays, data

    def check_supported(self) -> None:
        """Raises: Unsupported."""
        if self._data is None:
            raise Unsupported("this source holds blocks only", hint="put objects to a node")

    def write(self, entries: Entries, names: list[bytes]) -> None:
        """Writes names behind the bytes of blocks that are to be written."""
        assert self._data is not None
        begins = self._begins(entries)
        for begin, name in zip(begins.tolist(), names, strict=True):
            self._data[begin : begin + len(name)] = np.frombuffer(name, dtype=np.uint8)

    def of(self, entries: Entries) -> list[bytes]:
        """The names of entries; empty for blocks."""
        lengths = self._arrays.name_bytes[entries].tolist()
        if self._data is None or not any(lengths):
            return [b""] * len(lengths)
        begins = self._begins(entries).tolist()
        return [self._data[begin : begin + length].tobytes() for begin, length in zip(begins, lengths, strict=True)]

    def equal(self, entries: Entries, names: list[bytes]) -> NDArray[np.bool_]:
        """Which entries have exactly these names; bool (n)."""
        found = (mine == name for mine, name in zip(self.of(entries), names, strict=True))
        return np.fromiter(found, dtype=np.bool_, count=len(names))

    def begin_with(self, entries: Entries, prefix: bytes) -> NDArray[np.bool_]:
        """Which entries are objects whose names begin so; bool (n)."""
        result = np.zeros(len(entries), dtype=np.bool_)
        if self._data is None:
            return result
        wanted = np.frombuffer(prefix, dtype=np.uint8)
        rows = np.flatnonzero(self._arrays.name_bytes[entries] >= max(len(prefix), 1))
        for first in range(0, len(rows), _CHUNK):
            part = rows[first : first + _CHUNK]
            alike = np.ones(len(part), dtype=np.bool_)
            begins = self._begins(entries[part])
            for at, byte in enumerate(wanted.tolist()):
                still = np.flatnonzero(alike)
                alike[still] = self._data[begins[still] + at] == byte
            result[part] = alike
        return result

    def _begins(self, entries: Entries) -> NDArray[np.int64]:
        a = self._arrays
        return a.offsets[entries].astype(np.int64) + a.sizes[entries].astype(np.int64)
