"""One contract for all block memories."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engines.torch.hbm import CpuBlocks, CudaBlocks, StagingAreas
from kvpool.core.errors import DeadlineExceeded
from kvpool.tiers.hbm import BlockMemory, Done

from .late import POISON, LateBlocks

SHAPE = (9, 2, 2, 4, 2, 8)


def late(cache: torch.Tensor) -> LateBlocks:
    memory = LateBlocks(CpuBlocks(cache))
    memory.automatic = True
    return memory


MAKERS: dict[str, Callable[[torch.Tensor], BlockMemory]] = {"cpu": CpuBlocks, "cuda": CudaBlocks, "late": late}


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu", "late"])
def maker(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_come_out_and_go_in_as_they_are(maker: str, dtype: torch.dtype) -> None:
    device = "cuda" if maker == "cuda" else "cpu"
    cache = torch.randn(SHAPE).to(dtype).to(device)
    memory = MAKERS[maker](cache)
    before = cache.cpu().view(torch.uint8).view(SHAPE[0], -1).numpy().copy()
    assert memory.block_count == 8 and memory.block_bytes == before.shape[1]
    blocks = np.array([5, 0, 7])
    taken = memory.gather(blocks)
    assert taken.event.wait(10.0)
    assert np.array_equal(taken.data[taken.rows], before[blocks])
    content = taken.data[taken.rows].copy()
    taken.release()

    targets = np.array([2, 3, 1])
    staging = memory.receive(targets)
    assert staging.event.wait(10.0)
    staging.data[staging.rows[[0, 2]]] = content[[0, 2]]
    assert memory.scatter(staging, targets, np.array([0, 2])).wait(10.0)
    staging.release()
    after = cache.cpu().view(torch.uint8).view(SHAPE[0], -1).numpy()
    expected = before.copy()
    expected[[2, 1]] = content[[0, 2]]
    assert np.array_equal(after, expected)


def test_a_late_memory_shows_nothing_before_its_event() -> None:
    cache = torch.randn(SHAPE)
    before = cache.clone()
    memory = LateBlocks(CpuBlocks(cache))
    taken = memory.gather(np.array([1]))
    assert not taken.event.wait(0.0) and (taken.data == POISON).all()
    event = memory.scatter(taken, np.array([3]), np.array([0]))
    assert torch.equal(cache, before)
    memory.complete()
    assert event.wait(0.0) and taken.event.wait(0.0)
    assert torch.equal(cache[3], before[1])
    taken.release()
    assert memory.staged == 0


class Copy:
    """The event of a copy that a test ends."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def wait(self, timeout_s: float) -> bool:
        return self.over.wait(timeout_s)


def test_a_staging_area_is_nobody_elses_before_its_last_copy_is_over() -> None:
    """Who closes, or fails, gives it back at once; the device may still be writing into it."""
    first, second = torch.zeros(1), torch.zeros(2)
    areas, copy = StagingAreas([first, second]), Copy()
    assert {id(areas.take()), id(areas.take())} == {id(first), id(second)}
    areas.give(first, copy)
    with pytest.raises(DeadlineExceeded):
        areas.take(timeout_s=0.01)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(areas.take, 60.0) for _ in range(2)]
        areas.give(second, Done())
        copy.over.set()
        assert {id(taken.result(60)) for taken in waiting} == {id(first), id(second)}
    with pytest.raises(DeadlineExceeded):
        areas.take(timeout_s=0.01)


@pytest.mark.gpu
def test_a_failed_gather_costs_no_staging_area() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    memory = CudaBlocks(torch.randn(SHAPE).to("cuda"))
    for _ in range(10):
        with pytest.raises(TypeError):
            memory.gather("no blocks")  # type: ignore[arg-type]
    memory.gather(np.array([0])).release()
