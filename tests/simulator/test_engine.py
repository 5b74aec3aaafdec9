"""The ground truth of an instance, against a plain one that takes every step by itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvpool.core.ids import Role
from scheduler.simulator.batch import Record, intervals_us
from scheduler.simulator.clock import EventQueue
from scheduler.simulator.engine import Engine
from scheduler.simulator.hardware import Hardware
from scheduler.simulator.jobs import Job, Leg
from tests.simulator.cases import A800

BLOCK_TOKENS = 512


class Alone:
    """An engine with nobody around it: no node, nothing to pull."""

    def __init__(self) -> None:
        self.first_us: dict[str, int] = {}
        self.done_us: dict[str, int] = {}
        self.intervals: dict[str, list[float]] = {}
        self.cached: dict[str, int] = {}
        self.queue = EventQueue()

    def admitted(self, engine: Engine, job: Job) -> bool:
        self.cached[job.request_id] = job.own_blocks
        return False

    def computed(self, engine: Engine, job: Job, blocks: int, tail: bool) -> None: ...

    def cache_changed(self, engine: Engine, stored: list[int], removed: list[int]) -> None: ...

    def released(self, engine: Engine, job: Job) -> None: ...

    def first_token(self, engine: Engine, job: Job) -> None:
        self.first_us[job.request_id] = self.queue.now_us

    def job_done(self, engine: Engine, job: Job, tokens: int, records: list[Record]) -> None:
        assert tokens == job.output_tokens - 1
        self.done_us[job.request_id] = self.queue.now_us
        self.intervals[job.request_id] = intervals_us(records)

    def engine(self, hardware: Hardware = A800, role: Role = Role.BOTH, noise: float = 0.0) -> Engine:
        return Engine("e", "h", role, hardware, BLOCK_TOKENS, self.queue, self, "seed", noise, 256)

    def run(self, engine: Engine) -> None:
        while self.queue.step():
            engine.check_invariants()


def job(name: str, prompt_tokens: int, output_tokens: int, stem: int, leg: Leg = Leg.WHOLE) -> Job:
    ids = tuple(stem * 10_000 + i for i in range(prompt_tokens // BLOCK_TOKENS))
    return Job(name, 0, leg, prompt_tokens, ids, BLOCK_TOKENS, output_tokens, output_tokens, True, (), 0)


def submit_at(around: Alone, engine: Engine, arrival_us: int, what: Job) -> None:
    around.queue.at(arrival_us, engine.submit, what)


class PlainEngine:
    """One loop, one step at a time; no cache, room for all."""

    def __init__(self, hardware: Hardware, jobs: list[tuple[int, Job]]) -> None:
        self.hardware = hardware
        self.first: dict[str, float] = {}
        self.done: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}
        #: Somebody came with the end of a step: the two may differ by a rounding, and so by a step.
        self.tied = False
        self._coming = sorted(jobs, key=lambda j: j[0])
        self._now = 0.0
        self._ready: list[list[object]] = []  # [job, tokens left]
        self._decoding: dict[str, list[float]] = {}  # name -> [context, left, last token at]

    def run(self) -> None:
        while self._coming or self._ready or self._decoding:
            if not self._ready and not self._decoding:
                self._now = max(self._now, self._coming[0][0])
            while self._coming and self._coming[0][0] <= self._now:
                what = self._coming.pop(0)[1]
                self._ready.append([what, what.prompt_tokens])
            self._step()

    def _step(self) -> None:
        hardware, budget = self.hardware, self.hardware.chunk_tokens
        whole = budget == 0
        chunks: list[tuple[list[object], int]] = []
        for entry in self._ready:
            take = entry[1] if whole else min(budget, entry[1])  # type: ignore[type-var]
            chunks.append((entry, take))  # type: ignore[arg-type]
            budget -= take  # type: ignore[operator]
            if whole or not budget:
                break
        decodes = not (whole and chunks)
        batch = len(self._decoding) if decodes else 0
        kv_tokens = int(sum(d[0] for d in self._decoding.values())) if decodes else 0
        parts = [(take, e[0].prompt_tokens - e[1]) for e, take in chunks]  # type: ignore[attr-defined,operator]
        self._now += hardware.step_duration_us(parts, batch, kv_tokens)
        self.tied = self.tied or any(abs(at_us - self._now) < 50 for at_us, _ in self._coming)
        if decodes:
            for name in list(self._decoding):
                self._token(name)
        for entry, take in chunks:
            entry[1] -= take  # type: ignore[operator]
            if not entry[1]:
                self._ready.remove(entry)
                self._first(entry[0])  # type: ignore[arg-type]

    def _first(self, what: Job) -> None:
        self.first[what.request_id] = self._now
        self.intervals[what.request_id] = []
        if what.output_tokens == 1:
            self.done[what.request_id] = self._now
        else:
            self._decoding[what.request_id] = [what.prompt_tokens + 1, what.output_tokens - 1, self._now]

    def _token(self, name: str) -> None:
        state = self._decoding[name]
        self.intervals[name].append(self._now - state[2])
        state[0], state[1], state[2] = state[0] + 1, state[1] - 1, self._now
        if not state[1]:
            self.done[name] = self._now
            del self._decoding[name]


JOBS = st.lists(
    st.tuples(st.integers(0, 20_000_000), st.integers(1, 12_000), st.integers(1, 120)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(jobs=JOBS, chunk_tokens=st.sampled_from([0, 512, 2048, 8192]))
def test_closed_form_and_step_by_step_agree(jobs: list[tuple[int, int, int]], chunk_tokens: int) -> None:
    hardware = replace(A800, chunk_tokens=chunk_tokens)
    around = Alone()
    engine = around.engine(hardware)
    arrivals = [(at_us, job(f"r{i}", prompt, out, i)) for i, (at_us, prompt, out) in enumerate(jobs)]
    for at_us, what in arrivals:
        submit_at(around, engine, at_us, what)
    around.run(engine)
    again = [(at_us, job(w.request_id, w.prompt_tokens, w.output_tokens, 0)) for at_us, w in arrivals]
    plain = PlainEngine(hardware, again)
    plain.run()
    assume(not plain.tied)
    # The engine's times are whole microseconds, and each step ends at the next one: it may be late by one a step more.
    steps = sum(out + 1 + prompt // (chunk_tokens or prompt) for _, prompt, out in jobs)
    for name in plain.done:
        for found_us, expected_us in (
            (around.first_us[name], plain.first[name]),
            (around.done_us[name], plain.done[name]),
        ):
            bound_us = max(1e-5 * expected_us, 50)
            assert -bound_us <= found_us - expected_us <= max(bound_us, steps)
        got, expected = around.intervals[name], plain.intervals[name]
        assert len(got) == len(expected)
        assert all(math.isclose(a, b, rel_tol=1e-4, abs_tol=20) for a, b in zip(got, expected, strict=True))


def test_a_prefill_stretches_the_steps_of_those_that_decode() -> None:
    around = Alone()
    engine = around.engine()
    submit_at(around, engine, 0, job("old", 8_000, 200, 1))
    submit_at(around, engine, 3_000_000, job("new", 16_384, 1, 2))
    around.run(engine)
    quiet_us = A800.decode_step_us(1, 8_100)
    stretched = [us for us in around.intervals["old"] if us > 3 * quiet_us]
    assert len(stretched) == 16_384 // A800.chunk_tokens
    assert max(stretched) == pytest.approx(A800.step_duration_us([(2048, 14_336)], 1, 8_100), rel=0.01)


def test_without_chunks_a_prefill_stops_those_that_decode() -> None:
    around = Alone()
    engine = around.engine(replace(A800, chunk_tokens=0))
    submit_at(around, engine, 0, job("old", 8_000, 200, 1))
    submit_at(around, engine, 3_000_000, job("new", 16_384, 1, 2))
    around.run(engine)
    longest_us = max(around.intervals["old"])
    assert longest_us == pytest.approx(A800.prefill_us(16_384, 0), rel=0.05)


def test_a_second_turn_computes_only_what_is_new() -> None:
    around = Alone()
    engine = around.engine()
    submit_at(around, engine, 0, job("first", 10_240, 2, 1))
    submit_at(around, engine, 5_000_000, job("second", 12_288, 1, 1))
    around.run(engine)
    assert around.cached == {"first": 0, "second": 20}
    expected_us = A800.prefill_us(2048, 10_240)
    assert around.first_us["second"] - 5_000_000 == pytest.approx(expected_us, rel=0.01)


def test_who_does_not_fit_waits_for_room() -> None:
    around = Alone()
    engine = around.engine(replace(A800, kv_tokens=40 * BLOCK_TOKENS))
    submit_at(around, engine, 0, job("big", 30 * BLOCK_TOKENS, 200, 1))
    submit_at(around, engine, 1, job("next", 20 * BLOCK_TOKENS, 1, 2))
    around.run(engine)
    assert around.first_us["next"] > around.done_us["big"]
    assert not engine.submit(job("never", 41 * BLOCK_TOKENS, 1, 3))


def test_a_full_line_refuses() -> None:
    around = Alone()
    engine = around.engine(replace(A800, kv_tokens=10 * BLOCK_TOKENS))
    engine._waiting_max = 1
    assert engine.submit(job("runs", 9 * BLOCK_TOKENS, 1, 1))
    assert engine.submit(job("waits", 9 * BLOCK_TOKENS, 1, 2))
    assert not engine.submit(job("refused", 9 * BLOCK_TOKENS, 1, 3))


def test_the_noise_is_drawn_from_the_seed() -> None:
    times = []
    for _ in range(2):
        around = Alone()
        engine = around.engine(noise=0.05)
        submit_at(around, engine, 0, job("r", 9_000, 50, 1))
        around.run(engine)
        times.append(around.done_us["r"])
    exact = Alone()
    engine = exact.engine()
    submit_at(exact, engine, 0, job("r", 9_000, 50, 1))
    exact.run(engine)
    assert times[0] == times[1] != exact.done_us["r"]
    assert times[0] == pytest.approx(exact.done_us["r"], rel=0.05)


def test_aborted_jobs_leave_nothing_behind() -> None:
    around = Alone()
    engine = around.engine()
    jobs = [job(f"r{i}", 4_000 + i, 100, i) for i in range(5)]
    for i, what in enumerate(jobs):
        submit_at(around, engine, i * 400_000, what)
        around.queue.at(i * 400_000 + 700_000, engine.abort, what)
    around.run(engine)
    assert engine.running == engine.waiting == len(engine.batch) == engine.cache.private_blocks == 0
    assert engine.cache.available_blocks == engine.cache.capacity_blocks
