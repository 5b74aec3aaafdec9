"""Copy and hash kernels against numpy and the xxhash library."""

import threading

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core import hashing
from kvpool.core.kernels import copying
from kvpool.core.kernels.stripes import STRIPE_BYTES

BIG = np.random.default_rng(17).integers(0, 256, (4 << 20) + 4096, dtype=np.uint8)
GUARD = 0xA5


class Batch:
    """Blocks of `sizes` bytes at `offsets` of BIG, and a place for each in a guarded target."""

    def __init__(self, sizes, *, section_counts=None, source_shift=0, target_shift=0, seed=0):
        rng = np.random.default_rng(seed)
        count = len(sizes)
        self.sizes = np.array(sizes, dtype=np.uint64)
        self.section_counts = np.array(section_counts or [1] * count, dtype=np.uint64)
        self.keys = rng.integers(0, 2**64, (count, 2), dtype=np.uint64)
        self.starts = [source_shift + int(rng.integers(0, 32)) * 64 for _ in sizes]
        places, at = [], 64 + target_shift
        for size in sizes:
            places.append(at)
            at += -(-size // 64) * 64 + 128
        memory = np.full(at + 64, GUARD, dtype=np.uint8)
        self.target = memory[-memory.ctypes.data % 64 :]  # shifts are then from a multiple of 64
        self.places = places
        self.sources = np.array([BIG.ctypes.data + start for start in self.starts], dtype=np.uint64)
        self.targets = np.array([self.target.ctypes.data + place for place in places], dtype=np.uint64)
        self.digests = np.zeros((count, int(self.section_counts.max())), dtype=np.uint64)

    def source(self, i):
        return BIG[self.starts[i] : self.starts[i] + int(self.sizes[i])]

    def expected_digests(self):
        expected = np.zeros_like(self.digests)
        for i in range(len(self.sizes)):
            step = int(self.sizes[i] // self.section_counts[i])
            for section in range(int(self.section_counts[i])):
                part = self.source(i)[section * step : (section + 1) * step]
                expected[i, section] = hashing.section_digest(part, self.keys[i].tobytes(), section)
        return expected

    def check_target(self):
        """Each block where it belongs, and not a byte besides."""
        expected = np.full_like(self.target, GUARD)
        for i, place in enumerate(self.places):
            expected[place : place + int(self.sizes[i])] = self.source(i)
        assert np.array_equal(self.target, expected)

    def copy_in(self):
        copying.copy_in_blocks(
            self.sources, self.targets, self.sizes, self.keys, self.section_counts, self.digests
        )  # fmt: skip

    def copy_out(self):
        good = np.zeros(len(self.sizes), dtype=np.bool_)
        copying.copy_out_blocks(
            self.sources, self.targets, self.sizes, self.keys, self.digests, self.section_counts, good
        )
        return good

    def check(self):
        good = np.zeros(len(self.sizes), dtype=np.bool_)
        copying.check_blocks(self.sources, self.sizes, self.keys, self.digests, self.section_counts, good)
        return good


def check_all_kernels(**arguments):
    batch = Batch(**arguments)
    expected = batch.expected_digests()
    batch.copy_in()
    batch.check_target()
    assert np.array_equal(batch.digests, expected)

    batch = Batch(**arguments)
    batch.digests[:] = expected
    assert batch.copy_out().all()
    batch.check_target()
    assert batch.check().all()

    batch = Batch(**arguments)
    copying.copy_blocks(batch.sources, batch.targets, batch.sizes)
    batch.check_target()
    copying.digest_blocks(batch.sources, batch.sizes, batch.keys, batch.section_counts, batch.digests)
    assert np.array_equal(batch.digests, expected)


def test_every_short_length():
    check_all_kernels(sizes=list(range(1101)), source_shift=3, target_shift=5)


@pytest.mark.parametrize("target_shift", [0, 1, 16, 32])
def test_lengths_around_the_steps_of_the_loops(target_shift):
    edges = [n * step + extra for step in (1024, 16384) for n in (1, 2, 3, 4, 7) for extra in (-64, -1, 0, 1, 63, 64)]
    check_all_kernels(sizes=edges, source_shift=target_shift * 3, target_shift=target_shift)


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, (4 << 20) - 5, 3 << 20])
@pytest.mark.parametrize("target_shift", [0, 7])
def test_blocks_that_bypass_the_caches(size, target_shift):
    assert size >= copying.STREAM_BYTES_MIN
    check_all_kernels(sizes=[size], target_shift=target_shift)


