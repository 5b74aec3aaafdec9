"""Columns of all instances of one model, from which the cost of an option on each is bounded at once. Pure.

What is taken in the end is weighed option by option; the columns only say which options are worth it.
"""

from __future__ import annotations

import numpy as np

from scheduler.core.arrivals import Rate
from scheduler.core.bounding import COLUMNS, FOUND, Floats, Ints
from scheduler.core.cluster import Cluster, Instance, State
from scheduler.core.cost import CostBook
from scheduler.core.placements import PlacementBook

_CALM = Rate()


class Fleet:
    """The instances of a model that may be placed on, sorted by id, one row each. Derived: it can be made anew."""

    def __init__(self, model: str, cluster: Cluster, version: int) -> None:
        self.version = version
        alive = [cluster.instances[i] for i in cluster.by_model.get(model, ())]
        self.instances = [i for i in alive if i.state is State.ALIVE and not i.draining]
        self.rows = {instance.id: row for row, instance in enumerate(self.instances)}
        self._hbm: Ints | None = None
        self._source_hosts: Ints | None = None
        self.prefills = np.array([i.prefills() for i in self.instances], bool)
        self.decodes = np.array([i.decodes() for i in self.instances], bool)
        hosts = dict.fromkeys(i.info.host_id for i in self.instances)
        numbers = {host: number for number, host in enumerate(hosts)}
        self.host_numbers = numbers
        self.hosts = np.array([numbers[i.info.host_id] for i in self.instances], np.int64)
        #: Whether the node of each is on its host.
        self.beside = np.array([_beside(i, cluster) for i in self.instances], bool)
        self.block_bytes_min = min((i.block_bytes for i in self.instances), default=0)
        self.namespaces = dict.fromkeys(i.info.namespace_id for i in self.instances)
        self.tokens_max = max((i.tokens_max for i in self.instances), default=0)
        #: (COLUMNS, rows); see `bounding`.
        self.table: Floats = np.zeros((COLUMNS, len(self.instances)))
        self.nothing: Floats = np.zeros(len(self.instances))
        #: What was found for the request at hand: (FOUND, rows).
        self.found: Floats = np.zeros((FOUND, len(self.instances)))
        self.dirty: dict[str, None] = dict.fromkeys(self.rows)

    def hbm_numbers(self, numbers: dict[str, int]) -> Ints:
        """The directory's number of each row's HBM source, -1 (the last place of what is indexed) for none.

        Numbers are those of the same version of the cluster, so they are looked up once.
        """
        if self._hbm is None:
            self._hbm = np.array([numbers.get(i.info.hbm_source_id, -1) for i in self.instances], np.int64)
        return self._hbm

    def source_hosts(self, numbers: dict[str, int]) -> Ints:
        """Of each host of this fleet, its number among those of sources; -1 (the last place) for none."""
        if self._source_hosts is None:
            self._source_hosts = np.array([numbers.get(host, -1) for host in self.host_numbers], np.int64)
        return self._source_hosts

    def touch(self, instance_id: str) -> None:
        if instance_id in self.rows:
            self.dirty[instance_id] = None

    def refresh(self, book: PlacementBook, costs: CostBook) -> None:
        """Brings the rows up to date of those that have changed."""
        if not self.dirty:
            return
        for instance_id in self.dirty:
            row = self.rows[instance_id]
            self.table[:, row] = self._values(self.instances[row], book, costs)
        self.dirty.clear()

    @staticmethod
    def _values(instance: Instance, book: PlacementBook, costs: CostBook) -> tuple[float, ...]:
        """In the order of the columns of `bounding`."""
        held, stalling = book.on(instance.id), book.stalling.get(instance.id, _CALM)
        head_us = held.queue[next(iter(held.queue))] if held.queue else 0
        placed = len(held.decoding)
        batch = placed
        if instance.kv_tokens_foreign:
            batch += max(instance.running - placed - len(held.queue), 0)
        return (
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
            stalling.per_s,
            stalling.seen_us,
        )


def _beside(instance: Instance, cluster: Cluster) -> bool:
    node = cluster.sources.get(instance.info.node_source_id)
    return node is not None and node.attached.host_id == instance.info.host_id
