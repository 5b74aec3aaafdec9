"""Writing a row of buffers to a place of a file in one compiled loop without the GIL, several writes in flight.

What the kernel is asked to write is memory of the caller: it must stay, and hold the same, until all has ended.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvpool.core.kernels.atomics import array_address
from kvpool.tiers.ssd.io_queue import EVENT_NAME, EVENT_RESULT, EVENT_WORDS, REQUEST_WORDS, collect, submit_write

U64: TypeAlias = NDArray[np.uint64]
I64: TypeAlias = NDArray[np.int64]

#: The state of a file's writes: those in flight, begun so far, and not done in full; whether the queue still answers.
IN_FLIGHT, BEGUN, FAILED, LOST = 0, 1, 2, 3
STATE_WORDS = 4


@njit
def _collect_writes(context: np.uint64, state: I64, least: int, events: U64, events_at: np.uint64) -> None:
    got = collect(context, np.uint64(least), np.uint64(len(events) // EVENT_WORDS), events_at)
    if got < 0:
        state[LOST] = 1
        return
    for event in range(got):
        # A request is called by its size.
        done = events[EVENT_WORDS * event + EVENT_RESULT] == events[EVENT_WORDS * event + EVENT_NAME]
        state[FAILED] += 0 if done else 1
    state[IN_FLIGHT] -= got


@njit(nogil=True, cache=True)
def begin_writes(
    context: np.uint64, depth: int, state: I64, fd: int, place: np.uint64, buffers: U64, write_bytes: np.uint64,
    buffers_max: int,
) -> None:  # fmt: skip
    """Begins to write, and waits where more than `depth` writes would be in flight.

    Args:
        state: int64 (STATE_WORDS), zeros for the first buffers of a file; counts on from call to call.
        place: where the first buffer goes; buffers: uint64 (n, 2), addresses and sizes, whole pages that lie one behind
            the other in the file.
        write_bytes, buffers_max: what one write takes; the last one of a call may be smaller.
    """
    vector = np.empty(2 * buffers_max, dtype=np.uint64)
    request, events = np.empty(REQUEST_WORDS, dtype=np.uint64), np.empty(EVENT_WORDS * depth, dtype=np.uint64)
    vector_at, request_at, events_at = array_address(vector), array_address(request), array_address(events)
    row, taken = 0, np.uint64(0)
    while row < len(buffers) and state[LOST] == 0:
        count, size = 0, np.uint64(0)
        while row < len(buffers) and size < write_bytes and count < buffers_max:
            take = min(buffers[row, 1] - taken, write_bytes - size)
            vector[2 * count], vector[2 * count + 1] = buffers[row, 0] + taken, take
            count, size, taken = count + 1, size + take, taken + take
            if taken == buffers[row, 1]:
                row, taken = row + 1, np.uint64(0)
        if state[IN_FLIGHT] == depth:
            _collect_writes(context, state, 1, events, events_at)
        if state[LOST] == 0 and submit_write(
            context, size, np.uint64(fd), vector_at, np.uint64(count), place, request, request_at
        ):
            state[IN_FLIGHT] += 1
        else:
            state[FAILED] += 1
        state[BEGUN] += 1
        place += size


@njit(nogil=True, cache=True)
def finish_writes(context: np.uint64, state: I64) -> None:
    """Waits for all that is in flight. If then `state` says LOST, the queue must be closed before anything else."""
    events = np.empty(EVENT_WORDS * max(1, state[IN_FLIGHT]), dtype=np.uint64)
    events_at = array_address(events)
    while state[IN_FLIGHT] > 0 and state[LOST] == 0:
        _collect_writes(context, state, 1, events, events_at)
