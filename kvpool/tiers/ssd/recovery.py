"""Opens a store: reads the footers of sealed segments, scans and verifies the others, and fills the index."""

from __future__ import annotations

import itertools
import time
import uuid as uuids
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import NoSsd
from kvpool.core.ssd.format import (
    FOOTER_ENTRY,
    FOOTER_ENTRY_BYTES,
    PAGE_BYTES,
    FooterEntries,
    align,
    pack_store_header,
    read_footer,
    read_segment_header,
    read_store_header,
    read_trailer,
    segment_name,
    segment_number,
    segment_seed,
)
from kvpool.core.ssd.log import LogConfig, LogCore, SegmentSpace
from kvpool.core.ssd.rows import RowState
from kvpool.core.ssd.scan import scan_segment
from kvpool.tiers.ssd.appending import write_footer
from kvpool.tiers.ssd.files import File, Files
from kvpool.tiers.ssd.lanes import Arena, Lanes
from kvpool.tiers.ssd.open_log import OpenLog

_WINDOW_BYTES: Final = 8 << 20
_STORE = "store"
#: A disk may fail once.
_ATTEMPTS: Final = 2
#: Above all sequences.
_EVERYTHING: Final = 1 << 63


@dataclass(frozen=True, slots=True, eq=False)
class Damage:
    """What has to be put right before the log is used. First `suspects`, keys of objects that damage may have brought
    back, are removed durably; only then `files`, segments that can't be used, may go: they are what shows the damage.
    """

    suspects: list[bytes]
    files: list[str]


@dataclass(slots=True, eq=False)
class Found:
    """One segment file as it was found.

    first_sequence: from its header, None if that is damaged; next_sequence: above all that were seen in it;
    suspect_sequence: as in `Scan`; scanned: it had no footer that verifies; incomplete: not all of it could be read.
    """

    number: int
    file: File
    entries: FooterEntries
    used_bytes: int
    first_sequence: int | None
    next_sequence: int
    suspect_sequence: int
    scanned: bool
    incomplete: bool = False


class WindowReader:
    """Reads a file through one window of memory, by pages. What it returns is valid until the next call."""

    def __init__(self, file: File, arena: Arena) -> None:
        self._file, self._size = file, file.size()
        arena.reset()
        self._window = arena.take(_WINDOW_BYTES)
        self._start = self._filled = 0
        self.read_bytes = 0
        #: Whether something could not be read: what was found is not all that may be there.
        self.failed = False

    def __call__(self, offset: int, size: int) -> NDArray[np.uint8]:
        """uint8 (up to size,): fewer at the end of the file, or where it can't be read."""
        size = max(0, min(size, self._size - offset, _WINDOW_BYTES - PAGE_BYTES))
        if not self._start <= offset <= offset + size <= self._start + self._filled:
            self._start = offset // PAGE_BYTES * PAGE_BYTES
            self._filled = self._fill(self._start)
        at = offset - self._start
        return self._window[at : min(at + size, self._filled)]

    def pages(self, offset: int, size: int) -> bytes:
        """Whole pages and nothing besides, which spares what headers and footers do not need.

        Returns: fewer at the end of the file. Raises: OSError.
        """
        self._filled = 0
        data, at = bytearray(), 0
        while at < size:
            want = min(size - at, len(self._window))
            done = self._file.read([self._window[:want].data], offset + at)
            self.read_bytes += done
            data += self._window[:done].tobytes()
            at += want
            if done < want:
                break
        return bytes(data)

    def _fill(self, start: int) -> int:
        want = min(_WINDOW_BYTES, align(self._size - start))
        try:
            done = self._file.read([self._window[:want].data], start)
        except OSError:
            self.failed = True
            # Somewhere in the window is a bad page: go on with as little as possible.
            try:
                done = self._file.read([self._window[:PAGE_BYTES].data], start)
            except OSError:
                self._window[:PAGE_BYTES] = 0
                done = min(PAGE_BYTES, self._size - start)
        self.read_bytes += done
        return done


