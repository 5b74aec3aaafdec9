"""Copying batches of blocks and their sections' digests: kernels over addresses, slice by slice until a deadline.

A large batch is shared between two threads: one core alone does not use the memory's bandwidth.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, Reason
from kvpool.core.hashing import section_seed
from kvpool.core.ids import KEY_BYTES, KeyArray
from kvpool.core.kernels import copying

U64 = NDArray[np.uint64]

#: The clock is looked at between slices of a batch, and between blocks that are larger.
SLICE_BYTES: Final = 32 << 20
#: What the number of a section is multiplied by in its seed.
_SECTION_SEED: Final = section_seed(bytes(16), 1)
#: A batch from this size on is worth a second thread.
SPLIT_BYTES_MIN: Final = 4 << 20


def bounds(size: int, section_count: int) -> Iterator[tuple[int, int, int]]:
    """(section, start, stop) of each section of a block. Raises: BadArgument if sections don't divide `size`."""
    if section_count < 1 or size % section_count:
        raise BadArgument(f"{section_count} sections do not divide a block of {size} bytes")
    step = size // section_count
    for section in range(section_count):
        yield section, section * step, (section + 1) * step


def block_keys(blocks: Descriptors) -> list[bytes]:
    """Keys as bytes, one object each."""
    packed = blocks.keys.tobytes()
    return [packed[i : i + 16] for i in range(0, len(packed), 16)]


def sections_as_blocks(blocks: Descriptors, sections: NDArray[np.int64]) -> Descriptors:
    """One section of each block as a block of its own, so that channels move sections as they move blocks.

    The seed of a section's digest is that of the first one with its number mixed into the key.

    Args: sections: int64 (blocks), each below the number of sections.
    Raises: BadArgument if the sections do not divide the blocks.
    """
    count, numbers = blocks.digests.shape[1], sections.astype(np.uint64)
    _section_counts(blocks.sizes, count)
    steps = blocks.sizes.astype(np.uint64) // np.uint64(count)
    words = np.ascontiguousarray(blocks.keys).view(np.uint64).reshape(-1, 2).copy()
    words[:, 0] ^= numbers * np.uint64(_SECTION_SEED)
    digests = blocks.digests[np.arange(len(blocks)), sections].reshape(-1, 1)
    keys = words.view(np.uint8).reshape(-1, KEY_BYTES)
    return Descriptors(keys, blocks.offsets + numbers * steps, steps, blocks.generations, digests)


# ---------------------------------------------------------------- batches


def copy_blocks_out(
    sources: U64, targets: U64, blocks: Descriptors, *, end_s: float, verify: bool = True
) -> NDArray[np.bool_]:
    """Copies blocks that others may be changing, and says which of the copies have their digests.

    Args:
        sources, targets: uint64 (n), addresses in this process; the caller keeps the memory.
        end_s: on the monotonic clock.
    Returns: bool (n); without `verify` all true. The copy of a bad block may hold anything.
    Raises: ChannelError if the time was not enough, BadArgument.
    """
    if not verify:
        copy_blocks(sources, targets, blocks.sizes, end_s=end_s)
        return np.ones(len(blocks), dtype=np.bool_)
    sizes, digests = _words(blocks.sizes), _words(blocks.digests)
    counts = _section_counts(sizes, digests.shape[1])
    return copy_cut_blocks_out(sources, targets, sizes, _key_words(blocks.keys), digests, counts, end_s=end_s)


def copy_cut_blocks_out(
    sources: U64, targets: U64, sizes: U64, keys: U64, digests: U64, counts: U64, *, end_s: float
) -> NDArray[np.bool_]:
    """As `copy_blocks_out`, of blocks that are cut into different numbers of sections.

    Args: keys: uint64 (n, 2); counts: uint64 (n), each divides the block's size and is at most the digests' width.
    """
    sources, targets, sizes, keys = _words(sources), _words(targets), _words(sizes), _words(keys)
    digests, counts = _words(digests), _words(counts)
    good = np.ones(len(sizes), dtype=np.bool_)

    def copy(some: slice) -> None:
        copying.copy_out_blocks(
            sources[some], targets[some], sizes[some], keys[some], digests[some], counts[some], good[some]
        )

    _in_slices(copy, sizes, end_s)
    return good


