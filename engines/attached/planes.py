"""An engine's memory as runs of bytes at equal distances, and copying many of them in one call. No engine, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.core.kernels.copying import copy_blocks

Int64s = NDArray[np.int64]
U64s = NDArray[np.uint64]
Rows = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Plane:
    """A run of every block, or page: number n has `run_bytes` at `address + n * stride_bytes`."""

    address: int
    stride_bytes: int
    run_bytes: int

    def with_next(self, other: Plane) -> Plane | None:
        """Both as one, where the other's run follows this one in every block; else None."""
        together = self.run_bytes + other.run_bytes
        follows = self.address + self.run_bytes == other.address and self.stride_bytes == other.stride_bytes
        return Plane(self.address, self.stride_bytes, together) if follows and together <= self.stride_bytes else None


def merged(planes: Iterable[Plane]) -> tuple[Plane, ...]:
    """The same bytes in the same order, neighbours as one."""
    found: list[Plane] = []
    for plane in planes:
        both = found[-1].with_next(plane) if found else None
        if both is None:
            found.append(plane)
        else:
            found[-1] = both
    return tuple(found)


def row_bytes(planes: Sequence[Plane]) -> int:
    """Bytes of a block in all planes together."""
    return sum(plane.run_bytes for plane in planes)


def gather(planes: Sequence[Plane], numbers: Int64s, rows: Rows) -> None:
    """Copies blocks into `rows`, uint8 (>= len(numbers), row_bytes): of each, its runs in the order of the planes."""
    copy_blocks(*_places(planes, numbers, rows))


def scatter(planes: Sequence[Plane], rows: Rows, numbers: Int64s) -> None:
    """Copies `rows`, as `gather` makes them, into blocks."""
    targets, sources, sizes = _places(planes, numbers, rows)
    copy_blocks(sources, targets, sizes)


def _places(planes: Sequence[Plane], numbers: Int64s, rows: Rows) -> tuple[U64s, U64s, U64s]:
    """Addresses in the planes and in `rows`, and sizes, of all runs."""
    width = row_bytes(planes)
    assert rows.flags.c_contiguous and rows.shape[1] == width and len(rows) >= len(numbers)
    inside, buffer, sizes = [], [], []
    begin = rows.ctypes.data
    lines = np.arange(len(numbers), dtype=np.int64) * width
    for plane in planes:
        inside.append(numbers * plane.stride_bytes + plane.address)
        buffer.append(lines + begin)
        sizes.append(np.full(len(numbers), plane.run_bytes, dtype=np.uint64))
        begin += plane.run_bytes
    return np.concatenate(inside).astype(np.uint64), np.concatenate(buffer).astype(np.uint64), np.concatenate(sizes)
