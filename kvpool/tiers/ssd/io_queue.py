"""The kernel's asynchronous I/O: one thread keeps many writes in flight, from compiled loops without the GIL.

The system calls are those of Linux's io_submit, which do not wait for files opened with O_DIRECT (others they write at
once, one after another). `submit_write` and `collect` are for compiled code; an `IoQueue` belongs to one thread at a
time. Touch `write_loop.py` after a change here: numba's cache does not notice.
Source: Linux, include/uapi/linux/aio_abi.h; io_submit(2), io_getevents(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from typing import Final, TypeAlias

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from kvpool.core.kernels.stripes import load_32

U64: TypeAlias = NDArray[np.uint64]

#: Numbers of io_setup, io_destroy, io_getevents and io_submit; on other machines there are no queues.
_CALLS: Final = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
_MISSING: Final = -1
_SETUP, _DESTROY, _COLLECT, _SUBMIT = _CALLS.get(platform.machine(), (_MISSING,) * 4)

#: Words of the memory that a caller lends: to `submit_write`, a request and its address; to `collect`, for each event.
REQUEST_WORDS: Final = 9
EVENT_WORDS: Final = 4
#: Of an event: what its request was called, and how many bytes were written, or minus an error number.
EVENT_NAME: Final = 0
EVENT_RESULT: Final = 2

_NONE, _ONE, _FD_SHIFT = np.uint64(0), np.uint64(1), np.uint64(32)
#: The kernel's number for what is asked: IOCB_CMD_PWRITEV.
_WRITE = np.uint64(8)
_COLLECT_CALL, _SUBMIT_CALL = np.uint64(max(_COLLECT, 0)), np.uint64(max(_SUBMIT, 0))
_REQUEST_BYTES: Final = np.uint64(8 * (REQUEST_WORDS - 1))
_INTERRUPTED: Final = np.uint64(errno.EINTR)

_syscall = types.ExternalFunction("syscall", types.int64(*[types.uint64] * 6))
_errno_address = types.ExternalFunction("__errno_location", types.uint64())


@njit
def submit_write(
    context: np.uint64, name: np.uint64, fd: np.uint64, buffers_at: np.uint64, count: np.uint64,
    place: np.uint64, request: U64, request_at: np.uint64,
) -> bool:  # fmt: skip
    """Begins to write some buffers, one behind the other, to a place of a file.

    Args:
        name: what its event is to say.
        buffers_at: where `count` pairs of address and size lie; they may change afterwards, their memory must not go.
        request: uint64 (REQUEST_WORDS), at `request_at`.
    Returns: false if it was refused: there will be no event.
    """
    request[0] = name
    request[1] = _NONE
    request[2] = _WRITE | (fd << _FD_SHIFT)
    request[3], request[4], request[5] = buffers_at, count, place
    request[6] = request[7] = _NONE
    request[8] = request_at
    begun = _syscall(_SUBMIT_CALL, context, _ONE, request_at + _REQUEST_BYTES, _NONE, _NONE)
    return bool(begun == 1)


@njit
def collect(context: np.uint64, least: np.uint64, most: np.uint64, events_at: np.uint64) -> int:
    """Waits until `least` requests have ended, and takes up to `most` events.

    Returns: how many; negative if the queue can't be asked. Then only `IoQueue.close` ends what is in flight.
    """
    while True:
        taken = _syscall(_COLLECT_CALL, context, least, most, events_at, _NONE)
        if taken >= 0:
            return int(taken)
        if load_32(_errno_address()) != _INTERRUPTED:
            return -1


class IoQueue:
    """A queue of the kernel for up to `depth` requests in flight. `context`: what the compiled calls know it by."""

    def __init__(self, depth: int) -> None:
        """Raises: OSError where the system has no such queues, or no more of them."""
        if _SETUP == _MISSING:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        context = ctypes.c_ulong(0)
        _call(_SETUP, depth, ctypes.addressof(context))
        self.depth = depth
        self.context = context.value

    def close(self) -> None:
        """Waits for what is in flight: afterwards nothing reads the callers' memory. Idempotent."""
        context, self.context = self.context, 0
        if context:
            _call(_DESTROY, context, 0)


def _call(number: int, first: int, second: int) -> None:
    """Raises: OSError."""
    function = _LIBRARY.syscall
    function.restype = ctypes.c_long
    if function(ctypes.c_long(number), ctypes.c_ulong(first), ctypes.c_ulong(second)) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


_LIBRARY: Final = ctypes.CDLL(None, use_errno=True)
