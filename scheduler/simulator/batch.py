"""The sequences that decode on an engine: token by token in closed form. Pure.

Between two changes of the batch, steps take an arithmetic progression of times: each adds one KV token a sequence. So
many steps are one record, and what each request saw between its tokens is read off the records when it leaves.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.simulator.jobs import Job

#: (steps, time of the first, growth of each next one), microseconds. No steps: everybody waited that long.
Record = tuple[int, float, float]


def duration_us(steps: int, first_us: float, growth_us: float) -> float:
    """Of so many steps."""
    return steps * first_us + growth_us * (steps * (steps - 1) / 2)


def steps_begun(elapsed_us: float, first_us: float, growth_us: float, steps_max: int) -> int:
    """Steps of a progression that are over or under way after some time; at least one."""
    low, high = 1, steps_max
    while low < high:
        middle = (low + high) // 2
        if duration_us(middle, first_us, growth_us) >= elapsed_us:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(slots=True)
class _Member:
    order: int
    joined_step: int
    first_record: int
    waited_us: float  # since its first token, before it joined


class DecodeBatch:
    """Who decodes, how many KV tokens that are, and when the next one ends."""

    def __init__(self) -> None:
        self.kv_tokens = 0
        self._steps = 0
        self._members: dict[Job, _Member] = {}  # in order of joining
        self._ends: list[tuple[int, int, Job]] = []  # (step, order, who)
        self._order = 0
        self._records: list[Record] = []
        self._dropped = 0  # records before the first one kept

    def __len__(self) -> int:
        return len(self._members)

    def join(self, job: Job, tokens: int, waited_us: float) -> None:
        """A sequence with its first token made wants `tokens` more."""
        assert tokens > 0 and job not in self._members
        self._order += 1
        first_record = self._dropped + len(self._records)
        self._members[job] = _Member(self._order, self._steps, first_record, waited_us)
        heapq.heappush(self._ends, (self._steps + tokens, self._order, job))
        self.kv_tokens += job.prompt_tokens + 1

    def steps_to_next_end(self) -> int:
        """Steps after which the first of the sequences is done."""
        while not self._awaited(self._ends[0]):
            heapq.heappop(self._ends)
        return self._ends[0][0] - self._steps

    def _awaited(self, end: tuple[int, int, Job]) -> bool:
        """Whether an end is that of a member; others left before theirs."""
        member = self._members.get(end[2])
        return member is not None and member.order == end[1]

    def advance(self, steps: int, first_us: float, growth_us: float) -> list[Job]:
        """Everybody has got a token in each step; who is done now. They are still members."""
        self._records.append((steps, first_us, growth_us))
        self._steps += steps
        self.kv_tokens += steps * len(self._members)
        done = []
        while self._ends and self._ends[0][0] <= self._steps:
            end = heapq.heappop(self._ends)
            if self._awaited(end):
                done.append(end[2])
        return done

    def stand_still(self, waited_us: float) -> None:
        """A step in which nobody got a token."""
        if self._members:
            self._records.append((0, waited_us, 0.0))

    def leave(self, job: Job) -> tuple[int, list[Record]]:
        """Tokens made here after the first one, and the records of the times between them."""
        member = self._members.pop(job)
        tokens = self._steps - member.joined_step
        self.kv_tokens -= job.prompt_tokens + 1 + tokens
        records = self._records[member.first_record - self._dropped :]
        if member.waited_us:
            records.insert(0, (0, member.waited_us, 0.0))
        self._forget()
        return tokens, records

    def tokens_of(self, job: Job) -> int:
        """Made here after the first one, up to the last whole run of steps."""
        return self._steps - self._members[job].joined_step

    def _forget(self) -> None:
        """Drops records that no member needs any more."""
        oldest = next(iter(self._members.values()), None)
        first = self._dropped + len(self._records) if oldest is None else oldest.first_record
        if first - self._dropped > 1024 or oldest is None:
            del self._records[: first - self._dropped]
            self._dropped = first

    def check_invariants(self) -> None:
        made = (job.prompt_tokens + 1 + self._steps - m.joined_step for job, m in self._members.items())
        assert self.kv_tokens == sum(made)


def intervals_us(records: Sequence[Record], count_max: int | None = None) -> list[float]:
    """Times between tokens, in order. Args: count_max: of each record only so many of its longest ones."""
    out: list[float] = []
    waited_us = 0.0
    for steps, first_us, growth_us in records:
        if not steps:
            waited_us += first_us
            continue
        out.append(waited_us + first_us)
        waited_us = 0.0
        begin = 1 if count_max is None else max(1, steps - count_max)
        out.extend(first_us + growth_us * i for i in range(begin, steps))
    return out


def longest_tenth_us(records: Sequence[Record]) -> float:
    """TBT as FAST'25 has it: the mean of the longest tenth, rounded up, of a request's intervals; 0 if it has none."""
    total = sum(steps for steps, _, _ in records)
    if not total:
        return 0.0
    count = math.ceil(total / 10)
    longest = sorted(intervals_us(records, count), reverse=True)[:count]
    return sum(longest) / count
