"""Brings blocks up from the SSD when they are asked for, and holds them until those who asked have them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import KvpoolError, NoSsd
from kvpool.core.ids import Fidelity, KeyArray, SessionId
from kvpool.core.index import split_keys
from kvpool.core.namespace import OBJECTS_GROUP
from kvpool.core.results import ReserveStatus
from kvpool.service.lower_tier import Promoted
from kvpool.service.promotions import Promotion, Promotions
from kvpool.service.source_driver import SourceDriver
from kvpool.service.ssd_marks import SsdMarks
from kvpool.service.threads import in_thread
from kvpool.tiers.ssd.store import SsdStore, SsdStored

log = logging.getLogger(__name__)

#: How long a slot waits for the disk.
SLOT_US = 120_000_000
#: What was brought up is held for its readers no longer than this, whatever they do.
PROMOTED_US = 5_000_000
#: Promotions under way, in blocks; beyond it blocks count as absent.
PROMOTING_MAX = 65_536


class SsdPromotion:
    """Runs in the node's event loop.

    Args:
        data: uint8, the segment's data, which the store reads into.
        session: of the core, which holds what is on its way.
    """

    def __init__(
        self,
        store: SsdStore,
        driver: SourceDriver,
        data: NDArray[np.uint8],
        session: SessionId,
        marks: SsdMarks,
        threads: Executor,
    ) -> None:
        self._store, self._driver, self._core, self._data = store, driver, driver.core, data
        self._session, self._marks, self._threads = session, marks, threads
        self.blocks = 0
        self._under_way = Promotions(driver, session)
        self._allowed = asyncio.Event()
        self._allowed.set()

    async def bring(self, namespace_id: bytes, keys: KeyArray, timeout_s: float) -> Promoted:
        """As `LowerTier.promote`."""
        below = self._better_below(namespace_id, keys)
        if not below.any():
            return Promoted(below)
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        # More than once: the next removal may have begun before this one hears that the last has ended.
        while not self._allowed.is_set():
            if loop.time() >= end_s:
                return Promoted(below)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._allowed.wait(), end_s - loop.time())
        packed = split_keys(keys[below])
        fresh = self._under_way.missing(packed)
        if fresh and len(self._under_way) + len(fresh) <= PROMOTING_MAX:
            self._under_way.begin(fresh, partial(self._promote, namespace_id))
        return await self._under_way.join(packed, below, end_s - loop.time())

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """What is under way."""
        return self._under_way.tasks

    @contextlib.asynccontextmanager
    async def kept_out(self, timeout_s: float) -> AsyncIterator[None]:
        """Nothing is on its way up, nor begins to be: what is removed below meanwhile does not come back above.

        Raises: NoSsd if what is under way does not end in time.
        """
        self._allowed.clear()
        try:
            if not await self._under_way.quiet(timeout_s):
                raise NoSsd(f"reads of the SSD do not end within {timeout_s:.0f} s", hint="its disk hangs")
            yield
        finally:
            self._allowed.set()

    # ------------------------------------------------------------ parts

    def _better_below(self, namespace_id: bytes, keys: KeyArray) -> NDArray[np.bool_]:
        """Which blocks the SSD has, and memory not, or only in a worse fidelity; bool (n)."""
        arrays = self._core.arrays
        entries, here = self._core.store.readable(self._core.namespace_number(namespace_id), keys)
        worst = np.zeros(len(keys), dtype=np.uint8)
        worst[here] = arrays.fidelities[entries[here]]
        asked = np.flatnonzero(~here | (worst > Fidelity.EXACT))
        below = np.zeros(len(keys), dtype=np.bool_)
        if not len(asked):
            return below
        facts = self._store.describe(keys[asked])
        mine = facts.present & (facts.namespace_ids == np.frombuffer(namespace_id, dtype=np.uint8)).all(axis=1)
        below[asked] = mine & (~here[asked] | (facts.fidelities < worst[asked]))
        return below

    async def _promote(self, namespace_id: bytes, packed: list[bytes], promotion: Promotion) -> None:
        try:
            keys = np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(-1, 16)
            stored = await in_thread(self._store.describe_stored, keys, threads=self._threads)
            facts = stored.facts
            for sections in np.unique(facts.section_counts[facts.present]).tolist():
                for fidelity in np.unique(facts.fidelities[facts.present]).tolist():
                    rows = facts.present & (facts.section_counts == sections) & (facts.fidelities == fidelity)
                    await self._promote_alike(
                        namespace_id, keys, stored, np.flatnonzero(rows), sections, fidelity, promotion
                    )
        except KvpoolError as error:
            log.info("blocks stay on the SSD: %s", error)

    async def _promote_alike(
        self,
        namespace_id: bytes,
        keys: KeyArray,
        stored: SsdStored,
        rows: NDArray[np.int64],
        sections: int,
        fidelity: int,
        promotion: Promotion,
    ) -> None:
        """Promotes blocks of one section count and fidelity: one reservation, one read, one commit."""
        if not len(rows):
            return
        names = [stored.names[row] for row in rows.tolist()]
        sizes = stored.facts.sizes[rows]
        group = dataclasses.replace(OBJECTS_GROUP, section_count=sections)
        with self._driver.turn() as now:
            reserved = self._core.reserve(
                self._session, namespace_id, group, keys[rows], SLOT_US, now, sizes=sizes,
                names=names if any(names) else None, fidelity=Fidelity(fidelity), promoting=True,
            )  # fmt: skip
        if not reserved.reservation:
            return
        try:
            mine = np.flatnonzero(reserved.status == ReserveStatus.RESERVED)
            slots = reserved.slots.take(mine)
            targets = [
                self._data[offset : offset + size]
                for offset, size in zip(slots.offsets.tolist(), slots.sizes.tolist(), strict=True)
            ]
            read = await in_thread(self._store.read, slots.keys, targets, threads=self._threads)
            # Two looks at the store: what it has may have been replaced between them.
            good = np.flatnonzero(read.good & (read.fidelities == fidelity) & (read.section_counts == sections))
            indices = np.repeat(mine[good], sections).astype(np.uint32)
            numbers = np.tile(np.arange(sections, dtype=np.uint32), len(good))
            with self._driver.turn() as now:
                digests = np.ascontiguousarray(read.digests[good, :sections]).ravel()
                self._core.commit(self._session, reserved.reservation, indices, numbers, digests, now)
                self._marks.mark(slots.keys[good])
                leased = self._core.lease(
                    self._session, namespace_id, slots.keys[good], PROMOTED_US, now, fidelity_min=Fidelity.INT8,
                    counted=False,
                )  # fmt: skip
                promotion.leases.append(leased.lease)
            self.blocks += len(good)
        finally:
            # Gives back what was not read; a reservation that is complete has nothing left to give.
            with contextlib.suppress(KvpoolError), self._driver.turn() as now:
                self._core.abort(self._session, reserved.reservation, now)
            self._marks.settle()
