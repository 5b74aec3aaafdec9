"""Hand-offs of split requests: blocks travel while later ones are computed. Ground truth; pure.

The prefill instance publishes each chunk's blocks to its node, the partial last one with the last chunk; the decode
instance takes them from there, one transfer at a time, each with all that has been published meanwhile. Blocks of a
hand-off are not evicted before it is over. What has not come a while after the first token is computed where it is
needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.simulator.engine import Engine
from scheduler.simulator.jobs import Job
from scheduler.simulator.links import Transfer
from scheduler.simulator.pool import Node, Pool


@dataclass(slots=True, eq=False)
class _Handoff:
    node: Node
    block_ids: tuple[int, ...]
    tail_bytes: int
    published_blocks: int = 0
    published_all: bool = False
    broken: bool = False
    engine: Engine | None = None
    job: Job | None = None
    came_blocks: int = 0
    transfer: Transfer | None = None


class Handoffs:
    """All hand-offs under way, by request and attempt."""

    def __init__(self, pool: Pool, wait_us: int) -> None:
        self._pool, self._wait_us = pool, wait_us
        self._handoffs: dict[tuple[str, int], _Handoff] = {}

    def open(self, job: Job, host: str) -> None:
        """A split request has been placed; blocks of its decode leg will come through the node of `host`."""
        pool = self._pool
        tail_tokens = job.prompt_tokens - len(job.block_ids) * pool.block_tokens
        node = pool.nodes[host]
        tail_bytes = tail_tokens * pool.hardware.kv_token_bytes
        self._handoffs[job.request_id, job.attempt] = _Handoff(node, job.block_ids, tail_bytes)
        node.store.pin(job.block_ids)

    def close(self, job: Job) -> None:
        """It is over, one way or another."""
        handoff = self._handoffs.pop((job.request_id, job.attempt), None)
        if handoff is None:
            return
        handoff.node.store.unpin(handoff.block_ids)
        if handoff.transfer is not None:
            self._pool.fabric.cancel(handoff.transfer)

    def export(self, engine: Engine, job: Job, blocks: int, tail: bool) -> None:
        """The prefill instance has the prompt's first `blocks` blocks, with `tail` all of it: publishes what is new."""
        handoff = self._handoffs.get((job.request_id, job.attempt))
        first, job.exported_blocks = job.exported_blocks, blocks

        def published(there: bool) -> None:
            if handoff is None or handoff.broken:
                return
            if there:
                handoff.published_blocks = max(handoff.published_blocks, blocks)
                handoff.published_all = handoff.published_all or tail
            handoff.broken = not there
            self._advance(handoff)

        tail_bytes = handoff.tail_bytes if tail and handoff is not None else 0
        self._pool.publish(engine, job.block_ids[first:blocks], tail_bytes, published)

    def wanted(self, engine: Engine, job: Job) -> bool:
        """The decode instance has room and waits for blocks; False if none will come."""
        handoff = self._handoffs.get((job.request_id, job.attempt))
        if handoff is None or handoff.broken or handoff.node.dead:
            return False
        handoff.engine, handoff.job, handoff.came_blocks = engine, job, job.own_blocks
        self._advance(handoff)
        return True

    def first_token(self, job: Job) -> None:
        """From now on the decode instance waits only so long."""
        self._pool.queue.after(self._wait_us, self._give_up, job)

    def _give_up(self, job: Job) -> None:
        handoff = self._handoffs.get((job.request_id, job.attempt))
        if handoff is None or handoff.job is not job or handoff.engine is None:
            return
        if handoff.transfer is not None:
            self._pool.fabric.cancel(handoff.transfer)
            moved = int(handoff.transfer.moved_bytes) // self._pool.block_bytes
            handoff.transfer = None
            if moved:
                self._take(handoff, min(handoff.came_blocks + moved, len(handoff.block_ids)), False)
        self._end(handoff, job)

    def _advance(self, handoff: _Handoff) -> None:
        """Starts the next transfer if there is something to move, or ends the hand-off."""
        engine, job = handoff.engine, handoff.job
        if engine is None or job is None or handoff.transfer is not None:
            return
        pool = self._pool
        upto = handoff.published_blocks
        with_tail = handoff.published_all
        size_bytes = max(upto - handoff.came_blocks, 0) * pool.block_bytes + (handoff.tail_bytes if with_tail else 0)
        if handoff.broken or handoff.node.dead:
            job.pull_failures += 1
            self._end(handoff, job)
        elif size_bytes:
            self._move(handoff, engine, job, upto, with_tail, size_bytes)
        elif with_tail:
            self._take(handoff, len(handoff.block_ids), True)
            self._end(handoff, job)

    def _move(self, handoff: _Handoff, engine: Engine, job: Job, upto: int, with_tail: bool, size_bytes: int) -> None:
        def ended(transfer: Transfer, failed: bool) -> None:
            handoff.transfer = None
            if failed:
                handoff.broken = True
            else:
                job.bytes_pulled += transfer.size_bytes
                self._take(handoff, max(upto, handoff.came_blocks), with_tail)
                if with_tail:
                    self._end(handoff, job)
                    return
            self._advance(handoff)

        handoff.transfer = self._pool.move(handoff.node.node_id, size_bytes, engine, ended)

    def _take(self, handoff: _Handoff, upto: int, whole: bool) -> None:
        engine, job = handoff.engine, handoff.job
        assert engine is not None and job is not None
        handoff.came_blocks = upto
        tokens = job.prompt_tokens if whole else upto * self._pool.block_tokens
        engine.blocks_came(job, upto, max(tokens, job.kv_tokens))

    def _end(self, handoff: _Handoff, job: Job) -> None:
        engine = handoff.engine
        assert engine is not None
        self.close(job)
        engine.pulling_over(job)

    def __len__(self) -> int:
        return len(self._handoffs)
