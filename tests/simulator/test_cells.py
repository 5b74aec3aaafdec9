"""Cells of load, trace and cluster in which our policy must not lose."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.simulator.driver import simulate
from scheduler.simulator.settings import SimulationConfig
from scheduler.simulator.traces import read_trace

TRACE = Path(__file__).parent / "testdata" / "conversation_250.jsonl.gz"
#: By which share of requests ours may be below the best baseline.
BELOW_BEST_MAX = 0.01
BASELINES = ("mooncake_algorithm1", "always_split", "always_colocate")


@pytest.mark.parametrize(
    ("nodes", "split", "speed"),
    [
        pytest.param(8, (4, 4), 2.0, id="8 nodes, 4:4, saturated"),
        pytest.param(16, (8, 8), 1.0, id="16 nodes, 8:8, relaxed"),
    ],
)
def test_ours_is_not_behind_the_best_baseline(nodes: int, split: tuple[int, int], speed: float) -> None:
    trace = read_trace(TRACE)
    shares = {}
    for policy in ("kvpool", *BASELINES):
        config = SimulationConfig(policy=policy, nodes=nodes, split=split, speed=speed)
        shares[policy] = simulate(trace, config).figures()["goodput"]
    assert shares["kvpool"] >= max(shares.values()) - BELOW_BEST_MAX, shares
