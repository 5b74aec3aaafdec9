"""Copies cold blocks down to the SSD before they are evicted."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from kvpool.core.demotion import ColdBlocks
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import Fidelity, KeyArray, SessionId
from kvpool.core.index import Entries, split_keys
from kvpool.core.ssd.records import RecordBatch, SsdState
from kvpool.service.source_driver import SourceDriver
from kvpool.service.ssd_marks import SsdMarks
from kvpool.service.threads import in_thread
from kvpool.tiers.ssd.store import SsdStore

log = logging.getLogger(__name__)

#: How long it rests when there is nothing cold to copy; a writer may wake it.
IDLE_S = 0.2
#: A look costs a scan now and then: it rests at least so many times as long as the look took, and this long.
REST_FACTOR, REST_S_MIN = 10.0, 0.002
#: After a failed or refused write the disk is left alone for so long.
BACKOFF_S = 2.0
BATCH_BYTES_MAX, BATCH_BLOCKS_MAX = 64 << 20, 1024
#: A batch can't be evicted while it is copied: at most this part of memory, so that writers find room meanwhile.
BATCH_SHARE = 8
LEASE_US = 120_000_000


class SsdDemotion:
    """Runs in the node's event loop.

    Args:
        data: uint8, the segment's data, which the store writes from.
        session: of the core, which holds what is on its way.
        changing: held while the store is changed.
        demote_from: fraction of memory in use beyond which cold blocks are copied.
    """

    def __init__(
        self,
        store: SsdStore,
        driver: SourceDriver,
        data: NDArray[np.uint8],
        session: SessionId,
        marks: SsdMarks,
        threads: Executor,
        changing: asyncio.Lock,
        demote_from: float,
    ) -> None:
        self._store, self._driver, self._core, self._data = store, driver, driver.core, data
        self._session, self._marks, self._threads, self._changing = session, marks, threads, changing
        capacity_bytes = self._core.store.slots.capacity_bytes
        self._from_bytes = demote_from * capacity_bytes
        self._batch_bytes_max = min(BATCH_BYTES_MAX, capacity_bytes // BATCH_SHARE)
        self._woken = asyncio.Event()
        self._refused = False
        self.blocks = 0
        self._going_down: set[bytes] = set()

    def wake(self) -> None:
        """Blocks came: if memory is fuller than it should be, it looks at once."""
        if self._core.store.slots.bytes_used > self._from_bytes:
            self._woken.set()

    def is_going_down(self, keys: KeyArray) -> NDArray[np.bool_]:
        """Objects that are being written: they may be on disk already, whatever the store says. bool (n)."""
        going = self._going_down
        return np.fromiter((key in going for key in split_keys(keys)), dtype=np.bool_, count=len(keys))

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            begin_s, backoff_s = loop.time(), 0.0
            try:
                if await self._demote_some():
                    await asyncio.sleep(0)
                    continue
                if self._refused:
                    backoff_s = BACKOFF_S
            except KvpoolError as error:
                log.warning("nothing is copied to the SSD for now: %s", error)
                backoff_s = BACKOFF_S
            except Exception:
                log.exception("copying to the SSD failed")
                backoff_s = BACKOFF_S
            await asyncio.sleep(max(backoff_s, REST_S_MIN, min(IDLE_S, REST_FACTOR * (loop.time() - begin_s))))
            timer = loop.call_later(IDLE_S, self._woken.set)
            await self._woken.wait()
            timer.cancel()
            self._woken.clear()

    async def _demote_some(self) -> bool:
        """Copies one batch of cold blocks down; whether there may be more."""
        self._refused = False
        full = self._core.store.slots.bytes_used > self._from_bytes
        if not full or self._store.stats().state in (SsdState.FAILED, SsdState.OFF):
            self._marks.settle()
            return False
        async with self._changing:
            cold = self._core.demotion_candidates(self._batch_bytes_max, BATCH_BLOCKS_MAX)
            if not len(cold):
                self._marks.settle()
                return False
            there = np.array([not name for name in cold.names], dtype=np.bool_)
            # Blocks that were written again while their copy below stayed. What stands under an object's name may be
            # something else.
            there[there] = self._marks.mark(cold.keys[there])
            cold = cold.take(~there)
            return not len(cold) or await self._write(cold)

    async def _write(self, cold: ColdBlocks) -> bool:
        """Whether anything is on the SSD now."""
        leases: list[int] = []
        named = np.array([bool(name) for name in cold.names], dtype=np.bool_)
        try:
            with self._driver.turn() as now:
                # Held while the disk reads from them; one lease for each namespace.
                for namespace_id in dict.fromkeys(cold.namespace_ids):
                    rows = [i for i, other in enumerate(cold.namespace_ids) if other == namespace_id]
                    leased = self._core.lease(
                        self._session, namespace_id, cold.keys[rows], LEASE_US, now, fidelity_min=Fidelity.INT8,
                        counted=False,
                    )  # fmt: skip
                    leases.append(leased.lease)
            entries = self._core.index.lookup(cold.keys)
            self._going_down.update(split_keys(cold.keys[named]))
            batch = self._batch(cold)
            acknowledged = await in_thread(self._store.append, batch, threads=self._threads)
            same = self._unchanged(cold, entries)
            late = named & acknowledged & ~same
            if late.any():
                # It was dropped from memory meanwhile: its name may be put again, and must not be taken.
                await in_thread(self._store.remove, cold.keys[late], threads=self._threads)
        finally:
            self._going_down.clear()
            with self._driver.turn() as now:
                self._core.release(self._session, [lease for lease in leases if lease], now)
        with self._driver.turn():
            self._marks.mark(cold.keys[acknowledged & same])
        self.blocks += int(acknowledged.sum())
        self._refused = not acknowledged.any()
        return not self._refused

    def _unchanged(self, cold: ColdBlocks, entries: Entries) -> NDArray[np.bool_]:
        """Which of the blocks still are in memory as they were."""
        same: NDArray[np.bool_] = self._core.index.lookup(cold.keys) == entries
        same &= self._core.arrays.generations[entries] == cold.blocks.generations
        return same

    def _batch(self, cold: ColdBlocks) -> RecordBatch:
        blocks = cold.blocks
        payloads = [
            self._data[offset : offset + size]
            for offset, size in zip(blocks.offsets.tolist(), blocks.sizes.tolist(), strict=True)
        ]
        namespaces = np.frombuffer(b"".join(cold.namespace_ids), dtype=np.uint8).reshape(-1, 16)
        return RecordBatch(
            keys=blocks.keys, namespace_ids=namespaces, fidelities=cold.fidelities,
            section_counts=cold.section_counts, digests=blocks.digests, payloads=payloads, names=cold.names,
        )  # fmt: skip
