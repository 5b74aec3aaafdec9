"""The worker's half: brings a step's blocks into the engine's cache before they are needed, and stores new ones.

Loads run within the step that needs them. Stores run in a thread of their own, straight out of the engine's cache:
the scheduler side keeps those blocks from being given away until they are reported as stored (`saving`).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence

import numpy as np

from engines.vllm.cache_memory import GroupMemory
from engines.vllm.plans import Counts, GroupBlocks, StepPlan, Transfer
from engines.vllm.pool_link import PoolLink

#: Below vLLM's own logger, whose settings it shares.
log = logging.getLogger("vllm.kvpool")

KEY_BYTES = 16
#: Blocks are moved in batches of this size, so that what is copied twice is still in the processor's cache.
BATCH_BYTES = 768 << 10
#: Saves that wait for the thread; beyond it they are reported as done without being stored.
SAVES_MAX = 1024
#: How long a step that computes nothing waits for saves: also the longest that a new request waits for such a step.
IDLE_WAIT_S = 0.002


class WorkerSide:
    """One worker's loads and stores."""

    def __init__(self, link: PoolLink, shard: int, memories: Sequence[GroupMemory]) -> None:
        self._link, self._shard, self._memories = link, shard, tuple(memories)
        self._failed_blocks: set[int] = set()
        self._saves: queue.Queue[tuple[int, list[Transfer]] | None] = queue.Queue(SAVES_MAX)
        self._lock = threading.Lock()
        self._all_saved = threading.Condition(self._lock)
        self._saving = 0  # saves that wait or are under way
        self._saved: list[int] = []
        self._counts = Counts()
        widest = max(memory.block_bytes for memory in self._memories)
        batch = max(BATCH_BYTES, widest)
        self._load_buffer = np.empty(batch, dtype=np.uint8)
        self._save_buffer = np.empty(batch, dtype=np.uint8)
        self._thread = threading.Thread(target=self._save_all, name="kvpool-save", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ loads

    def load(self, plan: StepPlan) -> None:
        """Fills the blocks of a step's loads. What can't be had is reported by `take_failed_blocks`."""
        begin_s = time.perf_counter()
        for transfer in plan.loads:
            for part in transfer.blocks:
                self._load_part(transfer.request_id, part)
        if plan.loads:
            with self._lock:
                self._counts.load_us += int(1e6 * (time.perf_counter() - begin_s))

    def _load_part(self, request_id: str, part: GroupBlocks) -> None:
        memory = self._memories[part.group]
        keys = np.frombuffer(part.keys, dtype=np.uint8).reshape(-1, KEY_BYTES)
        block_ids = np.array(part.block_ids, dtype=np.int64)
        step = max(BATCH_BYTES // memory.block_bytes, 1)
        loaded = 0
        for first in range(0, len(keys), step):
            some = slice(first, first + step)
            rows = self._load_buffer[: len(keys[some]) * memory.block_bytes].reshape(-1, memory.block_bytes)
            found = self._link.get(part.group, self._shard, keys[some], rows)
            good = len(found) if found.all() else int(np.argmin(found))
            memory.scatter(rows, block_ids[some][:good])
            loaded += good
            if good < len(found):
                break  # what follows a hole is computed anyway
        failed = block_ids[loaded:].tolist()
        self._failed_blocks.update(failed)
        with self._lock:
            self._counts.blocks_loaded += loaded
            self._counts.bytes_loaded += loaded * memory.block_bytes
            self._counts.blocks_failed += len(failed)
        if failed:
            log.warning("kvpool: %d blocks of request %s are gone and are computed", len(failed), request_id)

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    # ------------------------------------------------------------ stores

    def save(self, plan: StepPlan) -> None:
        """Begins to store what earlier steps have computed."""
        for number, transfers in plan.saves.items():
            with self._lock:
                self._saving += 1
            try:
                self._saves.put_nowait((number, transfers))
            except queue.Full:
                self._done(number, 0, sum(len(part) for transfer in transfers for part in transfer.blocks), 0, 0.0)
        if plan.idle:
            # The engine steps only to hear that saves are through: it need not do so all the time.
            with self._all_saved:
                self._all_saved.wait_for(lambda: not self._saving, IDLE_WAIT_S)

    def take_saved(self) -> list[int]:
        """Numbers of the saves whose blocks are no longer read."""
        with self._lock:
            saved, self._saved = self._saved, []
        return saved

    def _save_all(self) -> None:
        while (item := self._saves.get()) is not None:
            number, transfers = item
            begin_s = time.perf_counter()
            saved = unsaved = moved = 0
            try:
                for transfer in transfers:
                    for part in transfer.blocks:
                        done = self._save_part(part)
                        saved, unsaved = saved + done, unsaved + len(part) - done
                        moved += done * self._memories[part.group].block_bytes
            except Exception:
                log.exception("kvpool: blocks were not stored")
            self._done(number, saved, unsaved, moved, time.perf_counter() - begin_s)

    def _save_part(self, part: GroupBlocks) -> int:
        memory = self._memories[part.group]
        keys = np.frombuffer(part.keys, dtype=np.uint8).reshape(-1, KEY_BYTES)
        block_ids = np.array(part.block_ids, dtype=np.int64)
        step = max(len(self._save_buffer) // memory.block_bytes, 1)
        saved = 0
        for first in range(0, len(keys), step):
            some = slice(first, first + step)
            rows = self._save_buffer[: len(keys[some]) * memory.block_bytes].reshape(-1, memory.block_bytes)
            memory.gather(block_ids[some], rows)
            saved += self._link.put(part.group, self._shard, keys[some], rows)
        return saved

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
        """Stores what is waiting, as far as time allows."""
        try:
            self._saves.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)
