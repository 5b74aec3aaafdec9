"""The limit of a disk for blocks of one size: threads in a compiled loop of pread or pwrite, and nothing else.

It moves the same bytes between the disk and the same memory as the SSD store does, in the same calls and with as many
requests under way, without descriptors, digests, an index, or Python between two blocks.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from kvpool.core.kernels.atomics import array_address
from kvpool.tiers.ssd.read_loop import take_next

_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uint64, types.uint64, types.int64))
_pwrite = types.ExternalFunction("pwrite", types.intp(types.int32, types.uint64, types.uint64, types.int64))


@njit(nogil=True, cache=True)
def move_blocks(
    counter: NDArray[np.uint64], fd: int, places: NDArray[np.int64], addresses: NDArray[np.uint64], size_bytes: int,
    writes: bool,
) -> int:  # fmt: skip
    """Moves blocks until none is left.

    Args:
        counter: uint64 (1,), shared by the threads of a call: the next block, 0 at first.
        places, addresses: of each block in the file, and in memory.
    Returns: how many were not moved in full.
    """
    counter_at, missed = array_address(counter), 0
    while True:
        row = np.int64(take_next(counter_at))
        if row >= len(places):
            return missed
        if writes:
            done = _pwrite(np.int32(fd), addresses[row], np.uint64(size_bytes), places[row])
        else:
            done = _pread(np.int32(fd), addresses[row], np.uint64(size_bytes), places[row])
        missed += done != size_bytes


class LoopFile:
    """A file as large as some memory, whose space was written before. Blocks: uint8 (n, size), page-aligned."""

    def __init__(self, path: Path, blocks: NDArray[np.uint8], depth: int, call_bytes: int) -> None:
        self._threads = ThreadPoolExecutor(depth)
        self._depth, self._size = depth, blocks.shape[1]
        self._step = max(1, call_bytes // self._size)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self._fd, 0, blocks.nbytes)
        self.write(blocks)

    def write(self, blocks: NDArray[np.uint8]) -> None:
        """In order; each call is durable before the next begins, as what is acknowledged must be."""
        rows = np.arange(len(blocks))
        for at in range(0, len(rows), self._step):
            self._move(blocks, rows[at : at + self._step], rows[at : at + self._step], writes=True)
            os.fdatasync(self._fd)

    def read(self, blocks: NDArray[np.uint8], order: NDArray[np.int64]) -> None:
        """Row `order[i]` of the file into row `order[i]` of memory."""
        for at in range(0, len(order), self._step):
            some = order[at : at + self._step]
            self._move(blocks, some, some, writes=False)

    def _move(
        self, blocks: NDArray[np.uint8], rows: NDArray[np.int64], places: NDArray[np.int64], *, writes: bool
    ) -> None:
        counter = np.zeros(1, np.uint64)
        addresses = np.uint64(blocks.ctypes.data) + rows.astype(np.uint64) * np.uint64(self._size)
        calls = [
            self._threads.submit(move_blocks, counter, self._fd, places * self._size, addresses, self._size, writes)
            for _ in range(self._depth)
        ]
        assert not any(call.result() for call in calls), "the disk refused a block"

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._fd)
