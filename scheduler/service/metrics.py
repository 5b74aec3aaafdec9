"""The scheduler's numbers for Prometheus, read from the core when asked for, and the small HTTP server for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvpool.core.errors import BadArgument, Unavailable
from kvpool.core.ids import Role
from scheduler.core.cluster import State
from scheduler.core.core import SchedulerCore
from scheduler.service.shell import Shell

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_BYTES_MAX = 16_384
REQUEST_TIMEOUT_S = 5.0
#: One connection more is closed unanswered.
CONNECTIONS_MAX = 32


class SchedulerMetrics:
    """A Prometheus collector over the shell's core; holds no numbers of its own."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        core = self._shell.core
        yield from self._decisions(core)
        yield from self._members(core)
        yield from self._instances(core)
        journal = self._shell.journal
        size = GaugeMetricFamily("kvpool_scheduler_journal_bytes", "Bytes of all journal files.")
        size.add_metric([], journal.bytes_total if journal is not None else 0)
        yield size
        failed = GaugeMetricFamily("kvpool_scheduler_journal_failed", "1 if the journal could not be written.")
        failed.add_metric([], 1 if journal is not None and journal.error else 0)
        yield failed

    @staticmethod
    def _decisions(core: SchedulerCore) -> Iterator[Metric]:
        yield CounterMetricFamily("kvpool_scheduler_placements", "Requests placed.", value=core.counts["placements"])
        yield CounterMetricFamily("kvpool_scheduler_splits", "Requests placed on two instances.", core.counts["splits"])
        refused = CounterMetricFamily("kvpool_scheduler_refusals", "Requests refused.", labels=["reason"])
        ended = CounterMetricFamily("kvpool_scheduler_placements_ended", "Placements that ended.", labels=["why"])
        for name in sorted(core.counts):
            if name.startswith("refused_"):
                refused.add_metric([name.removeprefix("refused_")], core.counts[name])
            elif name.startswith("ended_"):
                ended.add_metric([name.removeprefix("ended_")], core.counts[name])
        yield refused
        yield ended
        active = GaugeMetricFamily("kvpool_scheduler_active_requests", "Placements under way.")
        active.add_metric([], len(core.book.placements))
        yield active
        waiting = GaugeMetricFamily("kvpool_scheduler_waiting_requests", "Requests that wait for a place.")
        waiting.add_metric([], len(core.room.entries))
        yield waiting

    @staticmethod
    def _members(core: SchedulerCore) -> Iterator[Metric]:
        members = GaugeMetricFamily("kvpool_scheduler_members", "Life lines.", labels=["kind", "state"])
        for kind, of_kind in (
            ("instance", core.cluster.instances),
            ("source", core.cluster.sources),
            ("gateway", core.cluster.gateways),
        ):
            for state in State:
                count = sum(member.state is state for member in of_kind.values())
                members.add_metric([kind, state.value], count)
        yield members
        blocks = core.directory.counts()
        keys = GaugeMetricFamily("kvpool_scheduler_directory_blocks", "Distinct keys in the directory.")
        keys.add_metric([], blocks.blocks)
        yield keys
        replicas = GaugeMetricFamily("kvpool_scheduler_directory_replicas", "Replicas in the directory.")
        replicas.add_metric([], blocks.replicas)
        yield replicas

    def _instances(self, core: SchedulerCore) -> Iterator[Metric]:
        labels = ["instance"]
        reserved = GaugeMetricFamily(
            "kvpool_scheduler_kv_tokens_reserved", "KV tokens held by placements.", labels=labels
        )
        available = GaugeMetricFamily("kvpool_scheduler_kv_tokens_available", "KV tokens to place on.", labels=labels)
        queue = GaugeMetricFamily("kvpool_scheduler_queue_seconds", "Predicted prefill work.", labels=labels)
        now_us = self._shell.now_us()
        for instance_id in sorted(core.cluster.instances):
            holdings = core.book.on(instance_id)
            reserved.add_metric([instance_id], holdings.kv_tokens)
            instance = core.cluster.instances[instance_id]
            available.add_metric([instance_id], instance.kv_tokens_available(holdings.kv_tokens))
            queue.add_metric([instance_id], holdings.queue_left_us(now_us) / 1e6)
        yield reserved
        yield available
        yield queue
        yield from self._predictions(core)

    @staticmethod
    def _predictions(core: SchedulerCore) -> Iterator[Metric]:
        errors = GaugeMetricFamily(
            "kvpool_prediction_error_ratio",
            "|predicted - actual| / actual, median of the last 64.",
            labels=["instance", "kind"],
        )
        for instance_id in sorted(core.calibrations):
            known = core.calibrations[instance_id]
            for kind, of_kind in (("ttft", known.ttft), ("pull", known.pull), ("prefill", known.prefill)):
                median = of_kind.median()
                if median is not None:
                    errors.add_metric([instance_id, kind], median)
        yield errors
        busy = GaugeMetricFamily(
            "kvpool_scheduler_phase_utilisation",
            "Share of a phase that is busy.",
            labels=["model", "phase"],
        )
        for model in sorted(core.roles.loads):
            busy.add_metric([model, "prefill"], core.roles.loads[model].prefill)
            busy.add_metric([model, "decode"], core.roles.loads[model].decode)
        yield busy
        yield from SchedulerMetrics._roles(core)

    @staticmethod
    def _roles(core: SchedulerCore) -> Iterator[Metric]:
        have = GaugeMetricFamily("kvpool_scheduler_roles", "Instances that have a role.", labels=["model", "role"])
        for model in sorted(core.cluster.by_model):
            having = [core.cluster.instances[i].info.role for i in core.cluster.by_model[model]]
            for role in Role:
                have.add_metric([model, role.name.lower()], having.count(role))
        yield have
        changes = CounterMetricFamily(
            "kvpool_scheduler_role_changes", "Changes of roles, by their end.", labels=["how"]
        )
        for name in sorted(core.counts):
            if name.startswith("role_change_"):
                changes.add_metric([name.removeprefix("role_change_")], core.counts[name])
        yield changes
        under_way = GaugeMetricFamily("kvpool_scheduler_role_changes_under_way", "Told to instances, and not over yet.")
        under_way.add_metric([], len(core.roles.changes))
        yield under_way


class MetricsServer:
    """Answers GET /metrics and GET /health in the event loop that the core lives in, so that no lock is needed."""

    def __init__(self, metrics: SchedulerMetrics) -> None:
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._connections = 0
        self.port = 0

    async def start(self, listen: str) -> None:
        """Raises: BadArgument, Unavailable if the address is not one or can't be bound."""
        host, colon, port = listen.rpartition(":")
        if not colon or not port.isdigit():
            raise BadArgument(f"{listen!r} is not host:port")
        try:
            self._server = await asyncio.start_server(self._serve, host, int(port), limit=REQUEST_BYTES_MAX)
        except OSError as error:
            raise Unavailable(f"can't listen on {listen}: {error}", hint="is the port taken?") from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= CONNECTIONS_MAX:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._answer(head))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked has gone, or did not ask in HTTP
        finally:
            self._connections -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method != b"GET":
            return _response("405 Method Not Allowed", b"GET only\n")
        if path == b"/metrics":
            return _response("200 OK", self._metrics.text())
        if path == b"/health":
            return _response("200 OK", b"ok\n")
        return _response("404 Not Found", b"there are /metrics and /health\n")


def _response(status: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
