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

#: Buffers of one system call (IOV_MAX is 1024).
BUFFERS_MAX = 512

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
