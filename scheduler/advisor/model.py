"""What a cluster of some design makes of a demand, in closed form: queues, batches, transfers. Pure.

It is rough on purpose: it must compare hundreds of designs in a second. What comes out best can be checked by
simulation, which knows chunks, caches and single requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from scheduler.advisor.demand import Demand, FloatArray, Sample
from scheduler.simulator.hardware import Hardware

#: Share of the KV capacity that the mean batch may take: the rest is for when it is larger.
KV_FILL_MAX = 0.9
#: Chunks that an instance of both roles may cut prompts into, beside the profile's own.
CHUNKS_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
#: Share of a request's longest intervals that its TBT is the mean of.
LONGEST_SHARE = 0.1
#: What is handed over last, when all else has been: about one block.
LAST_TOKENS = 512


class Kind(StrEnum):
    COLOCATED = "co-located"
    SPLIT = "split"


@dataclass(frozen=True, slots=True)
class Objectives:
    """Limits of one request, and the share of requests that must keep both."""

    ttft_us: float = 30e6
    tbt_us: float = 200e3
    share_min: float = 0.9


@dataclass(frozen=True, slots=True)
class Network:
    """What blocks travel over between instances. Bytes a second are those of one transfer, and of one node's port."""

    transfer_bytes_s: float
    node_bytes_s: float
    latency_us: float

    @classmethod
    def of(cls, hardware: Hardware, nodes: int) -> Network:
        if nodes <= 1:
            # Through the node's own memory: in and out.
            local = hardware.local_bytes_s / 2
            return cls(local, local * hardware.instances_per_node, hardware.local_latency_us)
        node = hardware.nic_bytes_s
        if hardware.domain_nodes and nodes <= hardware.domain_nodes:
            node = hardware.domain_bytes_s
        return cls(min(hardware.pull_bytes_s, node), node, hardware.nic_latency_us)

    def limited(self, bytes_s: float | None) -> Network:
        """With what was measured between two instances in place of what the hardware can do at most."""
        return self if bytes_s is None else replace(self, transfer_bytes_s=bytes_s, node_bytes_s=math.inf)


@dataclass(frozen=True, slots=True)
class Design:
    """Instances and their roles. `prefills` is 0 where all do both."""

    kind: Kind
    prefill: Hardware
    decode: Hardware
    prefills: int
    decodes: int
    link_bytes_s: float | None = None  # as measured; None = as the hardware says
    chunk_tokens: int | None = None  # of instances of both roles; None = whatever is best

    @property
    def gpus(self) -> int:
        return self.prefills * self.prefill.gpus_per_instance + self.decodes * self.decode.gpus_per_instance

    @property
    def price_hour(self) -> float:
        return self.prefills * self.prefill.price_instance_hour + self.decodes * self.decode.price_instance_hour

    @property
    def nodes(self) -> int:
        return nodes_of(self.prefill, self.prefills) + nodes_of(self.decode, self.decodes)

    @property
    def network(self) -> Network:
        together = self.prefill.name == self.decode.name
        nodes = nodes_of(self.decode, self.prefills + self.decodes) if together else self.nodes
        return Network.of(self.decode, nodes).limited(self.link_bytes_s)

    def named(self) -> str:
        """For people."""
        if self.kind is Kind.COLOCATED:
            return f"{self.decodes} x {_instance(self.decode)}, all do both"
        return f"{self.prefills} x {_instance(self.prefill)} prefill, {self.decodes} x {_instance(self.decode)} decode"


