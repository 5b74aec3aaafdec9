"""The bytes of a call's objects in the caller's memory, lent to the pool a few objects at a time.

An object in one piece is lent where it lies, so that its bytes move once. An object in several pieces goes by way of a
buffer that is used again and again, so that it stays in the processor's cache: the pool's digest is of an object in one
piece.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.mooncake.memory import U64, Bytes, addresses
from kvpool.core.kernels.copying import copy_blocks

Rows = NDArray[np.int64]

#: Bytes gathered or scattered at a time, and buffers for that which are kept for later.
STAGING_BYTES, STAGING_KEPT_MAX = 8 << 20, 4


class Staging:
    """Buffers for objects in several pieces; at most STAGING_KEPT_MAX are kept. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Bytes] = []

    @contextmanager
    def borrowed(self, size_bytes: int) -> Iterator[Bytes]:
        """A buffer of at least so many bytes; a larger one than usual is not kept."""
        with self._lock:
            buffer = self._free.pop() if self._free and size_bytes <= STAGING_BYTES else None
        if buffer is None:
            buffer = np.empty(max(size_bytes, STAGING_BYTES), dtype=np.uint8)
        try:
            yield buffer
        finally:
            with self._lock:
                if len(buffer) == STAGING_BYTES and len(self._free) < STAGING_KEPT_MAX:
                    self._free.append(buffer)


