"""What data threads may touch, against a plain list of what was granted."""

from __future__ import annotations

import numpy as np
import pytest

from kvpool.core.arrays import Descriptors
from kvpool.service.grants import Grants

SESSION, HOLD = 1, 7
SECTIONS = 4
SIZE = 4096


class Peer:
    session = SESSION

    def interrupt(self) -> None: ...


def blocks_of(offsets: list[int], rng: np.random.Generator) -> Descriptors:
    count = len(offsets)
    return Descriptors(
        rng.integers(0, 256, (count, 16), dtype=np.uint8), np.array(offsets, np.uint64),
        np.full(count, SIZE, np.uint64), rng.integers(1, 9, count).astype(np.uint32),
        np.zeros((count, SECTIONS), np.uint64),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_extents_are_blocks_or_their_sections(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grants = Grants(lambda: 0)
    grants.open_session(SESSION)
    offsets = (rng.permutation(12)[: rng.integers(1, 9)] * SIZE).tolist()
    blocks, granted = blocks_of(offsets, rng), rng.random(len(offsets)) < 0.8
    committed = rng.integers(0, 1 << SECTIONS, len(offsets)).astype(np.uint8)
    grants.grant_read(SESSION, HOLD, blocks, granted, 100, SECTIONS, committed)
    grants.grant_write(SESSION, HOLD, blocks, granted, SECTIONS, 100)
    for row in np.flatnonzero(granted).tolist():
        for section in range(SECTIONS):
            if committed[row] >> section & 1:
                grants.committed(HOLD, [row], [section])
    readable, writable, step = set(), set(), SIZE // SECTIONS
    for row in np.flatnonzero(granted).tolist():
        begin, generation = int(offsets[row]), int(blocks.generations[row])
        if committed[row] == (1 << SECTIONS) - 1:
            readable.add((begin, SIZE, generation))
        if committed[row] == 0:
            writable.add((begin, SIZE, generation))
        for section in range(SECTIONS):
            where = readable if committed[row] >> section & 1 else writable
            where.add((begin + section * step, step, generation))
    generations = sorted({int(g) for g in blocks.generations} | {3})
    asked = [
        (begin + skip, size, generation)
        for begin in range(0, 13 * SIZE, SIZE)
        for skip in (0, step, 2 * step, 3 * step, 1, step + 1)
        for size in (SIZE, step, step - 1, 2 * step)
        for generation in generations
    ]
    columns = list(zip(*asked, strict=True))
    extents = np.array(columns[0], np.uint64), np.array(columns[1], np.uint64), np.array(columns[2], np.uint32)
    may_read = grants.readable(SESSION, HOLD, *extents)
    may_write = grants.begin_write(SESSION, HOLD, *extents, Peer())  # type: ignore[arg-type]
    assert {extent for extent, may in zip(asked, may_read.tolist(), strict=True) if may} == readable
    assert {extent for extent, may in zip(asked, may_write.tolist(), strict=True) if may} == writable
    assert not grants.readable(SESSION + 1, HOLD, *extents).any()
    assert not grants.readable(SESSION, HOLD + 1, *extents).any()


def test_a_lease_of_whole_blocks_covers_no_parts() -> None:
    grants = Grants(lambda: 0)
    grants.open_session(SESSION)
    blocks = blocks_of([0, SIZE], np.random.default_rng(1))
    grants.grant_read(SESSION, HOLD, blocks, np.array([True, False]), 100)
    assert grants.readable(SESSION, HOLD, blocks.offsets, blocks.sizes, blocks.generations).tolist() == [True, False]
    quarter = blocks.sizes // np.uint64(SECTIONS)
    assert not grants.readable(SESSION, HOLD, blocks.offsets, quarter, blocks.generations).any()
