"""Ground truth of the pool: which node holds what, and how blocks get from one place to another. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvpool.core.changes import ChangeKind
from kvpool.core.ids import Tier
from scheduler.core.events import LinkSample
from scheduler.simulator.clock import EventQueue
from scheduler.simulator.engine import SAMPLES_MAX, Engine
from scheduler.simulator.hardware import Hardware
from scheduler.simulator.lines import SourceLine
from scheduler.simulator.links import Fabric, Transfer
from scheduler.simulator.memory import NodeStore, StoreChanges


@dataclass(slots=True, eq=False)
class Node:
    """One host's part of the pool; after a crash a new one takes its place."""

    node_id: str
    host: str
    number: int
    epoch: int
    store: NodeStore
    lines: dict[Tier, SourceLine] = field(default_factory=dict)
    dead: bool = False


class Pool:
    """Nodes, their blocks, and the ways between them."""

    def __init__(self, queue: EventQueue, hardware: Hardware, block_tokens: int) -> None:
        self.queue, self.hardware, self.block_tokens = queue, hardware, block_tokens
        self.block_bytes = hardware.kv_token_bytes * block_tokens
        self.fabric = Fabric(queue)
        self.nodes: dict[str, Node] = {}  # by host
        self.by_source: dict[str, tuple[Node, Tier]] = {}
        self.caches: dict[str, Engine] = {}  # by source id of an instance's HBM
        self._publish_free_us: dict[str, float] = {}
        self.bytes_pulled = 0
        self.bytes_published = 0
        self.pull_failures = 0

    # ------------------------------------------------------------ members

    def add_host(self, host: str) -> None:
        hardware = self.hardware
        for port in ("nic-out", "nic-in"):
            self.fabric.add(f"{host}/{port}", hardware.nic_bytes_s)
        if hardware.ssd_bytes:
            self.fabric.add(f"{host}/ssd", hardware.ssd_bytes_s)
        if hardware.domain_nodes:
            for port in ("domain-out", "domain-in"):
                self.fabric.add(f"{host}/{port}", hardware.domain_bytes_s)

    def add_instance(self, instance_id: str) -> None:
        self.fabric.add(f"{instance_id}/local", self.hardware.local_bytes_s)
        self.fabric.add(f"{instance_id}/pull", self.hardware.pull_bytes_s)

    def add_node(self, host: str, number: int, epoch: int) -> Node:
        """A node's first life, or its next one: empty."""
        hardware = self.hardware
        store = NodeStore(hardware.dram_bytes // self.block_bytes, hardware.ssd_bytes // self.block_bytes)
        node = Node(f"{host}.node", host, number, epoch, store)
        self.nodes[host] = node
        self.by_source[node.node_id] = (node, Tier.DRAM)
        if hardware.ssd_bytes:
            self.by_source[f"{node.node_id}.ssd"] = (node, Tier.SSD)
        return node

    # ------------------------------------------------------------ ways

    def path(self, host: str, tier: Tier, engine: Engine) -> tuple[list[str], float]:
        """What a transfer from a tier of a host to an engine goes through, and its latency in microseconds."""
        hardware = self.hardware
        names = [f"{host}/ssd"] if tier is Tier.SSD else []
        latency_us = hardware.ssd_latency_us if tier is Tier.SSD else 0.0
        if host == engine.host:
            return [*names, f"{engine.instance_id}/local"], latency_us + hardware.local_latency_us
        fast = hardware.domain_nodes > 0 and self._domain(host) == self._domain(engine.host)
        kind = "domain" if fast else "nic"
        names += [f"{host}/{kind}-out", f"{engine.host}/{kind}-in", f"{engine.instance_id}/pull"]
        return names, latency_us + hardware.nic_latency_us

    def _domain(self, host: str) -> int:
        return self.nodes[host].number // self.hardware.domain_nodes

    # ------------------------------------------------------------ publishing

    def publish(self, engine: Engine, blocks: Sequence[int], tail_bytes: int, then: Callable[[bool], None]) -> None:
        """Copies blocks from an engine to its node, one batch after another. `then` hears whether the node has them."""
        node = self.nodes[engine.host]
        missing = [block for block in blocks if not node.store.has(block, Tier.DRAM)]
        size_bytes = len(missing) * self.block_bytes + tail_bytes
        begin_us = max(float(self.queue.now_us), self._publish_free_us.get(engine.instance_id, 0.0))
        end_us = begin_us + size_bytes / self.hardware.local_bytes_s * 1e6
        self._publish_free_us[engine.instance_id] = end_us
        self.queue.at(-int(-end_us // 1), self._published, engine, node, list(blocks), size_bytes, then)

    def _published(
        self, engine: Engine, node: Node, blocks: list[int], size_bytes: int, then: Callable[[bool], None]
    ) -> None:
        if node.dead or engine.dead:
            then(False)
            return
        self.bytes_published += size_bytes
        self.tell(node, node.store.store(blocks))
        then(True)

    def tell(self, node: Node, changes: StoreChanges) -> None:
        """Announces what changed in a node."""
        for tier, line in node.lines.items():
            if changes.removed[tier]:
                line.changed(ChangeKind.REMOVED, list(changes.removed[tier]))
            if changes.stored[tier]:
                line.changed(ChangeKind.STORED, list(changes.stored[tier]))

    # ------------------------------------------------------------ reading

    def readable(self, source_id: str, blocks: Sequence[int], reader: Engine) -> int:
        """How many leading blocks a source can give a reader just now; reading keeps them warm."""
        if source_id in self.by_source:
            node, tier = self.by_source[source_id]
            count = 0 if node.dead else node.store.leading(blocks, tier)
            node.store.touch(blocks[:count], tier)
            return count
        engine = self.caches.get(source_id)
        if engine is None or engine.dead or engine is reader:
            return 0
        return engine.cache.match(blocks)

    def move(
        self, source_id: str, size_bytes: int, engine: Engine, on_end: Callable[[Transfer, bool], None]
    ) -> Transfer:
        """Starts a transfer from a source to an engine; the engine takes its time for its next report."""
        if source_id in self.by_source:
            node, tier = self.by_source[source_id]
            host = node.host
        else:
            host, tier = self.caches[source_id].host, Tier.HBM

        def ended(transfer: Transfer, failed: bool) -> None:
            self._measured(engine, source_id, transfer, failed)
            on_end(transfer, failed)

        names, latency_us = self.path(host, tier, engine)
        return self.fabric.start(size_bytes, names, latency_us, ended)

    def _measured(self, engine: Engine, source_id: str, transfer: Transfer, failed: bool) -> None:
        self.pull_failures += failed
        self.bytes_pulled += 0 if failed else transfer.size_bytes
        if len(engine.samples.links) < SAMPLES_MAX:
            measured_us = int((self.queue.now_us - transfer.begun_us) * engine.clock_factor)
            engine.samples.links.append(LinkSample(source_id, int(transfer.moved_bytes), measured_us, failed, 1))
