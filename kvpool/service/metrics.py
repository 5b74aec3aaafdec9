"""Counts of a source as Prometheus metrics over HTTP; needs prometheus-client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from kvpool.core.errors import Unavailable, Unsupported
from kvpool.core.ssd.records import SsdState
from kvpool.v1 import block_source_pb2

SCRAPE_TIMEOUT_S = 5.0
_NAMES = {"bytes_total": "capacity_bytes"}  # `_total` would say that it is a counter
#: Counts that only grow; all others go up and down.
_COUNTERS = (
    "hits", "misses", "evictions", "bytes_read", "bytes_written", "digest_errors", "adopted", "touches", "expired",
    "demotions", "io_errors", "recovered_bytes", "evictions_unsaved",
)  # fmt: skip


def serve_metrics(
    port: int,
    source_id: str,
    stats: Callable[[], block_source_pb2.SourceStats],
    loop: asyncio.AbstractEventLoop,
) -> Callable[[], None]:
    """Serves until the returned function is called. `stats` is called in `loop`.

    Raises: Unsupported without prometheus-client; Unavailable if the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    except ImportError as error:
        raise Unsupported("metrics need prometheus-client", hint="pip install 'kvpool[server]'") from error

    async def read() -> block_source_pb2.SourceStats:
        return stats()

    def families(prefix: str, message: Any) -> Iterator[Metric]:
        """A metric for each number of a message."""
        for field in message.DESCRIPTOR.fields:
            value = getattr(message, field.name)
            if not isinstance(value, int | float):
                continue
            family = CounterMetricFamily if field.name in _COUNTERS else GaugeMetricFamily
            metric = family(f"{prefix}_{_NAMES.get(field.name, field.name)}", field.full_name, labels=["source"])
            metric.add_metric([source_id], value)
            yield metric

    class Collector:
        """Asks the source once a scrape."""

        def collect(self) -> Iterator[Metric]:
            now = asyncio.run_coroutine_threadsafe(read(), loop).result(SCRAPE_TIMEOUT_S)
            yield from families("kvpool_source", now)
            if now.HasField("ssd"):
                yield from families("kvpool_ssd", now.ssd)
                state = GaugeMetricFamily("kvpool_ssd_state", "1 for the state it is in.", labels=["source", "state"])
                for name in SsdState:
                    state.add_metric([source_id, name], float(name == now.ssd.state))
                yield state

        def describe(self) -> list[Metric]:
            return []

    registry = CollectorRegistry()
    registry.register(Collector())  # type: ignore[arg-type]
    try:
        server, thread = start_http_server(port, addr="0.0.0.0", registry=registry)
    except OSError as error:
        raise Unavailable(
            f"can't serve metrics on port {port}: {error.strerror}", hint="choose another one with --metrics-port"
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(SCRAPE_TIMEOUT_S)

    return stop