def test_a_large_batch_of_small_blocks_with_different_section_counts():
    counts = [1, 2, 3, 4, 8, 64] * 40
    sizes = [count * (64 * (count % 5) + 512) for count in counts]
    sizes[7] += counts[7] * 5  # one whose sections do not fit the stripes
    assert sum(sizes) > copying.STREAM_BYTES_MIN
    check_all_kernels(sizes=sizes, section_counts=counts)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([1, 2, 3, 8])), min_size=1, max_size=8),
    st.integers(0, 130), st.integers(0, 130), st.integers(0, 2**32),
)  # fmt: skip
def test_any_batch(blocks, source_shift, target_shift, seed):
    check_all_kernels(
        sizes=[step * count for step, count in blocks],
        section_counts=[count for _, count in blocks],
        source_shift=source_shift,
        target_shift=target_shift,
        seed=seed,
    )


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 3000))
def test_any_seed(seed, size):
    """With a key of (seed, 0) the first section's seed is the number itself."""
    batch = Batch([size])
    batch.keys[0] = (seed, 0)
    copying.digest_blocks(batch.sources, batch.sizes, batch.keys, batch.section_counts, batch.digests)
    assert int(batch.digests[0, 0]) == xxhash.xxh3_64_intdigest(batch.source(0), seed=seed)


@pytest.mark.parametrize("size", [1, 16, 100, 200, 241, 4096, 70_000, 2 << 20])
def test_one_flipped_bit_is_found_anywhere(size):
    rng = np.random.default_rng(size)
    original = BIG[:size].copy()
    batch = Batch([size])
    batch.sources[0] = original.ctypes.data
    batch.starts[0] = 0
    batch.copy_in()
    for at in {0, size - 1, size // 2, *rng.integers(0, size, 20).tolist()}:
        original[at] ^= 1 << int(rng.integers(0, 8))
        assert not batch.copy_out()[0] and not batch.check()[0]
        original[at] = BIG[at]
        assert batch.copy_out()[0] and batch.check()[0]


def test_a_block_does_not_verify_as_another_one():
    batch = Batch([8192] * 3, section_counts=[4] * 3)
    batch.copy_in()
    digests = batch.digests.copy()
    batch.keys[0, 0] ^= np.uint64(1)
    assert batch.check().tolist() == [False, True, True]
    batch.keys[0, 0] ^= np.uint64(1)
    batch.digests[1, [0, 1]] = digests[1, [1, 0]]
    batch.sources[2] = batch.sources[0]
    assert batch.copy_out().tolist() == [True, False, False]


def test_a_bad_block_is_not_copied_past_its_first_bad_section():
    batch = Batch([4 << 10], section_counts=[4])
    batch.copy_in()
    batch.digests[0, 1] ^= np.uint64(1)
    batch.target[:] = GUARD
    assert not batch.copy_out()[0]
    arrived = batch.target[batch.places[0] :]
    assert np.array_equal(arrived[:2048], batch.source(0)[:2048]) and (arrived[2048:] == GUARD).all()


@pytest.mark.parametrize("size", [200, 1 << 10, 5000, 1 << 16, 2 << 20])
def test_a_copy_that_verifies_is_right_though_its_source_changes_meanwhile(size):
    """A thread keeps changing the source back and forth; what is reported good must be the committed bytes."""
    committed, other = BIG[:size].copy(), ~BIG[:size]
    shared = committed.copy()
    batch = Batch([size])
    batch.starts[0] = 0
    batch.sources[0] = committed.ctypes.data
    batch.copy_in()
    batch.sources[0] = shared.ctypes.data
    stop = threading.Event()
    step = max(1, size // 7)

    def change():
        while not stop.is_set():
            for source in (other, committed):
                for at in range(0, size, step):
                    shared[at : at + step] = source[at : at + step]

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(3000 if size < 100_000 else 100):
            if batch.copy_out()[0]:
                batch.check_target()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("size", [200, 4096])
def test_digests_of_what_was_copied_in_cover_the_copy_though_the_source_changes(size):
    """Of lengths that are no multiple of a stripe, some bytes are loaded twice: their digest may then fit no bytes."""
    assert size <= 240 or size % STRIPE_BYTES == 0
    shared = BIG[:size].copy()
    batch = Batch([size])
    batch.sources[0] = shared.ctypes.data
    stop = threading.Event()

    def change():
        while not stop.is_set():
            np.invert(shared, out=shared)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        copy = batch.target[batch.places[0] : batch.places[0] + size]
        for _ in range(3000):
            batch.copy_in()
            assert hashing.section_digest(copy, batch.keys[0].tobytes(), 0) == int(batch.digests[0, 0])
    finally:
        stop.set()
        thread.join()


def test_warm_up_compiles_each_kernel_for_one_signature():
    copying.warm_up()
    check_all_kernels(sizes=[1000, 2000], section_counts=[1, 2])
    kernels = (
        copying.copy_out_blocks, copying.copy_in_blocks, copying.copy_blocks, copying.digest_blocks,
        copying.check_blocks,
    )  # fmt: skip
    assert [len(kernel.signatures) for kernel in kernels] == [1] * len(kernels)
