"""A request as the columns of a fleet take it: what it costs anywhere at least, and where that is least. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvpool.core.ids import Fidelity
from scheduler.core import bounding
from scheduler.core.arrivals import WINDOW_US
from scheduler.core.bounding import Asked, Floats, HandOff, Ints
from scheduler.core.cluster import Instance
from scheduler.core.fleet import Fleet
from scheduler.core.options import Appraiser, whole_blocks
from scheduler.core.waiting import Lane, Order

#: Instances and their bounds, the least first.
Bounded = Iterator[tuple[float, Instance]]
#: So many are sorted out at first. They are nearly always enough.
FEW = 4


@dataclass(slots=True)
class Screen:
    """One request against all rows of a fleet. `found` is the fleet's: good until the next request."""

    fleet: Fleet
    own: Ints  # blocks that each row holds
    ready: Ints  # blocks that each row holds or is computing
    latency_us: Floats  # of a pull to each row, at least
    block_us: Floats  # of each block of it
    asked: Asked
    found: Floats  # (FOUND, rows)

    def colocated(self, count: int) -> Bounded:
        """At most `count` instances to stay on: those with room first, then the least bound, then the first id."""
        asked, decodes = self.asked, self.fleet.decodes
        return self._in_turn(
            lambda few: bounding.first_colocated(self.found, decodes, asked.slo_us, asked.slack_price, few), count
        )

    def freest(self, count: int) -> list[Instance]:
        """Decode instances with most room for the request in proportion to what they have."""
        return [self.fleet.instances[row] for row in bounding.freest(self.found, self.fleet.decodes, count)]

    def calmest(self) -> Instance | None:
        """The decode instance with room that prefills hold up least."""
        row = bounding.calmest(self.found, self.fleet.decodes)
        return self.fleet.instances[row] if row >= 0 else None

    def nearest(self) -> Instance | None:
        """The decode instance with room that holds the longest part of the prompt."""
        row = bounding.nearest(self.found, self.fleet.decodes, self.own)
        return self.fleet.instances[row] if row >= 0 else None

    def prefills(
        self, appraiser: Appraiser, freest: Sequence[Instance], others: Sequence[Instance], count: int
    ) -> Bounded:
        """At most `count` instances to prefill on for another to decode: the first of `freest` that is, or `others`."""
        fleet = self.fleet
        first, instead = ([fleet.rows[i.id] for i in freest] + [-1, -1])[:2]
        handoff = HandOff(
            prompt_blocks=float(-(-appraiser.request.prompt_tokens // appraiser.prefix.block_tokens)),
            size=float(fleet.block_bytes_min),
            first=first,
            instead=instead,
        )
        targets = np.array([fleet.rows[i.id] for i in others], np.int64)
        link = appraiser.costs.link_floor()
        return self._in_turn(
            lambda few: bounding.first_prefills(
                fleet.table, self.own, self.ready, self.latency_us, self.block_us, self.asked, self.found,
                fleet.prefills, fleet.hosts, fleet.beside, link, handoff, targets, few,
            ),
            count,
        )  # fmt: skip

    def _in_turn(self, first: Callable[[int], tuple[Ints, Floats]], count: int) -> Bounded:
        """The first `count` of all: a few, and the others once somebody asks for more."""
        seen, instances = 0, self.fleet.instances
        for until in (min(FEW, count), count):
            rows, bounds_us = first(until)
            yield from zip(bounds_us[seen:].tolist(), [instances[row] for row in rows[seen:].tolist()], strict=True)
            seen = until


def screen(appraiser: Appraiser, fleet: Fleet) -> Screen:
    """Bounds of what a request costs on each row of a fleet that has rows."""
    prefix, request = appraiser.prefix, appraiser.request
    own = prefix.own_by_number().take(fleet.hbm_numbers(prefix.source_numbers))
    ready = own
    for prompt, shared in appraiser.standing.pending:
        row = fleet.rows.get(prompt.instance_id)
        if row is not None:
            ready = own.copy() if ready is own else ready
            ready[row] = max(ready[row], min(shared, prefix.usable))
    pulls = request.use_pool and appraiser.covered > 0
    latency_us, block_us = _pull_floors(appraiser, fleet, own) if pulls else (fleet.nothing, fleet.nothing)
    wait_us, kv_ahead = _ahead(appraiser, fleet)
    asked = _asked(appraiser, float(pulls))
    bounding.least_costs(fleet.table, own, ready, latency_us, block_us, wait_us, kv_ahead, asked, fleet.found)
    return Screen(fleet, own, ready, latency_us, block_us, asked, fleet.found)


def _asked(appraiser: Appraiser, pulls: float) -> Asked:
    request, config, block_tokens = appraiser.request, appraiser.config, appraiser.prefix.block_tokens
    objective = request.tpot_slo_us > 0 and request.max_tokens > 1
    return Asked(
        prompt_tokens=float(request.prompt_tokens),
        block_tokens=float(block_tokens),
        covered=float(appraiser.covered),
        pulls=pulls,
        context_tokens=float(appraiser.context_tokens),
        expected_tokens=float(appraiser.expected_tokens),
        kv_tokens=float(whole_blocks(request.prompt_tokens + request.max_tokens, block_tokens)),
        harm_weight=float(config.harm_weight),
        slo_us=float(request.ttft_slo_us),
        slack_price=float(config.slack_price),
        delay_rate=float(config.delay_weight * appraiser.standing.arrivals_per_s),
        tpot_slo_us=float(request.tpot_slo_us if objective else 0),
        typical_tokens=float(appraiser.typical_tokens),
        stall_share=float(config.tpot_tail * config.stall_margin),
        broken_us=float(config.broken_us),
        window_us=float(WINDOW_US),
        now_us=float(appraiser.now_us),
    )


def _pull_floors(appraiser: Appraiser, fleet: Fleet, own: Ints) -> tuple[Floats, Floats]:
    """Latency, and microseconds a block, of a pull to each row of the fleet, at least."""
    prefix, exact = appraiser.prefix, appraiser.request.fidelity_min == Fidelity.EXACT
    coming = []
    for prompt, shared in appraiser.standing.pending:
        other = appraiser.cluster.instances.get(prompt.instance_id)
        node = appraiser.cluster.sources.get(other.info.node_source_id) if other is not None else None
        if node is not None:
            coming.append((node.attached.host_id, shared))
    near, behind = prefix.within_reach(coming, appraiser.now_us)
    return bounding.pull_floors(
        own, fleet.hosts, fleet.source_hosts(prefix.host_numbers), near, behind, appraiser.costs.link_floor(),
        float(prefix.block_bytes(fleet.instances[0], exact)),
    )  # fmt: skip


def _ahead(appraiser: Appraiser, fleet: Fleet) -> tuple[Floats, Floats]:
    """Prefill work, and KV tokens, that those before a request are going to take on each row."""
    line, order = appraiser.standing.line, appraiser.standing.order
    if line is None:
        return fleet.nothing, fleet.nothing
    return _amounts(line.prefill_us, order, fleet), _amounts(line.kv_tokens, order, fleet)


def _amounts(lanes: dict[str, Lane], order: Order, fleet: Fleet) -> Floats:
    if not lanes:
        return fleet.nothing
    amounts = np.zeros(len(fleet.instances))
    for instance_id, lane in lanes.items():
        row = fleet.rows.get(instance_id)
        if row is not None:
            amounts[row] = lane.ahead(order)
    return amounts
