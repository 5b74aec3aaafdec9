"""Cases in which splitting or fetching lost for others: ours must not lose there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.simulator.driver import simulate
from scheduler.simulator.published.losses import Loss, losses

CASES = losses()


def _ttfts(case: Loss) -> tuple[dict[str, float], dict[str, float]]:
    results = case.results()
    goodput = {policy: result.figures()["goodput"] for policy, result in results.items()}
    return {policy: case.ttft_s(result) for policy, result in results.items()}, goodput


def test_long_prompts_on_h200_stay_where_they_are() -> None:
    """Ours does as well as the better of splitting and staying."""
    case = CASES["long_prompts"]
    ttfts, goodput = _ttfts(case)
    # The first requests come before anything is measured.
    assert goodput["kvpool"] >= max(goodput.values()) - 1.5 / len(case.trace), goodput
    assert ttfts["kvpool"] <= 1.25 * min(ttfts.values()), ttfts


def test_a_crowd_is_not_sent_through_the_split() -> None:
    ttfts, goodput = _ttfts(CASES["crowd"])
    assert ttfts["kvpool"] <= 1.05 * ttfts["always_split"], ttfts
    assert ttfts["kvpool"] <= 1.3 * ttfts["always_colocate"], ttfts
    assert goodput["kvpool"] >= max(goodput.values())


@pytest.mark.parametrize(("name", "compute_s"), [("files", 1.725), ("store", 8.5)])
def test_what_is_slower_to_fetch_is_computed(name: str, compute_s: float) -> None:
    """Nothing stays in HBM or DRAM, so each request could only have the prefix from the drive."""
    case = CASES[name]
    ttfts, _ = _ttfts(case)
    assert ttfts["kvpool"] <= 1.1 * compute_s, ttfts
    assert all(ttfts["kvpool"] < ttft for policy, ttft in ttfts.items() if policy != "kvpool"), ttfts


def test_a_fast_drive_is_read() -> None:
    """The other way round: computing is not simply preferred."""
    case = CASES["files"]
    fast = replace(case.config, hardware=replace(case.config.hardware, ssd_bytes_s=1e11))
    assert case.pulled(simulate(case.trace, fast)) > 0, "the drive is never read, however fast it is"


def test_memory_that_is_far_and_wide_is_read() -> None:
    """80 ms of latency and 11 GB/s: only transfers of several sizes tell the one from the other."""
    case = CASES["memory"]
    ttfts, _ = _ttfts(case)
    assert ttfts["kvpool"] <= 1.1 * min(ttfts.values()), ttfts


def test_cases_compute_for_as_long_as_was_reported() -> None:
    for name, compute_s in (("files", 1.725), ("store", 8.5), ("memory", 8.5)):
        case = CASES[name]
        seconds = case.config.hardware.prefill_us(case.trace[0].prompt_tokens, 0) / 1e6
        assert seconds == pytest.approx(compute_s, rel=0.05)
