"""What a gateway counts, in Prometheus' form. One registry a gateway, so that several fit in a process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_LATENCY = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKEN_LATENCY = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 4)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
_PREFIX = "kvpool_gateway_"


class Metrics:
    """Counters and histograms; see the help texts."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(_PREFIX + name, text, ("model",), buckets=buckets, registry=self._registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(_PREFIX + name, text, registry=self._registry)

        self.ttft = histogram("ttft_seconds", "From a request's arrival to its first token", _LATENCY)
        self.itl = histogram("itl_seconds", "Between tokens that came one after the other", _TOKEN_LATENCY)
        self.tpot = histogram("tpot_seconds", "Time per output token after the first, a request", _TOKEN_LATENCY)
        self.e2e = histogram("e2e_seconds", "From a request's arrival to its last token", _LATENCY)
        self.exposed = histogram(
            "exposed_transfer_ratio", "Split requests: KV transfer that decode waited for, over all of it", _SHARES
        )
        self.requests = counter("requests_total", "Requests that ended, by how", "model", "outcome")
        self.rejected = counter(
            "rejected_total", "HTTP requests answered with an error, by status and code", "status", "code"
        )
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of requests that got an answer", "model")
        self.cached_tokens = counter("cached_tokens_total", "Prompt tokens that were not computed", "model")
        self.tokens = counter("generated_tokens_total", "Tokens sent to clients", "model")
        self.placements = counter("placements_total", "Placements, split or co-located", "kind")
        self.replacements = counter("replacements_total", "Requests placed again, by what happened", "cause")
        self.other_masks = counter("handoffs_other_mask_total", "Hand-offs under other keys than are listed", "model")
        self.refusals = counter("refusals_total", "Placements refused by the scheduler, by reason", "reason")
        self.read_differently = counter(
            "prompts_read_differently_total", "Prompts whose tokens were others at their OpenAI server", "model"
        )
        self.outcomes_dropped = counter("outcomes_dropped_total", "Outcomes lost while the scheduler was away")
        self.active = gauge("active_requests", "Requests under way")
        self.links = gauge("engine_links", "Workers connected")
        self.scheduler_connected = gauge("scheduler_connected", "1 while the scheduler is connected")

    def render(self) -> bytes:
        return generate_latest(self._registry)
