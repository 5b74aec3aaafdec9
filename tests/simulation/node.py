"""A node: the real core, driver, sessions, grants, SSD tier and servicer in a process that can be killed anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpool.core.arrays import EntryState, SourceArrays
from kvpool.core.catalog import Catalog
from kvpool.core.errors import BadArgument, KvpoolError, NoSsd
from kvpool.core.ids import Tier
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore
from kvpool.service.announcer import SourceFacts
from kvpool.service.block_source import BlockSourceServicer
from kvpool.service.grants import Grants
from kvpool.service.sessions import Session, Sessions
from kvpool.service.source_driver import SourceDriver
from kvpool.service.ssd_tier import SsdTier
from kvpool.tiers.ssd.store import SsdStore
from tests.simulation import disk
from tests.simulation.auditor import Removal, Violation
from tests.simulation.content import IDS, SPECS
from tests.simulation.lifeline import LifeLine
from tests.simulation.loop import LIFE, Killed, Life
from tests.simulation.memory import Memory, Table
from tests.ssd.crash_files import CrashFiles

if TYPE_CHECKING:
    from tests.simulation.world import World


def _at_once(coroutine: Any) -> None:
    """Runs a coroutine that waits for nobody."""
    with contextlib.suppress(StopIteration):
        while True:
            coroutine.send(None)


class Connection:
    """Stands for a connection of a data channel that a thread of the node serves."""

    def __init__(self, session: int) -> None:
        self.session, self.interrupted = session, False

    def interrupt(self) -> None:
        self.interrupted = True


class DataServer:
    """Knows who writes over connections."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []

    def close_session(self, session: int) -> None:
        for connection in self.connections:
            if connection.session == session:
                connection.interrupt()


class Driver(SourceDriver):
    """The real driver; a turn may be the process's last, at any line of the core."""

    def __init__(self, node: Node, core: SourceCore, grants: Grants, memory: Memory) -> None:
        self._node, self._memory, self.lines_left = node, memory, 0
        super().__init__(core, grants, memory.write_catalog)

    @contextlib.contextmanager
    def turn(self) -> Iterator[int]:
        life = self._node.life
        if life is None or LIFE.get() is not life:
            raise Killed
        if not self.lines_left:
            with super().turn() as now:
                yield now
            self._node.after_turn()
            return
        try:
            with super().turn() as now, self._killed_after():
                yield now
            self._node.after_turn()
        except Killed:
            self._memory.put_back(self._image)
            self._node.kill("in the middle of a call")
            raise

    @contextlib.contextmanager
    def _killed_after(self) -> Iterator[None]:
        """Raises Killed after so many lines of the core in this turn, and keeps the memory as it then was."""

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            if "/kvpool/core/" not in frame.f_code.co_filename:
                return None
            if event == "line":
                self.lines_left -= 1
                if self.lines_left == 0:
                    self._image = self._memory.image()
                    sys.settrace(None)
                    raise Killed
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)
            self.lines_left = 0


class DrainableGrants(Grants):
    """The real grants, whose data threads are tasks here."""

    async def drained(self, reservations: list[int], timeout_s: float) -> bool:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while self.busy(reservations) and loop.time() < end_s:  # noqa: ASYNC110 - threads tell nobody
            await asyncio.sleep(0.01)
        return not self.busy(reservations)

    def wait_idle(self, reservations: Any, timeout_s: float) -> Any:
        """A coroutine, for the `to_thread` of the simulation."""
        return self.drained(reservations, timeout_s)


