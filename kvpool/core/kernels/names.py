"""Comparing the names of many objects with those that lie behind their bytes in a segment."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

U64: TypeAlias = NDArray[np.uint64]
U8: TypeAlias = NDArray[np.uint8]
Bools: TypeAlias = NDArray[np.bool_]


@njit(nogil=True, cache=True)
def keep_equal(data: U8, begins: U64, sizes: U64, wanted: U8, ends: U64, kept: Bools) -> None:
    """Clears `kept[i]` unless `sizes[i]` bytes of `data` at `begins[i]` are name i of `wanted`.

    Reads nothing of rows that are not kept, whatever they say; those that are must lie inside of `data`. Bytes may
    change meanwhile: whoever reads the object afterwards has to look whether it is still the same.

    Args:
        data, wanted: read-only.
        wanted: all names, one behind the other; ends: uint64 (n), where each ends.
    """
    begin = np.uint64(0)
    for i in range(len(kept)):
        end = ends[i]
        if kept[i]:
            size = end - begin
            same = sizes[i] == size
            at = np.uint64(0)
            while same and at < size:
                same = data[begins[i] + at] == wanted[begin + at]
                at += np.uint64(1)
            kept[i] = same
        begin = end


def warm_up() -> None:
    """Runs the kernel once: compiled, or loaded from the cache."""
    one, nothing = np.zeros(1, dtype=np.uint64), np.frombuffer(b"\0", dtype=np.uint8)
    keep_equal(nothing, one, one, nothing, one, np.zeros(1, dtype=np.bool_))
