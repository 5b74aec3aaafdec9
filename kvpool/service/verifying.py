"""Verification: reads every block of a source again, memory first, then its SSD, and removes what fails its digest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.sections import check_block
from kvpool.core.errors import UnknownLease
from kvpool.core.ids import KeyArray, PinId, SessionId
from kvpool.core.index import NO_ENTRY
from kvpool.core.listing import BlockRecord
from kvpool.core.source import SourceCore
from kvpool.service.operations import Operation

#: One batch is held, and checked without a pause, at a time.
BATCH_BLOCKS_MAX, BATCH_BYTES_MAX = 256, 32 << 20
#: Longer than any batch takes; should it end all the same, its batch proves nothing.
PIN_US = 120_000_000
PAGE = 2048

Item = TypeVar("Item")


class Verified(Protocol):
    """A tier below memory that can be read again, as far as verification needs it."""

    def verify_page(self, cursor: int, namespace_id: bytes) -> tuple[int, int, int, int | None]:
        """Reads some records and removes the bad ones. Blocks: called in a thread.

        Returns: good blocks, bad blocks, bytes read, and the cursor of the next page, None at the end.
        """
        ...


class Pace:
    """Holds work down to a rate, by when each of its bytes is due; 0 = no limit."""

    def __init__(self, bytes_per_s_max: int) -> None:
        self._rate, self._begin_s = bytes_per_s_max, time.monotonic()

    def behind_s(self, bytes_done: int) -> float:
        """How long to wait before going on; not more than 0 where the work is late itself."""
        if not self._rate:
            return 0.0
        return self._begin_s + bytes_done / self._rate - time.monotonic()


@dataclass(frozen=True)
class _Held:
    """Blocks under one pin: where they lie, and what their sections must hash to."""

    pin: PinId
    keys: KeyArray
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    generations: NDArray[np.uint32]
    digests: NDArray[np.uint64]
    section_counts: NDArray[np.uint8]


def verify_source(
    operation: Operation,
    data: NDArray[np.uint8],
    namespace_id: bytes,
    bytes_per_s_max: int,
    lower: Verified | None = None,
) -> None:
    """Checks each readable block of a namespace (empty: of all) once; those that come meanwhile may be left out.

    Args: data: uint8, the segment's data.
    """
    counts, pace = operation.counts, Pace(bytes_per_s_max)
    counts.blocks_total = operation.turn(lambda core, _: _block_count(core, namespace_id))
    with operation.session("verify") as session:
        for namespace, batch in _batches(operation, namespace_id):
            held = operation.turn(lambda core, now, n=namespace, b=batch: _hold(core, session, n, b, now))  # type: ignore[misc]
            if held is not None:
                _check(operation, session, namespace, held, data)
            operation.pause(pace.behind_s(counts.bytes_done))
            if operation.stopped:
                return
    cursor: int | None = 0 if lower is not None else None
    while cursor is not None and not operation.stopped:
        assert lower is not None
        good, bad, size, cursor = lower.verify_page(cursor, namespace_id)
        counts.blocks_done += good + bad
        counts.blocks_total = max(counts.blocks_total, counts.blocks_done)
        counts.blocks_bad += bad
        counts.bytes_done += size
        operation.pause(pace.behind_s(counts.bytes_done))


def _block_count(core: SourceCore, namespace_id: bytes) -> int:
    if not namespace_id:
        return core.counts().blocks
    core.namespace_number(namespace_id)  # raises UnknownNamespace
    return next(blocks for found, _, blocks, _ in core.namespaces() if found == namespace_id)


def _batches(operation: Operation, namespace_id: bytes) -> Iterator[tuple[bytes, KeyArray]]:
    """Keys of readable blocks, by namespace, in parts of a bounded size."""
    for records in pages(operation, namespace_id):
        namespaces = dict.fromkeys(bytes(r.namespace_id) for r in records)
        for namespace in namespaces:
            mine = [r for r in records if r.namespace_id == namespace]
            for part in parts(mine, [r.size for r in mine], BATCH_BLOCKS_MAX, BATCH_BYTES_MAX):
                packed = b"".join(r.key for r in part)
                yield namespace, np.frombuffer(packed, dtype=np.uint8).reshape(-1, 16)


def pages(operation: Operation, namespace_id: bytes) -> Iterator[list[BlockRecord]]:
    """Records of the readable blocks, a page at a time."""
    cursor = 0
    while True:
        at = cursor
        records, cursor = operation.turn(lambda core, _: core.list_blocks(at, PAGE, namespace_id=namespace_id))  # noqa: B023
        readable = [r for r in records if r.state == "readable"]
        if readable:
            yield readable
        if not cursor:
            return


def parts(items: list[Item], sizes: list[int], count_max: int, bytes_max: int) -> Iterator[list[Item]]:
    """Cuts a list into runs of bounded length and size; what is larger by itself is a run of its own."""
    begin, size = 0, 0
    for at, one in enumerate(sizes):
        if at > begin and (at - begin >= count_max or size + one > bytes_max):
            yield items[begin:at]
            begin, size = at, 0
        size += one
    if begin < len(items):
        yield items[begin:]


def _hold(core: SourceCore, session: SessionId, namespace_id: bytes, keys: KeyArray, now_us: int) -> _Held | None:
    """Pins those that are still there; a pin, since a lease would count as use."""
    pinned = core.pin(session, namespace_id, keys, PIN_US, now_us)
    if not pinned.pin:
        return None
    mine = keys[pinned.found]
    entries = core.index.lookup(mine)
    assert (entries != NO_ENTRY).all()
    blocks = core.index.describe(entries)
    return _Held(
        pinned.pin, mine, blocks.offsets, blocks.sizes, blocks.generations, blocks.digests,
        np.array(core.arrays.section_counts[entries]),
    )  # fmt: skip


def _check(operation: Operation, session: SessionId, namespace_id: bytes, held: _Held, data: NDArray[np.uint8]) -> None:
    """Hashes what is held, lets it go, and removes what was bad."""
    bad = [row for row in range(len(held.keys)) if not _good(held, row, data)]

    def settle(core: SourceCore, now_us: int) -> int:
        try:
            core.unpin(session, held.pin, now_us)
        except UnknownLease:
            return 0  # it ended before this: what was read may have been another block's
        kept = [row for row in bad if _unchanged(core, held, row)]
        return core.remove(namespace_id, held.keys[kept], now_us) if kept else 0

    removed = operation.turn(settle)
    counts = operation.counts
    counts.blocks_done += len(held.keys)
    counts.bytes_done += int(held.sizes.sum(dtype=np.uint64))
    counts.blocks_bad += removed
    if removed:
        counts.message = f"{removed} blocks in memory had other bytes than were committed, and were removed"


def _good(held: _Held, row: int, data: NDArray[np.uint8]) -> bool:
    begin, size = int(held.offsets[row]), int(held.sizes[row])
    digests = held.digests[row, : int(held.section_counts[row])]
    return check_block(data[begin : begin + size], held.keys[row].tobytes(), digests)


def _unchanged(core: SourceCore, held: _Held, row: int) -> bool:
    """Whether the key still names the block that was read, not one that was put in its place."""
    entry = int(core.index.lookup(held.keys[row : row + 1])[0])
    return entry != NO_ENTRY and int(core.arrays.generations[entry]) == int(held.generations[row])
