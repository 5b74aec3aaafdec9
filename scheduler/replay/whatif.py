"""What another policy or configuration would have decided, on the record of what happened. Pure.

Two cores go through the journal side by side: one as it was, one as asked for. What the record says was caused by the
decisions of then, so it is bent where the decisions of now are others: free KV tokens of an instance are corrected by
what each core has placed there; outcomes come as much later as the first token is predicted later, and teach nothing
where the place is another one; requests that were not placed then end when it is predicted. What can't be known stays
as recorded: which blocks are where, how fast machines were, and that a client gave up.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvpool.core.errors import BadArgument
from scheduler.core.commands import Command, Placed, Refused
from scheduler.core.core import SchedulerCore
from scheduler.core.events import Event, InstanceReported, OutcomeReported, PlaceRequested, RequestTimes
from scheduler.core.placements import Owner
from scheduler.replay import overrides as settings
from scheduler.replay.cases import Case
from scheduler.replay.exact import core_of, step
from scheduler.replay.reading import Entry, JournalFile

#: Ticks of the second core between two recorded events; a core whose deadline does not move on is a bug.
TICKS_MAX = 100_000
NO_TIMES = RequestTimes()


@dataclass(slots=True)
class WhatIf:
    """Both cores under way, and what they answered."""

    then: SchedulerCore
    now: SchedulerCore
    every_policy: bool  # requests that name a policy get the configured one as well
    cases: list[Case] = field(default_factory=list)
    #: Owner -> its last request.
    last: dict[Owner, Case] = field(default_factory=dict)
    #: Events that only the second core hears, by time.
    later: list[tuple[int, int, Event]] = field(default_factory=list)
    made: int = 0

    def take(self, entry: Entry, journal: JournalFile) -> None:
        """One recorded event, and what is due before it."""
        self._catch_up(entry.at_us)
        event = entry.event
        if isinstance(event, PlaceRequested):
            self._open(Case(event, entry.at_us))
            event = replace(event, policy="") if self.every_policy else event
        elif isinstance(event, InstanceReported):
            event = self._as_seen_now(event)  # while both cores are as they were before it
        for command in step(self.then, entry, journal):
            if isinstance(command, Placed | Refused) and (case := self._case(command)) is not None:
                case.then = command
        if isinstance(event, OutcomeReported):
            self._outcome(event, entry.at_us)
            return
        self._tell(event, entry.at_us, entry.line)

    # ------------------------------------------------------------ the second core

    def _tell(self, event: Event, at_us: int, line: int = 0) -> None:
        try:
            commands = self.now.handle(event, max(at_us, self.now.now_us))
        except Exception as error:
            where = f"line {line}" if line else "an event between lines"
            raise BadArgument(f"the core fails on {where} when it decides otherwise: {error!r}") from error
        self._answered(commands)

    def _answered(self, commands: list[Command]) -> None:
        for command in commands:
            if not isinstance(command, Placed | Refused):
                continue
            case = self._case(command)
            if case is None or case.now is not None:
                continue
            case.now, case.now_us = command, self.now.now_us
            if isinstance(command, Placed):
                for at_us, outcome in case.held:
                    self._add(*self._shifted(case, outcome, at_us))
                if not isinstance(case.then, Placed):
                    self._predict_end(case, command)
            case.held.clear()

    def _catch_up(self, until_us: int) -> None:
        """Delivers what only the second core hears, and ticks it where the first was not due before it.

        While both are due at the same time the record itself has the tick: equal cores stay equal.
        """
        for _ in range(TICKS_MAX):
            due_us, then_us = self.now.next_deadline_us(), self.then.next_deadline_us()
            tick_us = due_us if due_us is not None and (then_us is None or due_us < then_us) else None
            if self.later and (tick_us is None or self.later[0][0] <= tick_us):
                if self.later[0][0] > until_us:
                    return
                at_us, _, event = heapq.heappop(self.later)
                self._tell(event, at_us)
            elif tick_us is not None and tick_us <= until_us:
                self._answered(self.now.tick(max(tick_us, self.now.now_us)))
            else:
                return
        raise AssertionError("a deadline does not move on")

    # ------------------------------------------------------------ bending the record

    def _open(self, case: Case) -> None:
        self.cases.append(case)
        self.last[case.request.gateway_id, case.request.request_id] = case

    def _case(self, answer: Placed | Refused) -> Case | None:
        """None for those that waited already when the file begins."""
        return self.last.get((answer.gateway_id, answer.request_id))

    def _outcome(self, event: OutcomeReported, at_us: int) -> None:
        gateway = self.then.cluster.gateway_of(event.stream)
        case = None if gateway is None else self.last.get((gateway.opened.gateway_id, event.request_id))
        if case is None:
            self._tell(event, at_us)
            return
        if case.ttft_us is None and event.ttft_us:
            case.ttft_us = event.ttft_us
        if case.now is None:
            case.held.append((at_us, event))
        elif case.same_place and not case.later_us:
            self._tell(event, at_us)
        elif isinstance(case.now, Placed):
            self._add(*self._shifted(case, event, at_us))

    def _shifted(self, case: Case, event: OutcomeReported, at_us: int) -> tuple[int, OutcomeReported]:
        """When an outcome is heard of now, and what is left of it to learn from."""
        if case.same_place and not case.later_us:
            return at_us, event
        return at_us + case.later_us, replace(event, ttft_us=0, prefill=NO_TIMES, decode=NO_TIMES)

    def _predict_end(self, case: Case, placed: Placed) -> None:
        """An end for a request that had none: it was not placed then."""
        placement = self.now.book.placements.get((placed.gateway_id, placed.request_id))
        gateway = self.now.cluster.gateways.get(placed.gateway_id)
        if placement is None or gateway is None:
            return
        first_us = case.at_us + placed.predicted_ttft_us
        outcome = OutcomeReported(
            stream=gateway.opened.stream, request_id=placed.request_id, first_token=True, ttft_us=0, duration_us=0,
            tokens=1, finish_reason="", error="", prefill=NO_TIMES, decode=NO_TIMES,
        )  # fmt: skip
        self._add(first_us, outcome)
        # Not a finish that lengths of answers are learnt from.
        self._add(max(placement.decode_ends_us, first_us), replace(outcome, first_token=False, finish_reason="abort"))

    def _add(self, at_us: int, event: Event) -> None:
        self.made += 1
        heapq.heappush(self.later, (max(at_us, self.now.now_us), self.made, event))

    def _as_seen_now(self, event: InstanceReported) -> InstanceReported:
        """A report with what this core has placed there in place of what the other has."""
        instance = self.then.cluster.instance_of(event.stream)
        if instance is None:
            return event
        then, now = self.then.book.on(instance.id), self.now.book.on(instance.id)
        taken = now.kv_tokens + now.kv_tokens_passing - then.kv_tokens - then.kv_tokens_passing
        more = len(now.decoding) - len(then.decoding)
        finished = tuple(name for name in event.finished_prefills if self._runs_as_then(instance.id, name))
        if not taken and not more and finished == event.finished_prefills:
            return event
        free = min(max(event.kv_tokens_free - taken, 0), instance.info.kv_tokens_total)
        return replace(event, kv_tokens_free=free, running=max(event.running + more, 0), finished_prefills=finished)

    def _runs_as_then(self, instance_id: str, request_id: str) -> bool:
        """Whether a prefill that ended then on an instance has ended now as well."""
        owners = [owner for owner in self.now.book.on(instance_id).queue if owner[1] == request_id]
        cases = [self.last.get(owner) for owner in owners]
        return all(case is None or (case.same_place and not case.later_us) for case in cases)


def what_if(journal: JournalFile, overrides: Mapping[str, Any]) -> list[Case]:
    """Goes through a journal with other settings of the core.

    Args: overrides: of `SchedulerConfig`, checked; with a `policy` it is that of every request.
    Returns: each request, in order of arrival.
    Raises: BadArgument for what can't be read or taken in.
    """
    second = core_of(journal, settings.applied(journal.checkpoint, overrides))
    run = WhatIf(core_of(journal), second, "policy" in overrides)
    for entry in journal.entries():
        run.take(entry, journal)
    return run.cases
