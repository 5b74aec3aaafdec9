"""The SSD tier of a node: copies cold blocks down before they are evicted, brings wanted ones up again.

Decisions are the core's (what is cold) and the store's (what is where); this shell moves blocks between the two, in
threads, with a lease or a reservation of its own on whatever it touches. A block is *acknowledged* on the SSD when its
group commit has been synced; only then is it announced in tier SSD. What is removed is durably removed before the
caller hears of it.

No object is ever read with bytes older than the last acknowledged put or removal of its name. Two rules see to that:
a removal is acknowledged, and a name is given to a new put, only when no record of the name on disk can be read now or
after a crash (`make_way`, `holds`); and what is copied down is what memory has, or is taken back (`ssd_demotion`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import EntryState
from kvpool.core.errors import NoSsd, Overloaded
from kvpool.core.ids import KeyArray, Tier
from kvpool.core.namespace import SECTIONS_MAX
from kvpool.core.ssd.records import SsdFacts
from kvpool.service import ssd_listing
from kvpool.service.announcer import Announcer, Snapshot
from kvpool.service.lower_tier import Promoted
from kvpool.service.source_driver import SourceDriver
from kvpool.service.ssd_demotion import SsdDemotion
from kvpool.service.ssd_marks import SsdMarks
from kvpool.service.ssd_promotion import SsdPromotion
from kvpool.service.threads import in_thread
from kvpool.tiers.ssd.daemon_threads import DaemonThreads
from kvpool.tiers.ssd.store import SsdStore
from kvpool.v1 import block_source_pb2 as pb

log = logging.getLogger(__name__)

#: Reads of the store at a time; others wait. A disk that hangs takes these threads, and none of the node's other ones.
THREADS = 16
#: Changes of the store come one at a time; one more thread is there for closing it.
CHANGE_THREADS = 2
#: Listings at a time: the names of objects are read from the disk. One more is refused.
LISTINGS_MAX = 4
#: How long a removal waits for what is being written or read.
BUSY_S = 30.0
#: How long `close` waits for the disk.
CLOSE_S = 20.0
MARK_PAGE = 8192
VERIFY_PAGE = 64
SNAPSHOT_TIMEOUT_S = 30.0


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
        self._store, self._driver, self._core = store, driver, driver.core
        with driver.turn() as now:
            session = self._session = self._core.open_session("ssd tier", now)
            self._core.set_lower_tier(True)
        self._threads = DaemonThreads(THREADS, "ssd-tier")
        # Of their own, so that changes don't wait for reads that hang: a failing disk may well be written.
        self._change_threads = DaemonThreads(CHANGE_THREADS, "ssd-tier-change")
        # One change of the store at a time: what is being written down can't be removed behind its back.
        self._changing = asyncio.Lock()
        self._marks = SsdMarks(store, self._core)
        self._up = SsdPromotion(store, driver, data, session, self._marks, self._threads)
        self._down = SsdDemotion(
            store, driver, data, session, self._marks, self._change_threads, self._changing, demote_from
        )  # fmt: skip
        self._demoting: asyncio.Task[None] | None = None
        self._listings = 0
        #: After `close`: reads that did not end, and so may still write into memory.
        self.left_behind = False

    @property
    def announcer(self) -> Announcer | None:
        return self._marks.announcer

    @announcer.setter
    def announcer(self, announcer: Announcer) -> None:
        self._marks.announcer = announcer

    async def startup(self) -> None:
        """Brings memory and disk together, before anybody is served. Raises: NoSsd if the disk can't note it.

        What this node took over from its predecessor may be on the disk already. Where both have an object and they
        differ, memory is newer: the disk was out of reach when the object was removed and put again.
        """
        try:
            await self._forget_older_objects()
        except BaseException:
            with self._driver.turn() as now:
                self._core.set_lower_tier(False)
                self._core.close_session(self._session, now, writer_gone=True)
            raise
        blocks = self._core.index.key_array(self._readable(named=False))
        for first in range(0, len(blocks), MARK_PAGE):
            self._marks.mark(blocks[first : first + MARK_PAGE])
            await asyncio.sleep(0)

    async def _forget_older_objects(self) -> None:
        """Marks objects that memory and disk have alike, and removes from the disk what differs. Raises: NoSsd."""
        arrays, objects = self._core.arrays, self._readable(named=True)
        keys = self._core.index.key_array(objects)
        there = self._store.contains(keys) | self._store.undead(keys).present
        stored = await in_thread(self._store.describe_stored, keys, threads=self._threads)
        used = np.arange(SECTIONS_MAX) < arrays.section_counts[objects, None]
        equal = stored.facts.present & (stored.facts.sizes == arrays.sizes[objects])
        equal &= ((stored.digests == arrays.digests[objects]) | ~used).all(axis=1)
        older = keys[there & ~equal]
        if len(older) and not (await in_thread(self._store.remove, older, threads=self._change_threads)).all():
            raise NoSsd("older versions of objects could not be removed from the SSD", hint="can its disk be written?")
        self._marks.mark(keys[equal])

    def _readable(self, *, named: bool) -> NDArray[np.int32]:
        arrays = self._core.arrays
        return np.flatnonzero((arrays.states == EntryState.READABLE) & ((arrays.name_bytes > 0) == named)).astype(
            np.int32
        )

    # ------------------------------------------------------------ what the node asks

    @property
    def bytes_total(self) -> int:
        return self._store.stats().space.bytes_total

    def start(self) -> None:
        """Begins to copy cold blocks down."""
        self._demoting = asyncio.get_running_loop().create_task(self._down.run())

    def wake(self) -> None:
        """Memory has got more; cheap."""
        self._down.wake()

    async def close(self, *, timeout_s: float = CLOSE_S) -> None:
        """Ends all work; what was not acknowledged is as if it never was written. A disk that hangs is left alone."""
        reading = set(self._up.tasks)
        tasks = [*reading, *([self._demoting] if self._demoting else [])]
        for task in tasks:
            task.cancel()
        late = (await asyncio.wait(tasks, timeout=timeout_s))[1] if tasks else set()
        ended = not late
        self.left_behind = bool(late & reading)
        if ended:
            closing = asyncio.wrap_future(self._change_threads.submit(self._store.close, timeout_s=timeout_s))
            closing.add_done_callback(lambda done: None if done.cancelled() else done.exception())
            await asyncio.wait({closing}, timeout=2 * timeout_s)
            ended = closing.done() and closing.exception() is None and closing.result()
        if not ended:
            # First: nobody may begin a call that nobody would end.
            self._shutdown_threads()
            left = sum(
                threads.abandon(NoSsd("the SSD does not answer")) for threads in (self._threads, self._change_threads)
            )
            log.error("the SSD does not answer: the node ends without it, with %d calls under way", left)
            await asyncio.gather(*tasks, return_exceptions=True)
        self._shutdown_threads()

    def _shutdown_threads(self) -> None:
        for threads in (self._threads, self._change_threads):
            threads.shutdown(wait=False)

    def contains(self, namespace_id: bytes, keys: KeyArray) -> NDArray[np.bool_]:
        """Which keys can be read from the SSD in this namespace."""
        return _of_namespace(self._store.describe(keys), namespace_id)

    # ------------------------------------------------------------ objects: one name, one content

    def check_objects(self) -> None:
        """Raises: NoSsd while nobody knows what is on the disk: an object there might come back, and be older."""
        if self._store.unsure:
            raise NoSsd(f"objects can't be changed: {self._store.unsure}", hint="look after the disk, then restart")

    def holds(self, namespace_id: bytes, keys: KeyArray) -> NDArray[np.bool_]:
        """Objects that are on the SSD, or may be found there after a crash: their names are taken. bool (n)."""
        return self.contains(namespace_id, keys) | self._store.undead(keys).present | self._down.is_going_down(keys)

    async def make_way(self, keys: KeyArray) -> None:
        """Before objects are put: of what can't be read under their names, nothing will come back either.

        Raises: NoSsd if that can't be had now.
        """
        self.check_objects()
        if not self._store.undead(keys).present.any():
            return
        async with self._alone():
            undead = keys[self._store.undead(keys).present]
            gone = await in_thread(self._store.remove, undead, threads=self._change_threads)
            self._marks.settle()
        if not gone.all():
            raise NoSsd(
                "older objects of these names can't be removed from the SSD",
                hint="see the SSD in kvctl nodes and the node's log: its disk is failing",
            )

    # ------------------------------------------------------------ up, and away

    async def promote(self, namespace_id: bytes, keys: KeyArray, timeout_s: float) -> Promoted:
        return await self._up.bring(namespace_id, keys, timeout_s)

    async def remove(
        self, namespace_id: bytes, keys: KeyArray | None, name_prefix: bytes, remove_above: Callable[[], int]
    ) -> int:
        """Removes keys, or with None all of a namespace whose names begin so, from the SSD and then from memory.

        Returns once it is durable. `remove_above` removes from memory, and says how many blocks were there.
        Raises: KvpoolError if it can't be made durable now; memory is left as it is.
        """
        # Nothing is on its way up: it would be back after it was removed.
        async with self._alone(), self._up.kept_out(BUSY_S):
            below = await in_thread(self._remove_below, namespace_id, keys, name_prefix, threads=self._change_threads)
            self._marks.settle()
            return max(below, remove_above())

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Nobody else changes the store. Raises: NoSsd if what is being written does not end in time."""
        try:
            async with asyncio.timeout(BUSY_S):
                await self._changing.acquire()
        except TimeoutError:
            raise NoSsd(f"writes to the SSD do not end within {BUSY_S:.0f} s", hint="its disk hangs") from None
        try:
            yield
        finally:
            self._changing.release()

    def _remove_below(self, namespace_id: bytes, keys: KeyArray | None, name_prefix: bytes) -> int:
        """In a thread. Returns how many could be read. Raises: NoSsd."""
        if keys is None and not name_prefix:
            removed = self._store.remove_namespace(namespace_id)
        elif keys is None:
            named = self._named(namespace_id, name_prefix)
            # Nobody can read the names of those that are lost; they are no loss.
            removed = self._bury(np.concatenate([named, self._store.lost_objects(namespace_id)]), len(named))
        else:
            mine = self.contains(namespace_id, keys)
            # After a crash these would be back.
            undead = _of_namespace(self._store.undead(keys), namespace_id)
            removed = self._bury(keys[mine | undead], int(mine.sum()))
        if removed is None:
            raise NoSsd(
                "the removal could not be noted on the SSD",
                hint="see the SSD in kvctl nodes and the node's log: its disk is failing",
            )
        return removed

    def _bury(self, keys: KeyArray, readable: int) -> int | None:
        if self._store.unsure:
            # What the store does not know of may be there all the same.
            return None
        return readable if not len(keys) or self._store.remove(keys).all() else None

    def _named(self, namespace_id: bytes, prefix: bytes) -> KeyArray:
        """Keys of objects of a namespace whose names begin so. In a thread."""
        chosen: list[KeyArray] = [np.empty((0, 16), dtype=np.uint8)]
        for listing in self._marks.pages():
            mine = listing.keys[self.contains(namespace_id, listing.keys)]
            names = self._store.describe_stored(mine).names
            chosen.append(mine[np.array([name.startswith(prefix) for name in names], dtype=np.bool_)])
        return np.concatenate(chosen)

    # ------------------------------------------------------------ what others see

    async def list_alone(self, request: pb.ListBlocksRequest, limit: int) -> pb.ListBlocksReply:
        """A page of what lies here and not in memory. Raises: Overloaded."""
        if self._listings >= LISTINGS_MAX:
            raise Overloaded(f"{self._listings} listings of the SSD are under way", hint="try again; its disk may hang")
        self._listings += 1
        try:
            keys, stored, following = await in_thread(
                ssd_listing.read_page, self._store, request, limit, threads=self._threads
            )
        finally:
            self._listings -= 1
        blocks = ssd_listing.infos_of(self._core, keys, stored)
        return pb.ListBlocksReply(blocks=blocks, next_cursor=following)

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
            bytes_dead=space.bytes_dead, bytes_free=space.bytes_free, records=space.records, hits=self._up.blocks,
            demotions=self._down.blocks, evictions=counters.evicted, io_errors=counters.io_errors,
            digest_errors=counters.digest_errors, recovery_s=counters.recovery_s,
            recovered_bytes=counters.recovered_bytes, evictions_unsaved=self._core.store.evictions_unsaved,
        )  # fmt: skip

    def snapshot(self) -> Snapshot:
        """All keys on the SSD, and the number of the last published batch that they include. For other threads."""
        number = asyncio.run_coroutine_threadsafe(self._settled(), self._driver.loop).result(SNAPSHOT_TIMEOUT_S)
        return self._marks.held(), number

    async def _settled(self) -> int:
        """Number of the last published batch; what the store gains and loses from now on comes after it."""
        self._marks.settle()
        return self._marks.announcer.last_number if self._marks.announcer is not None else 0

    def usage(self) -> tuple[int, int]:
        """(bytes live, blocks), from any thread."""
        space = self._store.stats().space
        return space.bytes_live, space.records


def _of_namespace(facts: SsdFacts, namespace_id: bytes) -> NDArray[np.bool_]:
    """Which present keys are of a namespace; a block's key may stand in another one, whose block is not meant."""
    mine: NDArray[np.bool_] = (facts.namespace_ids == np.frombuffer(namespace_id, dtype=np.uint8)).all(axis=1)
    return facts.present & mine
