"""What the parts of an open store share: the index and its lock, the segment files, counters, health."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from kvpool.core.errors import NoSsd
from kvpool.core.ssd.feed import ChangeFeed
from kvpool.core.ssd.format import segment_name, segment_seed
from kvpool.core.ssd.log import LogCore
from kvpool.core.ssd.records import SsdCounters, SsdState
from kvpool.tiers.ssd.files import File, Files

#: Keys of changes that wait to be taken.
CHANGES_MAX = 1 << 20


class SegmentFile:
    """An open segment. `readers` counts reads in flight: the file goes when there are none."""

    __slots__ = ("file", "number", "readers", "seed")

    def __init__(self, file: File, number: int, seed: int) -> None:
        self.file, self.number, self.seed, self.readers = file, number, seed, 0


class OpenLog:
    """Shared by readers and the one writer. `lock` guards everything here but `files`; it is never held during I/O."""

    def __init__(self, files: Files, uuid: bytes, core: LogCore) -> None:
        self.files, self.uuid, self.core = files, uuid, core
        self.lock = threading.Lock()
        self.idle = threading.Condition(self.lock)
        self.segments: dict[int, SegmentFile] = {}
        self.counters = SsdCounters()
        self.changes = ChangeFeed(CHANGES_MAX)
        self.state, self.message = SsdState.OK, ""
        #: Why records may be on disk that the index does not name, and that the next start would find; mostly empty.
        self.unsure = ""

    def add(self, number: int, file: File) -> SegmentFile:
        segment = SegmentFile(file, number, segment_seed(self.uuid, number))
        with self.lock:
            self.segments[number] = segment
        return segment

    def acquire(self, numbers: Iterable[int]) -> dict[int, SegmentFile]:
        """Keeps segments from going until `release`. The caller holds the lock."""
        acquired = {number: self.segments[number] for number in numbers}
        for segment in acquired.values():
            segment.readers += 1
        return acquired

    def release(self, segments: Iterable[SegmentFile]) -> None:
        with self.lock:
            for segment in segments:
                segment.readers -= 1
            self.idle.notify_all()

    def retire(self, number: int, timeout_s: float) -> None:
        """Removes a segment's file for good, when no read is in flight on it.

        No new read can come: nothing in the index that is readable lies there.

        Raises: OSError; the segment is then still there, as far as anybody knows.
        """
        with self.lock:
            segment = self.segments[number]
            if not self.idle.wait_for(lambda: segment.readers == 0, timeout_s):
                raise OSError(f"reads of segment {number} do not end")
        self.files.set_aside(segment_name(number))
        # Until the name is gone for good, tombstones that hide its records must stay.
        self.files.sync_names()
        with self.lock:
            del self.segments[number]
        segment.file.close()

    def count(self, **changes: int) -> None:
        """Adds to counters."""
        with self.lock:
            for name, change in changes.items():
                setattr(self.counters, name, getattr(self.counters, name) + change)

    def set_state(self, state: SsdState, message: str = "") -> None:
        """A failed store stays failed; a closed one stays closed."""
        with self.lock:
            if self.state in (SsdState.OK, SsdState.FULL) or state is SsdState.OFF:
                self.state, self.message = state, message

    def give_up(self, message: str) -> None:
        """What a failed write has left on disk is not known: nothing more is written, or said to be gone."""
        self.set_state(SsdState.FAILED, message)
        self.unsure = message

    def check_open(self) -> None:
        """Raises: NoSsd after `close`."""
        if self.state is SsdState.OFF:
            raise NoSsd("the SSD store is closed")

    def close(self, timeout_s: float) -> None:
        """Closes the files when no read is in flight any more, and gives the folder back. `state` is OFF already."""
        with self.lock:
            # A read that never ends keeps its file: its descriptor must not become another file's.
            if not self.idle.wait_for(lambda: not any(s.readers for s in self.segments.values()), timeout_s):
                return
        self.close_segments()
        self.files.close()

    def close_segments(self) -> None:
        """Closes the files, of which nobody reads."""
        with self.lock:
            segments = list(self.segments.values())
            self.segments.clear()
        for segment in segments:
            segment.file.close()
