"""The real SSD store on a disk in memory, with its threads taken away: each request is served where it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kvpool.tiers.ssd import lanes, store
from kvpool.tiers.ssd.lanes import Arena
from kvpool.tiers.ssd.store import SsdStore
from kvpool.tiers.ssd.writer import LogWriter, Request
from tests.ssd.crash_files import CrashFiles

SEGMENT_BYTES = 32 << 10
RECORDS_MAX = 256
_ARENA_BYTES = 256 << 10


class InlineLanes(lanes.Lanes):
    """Runs tasks one after the other."""

    def __init__(self, depth: int, name: str, arena_bytes: int) -> None:
        self.depth, self._arena_bytes = depth, _ARENA_BYTES
        self._arenas: list[Arena] = []

    def start(self, tasks: Sequence[Callable[[], None]]) -> Callable[[], None]:
        failures: list[BaseException] = []
        for task in tasks:
            try:
                task()
            except BaseException as error:
                failures.append(error)
                break

        def finish() -> None:
            if failures:
                raise failures[0]

        return finish

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        self.start(tasks)()

    def close(self) -> None:
        """There are no threads."""


class InlineWriter(LogWriter):
    """Serves a request at once; `idle` does what the thread would do when nothing waits."""

    def start(self) -> None:
        """There is no thread."""

    def stop(self, timeout_s: float) -> bool:
        """There is no thread."""
        return True

    def submit(self, request: Request, timeout_s: float) -> bool:
        request.started = True
        self._serve([request])
        request.done.set()
        return True

    def idle(self) -> None:
        if self._log.state == "ok" and self._cleaner.wants_room():
            self._serve([])


def open_store(files: CrashFiles, segments: int) -> SsdStore:
    """Raises: NoSsd."""
    return SsdStore.open(
        Path("unused"), "simulated", segments * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES, io_depth=1, files=files,
        records_max=RECORDS_MAX,
    )  # fmt: skip


def idle(opened: SsdStore) -> None:
    """What the store's thread does in its spare time."""
    writer = opened._writer
    assert isinstance(writer, InlineWriter)
    writer.idle()


def listed(opened: SsdStore) -> frozenset[bytes]:
    """All keys that can be read from it."""
    keys = opened.list(0, 1 << 20).keys
    return frozenset(key.tobytes() for key in keys)


#: What `simulated` puts in place of names in the real modules.
REPLACED = ((store, "Lanes", InlineLanes), (store, "LogWriter", InlineWriter))
