"""A worker's numbers as Prometheus metrics over HTTP; needs prometheus-client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from engines.torch.exposure import Histogram
from kvpool.core.errors import Unavailable, Unsupported

STOP_TIMEOUT_S = 5.0
HELP = {
    "kvpool_exposed_transfer_ratio": "Part of a hand-off's transfer, as seen here, that decoding had to wait for.",
    "kvpool_exposed_transfer_seconds": "From the first token known to the last block here; 0 = hidden.",
    "kvpool_handoff_read_seconds": "Time spent reading the blocks of one hand-off.",
}


def serve_metrics(
    port: int,
    instance_id: str,
    counters: Callable[[], Mapping[str, int]],
    histograms: Callable[[], Mapping[str, Histogram]],
) -> tuple[int, Callable[[], None]]:
    """Serves until the returned function is called; port 0 picks a free one. Both sources may be asked in any thread.

    Returns: the port, and what ends it.
    Raises: Unsupported without prometheus-client; Unavailable if the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
    except ImportError as error:
        raise Unsupported("metrics need prometheus-client", hint="pip install 'kvpool[server]'") from error

    class Collector:
        """Asks the worker once a scrape."""

        def collect(self) -> Iterator[Metric]:
            for name, count in counters().items():
                family = CounterMetricFamily(f"kvpool_worker_{name}", name, labels=["instance"])
                family.add_metric([instance_id], count)
                yield family
            for name, histogram in histograms().items():
                shown = HistogramMetricFamily(name, HELP[name], labels=["instance"])
                shown.add_metric([instance_id], _buckets(histogram), histogram.total)
                yield shown

        def describe(self) -> list[Metric]:
            return []

    registry = CollectorRegistry()
    collector: Any = Collector()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, addr="0.0.0.0", registry=registry)
    except OSError as error:
        raise Unavailable(
            f"can't serve metrics on port {port}: {error.strerror}", hint="choose another one with --metrics-port"
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(STOP_TIMEOUT_S)

    return server.server_port, stop


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """As Prometheus wants them: counts up to each bound, the last one without a bound."""
    bounds = zip(histogram.bounds, histogram.counts, strict=True)
    return [*((str(bound), float(count)) for bound, count in bounds), ("+Inf", float(histogram.count))]
