"""Times to come back: what was promised to others counts, and who comes back finds a place."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import scheduler_events as made
from test_looking import run
from test_waiting import answers, one_instance

from scheduler.core import events
from scheduler.core.commands import Placed, Refused
from scheduler.core.config import SchedulerConfig
from scheduler.core.promises import Promise, PromiseBook
from scheduler.simulator.driver import simulate
from scheduler.simulator.settings import SimulationConfig
from scheduler.simulator.traces import read_trace

SECOND_US = 1_000_000
TRACE = Path(__file__).resolve().parents[1] / "simulator" / "testdata" / "conversation_250.jsonl.gz"


def test_a_crowd_is_told_to_come_one_after_the_other_and_gets_in() -> None:
    """Each has two seconds for its first token and takes one to compute: those who come back as told all get in."""
    core = one_instance(SchedulerConfig())
    asked = {"prompt_tokens": 1000, "max_tokens": 10, "ttft_slo_us": 3 * SECOND_US}
    told: list[tuple[int, str]] = []
    for n in range(24):
        found = answers(core.handle(made.place(f"r{n}", **asked), n)).get(f"r{n}")
        if isinstance(found, Refused):
            told.append((n + found.retry_after_ms * 1000, f"r{n}"))
    assert len(told) >= 15
    times = [at_us for at_us, _ in told]
    assert times == sorted(times) and len(set(times)) > len(times) // 2, "not all at the same time"
    taken = 0
    for at_us, name in told:
        while core.now_us < at_us:
            # The first of the queue is done as predicted.
            heads = list(core.book.on("w0").queue)
            due_us = core.book.on("w0").head_since_us + core.book.placements[heads[0]].prefill_us if heads else at_us
            run(core, min(max(due_us, core.now_us + 1), at_us))
            if heads and due_us <= at_us:
                core.handle(made.outcome(2, heads[0][1], ttft_us=0), core.now_us)
        core.handle(made.place(name, **asked), core.now_us)
        run(core, core.now_us + 1000)
        taken += ("gw", name) in core.book.placements or ("gw", name) in core.room.entries
    assert taken >= 0.9 * len(told)
    core.check_invariants()


@pytest.mark.parametrize("split", [(2, 2), (1, 3)])
def test_most_of_a_burst_get_in_when_they_come_back(split: tuple[int, int]) -> None:
    """Modelled, and predictions err: most of those that could be served at all."""
    config = SimulationConfig(retries_max=2, nodes=4, split=split, speed=1000.0, ttft_slo_us=10 * SECOND_US)
    result = simulate(read_trace(TRACE)[:40], config)
    back = [r for r in result.records if r.refusals and r.prompt_tokens < 40_000]
    taken = sum(r.end != "refused" for r in back)
    assert taken >= 0.9 * len(back), (taken, len(back))


def test_promises_are_bounded_kept_and_forgotten() -> None:
    rng = random.Random(6)
    book = PromiseBook(10)
    promise = Promise(("gw", "r"), "m", "t", "w0", 0, 1000, 9000, 64)
    for n in range(50):
        book.note(replace(promise, owner=("gw", f"r{n}"), due_us=1000 * n, decode_id=f"w{rng.randrange(3)}"))
        book.check_invariants()
    assert list(book.promises) == [("gw", f"r{n}") for n in range(40, 50)]
    assert book.ahead_of("m", 0) == (10_000, 49_000)
    book.came(("gw", "r45"), "m", "t", 0)
    assert ("gw", "r45") not in book.promises, "it came before its time"
    book.came(("gw", "another id"), "m", "t", 41_000)
    assert ("gw", "r40") not in book.promises, "somebody like it came at its time"
    book.came(("gw", "somebody else"), "m", "u", 41_000)
    assert len(book.promises) == 8
    book.came(("gw", "late"), "x", "t", 10 * SECOND_US)
    assert not book.promises and not book.on
    book.check_invariants()


def test_an_instance_that_goes_takes_its_promises_with_it() -> None:
    core = one_instance(SchedulerConfig())
    for n in range(8):
        core.handle(made.place(f"r{n}", prompt_tokens=1000, ttft_slo_us=2 * SECOND_US), 0)
    assert core.promises.promises
    core.handle(events.InstanceLeft(1), 1)
    assert not core.promises.promises
    core.check_invariants()
    assert not any(isinstance(a, Placed) for a in answers(core.tick(2)).values())
