"""Blocks as one stream of bytes, cut into chunks of one size: for channels that move chunks through their own memory.

Only arithmetic on arrays, and copies between blocks and a chunk; no transport. Memory is named by addresses, as in the
kernels: the caller makes sure that it stays where it is, and is as long as it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument
from kvpool.core.kernels.copying import check_blocks, copy_blocks, copy_in_blocks, copy_out_blocks, digest_blocks

Int64s = NDArray[np.int64]
U64s = NDArray[np.uint64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Consecutive pieces of blocks, one behind the other.

    blocks, starts, sizes, ats int64 (pieces): the piece is `sizes` bytes of block `blocks` from byte `starts` on, and
    lies at byte `ats` of the chunk; `whole` bool (pieces): it is all of its block. `complete` are the blocks whose last
    byte this chunk brings.
    """

    blocks: Int64s
    starts: Int64s
    sizes: Int64s
    ats: Int64s
    whole: Bools
    bytes_total: int
    complete: range


def cut(sizes: NDArray[np.integer], chunk_bytes: int) -> Iterator[Chunk]:
    """The chunks of blocks of these sizes in bytes, each at least 1; all but the last chunk have `chunk_bytes`."""
    assert chunk_bytes > 0
    sizes = sizes.astype(np.int64)
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    done = 0
    for low in range(0, total, chunk_bytes):
        high = min(low + chunk_bytes, total)
        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(ends, high, side="left"))
        blocks = np.arange(first, last + 1)
        begins = ends[blocks] - sizes[blocks]
        lows = np.maximum(begins, low)
        piece_bytes = np.minimum(ends[blocks], high) - lows
        stop = int(np.searchsorted(ends, high, side="right"))
        whole = piece_bytes == sizes[blocks]
        yield Chunk(blocks, lows - begins, piece_bytes, lows - low, whole, high - low, range(done, stop))
        done = stop


def chunk_count(bytes_total: int, chunk_bytes: int) -> int:
    """How many chunks `cut` makes of blocks with so many bytes."""
    return -(-bytes_total // chunk_bytes)


def gather(chunk: Chunk, addresses: U64s, target: int) -> None:
    """Copies the pieces of blocks at these addresses together, to address `target`."""
    copy_blocks(_piece_addresses(chunk, addresses), _chunk_addresses(chunk, target), chunk.sizes.astype(np.uint64))


def scatter(chunk: Chunk, source: int, addresses: U64s, only: Bools | None = None) -> None:
    """Copies the pieces of a chunk at address `source` to their blocks; `only` bool (pieces) leaves some out."""
    sources, targets = _chunk_addresses(chunk, source), _piece_addresses(chunk, addresses)
    sizes = chunk.sizes.astype(np.uint64)
    if only is not None:
        sources, targets, sizes = sources[only], targets[only], sizes[only]
    copy_blocks(sources, targets, sizes)


class Digested:
    """Blocks of the caller's that are sent or received chunk by chunk, in order, and their digests."""

    def __init__(self, blocks: Descriptors, addresses: U64s) -> None:
        """Args: addresses: uint64 (blocks), of the caller's memory. Raises: BadArgument for impossible sizes."""
        self._sizes = blocks.sizes.astype(np.uint64)
        sections = blocks.digests.shape[1]
        if len(self._sizes) and (sections < 1 or np.any(self._sizes % np.uint64(sections))):
            raise BadArgument(f"{sections} sections do not divide blocks of these sizes")
        if not self._sizes.all():
            raise BadArgument("a block of no bytes")
        self._addresses = addresses
        self._keys = np.array(blocks.keys, dtype=np.uint8, order="C").view(np.uint64).reshape(-1, 2)
        self._section_counts = np.full(len(self._sizes), sections, dtype=np.uint64)
        #: uint64 (blocks, sections): expected of what is received; of what was sent, once it was.
        self.digests = np.array(blocks.digests, dtype=np.uint64, order="C")
        #: bool (blocks): received, and intact.
        self.good = np.zeros(len(self._sizes), dtype=np.bool_)

    def receive(self, chunk: Chunk, source: int) -> None:
        """Takes a chunk that lies at address `source`. What is checked is what the caller gets."""
        cut_pieces = ~chunk.whole
        if cut_pieces.any():
            scatter(chunk, source, self._addresses, cut_pieces)
        at = chunk.blocks[chunk.whole]
        if len(at):
            good = np.empty(len(at), dtype=np.bool_)
            sources = _chunk_addresses(chunk, source)[chunk.whole]
            copy_out_blocks(
                sources, self._addresses[at], self._sizes[at], self._keys[at], self.digests[at],
                self._section_counts[at], good,
            )  # fmt: skip
            self.good[at] = good
        last = np.setdiff1d(np.arange(chunk.complete.start, chunk.complete.stop), at, assume_unique=True)
        if len(last):
            good = np.empty(len(last), dtype=np.bool_)
            check_blocks(
                self._addresses[last], self._sizes[last], self._keys[last], self.digests[last],
                self._section_counts[last], good,
            )  # fmt: skip
            self.good[last] = good

    def send(self, chunk: Chunk, target: int) -> None:
        """Puts a chunk together at address `target`."""
        targets = _chunk_addresses(chunk, target)
        at = chunk.blocks[chunk.whole]
        if len(at):
            digests = np.empty((len(at), self.digests.shape[1]), dtype=np.uint64)
            copy_in_blocks(
                self._addresses[at], targets[chunk.whole], self._sizes[at], self._keys[at], self._section_counts[at],
                digests,
            )  # fmt: skip
            self.digests[at] = digests
        cut_pieces = ~chunk.whole
        if not cut_pieces.any():
            return
        sources = _piece_addresses(chunk, self._addresses)[cut_pieces]
        copy_blocks(sources, targets[cut_pieces], chunk.sizes[cut_pieces].astype(np.uint64))
        first = chunk.blocks[cut_pieces & (chunk.starts == 0)]
        if len(first):
            digests = np.empty((len(first), self.digests.shape[1]), dtype=np.uint64)
            digest_blocks(
                self._addresses[first], self._sizes[first], self._keys[first], self._section_counts[first], digests
            )
            self.digests[first] = digests


def _piece_addresses(chunk: Chunk, addresses: U64s) -> U64s:
    return addresses[chunk.blocks] + chunk.starts.astype(np.uint64)


def _chunk_addresses(chunk: Chunk, base: int) -> U64s:
    return chunk.ats.astype(np.uint64) + np.uint64(base)