STAGING = Staging()


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Pieces of memory of some objects: object i has those from `first[i]` to `first[i + 1]`.

    pointers, sizes: uint64 (pieces); first: int64 (objects + 1).
    """

    pointers: U64
    sizes: U64
    first: Rows

    @classmethod
    def of(cls, all_pointers: Sequence[Sequence[int]], all_sizes: Sequence[Sequence[int]]) -> Pieces:
        """An object with another number of addresses than of sizes has no pieces. Raises: TypeError."""
        pairs = [
            (pointers, sizes) if len(pointers) == len(sizes) else ((), ())
            for pointers, sizes in zip(all_pointers, all_sizes, strict=True)
        ]
        first = np.zeros(len(pairs) + 1, dtype=np.int64)
        np.cumsum([len(pointers) for pointers, _ in pairs], out=first[1:])
        flat = [pointer for pointers, _ in pairs for pointer in pointers]
        return cls(addresses(flat), addresses([size for _, sizes in pairs for size in sizes]), first)

    @classmethod
    def of_arrays(cls, objects: Sequence[Sequence[Bytes]]) -> Pieces:
        """Of memory of this process's own; whoever asks keeps it alive."""
        pointers = [[array.ctypes.data for array in arrays] for arrays in objects]
        return cls.of(pointers, [[len(array) for array in arrays] for arrays in objects])

    def take(self, rows: Rows) -> Pieces:
        """Of these objects alone; rows ascend."""
        first = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.diff(self.first)[rows], out=first[1:])
        return Pieces(*self.of_rows(rows), first)

    def __len__(self) -> int:
        return len(self.first) - 1

    def object_sizes(self) -> U64:
        """Bytes of each object, uint64 (objects)."""
        total = np.zeros(len(self.sizes) + 1, dtype=np.uint64)
        np.cumsum(self.sizes, out=total[1:])
        return (total[self.first[1:]] - total[self.first[:-1]]).astype(np.uint64)

    def all_of(self, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """For which objects all pieces are good, and there is at least one: bool (objects)."""
        bad = np.zeros(len(good) + 1, dtype=np.int64)
        np.cumsum(~good, out=bad[1:])
        counts = np.diff(self.first)
        all_good: NDArray[np.bool_] = (bad[self.first[1:]] == bad[self.first[:-1]]) & (counts > 0)
        return all_good

    def of_rows(self, rows: Rows) -> tuple[U64, U64]:
        """Pointers and sizes of the pieces of these objects, in order; rows ascend."""
        if len(rows) == len(self):  # so all of them
            return self.pointers, self.sizes
        counts = np.diff(self.first)[rows]
        ends = np.cumsum(counts)
        chosen = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(self.first[rows] - (ends - counts), counts)
        return self.pointers[chosen], self.sizes[chosen]


class Values(Protocol):
    """Objects of a call.

    sizes: uint64 (objects), of each the bytes that it has, or has room for.
    exact: whether an object that is read must have as many bytes as there is room for.
    """

    @property
    def sizes(self) -> U64: ...

    @property
    def exact(self) -> bool: ...

    def lend(self, rows: Rows) -> Iterator[tuple[Rows, list[Bytes]]]:
        """Memory of these objects, some of them at a time; each lot ends when the next is asked for.

        To be stored: the lot holds the bytes. To be read: it has room for them, and `arrived` says that they are there.
        """
        ...

    def arrived(self, rows: Rows, lot: list[Bytes]) -> None:
        """Objects `rows` of the lot have been read."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class WholeValues:
    """Objects in one piece each."""

    arrays: Sequence[Bytes]
    sizes: U64
    exact: bool = False

    @classmethod
    def of(cls, arrays: Sequence[Bytes]) -> WholeValues:
        return cls(arrays, np.fromiter((len(array) for array in arrays), dtype=np.uint64, count=len(arrays)))

    def lend(self, rows: Rows) -> Iterator[tuple[Rows, list[Bytes]]]:
        yield rows, [self.arrays[row] for row in rows.tolist()]

    def arrived(self, rows: Rows, lot: list[Bytes]) -> None:
        """They lie where they are wanted."""


class GatheredValues:
    """Objects in several pieces, to be stored."""

    exact = False

    def __init__(self, pieces: Pieces) -> None:
        self.pieces, self.sizes = pieces, pieces.object_sizes()

    def lend(self, rows: Rows) -> Iterator[tuple[Rows, list[Bytes]]]:
        for lot in lots(self.sizes, rows):
            with STAGING.borrowed(int(self.sizes[lot].sum())) as buffer:
                pointers, sizes = self.pieces.of_rows(lot)
                copy_blocks(pointers, _line(buffer, sizes), sizes)
                yield lot, _cut(buffer, self.sizes[lot])

    def arrived(self, rows: Rows, lot: list[Bytes]) -> None:
        raise AssertionError("these are to be stored")


class ScatteredValues:
    """Objects to be read into several pieces each."""

    exact = True

    def __init__(self, pieces: Pieces) -> None:
        self.pieces, self.sizes = pieces, pieces.object_sizes()

    def lend(self, rows: Rows) -> Iterator[tuple[Rows, list[Bytes]]]:
        for lot in lots(self.sizes, rows):
            with STAGING.borrowed(int(self.sizes[lot].sum())) as buffer:
                yield lot, _cut(buffer, self.sizes[lot])

    def arrived(self, rows: Rows, lot: list[Bytes]) -> None:
        if not len(rows):
            return
        pointers, sizes = self.pieces.of_rows(rows)
        counts = np.diff(self.pieces.first)[rows]
        begins = np.repeat(np.array([array.ctypes.data for array in lot], dtype=np.uint64), counts)
        ends = np.cumsum(sizes, dtype=np.uint64)
        objects = np.repeat(np.cumsum(self.sizes[rows], dtype=np.uint64) - self.sizes[rows], counts)
        copy_blocks((begins + (ends - sizes - objects)).astype(np.uint64), pointers, sizes)


def lots(sizes: U64, rows: Rows) -> Iterator[Rows]:
    """Cuts rows into runs of at most STAGING_BYTES together, or of one object that is larger."""
    begin, total = 0, 0
    for index, size in enumerate(sizes[rows].tolist()):
        if index > begin and total + size > STAGING_BYTES:
            yield rows[begin:index]
            begin, total = index, 0
        total += size
    if begin < len(rows):
        yield rows[begin:]


def _line(buffer: Bytes, sizes: U64) -> U64:
    """Addresses of pieces that lie one behind the other in a buffer."""
    return (np.cumsum(sizes, dtype=np.uint64) - sizes + np.uint64(buffer.ctypes.data)).astype(np.uint64)


def _cut(buffer: Bytes, sizes: U64) -> list[Bytes]:
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    return [buffer[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]
