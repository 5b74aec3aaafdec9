"""Makes room in the log: carries out what `core.ssd.reclaim` decides, and rolls the log over to its next segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ssd.format import RecordKind
from kvpool.core.ssd.reclaim import Effort, Reclaim, heads_in, heads_to_bury, plan_reclaim
from kvpool.core.ssd.records import RecordBatch, SsdRead, SsdState
from kvpool.core.ssd.rows import Rows, RowState
from kvpool.tiers.ssd.appending import LogAppender, tombstones
from kvpool.tiers.ssd.lanes import Arena, Lanes
from kvpool.tiers.ssd.open_log import OpenLog
from kvpool.tiers.ssd.reading import locate, read_records

#: Payload that is read and written again at a time.
COPY_BYTES: Final = 8 << 20
#: How long a segment waits for reads in flight on it before it goes.
RETIRE_S: Final = 60.0
#: Rounds of copying and giving back before more is evicted.
_KEEPING_ROUNDS: Final = 4


@dataclass(frozen=True, slots=True, eq=False)
class Writing:
    """Records on their way into the log: which of a batch, and as what."""

    batch: RecordBatch
    rows: NDArray[np.int64]
    kind: RecordKind
    announce: bool


class LogCleaner:
    """Appends with as much reclaiming as it takes. One thread at a time, the appender's."""

    def __init__(self, log: OpenLog, appender: LogAppender, lanes: Lanes) -> None:
        self._log, self._appender, self._lanes = log, appender, lanes
        self._arena = Arena(COPY_BYTES)

    def append(self, writing: Writing) -> int:
        """Appends all, reclaiming segments where there is no room.

        Returns: how many of the first are durable.
        """
        return self._append(writing, reclaiming=False)

    def bury(self, keys: NDArray[np.uint8], namespace_ids: NDArray[np.uint8], *, announce: bool) -> int:
        """Writes tombstones for distinct keys that have heads. Returns: how many of the first are durable."""
        writing = Writing(tombstones(keys, namespace_ids), np.arange(len(keys)), RecordKind.TOMBSTONE, announce)
        done = self._append(writing, reclaiming=False)
        if done < len(keys):
            # A removal is worth the last free segment.
            rest = Writing(writing.batch, writing.rows[done:], writing.kind, announce)
            done += self._append(rest, reclaiming=True)
        return done

    def reclaim_one(self, effort: Effort = Effort.KEEP) -> bool:
        """Gives one segment back. False if there is none to give, or the disk failed."""
        log = self._log
        core = log.core
        with log.lock:
            can_write = log.state is SsdState.OK and core.may_open(reclaiming=True)
            plan = plan_reclaim(core, effort if can_write else Effort.DROP)
            if plan is None and log.state is SsdState.OK:
                # Nothing goes without being written about, and there may be no room for that.
                core.allow_one_more()
                plan = plan_reclaim(core)
        if plan is None or log.state is SsdState.FAILED or not self._copy(plan):
            return False
        with log.lock:
            heads = heads_in(core, plan.segment)
            live = heads[core.rows.states[heads] == RowState.LIVE]
            gone = core.lose(live, core.rows.sequences[live])
            log.changes.removed(gone)
            log.counters.evicted += len(gone)
            log.counters.compacted += len(plan.copy) > 0
            buried = heads_to_bury(core, plan.segment, heads)
            keys, namespace_ids = core.rows.key_bytes(buried), core.namespace_ids(buried)
        writing = Writing(tombstones(keys, namespace_ids), np.arange(len(keys)), RecordKind.TOMBSTONE, False)
        if self._append(writing, reclaiming=True) < len(keys):
            return False
        try:
            log.retire(plan.segment, RETIRE_S)
        except OSError:
            log.count(io_errors=1)
            return False
        with log.lock:
            core.drop_segment(plan.segment)
        return True

    def wants_room(self) -> bool:
        """Whether the next segment could not be opened without reclaiming first."""
        with self._log.lock:
            core = self._log.core
            return self._log.state is SsdState.OK and (not core.may_open(reclaiming=False) or core.rows_short())

    def _append(self, writing: Writing, *, reclaiming: bool) -> int:
        done = 0
        # A round gives back a segment or opens one: more without a single record written are of no use.
        rounds_max = 2 * len(self._log.core.segments) + 4
        rounds = 0
        while done < len(writing.rows) and rounds < rounds_max:
            wrote = self._appender.append(writing.batch, writing.rows[done:], writing.kind, announce=writing.announce)
            effort = Effort.KEEP if rounds < _KEEPING_ROUNDS else Effort.EVICT
            if wrote is None or (wrote == 0 and not self._make_room(effort, reclaiming=reclaiming)):
                break
            done += wrote
            rounds = 0 if wrote else rounds + 1
        return done

    def _make_room(self, effort: Effort, *, reclaiming: bool) -> bool:
        """Opens a segment, or reclaims one, on the way to a segment that has room."""
        core = self._log.core
        if reclaiming:
            return core.may_open(reclaiming=True) and self._appender.open_segment()
        if not core.may_open(reclaiming=False) or core.rows_short():
            return self.reclaim_one(effort)
        if self._appender.open_segment():
            return True
        # The disk is smaller than promised: what one segment gives back may do for the next.
        return self._log.state is SsdState.FULL and self.reclaim_one() and self._appender.open_segment()

    def _copy(self, plan: Reclaim) -> bool:
        """Writes what stays into the active segment; what does not verify is lost. False if writing failed."""
        rows = self._log.core.rows
        at = 0
        while at < len(plan.copy):
            sizes = np.cumsum(rows.sizes[plan.copy[at:]])
            count = max(1, int(np.searchsorted(sizes, COPY_BYTES, side="right")))
            if not self._copy_some(plan.segment, plan.copy[at : at + count]):
                return False
            at += count
        return True

    def _copy_some(self, number: int, rows: Rows) -> bool:
        log, core = self._log, self._log.core
        self._arena.reset()
        with log.lock:
            # Readers may have found some of them damaged.
            rows = rows[(core.rows.states[rows] == RowState.LIVE) & (core.rows.segments[rows] == number)]
            segment = log.acquire([number])[number]
            keys = core.rows.key_bytes(rows)
            namespace_ids, fidelities = core.namespace_ids(rows), core.rows.fidelities[rows]
            sequences = core.rows.sequences[rows]
            targets = [self._arena.take(size) for size in core.rows.sizes[rows].tolist()]
            located = locate(log, rows, [segment] * len(rows), targets)
        answer = SsdRead.of(len(rows))
        try:
            bad = read_records(log, self._lanes, located, answer)
        finally:
            log.release([segment])
        if len(bad):
            with log.lock:
                log.changes.removed(core.lose(rows[bad], sequences[bad]))
        batch = RecordBatch(
            keys, namespace_ids, fidelities, answer.section_counts, answer.digests, targets, answer.names
        )
        good = np.flatnonzero(answer.good)
        done = self._append(Writing(batch, good, RecordKind.DATA, False), reclaiming=True)
        log.count(copied=done)
        return done == len(good)
