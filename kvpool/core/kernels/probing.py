"""Finding keys in the index of another process, which changes it meanwhile. Takes no lock and writes nothing but marks.

An entry is believed if its generation was even before its fields were read, and is the same after. A key that is not
found is truly missing only if the table's version was even and did not move around the search: removal shifts buckets,
and a key may be on its way. All arrays are one-dimensional or as said, C-contiguous; those of the index are read-only.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvpool.core.arrays import TABLE_VERSION, TOUCHES_MAX, EntryState, SourceArrays
from kvpool.core.ids import Fidelity
from kvpool.core.kernels.atomics import fence_acquire, load_acquire
from kvpool.core.kernels.entries import _home

U64: TypeAlias = NDArray[np.uint64]
U32: TypeAlias = NDArray[np.uint32]
U16: TypeAlias = NDArray[np.uint16]
U8: TypeAlias = NDArray[np.uint8]
I64: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

#: What is known of a key. UNKNOWN: the index was changing, or shows what only the source can judge.
UNKNOWN, HIT, MISS = 0, 1, 2

#: Repeated searches in one call, all keys together: a source that died while it changed its table is not waited for.
RETRIES_MAX: Final = 512

_READABLE, _EXACT = int(EntryState.READABLE), int(Fidelity.EXACT)
_NOWHERE: Final = -1
_ONE_8, _ONE_32, _ONE_64, _ZERO_64 = np.uint8(1), np.uint32(1), np.uint64(1), np.uint64(0)


@njit(inline="always")
def _locate(low: np.uint64, high: np.uint64, buckets: U32, entry_keys: U64) -> np.int64:
    """The entry that seems to hold a key, or _NOWHERE. Ends whatever the table looks like."""
    mask = np.uint64(len(buckets) - 1)
    at = _home(low, high, mask)
    for _ in range(len(buckets)):
        bucket = load_acquire(buckets, np.int64(at))
        if bucket == 0:
            break
        entry = np.int64(bucket) - 1
        if 2 * entry >= len(entry_keys):
            break
        if entry_keys[2 * entry] == low and entry_keys[2 * entry + 1] == high:
            return entry
        at = (at + _ONE_64) & mask
    return np.int64(_NOWHERE)


@njit(inline="always")
def _is_wanted(
    entry: np.int64, number: int, low: np.uint64, high: np.uint64,
    entry_keys: U64, states: U8, fidelities: U8, namespaces: U16,
) -> bool:  # fmt: skip
    """Whether an entry is a readable exact copy of that key of that namespace. Its key is read once more: the first
    look was before its generation was known."""
    return (
        load_acquire(entry_keys, 2 * entry) == low
        and load_acquire(entry_keys, 2 * entry + 1) == high
        and load_acquire(states, entry) == _READABLE
        and load_acquire(fidelities, entry) == _EXACT
        and namespaces[entry] == number
    )


@njit(inline="always")
def _table_held(header: U64, version: np.uint64) -> bool:
    fence_acquire()
    return bool(version & _ONE_64 == _ZERO_64 and load_acquire(header, TABLE_VERSION) == version)


@njit
def _search(
    number: int, low: np.uint64, high: np.uint64, header: U64, buckets: U32, entry_keys: U64, generations: U32,
    states: U8, fidelities: U8, namespaces: U16, name_bytes: U16, objects: bool, retries: int,
) -> tuple[int, np.int64, np.uint32, int]:  # fmt: skip
    """What is known of one key; for a hit its entry and generation; and the retries that are left.

    An object is a hit only if it is asked for: its whole name is to be compared.
    """
    while True:
        version = load_acquire(header, TABLE_VERSION)
        entry = _locate(low, high, buckets, entry_keys)
        generation, wanted = _ONE_32, False
        if entry != _NOWHERE:
            generation = load_acquire(generations, entry)
            wanted = generation & _ONE_32 == 0 and _is_wanted(
                entry, number, low, high, entry_keys, states, fidelities, namespaces
            )
        if wanted:
            named = name_bytes[entry] != 0
            fence_acquire()
            if load_acquire(generations, entry) == generation:
                return (UNKNOWN if named and not objects else HIT), entry, generation, retries
        elif _table_held(header, version):
            return MISS, np.int64(0), _ONE_32, retries
        if retries == 0:
            return UNKNOWN, np.int64(0), _ONE_32, retries
        retries -= 1


@njit(nogil=True, cache=True)
def probe(
    number: int, keys: U64, header: U64, buckets: U32, entry_keys: U64, generations: U32, states: U8,
    fidelities: U8, namespaces: U16, name_bytes: U16, answers: U8,
) -> None:  # fmt: skip
    """Answers for each of `keys` (n, 2): is a readable exact block of namespace `number` there?

    entry_keys: two words an entry. An object is UNKNOWN: its whole name is to be compared.
    """
    retries = RETRIES_MAX
    for i in range(len(keys)):
        answers[i], _, _, retries = _search(
            number, keys[i, 0], keys[i, 1], header, buckets, entry_keys, generations, states, fidelities, namespaces,
            name_bytes, False, retries,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def find(
    number: int, keys: U64, header: U64, buckets: U32, entry_keys: U64, generations: U32, states: U8,
    fidelities: U8, namespaces: U16, name_bytes: U16, section_counts: U8, sizes: U64, offsets: U64, digests: U64,
    data_bytes: int, objects: bool, answers: U8, found_entries: I64, found_generations: U32, found: U64,
    found_digests: U64,
) -> None:  # fmt: skip
    """As `probe`, and for hits where the block lies; other rows are of no use.

    Args:
        digests: (entries, sections).
        data_bytes: what does not lie inside of so many bytes is UNKNOWN.
        found_entries, found_generations: (n); what `confirm` needs.
        objects: whether entries with names are hits; the caller then compares the names.
        found: (4, n): offsets, sizes, section counts, and bytes of the names that lie behind the blocks.
        found_digests: (n, sections).
    """
    retries = RETRIES_MAX
    room, width = np.uint64(data_bytes), np.uint64(digests.shape[1])
    for i in range(len(keys)):
        answer, entry, generation, retries = _search(
            number, keys[i, 0], keys[i, 1], header, buckets, entry_keys, generations, states, fidelities, namespaces,
            name_bytes, objects, retries,
        )  # fmt: skip
        found_entries[i], found_generations[i] = entry, generation
        offset, size, sections, named = _ZERO_64, _ZERO_64, _ONE_64, _ZERO_64
        if answer == HIT:
            offset, size, sections = offsets[entry], sizes[entry], np.uint64(section_counts[entry])
            named = np.uint64(name_bytes[entry])
            for section in range(digests.shape[1]):
                found_digests[i, section] = digests[entry, section]
            inside = size <= room and named <= room - size and offset <= room - size - named
            cut = _ZERO_64 < sections <= width and size % sections == _ZERO_64
            fence_acquire()
            if not (inside and cut and load_acquire(generations, entry) == generation):
                answer, offset, size, sections, named = UNKNOWN, _ZERO_64, _ZERO_64, _ONE_64, _ZERO_64
        answers[i] = answer
        found[0, i], found[1, i], found[2, i], found[3, i] = offset, size, sections, named


@njit(nogil=True, cache=True)
def confirm(entries: I64, generations_then: U32, generations: U32, touches: U8, good: Bools) -> None:
    """After copying: good[i] stays true if the entry has not changed since it was found; its use is counted then."""
    fence_acquire()
    for i in range(len(entries)):
        entry = entries[i]
        if good[i]:
            good[i] = load_acquire(generations, entry) == generations_then[i]
        # Written a few times between two looks of the source, since others may have the mark in their caches.
        if good[i] and touches[entry] < TOUCHES_MAX:
            touches[entry] += _ONE_8


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A view that can't be written, also of memory that can: kernels are compiled for one type of array."""
    view = array.view()
    view.flags.writeable = False
    return view


