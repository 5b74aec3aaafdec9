"""Sections one by one through the library face: written, committed and read while their block is incomplete."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kvpool.aio import AsyncPoolClient
from kvpool.client import ABANDONED, COMMITTED, SECTION, PoolClient
from kvpool.core.errors import AlreadyCommitted, BadArgument
from kvpool.core.ids import NamespaceId
from kvpool.tiers.dram import Segment
from tests.pool.node_process import BLOCK_BYTES, SECTIONS, NodeProcess, eventually, held, namespace_spec, random_blocks

Connect = Callable[..., PoolClient]
STEP = BLOCK_BYTES // SECTIONS


@pytest.fixture(params=[("shm", "shm"), ("shm", "tcp"), ("tcp", "shm"), ("tcp", "tcp")], ids="-".join)
def pair(shared_node: NodeProcess, connect: Connect, request: pytest.FixtureRequest) -> tuple[PoolClient, PoolClient]:
    """A writer and a reader, over such channels."""
    writer, reader = (connect(shared_node, channels=(kind,)) for kind in request.param)
    return writer, reader


@pytest.fixture
def namespace(pair: tuple[PoolClient, PoolClient], request: pytest.FixtureRequest) -> NamespaceId:
    for client in pair:
        namespace = client.register(namespace_spec(request.node.name))
    return namespace


def cut(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (blocks, sections, section bytes)."""
    return blocks.reshape(len(blocks), SECTIONS, STEP)


