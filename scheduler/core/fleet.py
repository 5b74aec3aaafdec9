"""Columns of all instances of one model: lower bounds of what each option costs, for a thousand at once. Pure.

Elementwise + - * / and comparisons only, on float64 and int64: the same everywhere. What is taken in the end is weighed
option by option; the columns only say which options are worth it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.core.cluster import Cluster, Instance, State
from scheduler.core.cost import CostBook
from scheduler.core.placements import PlacementBook

Floats = NDArray[np.float64]

#: Rounding of sums in other orders: bounds are lowered by this, so that none is above its cost.
SLACK_US = 8.0
_COLUMNS = (
    "p0", "p1", "p2", "d0", "d1", "d2", "queue_us", "head_since_us", "head_us", "foreign", "batch", "context",
    "expected", "kv_free", "kv_total", "batch_max",
)  # fmt: skip


@dataclass(slots=True)
class Demand:
    """What the bounds need to know of a request."""

    prompt_tokens: int
    block_tokens: int
    covered: int  # blocks that could be reused at most
    own: Floats  # blocks that each row holds
    ready: Floats  # blocks that each row holds or is computing
    pull_us: tuple[Floats, Floats] | None  # of each row: latency and microseconds a block at least; None = no pulls
    context_tokens: int
    expected_tokens: int
    kv_tokens: int
    harm_weight: float
    delay_weight: float
    arrivals_per_s: float
    now_us: int


class Fleet:
    """The instances of a model that may be placed on, sorted by id, one row each. Derived: it can be made anew."""

    def __init__(self, model: str, cluster: Cluster, version: int) -> None:
        self.version = version
        alive = [cluster.instances[i] for i in cluster.by_model.get(model, ())]
        self.instances = [i for i in alive if i.state is State.ALIVE and not i.draining]
        self.rows = {instance.id: row for row, instance in enumerate(self.instances)}
        self._hbm: NDArray[np.int64] | None = None
        self.prefills = np.array([i.prefills() for i in self.instances], bool)
        self.decodes = np.array([i.decodes() for i in self.instances], bool)
        hosts = dict.fromkeys(i.info.host_id for i in self.instances)
        numbers = {host: number for number, host in enumerate(hosts)}
        self.host_numbers = numbers
        self.hosts = np.array([numbers[i.info.host_id] for i in self.instances], np.int64)
        self.namespaces = dict.fromkeys(i.info.namespace_id for i in self.instances)
        self.tokens_max = max((_token_limit(i) for i in self.instances), default=0)
        self.columns: dict[str, Floats] = {name: np.zeros(len(self.instances)) for name in _COLUMNS}
        self.dirty: dict[str, None] = dict.fromkeys(self.rows)

    def hbm_numbers(self, numbers: dict[str, int]) -> NDArray[np.int64]:
        """The directory's number of each row's HBM source, -1 (the last place of what is indexed) for none.

        Numbers are those of the same version of the cluster, so they are looked up once.
        """
        if self._hbm is None:
            self._hbm = np.array([numbers.get(i.info.hbm_source_id, -1) for i in self.instances], np.int64)
        return self._hbm

    def touch(self, instance_id: str) -> None:
        if instance_id in self.rows:
            self.dirty[instance_id] = None

    def refresh(self, book: PlacementBook, costs: CostBook) -> None:
        """Brings the rows up to date of those that have changed."""
        for instance_id in self.dirty:
            self._fill(self.rows[instance_id], self.instances[self.rows[instance_id]], book, costs)
        self.dirty.clear()

    def _fill(self, row: int, instance: Instance, book: PlacementBook, costs: CostBook) -> None:
        held = book.on(instance.id)
        head_us = held.queue[next(iter(held.queue))] if held.queue else 0
        placed = len(held.decoding)
        batch = placed
        if instance.kv_tokens_foreign:
            batch += max(instance.running - placed - len(held.queue), 0)
        values = (
            *costs.prefill[instance.id].current(),
            *costs.decode[instance.id].current(),
            held.queue_us,
            held.head_since_us,
            head_us,
            max(instance.waiting - len(held.queue) - placed, 0),
            batch,
            held.context_tokens + instance.kv_tokens_foreign,
            held.expected_tokens // placed if placed else 0,
            instance.kv_tokens_available(held.kv_tokens),
            instance.info.kv_tokens_total,
            instance.info.batch_max,
        )
        for name, value in zip(_COLUMNS, values, strict=True):
            self.columns[name][row] = value

    # ------------------------------------------------------------ bounds

    def _prefill_us(self, new: Floats | float, cached: Floats | float) -> Floats:
        c = self.columns
        return c["p0"] + c["p1"] * new + c["p2"] * (new * (cached + new / 2))

    def bounds_us(self, demand: Demand, ahead: dict[str, int], service_us_min: Floats | float = 0.0) -> Floats:
        """What prefilling on each row costs at least; harm where the request decodes is left out.

        Args:
            service_us_min: pull, prefill and hand-off together take that long at least.
        """
        c, d = self.columns, demand
        cached = d.own * d.block_tokens
        work_us = self._prefill_us(d.prompt_tokens - cached, cached)
        pulled = float(d.covered * d.block_tokens)
        if d.pull_us is not None and d.covered:
            latency_us, per_block_us = d.pull_us
            missing = np.maximum(d.covered - d.own, 0.0)
            pull_us = np.where(missing > 0, latency_us + per_block_us * missing, 0.0)
            pulled_us = self._prefill_us(d.prompt_tokens - pulled, pulled)
            service_us = np.minimum(work_us, pulled_us + pull_us)
            work_us = np.minimum(work_us, pulled_us)
        else:
            service_us = work_us
        ready = d.ready * d.block_tokens
        ready_us = self._prefill_us(d.prompt_tokens - ready, ready)
        service_us, work_us = np.minimum(service_us, ready_us), np.minimum(work_us, ready_us)
        service_us = np.maximum(service_us, service_us_min)
        queue_us = c["queue_us"] - np.minimum(np.maximum(d.now_us - c["head_since_us"], 0.0), c["head_us"])
        queue_us = queue_us + c["foreign"] * self._prefill_us(float(d.prompt_tokens), 0.0)
        for instance_id, work in ahead.items():
            if instance_id in self.rows:
                queue_us[self.rows[instance_id]] += work
        delay_us = d.delay_weight * d.arrivals_per_s * ((queue_us + work_us) / 1e6) * work_us
        return queue_us + service_us + d.harm_weight * work_us * c["batch"] + delay_us - SLACK_US

    def slow_us(self, demand: Demand) -> Floats:
        """What decoding on each row adds at least, weighted."""
        batch, c = self.columns["batch"], self.columns
        step_us = self._step_us(batch, c["context"])
        with_us = self._step_us(batch + 1, c["context"] + demand.context_tokens)
        alone_us = self._step_us(1.0, float(demand.context_tokens))
        expected = np.where(c["expected"] > 0, c["expected"], demand.expected_tokens)
        shared = np.minimum(expected, demand.expected_tokens)
        slow_us = (np.maximum(with_us - step_us - 1, 0.0) * batch + np.maximum(with_us - alone_us - 1, 0.0)) * shared
        return demand.harm_weight * np.where(batch > 0, slow_us, 0.0)

    def _step_us(self, batch: Floats | float, tokens: Floats | float) -> Floats:
        c = self.columns
        return c["d0"] + c["d1"] * batch + c["d2"] * tokens

    def kv_left(self, demand: Demand, ahead: dict[str, int]) -> Floats:
        """KV tokens free on each row with the request there; below zero = it does not fit."""
        left = self.columns["kv_free"] - demand.kv_tokens
        for instance_id, tokens in ahead.items():
            if instance_id in self.rows:
                left[self.rows[instance_id]] -= tokens
        return left

    def freest(self, left: Floats, count: int) -> list[Instance]:
        """Decode instances with most room for a request in proportion to what they have; ids break ties."""
        share = np.where(self.decodes, left / self.columns["kv_total"], -np.inf)
        order = np.argsort(-share, kind="stable")[:count]
        return [self.instances[row] for row in order.tolist() if self.decodes[row]]

    def in_order(
        self, bounds_us: Floats, mask: NDArray[np.bool_], room: NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[float, Instance]]:
        """Rows by their bounds, ids breaking ties; those without room last."""
        rows = np.flatnonzero(mask)
        keys = (bounds_us[rows],) if room is None else (bounds_us[rows], ~room[rows])
        for row in rows[np.lexsort(keys)].tolist():
            yield float(bounds_us[row]), self.instances[row]


def _token_limit(instance: Instance) -> int:
    whole = instance.info.kv_tokens_total // instance.block_tokens * instance.block_tokens
    return min(instance.info.context_tokens_max, whole)
