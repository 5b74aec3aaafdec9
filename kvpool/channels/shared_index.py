"""Reading a source of this host without asking it: its segment carries its index.

A read looks up a batch of keys, copies, looks whether the entries have changed meanwhile, and checks digests. What is
reported good is the committed bytes; everything else is for the source to settle. What was read is marked as used, so
that the source does not take its hottest blocks for cold.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError, Memory, Rows, addresses, check_memory, row_numbers
from kvpool.channels.sections import copy_blocks, copy_cut_blocks_out
from kvpool.channels.shm import READERS, offered_segment
from kvpool.core.arrays import FLAG_LOWER_TIER, FLAGS, SourceArrays
from kvpool.core.errors import BadArgument, Unavailable
from kvpool.core.ids import KEY_BYTES, KeyArray
from kvpool.core.kernels import probing
from kvpool.core.kernels.names import keep_equal
from kvpool.tiers.dram import Segment

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a look into the index gave, one row a key.

    hit: bool (n), a readable exact copy was there; definite_miss: bool (n), none was (neither: only the source knows).
    Of hits only: key_words uint64 (n, 2); entries int64 (n) and generations uint32 (n); offsets, sizes (bytes) and
    section_counts uint64 (n); digests uint64 (n, sections); name_bytes uint64 (n), of objects, 0 for blocks.
    """

    hit: Bools
    definite_miss: Bools
    key_words: NDArray[np.uint64]
    entries: NDArray[np.int64]
    generations: NDArray[np.uint32]
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    section_counts: NDArray[np.uint64]
    digests: NDArray[np.uint64]
    name_bytes: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.hit)

    def take(self, rows: NDArray[np.int64] | Bools) -> Found:
        """The rows named by an index or a mask."""
        return Found(
            self.hit[rows], self.definite_miss[rows], self.key_words[rows], self.entries[rows],
            self.generations[rows], self.offsets[rows], self.sizes[rows], self.section_counts[rows],
            self.digests[rows], self.name_bytes[rows],
        )  # fmt: skip


class _View:
    """A mapped index as the kernels take it. Whoever holds one keeps the mapping alive."""

    def __init__(self, segment: Segment) -> None:
        try:
            arrays = SourceArrays.attach(segment.index, segment.touches)
        except BadArgument as error:
            raise Unavailable(str(error), hint=error.hint) from error
        self.sections, self.header, self.touches = arrays.sections, arrays.header, arrays.touches
        self.data_address, self.data_bytes = segment.data.ctypes.data, len(segment.data)
        self.data = probing.read_only(segment.data)
        self.searched = probing.searched_arrays(arrays)
        self.described = probing.described_arrays(arrays)
        self.generations = probing.read_only(arrays.generations)


