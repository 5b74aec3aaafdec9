"""The engine's own cache as the lower tier of a small staging memory, from which others read it.

A block that is asked for is held in the engine's cache, copied to a slot of the staging memory, and committed there
with the digests of the bytes that arrived; then the engine's block is let go. From there on the staging memory is a
source like any other: leases, digests, channels and expiry are the node's code. A staged copy may be evicted at any
time, since it can be copied again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.torch.copies import wait_for_copy
from engines.torch.counters import Counters
from engines.torch.request import BlockSet
from kvpool.channels.base import addresses
from kvpool.channels.sections import copy_blocks_in
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import DeadlineExceeded, KvpoolError, Unsupported
from kvpool.core.ids import KeyArray, Tier
from kvpool.core.index import split_keys
from kvpool.core.namespace import NamespaceSpec
from kvpool.service.lower_tier import Promoted
from kvpool.service.promotions import Promotion, Promotions
from kvpool.service.source_driver import SourceDriver
from kvpool.service.threads import in_thread
from kvpool.tiers.hbm import BlockMemory
from kvpool.v1 import block_source_pb2 as pb

log = logging.getLogger(__name__)

#: Blocks that are copied at a time: a reader asks for about as many.
BATCH_BLOCKS = 32
#: Blocks on their way to the staging memory; beyond it they count as absent.
PROMOTING_MAX = 4096
#: The computing thread answers between two steps; a step that takes longer costs the reader a miss.
LEND_TIMEOUT_S = 10.0
RESERVATION_US = 120_000_000
#: How long a staged copy is kept at most for those who asked for it; they take a lease of their own at once.
PROMOTED_US = 60_000_000
#: Batches that are copied at a time; each takes a staging area of the device.
COPIES_MAX = 2
COPY_TIMEOUT_S = 30.0


class CachedBlocks(Protocol):
    """The engine's prefix cache, as other threads reach it."""

    def lend_cached(self, keys: list[bytes], deliver: Callable[[BlockSet], None]) -> None:
        """Holds those blocks that are there; `deliver` is called with them in the computing thread.

        Raises: Overloaded.
        """
        ...

    def give_back(self, lent: BlockSet) -> None:
        """Ends that hold. Any thread."""
        ...


