"""Where the pages of a host pool lie, as planes of bytes that the pool's copy kernels can read and write in place.

A host pool says for each page which runs of memory it is made of. A plane is one of these runs over all pages. Few
planes (K and V of the page-first layouts, the one run of MLA) are moved directly between host pool and segment, each
as a group of the namespace; many (one or two a layer in the layer-first layout) are put together in a small buffer.
Only arithmetic on addresses; neither torch nor SGLang.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from engines.attached import planes
from engines.attached.planes import Int64s, Plane, Rows
from kvpool.core.errors import BadArgument, Unsupported

#: Pages of up to so many planes are moved directly; the rest by way of a buffer.
DIRECT_PLANES_MAX = 4

#: Number of a page -> addresses and sizes in bytes of its runs, shard by shard.
RunsOfPage = Callable[[int], tuple[Sequence[int], Sequence[int]]]


@dataclass(frozen=True, slots=True)
class Pages:
    """All pages of a host pool; whoever made this keeps the pool's memory alive.

    shards: of each shard that this process holds, its planes in the order of a page's bytes. All shards are alike.
    """

    page_count: int
    shards: tuple[tuple[Plane, ...], ...]

    @property
    def shard_bytes(self) -> int:
        """Of one shard of one page."""
        return planes.row_bytes(self.shards[0])

    @property
    def direct(self) -> bool:
        return len(self.shards[0]) <= DIRECT_PLANES_MAX

    @property
    def group_bytes(self) -> tuple[int, ...]:
        """Bytes of a page, of one shard, in each group of the namespace."""
        if self.direct:
            return tuple(plane.run_bytes for plane in self.shards[0])
        return (self.shard_bytes,)

    def check(self, numbers: Int64s) -> None:
        """Raises: BadArgument for page numbers that the pool does not have."""
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.page_count:
            raise BadArgument(f"pages {int(numbers.min())} to {int(numbers.max())} of a pool of {self.page_count}")

    def view(self, shard: int, plane: int) -> Rows:
        """A plane as rows, by page number: uint8 (page_count, run_bytes), in place."""
        at = self.shards[shard][plane]
        length = (self.page_count - 1) * at.stride_bytes + at.run_bytes
        flat = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(at.address))
        return as_strided(flat, (self.page_count, at.run_bytes), (at.stride_bytes, 1))

    def gather(self, shard: int, numbers: Int64s, rows: Rows) -> None:
        """Copies pages into `rows`, uint8 (>= pages, shard_bytes)."""
        planes.gather(self.shards[shard], numbers, rows)

    def scatter(self, shard: int, rows: Rows, numbers: Int64s) -> None:
        """Copies `rows`, uint8 (>= pages, shard_bytes), into pages."""
        planes.scatter(self.shards[shard], rows, numbers)


def pages_of(runs: RunsOfPage, page_count: int, shard_count: int = 1, *, one_buffer: bool) -> Pages:
    """Finds the planes of a host pool from what it says about its first two pages and its last one.

    Args:
        shard_count: with several, the pool names the runs of the first shard, then of the second, and so on.
        one_buffer: all runs lie in one allocation. Then they are put in the order of their addresses, which is that of
            the pool's own flat pages. Else they stay in the order in which the pool names them: where an allocation
            lies is another thing in each process.
    Raises: Unsupported if pages do not lie at equal distances, or overlap.
    """
    if page_count < 1:
        raise Unsupported("a host pool without pages")
    first, sizes = _runs(runs, 0)
    if not len(first) or len(first) % shard_count:
        raise Unsupported(f"pages of {len(first)} runs for {shard_count} shards")
    strides = sizes if page_count == 1 else _runs(runs, 1)[0] - first
    last, last_sizes = _runs(runs, page_count - 1)
    if len(last) != len(first) or (last != first + (page_count - 1) * strides).any() or (last_sizes != sizes).any():
        raise Unsupported("the pages of the host pool do not lie at equal distances")
    if (sizes < 1).any() or (strides < sizes).any():
        raise Unsupported("the pages of the host pool overlap, or are empty")
    per_shard = len(first) // shard_count
    shards = []
    for begin in range(0, len(first), per_shard):
        mine = slice(begin, begin + per_shard)
        order = begin + (np.argsort(first[mine], kind="stable") if one_buffer else np.arange(per_shard))
        runs_here = [Plane(int(first[i]), int(strides[i]), int(sizes[i])) for i in order]
        shards.append(planes.merged(runs_here) if one_buffer else tuple(runs_here))
    if any([plane.run_bytes for plane in shard] != [plane.run_bytes for plane in shards[0]] for shard in shards):
        raise Unsupported("the shards of a page differ in size")
    return Pages(page_count, tuple(shards))


def _runs(runs: RunsOfPage, page: int) -> tuple[Int64s, Int64s]:
    addresses, sizes = runs(page)
    return np.array(addresses, dtype=np.int64), np.array(sizes, dtype=np.int64)
