"""Replicas of blocks by key and by source: chained rows behind an open-addressing table. Functions over arrays only.

A row is one replica, 32 bytes: the key (two words of `rows`), then in `links`, the same memory as 32-bit words, the
next replica of the same key, the neighbours in the source's list, and source and fidelity. `heads` holds row + 1 of
each key's first replica, or 0 where empty. Removal shifts heads back instead of leaving tombstones.

A key's holders have a number: the marks of its replicas' owners, by exclusive or. Neighbours in a prompt mostly have
the same holders, and whoever looks sees that from the numbers instead of walking a chain of a thousand rows. `sets` has
it at a key's first row where there is a second one; of a single one the mark says it, and `sets` is not even written.
The plain oracles are in the tests: a dictionary of sets, and runs by definition.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]

ROW_WORDS = 4
#: Columns of `links`; the first four are the key.
NEXT, BEFORE, AFTER, OWNER = 4, 5, 6, 7
#: No row; as owner: a free row.
NIL = 0xFFFFFFFF
#: OWNER is source * FIDELITIES + fidelity.
FIDELITIES = 256

#: Fields of `meta`: rows ever used, first free row (-1: none), replicas, distinct keys.
USED, FREE, REPLICAS, DISTINCT = 0, 1, 2, 3

#: Heads are at most 3/5 full.
LOAD_NUMERATOR, LOAD_DENOMINATOR = 3, 5

#: Heads that are moved together.
_STEP = 256
#: Keys whose heads are asked for ahead of their turn.
_AHEAD = 12

#: Holders of a key that were read before, by their number: words of a row of `recent`, owners from RECENT_FIRST on.
RECENT_SET, RECENT_COUNT, RECENT_FIRST = 0, 1, 2
#: Fewer holders than this are read faster than remembered.
RECENT_MIN = 32

_jit = numba.njit(cache=True, nogil=True)
#: int() of an unsigned word stays unsigned in a kernel, and mixed with a signed one becomes a float.
signed: Any = np.int64


@_jit
def _home(low: np.uint64, high: np.uint64, slots: int) -> int:
    x = (low ^ (high * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xD6E8FEB86659FD93)
    # The high half spread over any number of slots: tables need not grow by powers of two.
    return signed(((x >> np.uint64(32)) * np.uint64(slots)) >> np.uint64(32))


@_jit
def _find(rows: U64, heads: U32, low: np.uint64, high: np.uint64) -> tuple[int, int]:
    """The key's slot and first row; row -1 if there is none, the slot is then where it would go."""
    slots = len(heads)
    at = _home(low, high, slots)
    while heads[at] != 0:
        row = signed(heads[at]) - 1
        if rows[row, 0] == low and rows[row, 1] == high:
            return at, row
        at += 1
        if at == slots:
            at = 0
    return at, -1


