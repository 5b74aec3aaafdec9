"""What every data channel does: move the bytes of described blocks between a source and rows of the caller's memory.

The channel contract (tests/channels runs it over every implementation):
 * A read that returns has filled each row with the whole block; with `verify`, it tells for each whether the bytes have
   the digests that were committed. A row whose block is not good may hold anything.
 * A broken link, a peer that is too slow, a lease or reservation that does not cover the blocks raise ChannelError; the
   rows may then hold anything. (A channel that the source takes no part in can't see that a lease has ended.)
 * Nothing outlives its deadline, and no call waits without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, Unavailable

Rows = NDArray[np.int64]
Bytes2D = NDArray[np.uint8]

#: The caller's memory: uint8 (rows, bytes) with contiguous rows, or one contiguous uint8 array a row, of any lengths.
#: Either way `memory[row][:size]` is where a block lies.
Memory = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]


class ChannelError(Unavailable):
    """The channel could not do it: link lost, peer too slow or gone, hold refused. Another channel may."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kind of channel can do, as data."""

    same_host: bool  # only between processes that share memory
    through_source: bool  # bytes pass through the source's process, which sees and counts them
    threads_useful: int  # calls that gain from running at the same time
    writes: bool = True


class Channel(Protocol):
    """An open channel to one source. Calls may come from several threads at once."""

    kind: str
    capabilities: Capabilities

    def read(
        self,
        lease: int,
        blocks: Descriptors,
        out: Memory,
        rows: Rows | None = None,
        *,
        deadline_s: float,
        verify: bool = True,
    ) -> NDArray[np.bool_]:
        """Copies blocks that `lease` holds into `out`.

        Args:
            lease: the read right that covers `blocks`.
            out: rows of at least a block's bytes.
            rows: row of `out` for each block; None = the i-th block goes to row i.
            deadline_s: seconds from now within which the call ends.
            verify: check the digests, while the bytes are still in the CPU's cache.
        Returns: for each block whether its bytes are good.
        Raises: ChannelError.
        """
        ...

    def write(
        self, reservation: int, slots: Descriptors, data: Memory, rows: Rows | None = None, *, deadline_s: float
    ) -> NDArray[np.uint64]:
        """Copies rows of `data` into the slots of `reservation`.

        Returns: digests uint64 (slots, sections) of the bytes that were sent, to commit them with.
        Raises: ChannelError; none of the slots may then be committed on the strength of this call.
        """
        ...

    def close(self) -> None:
        """Ends the channel; calls under way fail."""
        ...


@dataclass(frozen=True, slots=True)
class Offer:
    """What a source says about one channel: its kind, and what is needed to open it."""

    kind: str
    parameters: Mapping[str, str]


Opener = Callable[[Mapping[str, str]], Channel]


def row_numbers(rows: Rows | None, count: int, row_count: int) -> Rows:
    """`rows` or the default, checked. Raises: BadArgument."""
    if rows is None:
        rows = np.arange(count, dtype=np.int64)
    if len(rows) != count or (count and (int(rows.min()) < 0 or int(rows.max()) >= row_count)):
        raise BadArgument(f"{len(rows)} row numbers up to {row_count} do not name a row for each of {count} blocks")
    return rows


def check_memory(memory: Memory, rows: Rows, sizes: NDArray[np.uint64], *, to_write: bool = False) -> None:
    """Raises: BadArgument unless these rows of `memory` are contiguous and hold blocks of these sizes.

    Args: to_write: blocks are read into it: what is read-only would be written all the same, by address.
    """
    if isinstance(memory, np.ndarray):
        if to_write and not memory.flags.writeable:
            raise BadArgument("the memory to read into is read-only", hint="give an array that may be written")
        if memory.dtype != np.uint8 or memory.ndim != 2 or (memory.size and memory.strides[1] != 1):
            raise BadArgument("block memory must be uint8 (rows, bytes) with contiguous rows")
        if len(sizes) and int(sizes.max()) > memory.shape[1]:
            raise BadArgument(f"rows of {memory.shape[1]} bytes can't hold a block of {int(sizes.max())}")
        return
    for row, size in zip(rows.tolist(), sizes.tolist(), strict=True):
        one = memory[row]
        if to_write and not one.flags.writeable:
            raise BadArgument(f"row {row} of the memory to read into is read-only")
        if one.dtype != np.uint8 or one.ndim != 1 or not one.flags.c_contiguous or len(one) < size:
            raise BadArgument(f"row {row} must be a contiguous uint8 array of at least {size} bytes")


def addresses(memory: Memory, rows: Rows) -> NDArray[np.uint64]:
    """Where rows begin in this process's memory; valid as long as the caller keeps `memory`."""
    if isinstance(memory, np.ndarray):
        return (memory.ctypes.data + rows * memory.strides[0]).astype(np.uint64)
    return np.fromiter((_address(memory[row]) for row in rows.tolist()), dtype=np.uint64, count=len(rows))


def _address(array: NDArray[np.uint8]) -> int:
    """Of the first byte of a contiguous array."""
    if array.flags.writeable and len(array):
        return addressof(c_char.from_buffer(array))  # a quarter of the time of `ctypes.data`
    return int(array.ctypes.data)