class Node:
    """A source by name. `life` None: it is down. What outlives a process: `memory` and `files`."""

    _epochs = itertools.count(1)

    def __init__(self, world: World, name: str, *, pages: int, entries: int, eviction: str, ssd_segments: int) -> None:
        self.world, self.name = world, name
        self.config = SourceConfig(
            capacity_bytes=pages * 4096, entries_max=entries, eviction=eviction, unit_bytes=4096,
            high_watermark=0.95, low_watermark=0.75,
        )  # fmt: skip
        self.ssd_segments = ssd_segments
        self.memory: Memory | None = None
        self.files = CrashFiles(direct=False)
        self.life: Life | None = None
        self.crashes = 0
        #: Whether bits of its disk ever changed, or of its memory, which may have been copied to the disk as they were.
        self.harmed = False
        #: What was asked to be removed, and numbers of items that may be replaced in place.
        self.removals: list[Removal] = []
        self.replaced: dict[int, None] = {}
        #: While it starts, nothing else happens.
        self.starting = False
        #: Whether calls of its disk ever failed.
        self.disk_failed = False
        #: Whether it has run without its disk since that was last open.
        self.disk_away = False
        #: Keys on the SSD when the last process died.
        self._durable: frozenset[bytes] = frozenset()

    @property
    def alive(self) -> bool:
        return self.life is not None

    # ------------------------------------------------------------ starting

    def start(self) -> None:
        """A new process, which takes over what it finds."""
        assert self.life is None
        life = self.life = Life(self.world.loop, self)
        try:
            life.context.run(self._build)
        except BaseException:
            # Half of it is still its predecessor's: nobody may be served by that.
            self.life = None
            life.kill()
            raise

    def _build(self) -> None:
        world = self.world
        core = self._open_core()
        memory = self.memory
        assert memory is not None
        self.core, self.epoch = core, next(self._epochs)
        writers = Table(memory, world.locks)
        self.grants = DrainableGrants(world.loop.now_us)
        self.driver = Driver(self, core, self.grants, memory)
        with self.driver.turn():
            for spec in SPECS:
                core.register_namespace(spec)
            core.catalog_changed = True
            self.driver.save_catalog()
        self.numbers = [core.namespace_number(namespace_id) for namespace_id in IDS]
        self.tier: SsdTier | None = None
        self.store: SsdStore | None = None
        ssd_failure = self._open_ssd(memory) if self.ssd_segments else ""
        self.data_server = DataServer()
        self.sessions = Sessions(self.driver, self.grants, [self.data_server], writers)
        facts = SourceFacts(self.name, self.epoch, Tier.DRAM)
        self.servicer = BlockSourceServicer(
            self.driver, self.sessions, self.grants, memory.data, facts, [], 1.0, self.tier, ssd_failure
        )
        self.driver.announcer = LifeLine(world, self, self.name, Tier.DRAM, self.core.snapshot_keys)  # type: ignore[assignment]
        if self.tier is not None:
            self.tier.announcer = LifeLine(world, self, f"{self.name}.ssd", Tier.SSD, self._on_ssd)  # type: ignore[assignment]
            self.tier.start()

    def _open_ssd(self, memory: Memory) -> str:
        """Why there is no SSD tier in this process; empty: there is."""
        self.starting = True
        try:
            store = self._open_store()
            tier = SsdTier(store, self.driver, memory.data, demote_from=self.world.rng.choice((0.0, 0.0, 0.4)))
            _at_once(tier.startup())
        except NoSsd as error:
            self.world.note(f"{self.name} runs without its SSD: {error}")
            self.world.count("starts without the SSD")
            self.disk_away = True
            return str(error)
        finally:
            self.starting = False
        self.tier, self.store = tier, store
        if self.disk_away or store.stats().counters.recovery_damaged:
            self.world.auditor.blocks_may_be_back(self.name)
        self.disk_away = False
        return ""

    def _open_store(self) -> SsdStore:
        fails = any(self.files.faults.values())
        store = disk.open_store(self.files, self.ssd_segments)
        missing = self._durable - disk.listed(store)
        if missing and not self.harmed and not fails:
            raise Violation(f"{self.name}: {len(missing)} keys that the SSD had acknowledged are lost")
        return store

    def _on_ssd(self) -> Any:
        assert self.tier is not None
        self.tier._marks.settle()
        return self.tier._marks.held()

    def _open_core(self) -> SourceCore:
        entries = self.config.entries_max
        if self.memory is not None:
            memory = self.memory
            try:
                catalog = Catalog.from_bytes(memory.catalog)
                arrays = SourceArrays.over(memory.index, entries, fresh=False, touches=memory.touches)
                return SourceCore.adopt(self.config, arrays, memory.data, catalog)
            except BadArgument as error:
                raise Violation(f"{self.name} can't take its memory over: {error}") from error
        self.memory = Memory(self.config.capacity_bytes, entries)
        arrays = SourceArrays.over(self.memory.index, entries, fresh=True, touches=self.memory.touches)
        return SourceCore(self.config, arrays, self.memory.data)

    # ------------------------------------------------------------ dying

    def kill(self, why: str) -> None:
        """kill -9, now. The memory and what was written to files stay."""
        life = self.life
        if life is None:
            return
        self.world.note(f"{self.name} is killed {why}")
        self.life = None
        self.crashes += 1
        life.kill()
        for grant, memory in life.grants.items():
            self.world.auditor.stopped(memory, grant)
        self.world.node_died(self, life)
        if self.ssd_segments and self.store is not None:
            cut_off = self.files.steps == 0
            self._durable = frozenset() if cut_off else disk.listed(self.store)
            # A write under way may have come through in part, and the next one never begins.
            # Unsynced ones are seen by the next process, and may still be lost with the host.
            faults, self.files = self.files.faults, self.files.after_kill()
            self.files.direct, self.files.faults = False, faults

    def reboot(self) -> None:
        """The host loses power: memory is gone, and of unsynced writes chance keeps what it wants."""
        files = self.files
        self.kill("with its host")
        self.memory = None
        if self.ssd_segments:
            self.files = files.after_crash(self.world.numbers)

    # ------------------------------------------------------------ calls

    async def serve(self, method: str, request: Any) -> Any:
        """In this process: one call of the servicer, and what must hold around it. Raises: KvpoolError."""
        if method != "Reserve":
            return await getattr(self.servicer, method)(request, None)
        before = {(quota.namespace_id, quota.tenant): quota for quota in self.core.quotas()}
        try:
            return await self.servicer.Reserve(request, None)
        finally:
            for quota in self.core.quotas():
                # Another call may have set it, or changed it, while this one waited for the disk.
                was = before.get((quota.namespace_id, quota.tenant), quota)
                if was.bytes_used < quota.bytes_used > max(quota.bytes_max, was.bytes_max):
                    raise Violation(f"{quota.bytes_used} bytes for a quota of {quota.bytes_max} bytes")

    def now_or_never(self, act: Callable[[int], Any]) -> Any:
        """One turn of the core, as an operator's call. None if the node is down, or refuses."""
        if self.life is None:
            return None

        def turn() -> Any:
            with self.driver.turn() as now:
                result = act(now)
                self.driver.save_catalog()
                return result

        try:
            return self.life.context.run(turn)
        except (KvpoolError, Killed):
            return None

    def end_session(self, session: Session, why: str) -> None:
        """As the stream of a session does when it ends; of no effect if another process serves by now."""
        if self.holds_session(session):
            assert self.life is not None
            self.life.context.run(self.sessions.end_soon, session, why)

    def holds_session(self, session: Session) -> bool:
        return self.life is not None and self.sessions._live.get(session.id) is session

    # ------------------------------------------------------------ checks

    def after_turn(self) -> None:
        world = self.world
        world.turns += 1
        if world.check_every and world.turns % world.check_every == 0:
            self.core.check_invariants()

    def readable(self) -> np.ndarray[Any, Any]:
        return np.flatnonzero(self.core.arrays.states == EntryState.READABLE)
