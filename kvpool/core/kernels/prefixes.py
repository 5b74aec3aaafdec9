"""Heaps of the leaves of prefixes, one a class: the loops of the prefix policy. Functions over arrays only.

`state` is int16 (entries) as in `kernels.evictors`, its use being reads (1..15). `place` is int32 (entries): >= 0 is a
position in the heap of its class; LEAF_OUTSIDE a hidden leaf; below that, -place - 1 is the number of its children.
`keys` is uint32 (entries), the value; heaps order by (key, entry). `parents` is int32 (entries). `births` is uint32
(entries), the clock at insertion: a link to a parent holds only if that was born before, so links form no cycle, and
one to an index that names another block by now is void. `weights` is uint8 (entries), in sixteenths of the mean.
`heaps` is int32, a region a class; `table` is int64 (4, classes): region's start, entries in the heap, its room,
residents. `scalars` is int64 (2): clock, mean weight in 1/256.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

from kvpool.core.kernels.evictors import CLASS_MASK, HIDDEN, USE_MAX, USE_SHIFT

I64: TypeAlias = NDArray[np.int64]
I32: TypeAlias = NDArray[np.int32]
I16: TypeAlias = NDArray[np.int16]
U32: TypeAlias = NDArray[np.uint32]
U8: TypeAlias = NDArray[np.uint8]

START, SIZE, ROOM, RESIDENTS = range(4)
CLOCK, MEAN = range(2)
LEAF_OUTSIDE: Final = -1
NO_PARENT: Final = -1
#: A worth of at most so many stamps, so that keys fit 32 bits while the clock is below CLOCK_MAX.
BONUS_MAX: Final = 1 << 30
CLOCK_MAX: Final = 1 << 31

_jit = numba.njit(cache=True, nogil=True)


@_jit
def _first(keys: U32, a: np.int64, b: np.int64) -> bool:
    """Whether entry a goes before entry b."""
    return bool(keys[a] < keys[b] or (keys[a] == keys[b] and a < b))


@_jit
def _up(entry: np.int64, at: np.int64, start: np.int64, heaps: I32, keys: U32, place: I32) -> None:
    while at > 0:
        above = (at - 1) >> 1
        other = np.int64(heaps[start + above])
        if not _first(keys, entry, other):
            break
        heaps[start + at] = other
        place[other] = at
        at = above
    heaps[start + at] = entry
    place[entry] = at


@_jit
def _down(entry: np.int64, at: np.int64, start: np.int64, size: np.int64, heaps: I32, keys: U32, place: I32) -> None:
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size and _first(keys, np.int64(heaps[start + below + 1]), np.int64(heaps[start + below])):
            below += 1
        other = np.int64(heaps[start + below])
        if not _first(keys, other, entry):
            break
        heaps[start + at] = other
        place[other] = at
        at = below
    heaps[start + at] = entry
    place[entry] = at


@_jit
def _push(entry: np.int64, heaps: I32, table: I64, keys: U32, place: I32, state: I16) -> None:
    number = state[entry] & CLASS_MASK
    at = table[SIZE, number]
    table[SIZE, number] = at + 1
    _up(entry, at, table[START, number], heaps, keys, place)


@_jit
def _settle(entry: np.int64, heaps: I32, table: I64, keys: U32, place: I32, state: I16) -> None:
    """Puts an entry of a heap where its key belongs."""
    number = state[entry] & CLASS_MASK
    start = table[START, number]
    _up(entry, np.int64(place[entry]), start, heaps, keys, place)
    _down(entry, np.int64(place[entry]), start, table[SIZE, number], heaps, keys, place)


@_jit
def _pull(entry: np.int64, heaps: I32, table: I64, keys: U32, place: I32, state: I16) -> None:
    """Takes an entry out of its heap; it is a leaf outside then."""
    number, at = state[entry] & CLASS_MASK, np.int64(place[entry])
    size = table[SIZE, number] - 1
    table[SIZE, number] = size
    last = np.int64(heaps[table[START, number] + size])
    place[entry] = LEAF_OUTSIDE
    if last != entry:
        heaps[table[START, number] + at] = last
        place[last] = at
        _settle(last, heaps, table, keys, place, state)


@_jit
def _parent_of(entry: np.int64, parents: I32, births: U32, state: I16) -> np.int64:
    """The resident parent, or NO_PARENT."""
    parent = np.int64(parents[entry])
    if parent >= 0 and state[parent] >= 0 and births[parent] < births[entry]:
        return parent
    return np.int64(NO_PARENT)


@_jit
def _worth(weight: np.int64, reads: np.int64, period: np.int64) -> np.int64:
    """What weight and reads add to the last use, in stamps.

    The first use is worth little, or what was read twice would keep all that is new from ever being read again; the
    second is worth an eighth of a period, and of later ones each is worth more, up to four periods.
    """
    again = min(1 + 4 * (reads - 1) * (reads - 1), np.int64(128))
    return min(period * weight * again >> 9, np.int64(BONUS_MAX))


@_jit
def reprice(old: np.int64, new: np.int64, keys: U32, weights: U8, state: I16) -> None:
    """Keys for another period; the heaps are to be made anew."""
    for entry in range(len(state)):
        if state[entry] >= 0:
            weight, reads = np.int64(weights[entry]), np.int64(state[entry] >> USE_SHIFT)
            last_use = np.int64(keys[entry]) - _worth(weight, reads, old)
            keys[entry] = max(last_use + _worth(weight, reads, new), np.int64(0))


@_jit
def _note_weight(weight: np.int64, scalars: I64) -> np.int64:
    """Weight in sixteenths of the running mean, 1..255."""
    scaled = weight << 8
    if scalars[MEAN] == 0:
        scalars[MEAN] = scaled
    scalars[MEAN] += (scaled - scalars[MEAN]) // 64
    return min(max((weight << 12) // max(scalars[MEAN], 1), 1), 255)


@_jit
def prefix_insert(
    entries: I32, classes: I32, new_parents: I32, new_weights: U32, period: np.int64, place: I32, keys: U32,
    parents: I32, births: U32, weights: U8, state: I16, heaps: I32, table: I64, scalars: I64,
) -> np.int64:  # fmt: skip
    """Adds new entries in prompt order; returns how many were new. Their heaps have room."""
    count = len(entries)
    clock = scalars[CLOCK]
    for i in range(count):
        entry = np.int64(entries[i])
        if state[entry] >= 0:
            return np.int64(i)
        state[entry] = classes[i] | (1 << USE_SHIFT)
        place[entry] = LEAF_OUTSIDE
        births[entry] = clock + i
        weights[entry] = _note_weight(np.int64(new_weights[i]), scalars)
        # Of what is used together the tail counts as used before the head.
        keys[entry] = clock + count - 1 - i + _worth(np.int64(weights[entry]), np.int64(1), period)
        parents[entry] = NO_PARENT
        parent = np.int64(new_parents[i])
        if 0 <= parent < len(state) and parent != entry and state[parent] >= 0:
            parents[entry] = parent
            if place[parent] >= 0:
                _pull(parent, heaps, table, keys, place, state)
            place[parent] -= 1
        _push(entry, heaps, table, keys, place, state)
    scalars[CLOCK] = clock + count
    return np.int64(count)


@_jit
def prefix_touch(
    entries: I32, period: np.int64, place: I32, keys: U32, weights: U8, state: I16, heaps: I32, table: I64,
    scalars: I64,
) -> np.int64:  # fmt: skip
    """Entries were read, the last of the batch first; returns how many were there."""
    for i in range(len(entries) - 1, -1, -1):
        entry = np.int64(entries[i])
        if state[entry] < 0:
            return np.int64(len(entries) - 1 - i)
        weight, reads = np.int64(weights[entry]), np.int64(state[entry] >> USE_SHIFT)
        age = scalars[CLOCK] - (np.int64(keys[entry]) - _worth(weight, reads, period))
        halvings = min(int(age // period), 4)
        reads = min((reads >> halvings) + 1, np.int64(USE_MAX))
        state[entry] = (state[entry] & (CLASS_MASK | HIDDEN)) | (reads << USE_SHIFT)
        keys[entry] = scalars[CLOCK] + _worth(weight, reads, period)
        scalars[CLOCK] += 1
        if place[entry] >= 0:
            _settle(entry, heaps, table, keys, place, state)
    return np.int64(len(entries))


@_jit
def prefix_hide(entries: I32, place: I32, keys: U32, state: I16, heaps: I32, table: I64) -> np.int64:
    """Hides entries; returns how many were there and shown."""
    for i in range(len(entries)):
        entry = np.int64(entries[i])
        if state[entry] < 0 or state[entry] & HIDDEN:
            return np.int64(i)
        state[entry] |= HIDDEN
        if place[entry] >= 0:
            _pull(entry, heaps, table, keys, place, state)
    return np.int64(len(entries))


@_jit
def prefix_show(entries: I32, place: I32, keys: U32, state: I16, heaps: I32, table: I64) -> np.int64:
    """Shows entries; returns how many were there and hidden."""
    for i in range(len(entries)):
        entry = np.int64(entries[i])
        if state[entry] < 0 or not state[entry] & HIDDEN:
            return np.int64(i)
        state[entry] &= ~HIDDEN
        if place[entry] == LEAF_OUTSIDE:
            _push(entry, heaps, table, keys, place, state)
    return np.int64(len(entries))


@_jit
def prefix_remove(
    entries: I32, place: I32, keys: U32, parents: I32, births: U32, state: I16, heaps: I32, table: I64
) -> np.int64:
    """Takes entries out; a parent whose last child goes is a leaf. Returns how many were there."""
    for i in range(len(entries)):
        entry = np.int64(entries[i])
        if state[entry] < 0:
            return np.int64(i)
        if place[entry] >= 0:
            _pull(entry, heaps, table, keys, place, state)
        parent = _parent_of(entry, parents, births, state)
        if parent >= 0:
            place[parent] += 1
            if place[parent] == LEAF_OUTSIDE and not state[parent] & HIDDEN:
                _push(parent, heaps, table, keys, place, state)
        table[RESIDENTS, state[entry] & CLASS_MASK] -= 1
        state[entry] = -1
    return np.int64(len(entries))


@_jit
def _candidate_up(queue: I32, size: np.int64, entry: np.int64, keys: U32) -> None:
    """Adds an entry to a heap of candidates of `size`."""
    at = size
    while at > 0 and _first(keys, entry, np.int64(queue[(at - 1) >> 1])):
        queue[at] = queue[(at - 1) >> 1]
        at = (at - 1) >> 1
    queue[at] = entry


@_jit
def _candidate_pop(queue: I32, size: np.int64, keys: U32) -> np.int64:
    """Takes the first of a heap of candidates of `size`."""
    top, entry = np.int64(queue[0]), np.int64(queue[size - 1])
    size -= 1
    at = 0
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size and _first(keys, np.int64(queue[below + 1]), np.int64(queue[below])):
            below += 1
        if not _first(keys, np.int64(queue[below]), entry):
            break
        queue[at] = queue[below]
        at = below
    queue[at] = entry
    return top


@_jit
def prefix_victims(
    slot_class: np.int64, place: I32, keys: U32, parents: I32, births: U32, state: I16, heaps: I32, table: I64,
    out: I32,
) -> np.int64:  # fmt: skip
    """Fills `out` with the entries that go one after the other; returns how many there are.

    Candidates are leaves whose forerunners in the heap were taken, and parents whose last child was; children are
    counted down meanwhile, and up again at the end.
    """
    start, size = table[START, slot_class], table[SIZE, slot_class]
    # Each one taken brings two of the heap and a parent at most.
    queue = np.empty(2 * len(out) + 3, dtype=np.int32)
    waiting = filled = 0
    if size > 0:
        queue[0] = heaps[start]
        waiting = 1
    while filled < len(out) and waiting > 0:
        entry = _candidate_pop(queue, np.int64(waiting), keys)
        waiting -= 1
        out[filled] = entry
        filled += 1
        if place[entry] >= 0:
            for below in range(2 * place[entry] + 1, min(2 * place[entry] + 3, size)):
                _candidate_up(queue, np.int64(waiting), np.int64(heaps[start + below]), keys)
                waiting += 1
        parent = _parent_of(entry, parents, births, state)
        if parent >= 0:
            place[parent] += 1
            free = place[parent] == LEAF_OUTSIDE and not state[parent] & HIDDEN
            if free and state[parent] & CLASS_MASK == slot_class:
                _candidate_up(queue, np.int64(waiting), parent, keys)
                waiting += 1
    for i in range(filled):
        parent = _parent_of(np.int64(out[i]), parents, births, state)
        if parent >= 0:
            place[parent] -= 1
    return np.int64(filled)


@_jit
def prefix_together(order: I64, entries: I32, place: I32, parents: I32, births: U32, state: I16, out: I64) -> None:
    """out[i] = 1 where entries[i] may go if the others do. `order` is by birth, the youngest first; no duplicates."""
    for i in order:
        entry = np.int64(entries[i])
        out[i] = 0
        if state[entry] >= 0 and not state[entry] & HIDDEN and place[entry] >= LEAF_OUTSIDE:
            out[i] = 1
            parent = _parent_of(entry, parents, births, state)
            if parent >= 0:
                place[parent] += 1
    for i in order:
        if out[i]:
            parent = _parent_of(np.int64(entries[i]), parents, births, state)
            if parent >= 0:
                place[parent] -= 1


@_jit
def prefix_next_class(keys: U32, heaps: I32, table: I64) -> np.int64:
    """The class of the first of all leaves, or -1."""
    best, leaf = -1, np.int64(-1)
    for number in range(table.shape[1]):
        if table[SIZE, number] > 0:
            top = np.int64(heaps[table[START, number]])
            if best < 0 or _first(keys, top, leaf):
                best, leaf = number, top
    return np.int64(best)


@_jit
def heapify(heaps: I32, table: I64, keys: U32, place: I32) -> None:
    """Orders all heaps anew."""
    for number in range(table.shape[1]):
        for at in range(table[SIZE, number] // 2 - 1, -1, -1):
            entry = np.int64(heaps[table[START, number] + at])
            _down(entry, np.int64(at), table[START, number], table[SIZE, number], heaps, keys, place)
