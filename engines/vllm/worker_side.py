"""The worker's half: brings a step's blocks into the engine's cache before they are needed, and stores new ones.

Loads run within a step. Stores run in a thread of their own, straight out of the engine's cache: the scheduler side
keeps those blocks from being given away until they are reported as stored (`saving`).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from engines.attached.line import Int64s
from engines.attached.quiet_log import QuietLog
from engines.vllm.cache_memory import GroupMemory
from engines.vllm.cores import leave_kernel_cores
from engines.vllm.plans import Counts, GroupBlocks, StepPlan, Transfer
from engines.vllm.pool_link import PoolLink
from engines.vllm.prefixes import KEY_BYTES
from kvpool.service.client_writes import Lot

#: Below vLLM's own logger, whose settings it shares.
log = logging.getLogger("vllm.kvpool")

#: Blocks are moved in batches of this size: a call costs little beside one, and what is copied twice is still in the
#: processor's last cache.
BATCH_BYTES = 8 << 20
#: Saves that wait for the thread; beyond it they are reported as done without being stored.
SAVES_MAX = 1024
#: How long a step that computes nothing waits for saves, here or elsewhere: also the longest that a new request waits
#: for such a step. Engines that step as fast as they can take the processor from whoever stores.
IDLE_WAIT_S = 0.002
#: What a batch that is being stored when the engine ends may still take.
LAST_BATCH_S = 6.0


class WorkerSide:
    """One worker's loads and stores."""

    def __init__(
        self, link: PoolLink, shard: int, memories: Sequence[GroupMemory], *, load_timeout_s: float, stores: bool = True
    ) -> None:
        """
        Args:
            load_timeout_s: for all loads of a step together.
            stores: False if another worker has the same bytes and stores them.
        """
        self._link, self._shard, self._memories = link, shard, tuple(memories)
        self._load_timeout_s, self._stores = load_timeout_s, stores
        self._failed_blocks: set[int] = set()
        self._received: set[str] = set()
        self._failed_requests: set[str] = set()
        self._saves: queue.Queue[tuple[int, list[Transfer]] | None] = queue.Queue(SAVES_MAX)
        self._lock = threading.Lock()
        self._all_saved = threading.Condition(self._lock)
        self._saving = 0  # saves that wait or are under way
        self._saved: list[int] = []
        self._counts = Counts()
        self._quiet = QuietLog(log)
        widest = max(memory.block_bytes for memory in self._memories)
        batch = max(BATCH_BYTES, widest)
        self._load_buffer = np.empty(batch, dtype=np.uint8)
        self._save_buffer = np.empty(batch, dtype=np.uint8)
        self._closing_s: float | None = None  # when stores that still wait are given up
        self._thread = threading.Thread(target=self._save_all, name="kvpool-save", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ loads

    def load(self, plan: StepPlan) -> None:
        """Fills the blocks of a step's loads, as far as time allows.

        What can't be had is reported by `take_failed_blocks`, or, of requests that wait, by `take_received`.
        """
        if not plan.loads:
            return
        begin_s = time.monotonic()
        for transfer in plan.loads:
            failed = [
                block for part in transfer.blocks for block in self._load_part(part, begin_s + self._load_timeout_s)
            ]
            if failed:
                self._quiet.warning(
                    "gone",
                    "kvpool: %d blocks of request %s are gone and are computed",
                    len(failed),
                    transfer.request_id,
                )
            if plan.ahead:
                self._received.add(transfer.request_id)
                if failed:
                    self._failed_requests.add(transfer.request_id)
            else:
                self._failed_blocks.update(failed)
        with self._lock:
            self._counts.load_us += int(1e6 * (time.monotonic() - begin_s))

    def _load_part(self, part: GroupBlocks, end_s: float) -> list[int]:
        """Returns: engine blocks that were not filled."""
        memory = self._memories[part.group]
        keys = np.frombuffer(part.keys, dtype=np.uint8).reshape(-1, KEY_BYTES)
        block_ids = np.array(part.block_ids, dtype=np.int64)
        step = max(BATCH_BYTES // memory.block_bytes, 1)
        loaded = 0
        for first in range(0, len(keys), step):
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                break
            some = slice(first, first + step)
            rows = self._load_buffer[: len(keys[some]) * memory.block_bytes].reshape(-1, memory.block_bytes)
            found = self._link.get(part.group, self._shard, keys[some], rows, left_s)
            good = len(found) if found.all() else int(np.argmin(found))
            memory.scatter(rows, block_ids[some][:good])
            loaded += good
            if good < len(found):
                break  # what follows a hole is computed anyway
        with self._lock:
            self._counts.blocks_loaded += loaded
            self._counts.bytes_loaded += loaded * memory.block_bytes
            self._counts.blocks_failed += len(block_ids) - loaded
        return [int(block) for block in block_ids[loaded:]]

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_received(self) -> tuple[set[str], set[str]]:
        """Requests whose loads ahead of time are over, and those of them that lack something."""
        received, self._received = self._received, set()
        failed, self._failed_requests = self._failed_requests, set()
        return received, failed

    # ------------------------------------------------------------ stores

    def save(self, plan: StepPlan) -> None:
        """Begins to store what earlier steps have computed."""
        for number, transfers in plan.saves.items():
            with self._lock:
                self._saving += 1
            try:
                self._saves.put_nowait((number, transfers))
            except queue.Full:
                self._done(number, 0, sum(len(transfer.block_ids) for transfer in transfers), 0, 0.0)
        if plan.idle:
            # The engine steps only to hear that saves are through, or to look for blocks: not all the time.
            with self._all_saved:
                self._all_saved.wait_for(lambda: not self._saving and not plan.awaits, IDLE_WAIT_S)

    def take_saved(self) -> list[int]:
        """Numbers of the saves whose blocks are no longer read."""
        with self._lock:
            saved, self._saved = self._saved, []
        return saved

    def _save_all(self) -> None:
        leave_kernel_cores()
        while (item := self._saves.get()) is not None:
            number, transfers = item
            begin_s = time.perf_counter()
            saved = moved = 0
            try:
                for part in (part for transfer in transfers for part in transfer.blocks):
                    done = self._save_part(part)
                    saved += done
                    moved += done * self._memories[part.group].block_bytes
            except Exception:
                log.exception("kvpool: blocks were not stored")
            blocks = sum(len(transfer.block_ids) for transfer in transfers) if self._stores else saved
            self._done(number, saved, blocks - saved, moved, time.perf_counter() - begin_s)

    def _save_part(self, part: GroupBlocks) -> int:
        """Returns: blocks that are in the pool now."""
        if not self._stores:
            return 0
        memory = self._memories[part.group]
        keys = np.frombuffer(part.keys, dtype=np.uint8).reshape(-1, KEY_BYTES)
        block_ids = np.array(part.block_ids, dtype=np.int64)
        there = self._link.shows(part.group, self._shard, keys)  # others may have computed the same
        saved = int(np.count_nonzero(there))
        keys, block_ids = keys[~there], block_ids[~there]
        return saved + self._link.put(
            part.group, self._shard, keys, lambda rows: self._gathered(memory, block_ids, rows)
        )

    def _gathered(self, memory: GroupMemory, block_ids: Int64s, rows: Int64s) -> Iterator[Lot]:
        """The engine's blocks `block_ids[rows]` out of its cache, some at a time, until the engine ends."""
        step = max(len(self._save_buffer) // memory.block_bytes, 1)
        for first in range(0, len(rows), step):
            if self._closing_s is not None and time.monotonic() > self._closing_s:
                return
            some = rows[first : first + step]
            out = self._save_buffer[: len(some) * memory.block_bytes].reshape(-1, memory.block_bytes)
            memory.gather(block_ids[some], out)
            yield some, out, None

    def _done(self, number: int, saved: int, unsaved: int, moved: int, seconds: float) -> None:
        with self._lock:
            self._saving -= 1
            self._all_saved.notify_all()
            self._saved.append(number)
            self._counts.blocks_saved += saved
            self._counts.blocks_unsaved += unsaved
            self._counts.bytes_saved += moved
            self._counts.save_us += int(1e6 * seconds)

    # ------------------------------------------------------------ life

    def take_counts(self) -> Counts:
        with self._lock:
            counts, self._counts = self._counts, Counts()
        return counts

    def close(self, timeout_s: float) -> None:
        """Stores what is waiting, as far as time allows; afterwards the engine's cache is not read any more."""
        self._closing_s = time.monotonic() + timeout_s
        try:
            self._saves.put(None, timeout=timeout_s + LAST_BATCH_S)
        except queue.Full:
            log.error("kvpool: stores hang, and go on reading the cache")
            return
        self._thread.join(timeout_s + LAST_BATCH_S)