def copy_blocks_in(
    sources: U64, targets: U64, sizes: U64, keys: KeyArray, section_count: int, *, end_s: float
) -> NDArray[np.uint64]:
    """Copies blocks and returns the digests of what was copied, uint64 (n, section_count).

    Args: see `copy_blocks_out`. Raises: ChannelError if the time was not enough, BadArgument.
    """
    sources, targets, sizes, words = _words(sources), _words(targets), _words(sizes), _key_words(keys)
    counts = _section_counts(sizes, section_count)
    digests = np.zeros((len(sizes), section_count), dtype=np.uint64)

    def copy(some: slice) -> None:
        copying.copy_in_blocks(sources[some], targets[some], sizes[some], words[some], counts[some], digests[some])

    _in_slices(copy, sizes, end_s)
    return digests


def copy_blocks(sources: U64, targets: U64, sizes: U64, *, end_s: float) -> None:
    """Copies blocks. Args: see `copy_blocks_out`. Raises: ChannelError if the time was not enough."""
    sources, targets, sizes = _words(sources), _words(targets), _words(sizes)

    def copy(some: slice) -> None:
        copying.copy_blocks(sources[some], targets[some], sizes[some])

    _in_slices(copy, sizes, end_s)


def digest_blocks(addresses: U64, sizes: U64, keys: KeyArray, section_count: int) -> NDArray[np.uint64]:
    """Digests uint64 (n, section_count) of blocks of private memory. Raises: BadArgument."""
    sizes = _words(sizes)
    digests = np.zeros((len(sizes), section_count), dtype=np.uint64)
    counts = _section_counts(sizes, section_count)
    copying.digest_blocks(_words(addresses), sizes, _key_words(keys), counts, digests)
    return digests


def check_blocks(addresses: U64, blocks: Descriptors) -> NDArray[np.bool_]:
    """Which blocks of private memory have their digests, bool (n). Raises: BadArgument."""
    sizes, digests = _words(blocks.sizes), _words(blocks.digests)
    good = np.zeros(len(sizes), dtype=np.bool_)
    counts = _section_counts(sizes, digests.shape[1])
    copying.check_blocks(_words(addresses), sizes, _key_words(blocks.keys), digests, counts, good)
    return good


def _words(values: NDArray[Any]) -> U64:
    """As the kernels want it; see `copying`. A copy only where it is not that yet."""
    if values.dtype == np.uint64 and values.flags.carray:
        return values  # ten times as fast as asking numpy
    return np.require(values, dtype=np.uint64, requirements=["C", "A", "W"])


def _key_words(keys: KeyArray) -> U64:
    return _words(np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2))


def _section_counts(sizes: U64, section_count: int) -> U64:
    if section_count < 1 or (sizes % np.uint64(section_count)).any():
        raise BadArgument(f"{section_count} sections do not divide blocks of {np.unique(sizes).tolist()[:4]} bytes")
    return np.full(len(sizes), section_count, dtype=np.uint64)


# ---------------------------------------------------------------- one block


def digest_block(data: NDArray[np.uint8], key: bytes, section_count: int, out: NDArray[np.uint64]) -> None:
    """Digests of a block's sections, into `out` uint64 (section_count,)."""
    out[:] = digest_blocks(_address(data), _size(data), _one_key(key), section_count)[0]


def check_block(data: NDArray[np.uint8], key: bytes, digests: NDArray[np.uint64]) -> bool:
    """Whether a whole block of private memory has these digests."""
    return bool(check_blocks(_address(data), _one(data, key, digests))[0])


