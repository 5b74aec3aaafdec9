"""Figures of a demo run: what `build/demo-report.json` holds and what the table shows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kvpool.cli.demo.play import Turn

#: Requests after which predictions should be good.
LEARNED_AFTER = 50


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def median_over_passes(passes: Sequence[Sequence[Turn]], name: str) -> dict[str, float]:
    """p50 and p95 of `name` ("ttft_ms" or "tpot_ms") within each pass; their medians over the passes."""
    out = {}
    for label, share in (("p50", 0.50), ("p95", 0.95)):
        out[label] = round(statistics.median(percentile([getattr(t, name) for t in p], share) for p in passes), 2)
    return out


def latencies(passes: Sequence[Sequence[Turn]]) -> dict[str, dict[str, float]]:
    return {name: median_over_passes(passes, name) for name in ("ttft_ms", "tpot_ms")}


def hit_ratio(turns: Sequence[Turn]) -> float:
    prompt = sum(len(t.prompt_ids) for t in turns)
    return round(sum(t.cached_tokens for t in turns) / prompt, 4) if prompt else 0.0


def build(
    passes: dict[str, list[list[Turn]]],
    checked: dict[str, Any],
    explanations: Sequence[dict[str, Any]],
    leaks: dict[str, int],
    wall_s: float,
) -> dict[str, Any]:
    """The report. Latencies are medians over the passes; counts are of all kvpool passes together."""
    ours = [turn for one in passes["kvpool"] for turn in one]
    outcomes = [e.get("outcome", {}) for e in explanations]
    placements = [e["choice"]["placement"] for e in explanations]
    pulled = sum(o.get(phase, {}).get("bytes_pulled", 0) for o in outcomes for phase in ("prefill", "decode"))
    errors = prediction_errors(explanations)
    learned = prediction_errors(explanations[first_learned(passes) :])
    medians = [round(statistics.median(of), 3) if of else None for of in (errors, learned)]
    shares = [
        min(1.0, o["decode"]["exposed_us"] / whole)
        for o in outcomes
        if (whole := o.get("prefill", {}).get("publish_us", 0) + o.get("decode", {}).get("read_us", 0))
    ]
    where: dict[str, set[str]] = {}
    for turn, placement in zip(ours, placements, strict=True):
        where.setdefault(turn.conversation, set()).update(placement[p]["instance_id"] for p in ("prefill", "decode"))
    return {
        "requests": len(ours),
        "passes": len(passes["kvpool"]),
        **checked,
        "prefix_hit_ratio": hit_ratio(ours),
        "hit_ratio_turn2plus": hit_ratio([t for t in ours if t.turn > 0]),
        "bytes_pulled": pulled,
        "exposed_transfer_median": round(statistics.median(shares), 3) if shares else None,
        "split_requests": sum(p["split"] for p in placements),
        "colocated_requests": sum(not p["split"] for p in placements),
        "conversations_that_moved": sum(len(workers) > 1 for workers in where.values()),
        **latencies(passes["kvpool"]),
        "baseline": latencies(passes["round robin"])
        | {"prefix_hit_ratio": hit_ratio([t for one in passes["round robin"] for t in one])},
        "baseline_sticky": latencies(passes["sticky"])
        | {"prefix_hit_ratio": hit_ratio([t for one in passes["sticky"] for t in one])},
        "ttft_prediction_error_median": medians[0],
        f"ttft_prediction_error_median_after_{LEARNED_AFTER}": medians[1],
        "leaks": leaks,
        "wall_s": round(wall_s, 1),
    }


def prediction_errors(explanations: Sequence[dict[str, Any]]) -> list[float]:
    """|predicted - actual| / actual of each TTFT that was measured."""
    return [
        abs(e["choice"]["placement"]["predicted_ttft_us"] - e["outcome"]["ttft_us"]) / e["outcome"]["ttft_us"]
        for e in explanations
        if e.get("outcome", {}).get("ttft_us")
    ]


def first_learned(passes: dict[str, list[list[Turn]]]) -> int:
    """The first of our turns, pass by pass, before whose pass the scheduler had seen `LEARNED_AFTER` requests."""
    ours = seen = 0
    for index, turns in enumerate(passes["kvpool"]):
        if seen >= LEARNED_AFTER:
            break
        ours += len(turns)
        seen += sum(len(played[index]) for played in passes.values() if index < len(played))
    return ours


def rows(report: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Rows of the comparison table: name, TTFT p50 and p95, TPOT p50 and p95, hit ratio, TTFT against ours."""
    out = []
    ours = report["ttft_ms"]["p50"]
    for name, part, hits in (
        ("kvpool", report, report["prefix_hit_ratio"]),
        ("round robin, no pool", report["baseline"], report["baseline"]["prefix_hit_ratio"]),
        ("sticky, no pool", report["baseline_sticky"], report["baseline_sticky"]["prefix_hit_ratio"]),
    ):
        ttft, tpot = part["ttft_ms"], part["tpot_ms"]
        out.append((
            name, f"{ttft['p50']:.0f}", f"{ttft['p95']:.0f}", f"{tpot['p50']:.1f}", f"{tpot['p95']:.1f}",
            f"{100 * hits:.0f} %", f"{ttft['p50'] / ours:.2f}x",
        ))  # fmt: skip
    return out
