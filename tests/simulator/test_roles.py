"""Roles that the scheduler changes in a simulated cluster whose load shifts: worth it, harmless, and repeatable."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from scheduler.core.config import SECOND_US
from scheduler.simulator.driver import Simulation, simulate
from scheduler.simulator.faults import Fault, FaultKind
from scheduler.simulator.metrics import Result
from scheduler.simulator.settings import SimulationConfig
from scheduler.simulator.shifts import Stretch, cluster, good_by_stretch, shifting_trace

#: Few long prompts, then more answers than one of four instances can decode.
STRETCHES = [Stretch(10, 1.2, 8_000, 100), Stretch(90, 3.5, 800, 800)]
SMALL = replace(cluster(seed=3), nodes=4, split=(3, 1))


def run(config: SimulationConfig) -> tuple[Result, list[dict[str, object]]]:
    """A result, and the changes of roles in it. Nothing may be held or broken at the end."""
    changes = []

    def note(line: str) -> None:
        if '"what":"role"' in line:
            changes.append(json.loads(line))

    simulation = Simulation(shifting_trace(STRETCHES, config.seed), config, note)
    result = simulation.run()
    simulation.check_invariants()
    return result, changes


@pytest.fixture(scope="module")
def followed() -> tuple[Result, list[dict[str, object]]]:
    return run(replace(SMALL, role_changeable=True))


def test_a_load_that_shifts_is_followed(followed: tuple[Result, list[dict[str, object]]]) -> None:
    (stays, none), (changed, changes) = run(SMALL), followed
    assert not none and [(c["was"], c["role"]) for c in changes] == [("PREFILL", "DECODE")]
    before, after = good_by_stretch(stays, STRETCHES), good_by_stretch(changed, STRETCHES)
    assert after[0] >= before[0] and after[1] > before[1] + 0.2, (before, after)
    assert all(r.end == "done" for r in changed.records)


def test_an_instance_that_dies_while_it_changes_costs_no_request(
    followed: tuple[Result, list[dict[str, object]]],
) -> None:
    """It comes back with its own role, and is left alone for a while."""
    (first,) = followed[1]
    crash = Fault(FaultKind.CRASH, str(first["id"]), int(str(first["us"])) + 1, 10 * SECOND_US)
    result, changes = run(replace(SMALL, role_changeable=True, faults=(crash,)))
    assert all(r.end == "done" for r in result.records)
    assert changes[0] == first and all(c["id"] != first["id"] for c in changes[1:])
    assert result.scheduler_counts["roles_ordered"] == len(changes) <= 2


def test_links_that_look_too_slow_for_hand_offs_are_tried() -> None:
    """Long prompts and short answers, where all do both: prefills hold up answers unless some instances only decode.

    The network carries a prompt in 0.04 s, which nobody knows at first: what is assumed of it would break objectives.
    """
    trace = shifting_trace([Stretch(96, 2.6, 12_000, 100)])
    result = simulate(trace, replace(cluster(), split=None))
    figures = result.figures()
    assert figures["goodput"] > 0.8 and figures["split_ratio"] > 0.5, figures