class HbmTier:
    """A `LowerTier`. Runs in the event loop of its source; `changed` may be called from any thread."""

    tier = Tier.HBM

    def __init__(
        self,
        spec: NamespaceSpec,
        driver: SourceDriver,
        data: NDArray[np.uint8],
        cached: CachedBlocks,
        memory: BlockMemory,
        counters: Counters,
    ) -> None:
        """Args: data: uint8, the staging segment's data."""
        self._namespace, self._group = spec.id(), spec.groups[0]
        self._driver, self._core, self._data = driver, driver.core, data
        self._cached, self._memory, self._counters = cached, memory, counters
        # A mirror of the engine's table, which belongs to another thread. Single operations on it are atomic.
        self._keys: dict[bytes, None] = {}
        self._copying = asyncio.Semaphore(COPIES_MAX)
        self._closing = threading.Event()
        with driver.turn() as now:
            self._core.register_namespace(spec)
            self._session = self._core.open_session("hbm tier", now)
            self._core.set_lower_tier(True)
        self._promoting = Promotions(driver, self._session)

    def changed(self, changes: Iterable[tuple[bool, bytes]]) -> None:
        """(stored or removed, key) of the engine's prefix cache, in order."""
        for stored, key in changes:
            if stored:
                self._keys[key] = None
            else:
                self._keys.pop(key, None)

    async def close(self) -> None:
        """Ends all work; what was lent is given back."""
        self._closing.set()
        tasks = list(self._promoting.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------ what the source asks

    def contains(self, namespace_id: bytes, keys: KeyArray) -> NDArray[np.bool_]:
        if namespace_id != self._namespace:
            return np.zeros(len(keys), dtype=np.bool_)
        return np.fromiter((key in self._keys for key in split_keys(keys)), dtype=np.bool_, count=len(keys))

    async def promote(self, namespace_id: bytes, keys: KeyArray, timeout_s: float) -> Promoted:
        below = ~self._core.lookup(namespace_id, keys)
        below[below] = self.contains(namespace_id, keys[below])
        if not below.any() or self._closing.is_set():
            return Promoted(below)
        packed = split_keys(keys[below])
        fresh = self._promoting.missing(packed)[: max(0, PROMOTING_MAX - len(self._promoting))]
        # A reader waits for those batches only that have blocks of its own.
        step = min(BATCH_BLOCKS, self._memory.batch_blocks_max)
        for start in range(0, len(fresh), step):
            self._promoting.begin(fresh[start : start + step], self._promote)
        return await self._promoting.join(packed, below, timeout_s)

    async def remove(
        self, namespace_id: bytes, keys: KeyArray | None, name_prefix: bytes, remove_above: Callable[[], int]
    ) -> int:
        raise Unsupported(
            "blocks in a worker's HBM are the engine's own", hint="they make room for others by themselves"
        )

    # ------------------------------------------------------------ up

    async def _promote(self, packed: list[bytes], promotion: Promotion) -> None:
        promoted = 0
        try:
            async with self._copying:
                promoted = await self._promote_batch(packed, promotion)
        except KvpoolError as error:
            log.info("blocks stay in HBM: %s", error)
        except Exception:
            log.exception("copying blocks out of HBM failed")
        finally:
            self._counters.add("hbm_blocks_promoted", promoted)
            self._counters.add("hbm_blocks_not_promoted", len(packed) - promoted)

    async def _promote_batch(self, packed: list[bytes], promotion: Promotion) -> int:
        """Returns how many blocks are readable now."""
        lent = await self._lend(packed)
        try:
            return await self._copy(lent, promotion) if len(lent.blocks) else 0
        finally:
            self._cached.give_back(lent)

    async def _lend(self, packed: list[bytes]) -> BlockSet:
        """Raises: DeadlineExceeded if the computing thread does not answer; what comes too late is given back."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[BlockSet] = loop.create_future()

        def settle(lent: BlockSet) -> None:
            if answer.done():
                self._cached.give_back(lent)
            else:
                answer.set_result(lent)

        def deliver(lent: BlockSet) -> None:
            try:
                loop.call_soon_threadsafe(settle, lent)
            except RuntimeError:  # the loop has ended
                self._cached.give_back(lent)

        self._cached.lend_cached(packed, deliver)
        try:
            return await asyncio.wait_for(asyncio.shield(answer), LEND_TIMEOUT_S)
        except BaseException as error:
            if answer.done() and not answer.cancelled():
                self._cached.give_back(answer.result())  # it came while this task was being cancelled
            else:
                answer.cancel()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the engine is busy with a long step") from None
            raise

    async def _copy(self, lent: BlockSet, promotion: Promotion) -> int:
        with self._driver.turn() as now:
            reserved = self._core.reserve(
                self._session, self._namespace, self._group, lent.keys, RESERVATION_US, now, parent=lent.parent
            )
        if not reserved.reservation:
            return 0
        try:
            mine = np.flatnonzero(reserved.status == pb.ReserveReply.RESERVED)
            digests = await in_thread(self._gather, lent.blocks[mine], reserved.slots.take(mine))
            if digests is None:
                return 0
            sections = self._group.section_count
            with self._driver.turn() as now:
                self._core.commit(
                    self._session, reserved.reservation, np.repeat(mine, sections).astype(np.uint32),
                    np.tile(np.arange(sections, dtype=np.uint32), len(mine)), digests.ravel(), now,
                )  # fmt: skip
                leased = self._core.lease(
                    self._session, self._namespace, lent.keys[mine], PROMOTED_US, now, counted=False
                )
                promotion.leases.append(leased.lease)
            return len(mine)
        finally:
            # A reservation that is complete has nothing left to give back.
            with contextlib.suppress(KvpoolError), self._driver.turn() as now:
                self._core.abort(self._session, reserved.reservation, now)

    def _gather(self, blocks: NDArray[np.int64], slots: Descriptors) -> NDArray[np.uint64] | None:
        """Copies blocks to slots, in a thread. Returns digests (blocks, sections) of what was copied; None: closing."""
        staging = self._memory.gather(blocks)
        try:
            if not wait_for_copy(staging.event, self._closing):
                return None
            targets = (slots.offsets + np.uint64(self._data.ctypes.data)).astype(np.uint64)
            return copy_blocks_in(
                addresses(staging.data, staging.rows), targets, slots.sizes, slots.keys, self._group.section_count,
                end_s=time.monotonic() + COPY_TIMEOUT_S,
            )  # fmt: skip
        finally:
            staging.release()
