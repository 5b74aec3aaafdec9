"""What a trace is like: lengths, load over time, and what caches of each size would find again. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from scheduler.simulator.columns import Int64Array, Trace
from scheduler.simulator.stack_distance import stack_distances

CAPACITIES_BLOCKS = (1_000, 3_000, 10_000, 30_000, 50_000, 100_000)
#: Width of the window in which the busiest moment is looked for.
PEAK_WINDOW_US = 10_000_000
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts or answers: mean, percentiles by nearest rank, and the largest."""

    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    total: int


@dataclass(frozen=True, slots=True)
class HitRatio:
    """Share of what is asked for that an LRU cache holds, all requests in order of arrival, one block after another.

    Fields:
        capacity_blocks: None = without bound.
        blocks: share of block references.
        tokens: share of prompt tokens; a partial block counts as many as it has.
    """

    capacity_blocks: int | None
    blocks: float
    tokens: float


@dataclass(frozen=True, slots=True)
class TraceStats:
    kind: str
    requests: int
    duration_s: float
    requests_per_s: float
    peak_per_s: float  # in the busiest ten seconds
    prompt: Lengths
    output: Lengths
    block_tokens: int
    block_references: int
    unique_blocks: int
    used_once: int  # blocks that are referred to exactly once
    hottest_references: int  # to the block referred to most
    hit_ratios: tuple[HitRatio, ...]  # by growing capacity, the unbounded cache last
    sessions: int
    tenants: int
    bad_lines: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stats(trace: Trace, capacities_blocks: Sequence[int] = CAPACITIES_BLOCKS) -> TraceStats:
    """Measures a trace.

    Args:
        capacities_blocks: sizes of caches, each at least 1.
    """
    assert len(trace) and all(c > 0 for c in capacities_blocks)
    duration_s = trace.duration_us / 1e6
    counts = np.unique(trace.hash_ids, return_counts=True)[1]
    return TraceStats(
        kind=trace.kind,
        requests=len(trace),
        duration_s=duration_s,
        requests_per_s=len(trace) / duration_s if duration_s else 0.0,
        peak_per_s=_peak(trace.arrival_us) / (PEAK_WINDOW_US / 1e6),
        prompt=_lengths(trace.prompt_tokens),
        output=_lengths(trace.output_tokens),
        block_tokens=trace.block_tokens,
        block_references=len(trace.hash_ids),
        unique_blocks=len(counts),
        used_once=int((counts == 1).sum()),
        hottest_references=int(counts.max()) if len(counts) else 0,
        hit_ratios=hit_ratios(trace, capacities_blocks),
        sessions=_distinct(trace.session),
        tenants=_distinct(trace.tenant),
        bad_lines=trace.bad_lines,
        notes=trace.notes,
    )


def hit_ratios(trace: Trace, capacities_blocks: Sequence[int]) -> tuple[HitRatio, ...]:
    """Exact LRU hit ratios of caches of several sizes, and of one without bound."""
    distances = stack_distances(trace.hash_ids)
    weights = block_weights(trace)
    references, tokens = len(distances), int(trace.prompt_tokens.sum())
    ratios = []
    for capacity in (*sorted(set(capacities_blocks)), None):
        hits = (distances > 0) & (distances <= capacity) if capacity is not None else distances > 0
        by_blocks = float(hits.sum()) / references if references else 0.0
        ratios.append(HitRatio(capacity, by_blocks, float(weights[hits].sum()) / tokens))
    return tuple(ratios)


def block_weights(trace: Trace) -> Int64Array:
    """Prompt tokens that each block reference stands for: all of a block but for the last, int64 (references,)."""
    counts = np.diff(trace.offsets)
    places = np.arange(len(trace.hash_ids), dtype=np.int64) - np.repeat(trace.offsets[:-1], counts)
    left = np.repeat(trace.prompt_tokens, counts) - places * trace.block_tokens
    weights: Int64Array = np.minimum(left, trace.block_tokens)
    return weights


def _peak(arrival_us: Int64Array) -> int:
    """Most requests that arrive within any one window."""
    ends = np.searchsorted(arrival_us, arrival_us + PEAK_WINDOW_US)
    return int((ends - np.arange(len(arrival_us))).max())


def _lengths(tokens: Int64Array) -> Lengths:
    p50, p90, p99 = (int(v) for v in np.percentile(tokens, _PERCENTILES, method="inverted_cdf"))
    return Lengths(float(tokens.mean()), p50, p90, p99, int(tokens.max()), int(tokens.sum()))


def _distinct(places: Int64Array) -> int:
    """Names other than the empty one."""
    return int((np.unique(places) != 0).sum())
