"""The life of one request: placed, prefilled, decoded, done; and what a loss on the way leads to.

Sans-I/O: events go in, commands come out, and `TRANSITIONS` says which. No clock, no sockets, no text may live here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from scheduler.gateway.events import (
    Abort,
    Broken,
    Cancelled,
    Command,
    DeadlinePassed,
    DecodeEnded,
    DecodeLost,
    DecodeTokens,
    Emit,
    End,
    Event,
    Failure,
    FailureKind,
    Finish,
    ForwardFirstToken,
    Leg,
    Place,
    Placed,
    PlaceFailed,
    PrefillEnded,
    PrefillLost,
    PrefillTokens,
    Refused,
    ReportEnd,
    ReportFirst,
    StopMatched,
    Submit,
)


class State(Enum):
    """Where a request is. PLACING comes back when an attempt failed."""

    PLACING = "placing"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class LifecycleLimits:
    """Beyond each the request ends with an error."""

    replacements_max: int = 3
    #: Refusals of a request that was running already; each is followed by a wait and another try.
    refusals_max: int = 20
    refusal_wait_ms_min: int = 50
    refusal_wait_ms_max: int = 2_000


class Lifecycle:
    """State of one request. Feed events to `handle`, carry out what it returns, in order."""

    def __init__(
        self, max_tokens: int, stop_tokens: frozenset[int] = frozenset(), limits: LifecycleLimits = LifecycleLimits()
    ) -> None:
        assert max_tokens >= 1
        self.state = State.PLACING
        self.attempt = 0
        self.emitted: list[int] = []
        self._max_tokens = max_tokens
        self._stop_tokens = stop_tokens
        self._limits = limits
        self._split = False
        self._open: dict[Leg, str] = {}
        self._lost: tuple[str, ...] = ()
        self._refusals = 0

    @property
    def done(self) -> bool:
        return self.state is State.DONE

    @property
    def tokens_left(self) -> int:
        return self._max_tokens - len(self.emitted)

    def start(self) -> list[Command]:
        """The first command. Call once."""
        return [Place(self.attempt)]

    def handle(self, event: Event) -> list[Command]:
        """What `event` leads to. Events of earlier attempts, and of legs that are over, lead to nothing."""
        if getattr(event, "attempt", self.attempt) != self.attempt:
            return []
        leg = _LEG_OF.get(type(event))
        if leg is not None and leg not in self._open:
            return []
        return TRANSITIONS[self.state, type(event)](self, event)

    def check_invariants(self) -> None:
        assert 0 <= len(self.emitted) <= self._max_tokens
        assert 0 <= self.attempt <= self._limits.replacements_max
        assert self._refusals <= self._limits.refusals_max
        if self.state in (State.PLACING, State.DONE):
            assert not self._open
        else:
            assert Leg.DECODE in self._open and self.tokens_left > 0
        if self.state is State.PREFILLING:
            assert (Leg.PREFILL in self._open) == self._split

    # ------------------------------------------------------------ transitions

    def _placed(self, event: Placed) -> list[Command]:
        self.state = State.PREFILLING
        self._split = event.split
        self._open = {Leg.DECODE: event.decode}
        if event.split:
            # Prefill first: it has the longer way to go.
            self._open = {Leg.PREFILL: event.prefill, Leg.DECODE: event.decode}
        return [Submit(self.attempt, leg, self.tokens_left) for leg in self._open]

    def _placed_too_late(self, event: Placed) -> list[Command]:
        return [ReportEnd(event.attempt, Finish.ABORT)]

    def _refused(self, event: Refused) -> list[Command]:
        failure = Failure(FailureKind.REFUSED, event.message, event.reason, event.retry_after_ms)
        if self.attempt == 0 or self._refusals == self._limits.refusals_max:
            return self._end(Finish.ERROR, failure)
        self._refusals += 1
        # Whoever was lost may be back under the same name, and may be the only one.
        self._lost = ()
        limits = self._limits
        wait_ms = min(max(event.retry_after_ms, limits.refusal_wait_ms_min), limits.refusal_wait_ms_max)
        return [Place(self.attempt, delay_ms=wait_ms)]

    def _place_failed(self, event: PlaceFailed) -> list[Command]:
        return self._end(Finish.ERROR, Failure(FailureKind.UNREACHABLE, event.message))

    def _first_token(self, event: PrefillTokens) -> list[Command]:
        """From the prefill instance: to the client, and to the decode instance, which waits for it."""
        if not event.tokens:
            return []
        emit, ended = self._emit(event, 1)
        if ended is not None:
            return [emit, *self._complete(ended, abort=True)]
        self.state = State.DECODING
        return [ForwardFirstToken(self.attempt, emit.tokens[0]), emit, ReportFirst(self.attempt)]

    def _tokens(self, event: DecodeTokens) -> list[Command]:
        if not event.tokens:
            return []
        if self.state is State.PREFILLING and self._split:
            # It goes on decoding what nobody wants, unless it is told.
            abort = Abort(self.attempt, Leg.DECODE)
            return [abort, *self._replace(Leg.DECODE, Finish.ERROR, "decoded before the first token was known")]
        first = self.state is State.PREFILLING
        self.state = State.DECODING
        emit, ended = self._emit(event, self.tokens_left)
        commands: list[Command] = [emit, ReportFirst(self.attempt)] if first else [emit]
        if ended is not None:
            # Decided here, not by the engine's word: that may be lost with the engine, and nothing may follow.
            commands += self._complete(ended, abort=not event.last)
        return commands

    def _prefill_ended_early(self, event: PrefillEnded) -> list[Command]:
        return self._replace(Leg.PREFILL, Finish.ERROR, event.error or f"prefill ended ({event.finish.value})")

    def _prefill_lost_early(self, event: PrefillLost) -> list[Command]:
        return self._replace(Leg.PREFILL, Finish.INSTANCE_LOST, event.error)

    def _prefill_over(self, event: PrefillEnded | PrefillLost) -> list[Command]:
        """After the first token nothing depends on the prefill instance: what is missing is computed again."""
        self._open.pop(Leg.PREFILL, None)
        return []

    def _decode_ended(self, event: DecodeEnded) -> list[Command]:
        natural = event.finish in (Finish.STOP, Finish.LENGTH)
        if natural and not (self._split and self.state is State.PREFILLING):
            self._open.pop(Leg.DECODE)
            return self._complete(event.finish, abort=False)
        return self._replace(Leg.DECODE, Finish.ERROR, event.error or f"decode ended ({event.finish.value})")

    def _decode_lost(self, event: DecodeLost) -> list[Command]:
        return self._replace(Leg.DECODE, Finish.INSTANCE_LOST, event.error)

    def _stop_matched(self, event: StopMatched) -> list[Command]:
        return self._complete(Finish.STOP, abort=True)

    def _cancelled(self, event: Cancelled) -> list[Command]:
        return [*self._abort_open(), *self._report(Finish.ABORT), *self._end(Finish.ABORT)]

    def _deadline(self, event: DeadlinePassed) -> list[Command]:
        return self._fail(Failure(FailureKind.DEADLINE, "the request's deadline passed"))

    def _broken(self, event: Broken) -> list[Command]:
        return self._fail(Failure(event.kind, event.message))

    def _fail(self, failure: Failure) -> list[Command]:
        return [
            *self._abort_open(),
            *self._report(Finish.ERROR, failure.message),
            *self._end(Finish.ERROR, failure),
        ]

    def _ignore(self, event: Event) -> list[Command]:
        return []

    # ------------------------------------------------------------ steps that transitions share

    def _emit(self, event: PrefillTokens | DecodeTokens, count_max: int) -> tuple[Emit, Finish | None]:
        """Takes tokens up to a stop token or the limit; how the request ends if it does with them."""
        count = min(count_max, len(event.tokens))
        ended: Finish | None = None
        for i in range(count):
            if event.tokens[i] in self._stop_tokens:
                count, ended = i + 1, Finish.STOP
                break
        self.emitted += event.tokens[:count]
        if ended is None and not self.tokens_left:
            ended = Finish.LENGTH
        return Emit(event.tokens[:count], event.logprobs[:count], event.gaps[:count]), ended

    def _complete(self, finish: Finish, *, abort: bool) -> list[Command]:
        """The answer is whole. A prefill leg is left alone: what it still publishes serves the next request."""
        self._open.pop(Leg.PREFILL, None)
        aborts = self._abort_open() if abort else []
        return [*aborts, *self._report(finish), *self._end(finish)]

    def _abort_open(self) -> list[Command]:
        legs = list(self._open)
        self._open = {}
        return [Abort(self.attempt, leg) for leg in legs]

    def _report(self, finish: Finish, error: str = "") -> list[Command]:
        # While placing there is nothing to report: a placement that still comes is reported when it does.
        return [] if self.state is State.PLACING else [ReportEnd(self.attempt, finish, error)]

    def _end(self, finish: Finish, failure: Failure | None = None) -> list[Command]:
        self.state = State.DONE
        self._open = {}
        return [End(finish, failure)]

    def _replace(self, leg: Leg, finish: Finish, error: str) -> list[Command]:
        """This attempt is over: another one takes the prompt and what was emitted, away from who failed."""
        failed = self._open.pop(leg)
        commands = [*self._abort_open(), *self._report(finish, error)]
        if self.attempt == self._limits.replacements_max:
            return [*commands, *self._end(Finish.ERROR, Failure(FailureKind.ENGINE, error))]
        self.attempt += 1
        self.state = State.PLACING
        if failed not in self._lost:
            self._lost = (*self._lost, failed)
        return [*commands, Place(self.attempt, self._lost)]


_LEG_OF: dict[type, Leg] = {
    PrefillTokens: Leg.PREFILL,
    PrefillEnded: Leg.PREFILL,
    PrefillLost: Leg.PREFILL,
    DecodeTokens: Leg.DECODE,
    DecodeEnded: Leg.DECODE,
    DecodeLost: Leg.DECODE,
}

_L = Lifecycle
_EVERYWHERE: dict[type, Callable[..., list[Command]]] = {
    StopMatched: _L._stop_matched,
    Cancelled: _L._cancelled,
    DeadlinePassed: _L._deadline,
    Broken: _L._broken,
}
_NO_PLACE_ASKED: dict[type, Callable[..., list[Command]]] = {
    Placed: _L._ignore,
    Refused: _L._ignore,
    PlaceFailed: _L._ignore,
}
_BY_STATE: dict[State, dict[type, Callable[..., list[Command]]]] = {
    State.PLACING: {
        Placed: _L._placed,
        Refused: _L._refused,
        PlaceFailed: _L._place_failed,
        PrefillTokens: _L._ignore,
        DecodeTokens: _L._ignore,
        PrefillEnded: _L._ignore,
        DecodeEnded: _L._ignore,
        PrefillLost: _L._ignore,
        DecodeLost: _L._ignore,
        **_EVERYWHERE,
    },
    State.PREFILLING: {
        **_NO_PLACE_ASKED,
        PrefillTokens: _L._first_token,
        DecodeTokens: _L._tokens,
        PrefillEnded: _L._prefill_ended_early,
        DecodeEnded: _L._decode_ended,
        PrefillLost: _L._prefill_lost_early,
        DecodeLost: _L._decode_lost,
        **_EVERYWHERE,
    },
    State.DECODING: {
        **_NO_PLACE_ASKED,
        PrefillTokens: _L._ignore,
        DecodeTokens: _L._tokens,
        PrefillEnded: _L._prefill_over,
        DecodeEnded: _L._decode_ended,
        PrefillLost: _L._prefill_over,
        DecodeLost: _L._decode_lost,
        **_EVERYWHERE,
    },
    State.DONE: {
        Placed: _L._placed_too_late,
        Refused: _L._ignore,
        PlaceFailed: _L._ignore,
        PrefillTokens: _L._ignore,
        DecodeTokens: _L._ignore,
        PrefillEnded: _L._ignore,
        DecodeEnded: _L._ignore,
        PrefillLost: _L._ignore,
        DecodeLost: _L._ignore,
        StopMatched: _L._ignore,
        Cancelled: _L._ignore,
        DeadlinePassed: _L._ignore,
        Broken: _L._ignore,
    },
}

#: Every state meets every event: `TRANSITIONS[state, type(event)](lifecycle, event) -> commands`.
TRANSITIONS = {(state, event): action for state, row in _BY_STATE.items() for event, action in row.items()}