class SharedIndex:
    """The index of a source of this host. Calls may come from several threads at once."""

    def __init__(self, segment: Segment) -> None:
        """Takes over one use of a mapping of READERS. Raises: Unavailable if its index has another layout."""
        self._segment = segment
        self._mapped: _View | None = _View(segment)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, parameters: Mapping[str, str]) -> SharedIndex:
        """Opens what a source offered, as for `ShmChannel`. Raises: Unavailable, BadArgument."""
        segment = READERS.acquire(*offered_segment(parameters))
        try:
            return cls(segment)
        except BaseException:
            READERS.release(segment)
            raise

    def close(self) -> None:
        """Gives the mapping back; calls under way end as usual, later ones fail. Idempotent."""
        with self._lock:
            view, self._mapped = self._mapped, None
        if view is not None:
            READERS.release(self._segment)

    @property
    def has_lower_tier(self) -> bool:
        """Whether what is not here may be in a lower tier of the same source, now. Raises: ChannelError if closed."""
        return bool(int(self._view().header[FLAGS]) & FLAG_LOWER_TIER)

    def lookup(self, number: int, keys: KeyArray) -> tuple[Bools, Bools]:
        """Which keys have a readable exact block in the source's namespace `number`, and which definitely have none.

        Returns: two of bool (n). What is neither only the source knows: an entry on the move, any object.
        Raises: ChannelError if closed.
        """
        view = self._view()
        answers = np.empty(len(keys), dtype=np.uint8)
        probing.probe(number, _key_words(keys), *view.searched, answers)
        return answers == probing.HIT, answers == probing.MISS

    def find(self, number: int, keys: KeyArray, names: Sequence[bytes] | None = None) -> Found:
        """Where the blocks of `keys` lie; with `names`, one a key, where those objects do. Changes nothing.

        Args, Raises: as `lookup`.
        """
        view = self._view()
        words, count = _key_words(keys), len(keys)
        answers = np.empty(count, dtype=np.uint8)
        entries, generations = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.uint32)
        extents = np.empty((4, count), dtype=np.uint64)
        digests = np.empty((count, view.sections), dtype=np.uint64)
        probing.find(
            number, words, *view.searched, *view.described, view.data_bytes, names is not None, answers, entries,
            generations, extents, digests,
        )  # fmt: skip
        hit, miss = answers == probing.HIT, answers == probing.MISS
        found = Found(hit, miss, words, entries, generations, *extents[:3], digests, extents[3])
        if names is not None:
            # Of an entry that changes meanwhile anything may be read here; `read` finds that out afterwards.
            wanted = np.frombuffer(b"".join(names) or b"\0", dtype=np.uint8)
            ends = np.cumsum(np.fromiter(map(len, names), dtype=np.uint64, count=count), dtype=np.uint64)
            keep_equal(view.data, found.offsets + found.sizes, found.name_bytes, wanted, ends, hit)
        return found

    def read(
        self, found: Found, memory: Memory, rows: Rows | None = None, *, verify: bool = True, deadline_s: float
    ) -> Bools:
        """Copies the blocks that were found.

        Args:
            memory: rows of at least a block's bytes.
            rows: row of `memory` for each of `found`, all different; None = in order.
            verify: check digests too; without, a block that a late writer harmed would be taken for good.
        Returns: bool (n), whether a row now holds what was committed; another one may hold anything.
        Raises: BadArgument; ChannelError if the time was not enough, or closed.
        """
        end_s = time.monotonic() + deadline_s
        view = self._view()
        rows = row_numbers(rows, len(found), len(memory))
        if found.hit.all():
            return self._read_hits(view, found, memory, rows, verify, end_s)
        good = np.zeros(len(found), dtype=np.bool_)
        good[found.hit] = self._read_hits(view, found.take(found.hit), memory, rows[found.hit], verify, end_s)
        return good

    @staticmethod
    def _read_hits(view: _View, hits: Found, memory: Memory, rows: Rows, verify: bool, end_s: float) -> Bools:
        check_memory(memory, rows, hits.sizes, to_write=True)
        sources, targets = hits.offsets + np.uint64(view.data_address), addresses(memory, rows)
        if verify:
            good = copy_cut_blocks_out(
                sources, targets, hits.sizes, hits.key_words, hits.digests, hits.section_counts, end_s=end_s
            )
        else:
            copy_blocks(sources, targets, hits.sizes, end_s=end_s)
            good = np.ones(len(hits), dtype=np.bool_)
        probing.confirm(hits.entries, hits.generations, view.generations, view.touches, good)
        return good

    def _view(self) -> _View:
        view = self._mapped
        if view is None:
            raise ChannelError("the shared index is closed")
        return view


def _key_words(keys: KeyArray) -> NDArray[np.uint64]:
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise BadArgument(f"keys must be uint8 (n, {KEY_BYTES})")
    words: NDArray[np.uint64] = np.ascontiguousarray(keys).view(np.uint64)
    # Kernels are compiled for one type: aligned and writable.
    return words if words.flags.carray else np.require(words, requirements=["C", "A", "W"])
