"""Requests of a journal with what was decided then and what would be now, and the figures made of that. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scheduler.core.commands import Placed, Refused
from scheduler.core.events import OutcomeReported, PlaceRequested


@dataclass(slots=True)
class Case:
    """One request for a placement. A request that is placed again is one more.

    Fields:
        then, now: the answers; None = none came before the record ends.
        ttft_us: as the gateway measured it then; None = it did not say.
        held: outcomes of then, with their times, that wait for an answer now.
    """

    request: PlaceRequested
    at_us: int
    then: Placed | Refused | None = None
    now: Placed | Refused | None = None
    now_us: int = 0  # when it was answered now
    ttft_us: int | None = None
    held: list[tuple[int, OutcomeReported]] = field(default_factory=list)

    @property
    def same_place(self) -> bool:
        """Whether it runs where it did."""
        then, now = self.then, self.now
        if not isinstance(then, Placed) or not isinstance(now, Placed):
            return False
        return (then.prefill, then.decode, then.split) == (now.prefill, now.decode, now.split)

    @property
    def changed(self) -> bool:
        """Whether the answer is another one: another place, or a refusal instead, or none."""
        if isinstance(self.then, Placed) or isinstance(self.now, Placed):
            return not self.same_place
        return (self.then is None) != (self.now is None)

    @property
    def later_us(self) -> int:
        """By how much later its first token is predicted now."""
        if not isinstance(self.then, Placed) or not isinstance(self.now, Placed):
            return 0
        return max(self.now.predicted_ttft_us - self.then.predicted_ttft_us, 0)


def totals(cases: Sequence[Case], answer: Callable[[Case], Placed | Refused | None]) -> dict[str, Any]:
    """Figures of all answers of then, or of now; predictions are those of the requests that were placed."""
    answers = [answer(case) for case in cases]
    placed = [a for a in answers if isinstance(a, Placed)]
    refused = [a for a in answers if isinstance(a, Refused)]
    ttfts = sorted(p.predicted_ttft_us for p in placed)
    reasons: dict[str, int] = {}
    for refusal in refused:
        reasons[refusal.reason.name.lower()] = reasons.get(refusal.reason.name.lower(), 0) + 1
    return {
        "placed": len(placed),
        "split": sum(p.split for p in placed),
        "refused": len(refused),
        "refused_by_reason": dict(sorted(reasons.items())),
        "unanswered": len(answers) - len(placed) - len(refused),
        "predicted_ttft_ms_p50": _percentile(ttfts, 50) / 1000,
        "predicted_ttft_ms_p95": _percentile(ttfts, 95) / 1000,
        "waited_ms_mean": sum(p.waited_us for p in placed) / max(len(placed), 1) / 1000,
        "cached_tokens": sum(p.cached_tokens for p in placed),
        "pulls": sum(bool(p.pull) for p in placed),
    }


def report(cases: Sequence[Case]) -> dict[str, Any]:
    """Then and now beside each other, and each request."""
    both = [(c.then, c.now) for c in cases]
    pairs = [(t.predicted_ttft_us, n.predicted_ttft_us) for t, n in both
             if isinstance(t, Placed) and isinstance(n, Placed)]  # fmt: skip
    measured = sorted(c.ttft_us for c in cases if c.ttft_us is not None)
    then, now = totals(cases, lambda c: c.then), totals(cases, lambda c: c.now)
    return {
        "requests": len(cases),
        "changed": sum(c.changed for c in cases),
        "placements_changed": sum(c.changed for c in cases if isinstance(c.then, Placed) and isinstance(c.now, Placed)),
        "placed_instead_of_refused": sum(isinstance(c.now, Placed) and isinstance(c.then, Refused) for c in cases),
        "refused_instead_of_placed": sum(isinstance(c.then, Placed) and isinstance(c.now, Refused) for c in cases),
        "then": {**then, "measured_ttft_ms_p50": _percentile(measured, 50) / 1000,
                 "measured_ttft_ms_p95": _percentile(measured, 95) / 1000},
        "now": now,
        "of_both": {
            "requests": len(pairs),
            "predicted_ttft_ms_p50_then": _percentile(sorted(t for t, _ in pairs), 50) / 1000,
            "predicted_ttft_ms_p50_now": _percentile(sorted(n for _, n in pairs), 50) / 1000,
            "predicted_ttft_ms_p95_then": _percentile(sorted(t for t, _ in pairs), 95) / 1000,
            "predicted_ttft_ms_p95_now": _percentile(sorted(n for _, n in pairs), 95) / 1000,
        },
        "cases": [_told(case) for case in cases],
    }  # fmt: skip


def _told(case: Case) -> dict[str, Any]:
    return {
        "request_id": case.request.request_id,
        "gateway_id": case.request.gateway_id,
        "at_us": case.at_us,
        "prompt_tokens": case.request.prompt_tokens,
        "changed": case.changed,
        "then": _answer(case.then),
        "now": _answer(case.now),
        "measured_ttft_us": case.ttft_us,
    }


def _answer(answer: Placed | Refused | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    if isinstance(answer, Refused):
        return {"refused": answer.reason.name.lower(), "message": answer.message,
                "retry_after_ms": answer.retry_after_ms}  # fmt: skip
    return {
        "prefill": answer.prefill.instance_id,
        "decode": answer.decode.instance_id,
        "split": answer.split,
        "cached_tokens": answer.cached_tokens,
        "pulled_from": sorted({run.source_id for run in answer.pull}),
        "predicted_ttft_us": answer.predicted_ttft_us,
        "waited_us": answer.waited_us,
    }


def _percentile(ordered: Sequence[int], percent: int) -> int:
    """Of sorted values: the least that `percent` % do not exceed; 0 of none."""
    return ordered[max(-(-len(ordered) * percent // 100) - 1, 0)] if ordered else 0
