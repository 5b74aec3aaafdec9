"""Sessions of a source's clients: who may write how, and what happens to what they held when they are gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvpool.core.errors import DeadlineExceeded, Overloaded, UnknownSession
from kvpool.core.ids import SessionId
from kvpool.service.grants import Grants
from kvpool.service.source_driver import SourceDriver
from kvpool.service.writer_lock import WriterProof, WriterTable

log = logging.getLogger(__name__)

#: Data threads end within this once their connections are shut down.
DRAIN_TIMEOUT_S = 5.0
#: How often the locks of writers that have not proven to be gone are tried.
PROOF_INTERVAL_S = 0.25
#: Calls of one session that wait: for keys, or for blocks to come up from a lower tier. One more is refused.
WAITING_CALLS_MAX = 256
#: Ended sessions whose writers may still live; more than these, and no new session is opened.
ORPHANS_MAX = 1024


@dataclass
class Session:
    """What the shell knows of a live session."""

    id: SessionId
    client: str
    host_id: str
    proof: WriterProof | None  # None: it may not write shared memory
    place: int | None = None  # in the table of writers
    waiting_calls: int = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a call that may wait for long. Raises: Overloaded at the bound of a session."""
        if self.waiting_calls >= WAITING_CALLS_MAX:
            raise Overloaded(
                f"{WAITING_CALLS_MAX} calls of this session are waiting already", hint="ask for more keys in one call"
            )
        self.waiting_calls += 1
        try:
            yield
        finally:
            self.waiting_calls -= 1


@dataclass
class _Orphan:
    """An ended session with quarantined slots."""

    proof: WriterProof | None
    place: int | None
    reservations: list[int]


class DataServer(Protocol):
    """A server of data channels: ends the connections of a session when told."""

    def close_session(self, session: int) -> None: ...


class Sessions:
    """Opens and ends sessions in the core, the grants and the data server, in the order that keeps slots safe."""

    def __init__(
        self, driver: SourceDriver, grants: Grants, data_servers: Sequence[DataServer], writers: WriterTable
    ) -> None:
        self._driver, self._grants, self._data_servers, self._writers = driver, grants, data_servers, writers
        self._live: dict[SessionId, Session] = {}
        self._orphans: dict[SessionId, _Orphan] = {}
        self._ends: set[asyncio.Task[None]] = set()
        self._closing = False
        self._adopting = asyncio.get_running_loop().create_task(self._adopt_orphans())

    def open(self, client: str, host_id: str, writer_lock: str) -> Session:
        """Raises: Overloaded at the bound of sessions."""
        if self._closing or len(self._orphans) >= ORPHANS_MAX:
            raise Overloaded("no session can be opened now", hint="try again shortly")
        proof = WriterProof.open(writer_lock) if writer_lock else None
        place = self._writers.note(writer_lock) if proof is not None else None
        if proof is not None and place is None:
            proof.close()
            proof = None
        try:
            with self._driver.turn() as now:
                session_id = self._driver.core.open_session(client, now)
        except BaseException:
            if proof is not None and place is not None:
                proof.close()
                self._writers.strike(place)
            raise
        self._grants.open_session(session_id)
        session = self._live[session_id] = Session(session_id, client, host_id, proof, place)
        log.info("session %d of %s opened%s", session_id, client, "" if proof else " (writes over tcp only)")
        return session

    def get(self, session_id: int) -> Session:
        """Raises: UnknownSession."""
        session = self._live.get(SessionId(session_id))
        if session is None:
            raise UnknownSession(f"no session {session_id}", hint="it ended, or the source restarted: open another")
        return session

    def pinged(self, session: Session, seen: int, writing: Sequence[int]) -> None:
        """Hears a ping; frees expired reservations that the client, as it says, is not writing any more.

        Args: see `SourceCore.written_no_more`. Raises: UnknownSession, BadArgument.
        """
        with self._driver.turn() as now:
            for reservation in self._driver.core.written_no_more(session.id, seen, frozenset(writing)):
                # A data thread that is still at it: the next ping looks again.
                if not self._grants.busy([reservation]):
                    self._driver.core.abort(session.id, reservation, now)

    def end_soon(self, session: Session, why: str) -> None:
        """Ends a session; what it holds is freed as soon as that is safe. Calls in its name fail from now on."""
        if self._live.pop(session.id, None) is not None:
            log.info("session %d of %s ended: %s", session.id, session.client, why)
            self._spawn(self._end(session))

    async def revoke_writes(self, session: Session, reservation: int) -> None:
        """Returns once no data thread can write into the reservation any more. Raises: DeadlineExceeded."""
        self._grants.revoke_write(session.id, reservation)
        if not await self._drained([reservation]):
            raise DeadlineExceeded("a write into this reservation is still under way")

    async def close(self) -> None:
        """Ends all sessions."""
        self._closing = True
        for session in list(self._live.values()):
            self.end_soon(session, "the source stops")
        if self._ends:
            await asyncio.wait(self._ends, timeout=DRAIN_TIMEOUT_S)
        tasks = [self._adopting, *self._ends]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for orphan in self._orphans.values():
            if orphan.proof is not None:
                orphan.proof.close()

    async def _end(self, session: Session) -> None:
        self._driver.end_waits(session.id)
        reservations = self._grants.close_session(session.id)
        gone = False
        try:
            for server in self._data_servers:
                server.close_session(session.id)
            drained = await self._drained(reservations)
            gone = drained and (session.proof is None or session.proof.gone())
        except Exception:
            log.exception("session %d: its writes could not be ended; its slots wait", session.id)
        finally:
            with self._driver.turn() as now:
                self._driver.core.close_session(session.id, now, writer_gone=gone)
        if not gone:
            self._orphans[session.id] = _Orphan(session.proof, session.place, reservations)
        elif session.place is not None:
            self._writers.strike(session.place)

    async def _drained(self, reservations: list[int]) -> bool:
        if not self._grants.busy(reservations):
            return True
        return await asyncio.to_thread(self._grants.wait_idle, reservations, DRAIN_TIMEOUT_S)

    async def _adopt_orphans(self) -> None:
        """Frees the slots of ended sessions once their writers have proven to be gone."""
        self._inherited = True
        while True:
            try:
                self._adopt_once()
            except Exception:
                # A file system that fails now must not keep slots back for good.
                log.exception("looking for writers that are gone failed; it is tried again")
            await asyncio.sleep(PROOF_INTERVAL_S)

    def _adopt_once(self) -> None:
        if self._inherited and self._writers.all_inherited_gone():
            self._inherited = False
            with self._driver.turn() as now:
                freed = self._driver.core.release_inherited(now)
            if freed:
                log.info("the writers of the process before are gone, their %d slots are free again", freed)
        for session_id, orphan in list(self._orphans.items()):
            if self._grants.busy(orphan.reservations) or not (orphan.proof is None or orphan.proof.gone()):
                continue
            del self._orphans[session_id]
            if orphan.place is not None:
                self._writers.strike(orphan.place)
            log.info("session %d: its writer is gone, its slots are free again", session_id)
            with self._driver.turn() as now:
                self._driver.core.writer_gone(session_id, now)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
