"""Runs of neighbouring spans: what it would cost to empty them. Functions over arrays only.

A *piece* is a span or a free unit; pieces stand in order of address and leave no gap.
"""

from __future__ import annotations

from typing import TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

U64: TypeAlias = NDArray[np.uint64]
U8: TypeAlias = NDArray[np.uint8]
I32: TypeAlias = NDArray[np.int32]
I64: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

_jit = numba.njit(cache=True, nogil=True)


@_jit
def used_entries(
    states: U8, offsets: U64, unit_bytes: np.int64, piece_of_unit: I32, readable_state: int, entries: I32,
    piece_of_entry: I32, readable: Bools,
) -> np.int64:  # fmt: skip
    """Entries that are not free, the piece that each lies in, and whether it is readable; returns how many.

    entries, piece_of_entry, readable: as long as `states`.
    """
    count = 0
    for entry in range(len(states)):
        if states[entry] != 0:
            entries[count] = entry
            piece_of_entry[count] = piece_of_unit[np.int64(offsets[entry]) // unit_bytes]
            readable[count] = states[entry] == readable_state
            count += 1
    return np.int64(count)


@_jit
def price_pieces(piece_of_entry: I32, may_go: Bools, ranks: U64, worst: U64, blocks: I64, blocked: Bools) -> None:
    """Of each piece: the highest rank of its entries, how many they are, and whether one of them may not go.

    piece_of_entry, may_go, ranks: (n), a row a used entry; worst, blocks, blocked: (pieces), zero before.
    """
    for i in range(len(piece_of_entry)):
        piece = piece_of_entry[i]
        blocks[piece] += 1
        worst[piece] = max(worst[piece], ranks[i])
        if not may_go[i]:
            blocked[piece] = True


@_jit
def price_windows(
    units: I64, worst: U64, blocks: I64, blocked: Bools, need: np.int64, last: I64, window_worst: U64, total: I64
) -> None:
    """The shortest run of pieces from each piece on that has `need` units and may be emptied.

    Args:
        units, worst, blocks, blocked: (pieces).
        last: its last piece, or -1 where there is none; window_worst: the highest rank in it; total: its blocks.
    """
    count = len(units)
    queue = np.empty(count, dtype=np.int64)  # pieces of the window with falling ranks: the first is its worst
    head = tail = 0
    end = 0  # the window is first .. end - 1
    have = np.int64(0)
    inside = np.int64(0)
    for first in range(count):
        last[first] = -1
        if blocked[first]:
            end, head, tail, have, inside = first + 1, 0, 0, np.int64(0), np.int64(0)
            continue
        while have < need and end < count and not blocked[end]:
            while tail > head and worst[queue[tail - 1]] <= worst[end]:
                tail -= 1
            queue[tail] = end
            tail += 1
            have += units[end]
            inside += blocks[end]
            end += 1
        if have >= need:
            last[first] = end - 1
            window_worst[first] = worst[queue[head]]
            total[first] = inside
        if head < tail and queue[head] == first:
            head += 1
        have -= units[first]
        inside -= blocks[first]


@_jit
def pick_apart(order: I64, last: I64, count: np.int64, chosen: I64) -> np.int64:
    """Of windows in order of preference at most `count` that have no piece in common; returns how many."""
    taken = np.zeros(len(last), dtype=np.bool_)
    found = 0
    for i in range(len(order)):
        if found == count:
            break
        first = order[i]
        free = True
        for piece in range(first, last[first] + 1):
            free = free and not taken[piece]
        if free:
            taken[first : last[first] + 1] = True
            chosen[found] = first
            found += 1
    return np.int64(found)
