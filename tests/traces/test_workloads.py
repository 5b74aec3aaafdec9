"""Made-up traces: deterministic, consistent in themselves, and distributed as documented."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest

from kvpool.core.errors import BadArgument
from scheduler.simulator import workloads
from scheduler.simulator.columns import TraceRequest

KINDS = list(workloads.KINDS)


def by_session(kind: str, **more: object) -> dict[str, list[TraceRequest]]:
    sessions: dict[str, list[TraceRequest]] = defaultdict(list)
    for request in workloads.generate(kind, 1500, 2.0, seed=5, **more):  # type: ignore[arg-type]
        sessions[request.session].append(request)
    return sessions


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_trace(kind: str) -> None:
    first, second = (list(workloads.generate(kind, 300, 1.0, seed=7)) for _ in range(2))
    assert first == second
    assert first != list(workloads.generate(kind, 300, 1.0, seed=8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_tokens", [16, 512])
def test_requests_are_consistent(kind: str, block_tokens: int) -> None:
    trace = workloads.generate(kind, 500, 1.0, seed=1, block_tokens=block_tokens)
    assert len(trace) == 500
    parent: dict[int, int] = {}
    before_us = 0
    for request in trace:
        assert request.arrival_us >= before_us
        before_us = request.arrival_us
        assert len(request.hash_ids) == -(-request.prompt_tokens // block_tokens)
        # An id stands for everything up to its block: it always has the same one before it.
        for previous, block in itertools.pairwise((-1, *request.hash_ids)):
            assert parent.setdefault(block, previous) == previous


@pytest.mark.parametrize("kind", ["multi-turn", "agentic"])
def test_each_turn_goes_on_from_the_last(kind: str) -> None:
    turns = 0
    for requests in by_session(kind, block_tokens=16).values():
        for last, this in itertools.pairwise(requests):
            turns += 1
            said = last.prompt_tokens + last.output_tokens
            assert this.prompt_tokens > said
            full = last.prompt_tokens // 16
            assert this.hash_ids[:full] == last.hash_ids[:full]
            # Nobody goes on before the answer is there.
            assert this.arrival_us >= last.arrival_us + 1e6 * workloads.TOKEN_S * last.output_tokens
    assert turns > 500


def test_readers_of_one_document_share_it() -> None:
    sessions = by_session("long-document", parameters=workloads.LongDocument(documents=3, documents_zipf=0))
    firsts = [requests[0].hash_ids[0] for requests in sessions.values()]
    counts = np.unique(firsts, return_counts=True)[1]
    assert len(counts) == 3
    assert counts.min() > 0.25 * len(firsts)


def test_forks_share_their_context_and_come_at_once() -> None:
    parameters = workloads.Agentic(fork_probability=0.5, forks_min=4, forks_max=4)
    trace = workloads.generate("agentic", 800, 1.0, seed=3, parameters=parameters)
    at: dict[int, list[TraceRequest]] = defaultdict(list)
    for request in trace:
        at[request.arrival_us].append(request)
    bursts = [requests for requests in at.values() if len(requests) >= 4]
    assert bursts
    for requests in bursts:
        shortest = min(r.prompt_tokens for r in requests) // 512
        shared = [len(set(ids)) == 1 for ids in zip(*(r.hash_ids for r in requests), strict=False)]
        assert sum(shared) > shortest / 3


def test_distributions_are_as_documented() -> None:
    parameters = workloads.LongDocument(documents=4000, document_tokens_median=8000)
    trace = workloads.generate("long-document", 20_000, 5.0, seed=11, parameters=parameters)
    assert np.median(trace.output_tokens) == pytest.approx(350, rel=0.03)
    sizes = {r.hash_ids[0]: r.prompt_tokens for r in trace}
    assert np.median(list(sizes.values())) == pytest.approx(8000 + 60, rel=0.05)
    starts: dict[str, int] = {}
    counts: dict[str, int] = defaultdict(int)
    for request in trace:
        starts.setdefault(request.session, request.arrival_us)
        counts[request.session] += 1
    # Sessions of the first half have ended before the trace does.
    done = [count for session, count in counts.items() if starts[session] < trace.duration_us / 2]
    assert np.mean(done) == pytest.approx(3.0, rel=0.05)
    gaps = np.diff(list(starts.values()))
    assert gaps.mean() == pytest.approx(200_000, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential


@pytest.mark.parametrize(
    ("kind", "over", "problem"),
    [
        ("chatty", {}, "no kind of trace 'chatty'"),
        ("multi-turn", {"turns": "3"}, "no parameter 'turns'"),
        ("multi-turn", {"turns_mean": "many"}, "not a number"),
        ("multi-turn", {"turns_mean": "-1"}, "out of range"),
        ("multi-turn", {"turns_mean": "nan"}, "out of range"),
        ("multi-turn", {"system_prompts": "0"}, "out of range"),
        ("agentic", {"forks_min": "9"}, "less than forks_min"),
        ("agentic", {"fork_probability": "2"}, "out of range"),
    ],
)
def test_bad_parameters(kind: str, over: dict[str, str], problem: str) -> None:
    with pytest.raises(BadArgument, match=problem):
        workloads.parameters_of(kind, over)
