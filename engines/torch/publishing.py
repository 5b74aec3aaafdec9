"""Writes finished blocks of the engine's cache to the pool: two bounded queues, a thread each.

Hand-offs have a queue of their own, since somebody waits for them; the rest is done in the background. Within one
request the order is kept. A block is committed only after its copy out of the cache is over. What can't be stored is
given up and counted: whoever misses it computes it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engines.torch.copies import wait_for_copy
from engines.torch.counters import Counters
from engines.torch.links import Links
from engines.torch.request import BlockSet
from kvpool.client import Hold, PoolClient, Reservation
from kvpool.core.errors import KvpoolError
from kvpool.tiers.hbm import BlockMemory

log = logging.getLogger(__name__)

BATCH_BLOCKS = 32
CLOSE_TIMEOUT_S = 30.0
RESERVATION_TTL_S = 60.0
_RESERVED, _EXISTS, _BEING_WRITTEN = 1, 2, 3


@dataclass(eq=False, slots=True)
class PublishJob:
    """Blocks to store at `address`; with `hold`, until the decode instance has read them."""

    export: BlockSet
    address: str
    hold: Hold | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


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
        self._handoffs: queue.Queue[PublishJob | None] = queue.Queue(jobs_max)
        self._others: queue.Queue[PublishJob | None] = queue.Queue(jobs_max)
        self._threads = [
            threading.Thread(target=self._run, args=(jobs,), name=name, daemon=True)
            for name, jobs in (("publish-handoff", self._handoffs), ("publish", self._others))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: PublishJob) -> None:
        try:
            (self._handoffs if job.hold else self._others).put_nowait(job)
        except queue.Full:
            self._counters.add("blocks_publish_given_up", len(job.export.blocks))
            self._on_ended(job, 0)

    def close(self) -> None:
        """Ends after the batches under way; jobs that wait are given up."""
        self._closing.set()
        for jobs, thread in zip((self._handoffs, self._others), self._threads, strict=True):
            with contextlib.suppress(queue.Full):  # a busy thread looks for itself
                jobs.put_nowait(None)
            thread.join(CLOSE_TIMEOUT_S)

    def _run(self, jobs: queue.Queue[PublishJob | None]) -> None:
        while not self._closing.is_set():
            job = jobs.get()
            if job is not None:
                self._publish(job)

    def _publish(self, job: PublishJob) -> None:
        count, there = len(job.export.blocks), 0
        step = min(BATCH_BLOCKS, self._memory.batch_blocks_max)
        try:
            with self._links.client(job.address) as client:
                for start in range(0, count, step):
                    if job.cancelled.is_set() or self._closing.is_set():
                        break
                    there += self._store(client, job, np.arange(start, min(start + step, count)))
        except KvpoolError as error:
            log.info("%s: not published: %s", job.export.request_id, error)
        except Exception:
            log.exception("%s: publishing failed", job.export.request_id)
        finally:
            self._counters.add("blocks_publish_given_up", count - there)
            self._on_ended(job, there)

    def _store(self, client: PoolClient, job: PublishJob, indices: np.ndarray) -> int:
        """Stores one batch. Returns: blocks of it that are in the pool, or about to be by somebody else."""
        keys, blocks = job.export.keys[indices], job.export.blocks[indices]
        reservation = client.reserve(self._links.namespace, keys, ttl_s=RESERVATION_TTL_S, hold=job.hold)
        there = int(np.isin(reservation.status, (_EXISTS, _BEING_WRITTEN)).sum())
        self._counters.add("blocks_already_there", there)
        wanted = np.flatnonzero(reservation.status == _RESERVED)
        if not len(wanted):
            return there
        committed = False
        try:
            committed = self._copy_and_commit(client, reservation, wanted, blocks[wanted])
        finally:
            if not committed:
                client.abort(reservation)
        if committed:
            self._counters.add("blocks_published", len(wanted))
            self._counters.add("bytes_published", len(wanted) * self._memory.block_bytes)
            there += len(wanted)
        return there

    def _copy_and_commit(
        self, client: PoolClient, reservation: Reservation, wanted: np.ndarray, blocks: np.ndarray
    ) -> bool:
        staging = self._memory.gather(blocks)
        try:
            if not wait_for_copy(staging.event, self._closing):
                return False
            digests = client.write(reservation, wanted, staging.data, rows=staging.rows)
        finally:
            staging.release()
        client.commit(reservation, wanted, digests)
        return True
