"""How the tcp channel cuts a call: windows that are requests, chunks that are hashed together, views of the memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import Memory, Rows, addresses
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument
from kvpool.core.hashing import section_seed
from kvpool.core.kernels.copying import check_blocks, digest_blocks

#: What the number of a section is multiplied by in its seed.
_SECTION_SEED = section_seed(bytes(16), 1)


@dataclass(frozen=True, slots=True)
class Window:
    """What one request is about: whole blocks, or `total` bytes from `skip` on of a single one."""

    first: int
    count: int
    skip: int
    total: int
    part: bool  # of a block that is larger than a window


def cut(sizes: NDArray[np.uint64], bytes_max: int, blocks_max: int) -> list[Window]:
    """Consecutive windows within these bounds that cover all bytes of the blocks. Each size is at least 1."""
    windows: list[Window] = []
    ends = np.cumsum(sizes, dtype=np.uint64)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        stop = min(first + blocks_max, int(np.searchsorted(ends, before + bytes_max, side="right")))
        if stop > first:
            windows.append(Window(first, stop - first, 0, int(ends[stop - 1]) - before, False))
        else:
            size, stop = int(sizes[first]), first + 1
            skips = range(0, size, bytes_max)
            windows += [Window(first, 1, skip, min(bytes_max, size - skip), True) for skip in skips]
        first = stop
    return windows


class Batch:
    """Blocks of one call and where they lie in the caller's memory, section by section, as the kernels take them.

    Sections are numbered through all blocks: section s of block b is number b * section_count + s.
    """

    def __init__(self, blocks: Descriptors, memory: Memory, rows: Rows) -> None:
        """`memory` and `rows` are checked already. Raises: BadArgument if sections do not divide the blocks."""
        self.sizes = _for_kernels(blocks.sizes)
        given = blocks.digests.shape[1]
        count = self.section_count = max(1, given)
        if len(blocks) and (given < 1 or (self.sizes % np.uint64(count)).any() or not self.sizes.all()):
            raise BadArgument(f"{given} sections do not divide blocks of these sizes")
        self._blocks, self._memory = blocks, memory
        self._rows = np.repeat(rows, count)
        self._steps = np.repeat(self.sizes // np.uint64(count), count)
        numbers = np.tile(np.arange(count, dtype=np.uint64), len(blocks))
        self._begins = numbers * self._steps  # in the row
        self._addresses = np.repeat(addresses(memory, rows), count) + self._begins
        # The seed of a section is that of the first one with its number mixed into the key: one kernel for both.
        self._keys = np.repeat(np.ascontiguousarray(blocks.keys).view(np.uint64), count, axis=0)
        self._keys[:, 0] ^= numbers * np.uint64(_SECTION_SEED)
        self._digests = _for_kernels(blocks.digests).reshape(-1, 1)
        self._ones = np.ones(len(self._steps), dtype=np.uint64)
        # Rows without gaps between them are moved as one piece.
        row_bytes = 0
        if isinstance(memory, np.ndarray) and memory.flags.c_contiguous and memory.size:
            row_bytes = memory.shape[1]
            self._flat = memoryview(memory.reshape(-1))  # type: ignore[arg-type]
            self._begins = self._begins + (self._rows * row_bytes).astype(np.uint64)
        self._is_flat = bool(row_bytes)
        step = np.diff(self._rows)
        whole = np.repeat(self.sizes == row_bytes, count)[:-1]
        self._breaks = np.flatnonzero((step != 0) & ~((step == 1) & whole) | ((step == 0) & (numbers[1:] == 0)))

    def descriptors(self, window: Window) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint32]]:
        """Offsets, sizes and generations of the window's blocks."""
        part = slice(window.first, window.first + window.count)
        return self._blocks.offsets[part], self.sizes[part], self._blocks.generations[part]

    def sections(self, window: Window) -> tuple[int, int]:
        """(first, stop) of the sections of the window's blocks."""
        return window.first * self.section_count, (window.first + window.count) * self.section_count

    def views(self, first: int, stop: int) -> list[memoryview]:
        """The memory of these sections in order, neighbours as one piece."""
        inner = self._breaks[np.searchsorted(self._breaks, first) : np.searchsorted(self._breaks, stop - 1)]
        firsts = np.concatenate([[first], inner + 1])
        lasts = np.append(inner, stop - 1)
        begins = self._begins[firsts].tolist()
        ends = (self._begins[lasts] + self._steps[lasts]).tolist()
        if self._is_flat:
            return [self._flat[begin:end] for begin, end in zip(begins, ends, strict=True)]
        rows = self._rows[firsts].tolist()
        return [memoryview(self._memory[row])[begin:end] for row, begin, end in zip(rows, begins, ends, strict=True)]

    def part(self, window: Window) -> list[memoryview]:
        """The memory of a window that is a part of a block."""
        (view,) = self.views(*self.sections(window))
        return [view[window.skip : window.skip + window.total]]

    def chunks(self, window: Window, bytes_min: int) -> list[tuple[int, int]]:
        """(first, stop) of runs of the window's sections, each of at least so many bytes, but for the last one."""
        first, end = self.sections(window)
        ends = np.cumsum(self._steps[first:end])
        chunks: list[tuple[int, int]] = []
        at = 0
        while first + at < end:
            before = int(ends[at - 1]) if at else 0
            stop = min(end - first, int(np.searchsorted(ends, before + bytes_min)) + 1)
            chunks.append((first + at, first + stop))
            at = stop
        return chunks

    def check(self, first: int, stop: int, good: NDArray[np.bool_]) -> None:
        """Sets good[first:stop], bool (all sections): whether the sections in memory have their digests."""
        part = slice(first, stop)
        check_blocks(
            self._addresses[part], self._steps[part], self._keys[part], self._digests[part], self._ones[part],
            good[part],
        )  # fmt: skip

    def digest(self, first: int, stop: int, digests: NDArray[np.uint64]) -> None:
        """Sets digests[first:stop], uint64 (all sections, 1), to those of the sections in memory."""
        part = slice(first, stop)
        digest_blocks(self._addresses[part], self._steps[part], self._keys[part], self._ones[part], digests[part])


def _for_kernels(array: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """As the kernels are compiled for: contiguous, aligned, writable."""
    return np.require(array, dtype=np.uint64, requirements=["C", "A", "W"])
