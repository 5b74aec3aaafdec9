"""Blocks between a device's cache and host memory: in the order in which they were asked for, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engines.torch.hbm import block_memory
from tests.gpu.device import DEVICE

BLOCKS, SHAPE = 40, (3, 2, 4, 2, 8)  # layers, K and V, tokens, heads, dim
WAIT_S = 30.0


def made_cache(dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn((BLOCKS + 1, *SHAPE), generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def bytes_of(cache: torch.Tensor) -> NDArray[np.uint8]:
    """A copy: uint8 (blocks + 1, block_bytes)."""
    return cache.cpu().contiguous().view(torch.uint8).reshape(len(cache), -1).numpy().copy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(5))
def test_random_programs(dtype: torch.dtype, seed: int) -> None:
    """Gathers, scatters and computing in any order, against an array in host memory."""
    rng = np.random.default_rng(seed)
    cache = made_cache(dtype, seed)
    memory, plain = block_memory(cache), bytes_of(cache)
    for _ in range(40):
        blocks = rng.permutation(BLOCKS)[: rng.integers(1, min(8, memory.batch_blocks_max) + 1)]
        step = rng.integers(0, 3)
        if step == 0:
            taken = memory.gather(blocks)
            assert taken.event.wait(WAIT_S)
            assert np.array_equal(taken.data[taken.rows], plain[blocks]), f"seed {seed}"
            taken.release()
        elif step == 1:
            staging = memory.receive(blocks)
            assert staging.event.wait(WAIT_S)
            content = rng.integers(0, 256, (len(blocks), memory.block_bytes), dtype=np.uint8)
            staging.data[staging.rows] = content
            some = rng.permutation(len(blocks))[: rng.integers(1, len(blocks) + 1)]
            assert memory.scatter(staging, blocks, some).wait(WAIT_S)
            staging.release()
            # A cache in host memory is its own staging memory: there all of it has arrived.
            chosen = np.arange(len(blocks)) if DEVICE == "cpu" else some
            plain[blocks[chosen]] = content[chosen]
        else:
            source, target = rng.choice(BLOCKS, 2, replace=False)
            cache[target].copy_(cache[source])
            plain[target] = plain[source]
    assert np.array_equal(bytes_of(cache), plain), f"seed {seed}"


def test_a_copy_comes_after_what_was_launched_before_it() -> None:
    """The device is kept busy, so that whatever did not wait for it would read too early."""
    cache = made_cache(torch.float32, 1)
    memory = block_memory(cache)
    busy = torch.randn(2048, 2048, device=DEVICE)
    for turn in range(5):
        for _ in range(30 if DEVICE == "cuda" else 1):
            busy = busy @ busy
            busy = busy / busy.abs().max()
        cache[:4] = float(turn) + 0.0 * busy[0, 0].nan_to_num(0.0)  # after all of it
        taken = memory.gather(np.arange(4))
        cache[:4] = -1.0 if DEVICE == "cpu" else cache[:4]  # computing goes on with the same blocks
        assert taken.event.wait(WAIT_S)
        if DEVICE == "cuda":
            wanted = np.full((4, memory.block_bytes // 4), float(turn), dtype=np.float32)
            assert np.array_equal(taken.data[taken.rows].view(np.float32), wanted)
        taken.release()


def test_what_is_computed_after_a_scatter_sees_it() -> None:
    cache = made_cache(torch.float32, 2)
    memory = block_memory(cache)
    for turn in range(20):
        staging = memory.receive(np.array([7]))
        staging.data[staging.rows] = np.full((1, memory.block_bytes // 4), float(turn), dtype=np.float32).view(np.uint8)
        assert memory.scatter(staging, np.array([7]), np.array([0])).wait(WAIT_S)
        staging.release()
        assert float(cache[7].double().mean()) == turn


def test_from_several_threads_with_fewer_areas_than_threads() -> None:
    cache = made_cache(torch.bfloat16, 3)
    memory, plain = block_memory(cache), bytes_of(cache)

    def work(number: int) -> bool:
        good = True
        for turn in range(20):
            block = np.array([(number * 5 + turn) % BLOCKS])
            taken = memory.gather(block)
            good &= taken.event.wait(WAIT_S) and np.array_equal(taken.data[taken.rows], plain[block])
            taken.release()
        return good

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(work, range(12)))


def test_more_than_one_staging_area_of_blocks() -> None:
    """A copy takes `batch_blocks_max` blocks at once, and all of them arrive."""
    blocks = 64
    cache = torch.randn((blocks + 1, 256 << 10), generator=torch.Generator().manual_seed(4)).to(DEVICE)  # 1 MiB each
    memory, plain = block_memory(cache), bytes_of(cache)
    for first in range(0, blocks, memory.batch_blocks_max):
        some = np.arange(first, min(first + memory.batch_blocks_max, blocks))
        taken = memory.gather(some)
        assert taken.event.wait(WAIT_S)
        assert np.array_equal(taken.data[taken.rows], plain[some])
        taken.release()
