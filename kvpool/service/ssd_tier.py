"""The SSD tier of a node: copies cold blocks down before they are evicted, brings wanted ones up again.

Decisions are the core's (what is cold) and the store's (what is where); this shell moves blocks between the two, in
threads, with a lease or a reservation of its own on whatever it touches. A block is *acknowledged* on the SSD when its
group commit has been synced; only then is it announced in tier SSD. What is removed is durably removed before the
caller hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import EntryState
from kvpool.core.demotion import ColdBlocks
from kvpool.core.errors import KvpoolError, NoSsd
from kvpool.core.ids import Fidelity, KeyArray, Tier
from kvpool.core.index import split_keys
from kvpool.core.namespace import OBJECTS_GROUP
from kvpool.core.ssd.records import RecordBatch
from kvpool.service.announcer import Announcer, Snapshot
from kvpool.service.lower_tier import Promoted
from kvpool.service.source_driver import SourceDriver
from kvpool.service.threads import in_thread
from kvpool.tiers.ssd.store import SsdListing, SsdStore, SsdStored
from kvpool.v1 import block_source_pb2 as pb

log = logging.getLogger(__name__)

#: How long the tier rests when there is nothing cold to copy.
IDLE_S = 0.2
#: After a failed write the disk is left alone for so long.
BACKOFF_S = 2.0
DEMOTE_BYTES_MAX, DEMOTE_BLOCKS_MAX = 64 << 20, 1024
LEASE_US = 120_000_000
#: What was brought up is held for its readers no longer than this, whatever they do.
PROMOTED_US = 5_000_000
#: Promotions under way, in blocks; beyond it blocks count as absent.
PROMOTING_MAX = 65_536
LIST_PAGE = 65_536
VERIFY_PAGE = 64
SNAPSHOT_TIMEOUT_S = 30.0


class _Promotion:
    """Blocks on their way up, and then held for those who asked for them. Known by identity."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None]
        self.users = 0
        self.leases: list[int] = []
        self.ended = False


