"""Blocks in runs: where neighbours are one, and copies against plain slices."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.attached import planes
from engines.attached.planes import Plane

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
#: Of each plane: bytes of a run, and of the gap before it in a block's stretch of memory.
Runs = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 0, 3])), min_size=1, max_size=6)


def made(runs: list[tuple[int, int]], count: int, seed: int) -> tuple[np.ndarray, list[Plane], list[int]]:
    """Memory of `count` blocks with these runs each, its planes, and where in a block each begins."""
    stride = sum(size + gap for size, gap in runs)
    memory = np.random.default_rng(seed).integers(0, 256, (count, stride), dtype=np.uint8)
    found, begins, offset = [], [], 0
    for size, gap in runs:
        offset += gap
        found.append(Plane(memory.ctypes.data + offset, stride, size))
        begins.append(offset)
        offset += size
    return memory, found, begins


@unhurried
@given(Runs, st.integers(1, 5), st.integers(0, 2**32), st.data())
def test_blocks_are_their_runs_in_order_merged_or_not(
    runs: list[tuple[int, int]], count: int, seed: int, data: st.DataObject
) -> None:
    memory, found, begins = made(runs, count, seed)
    chosen = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    together = planes.merged(found)
    assert planes.row_bytes(together) == planes.row_bytes(found) == sum(size for size, _ in runs)
    assert len(together) == 1 + sum(gap > 0 for _, gap in runs[1:])
    for used in (found, together):
        rows = np.zeros((len(chosen) + 1, planes.row_bytes(used)), dtype=np.uint8)
        planes.gather(used, np.array(chosen, dtype=np.int64), rows)
        for row, block in zip(rows, chosen, strict=False):
            parts = [memory[block, at : at + size] for at, (size, _) in zip(begins, runs, strict=True)]
            assert row.tobytes() == b"".join(part.tobytes() for part in parts)
        assert not rows[len(chosen) :].any()


@unhurried
@given(Runs, st.integers(1, 5), st.integers(0, 2**32), st.data())
def test_what_is_scattered_is_what_is_gathered_and_nothing_else_changes(
    runs: list[tuple[int, int]], count: int, seed: int, data: st.DataObject
) -> None:
    memory, found, begins = made(runs, count, seed)
    chosen = np.array(data.draw(st.lists(st.integers(0, count - 1), unique=True)), dtype=np.int64)
    together, expected = planes.merged(found), memory.copy()
    rows = np.random.default_rng(seed + 1).integers(0, 256, (len(chosen), planes.row_bytes(found)), dtype=np.uint8)
    for row, block in zip(rows, chosen.tolist(), strict=True):
        taken = 0
        for at, (size, _) in zip(begins, runs, strict=True):
            expected[block, at : at + size] = row[taken : taken + size]
            taken += size
    planes.scatter(together, rows, chosen)
    assert (memory == expected).all()


def test_runs_that_follow_one_another_in_one_block_only_are_not_one() -> None:
    one = Plane(1000, 64, 16)
    assert one.with_next(Plane(1016, 64, 16)) == Plane(1000, 64, 32)
    assert one.with_next(Plane(1016, 32, 16)) is None  # other blocks lie elsewhere
    assert one.with_next(Plane(1017, 64, 16)) is None
    assert one.with_next(Plane(984, 64, 16)) is None  # before it
    assert one.with_next(Plane(1016, 64, 49)) is None  # would reach into the next block
    assert one.with_next(Plane(1016, 64, 48)) == Plane(1000, 64, 64)
