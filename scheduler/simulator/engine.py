"""Ground truth of one instance: admission, chunked prefill, continuous batching, its KV cache. Pure.

The same rules as `engines/torch`: a request is admitted, first come first served, when all of it fits (prompt and
max_tokens in whole blocks; of a prefill leg the prompt); each step gives every decoding sequence a token and computes a
chunk of the prompts that are ready; blocks of ended requests stay as cache until others need the room.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from kvpool.core.ids import Role
from scheduler.core.events import DecodeSample, LinkSample, PrefillSample
from scheduler.simulator.batch import DecodeBatch, Record, duration_us, steps_begun
from scheduler.simulator.clock import EventQueue
from scheduler.simulator.hardware import Hardware
from scheduler.simulator.jobs import Job, Leg, Phase
from scheduler.simulator.memory import KvCache

#: Samples of each kind kept for the next report; more are dropped.
SAMPLES_MAX = 16


class Surroundings(Protocol):
    """What an engine asks of the pool and tells the gateway."""

    def admitted(self, engine: Engine, job: Job) -> bool:
        """Starts what brings blocks to the job; False if nothing has to come."""

    def computed(self, engine: Engine, job: Job, blocks: int, tail: bool) -> None:
        """The first `blocks` blocks of the prompt are there, and with `tail` all of it."""

    def cache_changed(self, engine: Engine, stored: list[int], removed: list[int]) -> None:
        """HBM has got blocks that others could reuse, or lost some."""

    def released(self, engine: Engine, job: Job) -> None:
        """Nothing more has to come for this job."""

    def first_token(self, engine: Engine, job: Job) -> None: ...

    def job_done(self, engine: Engine, job: Job, tokens: int, records: list[Record]) -> None:
        """All of the job is done. Args: tokens, records: decoded after the first token."""


@dataclass(slots=True)
class Samples:
    """Collected until the next report."""

    prefill: list[PrefillSample] = field(default_factory=list)
    decode: list[DecodeSample] = field(default_factory=list)
    links: list[LinkSample] = field(default_factory=list)
    finished_prefills: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Run:
    """Steps under way: one that computes chunks, or several that only decode."""

    begun_us: int
    steps: int
    first_us: float
    growth_us: float
    chunks: tuple[tuple[Job, int], ...]
    decodes: bool
    batch: int
    kv_tokens: int
    end_us: int = 0

    def set_end(self) -> None:
        self.end_us = self.begun_us - int(-duration_us(self.steps, self.first_us, self.growth_us) // 1)


@dataclass(slots=True)
class Busy:
    """Microseconds spent, and what for; a step with both is divided by tokens."""

    prefill_us: float = 0.0
    decode_us: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0


class Engine:
    """One life of one instance; after a crash a new one takes its name."""

    def __init__(
        self,
        instance_id: str,
        host: str,
        role: Role,
        hardware: Hardware,
        block_tokens: int,
        queue: EventQueue,
        surroundings: Surroundings,
        seed: str,
        noise_ratio: float,
        waiting_max: int,
    ) -> None:
        self.instance_id, self.host, self.role, self.hardware = instance_id, host, role, hardware
        self.block_tokens = block_tokens
        self.cache = KvCache(hardware.kv_tokens // block_tokens)
        self.batch = DecodeBatch()
        self.slow_factor = 1.0  # by a fault
        self.clock_factor = 1.0  # of this host's clock, by a fault
        self.dead = False
        self.busy = Busy()
        self.samples = Samples()
        self._queue, self._around = queue, surroundings
        self._random = Random(seed)
        self._noise_ratio, self._waiting_max = noise_ratio, waiting_max
        self._waiting: deque[Job] = deque()
        self._admitted: dict[Job, None] = {}
        self._ready: dict[Job, None] = {}
        self._joining: dict[Job, None] = {}
        self._run: Run | None = None
        self._plan_due = False

    # ------------------------------------------------------------ asked from outside

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._admitted)

    @property
    def kv_tokens_free(self) -> int:
        return self.cache.available_blocks * self.block_tokens

    def jobs(self) -> list[Job]:
        return [*self._waiting, *self._admitted]

    def submit(self, job: Job) -> bool:
        """Takes a job, or refuses it: too many wait, or it can never fit."""
        if self.dead or len(self._waiting) >= self._waiting_max or job.room_blocks > self.cache.capacity_blocks:
            return False
        job.submitted_us = self._queue.now_us
        job.phase = Phase.WAITING
        self._waiting.append(job)
        self._admit()
        self._wake()
        return True

    def blocks_came(self, job: Job, blocks: int, tokens: int) -> None:
        """The prompt's first `blocks` blocks are in HBM, `tokens` tokens of KV in all; computing goes on elsewhere."""
        if job.phase is not Phase.PULLING:
            return
        job.pulled_blocks = blocks - job.own_blocks
        self._have(job, tokens)

    def pulling_over(self, job: Job) -> None:
        """No more blocks come: what is missing is computed here."""
        if job.phase is Phase.PULLING:
            self._pulled(job)
            self._wake()

    def _pulled(self, job: Job) -> None:
        job.ready_us = self._queue.now_us
        if job.leg is not Leg.PREFILL:
            job.exported_blocks = job.kv_tokens // self.block_tokens
        if job.tokens_left:
            job.phase = Phase.READY
            self._ready[job] = None
        else:
            self._complete(job)

    def first_token_known(self, job: Job, made_us: int) -> None:
        """Of a decode leg: its prefill leg has made the first token."""
        if job.phase is Phase.ENDED or job.first_token_us is not None:
            return
        job.first_token_us = made_us
        if job.phase is Phase.COMPLETE:
            self._join(job)
            self._wake()

    def abort(self, job: Job) -> tuple[int, list[Record]]:
        """Forgets a job; tokens decoded up to now and the times between them."""
        if job.phase is Phase.ENDED:
            return 0, []
        if job.phase in (Phase.NEW, Phase.WAITING):
            if job.phase is Phase.WAITING:
                self._waiting.remove(job)
            job.phase = Phase.ENDED
            self._around.released(self, job)
            return 0, []
        decoded = (0, []) if job.phase is not Phase.DECODING else self.batch.leave(job)
        self._drop(job)
        self._admit()
        self._wake()
        return decoded

    def decoded(self, job: Job) -> tuple[int, list[Record]]:
        """Tokens decoded after the first one and the times between them, of a job on an engine that has crashed."""
        return self.batch.leave(job) if job.phase is Phase.DECODING else (0, [])

    def crash(self) -> None:
        """The process is gone, with all it held. What it decoded up to now was sent."""
        run = self._run
        if run is not None and run.decodes:
            begun = steps_begun(self._queue.now_us - run.begun_us, run.first_us, run.growth_us, run.steps)
            if begun > 1:
                self.batch.advance(begun - 1, run.first_us, run.growth_us)
        self._run = None
        self.dead = True

    # ------------------------------------------------------------ admission

    def _admit(self) -> None:
        while self._waiting and len(self._admitted) < self.hardware.batch_max:
            job = self._waiting[0]
            own = self.cache.match(job.block_ids[: job.usable_blocks])
            reused = job.block_ids[:own]
            evicted = self.cache.admit(reused, job.room_blocks - own)
            if evicted is None:
                return
            self._waiting.popleft()
            if evicted:
                self._around.cache_changed(self, [], evicted)
            job.own_blocks = own
            job.held = list(reused)
            job.private_blocks = job.room_blocks - own
            job.kv_tokens = own * self.block_tokens
            job.admitted_us = self._queue.now_us
            job.phase = Phase.PULLING
            self._admitted[job] = None
            if not self._around.admitted(self, job):
                self._pulled(job)

    def _drop(self, job: Job) -> None:
        """Gives back what a job holds."""
        job.phase = Phase.ENDED
        del self._admitted[job]
        self._ready.pop(job, None)
        self._joining.pop(job, None)
        self.cache.release(job.held, job.private_blocks)
        self._around.released(self, job)

    # ------------------------------------------------------------ steps

    def _wake(self) -> None:
        """Something changed: steps that were foreseen without it end with the one under way."""
        run = self._run
        if run is None:
            if not self._plan_due:
                self._plan_due = True  # with whatever else comes in this microsecond
                self._queue.after(0, self._plan)
        elif run.steps > 1:
            elapsed_us = self._queue.now_us - run.begun_us
            steps = steps_begun(elapsed_us, run.first_us, run.growth_us, run.steps)
            if steps < run.steps:
                run.steps = steps
                run.set_end()
                self._queue.at(max(run.end_us, self._queue.now_us), self._run_over, run, run.steps)

    def _plan(self) -> None:
        self._plan_due = False
        if self.dead or self._run is not None:
            return
        self._take_joining()
        now_us, batch = self._queue.now_us, len(self.batch)
        factor = self.slow_factor * (1.0 + self._noise_ratio * (2.0 * self._random.random() - 1.0))
        chunks = self._chunks()
        if chunks:
            decodes = batch > 0 and self._budget() > 0
            parts = [(tokens, job.kv_tokens) for job, tokens in chunks]
            kv_tokens = self.batch.kv_tokens if decodes else 0
            first_us = factor * self.hardware.step_duration_us(parts, batch if decodes else 0, kv_tokens)
            run = Run(now_us, 1, first_us, 0.0, chunks, decodes, batch, kv_tokens)
        elif batch:
            first_us = factor * self.hardware.decode_step_us(batch, self.batch.kv_tokens)
            growth_us = factor * self.hardware.decode_token_us * batch
            steps = self.batch.steps_to_next_end()
            run = Run(now_us, steps, first_us, growth_us, (), True, batch, self.batch.kv_tokens)
        else:
            return
        run.set_end()
        self._run = run
        self._queue.at(run.end_us, self._run_over, run, run.steps)

    def _budget(self) -> int:
        """Prompt tokens of one step; 0 = one whole prompt, and nobody decodes meanwhile."""
        if self.role is Role.PREFILL:
            return self.hardware.prefill_chunk_tokens
        return self.hardware.chunk_tokens

    def _chunks(self) -> tuple[tuple[Job, int], ...]:
        budget = self._budget()
        if not budget:
            job = next(iter(self._ready), None)
            return () if job is None else ((job, job.tokens_left),)
        chunks = []
        for job in self._ready:
            tokens = min(budget, job.tokens_left)
            chunks.append((job, tokens))
            budget -= tokens
            if not budget:
                break
        return tuple(chunks)

    def _run_over(self, run: Run, steps: int) -> None:
        if run is not self._run or steps != run.steps:
            return
        self._run = None
        self._count(run)
        if run.decodes:
            for job in self.batch.advance(run.steps, run.first_us, run.growth_us):
                tokens, records = self.batch.leave(job)
                self._drop(job)
                self._around.job_done(self, job, tokens, records)
        else:
            self.batch.stand_still(run.first_us)
        for job, tokens in run.chunks:
            if job.phase is Phase.READY:
                job.computed_tokens += tokens
                self._have(job, job.kv_tokens + tokens)
                if not job.tokens_left:
                    del self._ready[job]
                    self._complete(job)
        self._admit()
        self._plan()

    def _count(self, run: Run) -> None:
        """Divides a run's time by tokens, and keeps a sample of pure decoding."""
        total_us = duration_us(run.steps, run.first_us, run.growth_us)
        new = sum(tokens for _, tokens in run.chunks)
        decoded = run.batch * run.steps if run.decodes else 0
        for job, tokens in run.chunks:
            job.share_us += total_us * tokens / (new + decoded)
        self.busy.prefill_us += total_us * new / (new + decoded)
        self.busy.decode_us += total_us * decoded / (new + decoded)
        self.busy.prefill_tokens += new
        self.busy.decode_tokens += decoded
        if not new:
            self._sample_decode(run, run.steps - 1)

    def _sample_decode(self, run: Run, step: int) -> None:
        if len(self.samples.decode) < SAMPLES_MAX:
            measured_us = (run.first_us + run.growth_us * step) * self.clock_factor
            kv_tokens = run.kv_tokens + run.batch * step
            self.samples.decode.append(DecodeSample(run.batch, kv_tokens, int(measured_us)))

    # ------------------------------------------------------------ progress of a job

    def _have(self, job: Job, kv_tokens: int) -> None:
        """KV of the prompt's first `kv_tokens` tokens is here: full blocks of it can be found."""
        before = job.kv_tokens // self.block_tokens
        job.kv_tokens = kv_tokens
        full = min(kv_tokens // self.block_tokens, len(job.block_ids))
        stored = []
        for block in job.block_ids[before:full]:
            if self.cache.commit(block):
                job.held.append(block)
                job.private_blocks -= 1
                stored.append(block)
        if stored:
            self._around.cache_changed(self, stored, [])
        if job.phase is Phase.READY or job.leg is Leg.PREFILL:
            self._around.computed(self, job, full, not job.tokens_left)

    def _complete(self, job: Job) -> None:
        """All KV of the prompt is here."""
        now_us = self._queue.now_us
        job.prefilled_us = now_us
        if job.computed_tokens:
            cached = job.prompt_tokens - job.computed_tokens
            if len(self.samples.prefill) < SAMPLES_MAX:
                duration = int(job.share_us * self.clock_factor)
                self.samples.prefill.append(PrefillSample(job.computed_tokens, cached, duration))
        if job.leg is Leg.DECODE:
            job.phase = Phase.COMPLETE
            if job.first_token_us is not None:
                self._join(job)
            return
        self.samples.finished_prefills.append(job.request_id)
        job.first_token_us = now_us
        over = job.leg is Leg.PREFILL or job.output_tokens == 1
        if over:
            self._drop(job)
        else:
            self._join(job)
        self._around.first_token(self, job)
        if over:
            self._around.job_done(self, job, 0, [])

    def _join(self, job: Job) -> None:
        """It decodes from the next step on: those of the run under way belong to others."""
        job.phase = Phase.COMPLETE
        self._joining[job] = None

    def _take_joining(self) -> None:
        for job in self._joining:
            assert job.first_token_us is not None
            job.phase = Phase.DECODING
            self.batch.join(job, job.output_tokens - 1, float(self._queue.now_us - job.first_token_us))
        self._joining.clear()

    # ------------------------------------------------------------ reports and checks

    def take_samples(self) -> Samples:
        """What was measured since the last report, the step under way included."""
        run = self._run
        if run is not None and not run.chunks:
            elapsed_us = self._queue.now_us - run.begun_us
            step = steps_begun(elapsed_us, run.first_us, run.growth_us, run.steps) - 1
            if step:
                self._sample_decode(run, step - 1)
        samples, self.samples = self.samples, Samples()
        return samples

    def check_invariants(self) -> None:
        self.cache.check_invariants()
        self.batch.check_invariants()
        jobs = list(self._admitted)
        assert self.cache.private_blocks == sum(job.private_blocks for job in jobs)
        assert all(len(job.held) + job.private_blocks == job.room_blocks for job in jobs)
        assert len(self._admitted) <= self.hardware.batch_max and len(self._waiting) <= self._waiting_max
        for job in jobs:
            assert (job.phase is Phase.READY) == (job in self._ready)
            assert 0 <= job.kv_tokens <= job.prompt_tokens