def searched_arrays(arrays: SourceArrays) -> tuple[NDArray[Any], ...]:
    """`header` to `name_bytes`, as `probe` and `find` take them."""
    a = arrays
    searched = (
        a.header, a.buckets, a.keys.reshape(-1), a.generations, a.states, a.fidelities, a.namespaces, a.name_bytes,
    )  # fmt: skip
    return tuple(read_only(array) for array in searched)


def described_arrays(arrays: SourceArrays) -> tuple[NDArray[Any], ...]:
    """`section_counts` to `digests`, as `find` takes them."""
    return tuple(read_only(a) for a in (arrays.section_counts, arrays.sizes, arrays.offsets, arrays.digests))


def warm_up() -> None:
    """Runs each kernel once: compiled, or loaded from the cache."""
    arrays = SourceArrays.allocate(1, 1)
    searched, one = searched_arrays(arrays), np.zeros(1, dtype=np.uint8)
    keys, entries, generations = np.zeros((1, 2), np.uint64), np.zeros(1, np.int64), np.zeros(1, np.uint32)
    probe(0, keys, *searched, one)
    found, digests = np.zeros((4, 1), np.uint64), np.zeros((1, 1), np.uint64)
    find(0, keys, *searched, *described_arrays(arrays), 0, False, one, entries, generations, found, digests)
    confirm(entries, generations, read_only(arrays.generations), arrays.touches, np.zeros(1, np.bool_))
