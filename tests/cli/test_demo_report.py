"""Figures of the demo: which predictions count as learned."""

from __future__ import annotations

import pytest

from kvpool.cli.demo.play import Turn
from kvpool.cli.demo.report import first_learned, prediction_errors


def turns(count: int) -> list[Turn]:
    return [Turn("user-0", n) for n in range(count)]


@pytest.mark.parametrize(
    ("per_pass", "passes", "first"),
    [(36, 2, 36), (36, 1, 36), (10, 3, 20), (2, 2, 4), (60, 2, 60)],
)
def test_the_first_pass_after_fifty_requests(per_pass: int, passes: int, first: int) -> None:
    """Three modes take turns: after a pass of each of them, three times as many requests have been seen."""
    played = {mode: [turns(per_pass) for _ in range(passes)] for mode in ("kvpool", "round robin", "sticky")}
    assert first_learned(played) == first


def test_errors_are_relative_to_what_happened() -> None:
    def told(predicted_us: int, outcome: dict[str, int]) -> dict[str, object]:
        return {"choice": {"placement": {"predicted_ttft_us": predicted_us}}, "outcome": outcome}

    some = [told(150, {"ttft_us": 100}), told(50, {"ttft_us": 100}), told(50, {"ttft_us": 0}), told(50, {})]
    assert prediction_errors(some) == [0.5, 0.5]
