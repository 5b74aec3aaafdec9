"""The scheduler process: core, journal, gRPC services and metrics, from start to a clean stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio

from kvpool.channels.tls import TlsConfig
from kvpool.core import replicas
from kvpool.core.errors import BadArgument
from kvpool.service import rpc
from kvpool.v1 import directory_pb2, directory_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from scheduler.core import bounding, covering
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.core.policies import POLICIES
from scheduler.service.collecting import Collector
from scheduler.service.directory_servicer import DirectoryServicer
from scheduler.service.eventlog.shared_log import SharedLog, SharedLogConfig
from scheduler.service.journal import Journal
from scheduler.service.metrics import MetricsServer, SchedulerMetrics
from scheduler.service.scheduler_servicer import SchedulerServicer
from scheduler.service.shell import Shell

log = logging.getLogger(__name__)

#: Placements in flight get this long to be answered when the process is told to stop.
STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class SchedulerServerConfig:
    """How to run a scheduler.

    listen: "host:port" of the gRPC services; port 0 picks a free one.
    policy: of requests that name none.
    credential: callers must present it; empty = none asked for.
    tls: serve TLS, and only that.
    journal_dir: where the journal is kept; empty = no journal.
    journal_bytes_max: of all journal files; the oldest are deleted above it.
    redis: URL of the event log that several schedulers share; empty = this one is alone.
    redis_stream: its key in Redis, the same for all schedulers of a cluster.
    metrics_listen: "host:port" of /metrics and /health; empty = none.
    core: bounds and times; `scheduler_id` and `policy` here go before those in it.
    """

    listen: str = "127.0.0.1:7700"
    scheduler_id: str = "scheduler"
    policy: str = "kvpool"
    credential: str = ""
    tls: TlsConfig | None = None
    journal_dir: str = ""
    journal_bytes_max: int = 256 << 20
    redis: str = ""
    redis_stream: str = "kvpool:events"
    metrics_listen: str = ""
    core: SchedulerConfig = field(default_factory=SchedulerConfig)


class SchedulerServer:
    """One scheduler in somebody's event loop: `startup`, `main_loop` until `stop`, `shutdown`."""

    def __init__(self, config: SchedulerServerConfig) -> None:
        if config.policy not in POLICIES:
            raise BadArgument(f"policy {config.policy!r} is not one of {', '.join(POLICIES)}")
        self.config = config
        core_config = replace(config.core, scheduler_id=config.scheduler_id, policy=config.policy)
        journal = Journal(Path(config.journal_dir), config.journal_bytes_max) if config.journal_dir else None
        self.shell = Shell(SchedulerCore(core_config), journal)
        self.metrics = SchedulerMetrics(self.shell)
        self.log: SharedLog | None = None
        self.port = 0
        self._server: grpc.aio.Server | None = None
        self._http: MetricsServer | None = None
        self._stop = asyncio.Event()

    @property
    def address(self) -> str:
        host = self.config.listen.rpartition(":")[0]
        return f"{host}:{self.port}"

    def facts(self) -> dict[str, str]:
        journal = self.shell.journal
        return {
            "address": self.address,
            "scheduler": self.config.scheduler_id,
            "metrics_url": f"http://{self._metrics_address()}/metrics" if self._http is not None else "",
            "journal": journal.path if journal is not None else "",
        }

    def _metrics_address(self) -> str:
        assert self._http is not None
        return f"{self.config.metrics_listen.rpartition(':')[0]}:{self._http.port}"

    async def startup(self) -> None:
        """Raises: Unavailable if an address can't be bound; BadArgument if the event log's URL is none."""
        # Kernels are compiled, or loaded, before anybody waits for a place.
        bounding.warm_up()
        covering.warm_up()
        replicas.warm_up()
        self.shell.start()
        try:
            if self.config.redis:
                log_config = SharedLogConfig(self.config.redis, self.config.redis_stream)
                self.log = SharedLog(self.shell, log_config, lambda: self.address)
                self.metrics.registry.register(self.log)
            if self.config.metrics_listen:
                http = MetricsServer(self.metrics)
                await http.start(self.config.metrics_listen)
                self._http = http
            self._server, self.port = await rpc.serve(
                self.config.listen, self._register, credential=self.config.credential, tls=self.config.tls
            )
        except BaseException:
            await self.shutdown()
            raise
        if self.log is not None:
            self.log.start()
        log.info("scheduler %s listens on %s", self.config.scheduler_id, self.address)

    def _register(self, server: grpc.aio.Server) -> Sequence[str]:
        directory_pb2_grpc.add_DirectoryServicer_to_server(DirectoryServicer(self.shell), server)  # type: ignore[no-untyped-call]
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(SchedulerServicer(self.shell, self.log), server)  # type: ignore[no-untyped-call]
        return [
            directory_pb2.DESCRIPTOR.services_by_name["Directory"].full_name,
            scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"].full_name,
        ]

    def requests_answered(self) -> int:
        """Placements and refusals so far."""
        counts = self.shell.core.counts
        return counts["placements"] + counts["refusals"]

    async def main_loop(self) -> None:
        """Returns after `stop`."""
        await self._stop.wait()

    def stop(self) -> None:
        self._stop.set()

    async def shutdown(self) -> None:
        """Falls silent in the event log, ends all life lines, then calls under way, then the journal."""
        if self.log is not None:
            await self.log.stop()
        server, self._server = self._server, None
        if server is not None:
            self.shell.hang_up("the scheduler is stopping")
            await server.stop(STOP_GRACE_S)
        if self._http is not None:
            await self._http.stop()
            self._http = None
        await self.shell.stop()


def run_scheduler(
    config: SchedulerServerConfig, *, on_ready: Callable[[dict[str, str]], None] = lambda facts: None
) -> None:
    """Runs a scheduler until SIGTERM or SIGINT.

    Args:
        on_ready: called with address and other facts once requests are served.
    Raises: BadArgument, Unavailable if it can't start.
    """
    asyncio.run(_run(config, on_ready))


async def _run(config: SchedulerServerConfig, on_ready: Callable[[dict[str, str]], None]) -> None:
    server = SchedulerServer(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    await server.startup()
    collecting = asyncio.create_task(Collector(server.requests_answered).main_loop())
    try:
        on_ready(server.facts())
        await server.main_loop()
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        await server.shutdown()
