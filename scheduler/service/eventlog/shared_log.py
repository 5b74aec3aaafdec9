"""The event log of one scheduler: speaker and listener on a Redis stream, and how they fare."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvpool.v1 import event_log_pb2, scheduler_pb2
from scheduler.core import events
from scheduler.core.commands import Command
from scheduler.service.eventlog.listener import Listener, Peer
from scheduler.service.eventlog.outgoing import Outgoing
from scheduler.service.eventlog.redis_stream import RedisStream, redacted
from scheduler.service.eventlog.speaker import Speaker
from scheduler.service.shell import Shell

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SharedLogConfig:
    """Where the log is.

    url: redis://[[user]:password@]host:port[/db]; never logged as it is.
    stream: its key in Redis; schedulers of one cluster use the same.
    entries_max: Redis trims the stream to about this many; a reader that is further behind asks for what it missed.
    outgoing_bytes_max: waiting to be written; beyond it all of it is dropped, and said again when asked for.
    """

    url: str
    stream: str = "kvpool:events"
    entries_max: int = 8192
    outgoing_bytes_max: int = 32 << 20


class SharedLog:
    """Makes one view of what several schedulers hear. Lives in the shell's event loop.

    Args:
        address: of this scheduler's gRPC services, once it has one.
    Raises: BadArgument for a wrong URL, or if the `redis` package is not there.
    """

    def __init__(self, shell: Shell, config: SharedLogConfig, address: Callable[[], str]) -> None:
        self._shell, self.config = shell, config
        scheduler_id, incarnation = shell.core.config.scheduler_id, time.time_ns()
        self.outgoing = Outgoing(scheduler_id, incarnation, config.outgoing_bytes_max)
        self.speaker = Speaker(shell, self.outgoing, address)
        self.listener = Listener(shell, scheduler_id, incarnation, self.speaker)
        self.stream = RedisStream(
            config.url, config.stream, config.entries_max,
            take=self._take, received=self._received, changed=self._changed,
        )  # fmt: skip
        self._changed_us = shell.now_us()
        self._ticker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins; a Redis that does not answer yet is no error."""
        self._shell.observers.append(self._observe)
        # Until the first connection nothing is said, and nobody's silence means anything.
        self._shell.submit(events.EventLogChanged(False))
        self.stream.start()
        self._ticker = asyncio.create_task(self._tick_regularly())

    async def stop(self) -> None:
        """Falls silent: the ends of life lines that follow are not said, so that members are kept until they come by
        another scheduler."""
        with contextlib.suppress(ValueError):
            self._shell.observers.remove(self._observe)
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
            self._ticker = None
        await self.stream.stop()

    # ------------------------------------------------------------ between shell and stream

    def _observe(self, event: events.Event, commands: list[Command]) -> None:
        self.speaker.observe(event, commands)
        if self.outgoing:
            self.stream.wake()

    def _take(self, entries_max: int) -> list[bytes]:
        self.speaker.restate()
        return self.outgoing.take(entries_max)

    def _received(self, version: bytes | None, data: bytes | None) -> None:
        self.listener.receive(version, data)
        if self.speaker.restates or self.outgoing:
            self.stream.wake()

    def _changed(self, up: bool) -> None:
        self._changed_us = self._shell.now_us()
        if up:
            self.outgoing.open()
            self.outgoing.append(event_log_pb2.LogItem(want=event_log_pb2.Want(everything=True)))
        else:
            self.outgoing.close()
            self.speaker.interrupted()
        self._shell.submit(events.EventLogChanged(up))
        self._beat()

    async def _tick_regularly(self) -> None:
        interval_s = self._shell.core.config.heartbeat_interval_us / 1e6
        while True:
            await asyncio.sleep(interval_s)
            try:
                self._beat()
                self.listener.forget_gone(self._shell.core.config.gone_us)
            except Exception:
                # A bug of ours must not silence the scheduler for good.
                log.exception("the event log's beat failed")

    def _beat(self) -> None:
        if not self.stream.up:
            return
        for item in self.listener.take_wants():
            self.outgoing.append(item)
        self.speaker.beat()
        self.stream.wake()

    # ------------------------------------------------------------ how it fares

    def peer_state(self, peer: Peer) -> str:
        return "alive" if self._shell.now_us() - peer.heard_us < self._shell.core.config.suspect_us else "suspect"

    def status(self) -> scheduler_pb2.EventLogStatus:
        now_us, placed = self._shell.now_us(), self._placements_by_peer()
        status = scheduler_pb2.EventLogStatus(
            up=self.stream.up,
            changed_age_ms=(now_us - self._changed_us) // 1000,
            url=redacted(self.config.url),
            error=self.stream.error,
            entries_written=self.stream.entries_written,
            entries_read=self.listener.entries_read,
            entries_bad=self.listener.entries_bad,
            gaps=self.listener.gaps,
            items_dropped=self.outgoing.dropped,
        )
        for peer in sorted(self.listener.peers.values(), key=lambda p: (p.scheduler_id, p.incarnation)):
            kinds = [line.kind for line in peer.lines.values()]
            status.peers.add(
                scheduler_id=peer.scheduler_id,
                address=peer.address,
                state=self.peer_state(peer),
                heard_age_ms=min((now_us - peer.heard_us) // 1000, 0xFFFF_FFFF),
                sources=kinds.count("source"),
                instances=kinds.count("instance"),
                placements=placed.get(peer.key, 0),
            )
        return status

    def _placements_by_peer(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for placement in self._shell.core.book.placements.values():
            counts[placement.peer] = counts.get(placement.peer, 0) + 1
        return counts

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        """For a Prometheus registry."""
        yield GaugeMetricFamily("kvpool_event_log_up", "1 while the event log can be written and read.", self.stream.up)
        peers = GaugeMetricFamily("kvpool_event_log_peers", "Other schedulers in the log.", labels=["state"])
        states = [self.peer_state(peer) for peer in self.listener.peers.values()]
        for state in ("alive", "suspect"):
            peers.add_metric([state], states.count(state))
        yield peers
        for name, what, value in (
            ("written", "Entries written to the log.", self.stream.entries_written),
            ("read", "Entries of other schedulers read.", self.listener.entries_read),
            ("bad", "Entries that were not understood.", self.listener.entries_bad),
        ):
            yield CounterMetricFamily(f"kvpool_event_log_entries_{name}", what, value)
        yield CounterMetricFamily("kvpool_event_log_gaps", "Times entries of a peer were missing.", self.listener.gaps)
        yield CounterMetricFamily(
            "kvpool_event_log_items_dropped", "Items not written: the log was down or too slow.", self.outgoing.dropped
        )
