"""The interpreter's search for cycles: never inside a placement, never of everything while requests come."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import scheduler_events as made
from test_waiting import one_instance

from scheduler.core.commands import Placed
from scheduler.core.core import SchedulerCore
from scheduler.service import collecting
from scheduler.service.collecting import Collector


class Knot:
    """What only a search for cycles frees."""

    def __init__(self) -> None:
        self.self = self


class Clock:
    def __init__(self) -> None:
        self.s, self.requests = 0.0, 0

    def collector(self) -> Collector:
        return Collector(lambda: self.requests, lambda: self.s)


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()
    gc.unfreeze()
    gc.enable()


def some_objects(count: int = collecting.YOUNG_MIN) -> list[list[None]]:
    return [[] for _ in range(count)]


def test_nothing_is_looked_for_until_there_is_a_look(clock: Clock) -> None:
    collector = clock.collector()
    collector.begin()
    runs: list[str] = []
    gc.callbacks.append(lambda phase, info: runs.append(phase))
    try:
        gone = weakref.ref(Knot())
        kept = some_objects(100_000)
        assert not runs and gone() is not None
        collector.look()
        assert runs == ["start", "stop"] and gone() is None and len(kept) == 100_000
    finally:
        gc.callbacks.pop()


def test_everything_is_looked_at_only_while_nobody_asks(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "OLD_MIN", 1000)
    collector = clock.collector()
    collector.begin()
    knot = Knot()
    knots, kept = weakref.ref(knot), some_objects()
    collector.look()
    del knot
    for _ in range(20):
        clock.s, clock.requests = clock.s + 10 * collecting.IDLE_S, clock.requests + 1
        kept += some_objects()
        collector.look()
    assert knots() is not None, "it is old, and requests come"
    clock.s += collecting.IDLE_S
    collector.look()
    assert knots() is None and collector.old == 0


def test_what_grows_old_is_bounded_however_busy_it_is(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "OLD_MIN", 1000)
    monkeypatch.setattr(collecting, "OLD_MAX_FACTOR", 5)
    collector = clock.collector()
    collector.begin()
    kept, looks = [], 0
    while not kept or collector.old:
        kept += some_objects()
        clock.requests += 1
        collector.look()
        looks += 1
        assert looks <= 5000 // collecting.YOUNG_MIN + 2
    collector.end()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def placed_of_300(core: SchedulerCore) -> int:
    placed = 0
    for n in range(300):
        commands = core.handle(made.place(f"r{n}", blocks=f"a0..a15,b{n}", prompt_tokens=1040), 1000 * n)
        placed += sum(isinstance(command, Placed) for command in commands)
        core.handle(made.outcome(2, f"r{n // 2}"), 1000 * n)
    return placed


def test_the_core_makes_no_cycles() -> None:
    """What the collector relies on: placements, waits, refusals and ends leave nothing for a search to find."""
    placed_of_300(one_instance())  # loads kernels, which does make some
    # Another thread may make some meanwhile, but not each time.
    for _ in range(5):
        core = one_instance()
        gc.collect()
        gc.disable()
        try:
            placed = placed_of_300(core)
            found = gc.collect()
        finally:
            gc.enable()
        assert placed > 10 and core.room.entries
        if not found:
            return
    pytest.fail(f"{found} objects of cycles")
