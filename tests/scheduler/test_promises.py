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
from scheduler.core.promises import GRACE_US, Ahead, Promise, PromiseBook
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
        name, at = f"r{n}", f"w{rng.randrange(3)}"
        book.note(replace(promise, owner=("gw", name), due_us=1000 * n, decode_id=at, mark=name.encode()))
        book.check_invariants()
    assert list(book.promises) == [("gw", f"r{n}") for n in range(40, 50)]
    assert book.ahead_of("m", 0) == (10_000, 49_000)
    assert book.came(("gw", "r45"), "m", "t", b"r45", -100_000) is None, "it came before its time"
    assert ("gw", "r45") not in book.promises
    assert book.came(("gw", "somebody else"), "m", "u", b"r40", 41_000) is None, "another tenant"
    assert book.came(("gw", "somebody else"), "m", "t", b"else", 41_000) is None, "another prompt"
    assert len(book.promises) == 9 and book.kept_share == 0
    kept = book.came(("gw-2", "another id"), "m", "t", b"r40", 41_000)
    assert kept is not None and kept.owner == ("gw", "r40"), "the same prompt, at its time, by another gateway"
    assert book.kept_share > 0
    book.came(("gw", "late"), "x", "t", b"", 10 * SECOND_US)
    assert not book.promises and not book.on and not book.marks
    assert 0 <= book.kept_share < 0.1, "eight in a row that nobody kept"
    book.check_invariants()


def test_a_promise_stands_in_line_by_the_share_that_is_kept() -> None:
    book = PromiseBook(10)
    first = Promise(("gw", "a"), "m", "t", "w0", 3 * SECOND_US, 1000, 9000, 64, b"a", (5_000, 1), 6_000)
    second = replace(first, owner=("gw", "b"), due_us=9 * SECOND_US, mark=b"b", order=(6_000, 2), start_us=7_000)
    book.note(first)
    book.note(second)
    later = (8_000, 3)
    nobody = book.ahead("m", later, 0)
    assert nobody is not None and nobody.work_before_us(60 * SECOND_US) == 0, "nobody ever came back"
    assert book.start_us("m", "t", 4_000, 0) == 4_000
    book.kept_share = 1.0
    ahead = book.ahead("m", later, 0)
    assert ahead is not None
    assert ahead.work_before_us(0) == 0, "its turn is before theirs: nothing idles for them"
    assert ahead.work_before_us(3 * SECOND_US) == 1000
    assert ahead.work_before_us(8 * SECOND_US) == 2000
    assert book.ahead("m", (5_500, 3), 0) == Ahead(0, (3 * SECOND_US,), (1000,)), "who goes before the second"
    assert book.ahead("m", (5_000, 0), 0) is None and book.ahead("other", later, 0) is None
    assert book.start_us("m", "t", 4_000, 0) == 7_000 and book.start_us("m", "other", 4_000, 0) == 4_000
    over_us = 3 * SECOND_US + GRACE_US + 1
    assert book.ahead("m", later, over_us) == Ahead(over_us, (9 * SECOND_US,), (1000,)), "the first has not come"


def test_newcomers_stand_behind_who_was_told_to_come_back() -> None:
    """Who then sends the same prompt under another id, as clients do, has kept the appointment."""
    core = one_instance(SchedulerConfig())
    asked = {"prompt_tokens": 1000, "max_tokens": 10, "ttft_slo_us": 3 * SECOND_US}
    refused = [
        n for n in range(8) if isinstance(answers(core.handle(made.place(f"r{n}", **asked), 0)).get(f"r{n}"), Refused)
    ]
    promise = core.promises.promises["gw", f"r{refused[0]}"]
    long = {"prompt_tokens": 4000, "max_tokens": 10}
    for n in range(3):
        core.handle(made.place(f"new{n}", **long), 1 + n)
    waiting = [w.order for w in core.room.entries.values() if w.owner[1].startswith("new")]
    assert waiting and min(waiting) > promise.order
    run(core, promise.due_us)
    core.handle(made.place("again", **asked), promise.due_us)
    assert promise.owner not in core.promises.promises and core.promises.kept_share > 0
    core.check_invariants()


def test_under_lasting_overload_those_who_come_when_told_get_in() -> None:
    """Three times what four instances carry, newcomers all the time; TTFT is the limit. Modelled."""
    config = SimulationConfig(
        retries_max=1, nodes=4, split=(2, 2), speed=3.0, ttft_slo_us=10 * SECOND_US, tbt_slo_us=10 * SECOND_US
    )
    result = simulate(read_trace(TRACE), config)
    back = [r for r in result.records if r.refusals and r.prompt_tokens < 40_000]
    taken = sum(r.end != "refused" for r in back)
    assert len(back) >= 50 and taken >= 0.9 * len(back), (taken, len(back))


def test_an_instance_that_goes_takes_its_promises_with_it() -> None:
    core = one_instance(SchedulerConfig())
    for n in range(8):
        core.handle(made.place(f"r{n}", prompt_tokens=1000, ttft_slo_us=2 * SECOND_US), 0)
    assert core.promises.promises
    core.handle(events.InstanceLeft(1), 1)
    assert not core.promises.promises
    core.check_invariants()
    assert not any(isinstance(a, Placed) for a in answers(core.tick(2)).values())
