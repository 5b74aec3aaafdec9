"""Several policies on one trace, beside each other. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scheduler.simulator.metrics import Result
from scheduler.simulator.plots import Chart, page

#: Columns of the table: name, key of `Result.figures`, factor, format.
_COLUMNS: tuple[tuple[str, str, float, str], ...] = (
    ("goodput %:", "goodput", 100, "{:.2f}"),
    ("tokens %:", "token_goodput", 100, "{:.2f}"),
    ("TTFT s:", "ttft_ms", 0.001, "{:.2f}"),
    ("p90:", "ttft_p90_ms", 0.001, "{:.2f}"),
    ("p99:", "ttft_p99_ms", 0.001, "{:.2f}"),
    ("TBT ms:", "tbt_ms", 1, "{:.0f}"),
    ("p90:", "tbt_p90_ms", 1, "{:.0f}"),
    ("p99:", "tbt_p99_ms", 1, "{:.0f}"),
    ("hits %:", "hit_ratio", 100, "{:.1f}"),
    ("split %:", "split_ratio", 100, "{:.1f}"),
    ("refused:", "refused", 1, "{:.0f}"),
    ("late:", "deadline", 1, "{:.0f}"),
    ("errors:", "errors", 1, "{:.0f}"),
    ("busy %:", "busy", 100, "{:.0f}"),
)


def columns() -> list[str]:
    return ["policy", *(name for name, _, _, _ in _COLUMNS)]


def rows(results: Sequence[Result]) -> list[list[str]]:
    """A row a result, in their order."""
    out = []
    for result in results:
        figures = result.figures()
        figures["busy"] = figures["prefill_utilisation"] + figures["decode_utilisation"]
        out.append([result.policy, *(text.format(figures[key] * factor) for _, key, factor, text in _COLUMNS)])
    return out


def to_json(results: Sequence[Result], about: dict[str, Any]) -> dict[str, Any]:
    """Args: about: what was simulated."""
    return {**about, "policies": [result.to_json() for result in results]}


def plot(results: Sequence[Result], title: str) -> str:
    """An SVG page: goodput by policy, and how each fared over time."""
    first = [
        Chart.bars("requests within TTFT and TBT, %", [(r.policy, 100 * r.figures()["goodput"]) for r in results]),
        Chart.bars("mean TTFT, s", [(r.policy, r.figures()["ttft_ms"] / 1000) for r in results]),
    ]
    over_time = []
    for name, key, factor in (
        ("within limits by time of arrival, %", "goodput", 100.0),
        ("mean TTFT by time of arrival, s", "ttft_ms", 0.001),
        ("mean TBT by time of arrival, ms", "tbt_ms", 1.0),
        ("prompt tokens from caches, %", "hit_ratio", 100.0),
    ):
        lines = {r.policy: [(p["s"], p[key] * factor) for p in r.series() if p["requests"]] for r in results}
        over_time.append(Chart.lines(name, lines, "s"))
    return page(title, [*first, *over_time])
