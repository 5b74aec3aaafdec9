"""Hosts with what runs on them: nodes, instances, their life lines; and what faults do to them. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Protocol

import xxhash

from kvpool.core.changes import ChangeKind
from kvpool.core.ids import Role, Tier
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from scheduler.core.events import Event, InstanceInfo, InstanceJoined, InstanceLeft, InstanceReported, SourceAttached
from scheduler.simulator.batch import Record
from scheduler.simulator.clock import EventQueue
from scheduler.simulator.engine import Busy, Engine
from scheduler.simulator.fetches import Fetches
from scheduler.simulator.handoffs import Handoffs
from scheduler.simulator.jobs import Job, Leg
from scheduler.simulator.lines import Control, LifeLine, SourceLine
from scheduler.simulator.pool import Node, Pool
from scheduler.simulator.settings import SimulationConfig

MODEL = "model"
#: News are reported at once, but not more often than this.
REPORT_US_MIN = 20_000


class Listener(Protocol):
    """Who gave engines their jobs."""

    def first_token(self, engine: Engine, job: Job) -> None: ...

    def job_done(self, engine: Engine, job: Job, tokens: int, records: list[Record]) -> None: ...

    def engine_lost(self, engine: Engine) -> None:
        """Its process is gone; the connections to it were reset."""

    def host_cut(self, host: str, cut: bool) -> None:
        """A host can't be reached any more, or can again."""


def namespace_of(config: SimulationConfig, block_tokens: int) -> NamespaceSpec:
    """One group and one shard; a block has the bytes that the hardware's model says."""
    block_bytes = config.hardware.kv_token_bytes * block_tokens
    group = GroupSpec(0, GroupKind.FULL, (0,), block_tokens, 1, 1, block_bytes)
    return NamespaceSpec(MODEL, "", "bfloat16", "simulator", "lkthd", "xxh3_128/1", (group,))


class Keys:
    """Block keys of hash ids: 16 bytes each."""

    def __init__(self) -> None:
        self._keys: dict[int, bytes] = {}

    def of(self, block: int) -> bytes:
        key = self._keys.get(block)
        if key is None:
            key = self._keys[block] = xxhash.xxh3_128_digest(block.to_bytes(8, "little", signed=True))
        return key


class InstanceLine(LifeLine):
    """An instance introduces itself and reports."""

    def __init__(self, control: Control, queue: EventQueue, delay_us: int, info: InstanceInfo) -> None:
        super().__init__(control, queue, delay_us)
        self.info = info

    def introduce(self) -> None:
        self.send(InstanceJoined(self.stream, self.info))

    def farewell(self) -> Event:
        return InstanceLeft(self.stream)

    def order(self, stream: int, role: Role) -> None:
        """The scheduler wants another role: taken at once, and told with the next report."""
        if stream == self.stream and not self._cut:
            self.info = replace(self.info, role=role)


@dataclass(slots=True, eq=False)
class Seat:
    """A place for an instance: the engine that has it now, and what it says."""

    instance_id: str
    role: Role  # of each of its processes when it begins
    host: str
    engine: Engine
    line: InstanceLine
    hbm_line: SourceLine
    epoch: int = 1
    reported_us: int = -(10**9)
    report_due: bool = False
    busy_before: list[Busy] = field(default_factory=list)  # of earlier lives

    def busy(self) -> Busy:
        total = Busy()
        for busy in (*self.busy_before, self.engine.busy):
            total.prefill_us += busy.prefill_us
            total.decode_us += busy.decode_us
            total.prefill_tokens += busy.prefill_tokens
            total.decode_tokens += busy.decode_tokens
        return total


