"""Cores for the connector's own threads, and how often it says the same."""

from __future__ import annotations

import logging

import pytest

from engines.attached.quiet_log import QuietLog
from engines.vllm.cores import spare_cores


@pytest.mark.parametrize(
    ("environment", "spare"),
    [
        ({}, set()),
        ({"OMP_NUM_THREADS": "4"}, set()),
        ({"OMP_PLACES": "{0,1,2}"}, {3, 4, 5}),
        ({"OMP_PLACES": "{4},{5}"}, {0, 1, 2, 3}),
        ({"GOMP_CPU_AFFINITY": "0 2 4"}, {1, 3, 5}),
        ({"KMP_AFFINITY": "granularity=fine,explicit,proclist=[0,1,2],verbose"}, {3, 4, 5}),
        ({"OMP_PLACES": "{0,1,2,3,4,5}"}, {0, 1, 2, 3, 4, 5}),
        ({"OMP_PLACES": "cores"}, set()),
    ],
)
def test_spare_cores(environment: dict[str, str], spare: set[int]) -> None:
    assert spare_cores(environment, 6) == spare


def test_a_warning_that_repeats_is_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    quiet = QuietLog(logging.getLogger("quiet"), 10.0, lambda: now[0])
    for number in range(4):
        quiet.warning("full", "no room for %d", number)
    quiet.warning("other", "something else")
    now[0] = 110.0
    quiet.warning("full", "no room for %d", 9)
    assert [record.getMessage() for record in caplog.records] == [
        "no room for 0", "something else", "no room for 9 (and 3 more like this)",
    ]  # fmt: skip