def numbers(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def test_committed_sections_are_read_before_their_block_is_complete(
    pair: tuple[PoolClient, PoolClient], namespace: NamespaceId
) -> None:
    writer, reader = pair
    keys, blocks = random_blocks(3, [1, *namespace])
    reservation = writer.reserve(namespace, keys)
    indices, sections = numbers(0, 2, 2), numbers(1, 0, 3)
    digests = writer.write_sections(reservation, indices, sections, cut(blocks)[indices, sections])
    every = np.repeat(np.arange(3), SECTIONS), np.tile(np.arange(SECTIONS), 3)
    out = np.zeros((3 * SECTIONS, STEP), dtype=np.uint8)
    assert not reader.read_sections(namespace, keys[every[0]], every[1], out).found.any(), "nothing is committed yet"
    assert writer.commit_sections(reservation, indices, sections, digests) == 0
    got = reader.read_sections(namespace, keys[every[0]], every[1], out)
    places = indices * SECTIONS + sections
    assert np.flatnonzero(got.found).tolist() == sorted(places.tolist()) and not got.corrupt.any()
    assert got.bytes == 3 * STEP
    assert np.array_equal(out[places], cut(blocks)[indices, sections])
    whole = np.zeros_like(blocks)
    assert not reader.get(namespace, keys, whole).found.any() and not reader.lookup(namespace, keys).any()
    rest = np.ones(3 * SECTIONS, dtype=np.bool_)
    rest[places] = False
    indices, sections = every[0][rest], every[1][rest]
    digests = writer.write_sections(reservation, indices, sections, cut(blocks)[indices, sections])
    assert writer.commit_sections(reservation, indices, sections, digests) == 3
    assert reader.get(namespace, keys, whole).found.all() and np.array_equal(whole, blocks)
    out[:] = 0
    assert reader.read_sections(namespace, keys[every[0]], every[1], out).found.all(), "also of complete blocks"
    assert np.array_equal(out, cut(blocks).reshape(out.shape))
    assert eventually(lambda: set(held(writer.stats())) <= {"sessions"})  # releases are not waited for


def test_a_reader_follows_a_writer_section_by_section(
    pair: tuple[PoolClient, PoolClient], namespace: NamespaceId
) -> None:
    """As decode follows prefill: each section is read when its news comes, while later ones are being written."""
    writer, reader = pair
    keys, blocks = random_blocks(4, [2, *namespace])
    out, seen = np.zeros_like(blocks), threading.Semaphore(0)
    news = reader.wait(namespace, keys, deadline_s=100)

    def follow() -> None:
        for some in news:
            chosen = some.states == SECTION
            index, section = some.indices[chosen], some.sections[chosen]
            rows = index * SECTIONS + section
            got = reader.read_sections(namespace, keys[index], section, out.reshape(-1, STEP), rows)
            assert got.found.all()
            seen.release(int(chosen.sum()))
            done.update(some.indices[some.states == COMMITTED].tolist())

    done: set[int] = set()
    thread = threading.Thread(target=follow)
    thread.start()
    reservation = writer.reserve(namespace, keys)
    for section in range(SECTIONS):
        sections = np.full(4, section)
        digests = writer.write_sections(reservation, np.arange(4), sections, cut(blocks)[:, section].copy())
        writer.commit_sections(reservation, np.arange(4), sections, digests)
        for _ in range(4):
            assert seen.acquire(timeout=60), f"section {section} was not read before the next one was written"
        assert np.array_equal(cut(out)[:, section], cut(blocks)[:, section])
    thread.join(60)
    assert done == {0, 1, 2, 3}


def test_sections_of_a_block_that_is_given_up(pair: tuple[PoolClient, PoolClient], namespace: NamespaceId) -> None:
    writer, reader = pair
    keys, blocks = random_blocks(1, [3, *namespace])
    reservation = writer.reserve(namespace, keys)
    digests = writer.write_sections(reservation, numbers(0), numbers(2), cut(blocks)[:, 2].copy())
    writer.commit_sections(reservation, numbers(0), numbers(2), digests)
    news = reader.wait(namespace, keys, deadline_s=60)
    out = np.zeros((1, STEP), dtype=np.uint8)
    assert reader.read_sections(namespace, keys, numbers(2), out).found.all()
    assert writer.abort(reservation) == 1
    assert [int(state) for some in news for state in some.states] == [SECTION, ABANDONED]
    assert not reader.read_sections(namespace, keys, numbers(2), out).found.any()
    assert eventually(lambda: set(held(writer.stats())) <= {"sessions"})  # releases are not waited for


def test_a_bad_section_is_a_miss(
    shared_node: NodeProcess, pair: tuple[PoolClient, PoolClient], namespace: NamespaceId
) -> None:
    writer, reader = pair
    keys, blocks = random_blocks(1, [4, *namespace])
    reservation = writer.reserve(namespace, keys)
    digests = writer.write_sections(reservation, numbers(0, 0), numbers(0, 1), cut(blocks)[0, :2].copy())
    writer.commit_sections(reservation, numbers(0, 0), numbers(0, 1), digests)
    uuid = bytes.fromhex(shared_node.segment.stem.rpartition("-")[2])
    segment = Segment.attach(shared_node.segment, uuid=uuid, mode="device")
    segment.data[int(reservation.slots.offsets[0]) + STEP + 5] ^= 1
    out = np.zeros((2, STEP), dtype=np.uint8)
    got = reader.read_sections(namespace, keys[[0, 0]], numbers(0, 1), out)
    assert (got.found.tolist(), got.corrupt.tolist()) == ([True, False], [False, True])
    assert np.array_equal(out[0], cut(blocks)[0, 0])
    segment.close()
    writer.abort(reservation)


def test_what_is_committed_is_not_committed_again(pair: tuple[PoolClient, PoolClient], namespace: NamespaceId) -> None:
    writer, _ = pair
    keys, blocks = random_blocks(1, [5, *namespace])
    reservation = writer.reserve(namespace, keys)
    digests = writer.write_sections(reservation, numbers(0), numbers(1), cut(blocks)[:, 1].copy())
    for _ in range(2):
        assert writer.commit_sections(reservation, numbers(0), numbers(1), digests) == 0
    with pytest.raises(AlreadyCommitted):
        writer.commit_sections(reservation, numbers(0), numbers(1), digests + np.uint64(1))
    writer.abort(reservation)


def test_bad_arguments(pair: tuple[PoolClient, PoolClient], namespace: NamespaceId) -> None:
    writer, reader = pair
    keys, blocks = random_blocks(2, [6, *namespace])
    out = np.zeros((2, STEP), dtype=np.uint8)
    reservation = writer.reserve(namespace, keys)
    for sections in (numbers(0), numbers(0, SECTIONS), numbers(-1, 0)):
        with pytest.raises(BadArgument, match="sections"):
            reader.read_sections(namespace, keys, sections, out)
        with pytest.raises(BadArgument, match="sections"):
            writer.write_sections(reservation, numbers(0, 1), sections, out)
    with pytest.raises(BadArgument):
        reader.read_sections(namespace, keys, numbers(0, 1), out[:1])
    with pytest.raises(BadArgument):
        writer.write_sections(reservation, numbers(0, 1), numbers(0, 1), out[:, :100])
    writer.commit(reservation, numbers(0, 1), writer.write(reservation, numbers(0, 1), blocks))
    with pytest.raises(BadArgument, match="can't hold"):
        reader.read_sections(namespace, keys, numbers(0, 1), out[:, :100])
    assert eventually(lambda: set(held(writer.stats())) <= {"sessions"})  # releases are not waited for


def test_asyncio_has_the_same_verbs(shared_node: NodeProcess) -> None:
    async def run() -> None:
        async with AsyncPoolClient(shared_node.address, timeout_s=30.0) as pool:
            namespace = await pool.register(namespace_spec("asyncio sections"))
            keys, blocks = random_blocks(1, [7, *namespace])
            reservation = await pool.reserve(namespace, keys)
            digests = await pool.write_sections(reservation, numbers(0), numbers(3), cut(blocks)[:, 3].copy())
            await pool.commit_sections(reservation, numbers(0), numbers(3), digests)
            out = np.zeros((1, STEP), dtype=np.uint8)
            assert (await pool.read_sections(namespace, keys, numbers(3), out)).found.all()
            assert np.array_equal(out, cut(blocks)[:, 3])
            await pool.abort(reservation)

    asyncio.run(run())