class Hosts:
    """All members of the cluster but the gateway. Implements what engines ask of their surroundings."""

    def __init__(self, config: SimulationConfig, block_tokens: int, queue: EventQueue, control: Control) -> None:
        self.config, self.block_tokens = config, block_tokens
        self.queue, self.control = queue, control
        self.pool = Pool(queue, config.hardware, block_tokens)
        self.fetches = Fetches(self.pool)
        self.handoffs = Handoffs(self.pool, config.handoff_wait_us)
        self.keys = Keys()
        self.namespace = namespace_of(config, block_tokens)
        self.namespace_id = bytes(self.namespace.id())
        self.listener: Listener | None = None
        self.seats: dict[str, Seat] = {}
        self.hosts: dict[str, list[Seat]] = {}
        self.cut: dict[str, None] = {}
        for number in range(config.nodes):
            self._add_host(number)

    # ------------------------------------------------------------ building

    def _add_host(self, number: int) -> None:
        width = len(str(self.config.nodes - 1))
        host = f"host-{number:0{width}d}"
        self.pool.add_host(host)
        self.hosts[host] = []
        self._add_node(host, number, 1)
        for place in range(self.config.hardware.instances_per_node):
            suffix = f".{place}" if self.config.hardware.instances_per_node > 1 else ""
            index = number * self.config.hardware.instances_per_node + place
            self._add_seat(f"engine-{number:0{width}d}{suffix}", host, self._role(index))

    def _role(self, index: int) -> Role:
        if self.config.split is None:
            return Role.BOTH
        prefills, decodes = self.config.split
        if index < prefills:
            return Role.PREFILL
        return Role.DECODE if index < prefills + decodes else Role.BOTH

    def _add_node(self, host: str, number: int, epoch: int) -> None:
        node = self.pool.add_node(host, number, epoch)
        tiers = [Tier.DRAM] if node.store.capacity_blocks[Tier.DRAM] else []
        if node.store.capacity_blocks[Tier.SSD]:
            tiers.append(Tier.SSD)
        for tier in tiers:
            node.lines[tier] = self._node_line(node, tier)
            node.lines[tier].connect()

    def _node_line(self, node: Node, tier: Tier) -> SourceLine:
        source_id = node.node_id if tier is Tier.DRAM else f"{node.node_id}.ssd"
        total = node.store.capacity_blocks[tier] * self.pool.block_bytes

        def attached(stream: int) -> SourceAttached:
            return SourceAttached(stream, source_id, node.epoch, tier, f"{source_id}:1", node.host, "", total)

        return self._source_line(source_id, attached, lambda: node.store.blocks(tier), lambda: node.store.count(tier))

    def _source_line(
        self,
        source_id: str,
        attached: Callable[[int], SourceAttached],
        held: Callable[[], list[int]],
        count: Callable[[], int],
    ) -> SourceLine:
        config = self.config
        random = Random(f"{config.seed}/{source_id}")
        return SourceLine(
            self.control,
            self.queue,
            config.rpc_us,
            config.announce_us,
            attached,
            held,
            count,
            self.keys.of,
            self.pool.block_bytes,
            random,
        )

    def _add_seat(self, instance_id: str, host: str, role: Role) -> None:
        self.pool.add_instance(instance_id)
        seat = self._seated(instance_id, host, role, 1)
        self.seats[instance_id] = seat
        self.hosts[host].append(seat)
        self._start(seat)

    def _seated(self, instance_id: str, host: str, role: Role, epoch: int) -> Seat:
        config = self.config
        seed = f"{config.seed}/{instance_id}/{epoch}"
        engine = Engine(
            instance_id, host, role, config.hardware, self.block_tokens, self.queue, self, seed, config.noise_ratio,
            config.waiting_max,
        )  # fmt: skip
        line = InstanceLine(self.control, self.queue, config.rpc_us, self._info(instance_id, host, role, epoch))
        source_id = f"{instance_id}/hbm"
        address = f"{instance_id}:2" if config.hbm_readable else ""
        total = engine.cache.capacity_blocks * self.pool.block_bytes

        def attached(stream: int) -> SourceAttached:
            return SourceAttached(stream, source_id, epoch, Tier.HBM, address, host, instance_id, total)

        hbm_line = self._source_line(source_id, attached, engine.cache.blocks, engine.cache.count)
        self.pool.caches[source_id] = engine
        return Seat(instance_id, role, host, engine, line, hbm_line, epoch)

    def _info(self, instance_id: str, host: str, role: Role, epoch: int) -> InstanceInfo:
        hardware = self.config.hardware
        node = self.pool.nodes[host]
        return InstanceInfo(
            instance_id=instance_id,
            epoch=epoch,
            role=role,
            model=MODEL,
            namespace=self.namespace,
            context_tokens_max=hardware.context_tokens_max + self.config.max_tokens,
            kv_tokens_total=hardware.kv_tokens // self.block_tokens * self.block_tokens,
            batch_max=hardware.batch_max,
            address=f"{instance_id}:1",
            host_id=host,
            hbm_source_id=f"{instance_id}/hbm",
            node_source_id=node.node_id if node.lines else "",
            node_address=f"{node.node_id}:1" if node.lines else "",
            chunk_tokens=hardware.chunk_tokens,
            namespace_id=self.namespace_id,
            gpu=hardware.gpu,
            tp=hardware.gpus_per_instance,
            price_per_hour=hardware.price_instance_hour,
            role_changeable=self.config.role_changeable,
        )

    def _start(self, seat: Seat) -> None:
        seat.line.connect()
        seat.hbm_line.connect()
        self._report(seat, seat.engine)

    # ------------------------------------------------------------ signs of life

    def start_heartbeats(self) -> None:
        """Sources say that they live, each at the interval that the scheduler asks for."""
        interval_us = self.config.scheduler.heartbeat_interval_us
        for node in self.pool.nodes.values():
            for line in node.lines.values():
                line.heartbeat(interval_us)
        for seat in self.seats.values():
            if not seat.engine.dead:
                seat.hbm_line.heartbeat(interval_us)
        self.queue.after(interval_us, self.start_heartbeats)

    def _report(self, seat: Seat, engine: Engine) -> None:
        """Reports at the interval that the scheduler asks for, as long as this engine lives."""
        if engine is not seat.engine or engine.dead:
            return
        interval_us = self.config.scheduler.report_interval_us
        if self.queue.now_us - seat.reported_us >= interval_us:
            self._send_report(seat)
        self.queue.at(seat.reported_us + interval_us, self._report, seat, engine)

    def _news(self, seat: Seat) -> None:
        """Reports soon."""
        if not seat.report_due:
            seat.report_due = True
            at_us = max(self.queue.now_us, seat.reported_us + REPORT_US_MIN)
            self.queue.at(at_us, self._report_news, seat, seat.engine)

    def _report_news(self, seat: Seat, engine: Engine) -> None:
        seat.report_due = False
        if engine is seat.engine and not engine.dead:
            self._send_report(seat)

    def _send_report(self, seat: Seat) -> None:
        seat.reported_us = self.queue.now_us
        engine = seat.engine
        samples = engine.take_samples()
        seat.line.send(
            InstanceReported(
                stream=seat.line.stream,
                running=engine.running,
                waiting=engine.waiting,
                kv_tokens_free=engine.kv_tokens_free,
                prefill=tuple(samples.prefill),
                decode=tuple(samples.decode),
                links=tuple(samples.links),
                finished_prefills=tuple(samples.finished_prefills),
                draining=False,
                role=seat.line.info.role,
            )
        )

    # ------------------------------------------------------------ what engines ask for

    def admitted(self, engine: Engine, job: Job) -> bool:
        if job.leg is Leg.DECODE:
            return self.handoffs.wanted(engine, job)
        if job.leg is Leg.PREFILL and job.own_blocks:
            self.handoffs.export(engine, job, job.own_blocks, False)
        return bool(job.pull) and self.fetches.start(engine, job, job.pull)

    def computed(self, engine: Engine, job: Job, blocks: int, tail: bool) -> None:
        has_node = bool(self.pool.nodes[engine.host].lines)
        if job.use_pool and has_node and (blocks > job.exported_blocks or (tail and job.leg is Leg.PREFILL)):
            self.handoffs.export(engine, job, blocks, tail and job.leg is Leg.PREFILL)

    def cache_changed(self, engine: Engine, stored: list[int], removed: list[int]) -> None:
        line = self.seats[engine.instance_id].hbm_line
        if removed:
            line.changed(ChangeKind.REMOVED, removed)
        if stored:
            line.changed(ChangeKind.STORED, stored)

    def released(self, engine: Engine, job: Job) -> None:
        self.fetches.drop(job)
        if job.leg is Leg.DECODE:
            self.handoffs.close(job)

    def first_token(self, engine: Engine, job: Job) -> None:
        self._news(self.seats[engine.instance_id])
        assert self.listener is not None
        self.listener.first_token(engine, job)

    def job_done(self, engine: Engine, job: Job, tokens: int, records: list[Record]) -> None:
        assert self.listener is not None
        self.listener.job_done(engine, job, tokens, records)

    # ------------------------------------------------------------ faults

    def crash_instance(self, seat: Seat) -> None:
        """Its process dies. What is connected to it sees a reset."""
        engine = seat.engine
        if engine.dead:
            return
        engine.crash()
        for job in engine.jobs():
            self.released(engine, job)
        seat.line.hang_up()
        seat.hbm_line.hang_up()
        assert self.listener is not None
        self.listener.engine_lost(engine)

    def restart_instance(self, seat: Seat) -> None:
        """A new process with an empty cache takes the seat."""
        if not seat.engine.dead:
            return
        fresh = self._seated(seat.instance_id, seat.host, seat.role, seat.epoch + 1)
        seat.busy_before.append(seat.engine.busy)
        seat.engine, seat.line, seat.hbm_line, seat.epoch = fresh.engine, fresh.line, fresh.hbm_line, fresh.epoch
        seat.report_due = False
        if seat.host in self.cut:
            seat.line.cut()
            seat.hbm_line.cut()
        self._start(seat)

    def crash_node(self, host: str) -> None:
        """A node's process dies, and its blocks with it."""
        node = self.pool.nodes[host]
        node.dead = True
        for line in node.lines.values():
            line.hang_up()
        for port in ("nic-out", "domain-out"):
            if f"{host}/{port}" in self.pool.fabric.resources:
                self.pool.fabric.fail_through(f"{host}/{port}")

    def restart_node(self, host: str) -> None:
        old = self.pool.nodes[host]
        if old.dead:
            self._add_node(host, old.number, old.epoch + 1)
            if host in self.cut:
                for line in self.pool.nodes[host].lines.values():
                    line.cut()

    def cut_host(self, host: str) -> None:
        """A host reaches nobody and nobody reaches it."""
        self.cut[host] = None
        for line in self._lines_of(host):
            line.cut()
        self.set_network(host, 0.0)
        assert self.listener is not None
        self.listener.host_cut(host, True)

    def heal_host(self, host: str) -> None:
        self.cut.pop(host, None)
        for line in self._lines_of(host):
            line.heal()
        self.set_network(host, 1.0)
        assert self.listener is not None
        self.listener.host_cut(host, False)

    def set_network(self, host: str, factor: float) -> None:
        """What is left of the bandwidth of a host's ports."""
        for port in ("nic-out", "nic-in", "domain-out", "domain-in"):
            if f"{host}/{port}" in self.pool.fabric.resources:
                self.pool.fabric.set_factor(f"{host}/{port}", factor)

    def source_lines(self, host: str) -> list[SourceLine]:
        lines = list(self.pool.nodes[host].lines.values())
        return lines + [seat.hbm_line for seat in self.hosts[host]]

    def _lines_of(self, host: str) -> list[LifeLine]:
        return [*self.source_lines(host), *(seat.line for seat in self.hosts[host])]

    def check_invariants(self) -> None:
        self.pool.fabric.check_invariants()
        for node in self.pool.nodes.values():
            node.store.check_invariants()
        for seat in self.seats.values():
            if not seat.engine.dead:
                seat.engine.check_invariants()