def copy_in(source: NDArray[np.uint8], target: NDArray[np.uint8], key: bytes, digests: NDArray[np.uint64]) -> None:
    """Copies a block and stores the digests of what was copied."""
    digests[:] = copy_blocks_in(
        _address(source), _address(target), _size(source), _one_key(key), len(digests), end_s=float("inf")
    )[0]


def copy_out(source: NDArray[np.uint8], target: NDArray[np.uint8], key: bytes, digests: NDArray[np.uint64]) -> bool:
    """Copies a block and says whether what arrived has these digests."""
    block = _one(source, key, digests)
    return bool(copy_blocks_out(_address(source), _address(target), block, end_s=float("inf"))[0])


def _address(data: NDArray[np.uint8]) -> U64:
    assert data.dtype == np.uint8 and data.ndim == 1 and data.flags.c_contiguous
    return np.array([data.ctypes.data], dtype=np.uint64)


def _size(data: NDArray[np.uint8]) -> U64:
    return np.array([len(data)], dtype=np.uint64)


def _one_key(key: bytes) -> KeyArray:
    return np.frombuffer(key, dtype=np.uint8).reshape(1, 16)


def _one(data: NDArray[np.uint8], key: bytes, digests: NDArray[np.uint64]) -> Descriptors:
    none = np.zeros(1, dtype=np.uint32)
    return Descriptors(_one_key(key), none.astype(np.uint64), _size(data), none, digests.reshape(1, -1))


# ---------------------------------------------------------------- slices and threads


def _cuts(sizes: U64, first: int, last: int) -> Iterator[slice]:
    """Runs of the blocks from `first` to before `last`, of about SLICE_BYTES or of one block."""
    ends = np.cumsum(sizes[first:last])
    at = 0
    while at < last - first:
        begin = int(ends[at - 1]) if at else 0
        stop = max(at + 1, int(np.searchsorted(ends, begin + SLICE_BYTES, side="right")))
        yield slice(first + at, first + stop)
        at = stop


def _in_slices(copy: Callable[[slice], None], sizes: U64, end_s: float) -> None:
    """Runs `copy` over all blocks, in two threads where that is worth it. None of it runs on after the return."""
    count = len(sizes)
    total = int(sizes.sum()) if count != 1 else 0  # a single block is never shared

    def run(first: int, last: int) -> None:
        for some in (slice(first, last),) if total < SPLIT_BYTES_MIN else _cuts(sizes, first, last):
            if time.monotonic() > end_s:
                done = f"{some.start - first} of {last - first} blocks were copied by the deadline"
                raise ChannelError(done, reason=Reason.DEADLINE)
            copy(some)

    other: Future[None] | None = None
    middle = count
    if total >= SPLIT_BYTES_MIN and _SECOND.useful:
        middle = min(int(np.searchsorted(np.cumsum(sizes), total // 2, side="left")) + 1, count - 1)
        other = _SECOND.submit(run, middle, count)
    if other is None:
        run(0, count)
        return
    try:
        run(0, middle)
    except BaseException:
        if not other.cancel():
            other.exception()  # it looks at the same clock, between slices
        raise
    if other.cancel():
        run(middle, count)  # others keep the threads busy
    else:
        other.result()


class _SecondThreads:
    """Threads that take the other half of a batch, made when first needed; none where there is one CPU."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._cpus = len(os.sched_getaffinity(0))

    @property
    def useful(self) -> bool:
        return self._cpus > 1

    def submit(self, run: Callable[[int, int], None], first: int, last: int) -> Future[None] | None:
        """None if there are no threads to be had: this process is about to end."""
        with self._lock, contextlib.suppress(RuntimeError):
            if self._pool is None:
                self._pool = ThreadPoolExecutor(min(4, self._cpus - 1), thread_name_prefix="block-copy")
            return self._pool.submit(run, first, last)
        return None

    def forget(self) -> None:
        """After a fork: the parent's threads are not here."""
        self._lock, self._pool = threading.Lock(), None


_SECOND: Final = _SecondThreads()
os.register_at_fork(after_in_child=_SECOND.forget)
