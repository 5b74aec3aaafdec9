"""Cores for the connector's own threads."""

from __future__ import annotations

import pytest

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
