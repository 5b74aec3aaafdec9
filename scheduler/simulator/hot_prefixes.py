"""Prefixes that become hot at once, and the most that copies made ahead of demand could gain. Pure.

The bound: a network and memories so fast that a pull takes no time, so that each node has every prefix as soon as one
of them has it. No copying ahead can do better than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from scheduler.core.config import SECOND_US
from scheduler.simulator.columns import Trace, TraceBuilder
from scheduler.simulator.hardware import PROFILES, Hardware
from scheduler.simulator.incidents import forks
from scheduler.simulator.metrics import RequestRecord, Result
from scheduler.simulator.settings import SimulationConfig

BLOCK_TOKENS = 512
FREE_BYTES_S = 1e15


@dataclass(frozen=True)
class HotPrefix:
    """One story. Fields: hot_us: when the prefix becomes hot; prefix_tokens: of it."""

    name: str
    trace: Trace
    config: SimulationConfig
    hot_us: int
    prefix_tokens: int


def system_prompt(prefix_tokens: int, per_s: float, seconds: float, seed: int = 0) -> Trace:
    """Requests that share nothing, and from a third of the time on as many again that share a system prompt."""
    builder, random = TraceBuilder("generated", BLOCK_TOKENS), Random(seed)
    shared = list(range(prefix_tokens // BLOCK_TOKENS))
    own, arrival_s = len(shared), 0.0
    while arrival_s < seconds:
        hot = arrival_s >= seconds / 3
        arrival_s += random.expovariate(per_s * (2 if hot else 1))
        prefix = shared if hot and random.random() < 0.5 else []
        tokens = random.randrange(500, 2500)
        blocks = -(-tokens // BLOCK_TOKENS)
        builder.add(round(arrival_s * 1e6), len(prefix) * BLOCK_TOKENS + tokens, 100,
                    prefix + list(range(own, own + blocks)))  # fmt: skip
        own += blocks
    return builder.build()


def networks() -> dict[str, Hardware]:
    """The same machines with other networks, and with one on which pulls are free."""
    base = PROFILES["a800x8-llama3-70b"]
    slower = {f"{g} GB/s": replace(base, nic_bytes_s=g * 1e9, pull_bytes_s=g * 1e9) for g in (100, 20, 5)}
    free = replace(
        base, nic_bytes_s=FREE_BYTES_S, pull_bytes_s=FREE_BYTES_S, local_bytes_s=FREE_BYTES_S, nic_latency_us=0.0,
        local_latency_us=0.0,
    )  # fmt: skip
    return {**slower, "free": free}


def hot_prefixes(hardware: Hardware, seed: int = 0, seconds: float = 45.0) -> list[HotPrefix]:
    cluster = SimulationConfig(hardware=hardware, nodes=16, max_tokens=256, seed=seed, ttft_slo_us=5 * SECOND_US)
    prompt = system_prompt(8_192, 9.0, seconds, seed)
    long = replace(cluster, nodes=8, ttft_slo_us=30 * SECOND_US)
    return [
        HotPrefix("43 forks of 40k", forks(43, 40_000, 1_000, 4.0), long, 20 * SECOND_US, 40_000),
        HotPrefix("system prompt of 8k", prompt, cluster, int(seconds / 3 * SECOND_US), 8_192),
    ]


def hot_records(story: HotPrefix, result: Result) -> list[RequestRecord]:
    """Requests with the prefix, from when it is hot."""
    return [r for r in result.records if r.arrival_us >= story.hot_us and r.prompt_tokens >= story.prefix_tokens]


def imbalance(prefills: Sequence[int]) -> float:
    """The busiest instance's prefills over the mean: 1 = even."""
    return max(prefills, default=0) * len(prefills) / max(sum(prefills), 1)
