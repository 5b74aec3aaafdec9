"""The order of messages, against an engine that keeps a bounded number of them and a network that loses any of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engines.openai_server.event_order import Action, AskFrom, EventOrder, Forget, Take
from engines.openai_server.kv_events import Cleared, Message, Removed, Stored


def message(time_s: float) -> Message:
    return Message(time_s, (Cleared(),))


def test_in_order_without_replay() -> None:
    order = EventOrder(replays=False)
    assert order.start() == []
    assert order.live(0, message(0)) == [Take(message(0))]
    assert order.live(1, message(1)) == [Take(message(1))]
    assert order.live(4, message(4)) == [Forget(), Take(message(4))] and order.gaps == 1
    assert order.live(4, message(4)) == []  # twice
    assert order.live(0, message(9)) == [Forget(), Take(message(9))]  # another process


def test_a_late_subscriber_asks_for_all() -> None:
    order = EventOrder(replays=True)
    assert order.start() == [AskFrom(0)]
    assert order.live(2, message(2)) == []  # waits
    assert order.replayed(0, message(0)) == [Take(message(0))]
    assert order.replayed(1, message(1)) == [Take(message(1))]
    assert order.replayed(2, message(2)) == [Take(message(2))]
    assert order.replay_ended() == [] and not order.replaying
    assert order.live(3, message(3)) == [Take(message(3))]


def test_a_gap_is_asked_for_once() -> None:
    order = EventOrder(replays=True)
    order.start()
    order.replay_ended()
    assert order.live(0, message(0)) == [Take(message(0))]
    assert order.live(3, message(3)) == [AskFrom(1)] and order.live(4, message(4)) == []
    assert order.replayed(2, message(2)) == [Forget(), Take(message(2))]  # 1 is too old for the engine
    assert order.replay_ended() == [Take(message(3)), Take(message(4))]


def test_an_engine_that_begins_again() -> None:
    order = EventOrder(replays=True)
    order.start()
    order.replay_ended()
    for number in range(3):
        order.live(number, message(number))
    assert order.live(1, message(10)) == [Forget(), AskFrom(0)]
    assert order.replayed(0, message(9)) == [Take(message(9))]
    assert order.replay_ended() == [Take(message(10))]


class PlayedWire:
    """An engine whose blocks 0.. come and go, and what a subscriber makes of its messages."""

    def __init__(self, kept: int, replays: bool) -> None:
        self.kept, self.order = kept, EventOrder(replays=replays)
        self.truth: dict[int, None] = {}
        self.sent: list[tuple[int, Message]] = []
        self.known: dict[int, None] = {}
        self.clock = 0.0
        self.asked: int | None = None
        self.do(self.order.start())

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Forget():
                    self.known.clear()
                case AskFrom(number):
                    self.asked = number
                case Take(taken):
                    for event in taken.events:
                        match event:
                            case Stored((int(block),)):
                                self.known[block] = None
                            case Removed((int(block),)):
                                self.known.pop(block, None)
        self.order.check_invariants()

    def change(self, block: int, lost: bool) -> None:
        self.clock += 1.0
        if block in self.truth:
            del self.truth[block]
            event: Stored | Removed = Removed((block,))
        else:
            self.truth[block] = None
            event = Stored((block,), None, (1,), 1)
        number = self.sent[-1][0] + 1 if self.sent else 0
        self.sent.append((number, Message(self.clock, (event,))))
        if not lost or number == 0:
            self.do(self.order.live(number, self.sent[-1][1]))

    def replay(self, complete: bool) -> None:
        """The engine answers what it was asked; or the answer breaks off in the middle."""
        if self.asked is None:
            return
        listed = [entry for entry in self.sent[-self.kept :] if entry[0] >= self.asked]
        self.asked = None
        for number, message_ in listed if complete else listed[: len(listed) // 2]:
            self.do(self.order.replayed(number, message_))
        self.do(self.order.replay_ended())

    def restart(self) -> None:
        self.truth.clear()
        self.sent.clear()


_STEPS = st.lists(
    st.tuples(st.just("change"), st.integers(0, 5), st.booleans())
    | st.tuples(st.just("replay"), st.booleans())
    | st.tuples(st.just("restart")),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(_STEPS, st.integers(1, 6), st.booleans())
def test_what_is_known_is_true(steps: list[tuple], kept: int, replays: bool) -> None:
    """Once nothing is under way and a message got through: no block is known that the engine does not hold."""
    wire = PlayedWire(kept, replays)
    for step in steps:
        match step:
            case "change", block, lost:
                wire.change(block, lost)
            case "replay", complete:
                wire.replay(complete)
            case _:
                wire.restart()
    wire.change(99, lost=False)
    while wire.asked is not None:
        wire.replay(complete=True)
    wire.order.replay_ended()
    assert set(wire.known) <= set(wire.truth)
    assert 99 in wire.known


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_a_long_memory_loses_nothing(changes: list[tuple[int, bool]]) -> None:
    wire = PlayedWire(kept=1000, replays=True)
    for block, lost in changes:
        wire.change(block, lost)
        wire.replay(complete=True)
    wire.change(99, lost=False)
    wire.replay(complete=True)
    assert set(wire.known) == set(wire.truth)


def test_what_is_lost_during_a_replay_is_asked_for_too() -> None:
    order = EventOrder(replays=True)
    order.start()
    assert order.replayed(0, message(0)) == [Take(message(0))]
    assert order.live(2, message(2)) == []
    assert order.replay_ended() == [AskFrom(1)]
    assert order.replay_ended() == [Forget(), Take(message(2))]
