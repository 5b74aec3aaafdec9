"""A load that shifts between prompts and answers, for clusters whose instances may change their roles. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from scheduler.core.config import SECOND_US
from scheduler.simulator.columns import Trace, TraceBuilder
from scheduler.simulator.hardware import PROFILES
from scheduler.simulator.metrics import Result
from scheduler.simulator.settings import SimulationConfig

BLOCK_TOKENS = 512
#: Lengths vary by this share either way.
SPREAD = 0.3


@dataclass(frozen=True)
class Stretch:
    """A time in which requests are alike. Fields: tokens are means."""

    seconds: float
    per_s: float
    prompt_tokens: int
    answer_tokens: int


def shifting_trace(stretches: Sequence[Stretch], seed: int = 0) -> Trace:
    """Requests that share nothing, as Poisson processes of one rate after the other."""
    builder, random = TraceBuilder("generated", BLOCK_TOKENS), Random(seed)
    begin_s, block = 0.0, 0
    for stretch in stretches:
        arrival_s = begin_s + random.expovariate(stretch.per_s)
        begin_s += stretch.seconds
        while arrival_s < begin_s:
            prompt, answer = (
                max(int(tokens * random.uniform(1 - SPREAD, 1 + SPREAD)), 1)
                for tokens in (stretch.prompt_tokens, stretch.answer_tokens)
            )
            blocks = range(block, block - (-prompt // BLOCK_TOKENS))
            block = blocks.stop
            builder.add(round(arrival_s * 1e6), prompt, answer, blocks)
            arrival_s += random.expovariate(stretch.per_s)
    return builder.build()


def prompts_answers_prompts(scale: float = 1.0) -> list[Stretch]:
    """Long prompts, then long answers, then long prompts again: more than two of seven instances can decode."""
    prompts = Stretch(240 * scale, 2.6, 12_000, 100)
    return [prompts, Stretch(480 * scale, 6.0, 1_000, 800), replace(prompts, seconds=480 * scale)]


def cluster(seed: int = 0) -> SimulationConfig:
    """Seven instances, five of which prefill and two decode; batches are small enough to be filled."""
    hardware = replace(PROFILES["a800x8-llama3-70b"], batch_max=64, kv_tokens=400_000)
    return SimulationConfig(
        hardware=hardware, nodes=7, split=(5, 2), max_tokens=1024, seed=seed, ttft_slo_us=10 * SECOND_US
    )


def good_by_stretch(result: Result, stretches: Sequence[Stretch]) -> list[float]:
    """Share of the requests that came in each stretch that were served within the limits."""
    shares, begin_us = [], 0.0
    for stretch in stretches:
        end_us = begin_us + stretch.seconds * SECOND_US
        here = [r for r in result.records if begin_us <= r.arrival_us < end_us]
        shares.append(sum(result.good(r) for r in here) / max(len(here), 1))
        begin_us = end_us
    return shares
