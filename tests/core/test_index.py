"""The index against a dictionary, and what its arrays promise to readers of the same memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.arrays import EntryState, SourceArrays
from kvpool.core.errors import BadArgument
from kvpool.core.ids import Fidelity, KeyArray
from kvpool.core.index import NO_ENTRY, BlockIndex, NewEntries

ENTRIES = 12
KEYS = [np.random.default_rng(i).bytes(16) for i in range(30)]

steps = st.lists(
    st.tuples(
        st.sampled_from(["insert", "publish", "unlink", "quarantine", "discard", "free"]),
        st.lists(st.integers(0, 29), max_size=8),
    ),
    max_size=60,
)


def packed(keys: list[bytes]) -> KeyArray:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16)


def new(keys: KeyArray) -> NewEntries:
    count = len(keys)
    return NewEntries(
        keys, np.arange(count) * 64, np.full(count, 64, np.uint64), np.zeros(count, np.uint16), 0, 0, Fidelity.EXACT, 1
    )


def entries_of(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_agrees_with_a_dictionary(steps: list[tuple[str, list[int]]]) -> None:
    index = BlockIndex(SourceArrays.allocate(ENTRIES))
    known: dict[bytes, int] = {}
    unlinked: list[int] = []
    generations = np.zeros(ENTRIES, dtype=np.int64)
    for verb, numbers in steps:
        keys = list(dict.fromkeys(KEYS[n] for n in numbers))
        if verb == "insert":
            keys = [k for k in keys if k not in known][: index.free_count]
            entries = index.insert(new(packed(keys))).tolist()
            assert not {*entries} & {*known.values(), *unlinked}
            known.update(zip(keys, entries, strict=True))
        elif verb == "publish":
            entries = [known[k] for k in keys if k in known and index.arrays.states[known[k]] == EntryState.WRITING]
            index.publish(entries_of(entries))
        elif verb == "free":
            freed = unlinked[: len(numbers)]
            index.free(entries_of(freed))
            del unlinked[: len(numbers)]
        else:
            state = EntryState.READABLE if verb == "unlink" else EntryState.WRITING
            gone = [known.pop(k) for k in keys if k in known and index.arrays.states[known[k]] == state]
            getattr(index, verb)(entries_of(gone))
            unlinked += gone
        index.check_invariants()
        assert index.lookup(packed(KEYS)).tolist() == [known.get(k, NO_ENTRY) for k in KEYS]
        assert index.free_count == ENTRIES - len(known) - len(unlinked)
        assert (index.arrays.generations >= generations).all(), "a generation never comes back"
        generations = index.arrays.generations.astype(np.int64)


@given(st.integers(1, 3), st.integers(0, 2**64 - 1))
def test_keys_that_are_no_hashes_do_not_collide_endlessly(stride: int, high: int) -> None:
    """Foreign engines may count: consecutive numbers in either word must spread over the table."""
    count = 2000
    words = np.zeros((count, 2), dtype=np.uint64)
    words[:, 0] = np.arange(count, dtype=np.uint64) * np.uint64(stride)
    words[:, 1] = high
    index = BlockIndex(SourceArrays.allocate(count))
    keys = words.view(np.uint8).reshape(-1, 16)
    entries = index.insert(new(keys))
    assert (index.lookup(keys) == entries).all()
    buckets = index.arrays.buckets != 0
    # The longest run of full buckets is what the worst lookup walks; half full and well mixed it is short.
    edges = np.flatnonzero(np.diff(np.concatenate([[0], buckets, [0]]).astype(np.int8)))
    assert int((edges[1::2] - edges[::2]).max()) < 200


def test_a_readers_view_of_the_same_memory_sees_each_change() -> None:
    buffer = np.zeros(SourceArrays.bytes_needed(ENTRIES), dtype=np.uint8)
    writer = BlockIndex(SourceArrays.over(buffer, ENTRIES, fresh=True))
    entry = writer.insert(new(packed(KEYS[:1])))
    reader = BlockIndex(SourceArrays.over(buffer, ENTRIES, fresh=False))
    assert reader.lookup(packed(KEYS[:2])).tolist() == [entry[0], NO_ENTRY]
    assert reader.arrays.generations[entry[0]] % 2 == 1, "being written"
    writer.publish(entry)
    assert reader.arrays.generations[entry[0]] % 2 == 0, "readable"
    writer.unlink(entry)
    assert reader.arrays.generations[entry[0]] % 2 == 1, "going"
    assert reader.lookup(packed(KEYS[:1])).tolist() == [NO_ENTRY]


@pytest.mark.parametrize("word", range(4))
def test_another_layout_is_refused(word: int) -> None:
    """Magic, version, entries, sections: memory of another build must not be read as this one's."""
    buffer = np.zeros(SourceArrays.bytes_needed(ENTRIES), dtype=np.uint8)
    arrays = SourceArrays.over(buffer, ENTRIES, fresh=True)
    arrays.header[word] += np.uint64(1)
    with pytest.raises(BadArgument):
        SourceArrays.over(buffer, ENTRIES, fresh=False)


def test_a_buffer_that_is_too_small_is_refused() -> None:
    with pytest.raises(BadArgument):
        SourceArrays.over(np.zeros(SourceArrays.bytes_needed(ENTRIES) - 1, dtype=np.uint8), ENTRIES, fresh=True)


def test_more_entries_than_there_are_is_our_bug() -> None:
    index = BlockIndex(SourceArrays.allocate(2))
    with pytest.raises(AssertionError):
        index.insert(new(packed(KEYS[:3])))
