"""What is said of traces: exact LRU hit ratios against a plain cache, and the figures of the public traces."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.simulator import trace_stats
from scheduler.simulator.columns import Trace, TraceBuilder
from scheduler.simulator.stack_distance import stack_distances
from scheduler.simulator.traces import read_trace

#: Public traces are not part of the repository: `KVPOOL_TRACES`, or `shared/traces` in a folder above.
_FOLDERS = (os.environ.get("KVPOOL_TRACES", ""), *(p / "shared" / "traces" for p in Path(__file__).resolve().parents))
TRACES = next((Path(p) for p in _FOLDERS if p and Path(p).is_dir()), None)
needs_traces = pytest.mark.skipif(TRACES is None, reason="no public traces here; KVPOOL_TRACES names their folder")


def made(requests: Sequence[Sequence[int]], block_tokens: int = 4) -> Trace:
    """Requests of whole blocks, but for a last block of one token."""
    builder = TraceBuilder("generated", block_tokens)
    for n, ids in enumerate(requests):
        builder.add(n, (len(ids) - 1) * block_tokens + 1, 1, ids)
    return builder.build()


def lru_hits(references: Sequence[int], capacity: int) -> list[bool]:
    """The plain way."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = []
    for block in references:
        hits.append(block in held)
        held[block] = None
        held.move_to_end(block)
        if len(held) > capacity:
            held.popitem(last=False)
    return hits


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 12), max_size=60))
def test_distances_are_those_of_a_plain_cache(references: list[int]) -> None:
    distances = stack_distances(np.array(references, dtype=np.int64))
    for capacity in range(1, 16):
        assert ((distances > 0) & (distances <= capacity)).tolist() == lru_hits(references, capacity)


def test_ratios_by_hand() -> None:
    # Blocks of 4 tokens; the last block of each request has one token.
    trace = made([[1, 2], [1, 3], [2], [1]])
    by_capacity = {r.capacity_blocks: r for r in trace_stats.hit_ratios(trace, [1, 2, 3])}
    # 1 2 1 3 2 1: distances 0 0 2 0 3 3
    assert by_capacity[1].blocks == 0
    assert by_capacity[2].blocks == pytest.approx(1 / 6)
    assert by_capacity[3].blocks == by_capacity[None].blocks == pytest.approx(3 / 6)
    # Tokens: 4 1 4 1 1 1
    assert by_capacity[2].tokens == pytest.approx(4 / 12)
    assert by_capacity[None].tokens == pytest.approx(6 / 12)


def test_counts_by_hand() -> None:
    builder = TraceBuilder("generated", 4)
    for at_s, prompt, output in ((0, 4, 1), (1, 8, 3), (8, 4, 2), (100, 12, 9)):
        builder.add(at_s * 1_000_000, prompt, output, range(prompt // 4), session=f"s{at_s % 2}")
    found = trace_stats.stats(builder.build())
    assert (found.requests, found.duration_s, found.requests_per_s) == (4, 100.0, 0.04)
    assert found.peak_per_s == 0.3  # three within ten seconds
    assert (found.prompt.mean, found.prompt.p50, found.prompt.p90, found.prompt.max) == (7, 4, 12, 12)
    assert (found.output.total, found.block_references, found.unique_blocks) == (15, 7, 3)
    assert (found.used_once, found.hottest_references, found.sessions) == (1, 4, 2)


@needs_traces
def test_conversation_trace() -> None:
    """Published: Mooncake FAST'25 and its artefacts; hit ratios replayed with a plain LRU."""
    assert TRACES is not None
    found = trace_stats.stats(read_trace(TRACES / "conversation_trace.jsonl.gz"))
    assert found.requests == 12_031
    assert round(found.duration_s) == 3537
    assert (round(found.prompt.mean), round(found.output.mean)) == (12_035, 343)
    assert (found.block_references, found.unique_blocks) == (288_500, 182_790)
    assert [round(r.blocks, 4) for r in found.hit_ratios] == [0.0445, 0.0650, 0.2112, 0.3257, 0.3546, 0.3637, 0.3664]
    assert round(found.hit_ratios[-1].tokens, 3) == 0.374


@needs_traces
def test_azure_trace() -> None:
    assert TRACES is not None
    found = trace_stats.stats(read_trace(TRACES / "azure_code.csv"))
    assert (found.requests, found.unique_blocks) == (8819, found.block_references)
    assert found.hit_ratios[-1].blocks == 0
