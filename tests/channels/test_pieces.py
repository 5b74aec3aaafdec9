"""Cutting blocks into chunks and putting them together again, against plain slices of bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.channels.pieces import Chunk, Digested, chunk_count, cut, gather, scatter
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument
from kvpool.core.hashing import section_digest

SIZES = st.lists(st.integers(1, 300), max_size=20)
CHUNK_BYTES = st.integers(1, 400)


def plain(sizes: list[int], chunk_bytes: int) -> list[list[tuple[int, int, int, int]]]:
    """For each chunk: block, start, bytes, place in the chunk; byte by byte."""
    stream = [(block, start) for block, size in enumerate(sizes) for start in range(size)]
    chunks = []
    for low in range(0, len(stream), chunk_bytes):
        pieces: list[tuple[int, int, int, int]] = []
        for at, (block, start) in enumerate(stream[low : low + chunk_bytes]):
            if pieces and pieces[-1][0] == block:
                pieces[-1] = (block, pieces[-1][1], pieces[-1][2] + 1, pieces[-1][3])
            else:
                pieces.append((block, start, 1, at))
        chunks.append(pieces)
    return chunks


def pieces_of(chunk: Chunk) -> list[tuple[int, int, int, int]]:
    columns = (chunk.blocks, chunk.starts, chunk.sizes, chunk.ats)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(SIZES, CHUNK_BYTES)
def test_cut_as_the_plain_one_does(sizes: list[int], chunk_bytes: int) -> None:
    chunks = list(cut(np.array(sizes, dtype=np.uint64), chunk_bytes))
    assert [pieces_of(chunk) for chunk in chunks] == plain(sizes, chunk_bytes)
    assert len(chunks) == chunk_count(sum(sizes), chunk_bytes)
    assert [i for chunk in chunks for i in chunk.complete] == list(range(len(sizes)))
    for chunk in chunks:
        assert chunk.bytes_total == chunk.sizes.sum()
        assert chunk.whole.tolist() == [size == sizes[block] for block, _, size, _ in pieces_of(chunk)]
        last = {block for block, start, size, _ in pieces_of(chunk) if start + size == sizes[block]}
        assert last == set(chunk.complete)


def made(sizes: list[int], sections: int) -> tuple[Descriptors, list[np.ndarray]]:
    rng = np.random.default_rng(sum(sizes))
    keys = rng.integers(0, 256, (len(sizes), 16), dtype=np.uint8)
    data = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    digests = np.zeros((len(sizes), sections), dtype=np.uint64)
    for i, row in enumerate(data):
        for section, part in enumerate(np.split(row, sections)):
            digests[i, section] = section_digest(np.ascontiguousarray(part), keys[i].tobytes(), section)
    none = np.zeros(len(sizes), dtype=np.uint32)
    return Descriptors(keys, none.astype(np.uint64), np.array(sizes, dtype=np.uint64), none, digests), data


def addresses_of(rows: list[np.ndarray]) -> np.ndarray:
    return np.array([row.ctypes.data for row in rows], dtype=np.uint64)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=12), CHUNK_BYTES, st.sampled_from([1, 2, 3]), st.data())
def test_sent_and_received(sizes: list[int], chunk_bytes: int, sections: int, data: st.DataObject) -> None:
    """What is sent chunk by chunk and received so is what it was; and a byte that changes on the way is noticed."""
    sizes = [size * sections for size in sizes]
    blocks, rows = made(sizes, sections)
    out = [np.zeros_like(row) for row in rows]
    sent = Digested(Descriptors(blocks.keys, blocks.offsets, blocks.sizes, blocks.generations, blocks.digests * 0),
                    addresses_of(rows))  # fmt: skip
    received = Digested(blocks, addresses_of(out))
    chunk_memory = np.zeros(chunk_bytes, dtype=np.uint8)
    flipped = data.draw(st.none() | st.integers(0, sum(sizes) - 1))
    for number, chunk in enumerate(cut(blocks.sizes, chunk_bytes)):
        sent.send(chunk, chunk_memory.ctypes.data)
        if flipped is not None and flipped // chunk_bytes == number:
            chunk_memory[flipped % chunk_bytes] ^= 1
        received.receive(chunk, chunk_memory.ctypes.data)
    assert np.array_equal(sent.digests, blocks.digests)
    right = [np.array_equal(a, b) for a, b in zip(rows, out, strict=True)]
    assert received.good.tolist() == right
    assert right.count(False) == (flipped is not None)


def test_gathered_and_scattered_where_allowed() -> None:
    _, rows = made([10, 20, 30], 1)
    out = [np.zeros_like(row) for row in rows]
    memory = np.zeros(25, dtype=np.uint8)
    for chunk in cut(np.array([10, 20, 30]), 25):
        gather(chunk, addresses_of(rows), memory.ctypes.data)
        scatter(chunk, memory.ctypes.data, addresses_of(out), chunk.blocks != 1)
    assert np.array_equal(out[0], rows[0]) and np.array_equal(out[2], rows[2]) and not out[1].any()


def test_sizes_that_no_block_has() -> None:
    blocks, rows = made([6, 6], 2)
    for sizes in ([6, 7], [0, 6]):
        with pytest.raises(BadArgument):
            Digested(
                Descriptors(blocks.keys, blocks.offsets, np.array(sizes), blocks.generations, blocks.digests),
                addresses_of(rows),
            )
