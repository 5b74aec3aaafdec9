"""Fills blocks of the engine's cache from the pool: a bounded set of threads, each busy with one request.

What does not come is reported as ended early and computed by the engine: no failure here ever fails a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engines.torch.copies import wait_for_copy
from engines.torch.counters import Counters
from engines.torch.links import Links
from engines.torch.request import BlockSet
from kvpool.client import ABANDONED, COMMITTED, DEADLINE, PoolClient
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import KeyArray
from kvpool.tiers.hbm import BlockMemory

log = logging.getLogger(__name__)

#: Blocks in one read: small enough that computing can begin early, large enough to use a link.
BATCH_BLOCKS = 32
#: A wait for blocks looks up this often whether its request still wants them.
WAIT_SLICE_S = 0.5
CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Blocks [first, end) of a prompt are said to be readable at `address`."""

    address: str
    first: int
    end: int


@dataclass(slots=True)
class PullJob:
    """One request's blocks to fill. `handoff` is set for a DECODE request: they appear there, under its hold."""

    pull: BlockSet
    origins: Sequence[Origin] = ()
    handoff: str = ""  # address
    hold: str = ""  # request id of the hand-off hold
    deadline_s: float = 0.0  # on time.monotonic; blocks are given up then
    cancelled: threading.Event = field(default_factory=threading.Event)
    first_token_s: float = 0.0  # when the first token was known; 0 = not yet
    reads: list[tuple[float, float]] = field(default_factory=list)  # begin and end of each read, on time.monotonic
    ended_s: float = 0.0  # when nothing more was to come; 0 = not yet


