"""Sessions: their bytes, their bound, and when one is complete."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.mooncake.codes import Code
from engines.mooncake.ranges import READ_BYTES, READ_KEYS, lots
from engines.mooncake.sessions import Session, Sessions


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=8))
def test_complete_is_when_every_byte_was_written(size: int, ranges: list[tuple[int, int]]) -> None:
    session = Sessions().open("a", size, 0.0)
    assert isinstance(session, Session)
    seen = set()
    for offset, length in ranges:
        assert session.within([offset], [length]) == (offset + length <= size)
        if offset + length <= size:
            session.written.append((offset, offset + length))
            seen |= set(range(offset, offset + length))
    assert session.is_complete == (seen == set(range(size)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["open", "close", "find"]), st.integers(1, 60))))
def test_the_bytes_of_all_sessions_are_bounded(calls: list[tuple[str, str, int]]) -> None:
    sessions, plain = Sessions(bytes_max=100), {}
    for name, call, size in calls:
        if call == "open":
            plain.pop(name, None)
            fits = sum(plain.values()) + size <= 100
            opened = sessions.open(name, size, 0.0)
            assert isinstance(opened, Session) == fits
            if fits:
                plain[name] = size
            else:
                assert opened == Code.NO_AVAILABLE_HANDLE
        elif call == "close":
            closed = sessions.close(name)
            assert (None if closed is None else len(closed.data)) == plain.pop(name, None)
        else:
            assert (sessions.find(name, 0.0) is not None) == (name in plain)
            others = sum(size for other, size in plain.items() if other != name)
            assert sessions.room([name], 0.0) == 100 - others
        sessions.check_invariants()


def test_sessions_that_nobody_uses_make_room() -> None:
    sessions = Sessions(bytes_max=100, idle_s=10.0)
    sessions.open("left behind", 60, 0.0)
    sessions.open("in use", 30, 0.0)
    assert sessions.open("new", 50, 5.0) == Code.NO_AVAILABLE_HANDLE
    assert sessions.find("in use", 9.0) is not None
    assert (sessions.room(["new"], 5.0), sessions.room(["new"], 11.0)) == (10, 70)
    assert isinstance(sessions.open("new", 50, 11.0), Session)
    assert sessions.find("left behind", 11.0) is None and sessions.find("in use", 11.0) is not None


@settings(deadline=None)
@given(st.lists(st.integers(-3, 80 << 20) | st.integers(1, 5)))
def test_what_sessions_read_at_a_time_is_bounded(sizes: list[int]) -> None:
    found = list(lots(np.array(sizes, dtype=np.int64)))
    assert [row for lot in found for row in lot] == [row for row, size in enumerate(sizes) if size > 0]
    for lot in found:
        assert 1 <= len(lot) <= READ_KEYS and (len(lot) == 1 or sum(sizes[row] for row in lot) <= READ_BYTES)
