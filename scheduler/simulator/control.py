"""The scheduler of a simulation: the production core, fed with events, and its commands carried out. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from kvpool.core.ids import Role
from scheduler.core.commands import (
    AcknowledgeSource,
    ChangeRole,
    CloseStream,
    Command,
    Placed,
    PlacementEnded,
    Refused,
    RoleChanged,
    StateChanged,
)
from scheduler.core.core import SchedulerCore
from scheduler.core.events import Event
from scheduler.simulator.clock import EventLog, EventQueue
from scheduler.simulator.lines import LifeLine, SourceLine


class Answers(Protocol):
    """Who asked for placements."""

    def placed(self, placed: Placed) -> None: ...

    def refused(self, refused: Refused) -> None: ...


class Ordered(Protocol):
    """A life line of somebody who takes roles."""

    def order(self, stream: int, role: Role) -> None: ...


class Control:
    """Feeds the core. An answer may come with any event, not only with its own."""

    def __init__(self, queue: EventQueue, log: EventLog, core: SchedulerCore, rpc_us: int) -> None:
        self.core = core
        self.answers: Answers | None = None
        #: After each event, in tests.
        self.after_event: Callable[[], None] | None = None
        self.events = 0
        self.commands_unknown = 0
        self._queue, self._log, self._rpc_us = queue, log, rpc_us
        self._lines: dict[int, LifeLine] = {}
        self._streams = 0
        self._tick_us: int | None = None

    def open_stream(self, line: LifeLine) -> int:
        self._streams += 1
        self._lines[self._streams] = line
        return self._streams

    def deliver(self, event: Event) -> None:
        """An event arrives now."""
        self.events += 1
        self._carry_out(self.core.handle(event, self._queue.now_us))

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            act = _ACTS.get(type(command))
            if act is None:
                self.commands_unknown += 1
            else:
                act(self, command)
        due_us = self.core.next_deadline_us()
        if due_us is not None and (self._tick_us is None or due_us < self._tick_us):
            self._tick_us = max(due_us, self._queue.now_us)
            self._queue.at(self._tick_us, self._tick, self._tick_us)
        if self.after_event is not None:
            self.after_event()

    def _tick(self, due_us: int) -> None:
        if due_us != self._tick_us:
            return
        self._tick_us = None
        self._carry_out(self.core.tick(self._queue.now_us))

    # ------------------------------------------------------------ commands

    def _placed(self, command: Placed) -> None:
        self._log.add(
            "placed",
            request=command.request_id,
            prefill=command.prefill.instance_id,
            decode=command.decode.instance_id,
            cached=command.cached_tokens,
            ttft_us=command.predicted_ttft_us,
            pull=[(run.source_id, run.first, run.count) for run in command.pull],
        )
        assert self.answers is not None
        self._queue.after(self._rpc_us, self.answers.placed, command)

    def _refused(self, command: Refused) -> None:
        self._log.add(
            "refused", request=command.request_id, reason=command.reason.name, retry_ms=command.retry_after_ms
        )
        assert self.answers is not None
        self._queue.after(self._rpc_us, self.answers.refused, command)

    def _ended(self, command: PlacementEnded) -> None:
        if command.why not in ("outcome", "replaced"):
            self._log.add("placement-ended", request=command.request_id, why=command.why)

    def _acknowledge(self, command: AcknowledgeSource) -> None:
        line = self._lines.get(command.stream)
        if command.want_snapshot and isinstance(line, SourceLine):
            self._queue.after(self._rpc_us, line.snapshot, command.stream)

    def _close(self, command: CloseStream) -> None:
        self._log.add("stream-closed", stream=command.stream, reason=command.reason)
        line = self._lines.pop(command.stream, None)
        if line is not None:
            self._queue.after(self._rpc_us, line.closed, command.stream)

    def _change_role(self, command: ChangeRole) -> None:
        line = cast(Ordered, self._lines[command.stream])
        self._queue.after(self._rpc_us, line.order, command.stream, command.role)

    def _role_changed(self, command: RoleChanged) -> None:
        self._log.add("role", id=command.instance_id, role=command.role.name, was=command.was.name)

    def _state(self, command: StateChanged) -> None:
        self._log.add("state", kind=command.kind, id=command.id, state=command.state)


_ACTS: dict[type, Callable[[Control, Any], None]] = {
    Placed: Control._placed,
    Refused: Control._refused,
    PlacementEnded: Control._ended,
    AcknowledgeSource: Control._acknowledge,
    CloseStream: Control._close,
    StateChanged: Control._state,
    ChangeRole: Control._change_role,
    RoleChanged: Control._role_changed,
}
