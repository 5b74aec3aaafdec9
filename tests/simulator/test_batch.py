"""Decoding in closed form against decoding step by step."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.simulator.batch import DecodeBatch, duration_us, intervals_us, longest_tenth_us, steps_begun
from scheduler.simulator.jobs import Job, Leg


def job(name: str, prompt_tokens: int = 100) -> Job:
    return Job(name, 0, Leg.WHOLE, prompt_tokens, (), 512, 1, 1, True, (), 0)


class PlainBatch:
    """One list of times between tokens for each sequence."""

    def __init__(self) -> None:
        self.intervals: dict[str, list[float]] = {}
        self.waited: dict[str, float] = {}
        self.left: dict[str, int] = {}

    def join(self, name: str, tokens: int, waited_us: float) -> None:
        self.intervals[name], self.waited[name], self.left[name] = [], waited_us, tokens

    def step(self, step_us: float) -> None:
        for name in self.left:
            self.intervals[name].append(self.waited[name] + step_us)
            self.waited[name] = 0.0
            self.left[name] -= 1

    def stand_still(self, waited_us: float) -> None:
        for name in self.left:
            self.waited[name] += waited_us

    def longest_tenth_us(self, name: str) -> float:
        ordered = sorted(self.intervals[name], reverse=True)
        count = math.ceil(len(ordered) / 10)
        return sum(ordered[:count]) / count if count else 0.0


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(1, 40), st.integers(0, 1000)),
        st.tuples(st.just("run"), st.integers(1, 30), st.integers(1, 500)),
        st.tuples(st.just("wait"), st.integers(1, 5000), st.just(0)),
        st.tuples(st.just("leave"), st.integers(0, 5), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(acts=ACTS)
def test_records_hold_what_each_sequence_saw(acts: list[tuple[str, int, int]]) -> None:
    batch, plain, jobs = DecodeBatch(), PlainBatch(), {}
    for number, (act, a, b) in enumerate(acts):
        if act == "join":
            jobs[f"r{number}"] = job(f"r{number}", a)
            batch.join(jobs[f"r{number}"], a, float(b))
            plain.join(f"r{number}", a, float(b))
        elif act == "wait":
            batch.stand_still(float(a))
            plain.stand_still(float(a))
        elif act == "leave" and jobs:
            _check_leave(batch, plain, jobs.pop(list(jobs)[a % len(jobs)]))
        elif act == "run" and jobs:
            steps = min(a, batch.steps_to_next_end())
            for i in range(steps):
                plain.step(100.0 + b * i)
            done = batch.advance(steps, 100.0, float(b))
            assert sorted(j.request_id for j in done) == sorted(n for n, left in plain.left.items() if left == 0)
            for ended in done:
                _check_leave(batch, plain, jobs.pop(ended.request_id))
        batch.check_invariants()
        assert len(batch) == len(jobs)


def _check_leave(batch: DecodeBatch, plain: PlainBatch, who: Job) -> None:
    name = who.request_id
    tokens, records = batch.leave(who)
    assert tokens == len(plain.intervals[name])
    assert intervals_us(records) == plain.intervals[name]
    assert math.isclose(longest_tenth_us(records), plain.longest_tenth_us(name))
    for known in (plain.left, plain.waited, plain.intervals):
        del known[name]


@given(st.integers(0, 10**6), st.floats(1, 1e5), st.floats(0, 100), st.integers(1, 500))
def test_steps_begun_is_the_first_that_ends_no_earlier(
    elapsed_us: int, first_us: float, growth_us: float, steps_max: int
) -> None:
    steps = steps_begun(elapsed_us, first_us, growth_us, steps_max)
    assert 1 <= steps <= steps_max
    assert steps == 1 or duration_us(steps - 1, first_us, growth_us) < elapsed_us
    assert steps == steps_max or duration_us(steps, first_us, growth_us) >= elapsed_us


def test_a_request_placed_again_joins_anew() -> None:
    batch, first, second = DecodeBatch(), job("r"), job("r")
    batch.join(first, 10, 0.0)
    batch.advance(3, 1.0, 0.0)
    assert batch.leave(first)[0] == 3
    batch.join(second, 20, 0.0)
    assert batch.steps_to_next_end() == 20  # the old end at step 10 is not its own
    assert batch.advance(20, 1.0, 0.0) == [second]