def nodes_of(hardware: Hardware, instances: int) -> int:
    return -(-instances // hardware.instances_per_node)


def _instance(hardware: Hardware) -> str:
    return f"{hardware.gpu} TP{hardware.gpus_per_instance}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is predicted of a design under a demand. Times are microseconds, shares 0 to 1 (above 1: overloaded)."""

    good_share: float  # of requests inside both limits
    ttft_us: float  # mean
    tbt_us: float  # mean of a request's longest tenth
    prefill_busy: float  # of the time of those that prefill
    decode_kv_share: float  # of the KV capacity of those that decode
    batch: float  # sequences that decode at a time, on one instance
    network_busy: float  # of what ports and links between the roles carry
    exposed_us: float  # mean of the hand-off that is not hidden behind prefill
    chunk_tokens: int
    obstacle: str = ""  # why it can't carry the demand at all


def overloaded(obstacle: str, prefill_busy: float = 1.0, network_busy: float = 0.0) -> Evaluation:
    return Evaluation(0.0, math.inf, math.inf, prefill_busy, 1.0, 0.0, network_busy, 0.0, 0, obstacle)


def evaluate(design: Design, demand: Demand, objectives: Objectives) -> Evaluation:
    if design.kind is Kind.SPLIT:
        return _split(design, demand, objectives)
    own = own_chunk_tokens(design.decode)
    chunks = sorted({*CHUNKS_TOKENS, own}) if design.chunk_tokens is None else [design.chunk_tokens]
    tried = [_colocated(design, demand, objectives, chunk) for chunk in chunks]
    return max(tried, key=lambda e: (e.good_share, -e.ttft_us))


def own_chunk_tokens(hardware: Hardware) -> int:
    """Chunks of an instance of both roles as its profile says; without any, prompts as long as it takes."""
    return hardware.chunk_tokens or hardware.context_tokens_max


# ---------------------------------------------------------------- parts


def prefill_us(hardware: Hardware, new: FloatArray, cached: FloatArray, chunk_tokens: int) -> FloatArray:
    """Computing prompts alone, in chunks (0 = whole prompts)."""
    chunk = float(chunk_tokens) if chunk_tokens else math.inf
    whole = np.ceil(new / chunk) - 1
    last = new - np.where(whole > 0, whole * chunk, 0.0)
    linear = np.maximum(hardware.step_us, hardware.prefill_token_us * last)
    if chunk < math.inf:
        linear += whole * max(hardware.step_us, hardware.prefill_token_us * chunk)
    pairs: FloatArray = linear + hardware.prefill_pair_us * new * (cached + new / 2)
    return pairs


def pull_us(network: Network, hardware: Hardware, tokens: FloatArray) -> FloatArray:
    """Getting cached tokens from the pool."""
    times: FloatArray = network.latency_us + tokens * (hardware.kv_token_bytes / network.transfer_bytes_s * 1e6)
    return np.where(tokens > 0, times, 0.0)


@lru_cache(maxsize=1024)
def service_us(
    hardware: Hardware, network: Network, sample: Sample, chunk_tokens: int
) -> tuple[FloatArray, FloatArray]:
    """(prefill of each request with what it pulls or, if that is faster, without; number of steps that takes)."""
    new = sample.prompt_tokens - sample.cached_tokens
    pulled = pull_us(network, hardware, sample.cached_tokens)
    with_cache = pulled + prefill_us(hardware, new, sample.cached_tokens, chunk_tokens)
    without = prefill_us(hardware, sample.prompt_tokens, np.zeros_like(new), chunk_tokens)
    reuses = with_cache <= without
    computed = np.where(reuses, new, sample.prompt_tokens)
    steps = np.ceil(computed / chunk_tokens) if chunk_tokens else np.ones_like(computed)
    return np.where(reuses, with_cache, without), steps


def _fitting(demand: Demand, hardware: Hardware) -> NDArray[np.bool_]:
    """Requests that an instance can hold at all."""
    limit = min(hardware.context_tokens_max, hardware.kv_tokens)
    fits: NDArray[np.bool_] = demand.prompt_tokens + demand.output_tokens <= limit
    return fits


def queue_us(service: FloatArray, servers: int, rate_per_s: float, unevenness: float) -> tuple[float, float, float]:
    """(share of time busy, chance of having to wait, mean wait) of a queue before `servers` that work one by one.

    Source: Sakasegawa's approximation of M/M/n with Kingman's factor for uneven arrivals and services.
    """
    mean_us = float(service.mean())
    busy = rate_per_s * mean_us / 1e6 / servers
    if busy >= 1:
        return busy, 1.0, math.inf
    varied = (unevenness + float(service.var()) / (mean_us * mean_us)) / 2
    chance = busy ** (math.sqrt(2 * (servers + 1)) - 1)
    return busy, chance, chance / (servers * (1 - busy)) * mean_us * varied


def in_time(service: FloatArray, chance: float, wait_us: float, limit_us: float) -> FloatArray:
    """Chance of each request to have waited and been served within a limit; waits are taken as exponential."""
    left = limit_us - service
    if wait_us <= 0:
        return np.where(left >= 0, 1.0, 0.0)
    late = chance * np.exp(-np.maximum(left, 0.0) * chance / wait_us)
    return np.where(left >= 0, 1 - late, 0.0)


def batch_max(hardware: Hardware, context_tokens: float) -> float:
    return min(float(hardware.batch_max), KV_FILL_MAX * hardware.kv_tokens / context_tokens)


def _swollen(batch: float) -> float:
    """A batch larger than the mean by as much as chance makes it now and then."""
    return batch + math.sqrt(batch)


# ---------------------------------------------------------------- designs


def _colocated(design: Design, demand: Demand, objectives: Objectives, chunk_tokens: int) -> Evaluation:
    """Steps with a chunk of a prompt and steps without take turns; the decode batch rides on both."""
    hardware, servers = design.decode, design.decodes
    rate_us = demand.rate_per_s / servers / 1e6  # requests a microsecond on one instance
    service, steps = service_us(hardware, design.network, demand.sample, chunk_tokens)
    context = demand.decode_context_tokens
    per_sequence_us = hardware.decode_sequence_us + hardware.decode_token_us * context
    output = float(demand.output_tokens.mean())
    prefill_busy, steps_per_us = rate_us * float(service.mean()), rate_us * float(steps.mean())
    if prefill_busy >= 1:
        return overloaded("prefill alone takes more time than there is", prefill_busy)

    def generated(batch: float) -> float:
        """Tokens a microsecond that a batch generates, less what is asked for."""
        riding = batch * per_sequence_us
        left = 1 - prefill_busy - steps_per_us * riding
        return batch * (steps_per_us + max(left, 0.0) / (hardware.step_us + riding)) - rate_us * output

    most = batch_max(hardware, context)
    batch = _root(generated, most)
    if batch is None:
        return overloaded("decoding all that is asked for needs more batch than there is", prefill_busy)
    riding = batch * per_sequence_us
    left = 1 - prefill_busy - steps_per_us * riding
    if left <= 0:
        return overloaded("prefill and decode together take more time than there is", prefill_busy)
    service = service + steps * riding
    busy, chance, wait_us = queue_us(service, servers, demand.rate_per_s, demand.unevenness)
    if busy >= 1:
        return overloaded("prefill and decode together take more time than there is", busy)
    swollen = _swollen(batch) * per_sequence_us
    plain_us = hardware.step_us + swollen
    chunk_us = max(hardware.step_us, hardware.prefill_token_us * chunk_tokens) + swollen
    chunks_us = chunk_us + hardware.prefill_pair_us * chunk_tokens * demand.prompt_tokens / 2
    share = steps_per_us / (steps_per_us + left / (hardware.step_us + riding))
    smooth = _undisturbed(demand.output_tokens, share, steps, plain_us, chunks_us, objectives.tbt_us)
    of_longest = min(share / LONGEST_SHARE, 1.0)
    mean_chunk_us = float((chunks_us * steps).sum() / steps.sum())
    good = in_time(service, chance, wait_us, objectives.ttft_us) * smooth * _fitting(demand, hardware)
    return Evaluation(
        good_share=float(good.mean()),
        ttft_us=wait_us + float(service.mean()),
        tbt_us=of_longest * max(mean_chunk_us, plain_us) + (1 - of_longest) * plain_us,
        prefill_busy=busy,
        decode_kv_share=batch * context / hardware.kv_tokens,
        batch=batch,
        network_busy=0.0,
        exposed_us=0.0,
        chunk_tokens=chunk_tokens,
    )


def _split(design: Design, demand: Demand, objectives: Objectives) -> Evaluation:
    """Prefill is a queue, decode a batch, and between them blocks travel while later ones are computed."""
    chunk_tokens = design.prefill.prefill_chunk_tokens
    service, _ = service_us(design.prefill, design.network, demand.sample, chunk_tokens)
    busy, chance, wait_us = queue_us(service, design.prefills, demand.rate_per_s, demand.unevenness)
    if busy >= 1:
        return overloaded("prefill takes more time than there is", busy)
    hardware = design.decode
    context = demand.decode_context_tokens
    per_sequence_us = hardware.decode_sequence_us + hardware.decode_token_us * context
    tokens_us = demand.rate_per_s / design.decodes / 1e6 * float(demand.output_tokens.mean())
    left = 1 - tokens_us * per_sequence_us
    batch = tokens_us * hardware.step_us / left if left > 0 else math.inf
    if batch > batch_max(hardware, context):
        return overloaded("decoding all that is asked for needs more batch than there is", busy)
    network = design.network
    size = demand.prompt_tokens * hardware.kv_token_bytes
    pairs = min(design.prefills, design.decodes)
    ports = min(nodes_of(design.prefill, design.prefills), nodes_of(hardware, design.decodes))
    carried_bytes_s = min(network.transfer_bytes_s * pairs, network.node_bytes_s * ports)
    network_busy = demand.rate_per_s * float(size.mean()) / carried_bytes_s
    if network_busy >= 1:
        return overloaded("handing over KV blocks takes more than the network has", busy, network_busy)
    bytes_us = min(network.transfer_bytes_s, network.node_bytes_s) / 1e6
    travel_us = size / bytes_us * (1 + network_busy / (2 * (1 - network_busy)))
    last_us = np.minimum(size, LAST_TOKENS * hardware.kv_token_bytes) / bytes_us
    exposed_us = network.latency_us + np.maximum(travel_us - service, last_us)
    plain_us = hardware.step_us + _swollen(batch) * per_sequence_us
    longest = np.maximum(LONGEST_SHARE * demand.output_tokens, 1.0)
    tbt_us = plain_us + np.where(demand.output_tokens > 1, np.maximum(exposed_us - plain_us, 0.0) / longest, 0.0)
    good = in_time(service, chance, wait_us, objectives.ttft_us) * (tbt_us <= objectives.tbt_us)
    good = good * _fitting(demand, hardware) * _fitting(demand, design.prefill)
    return Evaluation(
        good_share=float(good.mean()),
        ttft_us=wait_us + float(service.mean()),
        tbt_us=float(tbt_us.mean()),
        prefill_busy=busy,
        decode_kv_share=batch * context / hardware.kv_tokens,
        batch=batch,
        network_busy=network_busy,
        exposed_us=float(exposed_us.mean()),
        chunk_tokens=chunk_tokens,
    )


def _undisturbed(
    output_tokens: FloatArray,
    share: float,
    steps: FloatArray,
    plain_us: float,
    chunks_us: FloatArray,
    limit_us: float,
) -> FloatArray:
    """Chance of each answer that its longest tenth of intervals is within a limit on average.

    Steps with a chunk of a prompt are longer, the more so the longer the prompt; those within the limit do no harm.
    Of an answer's intervals so many as chance has it meet the others, in clusters, since a prompt has several. The
    normal distribution is taken by its logistic approximation.

    Args:
        share: of all steps that have a chunk.
        steps, chunks_us: of each prompt, how many it takes and how long they are.
    """
    heavy = chunks_us > limit_us
    if plain_us > limit_us:
        return np.zeros_like(output_tokens)
    if not heavy.any():
        return np.ones_like(output_tokens)
    count = steps[heavy]
    chunk_us = float((chunks_us[heavy] * count).sum() / count.sum())
    clustered = float((count * count).sum() / count.sum())
    longest = np.maximum(np.floor(LONGEST_SHARE * output_tokens), 1.0)
    allowed = np.floor(longest * (limit_us - plain_us) / (chunk_us - plain_us))
    expected = share * float(count.sum() / steps.sum()) * output_tokens
    z = (allowed + 0.5 - expected) / np.sqrt(expected * clustered + 1e-9)
    chances: FloatArray = 1 / (1 + np.exp(np.clip(-1.702 * z, -60.0, 60.0)))
    return chances


def _root(rises: Callable[[float], float], most: float) -> float | None:
    """Where a function that begins below zero reaches it; None if not up to `most`."""
    if rises(most) < 0:
        return None
    low, high = 0.0, most
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < 0 else (low, middle)
    return high
