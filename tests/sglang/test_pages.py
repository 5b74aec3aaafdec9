"""Where pages lie: found from what a pool says, copied as they are, refused where they can't be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.sglang.pages import DIRECT_PLANES_MAX, Pages, pages_of
from kvpool.core.errors import BadArgument, Unsupported
from tests.sglang.made_pools import LAYOUTS, MadePool, all_numbers, numbers

#: A crowded machine may take long over anything.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
Pools = st.builds(
    MadePool.of, st.sampled_from(LAYOUTS), st.integers(1, 7), st.integers(1, 5), st.sampled_from([1, 3, 64, 200])
)


@unhurried
@given(Pools, st.integers(0, 2**32), st.data())
def test_gather_and_scatter_move_whole_pages(pool: MadePool, seed: int, data: st.DataObject) -> None:
    pool.fill(seed)
    pages = pool.pages()
    chosen = data.draw(st.lists(st.integers(0, pool.page_count - 1), unique=True))
    wanted = [pool.flat(page) for page in chosen]
    rows = np.zeros((len(chosen) + 1, pages.shard_bytes), dtype=np.uint8)
    pages.gather(0, all_numbers(chosen), rows)
    assert all(np.array_equal(row, page) for row, page in zip(rows, wanted, strict=False))
    before = pool.memory.copy()
    pages.scatter(0, rows, all_numbers(chosen))
    assert np.array_equal(pool.memory, before)  # the same bytes at the same places
    pages.scatter(0, np.flip(rows[: len(chosen)], 0).copy(), all_numbers(chosen))
    for page, other in zip(chosen, reversed(wanted), strict=True):
        assert np.array_equal(pool.flat(page), other)
    for page in set(range(pool.page_count)) - set(chosen):
        untouched = MadePool(pool.layout, pool.page_count, pool.layers, pool.run_bytes, before)
        assert np.array_equal(pool.flat(page), untouched.flat(page))


@unhurried
@given(Pools, st.integers(0, 2**32))
def test_views_are_the_pages_in_place(pool: MadePool, seed: int) -> None:
    pool.fill(seed)
    pages = pool.pages()
    assert sum(pages.group_bytes) == pages.shard_bytes == pool.flat(0).size
    views = [pages.view(0, plane) for plane in range(len(pages.shards[0]))]
    for page in range(pool.page_count):
        assert np.array_equal(np.concatenate([view[page] for view in views]), pool.flat(page))
    views[0][0, 0] ^= 0xFF
    assert views[0][0, 0] == pool.flat(0)[0]


def test_few_planes_are_direct() -> None:
    assert MadePool.of("page_first", 3, 40, 64).pages().group_bytes == (40 * 64, 40 * 64)
    many = MadePool.of("layer_first", 3, DIRECT_PLANES_MAX, 64).pages()
    assert not many.direct and many.group_bytes == (many.shard_bytes,)


def test_runs_of_separate_allocations_keep_the_pools_order() -> None:
    one, other = np.zeros((4, 8), dtype=np.uint8), np.zeros((4, 8), dtype=np.uint8)
    for first, second in ((one, other), (other, one)):
        pages = pages_of(
            lambda page, a=first, b=second: ([a[page].ctypes.data, b[page].ctypes.data], [8, 8]), 4, one_buffer=False
        )
        assert [plane.address for plane in pages.shards[0]] == [first.ctypes.data, second.ctypes.data]


def test_shards_are_runs_of_equal_sizes() -> None:
    memory = np.zeros((2, 5, 4, 16), dtype=np.uint8)  # K and V, page, head, bytes

    def runs(page: int) -> tuple[list[int], list[int]]:
        parts = [memory[kv, page, 2 * half] for half in (0, 1) for kv in (0, 1)]
        return [part.ctypes.data for part in parts], [32] * 4

    pages = pages_of(runs, 5, 2, one_buffer=True)
    assert len(pages.shards) == 2 and pages.shard_bytes == 64 and pages.direct
    memory[1, 3, 2:] = 7
    assert (pages.view(1, 1)[3] == 7).all() and not pages.view(0, 1).any() and not pages.view(1, 0).any()


@pytest.mark.parametrize(
    ("pages", "why"),
    [
        ([], "without pages"),
        ([[1000], [1064], [1000]], "equal distances"),
        ([[1000], [1010]], "overlap"),
        ([[1064], [1000]], "overlap"),
        ([[], []], "0 runs"),
    ],
)
def test_refuses_what_are_no_pages(pages: list[list[int]], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        pages_of(lambda page: (pages[page], [16] * len(pages[page])), len(pages), one_buffer=True)


def test_refuses_pages_that_are_not_there() -> None:
    pages = MadePool.of("page_first", 3, 2, 8).pages()
    pages.check(numbers(0, 2))
    for wrong in (numbers(3), numbers(-1), numbers(0, 99)):
        with pytest.raises(BadArgument):
            pages.check(wrong)
    assert isinstance(pages, Pages)
