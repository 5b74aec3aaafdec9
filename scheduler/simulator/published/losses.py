"""Cases in which splitting or fetching made things worse for others, as small simulations. Pure.

What was reported is in `reported`; the simulation keeps what decided it (how long computing and fetching take, how much
comes at a time), not every detail of those systems.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from scheduler.simulator.columns import Trace, TraceBuilder
from scheduler.simulator.driver import simulate
from scheduler.simulator.hardware import PROFILES, Hardware
from scheduler.simulator.metrics import Result
from scheduler.simulator.settings import SimulationConfig

A800, H200 = PROFILES["a800x8-llama3-70b"], PROFILES["h200-gpt-oss-120b"]
BLOCK_TOKENS = 512
#: In cases of fetching: requests before this one fill the drive.
FETCHES_FROM = 8


@dataclass(frozen=True)
class Loss:
    """One case.

    Fields:
        reported: what happened to others, and where that is written.
        policies: ours, and those that do what lost.
        judged_from: the first request that counts; those before it warm caches up.
    """

    name: str
    title: str
    reported: str
    trace: Trace
    config: SimulationConfig
    policies: tuple[str, ...]
    judged_from: int = 0

    def results(self) -> dict[str, Result]:
        return {policy: simulate(self.trace, replace(self.config, policy=policy)) for policy in self.policies}

    def ttft_s(self, result: Result) -> float:
        """Mean of those that count; one that got no token counts as the timeout."""
        none_us = self.config.request_timeout_us
        ttfts = [none_us if r.ttft_us is None else r.ttft_us for r in result.records[self.judged_from :]]
        return sum(ttfts) / len(ttfts) / 1e6

    def pulled(self, result: Result) -> float:
        """Share of the prompts of those that count that was fetched."""
        records = result.records[self.judged_from :]
        return sum(r.pulled_tokens for r in records) / sum(r.prompt_tokens for r in records)


def losses() -> Mapping[str, Loss]:
    """All cases, by name."""
    cases = (_long_prompts(), _crowd(), *_slow_fetches(), _fast_fetch())
    return {case.name: case for case in cases}


def _alone(count: int, every_s: float, prompt_tokens: int, output_tokens: int) -> Trace:
    """Requests in equal distances that share nothing."""
    builder = TraceBuilder("generated", BLOCK_TOKENS)
    blocks = -(-prompt_tokens // BLOCK_TOKENS)
    for number in range(count):
        ids = range(10_000 * number, 10_000 * number + blocks)
        builder.add(round(number * every_s * 1e6), prompt_tokens, output_tokens, ids)
    return builder.build()


def _long_prompts() -> Loss:
    config = SimulationConfig(hardware=replace(H200, instances_per_node=4), nodes=1)
    return Loss(
        "long_prompts",
        "32k tokens in, 512 out, 4 x H200",
        "no gain from splitting (SGLang #24488)",
        _alone(24, 0.7, 32_768, 512),
        config,
        ("kvpool", "always_split", "always_colocate", "mooncake_algorithm1"),
    )


def _crowd() -> Loss:
    slow = replace(H200, instances_per_node=4, nic_bytes_s=1e9, pull_bytes_s=1e9, local_bytes_s=1e9)
    return Loss(
        "crowd",
        "8 requests of 8k tokens a second, 4 x H200, 1 GB/s between them",
        "TTFT from 2.3 to 24.8 s with splitting (SGLang #6411)",
        _alone(60, 0.12, 8_192, 200),
        SimulationConfig(hardware=slow, nodes=1, tbt_slo_us=1_000_000),
        ("kvpool", "always_split", "always_colocate", "mooncake_algorithm1"),
    )


def _fetching(hardware: Hardware, tokens: int) -> tuple[Trace, SimulationConfig]:
    """Two prompts by turns; HBM has room for one of them."""
    builder = TraceBuilder("generated", BLOCK_TOKENS)
    for number in range(2 * FETCHES_FROM):
        stem = number % 2 * 100_000
        builder.add(number * 40_000_000, tokens, 10, range(stem, stem + tokens // BLOCK_TOKENS))
    return builder.build(), SimulationConfig(hardware=replace(hardware, kv_tokens=tokens + 4_096), nodes=1)


def _tokens(compute_s: float) -> int:
    """Length of a prompt that takes so long to compute."""
    return next(t for t in range(4_096, 131_072, BLOCK_TOKENS) if A800.prefill_us(t, 0) / 1e6 >= compute_s)


def slow_fetch(name: str, title: str, reported: str, fetch_s: float, compute_s: float) -> Loss:
    """A prefix that only a drive holds, from which it comes in `fetch_s`."""
    tokens = _tokens(compute_s)
    hardware = replace(
        A800,
        dram_bytes=8 * BLOCK_TOKENS * A800.kv_token_bytes,
        ssd_bytes=10 * tokens * A800.kv_token_bytes,
        ssd_bytes_s=tokens * A800.kv_token_bytes / fetch_s,
    )
    trace, config = _fetching(hardware, tokens)
    return Loss(name, title, reported, trace, config, ("kvpool", "sglang_cache_aware", "dynamo"), FETCHES_FROM)


def _slow_fetches() -> tuple[Loss, Loss]:
    return (
        slow_fetch(
            "files",
            "a prefix in files",
            "reading 2.45 s, computing 1.73 s (SGLang #26305)",
            2.45,
            1.725,
        ),
        slow_fetch(
            "store",
            "a prefix in a slow store",
            "retrieving 29.0 s, computing 8.5 s (Mooncake #467)",
            29.0,
            8.5,
        ),
    )


def _fast_fetch() -> Loss:
    """The other half of the last one: from memory of the same host it does pay."""
    tokens = _tokens(8.5)
    hardware = replace(A800, local_bytes_s=tokens * A800.kv_token_bytes / 1.8)
    trace, config = _fetching(hardware, tokens)
    return Loss(
        "memory",
        "the same prefix in the node's memory",
        "1.8 s, computing 8.5 s (Mooncake #467)",
        trace,
        config,
        ("kvpool", "sglang_cache_aware", "dynamo", "least_loaded"),
        FETCHES_FROM,
    )