@_jit
def _mark(owner: np.uint32) -> np.uint64:
    """64 well mixed bits of source and fidelity, never 0. Source: Steele et al., OOPSLA'14, SplitMix (finalizer)."""
    x = (np.uint64(owner) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_jit
def _set_of(links: U32, sets: U64, head: int) -> np.uint64:
    """The number of a key's holders, by its first row."""
    return _mark(links[head, OWNER]) if links[head, NEXT] == NIL else sets[head]


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Asks for array[index] of a contiguous array: what is read later lies in the cache then."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@_jit
def _ask_for(rows: U64, heads: U32, keys: U64, i: int) -> None:
    """Asks for what key `i` + `_AHEAD` needs: its head, and when that must be there, the row that it names."""
    if i + _AHEAD < len(keys):
        _prefetch(heads, _home(keys[i + _AHEAD, 0], keys[i + _AHEAD, 1], len(heads)))
    if i + _AHEAD // 2 < len(keys):
        i += _AHEAD // 2
        head = heads[_home(keys[i, 0], keys[i, 1], len(heads))]
        if head != 0:
            _prefetch(rows, ROW_WORDS * (signed(head) - 1))


@_jit
def _close_gap(rows: U64, heads: U32, hole: int) -> None:
    """Empties a slot and moves those behind it that would no longer be found."""
    slots = len(heads)
    at = hole
    while True:
        at += 1
        if at == slots:
            at = 0
        if heads[at] == 0:
            break
        row = signed(heads[at]) - 1
        home = _home(rows[row, 0], rows[row, 1], slots)
        from_home = at - home if at >= home else at - home + slots
        from_hole = at - hole if at >= hole else at - hole + slots
        if from_home >= from_hole:
            heads[hole] = heads[at]
            hole = at
    heads[hole] = 0


@_jit
def _unmark(links: U32, sets: U64, head: int, row: int) -> None:
    """Takes a replica out of the number of its key's holders, before `_unlink`."""
    second = links[head, NEXT]
    if second != NIL:
        left = sets[head] ^ _mark(links[row, OWNER])
        sets[signed(second) if row == head else head] = left


@_jit
def _unlink(
    rows: U64, links: U32, heads: U32, firsts: I64, counts: I64, meta: I64, source: int, slot: int, ahead: int, row: int
) -> None:
    """Frees a row; `ahead` is the one before it in its key's chain, or -1."""
    following = links[row, NEXT]
    if ahead >= 0:
        links[ahead, NEXT] = following
    elif following != NIL:
        heads[slot] = following + 1
    else:
        _close_gap(rows, heads, slot)
        meta[DISTINCT] -= 1
    before, after = links[row, BEFORE], links[row, AFTER]
    if before != NIL:
        links[before, AFTER] = after
    else:
        firsts[source] = -1 if after == NIL else signed(after)
    if after != NIL:
        links[after, BEFORE] = before
    counts[source] -= 1
    meta[REPLICAS] -= 1
    links[row, OWNER] = NIL
    links[row, NEXT] = NIL if meta[FREE] < 0 else np.uint32(meta[FREE])
    meta[FREE] = row


@_jit
def _in_chain(links: U32, row: int, source: int) -> tuple[int, int]:
    """The source's row in a key's chain and the row ahead of it; -1 where there is none."""
    ahead = -1
    while signed(links[row, OWNER]) // FIDELITIES != source:
        following = links[row, NEXT]
        if following == NIL:
            return -1, row
        ahead, row = row, signed(following)
    return row, ahead


@_jit
def replicas_insert(
    rows: U64,
    links: U32,
    sets: U64,
    heads: U32,
    firsts: I64,
    counts: I64,
    meta: I64,
    keys: U64,
    start: int,
    source: int,
    fidelity: int,
) -> int:
    """Records keys (n, 2) from `start` on. Returns n, or the first key that has no room: grow, go on from there."""
    owner = np.uint32(source * FIDELITIES + fidelity)
    mark = _mark(owner)
    for i in range(start, len(keys)):
        low, high = keys[i, 0], keys[i, 1]
        _ask_for(rows, heads, keys, i)
        slot, head = _find(rows, heads, low, high)
        if head >= 0:
            held, _ = _in_chain(links, head, source)
            if held >= 0:
                if links[head, NEXT] != NIL:
                    sets[head] ^= _mark(links[held, OWNER]) ^ mark
                links[held, OWNER] = owner
                continue
        elif (meta[DISTINCT] + 1) * LOAD_DENOMINATOR > len(heads) * LOAD_NUMERATOR:
            return i
        row = meta[FREE]
        if row >= 0:
            meta[FREE] = -1 if links[row, NEXT] == NIL else signed(links[row, NEXT])
        elif meta[USED] < len(rows):
            row = meta[USED]
            meta[USED] += 1
        else:
            return i
        rows[row, 0], rows[row, 1] = low, high
        links[row, OWNER] = owner
        if head >= 0:
            # Second in its chain, so that the head's slot stays as it is.
            sets[head] = _set_of(links, sets, head) ^ mark
            links[row, NEXT] = links[head, NEXT]
            links[head, NEXT] = np.uint32(row)
        else:
            links[row, NEXT] = NIL
            heads[slot] = np.uint32(row + 1)
            meta[DISTINCT] += 1
        first = firsts[source]
        links[row, BEFORE] = NIL
        links[row, AFTER] = NIL if first < 0 else np.uint32(first)
        if first >= 0:
            links[first, BEFORE] = np.uint32(row)
        firsts[source] = row
        counts[source] += 1
        meta[REPLICAS] += 1
    return len(keys)


@_jit
def replicas_remove(
    rows: U64, links: U32, sets: U64, heads: U32, firsts: I64, counts: I64, meta: I64, keys: U64, source: int
) -> int:
    """Forgets one source's replicas of keys (n, 2). Returns how many there were."""
    removed = 0
    for i in range(len(keys)):
        _ask_for(rows, heads, keys, i)
        slot, head = _find(rows, heads, keys[i, 0], keys[i, 1])
        if head < 0:
            continue
        row, ahead = _in_chain(links, head, source)
        if row >= 0:
            _unmark(links, sets, head, row)
            _unlink(rows, links, heads, firsts, counts, meta, source, slot, ahead, row)
            removed += 1
    return removed


@_jit
def replicas_clear(
    rows: U64, links: U32, sets: U64, heads: U32, firsts: I64, counts: I64, meta: I64, source: int
) -> int:
    """Forgets all of one source's replicas, by its list. Returns how many there were."""
    removed = 0
    while firsts[source] >= 0:
        row = firsts[source]
        slot, head = _find(rows, heads, rows[row, 0], rows[row, 1])
        _, ahead = _in_chain(links, head, source)
        _unmark(links, sets, head, row)
        _unlink(rows, links, heads, firsts, counts, meta, source, slot, ahead, row)
        removed += 1
    return removed


@_jit
def replicas_collect(rows: U64, links: U32, firsts: I64, source: int, keys: U64, fidelities: U8) -> int:
    """Fills keys (n, 2) and fidelities (n) with what a source holds, newest first. Returns how many; stops at n."""
    row = firsts[source]
    count = 0
    while row >= 0 and count < len(keys):
        keys[count, 0], keys[count, 1] = rows[row, 0], rows[row, 1]
        fidelities[count] = links[row, OWNER] % FIDELITIES
        count += 1
        row = -1 if links[row, AFTER] == NIL else signed(links[row, AFTER])
    return count


@_jit
def replicas_find(rows: U64, heads: U32, keys: U64, out: I64) -> None:
    """out[i] = first row of keys[i], or -1. keys: (n, 2)."""
    for i in range(len(keys)):
        _, out[i] = _find(rows, heads, keys[i, 0], keys[i, 1])


@_jit
def marks_of(owners: U32) -> U64:
    """The mark of each owner, for checks."""
    marks = np.empty(len(owners), np.uint64)
    for i in range(len(owners)):
        marks[i] = _mark(owners[i])
    return marks


@_jit
def heads_rehash(rows: U64, old: U32, new: U32) -> None:
    """Enters all of `old` into `new`, which is empty. Keys are distinct: none is compared, each would be a cache miss.

    In steps over a few heads at a time, none of which has a branch that the CPU guesses wrong and a miss behind it.
    """
    slots = len(new)
    heads = np.empty(_STEP, np.uint32)
    homes = np.empty(_STEP, np.int64)
    for start in range(0, len(old), _STEP):
        count = 0
        for i in range(start, min(start + _STEP, len(old))):
            heads[count] = old[i]
            count += old[i] != 0
        for i in range(count):
            row = signed(heads[i]) - 1
            homes[i] = _home(rows[row, 0], rows[row, 1], slots)
        for i in range(count):
            at = homes[i]
            while new[at] != 0:
                at += 1
                if at == slots:
                    at = 0
            new[at] = heads[i]


@_jit
def _holders(links: U32, row: int, holders: np.uint64, recent: U64) -> U64:
    """Owners of a key's replicas: as they were read before, or by the chain from its first row on.

    Remembered is what many hold, by the number of the set: it can't grow old, since other holders are another number.
    """
    known = recent[signed(holders % np.uint64(len(recent) - 1))]
    if known[RECENT_SET] == holders and known[RECENT_COUNT] > 0:
        return known[RECENT_FIRST : RECENT_FIRST + signed(known[RECENT_COUNT])]
    # The last row is where chains are read to; what is too short to be remembered stays there.
    read, count = recent[len(recent) - 1], 0
    while True:
        read[RECENT_FIRST + count] = links[row, OWNER]
        count += 1
        if links[row, NEXT] == NIL:
            break
        row = signed(links[row, NEXT])
    if count < RECENT_MIN:
        return read[RECENT_FIRST : RECENT_FIRST + count]
    known[RECENT_SET], known[RECENT_COUNT] = holders, count
    known[RECENT_FIRST : RECENT_FIRST + count] = read[RECENT_FIRST : RECENT_FIRST + count]
    return known[RECENT_FIRST : RECENT_FIRST + count]


@_jit
def replicas_match(
    rows: U64, links: U32, sets: U64, heads: U32, source_count: int, recent: U64, keys: U64
) -> tuple[int, I32]:
    """Leading keys that any source holds, and each source's runs among them: (m, 4) of source, first, count, fidelity.

    Runs are in order of their first key; those that begin at the same key are in no order that means anything. A chain
    is walked only where a key's holders are not those of the key before.

    Args:
        recent: holders read before, (any power of two and one, RECENT_FIRST + source_count), at first of zeros.
    """
    runs = np.empty((64, 4), np.int32)
    run_count = 0
    current = np.full(source_count, -1, np.int32)
    owners = recent[0, :0]
    before, same = np.uint64(0), 0  # the set that is being followed, and keys since it was read
    covered = len(keys)
    for i in range(len(keys)):
        _ask_for(rows, heads, keys, i)
        _, row = _find(rows, heads, keys[i, 0], keys[i, 1])
        if row < 0:
            covered = i
            break
        holders = _set_of(links, sets, row)
        if i > 0 and holders == before:
            same += 1
            continue
        _grow(runs, current, owners, same)
        before, same = holders, 0
        owners = _holders(links, row, holders, recent)
        while run_count + len(owners) > len(runs):
            longer = np.empty((2 * len(runs), 4), np.int32)
            longer[:run_count] = runs[:run_count]
            runs = longer
        for k in range(len(owners)):
            owner = signed(owners[k])
            source, fidelity = owner // FIDELITIES, owner % FIDELITIES
            run = current[source]
            if run >= 0 and runs[run, 1] + runs[run, 2] == i and runs[run, 3] == fidelity:
                runs[run, 2] += 1
            else:
                runs[run_count, 0], runs[run_count, 1] = source, i
                runs[run_count, 2], runs[run_count, 3] = 1, fidelity
                current[source] = run_count
                run_count += 1
    _grow(runs, current, owners, same)
    return covered, runs[:run_count]


@_jit
def _grow(runs: I32, current: I32, owners: U64, by: int) -> None:
    """Makes the last run of each owner longer by so many keys."""
    if by > 0:
        for k in range(len(owners)):
            runs[current[signed(owners[k]) // FIDELITIES], 2] += by
