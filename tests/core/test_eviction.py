"""The intrusive lists against plain lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.eviction import CLASSES_MAX, LruLists

ENTRIES = 16
SIZES = (4096, 8192, 12288)

steps = st.lists(
    st.tuples(st.sampled_from(["use", "unlink", "gone"]), st.lists(st.integers(0, ENTRIES - 1), max_size=6)),
    max_size=60,
)


def entries_of(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def size_of(entry: int) -> int:
    return SIZES[entry % len(SIZES)]


@settings(max_examples=200, deadline=None)
@given(steps)
def test_agrees_with_plain_lists(steps: list[tuple[str, list[int]]]) -> None:
    lists = LruLists(ENTRIES)
    order: list[int] = []  # over all sizes, oldest first
    live: dict[int, None] = {}
    for verb, numbers in steps:
        chosen = list(dict.fromkeys(numbers))
        lists.unlink(entries_of(numbers))
        order = [e for e in order if e not in chosen]
        for size in SIZES:
            run = [e for e in chosen if size_of(e) == size]
            if verb == "use" and run:
                assert lists.open_class(size)
                lists.count(size, sum(e not in live for e in run))
                lists.append(entries_of(run), size)
                order += reversed(run)
            elif verb == "gone" and any(e in live for e in run):
                lists.count(size, -sum(e in live for e in run))
        if verb == "use":
            live.update(dict.fromkeys(chosen))
        elif verb == "gone":
            live = {e: None for e in live if e not in chosen}
        lists.check_invariants()
        assert [lists.listed(e) for e in range(ENTRIES)] == [e in order for e in range(ENTRIES)]
        for size in SIZES:
            expected = [e for e in order if size_of(e) == size]
            assert lists.oldest(size, ENTRIES).tolist() == expected
            assert lists.oldest(size, 2).tolist() == expected[:2]
        assert lists.oldest_class() == (size_of(order[0]) if order else None)


def test_of_one_prefix_the_tail_goes_first() -> None:
    lists = LruLists(ENTRIES)
    assert lists.open_class(4096)
    lists.count(4096, 6)
    lists.append(entries_of([0, 1, 2]), 4096)
    lists.append(entries_of([3, 4, 5]), 4096)
    assert lists.oldest(4096, 6).tolist() == [2, 1, 0, 5, 4, 3]


def test_sizes_that_nobody_uses_make_room_for_others() -> None:
    lists = LruLists(ENTRIES)
    for number in range(CLASSES_MAX):
        assert lists.open_class(4096 * (number + 1))
        lists.count(4096 * (number + 1), 1)
    assert not lists.open_class(4096 * 1000)
    lists.count(4096 * 5, -1)
    assert lists.open_class(4096 * 1000)
    lists.check_invariants()
