"""Reads records into memory of the caller, several at a time, and verifies each before it counts as read.

Most records go through a compiled loop, see `direct_reading`. Here is the plain way, for what that leaves: records that
are larger or have no target, files of another I/O layer, and whatever could not be read at the first try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ids import KeyArray
from kvpool.core.index import key_words
from kvpool.core.kernels.copying import check_blocks
from kvpool.core.ssd.format import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    PAGE_BYTES,
    Descriptors,
    RecordKind,
    align,
    descriptor_verifies,
    is_packed,
    payload_offset,
)
from kvpool.core.ssd.records import SsdRead
from kvpool.core.ssd.rows import Rows
from kvpool.tiers.ssd.direct_reading import GAP_BYTES, RUN_BYTES, read_directly
from kvpool.tiers.ssd.files import File
from kvpool.tiers.ssd.lanes import Arena, Bytes, Lanes, address_of, cut, is_aligned
from kvpool.tiers.ssd.open_log import OpenLog, SegmentFile

_RUN_RECORDS = 128
#: One system call reads at most this much of a larger record.
_PART_BYTES = 2 * RUN_BYTES
#: Bytes that are read, and then verified, together.
SLICE_BYTES = 8 << 20
#: Memory of a slice: descriptors, and payloads whose target O_DIRECT does not take.
ARENA_BYTES = 12 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Records to read, one row each: where they are, what they must be, where their payloads go.

    offsets, ends: bytes from the segment's start; sequences uint64 (n); keys uint8 (n, 16); targets: uint8 (size,), or
    None to read the descriptor only.
    """

    segments: Sequence[SegmentFile]
    offsets: list[int]
    ends: list[int]
    sizes: list[int]
    name_bytes: list[int]
    sequences: NDArray[np.uint64]
    keys: KeyArray
    targets: Sequence[Bytes | None]


class _Read:
    """Neighbours in the log that are read together, and where their bytes go."""

    __slots__ = ("buffers", "covered", "end", "error", "file", "rows", "start")

    def __init__(self, rows: list[int], file: File, start: int, buffers: list[memoryview]) -> None:
        self.rows, self.file, self.start, self.buffers = rows, file, start, buffers
        self.end = start + sum(len(buffer) for buffer in buffers)
        #: Everything before this place was read.
        self.covered = self.end
        self.error: OSError | None = None

    def tasks(self) -> list[Callable[[], None]]:
        """System calls: one, or several for what is large."""
        return [partial(self._perform, at, part) for at, part in cut(self.buffers, self.start, _PART_BYTES)]

    def _perform(self, at: int, part: list[memoryview]) -> None:
        try:
            done = self.file.read(part, at)
        except OSError as error:
            self.error = error
            return
        if done < sum(len(buffer) for buffer in part):
            self.covered = min(self.covered, at + done)


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """What lies where once a read is done: of each row its descriptor and name, and bytes to copy to its target."""

    read: _Read
    heads: list[Bytes]
    #: (bytes, where they begin in the target), None where they arrive there by themselves.
    staged: list[tuple[Bytes, int] | None]


def locate(log: OpenLog, rows: Rows, segments: Sequence[SegmentFile], targets: Sequence[Bytes | None]) -> Wanted:
    """Readable rows as records to read. The caller holds the lock and has acquired the segments."""
    index = log.core.rows
    offsets = index.offsets(rows)
    return Wanted(
        segments, offsets.tolist(), (offsets + index.record_bytes(rows)).tolist(), index.sizes[rows].tolist(),
        index.name_bytes[rows].tolist(), index.sequences[rows], index.key_bytes(rows), targets,
    )  # fmt: skip


def read_records(log: OpenLog, lanes: Lanes, wanted: Wanted, answer: SsdRead) -> NDArray[np.int64]:
    """Fills targets and `answer`. The segments are acquired.

    Returns: int64, rows whose records are damaged or can't be read.
    """
    quick = read_directly(lanes, wanted, answer, direct=log.files.direct)
    log.count(reads=quick.reads, read_bytes=quick.read_bytes, digest_errors=len(quick.bad))
    bad = quick.bad + (_read_plainly(log, lanes, wanted, quick.left, answer) if quick.left else [])
    return np.array(bad, np.int64)


