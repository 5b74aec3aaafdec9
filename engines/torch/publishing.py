"""Writes finished blocks of the engine's cache to the pool: two bounded queues, a thread each.

Hand-offs have a queue of their own, since somebody waits for them; the rest is done in the background. Within one
request the order is kept; a request whose prefill is over goes before those that still compute. A block is committed
only after its copy out of the cache is over. What can't be stored is given up and counted: whoever misses it computes
it.

While a chunk of a hand-off is computed, slots for its blocks are reserved already: when the last chunk is done, copy
and commit are all that is left.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engines.torch.copies import wait_for_copy
from engines.torch.counters import Counters
from engines.torch.links import Links
from engines.torch.request import BlockSet
from kvpool.client import BEING_WRITTEN, EXISTS, RESERVED, Hold, PoolClient, Reservation
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import KeyArray
from kvpool.tiers.hbm import BlockMemory

log = logging.getLogger(__name__)

#: Blocks in one copy and commit: small enough that a reader can begin early.
BATCH_BLOCKS = 32
#: Blocks in one reservation.
RESERVE_BLOCKS = 1024
CLOSE_TIMEOUT_S = 30.0
RESERVATION_TTL_S = 60.0


@dataclass(eq=False, slots=True)
class Handoff:
    """What the publish jobs of one hand-off share.

    `prefill_over` is set with its last job: nothing more is reserved ahead. `publish_us` and `ahead` belong to the
    publishing thread: `ahead` is the reservation for the next job's blocks, and their keys.
    """

    address: str
    hold: Hold
    cancelled: threading.Event = field(default_factory=threading.Event)
    prefill_over: bool = False
    publish_us: int = 0
    ahead: tuple[bytes, Reservation] | None = None


@dataclass(eq=False, slots=True)
class PublishJob:
    """Blocks to store at `address`; with `handoff`, until the decode instance has read them."""

    export: BlockSet
    address: str
    handoff: Handoff | None = None


class _Jobs:
    """Jobs in order, those of hand-offs whose prefill is over before the others; and hand-offs that have ended."""

    def __init__(self, jobs_max: int) -> None:
        self._jobs_max = jobs_max
        self._jobs: deque[PublishJob] = deque()
        self._ended: deque[Handoff] = deque()  # one a request that was admitted, so bounded as they are
        self._wake = threading.Condition()
        self._closed = False

    def put(self, job: PublishJob) -> bool:
        """False if the queue is full."""
        with self._wake:
            if len(self._jobs) >= self._jobs_max:
                return False
            self._jobs.append(job)
            self._wake.notify()
            return True

    def end(self, handoff: Handoff) -> None:
        with self._wake:
            # Whoever of its jobs comes last gives back too.
            if not any(job.handoff is handoff for job in self._jobs):
                self._ended.append(handoff)
                self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    def get(self) -> PublishJob | Handoff | None:
        """The next one, waited for; None once closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._jobs or self._ended)
            if self._closed:
                return None
            if self._ended:
                return self._ended.popleft()
            job = next((j for j in self._jobs if j.handoff and j.handoff.prefill_over), self._jobs[0])
            self._jobs.remove(job)
            return job


