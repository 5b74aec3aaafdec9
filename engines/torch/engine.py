"""The local engine: continuous batching, chunked prefill, prefix reuse, and blocks that others fill or read.

`submit`, `abort` and the other entries only change state; `step` computes. One thread calls all of it. I/O happens
elsewhere: `take_pulls` names blocks to fill, `take_exports` blocks to publish, both lent until they are given back.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from engines.torch import batching, limits
from engines.torch.attention import Chunk
from engines.torch.cache import BlockPool
from engines.torch.limits import EngineConfig
from engines.torch.metering import Meter
from engines.torch.model import LoadedModel
from engines.torch.request import BlockSet, Finish, Load, Phase, Request, Samples, StepEvent
from engines.torch.sampling import Draw, Drawn, sample
from engines.torch.sequence import Sequence as Running
from engines.torch.sequence import State
from kvpool.core.errors import BadArgument, Overloaded, UnknownRequest
from kvpool.core.ids import KeyArray, unpack_keys

#: Part of cache and batch that requests without their first token may hold together.
WAITING_SHARE = 0.5


def monotonic_us() -> int:
    return time.monotonic_ns() // 1000


class Engine:
    """Computes requests on one model. Not thread-safe."""

    def __init__(
        self, model: LoadedModel, config: EngineConfig | None = None, clock_us: Callable[[], int] = monotonic_us
    ) -> None:
        config = config or EngineConfig()
        config.validate()
        self.model, self.config = model, config
        self.namespace = model.namespace(config.block_tokens, exact=config.deterministic, hash_name=config.block_hash)
        self.pool = BlockPool(config.block_count)
        self.cache = model.new_cache(self.pool.block_count, config.block_tokens)
        self._clock_us = clock_us
        self._waiting: deque[Running] = deque()
        self._admitted: dict[str, Running] = {}  # in order of admission
        self._by_id: dict[str, Running] = {}
        self._events: list[StepEvent] = []
        self._pulls: list[BlockSet] = []
        self._exports: list[BlockSet] = []
        self._lent: dict[int, BlockSet] = {}
        self._meter = Meter()

    # ---------------------------------------------------------------- entries

    def submit(self, request: Request) -> None:
        """Takes a request in.

        Raises: BadArgument for a request that can't be right, Overloaded if the queue is full, KvpoolError with
            CONTEXT_TOO_LONG or NO_CAPACITY if it can never fit.
        """
        # A name is free once its end was told: events know requests by name only.
        taken = request.id in self._by_id or any(event.request_id == request.id for event in self._events)
        limits.check(request, self.config, self.model, taken)
        if len(self._waiting) >= self.config.waiting_max:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already", hint="try again later")
        sequence = Running(request, self.config.block_tokens, self._clock_us(), self.config.block_hash)
        self._by_id[request.id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str, finish: Finish = Finish.ABORT, error: str = "") -> bool:
        """Ends a request now. False if it is not here (any more)."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence, finish, error=error)
        return True

    def first_token(self, request_id: str, token: int) -> None:
        """The first token of a DECODE request, drawn elsewhere. Given twice, it must be the same.

        Raises: UnknownRequest, BadArgument.
        """
        sequence = self._by_id.get(request_id)
        if sequence is None:
            raise UnknownRequest(f"no request {request_id}")
        if sequence.request.phase is not Phase.DECODE or not 0 <= token < self.model.vocabulary_size:
            raise BadArgument("first_token needs a DECODE request and a token of the vocabulary")
        if sequence.generated:
            return
        sequence.append(token)
        finish = self._finish_reason(sequence, token)
        if finish is not Finish.NONE:
            self._finish(sequence, finish)

    def blocks_arrived(self, pull: BlockSet, count: int, byte_count: int = 0) -> None:
        """The first `count` blocks of a pull hold their content. Counts only grow."""
        sequence = self._by_id.get(pull.request_id)
        if sequence is None or sequence.pull is not pull:
            return
        everything = count == len(pull.blocks)
        tokens = (pull.first + count) * self.config.block_tokens
        if everything and pull.tail_tokens:
            tokens += pull.tail_tokens - self.config.block_tokens
        sequence.times.cached_tokens_pool += tokens - sequence.computed
        sequence.times.bytes_pulled += byte_count
        sequence.computed = tokens
        self._register_full(sequence)
        self._export(sequence)

    def pull_ended(self, pull: BlockSet) -> None:
        """Gives a pull's blocks back: nobody writes to them any more. What has not arrived is computed."""
        self._take_back(pull)
        sequence = self._by_id.get(pull.request_id)
        if sequence is None or sequence.pull is not pull:
            return
        arrived = -(-sequence.computed // self.config.block_tokens) - pull.first
        sequence.times.pull_failures += len(pull.blocks) - arrived
        sequence.pull = None
        # What came of the others was not verified.
        self._wipe(pull.blocks[arrived:].tolist())
        sequence.running_us = self._clock_us()
        sequence.times.pull_us = sequence.running_us - sequence.admitted_us
        sequence.state = State.RUNNING
        if sequence.request.phase is not Phase.PREFILL:
            sequence.exported = sequence.computed // self.config.block_tokens
        self._export(sequence)

    def export_ended(self, export: BlockSet) -> None:
        """Gives an export's blocks back, or what `lend_cached` lent: nobody reads them any more."""
        self._take_back(export)

    def lend_cached(self, keys: Sequence[bytes]) -> BlockSet:
        """Lends those blocks of the prefix cache that are there, for reading; ends with `export_ended`."""
        found = self.pool.lendable(keys)
        blocks = np.fromiter(found.values(), dtype=np.int64, count=len(found))
        return self._lend_blocks(BlockSet("", 0, unpack_keys(b"".join(found)), blocks))

    # ---------------------------------------------------------------- step

    def step(self) -> list[StepEvent]:
        """Admits what fits, computes one batch, and returns what happened since the last step."""
        now_us = self._clock_us()
        self._expire(now_us)
        self._admit(now_us)
        running = list(self._admitted.values())
        plan = batching.schedule(self._runnable(running), self.config.chunk_tokens, self.config.batch_max)
        if plan.pieces:
            self._compute(running, plan)
        events, self._events = self._events, []
        return events

    def has_work(self) -> bool:
        """Whether `step` would compute or return something now."""
        return (
            bool(self._events)
            or self._next_admitted() is not None
            or bool(self._runnable(list(self._admitted.values())))
        )

    def next_deadline_us(self) -> int | None:
        """When `step` has to be called for the sake of deadlines."""
        return min((s.request.deadline_us for s in self._by_id.values() if s.request.deadline_us), default=None)

    def take_pulls(self) -> list[BlockSet]:
        """Blocks to fill; each ends with `pull_ended`."""
        pulls, self._pulls = self._pulls, []
        return pulls

    def take_exports(self) -> list[BlockSet]:
        """Finished blocks to publish, in order for each request; each ends with `export_ended`."""
        exports, self._exports = self._exports, []
        return exports

    def take_samples(self) -> Samples:
        return self._meter.take()

    def take_changes(self) -> list[tuple[bool, bytes]]:
        """(stored or removed, key) of the prefix cache since the last call, in order."""
        return self.pool.take_changes()

    def cached_keys(self) -> KeyArray:
        return self.pool.cached_keys()

    def load(self) -> Load:
        tokens = self.config.block_tokens
        return Load(
            running=len(self._admitted),
            waiting=len(self._waiting),
            kv_tokens_free=self.pool.available * tokens,
            kv_tokens_total=self.pool.block_count * tokens,
        )

    def check_invariants(self) -> None:
        self.pool.check_invariants()
        held = [0] * self.pool.block_count
        for sequence in self._admitted.values():
            assert sequence.computed <= sequence.known
            assert sequence.computed <= len(sequence.blocks) * self.config.block_tokens
            for block in sequence.blocks:
                held[block] += 1
        for lent in self._lent.values():
            for block in lent.blocks.tolist():
                held[block] += 1
        self.pool.check_references(held, sum(s.promised for s in self._admitted.values()))
        assert all(not s.blocks and not s.promised for s in self._waiting)
        assert len(self._by_id) == len(self._waiting) + len(self._admitted)

    # ---------------------------------------------------------------- admission

    def _fits(self, sequence: Running) -> list[int] | None:
        """Cached blocks that the sequence can begin with, or None while it has to wait."""
        if len(self._admitted) >= self.config.batch_max:
            return None
        hits = self.pool.match(sequence.keys[: sequence.blocks_reusable()])
        needed = sequence.blocks_worst() - len(hits) + self.pool.unreferenced(hits)
        return hits if needed <= self.pool.available else None

    def _next_admitted(self) -> tuple[Running, list[int]] | None:
        """Who is admitted next, and the cached blocks it begins with; None while the first one has to wait.

        Requests keep their order, but for those that wait for a token from elsewhere: they may hold only a share of the
        cache, else two instances that prefill for each other could each hold what the other needs.
        """
        for sequence in self._waiting:
            if sequence.waits_for_token and not self._within_share(sequence):
                continue
            hits = self._fits(sequence)
            return None if hits is None else (sequence, hits)
        return None

    def _within_share(self, sequence: Running) -> bool:
        held = [s.blocks_worst() for s in self._admitted.values() if s.waits_for_token]
        return (
            len(held) < self.config.batch_max * WAITING_SHARE
            and sum(held) + sequence.blocks_worst() <= self.pool.block_count * WAITING_SHARE
        )

    def _admit(self, now_us: int) -> None:
        while (admitted := self._next_admitted()) is not None:
            sequence, hits = admitted
            self._waiting.remove(sequence)
            self.pool.acquire(hits)
            sequence.promised = sequence.blocks_worst() - len(hits)
            self.pool.promise(sequence.promised)
            sequence.blocks = hits
            sequence.registered = len(hits)
            sequence.computed = len(hits) * self.config.block_tokens
            sequence.times.cached_tokens_hbm = sequence.computed
            sequence.admitted_us = sequence.running_us = now_us
            sequence.times.queue_us = now_us - sequence.arrived_us
            self._admitted[sequence.request.id] = sequence
            sequence.state = State.RUNNING
            if sequence.request.phase is not Phase.PREFILL:
                sequence.exported = len(hits)
            self._begin_pull(sequence)
            self._export(sequence)

    def _begin_pull(self, sequence: Running) -> None:
        """Lends the blocks that somebody may fill, where there are any beyond the sequence's own hits."""
        request, size = sequence.request, self.config.block_tokens
        full = min(request.pull_tokens // size, sequence.blocks_reusable())
        tail = sequence.prompt_tokens % size
        takes_tail = bool(tail) and request.phase is Phase.DECODE and request.pull_tokens >= sequence.prompt_tokens
        first = len(sequence.blocks)
        end = full + takes_tail
        if end <= first:
            return
        self._grow(sequence, end * size)
        keys = sequence.packed_keys(first, full, takes_tail)
        pull = self._lend(sequence, first, end, keys, tail if takes_tail else 0)
        sequence.pull = pull
        sequence.state = State.PULLING
        self._pulls.append(pull)

    def _grow(self, sequence: Running, tokens: int) -> list[int]:
        """Allocates blocks so that `tokens` tokens have room. Returns the new ones; they hold anything."""
        begin = len(sequence.blocks)
        while len(sequence.blocks) * self.config.block_tokens < tokens:
            sequence.blocks.append(self.pool.allocate())
            sequence.promised -= 1
        return sequence.blocks[begin:]

    def _wipe(self, blocks: list[int]) -> None:
        """Clears blocks before they are computed into: attention reads past the last token under a mask, and a nan
        there (an overflow of somebody else's, bytes that failed their digest) would still reach the result."""
        if blocks:
            self.cache[blocks] = 0

    # ---------------------------------------------------------------- computing

    def _runnable(self, running: Sequence[Running]) -> list[batching.Runnable]:
        return [
            batching.Runnable(i, s.computed, s.known, s.decoding)
            for i, s in enumerate(running)
            if s.state is State.RUNNING and s.computed < s.known
        ]

    def _compute(self, running: Sequence[Running], plan: batching.Plan) -> None:
        chunks: list[Chunk] = []
        token_ids: list[int] = []
        rows: list[int] = []
        drawing: list[Running] = []
        for piece in plan.pieces:
            sequence = running[piece.index]
            self._wipe(self._grow(sequence, piece.end))
            chunks.append(Chunk(piece.first, piece.count, sequence.blocks))
            token_ids.extend(sequence.tokens(piece.first, piece.end).tolist())
            if piece.end == sequence.known and sequence.samples:
                rows.append(len(token_ids) - 1)
                drawing.append(sequence)
        begun_us = self._clock_us()
        logits = self.model.forward(self.cache, chunks, token_ids, rows, exact=self.config.deterministic)
        drawn = sample(logits, [Draw(s.request.sampling, s.known) for s in drawing]) if drawing else []
        ended_us = self._clock_us()
        self._meter.step(running, plan, ended_us - begun_us)
        for piece in plan.pieces:
            sequence = running[piece.index]
            sequence.computed = piece.end
            self._register_full(sequence)
            if not sequence.prefill_over:
                self._export(sequence)
        for sequence, token in zip(drawing, drawn, strict=True):
            self._advance(sequence, token, ended_us)
        for piece in plan.pieces:
            self._meter.prefill_may_end(running[piece.index])

    def _advance(self, sequence: Running, drawn: Drawn, now_us: int) -> None:
        """Appends a drawn token and ends the request where it is due."""
        first = sequence.generated == 0
        if first:
            sequence.times.prefill_us = now_us - sequence.running_us
            self._meter.prefill_may_end(sequence)
        ends_prefill = sequence.prefill_over
        sequence.append(drawn.token)
        finish = self._finish_reason(sequence, drawn.token)
        if finish is Finish.NONE and sequence.request.phase is Phase.PREFILL:
            finish = Finish.HANDED_OFF
        if ends_prefill:
            self._export(sequence, with_tail=finish is Finish.HANDED_OFF)
        asked = sequence.request.sampling.logprobs
        event = StepEvent(
            sequence.request.id,
            (drawn.token,),
            finish,
            times=sequence.times if first or finish is not Finish.NONE else None,
            logprobs=(drawn.logprob,) if asked else (),
            top2_gaps=(drawn.top2_gap,) if asked else (),
        )
        self._events.append(event)
        if finish is not Finish.NONE:
            self._drop(sequence)

    def _finish_reason(self, sequence: Running, token: int) -> Finish:
        sampling = sequence.request.sampling
        ends = () if sampling.ignore_eos else self.model.eos_token_ids
        if token in sampling.stop_token_ids or token in ends:
            return Finish.STOP
        return Finish.LENGTH if sequence.generated >= sampling.max_tokens else Finish.NONE

    # ---------------------------------------------------------------- blocks out

    def _register_full(self, sequence: Running) -> None:
        full = min(sequence.computed // self.config.block_tokens, len(sequence.keys))
        for index in range(sequence.registered, full):
            self.pool.register(sequence.blocks[index], sequence.keys[index])
        sequence.registered = max(sequence.registered, full)

    def _export(self, sequence: Running, *, with_tail: bool = False) -> None:
        """Lends newly finished full blocks to the publisher, and the partial last one of a prompt where asked for."""
        size = self.config.block_tokens
        full = min(sequence.computed // size, len(sequence.keys))
        tail = sequence.prompt_tokens % size if with_tail else 0
        first, end = sequence.exported, full + bool(tail)
        if not sequence.request.publish or end <= first:
            return
        if sequence.state is State.PULLING and sequence.request.phase is not Phase.PREFILL:
            return  # what arrives from outside is published there already
        sequence.exported = full
        self._exports.append(self._lend(sequence, first, end, sequence.packed_keys(first, full, bool(tail)), tail))

    def _lend(self, sequence: Running, first: int, end: int, keys: bytes, tail: int) -> BlockSet:
        return self._lend_blocks(
            BlockSet(
                sequence.request.id,
                first,
                unpack_keys(keys),
                np.array(sequence.blocks[first:end], dtype=np.int64),
                tail,
                parent=sequence.keys[first - 1] if first else b"",
                following=unpack_keys(sequence.following_keys(self.config.chunk_tokens)),
            )
        )

    def _lend_blocks(self, lent: BlockSet) -> BlockSet:
        self.pool.acquire(lent.blocks.tolist())
        self._lent[id(lent)] = lent
        return lent

    def _take_back(self, lent: BlockSet) -> None:
        assert self._lent.pop(id(lent), None) is lent, "blocks given back twice"
        self.pool.release(lent.blocks.tolist())

    # ---------------------------------------------------------------- ends

    def _expire(self, now_us: int) -> None:
        late = [s for s in self._by_id.values() if s.request.deadline_us and s.request.deadline_us <= now_us]
        for sequence in late:
            self._finish(sequence, Finish.ERROR, error="the request's deadline passed")

    def _finish(self, sequence: Running, finish: Finish, error: str = "") -> None:
        self._events.append(StepEvent(sequence.request.id, (), finish, error, times=sequence.times))
        self._drop(sequence)

    def _drop(self, sequence: Running) -> None:
        """Forgets a request and everything that it holds. Lent blocks stay held until they are given back."""
        del self._by_id[sequence.request.id]
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
            return
        del self._admitted[sequence.request.id]
        self.pool.release(sequence.blocks)
        self.pool.unpromise(sequence.promised)
        sequence.blocks, sequence.promised = [], 0
