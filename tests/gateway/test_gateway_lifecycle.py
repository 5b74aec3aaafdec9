"""The life of a request: what each event leads to, and what holds for every sequence of events."""

from __future__ import annotations

from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.errors import Reason
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
from scheduler.gateway.lifecycle import TRANSITIONS, Lifecycle, LifecycleLimits, State

EOS = 2


def begin(max_tokens: int = 4, *, split: bool = True) -> Lifecycle:
    machine = Lifecycle(max_tokens, frozenset({EOS}))
    assert machine.start() == [Place(0)]
    machine.handle(Placed(0, "p", "d", split))
    machine.check_invariants()
    return machine


def emit(*tokens: int) -> Emit:
    return Emit(tokens, (), ())


def ended(finish: Finish, attempt: int = 0) -> list[Command]:
    return [ReportEnd(attempt, finish), End(finish)]


def test_every_state_meets_every_event() -> None:
    assert set(TRANSITIONS) == {(state, event) for state in State for event in get_args(Event)}


def test_split_request_from_place_to_end() -> None:
    machine = Lifecycle(3)
    assert machine.start() == [Place(0)]
    assert machine.handle(Placed(0, "p", "d", True)) == [Submit(0, Leg.PREFILL, 3), Submit(0, Leg.DECODE, 3)]
    assert machine.handle(PrefillTokens(0, (7,))) == [ForwardFirstToken(0, 7), emit(7), ReportFirst(0)]
    assert machine.handle(PrefillEnded(0, Finish.HANDED_OFF)) == []
    assert machine.handle(DecodeTokens(0, (8,))) == [emit(8)]
    assert machine.handle(DecodeTokens(0, (9,), last=True)) == [emit(9), *ended(Finish.LENGTH)]
    assert machine.handle(DecodeEnded(0, Finish.LENGTH)) == []
    assert machine.emitted == [7, 8, 9]


def test_colocated_request_has_one_leg() -> None:
    machine = Lifecycle(2, frozenset({EOS}))
    assert machine.handle(Placed(0, "a", "a", False)) == [Submit(0, Leg.DECODE, 2)]
    assert machine.handle(DecodeTokens(0, (7,))) == [emit(7), ReportFirst(0)]
    assert machine.handle(DecodeTokens(0, (EOS,), last=True)) == [emit(EOS), *ended(Finish.STOP)]


def test_colocated_answer_in_one_step() -> None:
    machine = begin(2, split=False)
    assert machine.handle(DecodeTokens(0, (5, 6), last=True)) == [
        emit(5, 6), ReportFirst(0), *ended(Finish.LENGTH),
    ]  # fmt: skip


def test_first_token_that_ends_the_answer_aborts_the_decode_leg_alone() -> None:
    assert begin().handle(PrefillTokens(0, (EOS,))) == [emit(EOS), Abort(0, Leg.DECODE), *ended(Finish.STOP)]
    assert begin(1).handle(PrefillTokens(0, (7,))) == [emit(7), Abort(0, Leg.DECODE), *ended(Finish.LENGTH)]


def test_tokens_after_a_stop_token_or_the_limit_are_dropped_and_their_engine_aborted() -> None:
    machine = begin(4, split=False)
    assert machine.handle(DecodeTokens(0, (7, EOS, 9))) == [
        emit(7, EOS), ReportFirst(0), Abort(0, Leg.DECODE), *ended(Finish.STOP),
    ]  # fmt: skip
    machine = begin(2, split=False)
    machine.handle(DecodeTokens(0, (7,)))
    assert machine.handle(DecodeTokens(0, (8, 9))) == [emit(8), Abort(0, Leg.DECODE), *ended(Finish.LENGTH)]


def test_prefill_lost_before_the_first_token_aborts_decode_and_places_again() -> None:
    machine = begin()
    assert machine.handle(PrefillLost(0, "gone")) == [
        Abort(0, Leg.DECODE), ReportEnd(0, Finish.INSTANCE_LOST, "gone"), Place(1, ("p",)),
    ]  # fmt: skip
    assert machine.handle(DecodeTokens(0, (7,))) == []
    assert machine.handle(Placed(1, "p2", "d", True)) == [Submit(1, Leg.PREFILL, 4), Submit(1, Leg.DECODE, 4)]


def test_prefill_lost_after_the_first_token_changes_nothing() -> None:
    machine = begin(2)
    machine.handle(PrefillTokens(0, (7,)))
    assert machine.handle(PrefillLost(0, "gone")) == []
    assert machine.handle(DecodeTokens(0, (8,), last=True)) == [emit(8), *ended(Finish.LENGTH)]


def test_prefill_that_fails_after_the_first_token_changes_nothing() -> None:
    machine = begin()
    machine.handle(PrefillTokens(0, (7,)))
    assert machine.handle(PrefillEnded(0, Finish.ERROR, "disk")) == []
    assert machine.state is State.DECODING


