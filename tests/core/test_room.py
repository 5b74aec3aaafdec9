"""Who goes when something does not fit: no more than needed, the coldest, and nobody for what can't be had."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_clients import PAGE, Client

from kvpool.core.errors import NoSpace
from kvpool.core.kernels.windows import pick_apart, price_windows
from kvpool.core.results import ReserveStatus

QUARTER = PAGE // 4


def test_a_hot_small_class_gets_a_cold_span() -> None:
    """Large blocks that nobody reads must not keep small ones that everybody reads from having room."""
    c = Client(8, sizes=(QUARTER, 4 * PAGE))
    c.put(1, 2, size=4 * PAGE)
    c.core.take_changes()
    c.put(*range(10, 14), size=QUARTER)
    assert c.removed() == [2], "the colder of the large ones, for four small ones"
    # Half of the pages are free by now: small ones fill them before anybody goes.
    c.put(*range(20, 32), size=QUARTER)
    assert c.removed() == []
    c.core.release(c.session, [c.lease(1)], 0)
    c.put(40, 41, size=QUARTER)
    assert c.removed() == [13, 12], "own victims, where the other class is hotter"


def test_a_cold_class_does_not_take_hot_spans() -> None:
    c = Client(8, sizes=(PAGE, 4 * PAGE))
    c.put(1, size=4 * PAGE)
    c.put(10, 11, 12, 13)
    c.core.take_changes()
    c.put(2, size=4 * PAGE)
    assert c.removed() == [1]
    c.put(3, size=4 * PAGE)
    assert sorted(c.removed()) == [10, 11, 12, 13], "by now the small ones are colder"


def test_a_span_with_one_cold_block_among_hot_ones_stays() -> None:
    c = Client(2, sizes=(QUARTER, 2 * QUARTER))
    c.put(20, 21, size=2 * QUARTER)
    c.put(1, 2, 3, 4, size=QUARTER)
    c.core.release(c.session, [c.lease(20)], 0)
    c.core.take_changes()
    c.put(5, size=QUARTER)
    assert c.removed() == [4], "21 is the coldest of all, but its slot alone is of no use; 1 to 3 need not go"


def test_what_one_call_has_taken_already_is_no_room_for_the_rest_of_it() -> None:
    c = Client(8)
    c.put(*range(8))
    reserved = c.put_objects("a", "b", "c", sizes=[2 * PAGE - 1, 3 * PAGE - 1, PAGE])
    assert (reserved.status == ReserveStatus.RESERVED).all()
    ends = reserved.slots.offsets + reserved.slots.sizes + np.uint64(1)
    order = np.argsort(reserved.slots.offsets)
    assert (ends[order][:-1] <= reserved.slots.offsets[order][1:]).all()


def test_what_can_not_be_had_evicts_nobody() -> None:
    c = Client(8, sizes=(PAGE, 4 * PAGE))
    c.put(*range(8))
    held = c.lease(0), c.lease(4)
    c.core.take_changes()
    # Pages 1-3 and 5-7 may go, four in a row may not.
    with pytest.raises(NoSpace):
        c.reserve(20, size=4 * PAGE)
    assert c.removed() == [] and len(c.here(*range(8))) == 8
    c.core.release(c.session, [held[1]], 0)
    c.put(20, size=4 * PAGE)
    assert sorted(c.removed()) == [1, 2, 3, 4], "the coldest four pages in a row"


def test_a_window_goes_around_what_is_being_written() -> None:
    c = Client(8, sizes=(PAGE, 4 * PAGE))
    c.put(0, 1, 2)
    c.reserve(3)
    c.put(4, 5, 6, 7)
    c.core.take_changes()
    c.put(20, size=4 * PAGE)
    assert sorted(c.removed()) == [4, 5, 6, 7]


def test_several_windows_at_once() -> None:
    c = Client(12, sizes=(PAGE, 4 * PAGE))
    c.put(*range(12))
    c.core.take_changes()
    reserved = c.put(20, 21, size=4 * PAGE)
    assert reserved.status.tolist() == [ReserveStatus.RESERVED] * 2
    assert sorted(c.removed()) == list(range(4, 12)), "tails first: the last ones were the coldest"


def test_a_suffix_does_not_stay_without_its_prefix_where_another_way_is_open() -> None:
    c = Client(8, sizes=(PAGE, 2 * PAGE), eviction="prefix")
    c.put(*range(6))
    c.put(10, 11)
    c.lease(5)
    c.core.take_changes()
    c.put(20, size=2 * PAGE)
    removed = c.removed()
    assert sorted(removed) == [10, 11], "the chain 0..5 ends in a block that is held"


def test_a_window_is_taken_even_if_it_strands_a_suffix_when_nothing_else_is_left() -> None:
    c = Client(6, sizes=(PAGE, 2 * PAGE), eviction="prefix")
    c.put(*range(6))
    c.lease(5)
    c.core.take_changes()
    c.put(20, size=2 * PAGE)
    assert len(c.removed()) == 2 and c.here(20) == [20]


def test_sizes_of_one_call_are_judged_each_for_itself() -> None:
    c = Client(8)
    reserved = c.put_objects("large", "small", "larger", sizes=[5 * PAGE, PAGE - 10, 4 * PAGE])
    assert reserved.status.tolist() == [ReserveStatus.RESERVED, ReserveStatus.RESERVED, ReserveStatus.NO_SPACE]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 9), st.integers(0, 3), st.booleans()), min_size=1, max_size=12
    ),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_windows_agree_with_looking_at_each(pieces: list[tuple[int, int, int, bool]], need: int, count: int) -> None:
    units, worst, blocks, blocked = (list(column) for column in zip(*pieces, strict=True))
    arrays = (np.array(units, np.int64), np.array(worst, np.uint64), np.array(blocks, np.int64), np.array(blocked))
    last, total = np.empty(len(units), np.int64), np.zeros(len(units), np.int64)
    hottest = np.zeros(len(units), np.uint64)
    price_windows(*arrays, need, last, hottest, total)
    for first in range(len(units)):
        ends = [e for e in range(first, len(units)) if sum(units[first : e + 1]) >= need]
        if not ends or any(blocked[first : ends[0] + 1]):
            assert last[first] == -1
            continue
        inside = slice(first, ends[0] + 1)
        assert (last[first], hottest[first], total[first]) == (ends[0], max(worst[inside]), sum(blocks[inside]))
    order = np.flatnonzero(last >= 0)
    chosen = np.empty(count, np.int64)
    chosen = chosen[: pick_apart(order, last, count, chosen)].tolist()
    covered = [piece for first in chosen for piece in range(first, int(last[first]) + 1)]
    assert len(covered) == len(set(covered))
    rest = [first for first in order.tolist() if not set(range(first, int(last[first]) + 1)) & set(covered)]
    assert len(chosen) == count or not rest, "a window was left out"
