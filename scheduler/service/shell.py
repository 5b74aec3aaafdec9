"""The asyncio shell around the core: one thread, one clock, one entrance. Everything passes through `submit`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from kvpool.core.errors import Overloaded, Unavailable
from kvpool.core.ids import Role
from scheduler.core import checkpoint
from scheduler.core.commands import (
    AcknowledgeSource,
    ChangeRole,
    CloseStream,
    Command,
    Placed,
    PlacementEnded,
    Refused,
    RoleChanged,
    RoleChangeEnded,
    RoleProposed,
    StateChanged,
)
from scheduler.core.core import SchedulerCore
from scheduler.core.events import Event, PlaceCancelled, PlaceRequested, SourceDetached, TimePassed
from scheduler.service.journal import Journal

log = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 1.0
#: Requests that have come and were not looked at yet; one more is turned away.
TURNS_MAX = 8192


def monotonic_us() -> int:
    return time.monotonic_ns() // 1000


class LifeLine(Protocol):
    """The sending side of a stream that the core may answer on or end. No call blocks."""

    def acknowledge(self, seq: int, want_snapshot: bool) -> None: ...

    def change_role(self, role: Role) -> None: ...

    def close(self, reason: str) -> None: ...


class Shell:
    """Drives one core. Not thread-safe: all calls come from the loop that `start` was called in."""

    def __init__(
        self, core: SchedulerCore, journal: Journal | None = None, *, clock_us: Callable[[], int] = monotonic_us
    ) -> None:
        self.core = core
        self.journal = journal
        self._clock_us = clock_us
        self.started_us = clock_us()
        self._streams: dict[int, LifeLine] = {}
        #: Gateway and request -> who waits for the answer: as many as requests wait in the core.
        self._answers: dict[tuple[str, str], asyncio.Future[Placed | Refused]] = {}
        #: Requests are placed one at a time, and whatever else has come in has its turn before the next.
        self._turn = asyncio.Lock()
        self._turns_wanted = 0
        self._next_stream = 1
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_us = 0
        self._flusher: asyncio.Task[None] | None = None
        self._running = False
        #: Told of each event, and of what came of it, once it has been carried out.
        self.observers: list[Callable[[Event, list[Command]], None]] = []

    # ------------------------------------------------------------ life

    def start(self) -> None:
        if self.journal is not None:
            self.journal.begin(self.core)
            self._flusher = asyncio.create_task(self._flush_regularly(self.journal))
        self._running = True
        self._set_timer()

    async def stop(self) -> None:
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.gather(self._flusher, return_exceptions=True)
            self._flusher = None
        if self.journal is not None:
            self.journal.close()

    async def _flush_regularly(self, journal: Journal) -> None:
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_S)
            journal.flush()

    # ------------------------------------------------------------ the entrance

    def now_us(self) -> int:
        """The core's time: never before that of the last event."""
        return max(self._clock_us(), self.core.now_us)

    def submit(self, event: Event) -> list[Command]:
        """Journals an event, lets the core handle it, and does what it asks for."""
        now_us = self.now_us()
        if self.journal is None:
            commands = self.core.handle(event, now_us)
        else:
            self.journal.event(event, now_us)
            commands = self.core.handle(event, now_us)
            self.journal.commands(commands)
        for command in commands:
            self._carry_out(command)
        for observe in self.observers:
            observe(event, commands)
        self._set_timer()
        if self.journal is not None and self.journal.rotation_due():
            self._rotate(self.journal)
        return commands

    async def place(self, request: PlaceRequested) -> Placed | Refused:
        """The answer to a placement request, whenever the core gives it.

        If the caller is cancelled, so is the request, unless the same one has been asked for again meanwhile.

        Raises: Overloaded if it was asked for again, or too many have come at once; Unavailable if the scheduler stops.
        """
        owner = (request.gateway_id, request.request_id)
        before = self._answers.pop(owner, None)
        if before is not None and not before.done():
            before.set_exception(Overloaded("the same request was sent again", hint="use a new request id for each"))
        answer: asyncio.Future[Placed | Refused] = asyncio.get_running_loop().create_future()
        self._answers[owner] = answer
        try:
            await self._submit_in_turn(request, answer)
            return await answer
        finally:
            if self._answers.get(owner) is answer:
                del self._answers[owner]
                if not answer.done() or answer.cancelled():
                    self._cancel(owner)

    async def _submit_in_turn(self, request: PlaceRequested, answer: asyncio.Future[Placed | Refused]) -> None:
        """Lets life lines speak between two placements: a crowd that comes at once would keep them unheard."""
        if self._turns_wanted >= TURNS_MAX:
            raise Overloaded(f"{TURNS_MAX} requests wait to be looked at", hint="ask again in a second")
        self._turns_wanted += 1
        try:
            async with self._turn:
                await asyncio.sleep(0)
                if not answer.done():
                    self.submit(request)
        finally:
            self._turns_wanted -= 1

    def _cancel(self, owner: tuple[str, str]) -> None:
        if self._running:
            self.submit(PlaceCancelled(request_id=owner[1], gateway_id=owner[0]))

    def _answer(self, command: Placed | Refused) -> None:
        answer = self._answers.get((command.gateway_id, command.request_id))
        if answer is not None and not answer.done():
            answer.set_result(command)

    def _rotate(self, journal: Journal) -> None:
        """Begins a new journal file as soon as no source is half through a snapshot."""
        unsynced = checkpoint.unsynced_streams(self.core)
        if not unsynced:
            self.core = journal.next_file(self.core)
        elif journal.rotation_overdue():
            # They come again; the last of these ends has no unsynced source left and lands in the branch above.
            for stream in unsynced:
                line = self._streams.get(stream)
                if line is not None:
                    line.close("the journal needs a checkpoint")
                self.submit(SourceDetached(stream))

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, AcknowledgeSource):
            line = self._streams.get(command.stream)
            if line is not None:
                line.acknowledge(command.seq, command.want_snapshot)
        elif isinstance(command, CloseStream):
            line = self._streams.get(command.stream)
            if line is not None:
                line.close(command.reason)
        elif isinstance(command, StateChanged):
            log.info("%s %s is %s", command.kind, command.id, command.state)
        elif isinstance(command, RoleProposed):
            log.info("proposed: %s %s %s: %s", command.kind, command.instance_id, command.role.name, command.why)
        elif isinstance(command, ChangeRole | RoleChanged | RoleChangeEnded):
            self._role(command)
        elif isinstance(command, Placed):
            self._answer(command)
        elif isinstance(command, Refused):
            self._answer(command)
            log.info("request %s refused: %s: %s", command.request_id, command.reason.name, command.message)
        elif isinstance(command, PlacementEnded) and command.why == "expired":
            log.warning("the placement of request %s expired without an outcome", command.request_id)

    def _role(self, command: ChangeRole | RoleChanged | RoleChangeEnded) -> None:
        name, role = command.instance_id, command.role.name.lower()
        if isinstance(command, ChangeRole):
            log.info("instance %s is told to take role %s", name, role)
            line = self._streams.get(command.stream)
            if line is not None:
                line.change_role(command.role)
        elif isinstance(command, RoleChanged):
            log.info("instance %s has role %s, and had %s", name, role, command.was.name.lower())
        elif command.how != "done":
            log.warning("the change of instance %s to role %s has ended: %s", name, role, command.how)

    # ------------------------------------------------------------ streams

    def open_stream(self, line: LifeLine) -> int:
        """A number, never given twice, by which the core can speak on a life line."""
        stream = self._next_stream
        self._next_stream += 1
        self._streams[stream] = line
        return stream

    def close_stream(self, stream: int, ended: Event) -> None:
        """Forgets a life line and tells the core of its end."""
        del self._streams[stream]
        if self._running:
            self.submit(ended)

    def hang_up(self, reason: str) -> None:
        """Ends every life line from this side, and the wait of those who wait for a place."""
        for answer in list(self._answers.values()):
            if not answer.done():
                answer.set_exception(Unavailable(reason, hint="ask again, or another scheduler"))
        for line in self._streams.values():
            line.close(reason)

    @property
    def streams(self) -> int:
        return len(self._streams)

    # ------------------------------------------------------------ time

    def _set_timer(self) -> None:
        """One timer, for the core's next deadline. A later deadline leaves it: it fires early, once, and moves on."""
        if not self._running:
            return
        at_us = self.core.next_deadline_us()
        if at_us is None:
            return
        if self._timer is not None:
            if self._timer_at_us <= at_us:
                return
            self._timer.cancel()
        self._timer_at_us = at_us
        delay_s = max(at_us - self._clock_us(), 0) / 1e6
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        at_us = self.core.next_deadline_us()
        if at_us is not None and at_us <= self.now_us():
            self.submit(TimePassed())
        else:
            self._set_timer()