def test_decode_lost_continues_elsewhere_with_what_is_left() -> None:
    machine = begin(4)
    machine.handle(PrefillTokens(0, (7,)))
    machine.handle(DecodeTokens(0, (8,)))
    assert machine.handle(DecodeLost(0, "gone")) == [
        Abort(0, Leg.PREFILL), ReportEnd(0, Finish.INSTANCE_LOST, "gone"), Place(1, ("d",)),
    ]  # fmt: skip
    assert machine.handle(Placed(1, "x", "x", False)) == [Submit(1, Leg.DECODE, 2)]
    assert machine.handle(DecodeTokens(1, (9, 10), last=True))[0] == emit(9, 10)
    assert machine.emitted == [7, 8, 9, 10] and machine.done


def test_decode_lost_before_the_first_token_aborts_prefill() -> None:
    assert begin().handle(DecodeLost(0, "gone"))[0] == Abort(0, Leg.PREFILL)


def test_a_decode_leg_that_does_not_wait_for_the_first_token_is_told_to_end() -> None:
    commands = begin().handle(DecodeTokens(0, (7,)))
    assert commands[:2] == [Abort(0, Leg.DECODE), Abort(0, Leg.PREFILL)]
    assert commands[-1] == Place(1, ("d",))


def test_a_bug_of_the_gateway_ends_the_request_everywhere() -> None:
    machine = begin()
    commands = machine.handle(Broken("bug"))
    assert commands[:2] == [Abort(0, Leg.PREFILL), Abort(0, Leg.DECODE)]
    assert isinstance(commands[-1], End) and commands[-1].failure is not None
    assert commands[-1].failure.kind is FailureKind.GATEWAY
    assert machine.handle(Broken("again")) == []


def test_losses_are_bounded_and_all_losers_are_excluded() -> None:
    machine = begin(split=False)
    for attempt in range(3):
        commands = machine.handle(DecodeLost(attempt, "gone"))
        names = ("d", *(f"d{i}" for i in range(1, attempt + 1)))
        assert commands[-1] == Place(attempt + 1, names)
        machine.handle(Placed(attempt + 1, f"d{attempt + 1}", f"d{attempt + 1}", False))
    commands = machine.handle(DecodeLost(3, "gone"))
    assert isinstance(commands[-1], End) and commands[-1].failure is not None
    assert commands[-1].failure.kind is FailureKind.ENGINE


def test_first_refusal_is_final_and_a_later_one_waits() -> None:
    machine = Lifecycle(4)
    [end] = machine.handle(Refused(0, Reason.NO_CAPACITY, "full", 700))
    assert isinstance(end, End) and end.failure is not None
    assert (end.failure.reason, end.failure.retry_after_ms) == (Reason.NO_CAPACITY, 700)
    machine = begin()
    machine.handle(DecodeLost(0, "gone"))
    # Nobody is excluded any more: who was lost may be the only one, and back.
    assert machine.handle(Refused(1, Reason.NO_INSTANCE, "none", 700)) == [Place(1, delay_ms=700)]
    for _ in range(LifecycleLimits().refusals_max - 1):
        assert isinstance(machine.handle(Refused(1, Reason.NO_INSTANCE, "none", 0))[0], Place)
    assert isinstance(machine.handle(Refused(1, Reason.NO_INSTANCE, "none", 0))[-1], End)


def test_cancel_aborts_every_leg_and_a_late_placement_is_given_back() -> None:
    both = [Abort(0, Leg.PREFILL), Abort(0, Leg.DECODE), *ended(Finish.ABORT)]
    assert begin().handle(Cancelled()) == both
    machine = Lifecycle(4)
    assert machine.handle(Cancelled()) == [End(Finish.ABORT)]
    assert machine.handle(Placed(0, "p", "d", True)) == [ReportEnd(0, Finish.ABORT)]


def test_stop_string_leaves_prefill_to_publish() -> None:
    machine = begin()
    machine.handle(PrefillTokens(0, (7,)))
    assert machine.handle(StopMatched()) == [Abort(0, Leg.DECODE), *ended(Finish.STOP)]


def test_deadline_ends_everything() -> None:
    commands = begin().handle(DeadlinePassed())
    assert commands[:2] == [Abort(0, Leg.PREFILL), Abort(0, Leg.DECODE)]
    assert isinstance(commands[-1], End) and commands[-1].failure is not None
    assert commands[-1].failure.kind is FailureKind.DEADLINE


def test_engine_that_breaks_the_protocol_is_replaced() -> None:
    assert isinstance(begin().handle(DecodeTokens(0, (7,)))[-1], Place)
    assert isinstance(begin().handle(PrefillEnded(0, Finish.HANDED_OFF))[-1], Place)
    assert isinstance(begin(split=False).handle(DecodeEnded(0, Finish.ERROR, "boom"))[-1], Place)


# ---------------------------------------------------------------- properties