class SsdTier:
    """A `LowerTier`. Runs in the node's event loop.

    Args:
        data: uint8, the segment's data, which the store reads from and writes to directly.
        demote_from: fraction of memory in use beyond which cold blocks are copied down.
    """

    tier = Tier.SSD

    def __init__(
        self, store: SsdStore, driver: SourceDriver, data: NDArray[np.uint8], *, demote_from: float = 0.7
    ) -> None:
        self._store, self._driver, self._core, self._data = store, driver, driver.core, data
        self._demote_from = demote_from
        self.announcer: Announcer | None = None
        self.promotions = self.demotions = 0
        with driver.turn() as now:
            self._session = self._core.open_session("ssd tier", now)
            self._core.set_lower_tier(True)
        # One change of the store at a time: what is being written down can't be removed behind its back. A removal
        # also keeps promotions out: what is on its way up would be back after it was removed.
        self._changing = asyncio.Lock()
        self._no_removal = asyncio.Event()
        self._no_removal.set()
        self._promoting: dict[bytes, _Promotion] = {}
        #: Why an object on the disk may come back though it is hidden now; empty: none can. See `check_objects`.
        self._undead = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._demoting: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        """Brings memory and disk together, before anybody is served. Raises: NoSsd if the disk can't note it.

        What this node took over from its predecessor may be on the disk already. Where both have an object and differ,
        memory is newer: the disk was out of reach when the object was removed and put again.
        """
        arrays = self._core.arrays
        objects = np.flatnonzero((arrays.states == EntryState.READABLE) & (arrays.name_bytes > 0))
        keys = arrays.keys[objects].view(np.uint8).reshape(-1, 16)
        stored = await in_thread(self._store.describe_stored, keys)
        differ = stored.facts.present & (stored.digests != arrays.digests[objects]).any(axis=1)
        if differ.any() and not (await in_thread(self._store.remove, keys[differ])).all():
            raise NoSsd("older versions of objects could not be removed from the SSD")
        self._mark_all()

    # ------------------------------------------------------------ what the node asks

    @property
    def bytes_total(self) -> int:
        return self._store.stats().space.bytes_total

    def start(self) -> None:
        """Begins to copy cold blocks down."""
        self._demoting = asyncio.get_running_loop().create_task(self._demote_forever())

    async def close(self) -> None:
        """Ends all work; what was not acknowledged is as if it never was written."""
        tasks = [*self._tasks, *([self._demoting] if self._demoting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._store.close)

    def contains(self, namespace_id: bytes, keys: KeyArray) -> NDArray[np.bool_]:
        """Which keys are on the SSD in this namespace."""
        facts = self._store.describe(keys)
        mine: NDArray[np.bool_] = (facts.namespace_ids == np.frombuffer(namespace_id, dtype=np.uint8)).all(axis=1)
        return facts.present & mine

    def check_objects(self) -> None:
        """Raises: NoSsd while an object that can't be read now might come back later, older than one put meanwhile."""
        if self._undead:
            raise NoSsd(f"objects can't be changed: {self._undead}", hint="look after the disk, then restart the node")

    async def promote(self, namespace_id: bytes, keys: KeyArray, timeout_s: float) -> Promoted:
        below = ~self._core.lookup(namespace_id, keys)
        below[below] = self.contains(namespace_id, keys[below])
        if not below.any():
            return Promoted(below)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._no_removal.wait(), timeout_s)
        if not self._no_removal.is_set():
            return Promoted(below)
        packed = split_keys(keys[below])
        fresh = [key for key in dict.fromkeys(packed) if key not in self._promoting]
        if fresh and len(self._promoting) + len(fresh) <= PROMOTING_MAX:
            self._begin_promotion(namespace_id, fresh)
        mine = list(dict.fromkeys(self._promoting[key] for key in packed if key in self._promoting))
        for promotion in mine:
            promotion.users += 1

        def release() -> None:
            for promotion in mine:
                promotion.users -= 1
                self._let_go(promotion)

        try:
            if mine:
                await asyncio.wait([promotion.task for promotion in mine], timeout=timeout_s)
        except BaseException:
            release()
            raise
        return Promoted(below, release)

    async def remove(
        self, namespace_id: bytes, keys: KeyArray | None, name_prefix: bytes, remove_above: Callable[[], int]
    ) -> int:
        """Removes keys, or with None all of a namespace whose names begin so, from the SSD and then from memory.

        Returns once it is durable. `remove_above` removes from memory, and says how many blocks were there.
        Raises: KvpoolError if it can't be made durable now; memory is left as it is.
        """
        async with self._changing:
            self._no_removal.clear()
            try:
                if self._promoting:
                    await asyncio.wait([promotion.task for promotion in self._promoting.values()])
                below = await in_thread(self._remove_below, namespace_id, keys, name_prefix)
                self._settle()
                return max(below, remove_above())
            finally:
                self._no_removal.set()

    def _remove_below(self, namespace_id: bytes, keys: KeyArray | None, name_prefix: bytes) -> int:
        if keys is None and name_prefix:
            keys = self._named(namespace_id, name_prefix)
        if keys is None:
            removed = self._store.remove_namespace(namespace_id)
        else:
            mine = self.contains(namespace_id, keys)
            # Of objects also those that can't be read or are on their way out: after a crash they would be back. Their
            # keys are of their namespace alone; a block's key may stand in another one, whose block is to stay.
            buried = keys if self._core.group(namespace_id, 0, 0) is OBJECTS_GROUP else keys[mine]
            removed = int(mine.sum()) if not len(buried) or self._store.remove(buried).all() else None
        if removed is None:
            self._undead = "a removal could not be noted on the SSD"
            raise NoSsd(
                "the removal could not be noted on the SSD",
                hint="see the SSD in kvctl inspect and the node's log: its disk is failing",
            )
        return removed

    def verify_page(self, cursor: int, namespace_id: bytes) -> tuple[int, int, int, int | None]:
        """Reads some records and checks each digest; the store drops what is bad. Blocks: call it in a thread.

        Args: namespace_id: empty = all.
        Returns: good, bad, bytes read, and the cursor of the next page (None: done).
        """
        listing = self._store.list(cursor, VERIFY_PAGE)
        keys = listing.keys if not namespace_id else listing.keys[self.contains(namespace_id, listing.keys)]
        facts = self._store.describe(keys)
        here = np.flatnonzero(facts.present)
        targets = [np.empty(size, dtype=np.uint8) for size in facts.sizes[here].tolist()]
        good = self._store.read(keys[here], targets).good
        # What went away meanwhile is not bad; what is bad went away because of this read, and was counted.
        return int(good.sum()), int((~good).sum()), int(facts.sizes[here].sum()), listing.next_cursor

    def stats(self) -> pb.SsdStats:
        stats = self._store.stats()
        space, counters = stats.space, stats.counters
        return pb.SsdStats(
            state=str(stats.state), reason=stats.message, bytes_total=space.bytes_total, bytes_live=space.bytes_live,
            bytes_dead=space.bytes_dead, bytes_free=space.bytes_free, records=space.records, hits=self.promotions,
            demotions=self.demotions, evictions=counters.evicted, io_errors=counters.io_errors,
            digest_errors=counters.digest_errors, recovery_s=counters.recovery_s,
            recovered_bytes=counters.recovered_bytes,
        )  # fmt: skip

    # ------------------------------------------------------------ up

    def _begin_promotion(self, namespace_id: bytes, fresh: list[bytes]) -> None:
        promotion = _Promotion()
        promotion.task = asyncio.get_running_loop().create_task(self._promote(namespace_id, fresh, promotion))
        for key in fresh:
            self._promoting[key] = promotion
        self._tasks.add(promotion.task)
        promotion.task.add_done_callback(self._tasks.discard)

    async def _promote(self, namespace_id: bytes, packed: list[bytes], promotion: _Promotion) -> None:
        try:
            keys = np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(-1, 16)
            stored = await in_thread(self._store.describe_stored, keys)
            facts = stored.facts
            for sections in np.unique(facts.section_counts[facts.present]).tolist():
                for fidelity in np.unique(facts.fidelities[facts.present]).tolist():
                    rows = facts.present & (facts.section_counts == sections) & (facts.fidelities == fidelity)
                    await self._promote_alike(
                        namespace_id, keys, stored, np.flatnonzero(rows), sections, fidelity, promotion
                    )
        except KvpoolError as error:
            log.info("blocks stay on the SSD: %s", error)
        finally:
            for key in packed:
                del self._promoting[key]
            promotion.ended = True
            self._let_go(promotion)

    def _let_go(self, promotion: _Promotion) -> None:
        """Ends the hold on what was brought up, once everybody who asked for it has it in his own hands."""
        if promotion.ended and promotion.users == 0 and promotion.leases:
            leases, promotion.leases = promotion.leases, []
            with contextlib.suppress(KvpoolError), self._driver.turn() as now:
                self._core.release(self._session, leases, now)

    async def _promote_alike(
        self,
        namespace_id: bytes,
        keys: KeyArray,
        stored: SsdStored,
        rows: NDArray[np.int64],
        sections: int,
        fidelity: int,
        promotion: _Promotion,
    ) -> None:
        """Promotes blocks of one section count and fidelity: one reservation, one read, one commit."""
        if not len(rows):
            return
        names = [stored.names[row] for row in rows.tolist()]
        sizes = stored.facts.sizes[rows]
        group = dataclasses.replace(OBJECTS_GROUP, section_count=sections)
        with self._driver.turn() as now:
            reserved = self._core.reserve(
                self._session, namespace_id, group, keys[rows], LEASE_US, now, sizes=sizes,
                names=names if any(names) else None, fidelity=Fidelity(fidelity),
            )  # fmt: skip
        if not reserved.reservation:
            return
        try:
            mine = np.flatnonzero(reserved.status == pb.ReserveReply.RESERVED)
            slots = reserved.slots.take(mine)
            targets = [
                self._data[offset : offset + size]
                for offset, size in zip(slots.offsets.tolist(), slots.sizes.tolist(), strict=True)
            ]
            read = await in_thread(self._store.read, slots.keys, targets)
            good = np.flatnonzero(read.good)
            if any(names) and not read.good.all():
                self._undead = "an object on the SSD could not be read"
            indices = np.repeat(mine[good], sections).astype(np.uint32)
            numbers = np.tile(np.arange(sections, dtype=np.uint32), len(good))
            with self._driver.turn() as now:
                digests = np.ascontiguousarray(read.digests[good, :sections]).ravel()
                self._core.commit(self._session, reserved.reservation, indices, numbers, digests, now)
                self._core.mark_lower(slots.keys[good], True)
                leased = self._core.lease(
                    self._session, namespace_id, slots.keys[good], PROMOTED_US, now, fidelity_min=Fidelity.INT8,
                    counted=False,
                )  # fmt: skip
                promotion.leases.append(leased.lease)
            self.promotions += len(good)
        finally:
            # Gives back what was not read; a reservation that is complete has nothing left to give.
            with contextlib.suppress(KvpoolError), self._driver.turn() as now:
                self._core.abort(self._session, reserved.reservation, now)
            self._settle()

    # ------------------------------------------------------------ down

    async def _demote_forever(self) -> None:
        while True:
            rest_s = IDLE_S
            try:
                if await self._demote_some():
                    rest_s = 0.0
            except KvpoolError as error:
                log.warning("nothing is copied to the SSD for now: %s", error)
                rest_s = BACKOFF_S
            except Exception:
                log.exception("copying to the SSD failed")
                rest_s = BACKOFF_S
            await asyncio.sleep(rest_s)

    async def _demote_some(self) -> bool:
        """Copies one batch of cold blocks down; whether there may be more."""
        counts = self._core.counts()
        if counts.bytes_used <= self._demote_from * counts.bytes_total or self._store.stats().state in (
            "failed",
            "off",
        ):
            self._settle()
            return False
        async with self._changing:
            cold = self._core.demotion_candidates(DEMOTE_BYTES_MAX, DEMOTE_BLOCKS_MAX)
            # Blocks that were written again while their copy below stayed.
            facts = self._store.describe(cold.keys)
            there = facts.present & (facts.fidelities == cold.fidelities)
            # A block is its content; what stands under an object's name may be an older one.
            there &= np.array([not name for name in cold.names], dtype=np.bool_)
            self._core.mark_lower(cold.keys[there], True)
            cold = cold.take(~there)
            if not len(cold.keys):
                self._settle()
                return False
            return await self._write(cold)

    async def _write(self, cold: ColdBlocks) -> bool:
        leases: list[int] = []
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
            batch = self._batch(cold)
            acknowledged = await in_thread(self._store.append, batch)
        finally:
            with self._driver.turn() as now:
                self._core.release(self._session, [lease for lease in leases if lease], now)
        with self._driver.turn():
            self._core.mark_lower(batch.keys[acknowledged], True)
        self.demotions += int(acknowledged.sum())
        self._settle()
        return bool(acknowledged.any())

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

    # ------------------------------------------------------------ telling others

    def _settle(self) -> None:
        """Passes on what the store has gained and lost."""
        changes = self._store.take_changes()
        for change in changes.changes:
            keys = np.frombuffer(change.keys, dtype=np.uint8).reshape(-1, 16)
            self._core.mark_lower(keys, change.kind == 1)
        if changes.lost:
            self._mark_all()
        if self.announcer is None:
            return
        if changes.lost:
            self.announcer.lose()
        elif changes.changes:
            self.announcer.publish(changes.changes)

    def _mark_all(self) -> None:
        for listing in self._pages():
            self._core.mark_lower(listing.keys, True)

    def _pages(self) -> Iterator[SsdListing]:
        cursor: int | None = 0
        while cursor is not None:
            listing = self._store.list(cursor, LIST_PAGE)
            yield listing
            cursor = listing.next_cursor

    def _named(self, namespace_id: bytes, prefix: bytes) -> KeyArray:
        """Keys of objects of a namespace whose names begin so."""
        chosen: list[KeyArray] = [np.empty((0, 16), dtype=np.uint8)]
        for listing in self._pages():
            mine = listing.keys[self.contains(namespace_id, listing.keys)]
            names = self._store.describe_stored(mine).names
            chosen.append(mine[np.array([name.startswith(prefix) for name in names], dtype=np.bool_)])
        return np.concatenate(chosen)

    def snapshot(self) -> Snapshot:
        """All keys on the SSD, and the number of the last published batch that they include. For other threads."""
        return asyncio.run_coroutine_threadsafe(self._snapshot(), self._driver.loop).result(SNAPSHOT_TIMEOUT_S)

    async def _snapshot(self) -> Snapshot:
        self._settle()
        number = self.announcer.last_number if self.announcer is not None else 0
        held: list[tuple[KeyArray, Fidelity]] = []
        for listing in self._pages():
            held += [(listing.keys[listing.facts.fidelities == fidelity], fidelity) for fidelity in Fidelity]
        return held, number

    def usage(self) -> tuple[int, int]:
        """(bytes live, blocks), from any thread."""
        space = self._store.stats().space
        return space.bytes_live, space.records
