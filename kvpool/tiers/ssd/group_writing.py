"""Writes the buffers of a group one behind the other in a file, several at a time, while more of them are laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import numpy as np

from kvpool.tiers.ssd.files import DiskFile, File
from kvpool.tiers.ssd.io_queue import IoQueue
from kvpool.tiers.ssd.lanes import BUFFERS_MAX, Lanes, address_of_view, cut
from kvpool.tiers.ssd.write_loop import BEGUN, FAILED, LOST, STATE_WORDS, begin_writes, finish_writes

#: One system call writes up to this much. Less than 1 MiB: a block device takes a bounded number of pieces of memory in
#: one request (virtio 254), and a page is a piece. 1 MiB would be one full request and one of two pages.
WRITE_BYTES: Final = 960 << 10
#: So much of a group is written while what follows is laid out: whole writes.
PORTION_BYTES: Final = 4 * WRITE_BYTES


def write_group(
    lanes: Lanes, file: File, buffers: Iterator[memoryview], place: int, *, direct: bool
) -> tuple[int, int]:
    """Writes buffers, whole pages each, from a place on, and returns when none is in flight any more.

    Args: direct: whether the file bypasses the system's cache.
    Returns: where they end; how many writes there were.
    Raises: OSError, if not all could be written; whatever `buffers` raises.
    """
    queue = lanes.borrow_queue() if direct and isinstance(file, DiskFile) else None
    if queue is None or not isinstance(file, DiskFile):
        return _write_in_lanes(lanes, file, buffers, place)
    try:
        return _write_queued(queue, file, buffers, place)
    finally:
        lanes.return_queue(queue)


def _write_queued(queue: IoQueue, file: DiskFile, buffers: Iterator[memoryview], place: int) -> tuple[int, int]:
    state = np.zeros(STATE_WORDS, np.int64)
    written: list[memoryview] = []
    at = place
    try:
        for some in _portions(buffers):
            written += some
            spans = np.array([(address_of_view(view), len(view)) for view in some], np.uint64)
            begin_writes(
                np.uint64(queue.context), queue.depth, state, file.descriptor, np.uint64(at), spans,
                np.uint64(WRITE_BYTES), BUFFERS_MAX,
            )  # fmt: skip
            at += int(spans[:, 1].sum())
    finally:
        # Whatever happened: nothing may be left that reads the callers' memory.
        finish_writes(np.uint64(queue.context), state)
        if state[LOST]:
            queue.close()
    if state[FAILED] or state[LOST]:
        # The plain way finds out what is wrong, if the disk is.
        for part_at, part in cut(written, place, WRITE_BYTES):
            file.write(part, part_at)
    return at, int(state[BEGUN])


def _write_in_lanes(lanes: Lanes, file: File, buffers: Iterator[memoryview], place: int) -> tuple[int, int]:
    under_way: list[Callable[[], None]] = []
    writes = 0
    try:
        for some in _portions(buffers):
            parts = cut(some, place, WRITE_BYTES)
            under_way.append(lanes.start([partial(file.write, part, at) for at, part in parts]))
            place, writes = place + sum(len(view) for view in some), writes + len(parts)
    finally:
        _finish_all(under_way)
    return place, writes


def _portions(buffers: Iterator[memoryview]) -> Iterator[list[memoryview]]:
    """Buffers in lists of PORTION_BYTES, the last of what is left; a buffer is cut where a portion ends."""
    some: list[memoryview] = []
    size = 0
    for buffer in buffers:
        rest = buffer
        while size + len(rest) >= PORTION_BYTES:
            yield [*some, rest[: PORTION_BYTES - size]]
            rest, some, size = rest[PORTION_BYTES - size :], [], 0
        if len(rest):
            some.append(rest)
            size += len(rest)
    if some:
        yield some


def _finish_all(under_way: Sequence[Callable[[], None]]) -> None:
    """Waits for all writes, whatever happens to some: they read the callers' memory. Raises: the first failure."""
    failures: list[BaseException] = []
    for finish in under_way:
        try:
            finish()
        except BaseException as error:
            failures.append(error)
    if failures:
        raise failures[0]


def warm_up() -> None:
    """Compiles the loop, or loads it from the cache, without writing anything."""
    state = np.zeros(STATE_WORDS, np.int64)
    nothing = np.zeros((0, 2), np.uint64)
    begin_writes(np.uint64(0), 1, state, 0, np.uint64(0), nothing, np.uint64(WRITE_BYTES), BUFFERS_MAX)
    finish_writes(np.uint64(0), state)
