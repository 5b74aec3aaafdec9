"""Many histories of the whole pool, drawn by their seeds; see `world`.

KVPOOL_HISTORIES: how many; KVPOOL_SEED: the first seed. Two processes share them where there are two cores.
"""

import concurrent.futures
import multiprocessing
import os

import pytest

from tests.simulation.world import Plan, run_history

HISTORIES = int(os.environ.get("KVPOOL_HISTORIES", "10000"))
FIRST_SEED = int(os.environ.get("KVPOOL_SEED", "1"))
#: Histories that one task of a worker plays.
CHUNK = 50


def play(first: int, count: int) -> tuple[list[str], dict[str, int]]:
    """Failures, and how often what happened."""
    failures: list[str] = []
    counts: dict[str, int] = {}
    for seed in range(first, first + count):
        try:
            world = run_history(seed, Plan())
        except AssertionError as error:
            failures.append(str(error))
            continue
        happened = {**world.counts, "hits": world.auditor.hits, "crashes": sum(node.crashes for node in world.nodes)}
        for what, number in happened.items():
            counts[what] = counts.get(what, 0) + number
    return failures, counts


@pytest.mark.timeout(3600)
def test_no_history_breaks_a_promise() -> None:
    starts = range(FIRST_SEED, FIRST_SEED + HISTORIES, CHUNK)
    sizes = [min(CHUNK, FIRST_SEED + HISTORIES - start) for start in starts]
    processes = min(2, len(os.sched_getaffinity(0)))
    failures: list[str] = []
    counts: dict[str, int] = {}
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for failed, happened in pool.map(play, starts, sizes):
            failures += failed
            for what, number in happened.items():
                counts[what] = counts.get(what, 0) + number
    assert not failures, f"{len(failures)} of {HISTORIES} histories failed:\n" + "\n".join(failures[:10])
    # That nothing failed means nothing where nothing happened.
    for what in ("puts", "hits", "shared", "leased", "removals", "pins", "crashes"):
        assert counts.get(what, 0) >= HISTORIES // 10, f"{what} happened {counts.get(what, 0)} times only"
    for what in ("NoSsd", "starts without the SSD"):
        assert counts.get(what, 0) >= HISTORIES // 50, f"{what} happened {counts.get(what, 0)} times only"
