"""Memory that O_DIRECT takes, and threads that keep several reads or writes in flight."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ssd.format import PAGE_BYTES, align
from kvpool.tiers.ssd.daemon_threads import DaemonThreads
from kvpool.tiers.ssd.files import Buffers
from kvpool.tiers.ssd.io_queue import IoQueue

#: Buffers of one system call (IOV_MAX is 1024).
BUFFERS_MAX = 512
#: Queues that are kept for the next callers.
QUEUES_KEPT_MAX = 2

Bytes = NDArray[np.uint8]


class Arena:
    """Page-aligned memory, given out piece by piece until `reset`. Beyond its size pieces are mapped one by one."""

    def __init__(self, size_bytes: int) -> None:
        self._memory: Bytes = np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)
        self._used = 0

    @property
    def size_bytes(self) -> int:
        return len(self._memory)

    def take(self, size_bytes: int) -> Bytes:
        """uint8 (size_bytes,), page-aligned; holds anything. Valid until `reset`."""
        whole = align(size_bytes)
        if self._used + whole > len(self._memory):
            return np.frombuffer(mmap.mmap(-1, whole), np.uint8)[:size_bytes]
        piece = self._memory[self._used : self._used + size_bytes]
        self._used += whole
        return piece

    def reset(self) -> None:
        self._used = 0


class Lanes:
    """Runs tasks on up to `depth` threads, the caller's among them. Several callers may run at once."""

    def __init__(self, depth: int, name: str, arena_bytes: int) -> None:
        self.depth = depth
        #: Queues that nobody uses, as the arenas below.
        self._queues: list[IoQueue] = []
        self._threads = DaemonThreads(depth, name)
        self._arena_bytes = arena_bytes
        #: Arenas that nobody uses; appending and popping need no lock.
        self._arenas: list[Arena] = []

    def borrow_arena(self) -> Arena:
        """An arena for the caller alone, until `return_arena`."""
        try:
            arena = self._arenas.pop()
        except IndexError:
            return Arena(self._arena_bytes)
        arena.reset()
        return arena

    def return_arena(self, arena: Arena) -> None:
        if len(self._arenas) < self.depth:
            self._arenas.append(arena)

    def borrow_queue(self) -> IoQueue | None:
        """A queue for the caller alone, until `return_queue`; None where the system has none, or no more of them."""
        try:
            return self._queues.pop()
        except IndexError:
            pass
        try:
            return IoQueue(self.depth)
        except OSError:
            return None

    def return_queue(self, queue: IoQueue) -> None:
        """With nothing in flight; or closed, and so of no use to others."""
        if len(self._queues) < QUEUES_KEPT_MAX and queue.context:
            self._queues.append(queue)
        else:
            queue.close()

    def start(self, tasks: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """Begins to run tasks on up to `depth` threads; a single one is run at once.

        Returns: waits for all of them to end, and raises the first failure. It must be called.
        """
        waiting = iter(tasks)
        failures: list[BaseException] = []
        helpers: list[Future[None]] = []
        if len(tasks) == 1:
            _work(waiting, failures)
        else:
            try:
                helpers.extend(
                    self._threads.submit(_work, waiting, failures) for _ in range(min(self.depth, len(tasks)))
                )
            except BaseException:
                wait(helpers)
                raise

        def finish() -> None:
            wait(helpers)
            if failures:
                raise failures[0]

        return finish

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Runs all tasks to their end; after a failure those not begun are left out.

        Raises: the first failure, when no task runs any more.
        """
        waiting = iter(tasks)
        failures: list[BaseException] = []
        helpers: list[Future[None]] = []
        try:
            helpers.extend(
                self._threads.submit(_work, waiting, failures) for _ in range(min(self.depth, len(tasks)) - 1)
            )
            _work(waiting, failures)
        finally:
            # Tasks write into the callers' memory: none may be left behind.
            wait(helpers)
        if failures:
            raise failures[0]

    def close(self) -> None:
        self._threads.shutdown()
        while self._queues:
            self._queues.pop().close()


def _work(waiting: Iterator[Callable[[], None]], failures: list[BaseException]) -> None:
    for task in waiting:
        if failures:
            return
        try:
            task()
        except BaseException as error:
            failures.append(error)


def address_of(data: Bytes) -> int:
    """Where memory begins. A quarter of the time of `data.ctypes.data`, where memory can be written."""
    if data.flags.writeable and data.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(data.data))
    address: int = data.__array_interface__["data"][0]
    return address


def addresses_of(arrays: Sequence[Bytes]) -> NDArray[np.uint64]:
    """`address_of` of each, which are contiguous; uint64 (n)."""
    address, char = ctypes.addressof, ctypes.c_char.from_buffer
    try:
        # Half the time. It takes only what can be written, and is not empty.
        return np.array([address(char(array.data)) for array in arrays], np.uint64)
    except (TypeError, ValueError):
        return np.array([address_of(array) for array in arrays], np.uint64)


def address_of_view(view: memoryview) -> int:
    """Where the memory of contiguous bytes begins, of which there is at least one."""
    if view.readonly:
        return address_of(np.frombuffer(view, np.uint8))
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def is_aligned(data: Bytes) -> bool:
    """Whether memory begins on a page."""
    return address_of(data) % PAGE_BYTES == 0


def cut(buffers: Buffers, offset: int, part_bytes: int) -> list[tuple[int, list[memoryview]]]:
    """Contiguous buffers as parts of about `part_bytes`, each beginning and ending on a page.

    Args:
        buffers: whole pages each.
        offset: where the first belongs.
    Returns: (offset, buffers) of each part.
    """
    parts: list[tuple[int, list[memoryview]]] = []
    part: list[memoryview] = []
    size = 0
    for buffer in buffers:
        while len(buffer):
            take = min(len(buffer), part_bytes - size)
            part.append(buffer[:take])
            buffer, size = buffer[take:], size + take
            if size == part_bytes or len(part) == BUFFERS_MAX:
                parts.append((offset, part))
                offset, part, size = offset + size, [], 0
    if part:
        parts.append((offset, part))
    return parts
