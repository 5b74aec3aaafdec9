"""Things that go wrong or come all at once, as small traces and faults: a link, an instance, a crowd. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scheduler.core.config import SECOND_US
from scheduler.simulator.columns import Trace, TraceBuilder
from scheduler.simulator.faults import Fault, FaultKind
from scheduler.simulator.hardware import PROFILES
from scheduler.simulator.metrics import Result
from scheduler.simulator.settings import SimulationConfig
from scheduler.simulator.workloads import LongDocument, generate

BLOCK_TOKENS = 512
#: When the fault of an incident begins, and how long it lasts.
BEGINS_S, LASTS_S = 40, 40


@dataclass(frozen=True)
class Incident:
    """One story. Fields: until_s: when whatever was wrong is over; 0 = nothing is wrong."""

    name: str
    title: str
    trace: Trace
    config: SimulationConfig
    policies: tuple[str, ...]
    begin_s: float = 0.0
    until_s: float = 0.0


def questions(requests: int, per_s: float) -> Trace:
    """Questions about long documents that many ask about: much to pull."""
    parameters = LongDocument(
        documents=40, documents_zipf=0.5, document_tokens_median=20_000,
        document_tokens_max=32_000, questions_mean=1.0, question_tokens_median=200, answer_tokens_median=120,
    )  # fmt: skip
    return generate("long-document", requests, per_s, 0, BLOCK_TOKENS, parameters)


def forks(count: int, prefix_tokens: int, tail_tokens: int, seconds: float) -> Trace:
    """One request alone with a prefix, then `count` that share it within some seconds, each with a tail of its own."""
    builder = TraceBuilder("generated", BLOCK_TOKENS)
    shared = list(range(prefix_tokens // BLOCK_TOKENS))
    own = len(shared)
    for number in range(count + 1):
        blocks = -(-(prefix_tokens + tail_tokens) // BLOCK_TOKENS) - len(shared)
        tail = list(range(own, own + blocks))
        own += blocks
        arrival_s = 0.0 if number == 0 else 20.0 + seconds * (number - 1) / count
        builder.add(round(arrival_s * 1e6), prefix_tokens + tail_tokens, 100, shared + tail, f"s{number}")
    return builder.build()


def incidents() -> list[Incident]:
    a800 = PROFILES["a800x8-llama3-70b"]
    # A network on which a transfer takes its time, and instances that keep little, so that much is pulled.
    slow = replace(a800, nic_bytes_s=20e9, pull_bytes_s=20e9, kv_tokens=400_000)
    pulling = SimulationConfig(hardware=slow, nodes=6, split=(3, 3), max_tokens=512, seed=1)
    at_us, lasts_us = BEGINS_S * SECOND_US, LASTS_S * SECOND_US
    flapping = Fault(FaultKind.LINK, "host-1", at_us, lasts_us, factor=0.0, period_us=4 * SECOND_US)
    dead = Fault(FaultKind.CRASH, "engine-1", at_us, lasts_us)
    trace = questions(360, 3.0)
    rivals = ("kvpool", "mooncake_algorithm1", "always_split")
    over_s = float(BEGINS_S + LASTS_S)
    return [
        Incident("flapping_link", "a prefill node's network is down every other 2 s", trace,
                 replace(pulling, faults=(flapping,)), rivals, BEGINS_S, over_s),
        Incident("dead_instance", "a prefill instance crashes, and is back after 40 s", trace,
                 replace(pulling, faults=(dead,)), rivals, BEGINS_S, over_s),
        Incident("43_forks", "43 forks of one prefix of 40k tokens within 4 s, 8 nodes", forks(43, 40_000, 1_000, 4.0),
                 SimulationConfig(hardware=a800, nodes=8, max_tokens=256, seed=1),
                 ("kvpool", "sglang_cache_aware", "mooncake_algorithm1", "least_loaded")),
    ]  # fmt: skip


def mean_ttft_s(result: Result, begin_s: float, end_s: float) -> float:
    """Of requests that came in a part of the time and got a token; infinity of none."""
    ttfts = [r.ttft_us / 1e6 for r in result.records
             if r.ttft_us is not None and begin_s <= r.arrival_us / 1e6 < end_s]  # fmt: skip
    return sum(ttfts) / len(ttfts) if ttfts else float("inf")


def shares_of(counts: Sequence[int]) -> list[float]:
    """Each count as a share of their sum."""
    total = sum(counts)
    return [count / total for count in counts] if total else []
