"""Memory that processes of one host share, and the proof that a writer of it is gone."""

from __future__ import annotations

import itertools

import numpy as np

from kvpool.core.arrays import SourceArrays
from kvpool.service.writer_lock import WriterTable
from tests.simulation.content import Bytes

PLACES = 16


class Memory:
    """A segment: survives its processes, not its host. `harmed`: offsets of bytes that a fault has changed."""

    _numbers = itertools.count(1)

    def __init__(self, data_bytes: int, entries: int) -> None:
        self.number = next(self._numbers)
        self.index: Bytes = np.zeros(SourceArrays.bytes_needed(entries), dtype=np.uint8)
        self.touches: Bytes = np.zeros(entries, dtype=np.uint8)
        self.data: Bytes = np.zeros(data_bytes, dtype=np.uint8)
        self.catalog = b""
        self._writers: dict[int, str] = {}
        self.harmed: dict[int, None] = {}

    def writers(self) -> dict[int, str]:
        return dict(self._writers)

    def note_writer(self, place: int, path: str) -> None:
        if path:
            self._writers[place] = path
        else:
            self._writers.pop(place, None)

    def write_catalog(self, text: bytes) -> None:
        self.catalog = text

    def is_harmed(self, begin: int, end: int) -> bool:
        return any(begin <= at < end for at in self.harmed)

    def heal(self, begin: int, end: int) -> None:
        """These bytes were written anew."""
        for at in [at for at in self.harmed if begin <= at < end]:
            del self.harmed[at]

    def image(self) -> tuple[Bytes, Bytes, Bytes]:
        return self.index.copy(), self.touches.copy(), self.data.copy()

    def put_back(self, image: tuple[Bytes, Bytes, Bytes]) -> None:
        for mine, kept in zip((self.index, self.touches, self.data), image, strict=True):
            mine[:] = kept


class WriterLock:
    """As `service.writer_lock.WriterLock`, of a process that `die`s without retiring it."""

    def __init__(self, path: str) -> None:
        self.path, self.users, self.retired, self.dead = path, 0, False, False

    def enter(self) -> bool:
        if self.retired or self.dead:
            return False
        self.users += 1
        return True

    def leave(self) -> None:
        self.users -= 1

    @property
    def gone(self) -> bool:
        return self.dead or (self.retired and self.users == 0)


class Locks:
    """All locks of a world, by path."""

    def __init__(self) -> None:
        self._locks: dict[str, WriterLock] = {}

    def new(self) -> WriterLock:
        lock = WriterLock(f"/locks/{len(self._locks)}")
        self._locks[lock.path] = lock
        return lock

    def is_gone(self, path: str) -> bool:
        return path not in self._locks or self._locks[path].gone


class Proof:
    """What a source keeps of a lock."""

    def __init__(self, lock: WriterLock) -> None:
        self._lock = lock

    def gone(self) -> bool:
        return self._lock.gone

    def close(self) -> None:
        """There is no file."""


class Table(WriterTable):
    """The real table of writers, which looks for locks in the world."""

    def __init__(self, memory: Memory, locks: Locks) -> None:
        self._locks = locks
        super().__init__(memory, PLACES)

    def _is_gone(self, place: int, path: str) -> bool:
        if not self._locks.is_gone(path):
            return False
        self.strike(place)
        return True