class Publisher:
    """Runs publish jobs.

    Args:
        on_ended: (job, blocks that are in the pool now); nobody reads the job's blocks any more; called exactly once.
        jobs_max: jobs that wait in a queue; one more is given up at once.
    """

    def __init__(
        self,
        memory: BlockMemory,
        links: Links,
        counters: Counters,
        *,
        on_ended: Callable[[PublishJob, int], None],
        jobs_max: int,
    ) -> None:
        self._memory, self._links, self._counters, self._on_ended = memory, links, counters, on_ended
        self._closing = threading.Event()
        self._handoffs, self._others = _Jobs(jobs_max), _Jobs(jobs_max)
        self._threads = [
            threading.Thread(target=self._run, args=(jobs,), name=name, daemon=True)
            for name, jobs in (("publish-handoff", self._handoffs), ("publish", self._others))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: PublishJob) -> None:
        if not (self._handoffs if job.handoff else self._others).put(job):
            self._counters.add("blocks_publish_given_up", len(job.export.blocks))
            self._on_ended(job, 0)

    def end(self, handoff: Handoff) -> None:
        """No more jobs of a hand-off come: after those that wait, what is reserved ahead for it is given back."""
        handoff.prefill_over = True
        self._handoffs.end(handoff)

    def close(self) -> None:
        """Ends after the batches under way; jobs that wait are given up."""
        self._closing.set()
        for jobs, thread in zip((self._handoffs, self._others), self._threads, strict=True):
            jobs.close()
            thread.join(CLOSE_TIMEOUT_S)

    # ------------------------------------------------------------ a queue's thread

    def _run(self, jobs: _Jobs) -> None:
        while not self._closing.is_set() and (job := jobs.get()) is not None:
            if isinstance(job, Handoff):
                self._give_back(job)
            else:
                self._publish(job)

    def _publish(self, job: PublishJob) -> None:
        count, there, begun_s = len(job.export.blocks), 0, time.monotonic()
        try:
            with self._links.client(job.address) as client:
                for start in range(0, count, RESERVE_BLOCKS):
                    there += self._store(client, job, np.arange(start, min(start + RESERVE_BLOCKS, count)))
        except KvpoolError as error:
            log.info("%s: not published: %s", job.export.request_id, error)
        except Exception:
            log.exception("%s: publishing failed", job.export.request_id)
        finally:
            if job.handoff is not None:
                job.handoff.publish_us += int((time.monotonic() - begun_s) * 1e6)
            self._counters.add("blocks_publish_given_up", count - there)
            self._on_ended(job, there)
        if job.handoff is not None:
            begun_s = time.monotonic()
            self._look_ahead(job, job.handoff)
            job.handoff.publish_us += int((time.monotonic() - begun_s) * 1e6)

    def _store(self, client: PoolClient, job: PublishJob, indices: np.ndarray) -> int:
        """Stores some blocks. Returns: blocks of them that are in the pool, or about to be by somebody else."""
        if self._given_up(job):
            return 0
        keys = job.export.keys[indices]
        reservation = self._taken_ahead(job.handoff, keys)
        if reservation is not None:
            there = 0
            try:
                there = self._fill(client, job, indices, reservation, (EXISTS,))
                indices = indices[~np.isin(reservation.status, (RESERVED, EXISTS))]
            except KvpoolError as error:
                # It may have expired, or its session ended; what was committed then exists.
                log.info("%s: reserved again: %s", job.export.request_id, error)
            return there + self._store(client, job, indices) if len(indices) else there
        parent = job.export.keys[indices[0] - 1].tobytes() if indices[0] else job.export.parent
        hold = job.handoff.hold if job.handoff is not None else None
        reservation = client.reserve(self._links.namespace, keys, ttl_s=RESERVATION_TTL_S, hold=hold, parent=parent)
        return self._fill(client, job, indices, reservation, (EXISTS, BEING_WRITTEN))

    def _fill(
        self,
        client: PoolClient,
        job: PublishJob,
        indices: np.ndarray,
        reservation: Reservation,
        good_enough: tuple[int, ...],
    ) -> int:
        """Copies and commits what is reserved; gives back what is not committed.

        Args: good_enough: status of blocks that count as there though they were not reserved.
        Returns: as `_store`.
        """
        there = int(np.isin(reservation.status, good_enough).sum())
        wanted = np.flatnonzero(reservation.status == RESERVED)
        step = min(BATCH_BLOCKS, self._memory.batch_blocks_max)
        committed = 0
        try:
            for start in range(0, len(wanted), step):
                batch = wanted[start : start + step]
                if self._given_up(job) or not self._copy_and_commit(client, job, indices, reservation, batch):
                    break
                committed += len(batch)
        finally:
            self._counters.add("blocks_already_there", there)
            self._counters.add("blocks_published", committed)
            self._counters.add("bytes_published", committed * self._memory.block_bytes)
            if committed < len(wanted):
                with contextlib.suppress(KvpoolError):  # it then ends with its session, or by its expiry
                    client.abort(reservation)
        return there + committed

    def _copy_and_commit(
        self, client: PoolClient, job: PublishJob, indices: np.ndarray, reservation: Reservation, batch: np.ndarray
    ) -> bool:
        staging = self._memory.gather(job.export.blocks[indices[batch]])
        try:
            if not wait_for_copy(staging.event, self._closing):
                return False
            digests = client.write(reservation, batch, staging.data, rows=staging.rows)
        finally:
            staging.release()
        client.commit(reservation, batch, digests)
        return True

    def _given_up(self, job: PublishJob) -> bool:
        return self._closing.is_set() or (job.handoff is not None and job.handoff.cancelled.is_set())

    # ------------------------------------------------------------ reserving ahead

    def _look_ahead(self, job: PublishJob, handoff: Handoff) -> None:
        """Reserves slots for what the next chunk will finish: nobody waits for this call."""
        following = job.export.following[:RESERVE_BLOCKS]
        self._give_back(handoff)
        if not len(following) or handoff.prefill_over or self._given_up(job):
            return
        parent = job.export.keys[-1].tobytes()
        try:
            with self._links.client(handoff.address) as client:
                reserved = client.reserve(
                    self._links.namespace, following, ttl_s=RESERVATION_TTL_S, hold=handoff.hold, parent=parent
                )
        except KvpoolError as error:
            log.debug("%s: nothing reserved ahead: %s", job.export.request_id, error)
            return
        if reserved.id:
            handoff.ahead = (following.tobytes(), reserved)

    def _taken_ahead(self, handoff: Handoff | None, keys: KeyArray) -> Reservation | None:
        """The reservation that was made for just these keys."""
        if handoff is None or handoff.ahead is None:
            return None
        ahead, reservation = handoff.ahead
        if ahead != keys.tobytes():
            self._give_back(handoff)
            return None
        handoff.ahead = None
        return reservation

    def _give_back(self, handoff: Handoff) -> None:
        """What was reserved ahead and will not be written; should the call fail, it expires."""
        if handoff.ahead is None:
            return
        _, reservation = handoff.ahead
        handoff.ahead = None
        with contextlib.suppress(KvpoolError), self._links.client(handoff.address) as client:
            client.abort(reservation)
