"""TPOT objectives: what holding answers up costs, and what answers earn by coming."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core import loads, objectives
from scheduler.core.placements import Placement, PlacementBook

SECOND_US = 1_000_000


def _decoding(**over: object) -> Placement:
    """A placement whose answer may be held up for 2 s at the median."""
    fields: dict[str, object] = {
        "owner": ("g", "r"), "model": "m", "max_tokens": 100, "prefill_id": "p", "decode_id": "d", "split": True,
        "kv_tokens": 0, "prefill_kv_tokens": 0, "prefill_holds": False, "prefill_us": 0, "context_tokens": 0,
        "expected_tokens": 0, "placed_us": 0, "decode_ends_us": 60 * SECOND_US, "expires_us": 0,
        "prefill_ends_us": SECOND_US, "stall_us_max": 2 * SECOND_US, "tpot_slo_us": 200_000, "prefill_done": True,
        **over,
    }  # fmt: skip
    return Placement(**fields)  # type: ignore[arg-type]


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.integers(0, 10**9))
def test_risk_is_a_share_that_only_grows(stalled_us: float, more_us: float, limit_us: int) -> None:
    before, after = loads.risk(stalled_us, limit_us), loads.risk(stalled_us + more_us, limit_us)
    assert 0 <= before <= after <= 1
    assert before == 0 or stalled_us > 0


@pytest.mark.parametrize("seed", range(3))
def test_risk_is_about_the_share_of_answers_that_are_too_short(seed: int) -> None:
    """Lengths drawn exponentially; one is missed if what it was held up is more than its own length allows."""
    random = Random(seed)
    budgets = [random.expovariate(1.0) for _ in range(20_000)]
    for stalled in (0.1, 0.3, 1.0, 2.0):
        missed = sum(budget < stalled for budget in budgets) / len(budgets)
        assert loads.risk(stalled * 1e6, 1_000_000) == pytest.approx(missed, abs=0.07), (seed, stalled)


def test_an_answer_that_has_come_for_long_may_be_held_up_for_longer() -> None:
    placement = _decoding()
    step_us, share = 40_000, 0.1  # 160 ms a token are left, a tenth of it for being held up: 0.4 of the time
    assert placement.earned_us(SECOND_US // 2, step_us, share) == 0, "it has not begun"
    assert placement.earned_us(6 * SECOND_US, step_us, share) == pytest.approx(2 * SECOND_US)
    assert placement.earned_us(6 * SECOND_US, 2 * step_us, share) < SECOND_US, (
        "in a fuller batch fewer tokens have come"
    )
    assert placement.earned_us(6 * SECOND_US, 200_000, share) == 0, "nothing is left of the objective"
    held_up = _decoding(stall_us=SECOND_US)
    assert held_up.earned_us(6 * SECOND_US, step_us, share) == pytest.approx(1.6 * SECOND_US), "that brought no tokens"
    assert _decoding(prefill_done=False).earned_us(6 * SECOND_US, step_us, share) == 0, "late, and has no token yet"


def test_a_split_is_charged_for_its_own_hand_off() -> None:
    """What of the gap between the first and the second token is beyond the objective."""

    def held_up_us(handoff_us: int, split: bool = True, guessed: bool = False, on_trial: bool = False) -> int:
        book = PlacementBook(guessed={("g", "other"): None} if on_trial else {})
        appraiser: Any = SimpleNamespace(
            book=book, now_us=0, request=SimpleNamespace(tpot_slo_us=200_000, max_tokens=100)
        )
        decode = SimpleNamespace(id="d")
        option: Any = SimpleNamespace(
            split=split, decode=decode, gap_us=handoff_us, step_us=30_000, handoff_guessed=guessed
        )
        return objectives.stall_us(appraiser, option, SECOND_US)

    assert held_up_us(0) == held_up_us(170_000) == 0, "within the objective"
    assert 0 < held_up_us(200_000) < 30_000, "little above it counts for less"
    assert held_up_us(2_600_000) == 2_430_000
    assert held_up_us(2_600_000, split=False) == 0
    assert held_up_us(2_600_000, guessed=True) == 0, "else nobody would ever measure such links"
    assert held_up_us(2_600_000, guessed=True, on_trial=True) == 2_430_000, "one at a time"
