"""Drives one SourceCore in the event loop; wake-ups, announcements and the rights of data threads follow each call.

Everything here runs in one thread, the loop's; no lock is needed and none is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

from kvpool.core.errors import UnknownSession
from kvpool.core.ids import SessionId, WaitId
from kvpool.core.source import SourceCore
from kvpool.core.waits import Wakeup
from kvpool.service.announcer import Announcer, Snapshot
from kvpool.service.grants import Grants, now_us

log = logging.getLogger(__name__)

SNAPSHOT_TIMEOUT_S = 10.0
TICK_INTERVAL_S = 1.0


class Waiter:
    """Wake-ups of one wait that its stream has not taken yet: at most one a key and section, so bounded."""

    def __init__(self, session: SessionId) -> None:
        self.session = session
        self.ended = False
        self.pending: list[Wakeup] = []
        self.changed = asyncio.Event()

    async def take(self) -> list[Wakeup]:
        """The next wake-ups, at least one. Raises: UnknownSession once the session has ended."""
        await self.changed.wait()
        if self.ended:
            raise UnknownSession(f"session {self.session} has ended, and its waits with it")
        self.changed.clear()
        taken, self.pending = self.pending, []
        return taken


class SourceDriver:
    """Calls the core inside `turn`, which carries out what the call asks for."""

    def __init__(
        self, core: SourceCore, grants: Grants, write_catalog: Callable[[bytes], None] = lambda _: None
    ) -> None:
        self.core, self.grants = core, grants
        self._write_catalog = write_catalog
        self.announcer: Announcer | None = None
        #: Raises NoSsd while an object that is changed now might come back later as it was. Whoever serves the source
        #: knows what it has below, and sets it; any thread may ask.
        self.check_objects: Callable[[], None] = lambda: None
        self._waiters: dict[WaitId, Waiter] = {}
        self.loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_us = 0
        self._usage = (0, 0)
        self._set_timer()

    @contextlib.contextmanager
    def turn(self) -> Iterator[int]:
        """The time for one call of the core; afterwards, also of a call that raised, its effects are carried out."""
        now = now_us()
        try:
            yield now
        finally:
            self._settle()

    def save_catalog(self) -> None:
        """Writes down what the numbers in the index stand for, inside the turn that added one. Raises: Overloaded."""
        if self.core.catalog_changed:
            self._write_catalog(self.core.catalog().to_bytes())
            self.core.catalog_changed = False

    def wait_begun(self, wait: WaitId, session: SessionId) -> Waiter:
        """Registers a wait inside the turn that began it."""
        self._waiters[wait] = Waiter(session)
        return self._waiters[wait]

    def wait_ended(self, wait: WaitId) -> None:
        self._waiters.pop(wait, None)

    def end_waits(self, session: SessionId) -> None:
        """The core forgets the waits of a session that ends; this tells their streams."""
        for waiter in self._waiters.values():
            if waiter.session == session:
                waiter.ended = True
                waiter.changed.set()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _settle(self) -> None:
        for wakeup in self.core.take_wakeups():
            waiter = self._waiters.get(wakeup.wait)
            if waiter is not None:
                waiter.pending.append(wakeup)
                waiter.changed.set()
        events = self.core.take_changes()
        if events and self.announcer is not None:
            self.announcer.publish(events)
        self._set_timer()

    def _set_timer(self) -> None:
        # At least once an interval, for the watermark and for what heartbeats report.
        idle_us = now_us() + int(TICK_INTERVAL_S * 1e6)
        deadline = min(self.core.next_deadline_us() or idle_us, idle_us)
        if self._timer is not None:
            if self._timer_us <= deadline:
                return
            self._timer.cancel()
        self._timer_us = deadline
        self._timer = self.loop.call_later(max(0, deadline - now_us()) / 1e6, self._tick)

    def _tick(self) -> None:
        self._timer = None
        with self.turn() as now:
            # Rights of data threads end before the core may give their slots to somebody else.
            self.grants.expire(now)
            self.core.tick(now)
        counts = self.core.counts()
        self._usage = (counts.bytes_used, counts.blocks)

    # ------------------------------------------------------------ for the announcer's thread

    def snapshot(self) -> Snapshot:
        """All keys held, and the number of the last published batch that they include. For other threads."""
        return asyncio.run_coroutine_threadsafe(self._snapshot(), self.loop).result(SNAPSHOT_TIMEOUT_S)

    async def _snapshot(self) -> Snapshot:
        number = self.announcer.last_number if self.announcer is not None else 0
        return self.core.snapshot_keys(), number

    def usage(self) -> tuple[int, int]:
        """(bytes used, blocks readable) of a moment ago. From any thread, and at once: heartbeats depend on it."""
        return self._usage
