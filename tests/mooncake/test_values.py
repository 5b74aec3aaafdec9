"""Objects in pieces: gathering and scattering, compared with joining bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.mooncake import values
from engines.mooncake.memory import addresses
from engines.mooncake.values import GatheredValues, Pieces, ScatteredValues, lots

ROOM = 400
cuts = st.lists(st.lists(st.integers(0, 30), max_size=5), max_size=6)


def placed(lengths: list[list[int]], base: int) -> Pieces:
    """Pieces one behind the other, with a byte between them."""
    at, pointers = base, []
    for of_object in lengths:
        row = []
        for length in of_object:
            row.append(at)
            at += length + 1
        pointers.append(row)
    return Pieces.of(pointers, lengths)


@pytest.fixture(autouse=True)
def small_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few bytes make several lots."""
    monkeypatch.setattr(values, "STAGING_BYTES", 64)


@settings(deadline=None)
@given(cuts, st.integers(0, 1 << 32), st.data())
def test_gathered_objects_are_their_pieces_joined(lengths: list[list[int]], seed: int, data: st.DataObject) -> None:
    arena = np.random.default_rng(seed).integers(0, 256, 4 * ROOM, dtype=np.uint8)
    pieces = placed(lengths, arena.ctypes.data)
    expected, at = [], 0
    for of_object in lengths:
        parts = []
        for length in of_object:
            parts.append(arena[at : at + length].tobytes())
            at += length + 1
        expected.append(b"".join(parts))
    rows = np.array(sorted(data.draw(st.sets(st.sampled_from(range(len(lengths)))))) if lengths else [], dtype=np.int64)
    got = {}
    for lot_rows, lot in GatheredValues(pieces).lend(rows):
        got |= dict(zip(lot_rows.tolist(), (array.tobytes() for array in lot), strict=True))
    assert got == {row: expected[row] for row in rows.tolist()}
    taken = pieces.take(rows)
    assert taken.object_sizes().tolist() == [len(expected[row]) for row in rows.tolist()]


@settings(deadline=None)
@given(cuts, st.integers(0, 1 << 32), st.data())
def test_scattered_objects_touch_their_own_pieces_alone(
    lengths: list[list[int]], seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    arena = rng.integers(0, 256, 4 * ROOM, dtype=np.uint8)
    expected = arena.copy()
    pieces = placed(lengths, arena.ctypes.data)
    everything = range(len(lengths))
    good = data.draw(st.sets(st.sampled_from(everything))) if lengths else set()
    scattered, at = ScatteredValues(pieces), 0
    objects = [rng.integers(0, 256, sum(of_object), dtype=np.uint8) for of_object in lengths]
    for row, of_object in enumerate(lengths):
        done = 0
        for length in of_object:
            if row in good:
                expected[at : at + length] = objects[row][done : done + length]
            at, done = at + length + 1, done + length
    for lot_rows, lot in scattered.lend(np.arange(len(lengths))):
        for row, array in zip(lot_rows.tolist(), lot, strict=True):
            array[:] = objects[row]
        chosen = [index for index, row in enumerate(lot_rows.tolist()) if row in good]
        scattered.arrived(lot_rows[chosen], [lot[index] for index in chosen])
    assert np.array_equal(arena, expected)


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), max_size=20))
def test_lots_are_as_large_as_they_may_be(sizes: list[int]) -> None:
    cut = list(lots(addresses(sizes), np.arange(len(sizes))))
    assert [row for lot in cut for row in lot.tolist()] == list(range(len(sizes)))
    for lot, following in itertools.pairwise(cut):
        total = sum(sizes[row] for row in lot.tolist())
        assert total <= 64 or len(lot) == 1
        assert total + sizes[int(following[0])] > 64


def test_an_object_with_more_addresses_than_sizes_has_no_pieces() -> None:
    pieces = Pieces.of([[1, 2], [3]], [[5], [6]])
    assert pieces.object_sizes().tolist() == [0, 6]
    assert pieces.all_of(np.array([True])).tolist() == [False, True]


def test_addresses_are_whole_numbers_that_are_not_negative() -> None:
    assert addresses([np.int64(5), 7]).tolist() == [5, 7]
    assert addresses([(1 << 64) - 1, 0]).tolist() == [(1 << 64) - 1, 0]
    for wrong in ([-1], [1.5], ["1"], [None], "12", [1 << 64]):
        with pytest.raises(TypeError):
            addresses(wrong)  # type: ignore[arg-type]
