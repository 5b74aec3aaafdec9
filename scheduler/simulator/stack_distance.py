"""How recently each reference's block was used before: what an LRU cache of every size would hit, in one pass. Pure."""

from __future__ import annotations

import numba
import numpy as np

from scheduler.simulator.columns import Int64Array


def stack_distances(references: Int64Array) -> Int64Array:
    """Number of distinct blocks used since the last use of the same block, that block counted.

    An LRU cache of `capacity` blocks hits exactly the references with 0 < distance <= capacity.

    Args:
        references: block ids in order of use, int64 (n,).
    Returns: int64 (n,); 0 for a first use.
    Cost: O(n log n).
    Source: Mattson et al., Evaluation techniques for storage hierarchies, 1970; the counting tree is Fenwick's.
    """
    unique, dense = np.unique(references, return_inverse=True)
    return _distances(dense.astype(np.int64), len(unique))


@numba.njit(cache=True, nogil=True)
def _distances(dense: Int64Array, blocks: int) -> Int64Array:
    """`tree` counts, for times of use, those that are the last use of their block; it is a Fenwick tree."""
    n = len(dense)
    distances = np.zeros(n, np.int64)
    last = np.full(blocks, -1, np.int64)
    tree = np.zeros(n + 1, np.int64)
    live = 0
    for at in range(n):
        before = last[dense[at]]
        if before >= 0:
            older = 0
            k = before
            while k > 0:
                older += tree[k]
                k -= k & -k
            distances[at] = live - older
            k = before + 1
            while k <= n:
                tree[k] -= 1
                k += k & -k
        else:
            live += 1
        last[dense[at]] = at
        k = at + 1
        while k <= n:
            tree[k] += 1
            k += k & -k
    return distances
