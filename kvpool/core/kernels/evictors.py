"""Lists over entries with an order of their own, and what the list policies do on them. Functions over arrays only.

`links` is int32 (2, entries + lists): next and previous; list l is a circle around the node entries + l, and its stamps
rise from the front on. `heads` is int64 (2, lists): a node with no shown entry before it in the list (or the circle's
own node), and the number of shown entries. `stamps` is int64 (entries). `state` is int16 (entries): -1 where there is
no block, otherwise class + HIDDEN + use << USE_SHIFT; `levels` maps use (0..15) to one of the `per_class` lists of a
class. `clock` is int64 (1). `period` is what a level is worth in stamps.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

I64: TypeAlias = NDArray[np.int64]
I32: TypeAlias = NDArray[np.int32]
I16: TypeAlias = NDArray[np.int16]
U16: TypeAlias = NDArray[np.uint16]
U32: TypeAlias = NDArray[np.uint32]
U64: TypeAlias = NDArray[np.uint64]

CLASS_MASK: Final = 1023
HIDDEN: Final = 1024
USE_SHIFT: Final = 11
USE_MAX: Final = 15
NEXT, PREVIOUS = range(2)
FRONT, SHOWN = range(2)

#: s3fifo: use = queue << 2 | reads, of which more than three count as three.
MAIN: Final = 4
READS: Final = 3
#: The small queue has one entry in so many.
SMALL_SHARE: Final = 10
#: So many entries are passed over for one victim; then the next goes whatever was read of it. Bounds a call.
PASSES_MAX: Final = 2048
GHOST_WAYS: Final = 4

_jit = numba.njit(cache=True, nogil=True)


@_jit
def _list_of(entry: np.int64, state: I16, levels: I64, per_class: np.int64) -> np.int64:
    return (state[entry] & CLASS_MASK) * per_class + levels[state[entry] >> USE_SHIFT]


@_jit
def _append(entry: np.int64, number: np.int64, links: I32, heads: I64, state: I16) -> None:
    node = links.shape[1] - heads.shape[1] + number
    last = links[PREVIOUS, node]
    links[NEXT, last], links[PREVIOUS, entry] = entry, last
    links[NEXT, entry], links[PREVIOUS, node] = node, entry
    if heads[FRONT, number] == node:
        heads[FRONT, number] = entry
    if not state[entry] & HIDDEN:
        heads[SHOWN, number] += 1


@_jit
def _unlink(entry: np.int64, number: np.int64, links: I32, heads: I64, state: I16) -> None:
    before, after = links[PREVIOUS, entry], links[NEXT, entry]
    links[NEXT, before], links[PREVIOUS, after] = after, before
    if heads[FRONT, number] == entry:
        heads[FRONT, number] = after
    if not state[entry] & HIDDEN:
        heads[SHOWN, number] -= 1


@_jit
def _shown_from(entry: np.int64, links: I32, state: I16) -> np.int64:
    """The entry if it is shown, or else the next that is, or the circle's node."""
    while entry < len(state) and state[entry] & HIDDEN:
        entry = np.int64(links[NEXT, entry])
    return np.int64(entry)


@_jit
def _front(number: np.int64, links: I32, heads: I64, state: I16) -> np.int64:
    """First shown entry of a list, or its node. Remembers it, so that hidden entries are skipped once."""
    heads[FRONT, number] = _shown_from(heads[FRONT, number], links, state)
    return heads[FRONT, number]


@_jit
def list_insert(
    entries: I32, classes: I32, uses: I64, links: I32, heads: I64, stamps: I64, state: I16, levels: I64,
    per_class: np.int64, clock: I64,
) -> np.int64:  # fmt: skip
    """Lists new entries, the last of the batch as the oldest. Returns how many were new."""
    for i in range(len(entries) - 1, -1, -1):
        entry = np.int64(entries[i])
        if state[entry] >= 0:
            return np.int64(len(entries) - 1 - i)
        state[entry] = classes[i] | (uses[i] << USE_SHIFT)
        stamps[entry] = clock[0]
        clock[0] += 1
        _append(entry, _list_of(entry, state, levels, per_class), links, heads, state)
    return np.int64(len(entries))


@_jit
def list_remove(entries: I32, links: I32, heads: I64, state: I16, levels: I64, per_class: np.int64) -> np.int64:
    """Takes entries out; returns how many were there."""
    for i in range(len(entries)):
        entry = np.int64(entries[i])
        if state[entry] < 0:
            return np.int64(i)
        _unlink(entry, _list_of(entry, state, levels, per_class), links, heads, state)
        state[entry] = -1
    return np.int64(len(entries))


