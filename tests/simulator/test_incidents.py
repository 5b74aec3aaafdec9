"""Incidents over time: faults that end, and a crowd that wants one prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.simulator.driver import simulate
from scheduler.simulator.incidents import BEGINS_S, LASTS_S, Incident, forks, incidents, mean_ttft_s

BLOCK_TOKENS = 512


def _incident(name: str) -> Incident:
    return next(incident for incident in incidents() if incident.name == name)


@pytest.mark.parametrize("name", ["flapping_link", "dead_instance"])
def test_after_a_fault_it_is_as_before_within_seconds(name: str) -> None:
    """Reported elsewhere: after a port had flapped, transfers stayed five times as slow for 25 minutes."""
    incident = _incident(name)
    trace = incident.trace[:300]
    calm = simulate(trace, replace(incident.config, faults=()))
    hurt = simulate(trace, incident.config)
    over_s = BEGINS_S + LASTS_S
    assert all(r.end == "done" for r in hurt.records)
    assert hurt.log_sha256 != calm.log_sha256
    later = mean_ttft_s(hurt, over_s + 5.0, 1e9), mean_ttft_s(calm, over_s + 5.0, 1e9)
    assert later[0] <= 1.5 * later[1] + 0.1, later


def test_forks_of_a_prefix_do_not_compute_it_each() -> None:
    incident = _incident("43_forks")
    result = simulate(incident.trace, incident.config)
    first, *others = result.records
    assert all(r.end == "done" for r in result.records)
    assert first.cached_tokens == 0
    computed = sum(r.prompt_tokens - r.cached_tokens for r in others)
    assert computed < 0.25 * sum(r.prompt_tokens for r in others)
    # One computation of the prefix takes 6 s; all of them behind each other would take minutes.
    assert mean_ttft_s(result, 10.0, 1e9) < 3.0


def test_forks_are_made_as_asked() -> None:
    trace = forks(43, 40_000, 1_000, 4.0)
    assert len(trace) == 44
    first, one, other = trace[0], trace[1], trace[2]
    common = 40_000 // BLOCK_TOKENS
    assert one.hash_ids[:common] == other.hash_ids[:common] == first.hash_ids[:common]
    assert not set(one.hash_ids[common:]) & set(other.hash_ids[common:])
