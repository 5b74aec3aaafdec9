"""A request as the columns of a fleet take it: what it costs anywhere at least. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvpool.core.ids import Fidelity
from scheduler.core.cluster import Instance
from scheduler.core.fleet import Demand, Fleet, Floats
from scheduler.core.options import Appraiser, whole_blocks
from scheduler.core.waiting import Lane, Order

TIERS = ("", "-hbm", "-ssd")


def demand_of(appraiser: Appraiser, fleet: Fleet) -> Demand:
    """What the bounds of a fleet need to know of a request."""
    prefix, config, request = appraiser.prefix, appraiser.config, appraiser.request
    numbers = fleet.hbm_numbers(prefix.source_numbers)
    by_number = np.append(prefix.own_by_number(), 0)  # the last is for those whose HBM nobody announces
    own = by_number[numbers].astype(np.float64)
    ready = own.copy()
    for prompt, shared in appraiser.standing.pending:
        row = fleet.rows.get(prompt.instance_id)
        if row is not None:
            ready[row] = max(ready[row], min(shared, prefix.usable))
    return Demand(
        prompt_tokens=request.prompt_tokens,
        block_tokens=prefix.block_tokens,
        covered=appraiser.covered,
        own=own,
        ready=ready,
        pull_us=_pull_floor(appraiser, fleet) if request.use_pool and appraiser.covered else None,
        context_tokens=appraiser.context_tokens,
        expected_tokens=appraiser.expected_tokens,
        kv_tokens=whole_blocks(request.prompt_tokens + request.max_tokens, prefix.block_tokens),
        harm_weight=config.harm_weight,
        delay_weight=config.delay_weight,
        arrivals_per_s=appraiser.standing.arrivals_per_s,
        now_us=appraiser.now_us,
    )


def _pull_floor(appraiser: Appraiser, fleet: Fleet) -> tuple[Floats, Floats]:
    """Latency, and microseconds a block, at least, of a pull to each row."""
    exact = appraiser.request.fidelity_min == Fidelity.EXACT
    size = appraiser.prefix.block_bytes(fleet.instances[0], exact)
    local, remote = ([appraiser.costs.floor(place + tier) for tier in TIERS] for place in ("local", "remote"))
    shared, shared_at = appraiser.prefix.crowding(appraiser.now_us)
    for prompt, _ in appraiser.standing.pending:
        other = appraiser.cluster.instances.get(prompt.instance_id)
        node = appraiser.cluster.sources.get(other.info.node_source_id) if other is not None else None
        if node is not None:
            shared, shared_at[node.attached.host_id] = 1, 1
    away_us = min(per_byte for _, per_byte in remote) * shared
    here_us = min(per_byte for _, per_byte in local)
    by_host = np.full(len(fleet.host_numbers), away_us)
    for host, number in fleet.host_numbers.items():
        if host in shared_at:
            by_host[number] = min(here_us * shared_at[host], away_us)
    latency_us = min(latency for latency, _ in (*local, *remote))
    return np.full(len(fleet.instances), latency_us), by_host[fleet.hosts] * size


def split_service_us(appraiser: Appraiser, fleet: Fleet, demand: Demand, targets: Sequence[Instance]) -> Floats:
    """What pull, prefill and hand-off of a split take together at least, of each row.

    What a hand-off leaves when the prefill ends is its whole duration less the prefill.
    """
    lows = [appraiser.costs.floor(place + tier) for place in ("local", "remote") for tier in TIERS]
    latency_us, per_byte_us = (min(low[i] for low in lows) for i in (0, 1))
    size = 0
    for group in fleet.instances[0].info.namespace.groups:
        size += group.block_bytes * group.shard_count
    prompt_blocks = -(-appraiser.request.prompt_tokens // demand.block_tokens)
    own = max((appraiser.prefix.own_blocks(t.info.hbm_source_id) for t in targets), default=0)
    blocks = np.maximum(prompt_blocks - demand.own, 1.0) + max(prompt_blocks - own, 1)
    return 2 * latency_us + per_byte_us * size * blocks


def ahead_of(appraiser: Appraiser) -> tuple[dict[str, int], dict[str, int]]:
    """Prefill work, and KV tokens, that those before a request are going to take, by instance."""
    line, order = appraiser.standing.line, appraiser.standing.order
    if line is None:
        return {}, {}
    return _amounts(line.prefill_us, order), _amounts(line.kv_tokens, order)


def _amounts(lanes: dict[str, Lane], order: Order) -> dict[str, int]:
    return {instance_id: lane.ahead(order) for instance_id, lane in lanes.items()}
