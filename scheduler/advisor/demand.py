"""What a trace asks of a cluster: lengths, rate, and how much of each prompt a cache of a size would have. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from scheduler.simulator.columns import Int64Array, Trace
from scheduler.simulator.stack_distance import stack_distances

FloatArray: TypeAlias = NDArray[np.float64]

#: Requests that predictions are made from; of longer traces each n-th one.
SAMPLE_MAX = 2000
#: Window in which arrivals are counted to see how uneven they are, and bounds of what is made of it.
WINDOW_US = 10_000_000
UNEVENNESS_MIN, UNEVENNESS_MAX = 1.0, 25.0


@dataclass(frozen=True, eq=False)
class Sample:
    """Requests that stand for all of a trace. Each sample equals itself only, so that what it costs can be remembered.

    Fields:
        prompt_tokens, output_tokens: float64 (requests,).
        cached_tokens: float64 (requests,), leading tokens of each prompt that a cache has.
    """

    prompt_tokens: FloatArray
    output_tokens: FloatArray
    cached_tokens: FloatArray


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of a cluster.

    Fields:
        rate_per_s: requests that arrive a second, on average.
        unevenness: variance of the arrivals in ten seconds against their mean: 1 for a Poisson process.
        capacity_blocks: of the cache that the sample was taken with.
    """

    rate_per_s: float
    unevenness: float
    sample: Sample
    capacity_blocks: int

    @property
    def prompt_tokens(self) -> FloatArray:
        return self.sample.prompt_tokens

    @property
    def output_tokens(self) -> FloatArray:
        return self.sample.output_tokens

    @property
    def cached_tokens(self) -> FloatArray:
        return self.sample.cached_tokens

    @property
    def decode_context_tokens(self) -> float:
        """Mean context of a sequence in the decode batch: longer answers are there for longer."""
        context = self.prompt_tokens + self.output_tokens / 2
        return float((context * self.output_tokens).sum() / self.output_tokens.sum())

    @property
    def cached_share(self) -> float:
        return float(self.cached_tokens.sum() / self.prompt_tokens.sum())

    @property
    def tokens_per_request(self) -> float:
        """Prompt and output."""
        return float(self.prompt_tokens.mean() + self.output_tokens.mean())

    def at(self, rate_per_s: float) -> Demand:
        return replace(self, rate_per_s=rate_per_s)


def demand_of(trace: Trace, capacity_blocks: int, speed: float = 1.0) -> Demand:
    """What a trace asks for if one LRU cache of `capacity_blocks` serves the whole cluster.

    Args:
        speed: so many times as many requests a second.
    """
    duration_s = max(trace.duration_us / 1e6, 1e-6)
    rate_per_s = max(len(trace) - 1, 1) / duration_s * speed if len(trace) > 1 else speed
    rows = np.arange(0, len(trace), -(-len(trace) // SAMPLE_MAX))
    return Demand(
        rate_per_s=rate_per_s,
        unevenness=_unevenness(trace),
        sample=Sample(
            prompt_tokens=trace.prompt_tokens[rows].astype(np.float64),
            output_tokens=trace.output_tokens[rows].astype(np.float64),
            cached_tokens=_cached_tokens(trace, capacity_blocks)[rows].astype(np.float64),
        ),
        capacity_blocks=capacity_blocks,
    )


def _cached_tokens(trace: Trace, capacity_blocks: int) -> Int64Array:
    """Tokens of the leading whole blocks of each prompt that the cache has; at least one token is left to compute."""
    distances = stack_distances(trace.hash_ids)
    misses = np.flatnonzero((distances == 0) | (distances > capacity_blocks))
    begins, ends = trace.offsets[:-1], trace.offsets[1:]
    # Place of the first miss at or after the beginning of each request, or its end if there is none before.
    place = np.searchsorted(misses, begins)
    first = np.full(len(trace), len(trace.hash_ids), dtype=np.int64)
    found = place < len(misses)
    first[found] = misses[place[found]]
    leading = np.minimum(first, ends) - begins
    usable = (trace.prompt_tokens - 1) // trace.block_tokens
    tokens: Int64Array = np.minimum(leading, usable) * trace.block_tokens
    return tokens


def _unevenness(trace: Trace) -> float:
    windows = int(trace.duration_us // WINDOW_US)
    if windows < 8:
        return UNEVENNESS_MIN
    counts = np.bincount(trace.arrival_us // WINDOW_US, minlength=windows)[:windows]
    return float(np.clip(counts.var() / max(counts.mean(), 1e-9), UNEVENNESS_MIN, UNEVENNESS_MAX))
