"""What every channel keeps, over every channel there is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvpool.channels.base import Channel, ChannelError
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument
from tests.channels.source_made import SECTIONS, MadeSource

DEADLINE_S = 20.0


@pytest.fixture(params=["shm", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def channel(source: MadeSource, kind: str) -> Iterator[Channel]:
    with contextlib.closing(source.open(kind)) as opened:
        yield opened


def test_says_what_it_is(channel: Channel, kind: str) -> None:
    assert channel.kind == kind
    assert channel.capabilities.same_host == (kind == "shm")


def test_reads_what_was_committed(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(20)
    lease, blocks = source.lease(keys)
    out = np.zeros_like(data)
    assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, data)


@pytest.mark.parametrize("block_bytes", [2, 4096, 3 << 20])
def test_block_sizes(big_source: Callable[[int], MadeSource], kind: str, block_bytes: int) -> None:
    source = big_source(block_bytes)
    keys, data = source.random_blocks(5)
    reservation, slots = source.reserve(keys)
    with contextlib.closing(source.open(kind)) as channel:
        assert source.commit(reservation, channel.write(reservation, slots, data, deadline_s=DEADLINE_S)) == 5
        lease, blocks = source.lease(keys)
        out = np.zeros_like(data)
        assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, data)


def test_rows_say_where_blocks_go(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(4)
    lease, blocks = source.lease(keys)
    out = np.full((9, data.shape[1] + 8), 0xAB, dtype=np.uint8)
    rows = np.array([7, 0, 3, 5])
    assert channel.read(lease, blocks, out, rows, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out[rows, : data.shape[1]], data)
    assert (out[rows, data.shape[1] :] == 0xAB).all(), "bytes after a block were touched"
    assert (np.delete(out, rows, axis=0) == 0xAB).all(), "other rows were touched"


def test_write_commit_read(source: MadeSource, channel: Channel) -> None:
    keys, data = source.random_blocks(12)
    reservation, slots = source.reserve(keys)
    shuffled = np.random.default_rng(0).permutation(12)
    digests = channel.write(reservation, slots, data, shuffled, deadline_s=DEADLINE_S)
    assert digests.shape == (12, SECTIONS)
    assert source.commit(reservation, digests) == 12
    lease, blocks = source.lease(keys)
    out = np.zeros_like(data)
    assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, data[shuffled])


def test_many_small_blocks(big_source: Callable[[int], MadeSource], kind: str) -> None:
    source = big_source(512)
    keys, data = source.store(400)
    lease, blocks = source.lease(keys)
    out = np.zeros_like(data)
    with contextlib.closing(source.open(kind)) as channel:
        assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, data)


def test_a_bad_byte_in_the_source_is_seen(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(3)
    lease, blocks = source.lease(keys)
    source.segment.data[int(blocks.offsets[1]) + data.shape[1] - 1] ^= 1
    good = channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
    assert good.tolist() == [True, False, True]


def test_another_blocks_bytes_are_seen(source: MadeSource, channel: Channel) -> None:
    """The digest is seeded with the key: equal bytes under another key do not verify."""
    keys, data = source.store(2)
    lease, blocks = source.lease(keys)
    swapped = Descriptors(blocks.keys[::-1].copy(), blocks.offsets, blocks.sizes, blocks.generations, blocks.digests)
    assert not channel.read(lease, swapped, np.zeros_like(data), deadline_s=DEADLINE_S).any()


def test_nothing_to_do(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(1)
    lease, blocks = source.lease(keys)
    none = blocks.take(np.zeros(1, dtype=np.bool_))
    assert len(channel.read(lease, none, data, deadline_s=DEADLINE_S)) == 0
    assert channel.write(1, none, data, deadline_s=DEADLINE_S).shape == (0, SECTIONS)


def test_deadline_passed(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(3)
    lease, blocks = source.lease(keys)
    with pytest.raises(ChannelError):
        channel.read(lease, blocks, data, deadline_s=-1.0)
    reservation, slots = source.reserve(source.random_blocks(3)[0])
    with pytest.raises(ChannelError):
        channel.write(reservation, slots, data, deadline_s=-1.0)


def test_bad_memory_is_refused(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(2)
    lease, blocks = source.lease(keys)
    for out, rows in [
        (np.zeros((2, 100), np.uint8), None),  # rows too short
        (np.zeros((1, data.shape[1]), np.uint8), None),  # too few rows
        (np.zeros((2, data.shape[1] * 2), np.uint8)[:, ::2], None),  # not contiguous
        (np.zeros((2, data.shape[1]), np.float32), None),
        (np.zeros_like(data), np.array([0, -1])),
    ]:
        with pytest.raises(BadArgument):
            channel.read(lease, blocks, out, rows, deadline_s=DEADLINE_S)


def test_closed_channel(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(1)
    lease, blocks = source.lease(keys)
    channel.close()
    with pytest.raises(ChannelError):
        channel.read(lease, blocks, data, deadline_s=DEADLINE_S)
    channel.close()


def test_from_several_threads(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(64)

    def read(first: int) -> bool:
        lease, blocks = leases[first]
        out = np.zeros((8, data.shape[1]), np.uint8)
        good = channel.read(lease, blocks, out, deadline_s=DEADLINE_S)
        return bool(good.all()) and np.array_equal(out, data[first : first + 8])

    leases = {first: source.lease(keys[first : first + 8]) for first in range(0, 64, 8)}
    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(read, [*leases] * 4))
