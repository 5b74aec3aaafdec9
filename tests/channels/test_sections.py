"""Batches of blocks: slices, threads, deadlines, and the arrays that callers bring along."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvpool.channels import sections
from kvpool.channels.base import ChannelError
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, Reason
from kvpool.core.hashing import section_digest

RNG = np.random.default_rng(23)


def made(count, size, section_count=2):
    """Source rows, target rows, descriptors with right digests, and addresses of both."""
    source = RNG.integers(0, 256, (count, size), dtype=np.uint8)
    target = np.zeros_like(source)
    keys = RNG.integers(0, 256, (count, 16), dtype=np.uint8)
    step = size // section_count
    digests = np.array(
        [
            [section_digest(row[s * step : (s + 1) * step], key.tobytes(), s) for s in range(section_count)]
            for row, key in zip(source, keys, strict=True)
        ],
        dtype=np.uint64,
    ).reshape(count, section_count)
    sizes = np.full(count, size, dtype=np.uint64)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(size)
    blocks = Descriptors(keys, offsets, sizes, np.zeros(count, dtype=np.uint32), digests)
    return source, target, blocks, offsets + source.ctypes.data, offsets + target.ctypes.data


def in_a_while():
    return time.monotonic() + 60


@pytest.mark.parametrize("count, size", [(0, 64), (1, 64), (1, 6 << 20), (3, 2 << 20), (2, 40 << 20), (9, 10 << 20),
                                         (5000, 2000)])  # fmt: skip
def test_batches_arrive_whole_in_one_thread_or_two(count, size):
    source, target, blocks, sources, targets = made(count, size)
    assert sections.copy_blocks_out(sources, targets, blocks, end_s=in_a_while()).tolist() == [True] * count
    assert np.array_equal(source, target)
    assert sections.check_blocks(targets, blocks).all()
    target[:] = 0
    digests = sections.copy_blocks_in(sources, targets, blocks.sizes, blocks.keys, 2, end_s=in_a_while())
    assert np.array_equal(digests, blocks.digests) and np.array_equal(source, target)
    assert np.array_equal(sections.digest_blocks(sources, blocks.sizes, blocks.keys, 2), blocks.digests)
    target[:] = 0
    assert sections.copy_blocks_out(sources, targets, blocks, end_s=in_a_while(), verify=False).all()
    assert np.array_equal(source, target)


def test_blocks_of_different_sizes_are_split_by_bytes():
    sizes = np.array([1, 30 << 20, 64, 0, 12 << 20, 5, 12 << 20], dtype=np.uint64)
    source, target = (np.zeros(int(sizes.sum()) + 64, dtype=np.uint8) for _ in range(2))
    source[:] = np.arange(len(source), dtype=np.uint32).view(np.uint8)[: len(source)]
    starts = np.cumsum(sizes) - sizes
    sections.copy_blocks(source.ctypes.data + starts, target.ctypes.data + starts, sizes, end_s=in_a_while())
    end = int(sizes.sum())
    assert np.array_equal(source[:end], target[:end]) and not target[end:].any()


@pytest.mark.parametrize("sizes", [[], [5], [1] * 7, [40 << 20] * 3, [1, 40 << 20, 1, 1, 40 << 20], [16 << 20] * 5])
def test_slices_cover_each_block_once_and_are_of_bounded_size(sizes):
    for first in range(len(sizes)):
        cuts = list(sections._cuts(np.array(sizes, dtype=np.uint64), first, len(sizes)))
        assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(first, len(sizes)))
        for cut in cuts:
            inside = sizes[cut]
            assert len(inside) == 1 or sum(inside) <= sections.SLICE_BYTES


@pytest.mark.parametrize("bad", [0, 1, 4, 5])
def test_a_bad_block_is_named_wherever_it_lies(bad):
    source, target, blocks, sources, targets = made(6, 2 << 20)
    source[bad, -1] ^= 1
    good = sections.copy_blocks_out(sources, targets, blocks, end_s=in_a_while())
    assert np.flatnonzero(~good).tolist() == [bad]
    assert np.array_equal(np.delete(source, bad, 0), np.delete(target, bad, 0))
    assert np.flatnonzero(~sections.check_blocks(sources, blocks)).tolist() == [bad]


@pytest.mark.parametrize("count, size", [(1, 64), (4, 2 << 20)])
def test_past_the_deadline_nothing_goes_on(count, size):
    _, target, blocks, sources, targets = made(count, size)
    for call in (
        lambda: sections.copy_blocks_out(sources, targets, blocks, end_s=time.monotonic() - 1),
        lambda: sections.copy_blocks_in(sources, targets, blocks.sizes, blocks.keys, 2, end_s=time.monotonic() - 1),
        lambda: sections.copy_blocks(sources, targets, blocks.sizes, end_s=time.monotonic() - 1),
    ):
        with pytest.raises(ChannelError, match="deadline") as late:
            call()
        assert late.value.reason is Reason.DEADLINE, "no fault of the link"
    assert not target.any()


def test_arrays_of_any_make_are_taken():
    source, target, blocks, sources, targets = made(4, 4096)
    packed = np.frombuffer(b"x" + blocks.keys.tobytes(), dtype=np.uint8)[1:].reshape(4, 16)  # read-only, not aligned
    digests = np.asfortranarray(blocks.digests)
    other = Descriptors(packed, blocks.offsets, blocks.sizes.astype(np.uint32), blocks.generations, digests)
    assert sections.copy_blocks_out(sources.astype(np.int64), targets, other, end_s=in_a_while()).all()
    assert np.array_equal(source, target)
    assert np.array_equal(sections.digest_blocks(sources, blocks.sizes, packed, 2), blocks.digests)


def test_sections_that_do_not_divide_a_block_are_refused():
    _, _, blocks, sources, targets = made(2, 100, 2)
    three = Descriptors(blocks.keys, blocks.offsets, blocks.sizes, blocks.generations, np.zeros((2, 3), np.uint64))
    none = Descriptors(blocks.keys, blocks.offsets, blocks.sizes, blocks.generations, np.zeros((2, 0), np.uint64))
    for bad in (three, none):
        with pytest.raises(BadArgument, match="do not divide"):
            sections.copy_blocks_out(sources, targets, bad, end_s=in_a_while())
        with pytest.raises(BadArgument, match="do not divide"):
            sections.check_blocks(sources, bad)
    with pytest.raises(BadArgument, match="do not divide"):
        list(sections.bounds(100, 3))


def test_one_block():
    source, target, blocks, _, _ = made(1, 3000, 3)
    (key,) = sections.block_keys(blocks)
    digests = np.zeros(3, dtype=np.uint64)
    sections.digest_block(source[0], key, 3, digests)
    assert np.array_equal(digests, blocks.digests[0])
    digests[:] = 0
    sections.copy_in(source[0], target[0], key, digests)
    assert np.array_equal(digests, blocks.digests[0]) and np.array_equal(source, target)
    target[:] = 0
    assert sections.copy_out(source[0], target[0], key, digests) and np.array_equal(source, target)
    assert sections.check_block(target[0], key, digests)
    target[0, 2999] ^= 1
    assert not sections.check_block(target[0], key, digests)
    assert [stop - start for _, start, stop in sections.bounds(3000, 3)] == [1000] * 3


def test_many_callers_at_once_finish_though_threads_are_few():
    batches = [made(4, 2 << 20) for _ in range(8)]
    with ThreadPoolExecutor(8) as callers:
        results = callers.map(
            lambda b: sections.copy_blocks_out(b[3], b[4], b[2], end_s=in_a_while()).all(), batches * 3
        )
        assert all(results)
    for source, target, *_ in batches:
        assert np.array_equal(source, target)


def test_an_error_of_one_half_waits_for_the_other():
    """Nobody may write to the caller's memory after the call has ended."""
    running, ended = threading.Event(), threading.Event()

    def copy(some):
        if some.start == 0:
            assert running.wait(60) or not sections._SECOND.useful
            raise ValueError("first half")
        running.set()
        time.sleep(0.05)
        ended.set()

    sizes = np.full(2, sections.SPLIT_BYTES_MIN, dtype=np.uint64)
    with pytest.raises(ValueError, match="first half"):
        sections._in_slices(copy, sizes, in_a_while())
    assert ended.is_set() or not sections._SECOND.useful


def test_a_forked_child_has_threads_of_its_own():
    source, target, blocks, sources, targets = made(4, 2 << 20)
    assert sections.copy_blocks_out(sources, targets, blocks, end_s=in_a_while()).all()
    child = os.fork()
    if child == 0:
        target[:] = 0
        good = sections.copy_blocks_out(sources, targets, blocks, end_s=in_a_while()).all()
        os._exit(0 if good and np.array_equal(source, target) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