def _read_plainly(log: OpenLog, lanes: Lanes, wanted: Wanted, rows: list[int], answer: SsdRead) -> list[int]:
    """As `read_records`, of some rows. Slices overlap: while one is read, the one before is verified."""
    reader = _Reader(log, lanes, wanted, answer)
    arenas = [lanes.borrow_arena(), lanes.borrow_arena()]
    under_way: list[tuple[list[_Laid], Callable[[], None]]] = []
    try:
        for number, runs in enumerate(_slices(wanted, rows)):
            arenas[number % 2].reset()
            laid = [reader.lay(run, arenas[number % 2]) for run in runs]
            under_way.append((laid, lanes.start([task for one in laid for task in one.read.tasks()])))
            if len(under_way) == 2:
                reader.finish(*under_way.pop(0))
        while under_way:
            reader.finish(*under_way.pop(0))
    finally:
        # Whatever happened: nothing may be left that writes into the callers' memory.
        for _, finish in under_way:
            finish()
    for arena in arenas:
        lanes.return_arena(arena)
    log.count(
        reads=reader.reads, read_bytes=reader.read_bytes, io_errors=reader.io_errors, digest_errors=len(reader.bad)
    )
    return reader.bad + reader.unreadable


class _Reader:
    """One call of `_read_plainly`."""

    def __init__(self, log: OpenLog, lanes: Lanes, wanted: Wanted, answer: SsdRead) -> None:
        self._direct, self._lanes, self._wanted, self._answer = log.files.direct, lanes, wanted, answer
        #: Rows that were read but did not verify, and rows that could not be read.
        self.bad: list[int] = []
        self.unreadable: list[int] = []
        self.reads = self.read_bytes = self.io_errors = 0

    def lay(self, run: list[int], arena: Arena) -> _Laid:
        """Memory for a run."""
        first = run[0]
        if is_packed(self._wanted.sizes[first]) or self._wanted.targets[first] is None:
            return _lay_packed(self._wanted, run, arena)
        return _lay_large(self._wanted, run, arena, self._direct)

    def finish(self, laid: list[_Laid], wait: Callable[[], None]) -> None:
        """Waits for reads, and verifies what they brought."""
        wait()
        rows: list[int] = []
        heads: list[Bytes] = []
        for one in laid:
            self.reads += 1
            if one.read.error is not None:
                self._retry(one.read.rows)
                continue
            self.read_bytes += one.read.covered - one.read.start
            for row, head, staged in zip(one.read.rows, one.heads, one.staged, strict=True):
                rows.append(row)
                heads.append(head if self._needed(row) <= one.read.covered else head[:0])
                target = self._wanted.targets[row]
                if staged is not None and target is not None:
                    data, at = staged
                    np.copyto(target[at : at + len(data)], data)
        if rows:
            self.bad += _judge(self._wanted, rows, heads, self._answer)

    def _needed(self, row: int) -> int:
        """Where in the segment what is wanted of a record ends."""
        wanted = self._wanted
        if wanted.targets[row] is None:
            return wanted.offsets[row] + DESCRIPTOR_BYTES + wanted.name_bytes[row]
        return wanted.offsets[row] + payload_offset(wanted.sizes[row], wanted.name_bytes[row]) + wanted.sizes[row]

    def _retry(self, rows: list[int]) -> None:
        """One of several records can't be read: finds out which."""
        self.io_errors += 1
        if len(rows) == 1:
            self.unreadable += rows
            return
        arena = self._lanes.borrow_arena()
        for row in rows:
            arena.reset()
            laid = self.lay([row], arena)
            self.finish([laid], self._lanes.start(laid.read.tasks()))
        self._lanes.return_arena(arena)


def _slices(wanted: Wanted, rows: list[int]) -> Iterator[list[list[int]]]:
    """Runs that are read, and then verified, together."""
    runs: list[list[int]] = []
    size = 0
    for run in _runs(wanted, rows):
        runs.append(run)
        size += wanted.ends[run[-1]] - wanted.offsets[run[0]]
        if size >= SLICE_BYTES:
            yield runs
            runs, size = [], 0
    if runs:
        yield runs


def _runs(wanted: Wanted, rows: list[int]) -> list[list[int]]:
    """Rows that one system call can read, by place: packed ones with small gaps, large ones without any."""
    places = [(segment.number, offset) for segment, offset in zip(wanted.segments, wanted.offsets, strict=True)]
    runs: list[list[int]] = []
    for row in sorted(rows, key=places.__getitem__):
        if runs and _joins(wanted, runs[-1], row):
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _joins(wanted: Wanted, run: list[int], row: int) -> bool:
    first, last = run[0], run[-1]
    if (
        wanted.segments[row] is not wanted.segments[last]
        or len(run) == _RUN_RECORDS
        or wanted.ends[row] - wanted.offsets[first] > RUN_BYTES
        or wanted.targets[row] is None
        or wanted.targets[first] is None
        or is_packed(wanted.sizes[row]) != is_packed(wanted.sizes[first])
    ):
        return False
    gap = wanted.offsets[row] - wanted.ends[last]
    # Packed ones are read as one piece, and cut up in memory.
    return gap <= GAP_BYTES if is_packed(wanted.sizes[row]) else gap == 0


