"""What every channel keeps, over every channel there is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvpool.channels.base import Channel, ChannelError
from kvpool.channels.sections import sections_as_blocks
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, Reason
from tests.channels.source_made import AVAILABLE, CHANNELS, SECTIONS, HarmfulProxy, MadeSource

DEADLINE_S = 60.0


NETWORKED = [name for name, made in CHANNELS.items() if made.networked]


@pytest.fixture(params=AVAILABLE)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def far(source: MadeSource, request: pytest.FixtureRequest) -> Iterator[tuple[Channel, HarmfulProxy]]:
    """A channel through a proxy; only for kinds that are `networked`."""
    proxy = HarmfulProxy(source.serving(request.param).address)
    with contextlib.closing(proxy), contextlib.closing(source.open(request.param, proxy.address)) as opened:
        yield opened, proxy


over_networks = pytest.mark.parametrize("far", NETWORKED, indirect=True)
Far = tuple[Channel, HarmfulProxy]


@pytest.fixture
def writing(kind: str) -> None:
    """For tests that write over the channel: those that only read are left out."""
    if not CHANNELS[kind].writes:
        pytest.skip(f"{kind} only reads")


@pytest.fixture
def channel(source: MadeSource, kind: str) -> Iterator[Channel]:
    with contextlib.closing(source.open(kind)) as opened:
        yield opened


def test_says_what_it_is(channel: Channel, kind: str) -> None:
    assert channel.kind == CHANNELS[kind].kind
    assert channel.capabilities.same_host == CHANNELS[kind].same_host


def test_reads_what_was_committed(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(20)
    lease, blocks = source.lease(keys)
    out = np.zeros_like(data)
    assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, data)


@pytest.mark.parametrize("block_bytes", [2, 4096, 3 << 20, 1_000_002])
@pytest.mark.usefixtures("writing")
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


@pytest.mark.usefixtures("writing")
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


def test_sections_are_read_as_soon_as_they_are_committed(source: MadeSource, channel: Channel, kind: str) -> None:
    keys, data = source.random_blocks(6)
    step = data.shape[1] // SECTIONS
    reservation, slots = source.reserve(keys)
    first = np.arange(6) % SECTIONS
    mine = np.stack([np.split(row, SECTIONS)[section] for row, section in zip(data, first, strict=True)])
    if CHANNELS[kind].writes:
        digests = channel.write(reservation, sections_as_blocks(slots, first), mine, deadline_s=DEADLINE_S)
    else:
        digests = source.write_sections(slots, first, mine)
    source.commit_sections(reservation, first, digests.ravel())
    lease, blocks, committed = source.lease_sections(keys)
    assert committed.tolist() == (1 << first).tolist()
    out = np.zeros((6, step), dtype=np.uint8)
    assert channel.read(lease, sections_as_blocks(blocks, first), out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, mine)
    # Under the number of another section the same bytes do not verify.
    other = (first + 1) % SECTIONS
    wrong = sections_as_blocks(blocks, first)
    wrong.keys[:] = sections_as_blocks(blocks, other).keys
    assert not channel.read(lease, wrong, out, deadline_s=DEADLINE_S).any()
    if CHANNELS[kind].sees_rights:
        for asked in (blocks, sections_as_blocks(blocks, other)):
            with pytest.raises(ChannelError):
                channel.read(lease, asked, np.zeros_like(data), deadline_s=DEADLINE_S)
        for asked in (slots, sections_as_blocks(slots, first)):
            with pytest.raises(ChannelError):
                channel.write(reservation, asked, data, deadline_s=DEADLINE_S)


@pytest.mark.usefixtures("writing")
def test_nothing_to_do(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(1)
    lease, blocks = source.lease(keys)
    none = blocks.take(np.zeros(1, dtype=np.bool_))
    assert len(channel.read(lease, none, data, deadline_s=DEADLINE_S)) == 0
    assert channel.write(1, none, data, deadline_s=DEADLINE_S).shape == (0, SECTIONS)


@pytest.mark.usefixtures("writing")
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


@pytest.mark.usefixtures("writing")
def test_blocks_that_move_in_parts(tmp_path: Path, kind: str) -> None:
    """Larger than what any channel moves at a time, and still checked as a whole."""
    with contextlib.closing(MadeSource(tmp_path, block_bytes=18 << 20, data_bytes=48 << 20)) as source:
        keys, data = source.random_blocks(2)
        reservation, slots = source.reserve(keys)
        with contextlib.closing(source.open(kind)) as channel:
            assert source.commit(reservation, channel.write(reservation, slots, data, deadline_s=DEADLINE_S)) == 2
            lease, blocks = source.lease(keys)
            out = np.zeros_like(data)
            assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
            assert np.array_equal(out, data)
            source.segment.data[int(blocks.offsets[1]) + (17 << 20)] ^= 1
            assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).tolist() == [True, False]


@pytest.mark.usefixtures("writing")
def test_memory_of_one_array_a_row(source: MadeSource, channel: Channel) -> None:
    keys, data = source.random_blocks(6)
    reservation, slots = source.reserve(keys)
    rows = np.array([5, 0, 3, 1, 2, 4])
    pieces = [np.concatenate([row, np.zeros(i, np.uint8)]) for i, row in enumerate(data)]
    digests = channel.write(reservation, slots, pieces, rows, deadline_s=DEADLINE_S)
    assert source.commit(reservation, digests) == 6
    lease, blocks = source.lease(keys)
    out = [np.zeros(data.shape[1] + 3 * i, np.uint8) for i in range(6)]
    assert channel.read(lease, blocks, out, np.arange(6)[::-1].copy(), deadline_s=DEADLINE_S).all()
    for i in range(6):
        assert np.array_equal(out[5 - i][: data.shape[1]], data[rows[i]])
        assert not out[5 - i][data.shape[1] :].any()


def test_runs_of_rows_and_slots_in_any_order(source: MadeSource, channel: Channel) -> None:
    """Neighbours move as one piece: whatever the order of rows and slots, each block gets to its own place."""
    keys, data = source.store(48)
    rng = np.random.default_rng(3)
    for _ in range(20):
        picked = rng.permutation(48)[: rng.integers(1, 48)]
        if rng.random() < 0.5:
            picked.sort()
        rows = rng.permutation(60)[: len(picked)]
        if rng.random() < 0.5:
            rows.sort()
        lease, blocks = source.lease(keys[picked])
        out = np.full((60, data.shape[1]), 0xCD, np.uint8)
        assert channel.read(lease, blocks, out, rows, deadline_s=DEADLINE_S).all()
        assert np.array_equal(out[rows], data[picked])
        assert (np.delete(out, rows, axis=0) == 0xCD).all()


def test_unverified_reads(source: MadeSource, channel: Channel) -> None:
    keys, data = source.store(9)
    lease, blocks = source.lease(keys)
    out = np.zeros_like(data)
    assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S, verify=False).all()
    assert np.array_equal(out, data)


# ------------------------------------------------------------ faults


def test_another_generation_is_never_read_as_the_old_one(source: MadeSource, channel: Channel) -> None:
    """The reader keeps descriptors of blocks that were removed, and whose slots now hold others."""
    keys, data = source.store(8)
    lease, blocks = source.lease(keys)
    source.drop(lease, keys)
    new_keys, new_data = source.store(8)
    _, new_blocks = source.lease(new_keys)
    assert np.array_equal(np.sort(new_blocks.offsets), np.sort(blocks.offsets)), "the slots were not used again"
    with contextlib.suppress(ChannelError):
        assert not channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S).any()
    assert not np.array_equal(data, new_data)


@pytest.mark.usefixtures("writing")
def test_wrong_lease(source: MadeSource, channel: Channel, kind: str) -> None:
    keys, data = source.store(2)
    lease, blocks = source.lease(keys)
    if CHANNELS[kind].sees_rights:
        with pytest.raises(ChannelError) as caught:
            channel.read(lease + 1000, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
        assert caught.value.reason is Reason.UNKNOWN_LEASE
        with pytest.raises(ChannelError) as caught:
            channel.write(lease + 1000, blocks, data, deadline_s=DEADLINE_S)
        assert caught.value.reason is Reason.UNKNOWN_RESERVATION
    out = np.zeros_like(data)
    assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all(), "a refusal must not harm the channel"
    assert np.array_equal(out, data)


@pytest.mark.parametrize("offset", [32 << 20, (32 << 20) - 100, (1 << 64) - 100, 1 << 63])
@pytest.mark.usefixtures("writing")
def test_outside_the_segment(source: MadeSource, channel: Channel, offset: int) -> None:
    keys, data = source.store(2)
    lease, blocks = source.lease(keys)
    offsets = blocks.offsets.copy()
    offsets[1] = offset
    outside = Descriptors(blocks.keys, offsets, blocks.sizes, blocks.generations, blocks.digests)
    with pytest.raises(ChannelError):
        channel.read(lease, outside, np.zeros_like(data), deadline_s=DEADLINE_S, verify=False)
    with pytest.raises(ChannelError):
        channel.write(lease, outside, data, deadline_s=DEADLINE_S)


def test_close_while_others_read(source: MadeSource, kind: str) -> None:
    """Each call ends: with the whole bytes, or with an error."""
    keys, data = source.store(64)
    lease, blocks = source.lease(keys)
    channel = source.open(kind)
    begun = threading.Barrier(5)

    def read() -> int:
        begun.wait(DEADLINE_S)
        for count in range(10_000):
            out = np.zeros_like(data)
            try:
                assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
            except ChannelError:
                return count
            assert np.array_equal(out, data)
        raise AssertionError("the channel goes on reading after it was closed")

    with ThreadPoolExecutor(4) as threads:
        readers = [threads.submit(read) for _ in range(4)]
        begun.wait(DEADLINE_S)
        channel.close()
        for reader in readers:
            reader.result(2 * DEADLINE_S)


@over_networks
def test_close_during_a_call(source: MadeSource, far: Far) -> None:
    channel, proxy = far
    keys, data = source.store(64)
    lease, blocks = source.lease(keys)
    proxy.stall_at = data.nbytes // 2
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(channel.read, lease, blocks, np.zeros_like(data), deadline_s=10 * DEADLINE_S)
        assert proxy.stalled.wait(DEADLINE_S)
        channel.close()
        with pytest.raises(ChannelError):
            reading.result(DEADLINE_S)


@over_networks
def test_peer_dies_in_the_middle(source: MadeSource, far: Far) -> None:
    channel, proxy = far
    keys, data = source.store(8)
    lease, blocks = source.lease(keys)
    proxy.cut_at = data.nbytes // 2
    with pytest.raises(ChannelError):
        channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
    reservation, slots = source.reserve(source.random_blocks(8)[0])
    with pytest.raises(ChannelError):
        channel.write(reservation, slots, data, deadline_s=DEADLINE_S)
    proxy.cut_at = None
    out = np.zeros_like(data)
    assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all(), "the channel did not recover"
    assert np.array_equal(out, data)


@over_networks
def test_slow_peer_meets_the_deadline(source: MadeSource, far: Far) -> None:
    channel, proxy = far
    keys, data = source.store(8)
    lease, blocks = source.lease(keys)
    proxy.stall_at = data.nbytes // 2
    with pytest.raises(ChannelError) as caught:
        channel.read(lease, blocks, np.zeros_like(data), deadline_s=0.3)
    assert caught.value.reason is Reason.DEADLINE


@pytest.mark.parametrize("at", [0.1, 0.5, 0.99])
@over_networks
def test_a_byte_garbled_on_the_wire_is_never_good(source: MadeSource, far: Far, at: float) -> None:
    channel, proxy = far
    keys, data = source.store(8)
    lease, blocks = source.lease(keys)
    out = np.zeros_like(data)
    proxy.flip_at = proxy.passed + int(at * data.nbytes)
    with contextlib.suppress(ChannelError):
        good = channel.read(lease, blocks, out, deadline_s=DEADLINE_S)
        assert np.array_equal(good, (out == data).all(axis=1))
    proxy.flip_at = None
    assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, data)
