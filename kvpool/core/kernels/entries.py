"""Open-addressing table from keys to entries. Functions over arrays only.

`buckets` holds entry + 1, or 0 where empty; its length is a power of two. Removal shifts buckets back and leaves no
tombstones, so a table never degrades. A reader in another process may miss a key while its bucket moves, and that is
all: entries themselves do not move. The version in the header is odd while buckets change, so that it can tell.
"""

from __future__ import annotations

from typing import TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import TABLE_VERSION
from kvpool.core.kernels.atomics import fence_stores, store_release

U64: TypeAlias = NDArray[np.uint64]
U32: TypeAlias = NDArray[np.uint32]
I32: TypeAlias = NDArray[np.int32]

_jit = numba.njit(cache=True, nogil=True)


@_jit
def order_stores() -> None:
    """What was stored before is seen by other processes before anything stored later."""
    fence_stores()


@_jit
def _begin_change(header: U64) -> None:
    store_release(header, TABLE_VERSION, header[TABLE_VERSION] | np.uint64(1))
    fence_stores()


@_jit
def _end_change(header: U64) -> None:
    store_release(header, TABLE_VERSION, (header[TABLE_VERSION] | np.uint64(1)) + np.uint64(1))


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
def table_insert(entries: I32, header: U64, buckets: U32, entry_keys: U64) -> None:
    """Adds entries whose keys stand in `entry_keys` already and are not in the table."""
    _begin_change(header)
    mask = np.uint64(len(buckets) - 1)
    for i in range(len(entries)):
        entry = entries[i]
        at = _home(entry_keys[entry, 0], entry_keys[entry, 1], mask)
        while buckets[at] != 0:
            at = (at + np.uint64(1)) & mask
        buckets[at] = np.uint32(entry + 1)
    _end_change(header)


@_jit
def table_rebuild(entries: I32, header: U64, buckets: U32, entry_keys: U64) -> None:
    """Makes a table of just these entries, whatever it held; their keys are distinct."""
    _begin_change(header)
    buckets[:] = np.uint32(0)
    table_insert(entries, header, buckets, entry_keys)


@_jit
def table_remove(entries: I32, header: U64, buckets: U32, entry_keys: U64) -> None:
    """Takes out entries; one that is not in the table is passed over."""
    _begin_change(header)
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
    _end_change(header)