def open_log(files: Files, *, segment_bytes: int, capacity_bytes: int, rows_max: int) -> tuple[OpenLog, Damage]:
    """The store in a folder, recovered; a new one if there is none.

    Args:
        segment_bytes: for a new store; one that is there keeps its own.
    Returns: the log, and what is to be put right before anything is read or written.
    Raises: NoSsd if the folder holds something else or another version, or the disk refuses; OSError.
    """
    begin_s = time.perf_counter()
    uuid, segment_bytes = _open_store(files, segment_bytes)
    arena = Arena(_WINDOW_BYTES)
    numbers = sorted(number for name in files.names() if (number := segment_number(name)) is not None)
    core = LogCore(LogConfig(segment_bytes, capacity_bytes // segment_bytes, rows_max))
    log = OpenLog(files, uuid, core)
    found: list[Found] = []
    try:
        for number in numbers:
            segment = _read_segment(log, number, arena, newest=number == numbers[-1])
            if segment is not None:
                found.append(segment)
        damage = _recover(log, found, numbers)
    except BaseException:
        # A node goes on without its SSD, and must not keep its files open.
        for segment in found:
            segment.file.close()
        raise
    counters = log.counters
    counters.recovered_records = core.space().records
    counters.recovery_s = time.perf_counter() - begin_s
    return log, damage


def _recover(log: OpenLog, found: list[Found], numbers: Sequence[int]) -> Damage:
    """Fills the log with what was found. Raises: OSError.

    Args: found: the segments that could be read, which the log has in its hands afterwards; numbers: of all files.
    """
    core = log.core
    readable = [segment.number for segment in found]
    damaged = [segment_name(number) for number in numbers if number not in readable]
    unreadable = len(damaged)
    _suspect_ends(log, found)
    suspect = max([segment.suspect_sequence for segment in found] + [_EVERYTHING if unreadable else 0])
    log.counters.recovery_damaged = sum(segment.suspect_sequence > 0 for segment in found) + unreadable
    core.next_sequence = max([1, *(max(segment.next_sequence, segment.first_sequence or 0) for segment in found)])
    found = _drop_empty(log, found)
    _restore(log, found)
    for segment in found:
        log.add(segment.number, segment.file)
    if numbers:
        core.next_segment = max(core.next_segment, numbers[-1] + 1)
    return Damage(_suspects(core, suspect), damaged)


def make_durable(log: OpenLog, lanes: Lanes) -> None:
    """Syncs all that was found: a process that was killed may have written it and never come to its sync.

    Before it is relied on: what is absent now may be put in memory alone, and must not be back when the power goes.
    Raises: OSError.
    """
    lanes.run([log.files.sync_names, *(segment.file.sync for segment in log.segments.values())])


def remove_files(files: Files, names: Sequence[str]) -> None:
    """Removes segments for good. Raises: OSError: they may come back, and with them what is not true any more."""
    for name in names:
        files.remove(name)
    if names:
        files.sync_names()


def seal_scanned(log: OpenLog) -> None:
    """Writes footers for segments that have none, so that what was found there stands at the next start too."""
    for number in sorted(log.segments):
        segment = log.segments[number]
        if number != log.core.active and not _has_footer(log, segment.file, number):
            space = log.core.segments[number]
            write_footer(log, segment, space.used_bytes, log.core.footer_entries(number))


def _open_store(files: Files, segment_bytes: int) -> tuple[bytes, int]:
    names = files.names()
    has_segments = any(segment_number(name) is not None for name in names)
    if _STORE in names:
        file = files.open(_STORE)
        try:
            page = Arena(PAGE_BYTES).take(PAGE_BYTES)
            done = file.read([page.data], 0)
            file.sync()
        finally:
            file.close()
        header = read_store_header(page[:done].tobytes())
        if header is not None:
            return header
    if has_segments:
        raise NoSsd(
            "the SSD store's header is missing or damaged, but there are segments",
            hint="delete the folder: it is a cache; or point --ssd-dir elsewhere",
        )
    uuid = uuids.uuid4().bytes
    page = Arena(PAGE_BYTES).take(PAGE_BYTES)
    page[:] = np.frombuffer(pack_store_header(uuid, segment_bytes), np.uint8)
    file = files.create(_STORE, PAGE_BYTES)
    try:
        file.write([page.data], 0)
        file.sync()
    finally:
        file.close()
    files.sync_names()
    return uuid, segment_bytes


def _read_segment(log: OpenLog, number: int, arena: Arena, *, newest: bool) -> Found | None:
    """What is in a segment file; None if it can't be read at all, not even at a second attempt."""
    found: Found | None = None
    for _ in range(_ATTEMPTS):
        if found is not None:
            found.file.close()
        found = _try_segment(log, number, arena, newest=newest)
        if found is not None and not found.incomplete:
            return found
        log.counters.io_errors += 1
    return found


def _try_segment(log: OpenLog, number: int, arena: Arena, *, newest: bool) -> Found | None:
    try:
        file = log.files.open(segment_name(number))
    except OSError:
        return None
    try:
        fetch = WindowReader(file, arena)
        first = read_segment_header(fetch.pages(0, PAGE_BYTES), log.uuid, number)
        sealed = read_sealed(log, number, fetch)
        if sealed is not None:
            entries, used_bytes = sealed
            after = int(entries["sequence"].max(initial=0)) + 1
            found = Found(number, file, entries, used_bytes, first, after, 0, False)
        else:
            found = _scan(log, number, file, fetch, first, newest=newest)
    except BaseException as error:
        file.close()
        if not isinstance(error, OSError):
            raise
        return None
    log.counters.recovered_bytes += fetch.read_bytes
    return found


def _scan(log: OpenLog, number: int, file: File, fetch: WindowReader, first: int | None, *, newest: bool) -> Found:
    size = log.core.config.segment_bytes
    scan = scan_segment(fetch, size, segment_seed(log.uuid, number), newest=newest, first_sequence=first)
    suspect = scan.suspect_sequence
    if first is None and not newest and not len(scan.entries):
        # Nothing of it is left.
        suspect = _EVERYTHING
    if fetch.failed:
        # Also at the end, where missing records are no damage otherwise: they may have been acknowledged.
        suspect = _EVERYTHING
    return Found(number, file, scan.entries, scan.used_bytes, first, scan.next_sequence, suspect, True, fetch.failed)


def _suspect_ends(log: OpenLog, found: list[Found]) -> None:
    """Notes what is missing at the end of a scanned segment: the next one says which sequences came before it.

    A segment that was cut short ended with a group that failed, whose sequences are missing rightly.
    """
    for segment, following in itertools.pairwise(found):
        if segment.scanned and following.number == segment.number + 1 and following.first_sequence is not None:
            whole = segment.file.size() == log.core.config.segment_bytes
            if whole and segment.next_sequence < following.first_sequence:
                segment.suspect_sequence = following.first_sequence


def read_sealed(log: OpenLog, number: int, fetch: WindowReader) -> tuple[FooterEntries, int] | None:
    """A segment's footer and the end of its records; None if it has none that verifies. Raises: OSError."""
    size = log.core.config.segment_bytes
    trailer = read_trailer(fetch.pages(size - PAGE_BYTES, PAGE_BYTES), log.uuid, number)
    if trailer is None:
        return None
    length = align(int(trailer["entry_count"]) * FOOTER_ENTRY_BYTES)
    body = fetch.pages(int(trailer["footer_offset"]), length)
    entries = read_footer(body, trailer, log.uuid, number) if len(body) == length else None
    return None if entries is None else (entries, int(trailer["used_bytes"]))


def _has_footer(log: OpenLog, file: File, number: int) -> bool:
    size = log.core.config.segment_bytes
    page = Arena(PAGE_BYTES).take(PAGE_BYTES)
    try:
        done = file.read([page.data], size - PAGE_BYTES)
    except OSError:
        return False
    return read_trailer(page[:done].tobytes(), log.uuid, number) is not None


def _drop_empty(log: OpenLog, found: list[Found]) -> list[Found]:
    """Removes files without records."""
    empty = [segment for segment in found if not len(segment.entries)]
    for segment in empty:
        segment.file.close()
    remove_files(log.files, [segment_name(segment.number) for segment in empty])
    return [segment for segment in found if len(segment.entries)]


def _restore(log: OpenLog, found: list[Found]) -> None:
    """Fills the index. If it is smaller than it was, the oldest segments go: nothing in them hides what is newer."""
    while True:
        spaces = [SegmentSpace(f.number, f.used_bytes, records=len(f.entries)) for f in found]
        entries = np.concatenate([np.zeros(0, FOOTER_ENTRY), *(f.entries for f in found)])
        numbers = np.repeat([f.number for f in found], [len(f.entries) for f in found]).astype(np.uint32)
        if log.core.restore(spaces, entries, numbers):
            return
        oldest = found.pop(0)
        oldest.file.close()
        remove_files(log.files, [segment_name(oldest.number)])


def _suspects(core: LogCore, sequence: int) -> list[bytes]:
    index = core.rows
    rows = np.flatnonzero((index.states == RowState.LIVE) & (index.name_bytes > 0) & (index.sequences < sequence))
    return [key.tobytes() for key in index.key_bytes(rows.astype(np.int32))]
