"""The SSD tier of a node: keys to payloads on disk, durable once acknowledged, verified whenever read.

A record is *acknowledged* when its write and the fdatasync after it have returned. After a crash each acknowledged
record that was not removed, replaced or evicted reads back verified. One that was never acknowledged is absent if any
of it is missing; if all of it reached the disk it may be there, as if the crash had come after the acknowledgement.

All methods block and may be called from any thread. One writer thread appends, removes and reclaims; reads run beside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import BadArgument, NoSsd
from kvpool.core.ids import KEY_BYTES, KeyArray
from kvpool.core.ssd.format import PAGE_BYTES, align, payload_bytes_max
from kvpool.core.ssd.log import SEGMENTS_MIN
from kvpool.core.ssd.records import (
    RecordBatch,
    SsdChanges,
    SsdFacts,
    SsdListing,
    SsdRead,
    SsdState,
    SsdStats,
)
from kvpool.core.ssd.rows import NO_ROW
from kvpool.tiers.ssd import direct_reading, group_writing, reading
from kvpool.tiers.ssd.appending import LogAppender
from kvpool.tiers.ssd.audit import audit_log
from kvpool.tiers.ssd.cleaning import LogCleaner
from kvpool.tiers.ssd.files import DiskFiles, Files
from kvpool.tiers.ssd.lanes import Bytes, Lanes
from kvpool.tiers.ssd.open_log import OpenLog
from kvpool.tiers.ssd.recovery import Damage, make_durable, open_log, remove_files, seal_scanned
from kvpool.tiers.ssd.writer import LogWriter, Request

TIMEOUT_S: Final = 30.0
_BYTE: Final = np.dtype(np.uint8)
CAPACITY_BYTES_MIN: Final = 4 << 20
_SEGMENT_BYTES_MIN, _SEGMENT_BYTES_USUAL, _SEGMENT_BYTES_MAX = 1 << 20, 256 << 20, 16 << 30
#: More files than this would be more than a process may usually have open.
_SEGMENTS_MANY: Final = 512
#: Rows of the index: one for each so many bytes of capacity, within bounds.
_BYTES_A_ROW: Final = 16 << 10
_ROWS_MIN, _ROWS_MAX = 1 << 16, 1 << 26


def segment_bytes_for(capacity_bytes: int) -> int:
    """Size of segments for a capacity: 1/16 of it, usually 256 MiB, more where there would be too many files."""
    size = min(_SEGMENT_BYTES_USUAL, capacity_bytes // 16)
    size = max(_SEGMENT_BYTES_MIN, size, capacity_bytes // _SEGMENTS_MANY)
    return align(min(size, _SEGMENT_BYTES_MAX) - PAGE_BYTES + 1)


@dataclass(frozen=True, slots=True, eq=False)
class SsdStored:
    """Facts, and what only the disk knows: digests uint64 (n, 8), zero where absent; names, b"" for blocks."""

    facts: SsdFacts
    digests: NDArray[np.uint64]
    names: list[bytes]


class SsdStore:
    """See the module's head. Made by `open`."""

    def __init__(self, log: OpenLog, *, io_depth: int, damage: Damage) -> None:
        """Raises: NoSsd, OSError if what was found damaged can't be put right now."""
        self._log = log
        self._reads = Lanes(io_depth, "ssd-read", reading.ARENA_BYTES)
        self._writes = Lanes(io_depth, "ssd-write", reading.ARENA_BYTES)
        appender = LogAppender(log, self._writes)
        self._appender = appender
        self._writer = LogWriter(log, LogCleaner(log, appender, self._writes))
        try:
            self._repair(damage)
        except BaseException:
            # A node goes on without its SSD, and must keep neither threads nor files of it.
            self._reads.close()
            self._writes.close()
            log.close_segments()
            raise
        log.changes.take()
        self._writer.start()

    @classmethod
    def open(
        cls, folder: Path, name: str, capacity_bytes: int, *, io_depth: int = 8, direct: bool = True,
        segment_bytes: int | None = None, records_max: int | None = None, files: Files | None = None,
    ) -> SsdStore:  # fmt: skip
        """The store `name` in a folder, recovered, or a new one.

        Args:
            capacity_bytes: of all files together, rounded down to whole segments. May differ from the last time.
            io_depth: reads, and writes, in flight at once.
            direct: O_DIRECT, where the file system takes it; `stats().direct` says whether it did.
            segment_bytes: of a new store; by default as `segment_bytes_for` says. One that exists keeps its own.
            records_max: records on disk that the index may name, at up to 80 bytes of memory each; beyond, the oldest
                segments are reclaimed.
            files: another I/O layer.
        Raises: NoSsd if the folder can't be used; BadArgument for a bad name, capacity or bound.
        """
        if not name or "/" in name:
            raise BadArgument(f"{name!r} is no name for an SSD store")
        if capacity_bytes < CAPACITY_BYTES_MIN and segment_bytes is None:
            raise BadArgument(f"an SSD store needs at least {CAPACITY_BYTES_MIN} bytes", hint="--ssd-size 64MiB")
        if not 1 <= io_depth <= 256:
            raise BadArgument("io_depth must be 1 to 256")
        # No first read is to wait for the compiler.
        direct_reading.warm_up()
        group_writing.warm_up()
        rows_max = records_max or min(_ROWS_MAX, max(_ROWS_MIN, capacity_bytes // _BYTES_A_ROW))
        files = DiskFiles(folder / f"kvpool-{name}", direct=direct) if files is None else files
        try:
            log, damage = open_log(
                files,
                segment_bytes=segment_bytes or segment_bytes_for(capacity_bytes),
                capacity_bytes=capacity_bytes,
                rows_max=rows_max,
            )
            return cls(log, io_depth=io_depth, damage=damage)
        except OSError as error:
            files.close()
            raise NoSsd(f"the SSD store in {folder} can't be opened: {error.strerror}") from error
        except BaseException:
            files.close()
            raise

    def _repair(self, damage: Damage) -> None:
        """Leaves a log that the next start finds in order.

        In this order, since damage that is not seen any more must not have left anything behind.
        """
        make_durable(self._log, self._writes)
        if damage.suspects:
            # It took records that may have replaced or removed these objects: better none than an old one.
            keys = np.frombuffer(b"".join(damage.suspects), np.uint8).reshape(-1, KEY_BYTES)
            if not self._writer.remove(keys).all():
                raise NoSsd(
                    "the SSD log is damaged, and objects that may be out of date can't be removed from it",
                    hint="see whether the disk can be written, then start again; or delete the folder: it is a cache",
                )
        remove_files(self._log.files, damage.files)
        seal_scanned(self._log)

    @property
    def unsure(self) -> str:
        """Why records may be on disk that the index does not name, and the next start would find; empty: none are."""
        return self._log.unsure

    @property
    def payload_bytes_max(self) -> int:
        """The largest payload that fits a segment."""
        return payload_bytes_max(self._log.core.config.segment_bytes)

    # ------------------------------------------------------------ writing

    def append(self, batch: RecordBatch, *, timeout_s: float = TIMEOUT_S) -> NDArray[np.bool_]:
        """Writes records. A block that is there in the same fidelity is acknowledged as it is; an object is replaced.

        Args:
            timeout_s: how long to wait in the queue. Once begun, a write is waited for: it reads the payloads' memory.
        Returns: bool (n), acknowledged. The others are not in the store, or as before: the queue was full, or time up
            in it; the disk is full or failed; or the record is larger than `payload_bytes_max`.
        Raises: BadArgument, NoSsd after `close`.
        """
        self._log.check_open()
        batch.validate()
        request = Request(batch=batch, acknowledged=np.zeros(len(batch), np.bool_))
        if len(batch) and not self._writer.submit(request, timeout_s):
            self._log.count(append_refused=len(batch))
        return request.acknowledged

    def remove(self, keys: KeyArray, *, timeout_s: float = TIMEOUT_S) -> NDArray[np.bool_]:
        """Removes keys, durably: a removed key never comes back by itself.

        Returns: bool (n), whether a key is gone for good (or was not there). If not, it may be readable after the next
            start, and is still readable now if the queue was full, or time up.
        """
        self._log.check_open()
        request = Request(keys=_checked(keys), acknowledged=np.zeros(len(keys), np.bool_))
        if len(keys):
            self._writer.submit(request, timeout_s)
        return request.acknowledged

    def remove_namespace(self, namespace_id: bytes, *, timeout_s: float = TIMEOUT_S) -> int | None:
        """Removes all records of a namespace. Returns: how many; None if not all of them are gone for good."""
        self._log.check_open()
        request = Request(namespace_id=bytes(namespace_id))
        if not self._writer.submit(request, timeout_s) or not request.acknowledged.all():
            return None
        return len(request.acknowledged)

    # ------------------------------------------------------------ reading

    def read(self, keys: KeyArray, targets: Sequence[Bytes]) -> SsdRead:
        """Reads payloads into memory of the caller, verified; large ones straight into it where it lies on whole pages.

        A record that does not verify, or can't be read, is absent from then on. Neighbours in the log read together.

        Args:
            targets: uint8 (size,), contiguous and writable, exactly as large as `describe` says: a row whose target
                is not is not good.
        Raises: BadArgument, NoSsd after `close`.
        """
        if len(keys) != len(targets):
            raise BadArgument(f"{len(targets)} targets do not fit {len(keys)} keys")
        for target in targets:
            # `carray`: contiguous and writable.
            if target.dtype != _BYTE or target.ndim != 1 or not target.flags.carray:
                raise BadArgument("targets must be contiguous, writable uint8 arrays")
        return self._read(keys, targets)

    def contains(self, keys: KeyArray) -> NDArray[np.bool_]:
        """bool (n). Changes nothing, reads nothing."""
        with self._log.lock:
            answer: NDArray[np.bool_] = self._log.core.rows.live(_checked(keys)) != NO_ROW
        return answer

    def undead(self, keys: KeyArray) -> SsdFacts:
        """Of keys that can't be read, but whose records may be readable after the next start; the others are absent.

        A read of them failed, or their segment is being given back, or their removal was not made durable. `remove`
        ends it for good. Reads nothing.
        """
        with self._log.lock:
            return self._log.core.facts(self._log.core.rows.undead(_checked(keys)))

    def lost_objects(self, namespace_id: bytes) -> KeyArray:
        """All objects of a namespace that are `undead`; uint8 (n, 16)."""
        with self._log.lock:
            return self._log.core.lost_objects(namespace_id)

    def describe(self, keys: KeyArray) -> SsdFacts:
        """What the index knows; reads nothing."""
        with self._log.lock:
            return self._log.core.facts(self._log.core.rows.live(_checked(keys)))

    def describe_stored(self, keys: KeyArray) -> SsdStored:
        """As `describe`, with digests and names, which are read from disk: one page a key."""
        facts = self.describe(keys)
        answer = self._read(keys, [None] * len(keys))
        facts.present[:] = facts.present & answer.good
        return SsdStored(facts, answer.digests, answer.names)

    def touch(self, keys: KeyArray) -> None:
        """Says that keys were used, elsewhere: their records survive the next eviction of their segment."""
        with self._log.lock:
            self._log.core.touch(self._log.core.rows.live(_checked(keys)))

    def take_changes(self) -> SsdChanges:
        """What came and went since the last call. Starts empty: announce from `list` after `open`, then these."""
        with self._log.lock:
            return self._log.changes.take()

    def stats(self) -> SsdStats:
        with self._log.lock:
            log = self._log
            return SsdStats(log.state, log.message, log.files.direct, log.core.space(), log.counters.copy())

    def audit(self, *, timeout_s: float = 10 * TIMEOUT_S) -> tuple[str, ...] | None:
        """Reads all files again and compares them with the index and the accounts; nothing is written meanwhile.

        For tests and operators. Returns: what differs, () if all is well; None if the queue was full.
        """
        self._log.check_open()
        faults: list[str] = []
        request = Request(task=lambda: faults.extend(audit_log(self._log)))
        return tuple(faults) if self._writer.submit(request, timeout_s) else None

    def list(self, cursor: int, limit: int) -> SsdListing:
        """Keys from a cursor on, 0 at first. A key that is there all the while is listed exactly once."""
        if cursor < 0 or limit < 1:
            raise BadArgument("cursor must be 0 or more, limit 1 or more")
        with self._log.lock:
            rows, following = self._log.core.live_page(cursor, limit)
            return SsdListing(self._log.core.rows.key_bytes(rows), self._log.core.facts(rows), following)

    def close(self, *, timeout_s: float = TIMEOUT_S) -> bool:
        """Ends what is under way, seals the log so that the next start is quick, gives the folder back.

        Returns: false if a write does not end in time: all is left as it is then, the folder is not given back.
        """
        if self._log.state is SsdState.OFF:
            return True
        if not self._writer.stop(timeout_s):
            self._log.set_state(SsdState.OFF)
            return False
        if self._log.state is not SsdState.FAILED:
            self._appender.seal()
        self._log.set_state(SsdState.OFF)
        with contextlib.suppress(OSError):
            self._log.close(timeout_s)
        self._reads.close()
        self._writes.close()
        return True

    def _read(self, keys: KeyArray, targets: Sequence[Bytes | None]) -> SsdRead:
        """`targets` None: the descriptor only."""
        log = self._log
        answer = SsdRead.of(len(keys))
        with log.lock:
            log.check_open()
            index = log.core.rows
            rows = index.live(_checked(keys))
            sizes = index.sizes[rows].tolist()
            fits = [target is None or target.size == size for target, size in zip(targets, sizes, strict=True)]
            asked = np.flatnonzero((rows != NO_ROW) & np.array(fits, np.bool_))
            rows = rows[asked]
            log.core.touch(rows)
            numbers = index.segments[rows].tolist()
            acquired = log.acquire(sorted(set(numbers)))
            sequences = index.sequences[rows]
            wanted = reading.locate(
                log, rows, [acquired[number] for number in numbers], [targets[row] for row in asked.tolist()]
            )
        found = SsdRead.of(len(rows))
        try:
            bad = reading.read_records(log, self._reads, wanted, found)
        finally:
            log.release(acquired.values())
        if len(bad):
            with log.lock:
                log.changes.removed(log.core.lose(rows[bad], sequences[bad]))
        answer.good[asked], answer.digests[asked] = found.good, found.digests
        answer.section_counts[asked], answer.fidelities[asked] = found.section_counts, found.fidelities
        for row, name in zip(asked.tolist(), found.names, strict=True):
            answer.names[row] = name
        log.count(read_misses=len(keys) - int(found.good.sum()))
        return answer


def _checked(keys: KeyArray) -> KeyArray:
    if keys.ndim != 2 or keys.shape[1] != KEY_BYTES or keys.dtype != np.uint8:
        raise BadArgument(f"keys must be uint8 (n, {KEY_BYTES})")
    return keys


assert _SEGMENT_BYTES_MIN * SEGMENTS_MIN <= CAPACITY_BYTES_MIN
