"""How a call is cut and where its bytes lie, against the plain way of saying it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.channels.tcp_batch import Batch, Window, cut
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument
from kvpool.core.hashing import section_digest

SECTIONS = st.sampled_from([1, 2, 3, 8])


@settings(max_examples=200)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 40), st.integers(1, 7))
def test_windows_cover_every_byte_once(sizes: list[int], bytes_max: int, blocks_max: int) -> None:
    pieces: list[tuple[int, int, int]] = []  # block, first byte, last byte + 1
    for window in cut(np.array(sizes, np.uint64), bytes_max, blocks_max):
        assert 1 <= window.total <= bytes_max and 1 <= window.count <= blocks_max
        if window.part:
            assert window.count == 1 and sizes[window.first] > bytes_max
            pieces.append((window.first, window.skip, window.skip + window.total))
            continue
        covered = range(window.first, window.first + window.count)
        assert window.skip == 0 and window.total == sum(sizes[i] for i in covered)
        pieces += [(i, 0, sizes[i]) for i in covered]
    bytes_seen = [(block, at) for block, begin, end in pieces for at in range(begin, end)]
    assert bytes_seen == [(block, at) for block, size in enumerate(sizes) for at in range(size)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, Descriptors, list[np.ndarray]]:
    """A batch over memory of any form, and the bytes of each block as the memory has them."""
    sections, count = draw(SECTIONS), draw(st.integers(1, 12))
    equal = draw(st.booleans())
    sizes = [sections * draw(st.integers(1, 9)) for _ in range(1 if equal else count)] * (count if equal else 1)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    rows = rng.permutation(count + draw(st.integers(0, 3)))[:count]
    if draw(st.booleans()):
        rows.sort()
    row_count, width = int(rows.max()) + 1, max(sizes) + draw(st.sampled_from([0, 0, 1, 5]))
    whole = rng.integers(0, 256, (row_count, width + 3), dtype=np.uint8)
    memory: np.ndarray | list[np.ndarray] = {
        "packed": np.ascontiguousarray(whole[:, :width]),
        "strided": whole[:, 1 : 1 + width],
        "list": [whole[i, i % 3 : i % 3 + width] for i in range(row_count)],
    }[draw(st.sampled_from(["packed", "strided", "list"]))]
    expected = [memory[row][:size] for row, size in zip(rows.tolist(), sizes, strict=True)]
    keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    digests = np.array(
        [
            [section_digest(part.tobytes(), key.tobytes(), s) for s, part in enumerate(np.split(block, sections))]
            for key, block in zip(keys, expected, strict=True)
        ],
        dtype=np.uint64,
    )
    blocks = Descriptors(
        keys, np.zeros(count, np.uint64), np.array(sizes, np.uint64), np.ones(count, np.uint32), digests
    )
    return Batch(blocks, memory, rows), blocks, expected


@settings(max_examples=300, deadline=None)
@given(batches(), st.data())
def test_views_are_the_bytes_in_order(made: tuple[Batch, Descriptors, list[np.ndarray]], data: st.DataObject) -> None:
    batch, _, expected = made
    pieces = [part for block in expected for part in np.split(block, batch.section_count)]
    first = data.draw(st.integers(0, len(pieces) - 1))
    stop = data.draw(st.integers(first + 1, len(pieces)))
    views = batch.views(first, stop)
    assert b"".join(views) == b"".join(piece.tobytes() for piece in pieces[first:stop])
    assert len(views) <= stop - first
    for view in views:
        view[0] ^= 1  # they are the memory itself
    assert b"".join(batch.views(first, stop)) == b"".join(piece.tobytes() for piece in pieces[first:stop])


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(1, 60))
def test_chunks_follow_each_other(made: tuple[Batch, Descriptors, list[np.ndarray]], bytes_min: int) -> None:
    batch, blocks, _ = made
    steps = np.repeat(blocks.sizes // np.uint64(batch.section_count), batch.section_count).tolist()
    for window in cut(batch.sizes, 100, 5):
        if window.part:
            continue
        chunks = batch.chunks(window, bytes_min)
        assert [c[0] for c in chunks] == [batch.sections(window)[0], *(c[1] for c in chunks[:-1])]
        assert chunks[-1][1] == batch.sections(window)[1]
        for first, stop in chunks[:-1]:
            assert sum(steps[first:stop]) >= bytes_min and sum(steps[first : stop - 1]) < bytes_min


@settings(max_examples=150, deadline=None)
@given(batches(), st.data())
def test_digests_are_those_of_the_sections(
    made: tuple[Batch, Descriptors, list[np.ndarray]], data: st.DataObject
) -> None:
    batch, blocks, expected = made
    digests = np.zeros((len(blocks) * batch.section_count, 1), np.uint64)
    batch.digest(0, len(digests), digests)
    assert np.array_equal(digests.reshape(blocks.digests.shape), blocks.digests)
    damaged = data.draw(st.integers(0, len(digests) - 1))
    block, section = divmod(damaged, batch.section_count)
    step = len(expected[block]) // batch.section_count
    expected[block][section * step + data.draw(st.integers(0, step - 1))] ^= 0x40
    good = np.ones(len(digests), np.bool_)
    batch.check(0, len(good), good)
    assert np.flatnonzero(~good).tolist() == [damaged]


def test_a_part_of_a_block() -> None:
    memory = np.arange(200, dtype=np.uint8).reshape(2, 100)
    blocks = Descriptors(
        np.zeros((1, 16), np.uint8), np.array([7], np.uint64), np.array([90], np.uint64), np.array([3], np.uint32),
        np.zeros((1, 3), np.uint64),
    )  # fmt: skip
    batch = Batch(blocks, memory, np.array([1]))
    (view,) = batch.part(Window(0, 1, 20, 30, True))
    assert view.tolist() == list(range(120, 150))
    uneven = Descriptors(blocks.keys, blocks.offsets, blocks.sizes + np.uint64(1), blocks.generations, blocks.digests)
    with pytest.raises(BadArgument):
        Batch(uneven, memory, np.array([1]))
