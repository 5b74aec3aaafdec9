"""The one thread that writes the log: takes requests in order, appends what waits as one group, reclaims when idle."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ids import KeyArray
from kvpool.core.ssd.format import RecordKind
from kvpool.core.ssd.records import RecordBatch
from kvpool.core.ssd.rows import NO_ROW, Rows, RowState
from kvpool.tiers.ssd.appending import GROUP_BYTES, distinct_prefix, fit, sizes_of
from kvpool.tiers.ssd.cleaning import LogCleaner, Writing
from kvpool.tiers.ssd.open_log import OpenLog

#: Requests that may wait; each has a thread waiting for it. Beyond, a request is refused at once.
QUEUE_MAX: Final = 64
QUEUE_BYTES_MAX: Final = 1 << 30
_REMOVE_KEYS: Final = 4096


@dataclass(slots=True, eq=False)
class Request:
    """One of: records to append, keys to remove, a namespace to remove, something to do while nothing is written.

    acknowledged: bool, one a record or key.
    """

    batch: RecordBatch | None = None
    keys: KeyArray | None = None
    namespace_id: bytes | None = None
    task: Callable[[], None] | None = None
    acknowledged: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    started: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def size_bytes(self) -> int:
        return 0 if self.batch is None else sum(payload.size for payload in self.batch.payloads)


class LogWriter:
    """The queue and its thread."""

    def __init__(self, log: OpenLog, cleaner: LogCleaner) -> None:
        self._log, self._cleaner = log, cleaner
        self._waiting: deque[Request] = deque()
        self._waiting_bytes = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._can_clean = True
        self._thread = threading.Thread(target=self._run, name="ssd-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, timeout_s: float) -> bool:
        """Waits until a request is done. False: it was not begun, since the queue is full or time was up.

        An append that has begun is waited for: the writer reads the caller's memory until then. Of anything else that
        is not done in time, False says that nobody knows what becomes of it.
        """
        size = request.size_bytes
        with self._wake:
            full = len(self._waiting) >= QUEUE_MAX or (self._waiting and self._waiting_bytes + size > QUEUE_BYTES_MAX)
            if self._stopping or full:
                return False
            self._waiting.append(request)
            self._waiting_bytes += size
            self._wake.notify()
        if not request.done.wait(timeout_s):
            with self._wake:
                # The thread may have given up all that waited just now.
                if not request.started and request in self._waiting:
                    self._waiting.remove(request)
                    self._waiting_bytes -= size
                    return False
            if request.batch is None:
                return False
            request.done.wait()
        return True

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread when what waits is done. False: it has not ended in time, and may still write."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while (requests := self._next()) is not None:
                try:
                    self._serve(requests)
                finally:
                    for request in requests:
                        request.done.set()
        except BaseException as error:
            # A bug of ours must neither leave callers waiting nor write on.
            self._log.give_up(f"the writer failed: {error!r}")
            self._give_up()
            raise

    def _give_up(self) -> None:
        with self._wake:
            self._stopping = True
            for request in self._waiting:
                request.done.set()
            self._waiting.clear()

    def _next(self) -> list[Request] | None:
        """The next requests to serve together, none to do some cleaning; None to stop."""
        with self._wake:
            while not self._waiting:
                if self._stopping:
                    return None
                if self._can_clean and self._cleaner.wants_room():
                    return []
                self._wake.wait()
            taken = [self._waiting.popleft()]
            size = taken[0].size_bytes
            # Appends side by side share a sync.
            while self._waiting and taken[0].batch is not None and self._waiting[0].batch is not None:
                size += self._waiting[0].size_bytes
                if size > GROUP_BYTES:
                    break
                taken.append(self._waiting.popleft())
            for request in taken:
                request.started = True
                self._waiting_bytes -= request.size_bytes
            self._can_clean = True
            return taken

    def _serve(self, requests: list[Request]) -> None:
        if not requests:
            self._can_clean = self._cleaner.reclaim_one()
        elif requests[0].batch is not None:
            self._append([request for request in requests if request.batch is not None])
        elif requests[0].keys is not None:
            requests[0].acknowledged = self.remove(requests[0].keys)
        elif requests[0].namespace_id is not None:
            requests[0].acknowledged = self._remove_namespace(requests[0].namespace_id)
        elif requests[0].task is not None:
            requests[0].task()

    def _append(self, requests: list[Request]) -> None:
        batch = _joined([request.batch for request in requests if request.batch is not None])
        acknowledged = self._already_there(batch)
        size = self._log.core.config.segment_bytes
        sizes, name_bytes = sizes_of(batch, range(len(batch)))
        rows = np.flatnonzero(~acknowledged & fit(size, sizes, name_bytes))
        at = stored = 0
        while at < len(rows):
            count = distinct_prefix(batch.keys[rows[at:]])
            some = rows[at : at + count]
            done = self._cleaner.append(Writing(batch, some, RecordKind.DATA, True))
            acknowledged[some[:done]] = True
            stored += done
            at += count
            if done < count:
                break
        self._log.count(
            appended=stored, appended_bytes=int(sizes[rows][acknowledged[rows]].sum()),
            append_refused=len(batch) - int(acknowledged.sum()),
        )  # fmt: skip
        start = 0
        for request in requests:
            request.acknowledged = acknowledged[start : start + len(request.acknowledged)]
            start += len(request.acknowledged)

    def _already_there(self, batch: RecordBatch) -> NDArray[np.bool_]:
        """Blocks, which are named by their content, that the log holds in the same fidelity. Objects may change."""
        with self._log.lock:
            rows = self._log.core.rows.live(batch.keys)
            facts = self._log.core.facts(rows)
        sizes = np.array([payload.size for payload in batch.payloads], np.uint64)
        same: NDArray[np.bool_] = (
            facts.present
            & (facts.sizes == sizes)
            & (facts.fidelities == batch.fidelities)
            & (facts.section_counts == batch.section_counts)
            & (facts.namespace_ids == batch.namespace_ids).all(axis=1)
            & (facts.name_bytes == 0)
        )
        if batch.names:
            same &= np.array([not name for name in batch.names], np.bool_)
        return same

    def remove(self, keys: KeyArray) -> NDArray[np.bool_]:
        """Removes keys; on the writer's thread, or before it has started.

        Returns: bool (n), whether the key is durably gone, or was not there. The others can't be read any more, but may
            be back after the next start.
        """
        core = self._log.core
        packed = np.ascontiguousarray(keys).view("V16").reshape(-1)
        _, first, at = np.unique(packed, return_index=True, return_inverse=True)
        distinct = keys[first]
        with self._log.lock:
            heads = core.rows.heads(distinct)
            held = np.flatnonzero(heads != NO_ROW)
            held = held[core.rows.kinds[heads[held]] != RecordKind.TOMBSTONE]
            namespace_ids = core.namespace_ids(heads[held])
            live = core.rows.live(distinct[held])
            removed = int(np.count_nonzero(live != NO_ROW))
        done = self._cleaner.bury(distinct[held], namespace_ids, announce=True)
        gone = np.ones(len(distinct), np.bool_)
        gone[held[done:]] = False
        if done < len(held):
            self._hide(distinct[held[done:]])
        if self._log.unsure:
            # What is not known to be there can't be said to be gone either.
            gone[:] = False
        self._log.count(removed=removed)
        answer: NDArray[np.bool_] = gone[at.reshape(-1)]
        return answer

    def _hide(self, keys: KeyArray) -> None:
        with self._log.lock:
            core = self._log.core
            rows: Rows = core.rows.live(keys)
            rows = rows[rows != NO_ROW]
            self._log.changes.removed(core.lose(rows, core.rows.sequences[rows]))

    def _remove_namespace(self, namespace_id: bytes) -> NDArray[np.bool_]:
        index = self._log.core.rows
        with self._log.lock:
            number = self._log.core.namespace_number(namespace_id)
            heads = np.isin(index.states, (RowState.LIVE, RowState.LOST))
            found = (
                np.flatnonzero(heads & (index.namespaces == number)) if number is not None else np.zeros(0, np.int64)
            )
            keys = index.key_bytes(found.astype(np.int32))
        gone = [self.remove(keys[at : at + _REMOVE_KEYS]) for at in range(0, len(keys), _REMOVE_KEYS)]
        if self._log.unsure:
            gone.append(np.zeros(1, np.bool_))
        answer: NDArray[np.bool_] = np.concatenate([np.zeros(0, np.bool_), *gone])
        return answer


def _joined(batches: list[RecordBatch]) -> RecordBatch:
    if len(batches) == 1:
        return batches[0]
    width = max(batch.digests.shape[1] for batch in batches)
    digests = [np.pad(batch.digests, ((0, 0), (0, width - batch.digests.shape[1]))) for batch in batches]
    return RecordBatch(
        np.concatenate([batch.keys for batch in batches]),
        np.concatenate([batch.namespace_ids for batch in batches]),
        np.concatenate([batch.fidelities for batch in batches]),
        np.concatenate([batch.section_counts for batch in batches]),
        np.concatenate(digests),
        [payload for batch in batches for payload in batch.payloads],
        [name for batch in batches for name in (batch.names or [b""] * len(batch))],
    )
