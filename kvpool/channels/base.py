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
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, Unavailable

Rows = NDArray[np.int64]
Bytes2D = NDArray[np.uint8]


class ChannelError(Unavailable):
    """The channel could not do it: link lost, peer too slow or gone, hold refused. Another channel may."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kind of channel can do, as data."""

    same_host: bool  # only between processes that share memory
    through_source: bool  # bytes pass through the source's process, which sees and counts them
    threads_useful: int  # calls that gain from running at the same time


class Channel(Protocol):
    """An open channel to one source. Calls may come from several threads at once."""

    kind: str
    capabilities: Capabilities

    def read(
        self,
        lease: int,
        blocks: Descriptors,
        out: Bytes2D,
        rows: Rows | None = None,
        *,
        deadline_s: float,
        verify: bool = True,
    ) -> NDArray[np.bool_]:
        """Copies blocks that `lease` holds into `out`.

        Args:
            lease: the read right that covers `blocks`.
            out: uint8 (rows, >= block bytes), rows contiguous.
            rows: row of `out` for each block; None = the i-th block goes to row i.
            deadline_s: seconds from now within which the call ends.
            verify: check the digests, while the bytes are still in the CPU's cache.
        Returns: for each block whether its bytes are good.
        Raises: ChannelError.
        """
        ...

    def write(
        self, reservation: int, slots: Descriptors, data: Bytes2D, rows: Rows | None = None, *, deadline_s: float
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


def open_best(offers: Sequence[Offer], openers: Mapping[str, Opener]) -> tuple[Channel | None, dict[str, str]]:
    """The first channel of `offers` that opens, and why each one before it did not."""
    failures: dict[str, str] = {}
    for offer in offers:
        opener = openers.get(offer.kind)
        if opener is None:
            continue
        try:
            return opener(offer.parameters), failures
        except (Unavailable, BadArgument) as error:
            failures[offer.kind] = str(error)
    return None, failures


def row_numbers(rows: Rows | None, count: int, row_count: int) -> Rows:
    """`rows` or the default, checked. Raises: BadArgument."""
    if rows is None:
        rows = np.arange(count, dtype=np.int64)
    if len(rows) != count or (count and (int(rows.min()) < 0 or int(rows.max()) >= row_count)):
        raise BadArgument(f"{len(rows)} row numbers up to {row_count} do not name a row for each of {count} blocks")
    return rows


def check_memory(memory: Bytes2D, sizes: NDArray[np.uint32]) -> None:
    """Raises: BadArgument unless `memory` has contiguous rows that hold blocks of these sizes."""
    if memory.dtype != np.uint8 or memory.ndim != 2 or (memory.size and memory.strides[1] != 1):
        raise BadArgument("block memory must be uint8 (rows, bytes) with contiguous rows")
    if len(sizes) and int(sizes.max()) > memory.shape[1]:
        raise BadArgument(f"rows of {memory.shape[1]} bytes can't hold a block of {int(sizes.max())}")
