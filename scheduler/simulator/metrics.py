"""What became of the requests of a simulation, and the figures made of that. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

#: How a request can end.
ENDS = ("done", "refused", "deadline", "error")
SERIES_POINTS_MAX = 240
DECILES = 10


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, from its arrival to its one end. Times in microseconds."""

    number: int  # place in the trace
    arrival_us: int
    ended_us: int
    end: str  # one of ENDS
    why: str  # of a refusal or an error
    prompt_tokens: int
    output_tokens: int  # that it would have had
    tokens: int  # that it got
    ttft_us: int | None
    tbt_us: float  # mean of the longest tenth of its intervals between tokens
    cached_tokens: int  # of its prompt, that were not computed in its first attempt
    pulled_tokens: int  # of these, from elsewhere
    split: bool
    attempts: int
    refusals: int
    predicted_ttft_us: int | None  # by the scheduler, from its first answer on

    def within(self, ttft_slo_us: int, tbt_slo_us: int) -> bool:
        """Whether it was served whole and in time."""
        return (
            self.end == "done"
            and self.ttft_us is not None
            and self.ttft_us <= ttft_slo_us
            and self.tbt_us <= tbt_slo_us
        )


@dataclass(frozen=True, slots=True)
class Instance:
    """What one instance did."""

    instance_id: str
    role: str
    prefill_share: float  # of the time simulated
    decode_share: float
    prefill_tokens: int
    decode_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """One simulation."""

    policy: str
    seed: int
    ttft_slo_us: int
    tbt_slo_us: int
    duration_us: int  # until the last request ended
    records: tuple[RequestRecord, ...]  # by number
    instances: tuple[Instance, ...]
    scheduler_counts: dict[str, int]
    bytes_pulled: int
    bytes_published: int
    pull_failures: int
    transfers: int
    log_sha256: str
    log_lines: int
    events: int  # that entered the scheduler's core
    actions: int  # of the simulator
    instance_seconds: float = 0.0
    gpu_price: float = 0.0  # of all instances for `duration_us`
    extra: dict[str, Any] = field(default_factory=dict)

    def good(self, record: RequestRecord) -> bool:
        return record.within(self.ttft_slo_us, self.tbt_slo_us)

    def figures(self) -> dict[str, Any]:
        """The figures of one row of a comparison. Shares are of all requests of the trace."""
        records = self.records
        served = [r for r in records if r.ttft_us is not None]
        good = [r for r in records if self.good(r)]
        ttfts = sorted(r.ttft_us for r in served if r.ttft_us is not None)
        tbts = sorted(r.tbt_us for r in served if r.tokens > 1)
        tokens = sum(r.output_tokens for r in records)
        prompts = sum(r.prompt_tokens for r in served)
        seconds = self.duration_us / 1e6
        return {
            "policy": self.policy,
            "seed": self.seed,
            "requests": len(records),
            "goodput": _ratio(len(good), len(records)),
            "token_goodput": _ratio(sum(r.output_tokens for r in good), tokens),
            "good_requests_s": _ratio(len(good), seconds),
            "good_tokens_s": _ratio(sum(r.output_tokens for r in good), seconds),
            "within_ttft": _ratio(sum(1 for t in ttfts if t <= self.ttft_slo_us), len(records)),
            "within_tbt": _ratio(
                sum(1 for r in records if r.end == "done" and r.tbt_us <= self.tbt_slo_us), len(records)
            ),
            "ttft_ms": _mean(ttfts) / 1000,
            "ttft_p50_ms": percentile(ttfts, 50) / 1000,
            "ttft_p90_ms": percentile(ttfts, 90) / 1000,
            "ttft_p99_ms": percentile(ttfts, 99) / 1000,
            "tbt_ms": _mean(tbts) / 1000,
            "tbt_p50_ms": percentile(tbts, 50) / 1000,
            "tbt_p90_ms": percentile(tbts, 90) / 1000,
            "tbt_p99_ms": percentile(tbts, 99) / 1000,
            "hit_ratio": _ratio(sum(r.cached_tokens for r in served), prompts),
            "pulled_ratio": _ratio(sum(r.pulled_tokens for r in served), prompts),
            "refused": sum(1 for r in records if r.end == "refused"),
            "deadline": sum(1 for r in records if r.end == "deadline"),
            "errors": sum(1 for r in records if r.end == "error"),
            "refused_by_length": [_ratio(a, b) for a, b in self._by_length(lambda r: r.end == "refused")],
            "good_by_length": [_ratio(a, b) for a, b in self._by_length(self.good)],
            "split_ratio": _ratio(sum(1 for r in served if r.split), len(served)),
            "placed_again": sum(1 for r in records if r.attempts > 1),
            "prefill_utilisation": _mean([i.prefill_share for i in self.instances]),
            "decode_utilisation": _mean([i.decode_share for i in self.instances]),
            "computed_prompt_tokens": sum(i.prefill_tokens for i in self.instances),
            "bytes_pulled": self.bytes_pulled,
            "bytes_published": self.bytes_published,
            "pull_failures": self.pull_failures,
            "ttft_error_ratio_p50": self._prediction_error(),
            "cost_per_million_tokens": _ratio(self.gpu_price * 1e6, sum(r.tokens for r in records)),
            "duration_s": seconds,
            "log_sha256": self.log_sha256,
        }

    def _by_length(self, chosen: Callable[[RequestRecord], bool]) -> list[tuple[int, int]]:
        """By decile of the prompt's length: how many are chosen, and how many there are."""
        by_length = sorted(self.records, key=lambda r: (r.prompt_tokens, r.number))
        out = []
        for decile in range(DECILES):
            begin = len(by_length) * decile // DECILES
            part = by_length[begin : len(by_length) * (decile + 1) // DECILES]
            out.append((sum(1 for r in part if chosen(r)), len(part)))
        return out

    def _prediction_error(self) -> float:
        """Median of |predicted - actual| / actual of TTFT, over requests that were placed once."""
        errors = sorted(
            abs(r.predicted_ttft_us - r.ttft_us) / r.ttft_us
            for r in self.records
            if r.attempts == 1 and not r.refusals and r.predicted_ttft_us is not None and r.ttft_us
        )
        return percentile(errors, 50)

    def series(self, points: int = 60) -> list[dict[str, float]]:
        """Over time of arrival: how requests fared. `points` equal parts of the time of arrivals."""
        assert 1 <= points <= SERIES_POINTS_MAX
        last_us = max((r.arrival_us for r in self.records), default=0)
        width_us = max(-(-(last_us + 1) // points), 1)
        parts: list[list[RequestRecord]] = [[] for _ in range(points)]
        for record in self.records:
            parts[record.arrival_us // width_us].append(record)
        return [self._point(index * width_us, part) for index, part in enumerate(parts)]

    def _point(self, begin_us: int, part: Sequence[RequestRecord]) -> dict[str, float]:
        ttfts = sorted(r.ttft_us for r in part if r.ttft_us is not None)
        return {
            "s": begin_us / 1e6,
            "requests": len(part),
            "goodput": _ratio(sum(1 for r in part if self.good(r)), len(part)),
            "refused": sum(1 for r in part if r.end == "refused"),
            "ttft_ms": _mean(ttfts) / 1000,
            "ttft_p90_ms": percentile(ttfts, 90) / 1000,
            "tbt_ms": _mean([r.tbt_us for r in part if r.tokens > 1]) / 1000,
            "hit_ratio": _ratio(sum(r.cached_tokens for r in part), sum(r.prompt_tokens for r in part)),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            **self.figures(),
            "instances": [asdict(instance) for instance in self.instances],
            "scheduler": self.scheduler_counts,
            "series": self.series(),
            "events": self.events,
            "log_lines": self.log_lines,
            **self.extra,
        }


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Of sorted values: the least that `percent` % do not exceed; 0 of none."""
    if not ordered:
        return 0.0
    return float(ordered[max(-(-len(ordered) * percent // 100) - 1, 0)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