def _lay_packed(wanted: Wanted, run: list[int], arena: Arena) -> _Laid:
    """Pages that hold whole small records, or one record's descriptor."""
    first, last = run[0], run[-1]
    start = wanted.offsets[first] // PAGE_BYTES * PAGE_BYTES
    end = wanted.ends[last]
    if wanted.targets[first] is None:
        end = min(end, wanted.offsets[first] + PAGE_BYTES)
    data = arena.take(align(end) - start)
    heads: list[Bytes] = []
    staged: list[tuple[Bytes, int] | None] = []
    for row in run:
        at = wanted.offsets[row] - start
        payload = at + payload_offset(wanted.sizes[row], wanted.name_bytes[row])
        heads.append(data[at : at + DESCRIPTOR_BYTES + wanted.name_bytes[row]])
        staged.append(None if wanted.targets[row] is None else (data[payload : payload + wanted.sizes[row]], 0))
    return _Laid(_Read(run, wanted.segments[first].file, start, [data.data]), heads, staged)


def _lay_large(wanted: Wanted, run: list[int], arena: Arena, direct: bool) -> _Laid:
    """Of each record its descriptor's page, its payload, straight into the target where that is possible, padding."""
    heads: list[Bytes] = []
    staged: list[tuple[Bytes, int] | None] = []
    buffers: list[memoryview] = []
    for row in run:
        target, size = wanted.targets[row], wanted.sizes[row]
        assert target is not None
        head, whole = arena.take(PAGE_BYTES), align(size)
        heads.append(head)
        # Whole pages of the target take what comes; O_DIRECT needs a place of its own for the rest.
        straight = size if not direct else size // PAGE_BYTES * PAGE_BYTES if is_aligned(target) else 0
        rest = arena.take(whole - straight) if whole > straight else None
        staged.append(None if rest is None or straight == size else (rest[: size - straight], straight))
        buffers.append(head.data)
        if straight:
            buffers.append(target[:straight].data)
        if rest is not None:
            buffers.append(rest.data)
    return _Laid(_Read(run, wanted.segments[run[0]].file, wanted.offsets[run[0]], buffers), heads, staged)


def _judge(wanted: Wanted, rows: list[int], heads: list[Bytes], answer: SsdRead) -> list[int]:
    """Which records are those that were asked for, and have payloads, now in their targets, as committed.

    Args:
        heads: descriptor and name of each, uint8 (>= 256 + name); shorter where the file ended.
    Returns: rows that are not.
    """
    raw = np.zeros((len(rows), DESCRIPTOR_BYTES), np.uint8)
    good = np.zeros(len(rows), np.bool_)
    for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
        if len(head) >= DESCRIPTOR_BYTES + wanted.name_bytes[row]:
            raw[i] = head[:DESCRIPTOR_BYTES]
            good[i] = descriptor_verifies(head, wanted.offsets[row], wanted.segments[row].seed)
    found = raw.view(DESCRIPTOR).reshape(-1)
    good &= (found["kind"] == RecordKind.DATA) & (found["sequence"] == wanted.sequences[rows])
    good &= (found["key"] == wanted.keys[rows]).all(axis=1)
    good &= found["size"] == np.array([wanted.sizes[row] for row in rows], np.uint64)
    good &= found["name_bytes"] == np.array([wanted.name_bytes[row] for row in rows], np.uint16)
    _check_payloads(wanted, rows, found, good)
    at, right = np.array(rows)[good], found[good]
    answer.digests[at], answer.section_counts[at] = right["digests"], right["section_count"]
    answer.fidelities[at] = right["fidelity"]
    for i in np.flatnonzero(found["name_bytes"] * good).tolist():
        name = heads[i][DESCRIPTOR_BYTES : DESCRIPTOR_BYTES + wanted.name_bytes[rows[i]]]
        answer.names[rows[i]] = name.tobytes()
    answer.good[at] = True
    return [row for row, right in zip(rows, good.tolist(), strict=True) if not right]


def _check_payloads(wanted: Wanted, rows: list[int], found: Descriptors, good: NDArray[np.bool_]) -> None:
    """Takes from `good` what has other digests than its descriptor says. One call without the GIL."""
    if wanted.targets[rows[0]] is None:
        return
    good &= found["size"] % np.maximum(found["section_count"], 1) == 0
    at = np.flatnonzero(good)
    some = found[at]
    targets = [target for target in (wanted.targets[rows[i]] for i in at.tolist()) if target is not None]
    addresses = np.array([address_of(target) for target in targets], np.uint64)
    right = np.zeros(len(at), np.bool_)
    check_blocks(
        addresses, some["size"].astype(np.uint64), key_words(some["key"]).copy(),
        some["digests"].astype(np.uint64, order="C"), some["section_count"].astype(np.uint64), right,
    )  # fmt: skip
    good[at] = right
