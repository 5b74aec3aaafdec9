"""Who holds which run of a prompt's blocks, sorted out without an object for each. Pure; numba kernels.

Runs are rows of int32: number of the source, first block, count, fidelity. The plain oracles are in the tests.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Runs = NDArray[np.int32]

_jit = numba.njit(cache=True, nogil=True)
NUMBER, FIRST, COUNT, FIDELITY = range(4)
#: Rows of what `offer` fills. Of a host: the end of the furthest run there, and by how many at least a source there is
#: shared. Of a block: by how many at least a source is shared that has a run which ends behind it, that one's host, and
#: the same of all other hosts. Shared by 0 = there is none.
REACH, CROWD = range(2)
LEAST, LEAST_HOST, OTHER, OTHER_HOST = range(4)
#: int() of a narrow word may stay narrow in a kernel.
_wide: Any = np.int64


@_jit
def sort_out(rows: Runs, readable: Bools, fidelity_max: int, lead: Ints) -> tuple[Runs, bool]:
    """Runs of sources that may be read; fills `lead` (sources) with the blocks that each holds from the first on.

    Args:
        rows: (n, 4); sources beyond the length of `lead` are unknown and left out.
        fidelity_max: runs of a higher one are left out.
    Returns: runs in the order of `rows`, and whether some source's runs touch: `lead` is too short then.
    """
    kept = np.empty((len(rows), 4), np.int32)
    count = 0
    for i in range(len(rows)):
        number = rows[i, NUMBER]
        if number >= len(lead) or rows[i, FIDELITY] > fidelity_max:
            continue
        if rows[i, FIRST] == 0:
            lead[number] = rows[i, COUNT]
        if readable[number]:
            kept[count] = rows[i]
            count += 1
    touching = False
    for i in range(len(rows)):
        number = rows[i, NUMBER]
        if number < len(lead) and rows[i, FIRST] > 0 and rows[i, FIDELITY] <= fidelity_max:
            touching |= rows[i, FIRST] <= lead[number]
    return kept[:count], touching


@_jit
def _before(key: tuple[int, int, int], keys: Ints, at: int) -> bool:
    for i in range(3):
        if key[i] != keys[at, i]:
            return key[i] < keys[at, i]
    return False


@_jit
def furthest_by_host(rows: Runs, rank: Ints, hosts: Ints, host_count: int, count: int) -> tuple[Runs, Ints]:
    """For each host what `furthest` finds there.

    Returns: (host_count * count, 4), runs; (2, host_count), how many are found, and where the furthest ends.
    """
    best = np.empty((host_count * count, 4), np.int32)
    keys = np.empty((host_count * count, 3), np.int64)
    found = np.zeros((2, host_count), np.int64)
    for i in range(len(rows)):
        number = rows[i, NUMBER]
        begin, n = hosts[number] * count, found[0, hosts[number]]
        key = (-(_wide(rows[i, FIRST]) + _wide(rows[i, COUNT])), rank[number], _wide(rows[i, FIRST]))
        if n == count and not _before(key, keys, begin + n - 1):
            continue
        at = begin + (n if n < count else count - 1)
        while at > begin and _before(key, keys, at - 1):
            keys[at], best[at] = keys[at - 1], best[at - 1]
            at -= 1
        keys[at, 0], keys[at, 1], keys[at, 2] = key
        best[at] = rows[i]
        found[0, hosts[number]] = min(n + 1, count)
        found[1, hosts[number]] = max(found[1, hosts[number]], -key[0])
    return best, found


@_jit
def furthest(rows: Runs, rank: Ints, count: int) -> Runs:
    """At most `count` runs, those that reach furthest first, then by rank of the source, then by first block."""
    everywhere = np.zeros(len(rank), np.int64)
    best, found = furthest_by_host(rows, rank, everywhere, 1, count)
    return best[: found[0, 0]]


@_jit
def _keep(crowd: int, host: int, behind: Ints, at: int) -> None:
    """Keeps the least crowd at one block, and the least of other hosts."""
    if crowd == 0:
        return
    if behind[LEAST, at] > 0 and behind[LEAST_HOST, at] == host:
        behind[LEAST, at] = min(behind[LEAST, at], crowd)
    elif behind[LEAST, at] == 0 or crowd < behind[LEAST, at]:
        behind[OTHER, at], behind[OTHER_HOST, at] = behind[LEAST, at], behind[LEAST_HOST, at]
        behind[LEAST, at], behind[LEAST_HOST, at] = crowd, host
    elif behind[OTHER, at] == 0 or crowd < behind[OTHER, at]:
        behind[OTHER, at], behind[OTHER_HOST, at] = crowd, host


@_jit
def offer(rows: Runs, hosts: Ints, crowds: Ints, near: Ints, behind: Ints) -> None:
    """Takes in runs that may be read: where there are sources, and how crowded they are at least.

    Where a run begins is left out: what is found is for bounds, and only gets lower by that.

    Args:
        rows: (n, 4).
        hosts, crowds: (sources), where each is, and by how many it would be shared, at least 1.
        near: (2, hosts + 1), REACH and CROWD; the last is of no host.
        behind: (4, blocks), LEAST and so on; whole once `settle` has been called.
    """
    for i in range(len(rows)):
        number = rows[i, NUMBER]
        host, crowd, end = hosts[number], crowds[number], rows[i, FIRST] + rows[i, COUNT]
        if end <= 0:
            continue
        near[REACH, host] = max(near[REACH, host], end)
        if near[CROWD, host] == 0 or crowd < near[CROWD, host]:
            near[CROWD, host] = crowd
        _keep(crowd, host, behind, min(end, behind.shape[1]) - 1)


@_jit
def settle(behind: Ints) -> None:
    """Whoever has a run that ends behind a block has one that ends behind those before it."""
    for at in range(behind.shape[1] - 2, -1, -1):
        _keep(behind[LEAST, at + 1], behind[LEAST_HOST, at + 1], behind, at)
        _keep(behind[OTHER, at + 1], behind[OTHER_HOST, at + 1], behind, at)


def warm_up() -> None:
    """Compiles, or loads what was compiled: not while somebody waits for a place."""
    rows, none, yes = np.zeros((1, 4), np.int32), np.zeros(1, np.int64), np.ones(1, bool)
    sort_out(rows, yes, 0, none)
    furthest(rows, none, 1)
    furthest_by_host(rows, none, none, 1, 1)
    near, behind = np.zeros((2, 2), np.int64), np.zeros((4, 1), np.int64)
    offer(rows, none, none, near, behind)
    settle(behind)