_attempts = st.integers(0, 3)
_tokens = st.lists(st.integers(2, 9), max_size=3).map(tuple)
_finish = st.sampled_from(list(Finish))
ANY_EVENT = st.one_of(
    st.builds(Placed, _attempts, st.sampled_from("ab"), st.sampled_from("cd"), st.booleans()),
    st.builds(Refused, _attempts, st.just(Reason.NO_CAPACITY), st.just("full"), st.integers(0, 9999)),
    st.builds(PlaceFailed, _attempts, st.just("away")),
    st.builds(PrefillTokens, _attempts, _tokens),
    st.builds(DecodeTokens, _attempts, _tokens, st.just(()), st.just(()), st.booleans()),
    st.builds(PrefillEnded, _attempts, _finish),
    st.builds(DecodeEnded, _attempts, _finish),
    st.builds(PrefillLost, _attempts, st.just("gone")),
    st.builds(DecodeLost, _attempts, st.just("gone")),
    st.sampled_from([StopMatched(), Cancelled(), DeadlinePassed(), Broken("bug")]),
)


@given(st.lists(ANY_EVENT, max_size=40), st.integers(1, 6))
def test_any_sequence_of_events_keeps_the_promises(events: list[Event], max_tokens: int) -> None:
    """Whatever comes in: tokens go out once, each placement ends at most once, nothing follows the end."""
    machine = Lifecycle(max_tokens, frozenset({EOS}))
    out: list[Command] = list(machine.start())
    for event in events:
        done = machine.done
        commands = machine.handle(event)
        machine.check_invariants()
        if done:
            assert all(isinstance(c, ReportEnd) for c in commands)
        out += commands
    assert [t for c in out if isinstance(c, Emit) for t in c.tokens] == machine.emitted
    assert EOS not in machine.emitted[:-1]
    assert sum(isinstance(c, End) for c in out) == machine.done
    submitted = [(c.attempt, c.leg) for c in out if isinstance(c, Submit)]
    assert len(submitted) == len(set(submitted))
    for attempt in {a for a, _ in submitted}:
        reports = [c for c in out if isinstance(c, ReportEnd) and c.attempt == attempt]
        assert len(reports) == (machine.done or attempt < machine.attempt)


def next_token(context: list[int]) -> int:
    """What an engine would generate: depends on all that came before, so a wrong context shows."""
    return (sum(context) * 31 + len(context) * 7) % 50 + EOS


@settings(max_examples=300)
@given(st.data(), st.integers(1, 12))
def test_losses_at_any_moment_never_change_the_tokens(data: st.DataObject, max_tokens: int) -> None:
    """Engines that die whenever it hurts: the client gets what one engine that never died would have said."""
    prompt = [11, 12, 13]
    expected: list[int] = []
    while len(expected) < max_tokens and EOS not in expected:
        expected.append(next_token(prompt + expected))
    machine = Lifecycle(max_tokens, frozenset({EOS}), LifecycleLimits(replacements_max=100))
    emitted: list[int] = []
    todo: list[Command] = machine.start()
    context: list[int] = []
    running: dict[Leg, int] = {}
    first_known, losses = False, 0

    def do(command: Command) -> list[Command]:
        nonlocal context, first_known
        match command:
            case Place(attempt):
                first_known = False
                return machine.handle(Placed(attempt, "p", "d", data.draw(st.booleans(), label="split")))
            case Submit(_, leg, left):
                context = prompt + emitted
                assert left == max_tokens - len(emitted)
                running[leg] = left
            case ForwardFirstToken(_, token):
                assert token == emitted[-1] if first_known else True
                first_known = True
                context = [*context, token]
            case Abort(_, leg):
                del running[leg]
            case Emit(tokens):
                emitted.extend(tokens)
        return []

    while not machine.done or todo:
        if todo:
            todo = [*do(todo[0]), *todo[1:]]
            continue
        leg = data.draw(st.sampled_from(sorted(running, key=lambda x: x.value)), label="leg")
        attempt = machine.attempt
        if losses < 20 and data.draw(st.integers(0, 3), label="fate") == 0:
            losses += 1
            del running[leg]
            todo = machine.handle((PrefillLost if leg is Leg.PREFILL else DecodeLost)(attempt, "gone"))
        elif leg is Leg.PREFILL:
            if first_known:
                del running[leg]
                todo = machine.handle(PrefillEnded(attempt, Finish.HANDED_OFF))
            else:
                todo = machine.handle(PrefillTokens(attempt, (next_token(context),)))
        elif Leg.PREFILL not in running or first_known:
            count = data.draw(st.integers(1, 3), label="burst")
            burst: list[int] = []
            for _ in range(count):
                burst.append(next_token(context))
                context = [*context, burst[-1]]
            todo = machine.handle(DecodeTokens(attempt, tuple(burst)))
        machine.check_invariants()
    assert emitted == expected
