"""One simulation: the production scheduler core under virtual time, against the ground truth. Pure and deterministic.

`simulate` is the way in. The same trace and configuration give the same events in the same order, and so the same log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvpool.core.errors import BadArgument
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.core.policies import POLICIES
from scheduler.simulator.clock import EventLog, EventQueue
from scheduler.simulator.columns import TraceRequest
from scheduler.simulator.control import Control
from scheduler.simulator.faultplan import FaultPlan
from scheduler.simulator.gateway import Gateway
from scheduler.simulator.hosts import Hosts
from scheduler.simulator.metrics import Instance, Result
from scheduler.simulator.settings import SimulationConfig

BLOCK_TOKENS_DEFAULT = 512


class Simulation:
    """Everything of one simulation; `run` it once."""

    def __init__(
        self, requests: Sequence[TraceRequest], config: SimulationConfig, sink: Callable[[str], object] | None = None
    ) -> None:
        """Args: sink: takes each line of the log.

        Raises: BadArgument for what can't be simulated.
        """
        config.check()
        if config.policy not in POLICIES:
            raise BadArgument(f"policy {config.policy!r} is not one of {', '.join(POLICIES)}")
        self.config = config
        self.block_tokens = requests[0].block_tokens if len(requests) else BLOCK_TOKENS_DEFAULT
        if config.hardware.kv_tokens < 2 * self.block_tokens:
            raise BadArgument(
                f"{config.hardware.kv_tokens} KV tokens have no room for two blocks of {self.block_tokens} tokens",
                hint="raise kv_tokens of the hardware",
            )
        self.queue = EventQueue()
        self.log = EventLog(self.queue, sink)
        self.core = SchedulerCore(self._scheduler_config())
        self.control = Control(self.queue, self.log, self.core, config.rpc_us)
        self.hosts = Hosts(config, self.block_tokens, self.queue, self.control)
        self.gateway = Gateway(config, requests, self.queue, self.log, self.control, self.hosts)
        self.control.answers = self.gateway
        self.hosts.listener = self.gateway
        self.faults = FaultPlan(config.faults, self.hosts, self.queue, self.log)

    def _scheduler_config(self) -> SchedulerConfig:
        """The scheduler's settings, with room for the cluster."""
        scheduler = self.config.scheduler
        sources = self.config.instances + 2 * self.config.nodes
        return replace(
            scheduler,
            policy=self.config.policy,
            instances_max=max(scheduler.instances_max, self.config.instances),
            sources_max=max(scheduler.sources_max, sources),
        )

    def run(self) -> Result:
        """Until each request has ended."""
        self.hosts.start_heartbeats()
        self.gateway.start()
        self.faults.start()
        while not self.gateway.done:
            assert self.queue.step(), "nothing happens any more, and requests have not ended"
        return self._result()

    def settle(self, duration_us: int) -> None:
        """Goes on for a while, for what the last request left behind."""
        until_us = self.queue.now_us + duration_us
        while self.queue.next_us() <= until_us:
            self.queue.step()

    def check_invariants(self) -> None:
        self.hosts.check_invariants()
        self.core.check_invariants()

    def _result(self) -> Result:
        config, hosts = self.config, self.hosts
        duration_us = max(max((r.ended_us for r in self.gateway.records), default=0), 1)
        instances = []
        for seat in hosts.seats.values():
            busy = seat.busy()
            instances.append(
                Instance(
                    seat.instance_id,
                    seat.role.name.lower(),
                    busy.prefill_us / duration_us,
                    busy.decode_us / duration_us,
                    busy.prefill_tokens,
                    busy.decode_tokens,
                )
            )
        hours = duration_us / 3.6e9
        return Result(
            policy=config.policy,
            seed=config.seed,
            ttft_slo_us=config.ttft_slo_us,
            tbt_slo_us=config.tbt_slo_us,
            duration_us=duration_us,
            records=tuple(sorted(self.gateway.records, key=lambda r: r.number)),
            instances=tuple(instances),
            scheduler_counts=dict(self.core.counts),
            bytes_pulled=hosts.pool.bytes_pulled,
            bytes_published=hosts.pool.bytes_published,
            pull_failures=hosts.pool.pull_failures,
            transfers=hosts.pool.fabric.transfers_done,
            log_sha256=self.log.sha256(),
            log_lines=self.log.lines,
            events=self.control.events,
            actions=self.queue.done,
            gpu_price=config.hardware.price_instance_hour * config.instances * hours,
        )


def simulate(
    requests: Sequence[TraceRequest], config: SimulationConfig, sink: Callable[[str], object] | None = None
) -> Result:
    """Runs a trace. Raises: BadArgument for what can't be simulated."""
    return Simulation(requests, config, sink).run()
