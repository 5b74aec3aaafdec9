"""Open-addressing table from keys to entries, and linked lists over entries. Functions over arrays only.

`buckets` holds entry + 1, or 0 where empty; its length is a power of two. Removal shifts buckets back and leaves no
tombstones, so a table never degrades. A reader in another process may miss a key while its bucket moves, and that is
all: entries themselves do not move.
"""

from __future__ import annotations

from typing import TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

U64: TypeAlias = NDArray[np.uint64]
U32: TypeAlias = NDArray[np.uint32]
I32: TypeAlias = NDArray[np.int32]

_jit = numba.njit(cache=True, nogil=True)


@_jit
def _home(low: np.uint64, high: np.uint64, mask: np.uint64) -> np.uint64:
    x = (low ^ (high * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xD6E8FEB86659FD93)
    return (x ^ (x >> np.uint64(32))) & mask


@_jit
def table_lookup(keys: U64, buckets: U32, entry_keys: U64, out: I32) -> None:
    """out[i] = entry of keys[i], or -1. keys: (n, 2)."""
    mask = np.uint64(len(buckets) - 1)
    for i in range(len(keys)):
        low, high = keys[i, 0], keys[i, 1]
        at = _home(low, high, mask)
        out[i] = -1
        while True:
            slot = buckets[at]
            if slot == 0:
                break
            entry = np.int64(slot) - 1
            if entry_keys[entry, 0] == low and entry_keys[entry, 1] == high:
                out[i] = entry
                break
            at = (at + np.uint64(1)) & mask


@_jit
def table_insert(entries: I32, buckets: U32, entry_keys: U64) -> None:
    """Adds entries whose keys stand in `entry_keys` already and are not in the table."""
    mask = np.uint64(len(buckets) - 1)
    for i in range(len(entries)):
        entry = entries[i]
        at = _home(entry_keys[entry, 0], entry_keys[entry, 1], mask)
        while buckets[at] != 0:
            at = (at + np.uint64(1)) & mask
        buckets[at] = np.uint32(entry + 1)


@_jit
def table_remove(entries: I32, buckets: U32, entry_keys: U64) -> None:
    """Takes out entries; one that is not in the table is passed over."""
    mask = np.uint64(len(buckets) - 1)
    one = np.uint64(1)
    for i in range(len(entries)):
        entry = entries[i]
        hole = _home(entry_keys[entry, 0], entry_keys[entry, 1], mask)
        while buckets[hole] != 0 and buckets[hole] != np.uint32(entry + 1):
            hole = (hole + one) & mask
        if buckets[hole] == 0:
            continue
        at = hole
        while True:
            at = (at + one) & mask
            if buckets[at] == 0:
                break
            other = np.int64(buckets[at]) - 1
            home = _home(entry_keys[other, 0], entry_keys[other, 1], mask)
            # The bucket may move back if its home does not lie between the hole and itself.
            if ((at - home) & mask) >= ((at - hole) & mask):
                buckets[hole] = buckets[at]
                hole = at
        buckets[hole] = 0


@_jit
def list_append(entries: I32, sentinel: int, previous: I32, following: I32) -> None:
    """Puts entries, in order, at the young end of the circular list around `sentinel`."""
    for i in range(len(entries)):
        entry = entries[i]
        last = previous[sentinel]
        following[last] = entry
        previous[entry] = last
        following[entry] = sentinel
        previous[sentinel] = entry


@_jit
def list_unlink(entries: I32, previous: I32, following: I32) -> None:
    """Takes entries out of whatever list they are in; one that is in none stays so."""
    for i in range(len(entries)):
        entry = entries[i]
        before, after = previous[entry], following[entry]
        if after == -1:
            continue
        following[before] = after
        previous[after] = before
        previous[entry] = -1
        following[entry] = -1


@_jit
def list_oldest(sentinel: int, following: I32, out: I32) -> np.int64:
    """Fills `out` with the oldest entries; returns how many there are."""
    entry = following[sentinel]
    count = 0
    while entry != sentinel and count < len(out):
        out[count] = entry
        count += 1
        entry = following[entry]
    return np.int64(count)
