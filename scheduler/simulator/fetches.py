"""Pulls of planned runs of blocks into an engine, before it computes the rest of a prompt. Ground truth; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.core.commands import PullRun
from scheduler.simulator.engine import Engine
from scheduler.simulator.jobs import Job
from scheduler.simulator.links import Transfer
from scheduler.simulator.pool import Pool


@dataclass(slots=True)
class _Part:
    """Blocks from `first` to before `end`, from one source."""

    first: int
    end: int
    came: bool = False


@dataclass(slots=True, eq=False)
class _Fetch:
    engine: Engine
    job: Job
    under_way: int = 0
    parts: list[_Part] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)


class Fetches:
    """All pulls under way. A plan is a hint: what its sources no longer have is computed."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._fetches: dict[Job, _Fetch] = {}

    def start(self, engine: Engine, job: Job, plan: Sequence[PullRun]) -> bool:
        """Starts pulling what a plan says and the engine lacks, all sources at a time; False if there is nothing."""
        fetch = _Fetch(engine, job)
        at = job.own_blocks
        for run in sorted(plan, key=lambda r: (r.first, r.source_id)):
            first, end = max(run.first, at), min(run.first + run.count, job.usable_blocks)
            if first != at or end <= first:
                continue
            count = self._pool.readable(run.source_id, job.block_ids[first:end], engine)
            if count:
                self._begin(fetch, run.source_id, _Part(first, first + count))
                at = first + count
            if count < end - first:
                job.pull_failures += 1
                break
        if not fetch.parts:
            return False
        self._fetches[job] = fetch
        return True

    def _begin(self, fetch: _Fetch, source_id: str, part: _Part) -> None:
        def ended(transfer: Transfer, failed: bool) -> None:
            part.came = not failed
            fetch.under_way -= 1
            fetch.job.pull_failures += failed
            fetch.job.bytes_pulled += 0 if failed else transfer.size_bytes
            if not fetch.under_way:
                self._over(fetch)

        fetch.parts.append(part)
        fetch.under_way += 1
        size_bytes = (part.end - part.first) * self._pool.block_bytes
        fetch.transfers.append(self._pool.move(source_id, size_bytes, fetch.engine, ended))

    def _over(self, fetch: _Fetch) -> None:
        job = fetch.job
        del self._fetches[job]
        reach = job.own_blocks
        for part in fetch.parts:
            if not part.came:
                break
            reach = part.end
        if reach > job.own_blocks:
            fetch.engine.blocks_came(job, reach, reach * self._pool.block_tokens)
        fetch.engine.pulling_over(job)

    def drop(self, job: Job) -> None:
        """Nobody waits for a job's blocks any more."""
        fetch = self._fetches.pop(job, None)
        if fetch is not None:
            for transfer in fetch.transfers:
                self._pool.fabric.cancel(transfer)

    def __len__(self) -> int:
        return len(self._fetches)