@_jit
def list_hide(entries: I32, heads: I64, state: I16, levels: I64, per_class: np.int64) -> np.int64:
    """Hides entries where they are; returns how many were there and shown."""
    for i in range(len(entries)):
        entry = np.int64(entries[i])
        if state[entry] < 0 or state[entry] & HIDDEN:
            return np.int64(i)
        heads[SHOWN, _list_of(entry, state, levels, per_class)] -= 1
        state[entry] |= HIDDEN
    return np.int64(len(entries))


@_jit
def list_show(entries: I32, heads: I64, stamps: I64, state: I16, levels: I64, per_class: np.int64) -> np.int64:
    """Shows entries where they are; returns how many were there and hidden."""
    for i in range(len(entries)):
        entry = np.int64(entries[i])
        if state[entry] < 0 or not state[entry] & HIDDEN:
            return np.int64(i)
        state[entry] &= ~HIDDEN
        number = _list_of(entry, state, levels, per_class)
        front = heads[FRONT, number]
        if front >= len(state) or stamps[entry] < stamps[front]:
            heads[FRONT, number] = entry
        heads[SHOWN, number] += 1
    return np.int64(len(entries))


@_jit
def list_touch(
    entries: I32, counting: bool, period: np.int64, links: I32, heads: I64, stamps: I64, state: I16, levels: I64,
    per_class: np.int64, clock: I64,
) -> np.int64:  # fmt: skip
    """Moves entries to the young end, the last of the batch first; `counting`: their use is halved by age and raised.

    Returns how many were there.
    """
    for i in range(len(entries) - 1, -1, -1):
        entry = np.int64(entries[i])
        if state[entry] < 0:
            return np.int64(len(entries) - 1 - i)
        _unlink(entry, _list_of(entry, state, levels, per_class), links, heads, state)
        if counting:
            halvings = min((clock[0] - stamps[entry]) // period, 4)
            use = min(((state[entry] >> USE_SHIFT) >> halvings) + 1, USE_MAX)
            state[entry] = (state[entry] & (CLASS_MASK | HIDDEN)) | (use << USE_SHIFT)
        stamps[entry] = clock[0]
        clock[0] += 1
        _append(entry, _list_of(entry, state, levels, per_class), links, heads, state)
    return np.int64(len(entries))


@_jit
def list_victims(
    slot_class: np.int64, period: np.int64, links: I32, heads: I64, stamps: I64, state: I16, per_class: np.int64,
    out: I32,
) -> np.int64:  # fmt: skip
    """Fills `out` from the lists of a class, by stamp + level * period; returns how many there are."""
    at = np.empty(per_class, dtype=np.int64)
    for level in range(per_class):
        at[level] = _front(slot_class * per_class + level, links, heads, state)
    for filled in range(len(out)):
        best, best_rank = np.int64(-1), np.int64(0)
        for level in range(per_class):
            if at[level] < len(state):
                rank = stamps[at[level]] + level * period
                if best < 0 or rank < best_rank:
                    best, best_rank = np.int64(level), rank
        if best < 0:
            return np.int64(filled)
        out[filled] = at[best]
        at[best] = _shown_from(np.int64(links[NEXT, at[best]]), links, state)
    return np.int64(len(out))


@_jit
def list_next_class(period: np.int64, links: I32, heads: I64, stamps: I64, state: I16, per_class: np.int64) -> np.int64:
    """The class of the first of all fronts by stamp + level * period, or -1."""
    best, best_rank = np.int64(-1), np.int64(0)
    for number in range(heads.shape[1]):
        if heads[SHOWN, number] == 0:
            continue
        rank = stamps[_front(number, links, heads, state)] + (number % per_class) * period
        if best < 0 or rank < best_rank:
            best, best_rank = np.int64(number // per_class), rank
    return np.int64(best)


# ---------------------------------------------------------------- s3fifo


@_jit
def s3_rank(entry: np.int64, period: np.int64, stamps: I64, state: I16) -> np.int64:
    """Stamp of an entry, and a period for each time that its queue will pass it over; main counts one more."""
    use = state[entry] >> USE_SHIFT
    passes = 1 + (use & READS) if use & MAIN else np.int64((use & READS) > 1)
    return stamps[entry] + passes * period


@_jit
def s3_touch(entries: I32, state: I16) -> np.int64:
    """Notes reads; nothing moves. Returns how many entries were there."""
    for i in range(len(entries)):
        entry = entries[i]
        if state[entry] < 0:
            return np.int64(i)
        if (state[entry] >> USE_SHIFT) & READS < READS:
            state[entry] += 1 << USE_SHIFT
    return np.int64(len(entries))


@_jit
def s3_evictions(slot_class: np.int64, links: I32, heads: I64, state: I16, out: I32) -> tuple[np.int64, I64]:
    """What evicting from a class would do: victims in `out` (how many), and the moves to main on the way, in order.

    Moves are int64 (n, 2): entry and the reads that it has left. Source: Yang et al., FIFO queues are all you need for
    cache eviction, SOSP'23, algorithm 1. Entries that are hidden stay where they are.
    """
    small, main = slot_class * 2, slot_class * 2 + 1
    in_small, in_main = heads[SHOWN, small], heads[SHOWN, main]
    at_small, at_main = _front(small, links, heads, state), _front(main, links, heads, state)
    moves = np.empty((16, 2), dtype=np.int64)
    moved = again = passes = filled = 0
    while filled < len(out) and in_small + in_main > 0:
        if in_small > 0 and (in_main == 0 or in_small * SMALL_SHARE >= in_small + in_main):
            entry = at_small
            at_small = _shown_from(np.int64(links[NEXT, entry]), links, state)
            in_small -= 1
            stays = ((state[entry] >> USE_SHIFT) & READS) > 1
            reads = np.int64(0)
        else:
            if at_main < len(state):
                entry, reads = at_main, np.int64((state[at_main] >> USE_SHIFT) & READS)
                at_main = _shown_from(np.int64(links[NEXT, entry]), links, state)
            else:
                entry, reads = moves[again, 0], moves[again, 1]
                again += 1
            in_main -= 1
            stays = reads > 0
            reads -= 1
        if not stays or passes == PASSES_MAX:
            out[filled] = entry
            filled += 1
            passes = 0
            continue
        if moved == len(moves):
            longer = np.empty((2 * moved, 2), dtype=np.int64)
            longer[:moved] = moves
            moves = longer
        moves[moved, 0], moves[moved, 1] = entry, reads
        moved += 1
        passes += 1
        in_main += 1
    return np.int64(filled), moves[:moved]


@_jit
def s3_apply(moves: I64, links: I32, heads: I64, stamps: I64, state: I16, levels: I64, clock: I64) -> None:
    """Moves entries to the young end of main, with the reads that are left to them."""
    for i in range(len(moves)):
        entry = moves[i, 0]
        _unlink(entry, _list_of(entry, state, levels, 2), links, heads, state)
        state[entry] = (state[entry] & (CLASS_MASK | HIDDEN)) | ((MAIN | moves[i, 1]) << USE_SHIFT)
        stamps[entry] = clock[0]
        clock[0] += 1
        _append(entry, _list_of(entry, state, levels, 2), links, heads, state)


@_jit
def s3_next_class(period: np.int64, links: I32, heads: I64, stamps: I64, state: I16) -> np.int64:
    """The class whose next victim has the lowest rank, or -1."""
    best, best_rank = np.int64(-1), np.int64(0)
    out = np.empty(1, dtype=np.int32)
    for slot_class in range(heads.shape[1] // 2):
        if heads[SHOWN, 2 * slot_class] + heads[SHOWN, 2 * slot_class + 1] > 0:
            s3_evictions(slot_class, links, heads, state, out)
            rank = s3_rank(np.int64(out[0]), period, stamps, state)
            if best < 0 or rank < best_rank:
                best, best_rank = np.int64(slot_class), rank
    return np.int64(best)


@_jit
def fold(fingerprints: U64, out: U32) -> None:
    """32 well mixed bits of each fingerprint."""
    for i in range(len(fingerprints)):
        x = fingerprints[i] * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        out[i] = np.uint32(x >> np.uint64(32))


@_jit
def _ghost_place(print_: np.uint32, ghosts: U16) -> tuple[np.int64, np.uint16]:
    """The set of a fingerprint, and its tag: never 0, which stands for nothing."""
    sets = np.uint64(ghosts.shape[0])
    place = np.int64((np.uint64(print_) * sets) >> np.uint64(32))
    return place, np.uint16((np.uint64(print_) * np.uint64(0x9E3779B1)) & np.uint64(0xFFFF)) | np.uint16(1)


@_jit
def ghosts_add(prints: U32, ghosts: U16) -> None:
    """Remembers fingerprints; of a set the oldest is forgotten. ghosts: uint16 (sets, GHOST_WAYS), youngest first."""
    for i in range(len(prints)):
        place, tag = _ghost_place(prints[i], ghosts)
        for way in range(GHOST_WAYS - 1, 0, -1):
            ghosts[place, way] = ghosts[place, way - 1]
        ghosts[place, 0] = tag


@_jit
def ghosts_take(prints: U32, ghosts: U16, found: I64) -> None:
    """found[i] = 1 and forgotten if fingerprint i is remembered, else 0."""
    for i in range(len(prints)):
        place, tag = _ghost_place(prints[i], ghosts)
        found[i] = 0
        for way in range(GHOST_WAYS):
            if ghosts[place, way] == tag:
                for after in range(way, GHOST_WAYS - 1):
                    ghosts[place, after] = ghosts[place, after + 1]
                ghosts[place, GHOST_WAYS - 1] = 0
                found[i] = 1
                break
