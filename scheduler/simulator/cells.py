"""The grid in which policies are compared: workload x cluster x load, and the windows that seeds draw. Pure.

Each workload has two halves, one after the other. Policies are tuned on windows of the first and compared on windows of
the second. A seed chooses the window and the noise. Load is relative: 1 is as much work as the cluster's busier phase
can do if every prefix that came before is cached, so that cells of different workloads are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from scheduler.core.config import SECOND_US, SchedulerConfig
from scheduler.simulator.bound import goodput_max, least_prefill_us
from scheduler.simulator.columns import Trace, TraceRequest
from scheduler.simulator.hardware import PROFILES, Hardware
from scheduler.simulator.settings import SimulationConfig
from scheduler.simulator.workloads import generate

#: Sequences that share the fixed cost of a decode step, for the work of a token. Load is nominal.
BATCH_NOMINAL = 32
#: Parts of a half that seeds have their windows in.
SEEDS_SPREAD = 10
POLICIES = (
    "kvpool", "mooncake_algorithm1", "dynamo", "sglang_cache_aware", "llmd", "always_split", "always_colocate",
    "least_loaded", "random",
)  # fmt: skip
OURS = "kvpool"


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one kind, and the limits that their users have.

    Fields:
        made: how many requests are made up where it is no file.
        requests: in one window.
    """

    name: str
    file: str = ""
    made: int = 0
    made_per_s: float = 1.0
    hardware: str = "a800x8-llama3-70b"
    requests: int = 200
    ttft_slo_us: int = 30 * SECOND_US
    tbt_slo_us: int = SECOND_US // 5
    max_tokens: int = 2048

    def made_up(self) -> Trace:
        return generate(self.name, self.made, self.made_per_s, 0)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("conversation", file="conversation_trace.jsonl.gz", requests=600),
        Workload("azure_code", file="azure_code.csv", requests=440, ttft_slo_us=2 * SECOND_US, max_tokens=1024),
        Workload("multi-turn", made=24_000, requests=1200, ttft_slo_us=2 * SECOND_US),
        Workload("agentic", made=12_000, made_per_s=2.0, requests=600, ttft_slo_us=5 * SECOND_US, max_tokens=1024),
        # Where nothing is refused, all that wait ask again and again: what a window costs grows with its square.
        Workload("long-document", made=6000, requests=300),
    )
}
#: Name -> nodes, and their split.
CLUSTERS: dict[str, tuple[int, tuple[int, int] | None]] = {"4 both": (4, None), "2:2": (4, (2, 2))}
LOADS = (0.7, 1.5)
#: At this load and above a cell is called saturated.
LOAD_SATURATED = 1.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the grid."""

    workload: str
    cluster: str
    load: float

    @property
    def name(self) -> str:
        return f"{self.workload} / {self.cluster} / {self.load:g}"

    @property
    def saturated(self) -> bool:
        return self.load >= LOAD_SATURATED


def all_cells() -> list[Cell]:
    return [Cell(w, c, load) for w in WORKLOADS for c in CLUSTERS for load in LOADS]


def half(trace: Trace, report: bool) -> Trace:
    """The first half of a trace's requests, or the second; their first comes at time zero."""
    middle = len(trace) // 2
    part = trace[middle:] if report else trace[:middle]
    return replace(part, arrival_us=part.arrival_us - part.arrival_us[0])


def window(trace: Trace, count: int, seed: int) -> Trace:
    """`count` requests in a row, from a place that the seed draws in its part of the trace; the first comes at zero.

    Each of `SEEDS_SPREAD` seeds in a row has a part of its own, so their windows share no request. Windows longer than
    a part are spread evenly too, and overlap.
    """
    number, drawn = seed % SEEDS_SPREAD, Random(seed).random()
    part_requests = len(trace) // SEEDS_SPREAD
    if count <= part_requests:
        first = number * part_requests + int((part_requests - count + 1) * drawn)
    else:
        first = int(max(len(trace) - count, 0) * (number + drawn) / SEEDS_SPREAD)
    part = trace[first : first + count]
    return replace(part, arrival_us=part.arrival_us - part.arrival_us[0])


def decode_work_us(request: TraceRequest, hardware: Hardware) -> float:
    """Share of an instance's time that an answer takes in a batch of `BATCH_NOMINAL`."""
    context = request.prompt_tokens + request.output_tokens / 2
    token_us = hardware.step_us / BATCH_NOMINAL + hardware.decode_sequence_us + hardware.decode_token_us * context
    return request.output_tokens * token_us


def load_of(requests: Sequence[TraceRequest], hardware: Hardware, nodes: int, split: tuple[int, int] | None) -> float:
    """Work that comes a second, by what the busier phase of a cluster can do."""
    seconds = max((requests[-1].arrival_us - requests[0].arrival_us) / 1e6, 1e-6)
    prefill_s = sum(least_prefill_us(requests, hardware)) / 1e6
    decode_s = sum(decode_work_us(request, hardware) for request in requests) / 1e6
    instances = nodes * hardware.instances_per_node
    if split is None:
        return (prefill_s + decode_s) / instances / seconds
    both = instances - sum(split)
    return max(prefill_s / (split[0] + both), decode_s / (split[1] + both)) / seconds


@dataclass(frozen=True, slots=True)
class Task:
    """One simulation of the grid, with the requests that it is of."""

    cell: Cell
    policy: str
    seed: int
    trace: Trace
    config: SimulationConfig


def task_of(cell: Cell, policy: str, seed: int, trace: Trace, overrides: Mapping[str, Any], requests: int = 0) -> Task:
    """Args: trace: the half to draw the window from. overrides: tuned settings. requests: instead of the workload's."""
    workload = WORKLOADS[cell.workload]
    hardware = PROFILES[workload.hardware]
    nodes, split = CLUSTERS[cell.cluster]
    drawn = window(trace, requests or workload.requests, seed)
    drawn = drawn.sped_up(cell.load / load_of(drawn, hardware, nodes, split))
    config = SimulationConfig(
        hardware=hardware,
        nodes=nodes,
        split=split,
        policy=policy,
        seed=seed,
        ttft_slo_us=workload.ttft_slo_us,
        tbt_slo_us=workload.tbt_slo_us,
        max_tokens=workload.max_tokens,
        scheduler=with_overrides(SchedulerConfig(), overrides),
    )
    return Task(cell, policy, seed, drawn, config)


def with_overrides(config: SchedulerConfig, overrides: Mapping[str, Any]) -> SchedulerConfig:
    """Settings by name; those of `PolicyParameters` as well."""
    own = {name: value for name, value in overrides.items() if hasattr(config, name)}
    baselines = {name: value for name, value in overrides.items() if name not in own}
    return replace(config, **own, baselines=replace(config.baselines, **baselines))


def bound_of(task: Task) -> float:
    """Share of a task's requests that anybody could serve in time at best; see `bound`."""
    config = task.config
    # All of them prefill: where prompts are co-located, instances for decoding compute them.
    return goodput_max(task.trace, config.hardware, config.instances, config.ttft_slo_us, config.noise_ratio)


def names_in(mean: Mapping[str, float]) -> list[str]:
    """Baselines of a cell, the best first; equal ones by name."""
    return sorted((name for name in mean if name != OURS), key=lambda name: (-mean[name], name))