class Puller:
    """Runs pull jobs.

    Args:
        on_arrived: (job, leading blocks there, bytes moved since the last call); called in the job's thread.
        on_read: (job, keys): what a hand-off holds for this job is read, and need not be held for it any more; must not
            wait, since decoding may be waiting for the next blocks.
        on_ended: nobody writes to the job's blocks any more; called exactly once a job.
        grace_s: how long blocks may still appear after the first token of a split request is known.
        jobs_max: jobs at a time; one more ends at once with nothing pulled.
    """

    def __init__(
        self,
        memory: BlockMemory,
        links: Links,
        counters: Counters,
        *,
        on_arrived: Callable[[PullJob, int, int], None],
        on_read: Callable[[PullJob, KeyArray], None],
        on_ended: Callable[[PullJob], None],
        jobs_max: int,
        grace_s: float,
    ) -> None:
        self._memory, self._links, self._counters = memory, links, counters
        self._on_arrived, self._on_read, self._on_ended = on_arrived, on_read, on_ended
        self._grace_s = grace_s
        self._jobs_max = jobs_max
        self._slots = threading.BoundedSemaphore(jobs_max)
        self._closing = threading.Event()

    def submit(self, job: PullJob) -> None:
        if self._closing.is_set() or not self._slots.acquire(blocking=False):
            self._give_up(job)
            return
        # A thread a job: most of its life it waits, and their number is bounded by what the engine admits.
        try:
            threading.Thread(target=self._run, args=(job,), name="pull", daemon=True).start()
        except RuntimeError as error:
            log.warning("%s: %s; its blocks are computed", job.pull.request_id, error)
            self._slots.release()
            self._give_up(job)

    def close(self) -> None:
        """Ends all jobs within about the length of one read."""
        self._closing.set()
        for _ in range(self._jobs_max):
            if not self._slots.acquire(timeout=CLOSE_TIMEOUT_S):
                log.warning("a pull did not end in time")
                return

    def _give_up(self, job: PullJob) -> None:
        self._counters.add("blocks_pull_failed", len(job.pull.blocks))
        self._on_ended(job)

    # ------------------------------------------------------------ a job's thread

    def _run(self, job: PullJob) -> None:
        progress = _Progress(job, self._on_arrived)
        try:
            if job.handoff:
                self._pull_handed(job, progress)
            else:
                self._pull_held(job, progress)
        except KvpoolError as error:
            log.info("%s: %s; the rest is computed", job.pull.request_id, error)
        except Exception:
            log.exception("%s: pulling failed; the rest is computed", job.pull.request_id)
        finally:
            missing = len(job.pull.blocks) - progress.leading
            self._counters.add("blocks_pull_failed", 0 if job.cancelled.is_set() else missing)
            progress.end(self._on_ended)
            self._slots.release()

    def _pull_held(self, job: PullJob, progress: _Progress) -> None:
        """Blocks that are there already: read run after run, as far as the prefix goes."""
        while not self._over(job) and progress.leading < len(job.pull.blocks):
            index = job.pull.first + progress.leading
            before = progress.leading
            for origin in (o for o in job.origins if o.first <= index < o.end):
                count = min(origin.end - index, len(job.pull.blocks) - before, self._batch)
                try:
                    with self._links.client(origin.address) as client:
                        self._read(client, origin.address, job, np.arange(before, before + count), progress)
                except KvpoolError as error:
                    log.info("%s: %s gave nothing: %s", job.pull.request_id, origin.address, error)
                if progress.leading > before:
                    break
            if progress.leading == before:
                return

    def _pull_handed(self, job: PullJob, progress: _Progress) -> None:
        """Blocks that another instance is publishing: each is read when it is committed."""
        waiting = np.arange(len(job.pull.blocks))
        with self._links.client(job.handoff) as client:
            while len(waiting) and progress.leading < progress.hole and not self._over(job):
                final = 0.0 < job.first_token_s < time.monotonic() - self._grace_s
                waiting = self._wait_and_read(client, job, waiting, progress, final)

    def _wait_and_read(
        self, client: PoolClient, job: PullJob, waiting: np.ndarray, progress: _Progress, final: bool
    ) -> np.ndarray:
        """One slice of waiting. Returns: blocks that may still come; `final`: those that nobody writes will not."""
        late: list[int] = []
        slices = client.wait(
            self._links.namespace, job.pull.keys[waiting], deadline_s=WAIT_SLICE_S, absent_is_abandoned=final
        )
        for waited in slices:
            indices = waiting[waited.indices]
            late.extend(indices[waited.states == DEADLINE].tolist())
            # Computing begins at the first hole: what comes after one is of no use.
            progress.hole = min([progress.hole, *indices[waited.states == ABANDONED].tolist()])
            ready = np.sort(indices[waited.states == COMMITTED])
            ready = ready[ready < progress.hole]
            for start in range(0, len(ready), self._batch):
                batch = ready[start : start + self._batch]
                missing = batch[~self._read(client, job.handoff, job, batch, progress)]
                progress.hole = min([progress.hole, *missing.tolist()])
            if progress.leading >= progress.hole:
                break
        return np.array(sorted(late), dtype=np.int64)

    def _read(
        self, client: PoolClient, address: str, job: PullJob, indices: np.ndarray, progress: _Progress
    ) -> np.ndarray:
        """Reads blocks `indices` of the pull into the cache. Returns: for each whether it is there."""
        blocks, begun_s = job.pull.blocks[indices], time.monotonic()
        nothing = np.zeros(len(indices), dtype=bool)
        staging = self._memory.receive(blocks)
        try:
            if not wait_for_copy(staging.event, self._closing):
                return nothing
            with self._links.measured(client, address) as moved:
                result = client.get(self._links.namespace, job.pull.keys[indices], staging.data, rows=staging.rows)
                moved(result.bytes)
            good = np.flatnonzero(result.found)
            if len(good) and not wait_for_copy(self._memory.scatter(staging, blocks, good), self._closing):
                return nothing
        finally:
            staging.release()
        self._counters.add("blocks_pulled", len(good))
        self._counters.add("bytes_pulled", result.bytes)
        job.reads.append((begun_s, time.monotonic()))
        progress.there(indices[good], result.bytes)
        if job.hold and len(good):
            self._on_read(job, job.pull.keys[indices[good]])
        return result.found

    @property
    def _batch(self) -> int:
        return min(BATCH_BLOCKS, self._memory.batch_blocks_max)

    def _over(self, job: PullJob) -> bool:
        return self._closing.is_set() or job.cancelled.is_set() or 0.0 < job.deadline_s <= time.monotonic()


class _Progress:
    """Which blocks of a job are there. The engine can use the leading ones only."""

    def __init__(self, job: PullJob, on_arrived: Callable[[PullJob, int, int], None]) -> None:
        self._job, self._on_arrived = job, on_arrived
        self._there = np.zeros(len(job.pull.blocks) + 1, dtype=bool)
        self.leading = 0
        self.hole = len(job.pull.blocks)  # blocks from here on are not coming
        self._bytes = 0
        self._ended = False

    def there(self, indices: np.ndarray, byte_count: int) -> None:
        self._there[indices] = True
        self._bytes += byte_count
        leading = int(np.argmin(self._there))
        if leading > self.leading:
            self.leading = leading
            self._on_arrived(self._job, leading, self._bytes)
            self._bytes = 0

    def end(self, on_ended: Callable[[PullJob], None]) -> None:
        if not self._ended:
            self._ended = True
            self._job.ended_s = time.monotonic()
            on_ended(self._job)
