"""Small traces and clusters for tests."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from scheduler.simulator.columns import TraceRequest
from scheduler.simulator.hardware import PROFILES, Hardware
from scheduler.simulator.settings import SimulationConfig

A800 = PROFILES["a800x8-llama3-70b"]
BLOCK_TOKENS = 512


def request(
    arrival_s: float,
    prompt_tokens: int,
    output_tokens: int,
    stem: int = 0,
    block_tokens: int = BLOCK_TOKENS,
    **over: object,
) -> TraceRequest:
    """Prompts of one stem are prefixes of each other."""
    count = -(-prompt_tokens // block_tokens)
    ids = tuple(stem * 10_000 + i for i in range(count))
    return TraceRequest(round(arrival_s * 1e6), prompt_tokens, output_tokens, ids, block_tokens, **over)  # type: ignore[arg-type]


def conversations(
    count: int, seconds: float, seed: int, prompt_tokens: int = 6_000, output_tokens: int = 80
) -> list[TraceRequest]:
    """Requests of sessions whose prompts grow, evenly spread over time but for chance."""
    random = Random(seed)
    lengths: dict[int, int] = {}
    arrivals = sorted(random.random() * seconds for _ in range(count))
    out = []
    for arrival_s in arrivals:
        session = random.randrange(max(count // 5, 1))
        length = min(lengths.get(session, 0) + 1 + int(random.random() * prompt_tokens), 60_000)
        lengths[session] = length
        tokens = 1 + int(random.random() * output_tokens)
        out.append(request(arrival_s, length, tokens, stem=session + 1, session=f"s{session}"))
    return out


def config(nodes: int = 4, hardware: Hardware = A800, **over: object) -> SimulationConfig:
    return replace(SimulationConfig(hardware=hardware, nodes=nodes), **over)  # type: ignore[arg-type]
