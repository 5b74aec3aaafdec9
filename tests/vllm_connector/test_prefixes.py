"""How much of a prompt the pool has, over groups of several kinds, against a search over all lengths."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engines.vllm.prefixes import GroupShape, keys_of, longest_prefix


def numbered_keys(group: int, count: int) -> NDArray[np.uint8]:
    keys = np.zeros((count, 16), dtype=np.uint8)
    keys[:, 0], keys[:, 1] = group, np.arange(count)
    return keys


def needed(shape: GroupShape, begin: int, prefix: int) -> list[int]:
    """Blocks that have to be there: those with a token that the next one looks at, behind what is there already."""
    oldest = 0 if not shape.window_tokens else max(prefix - shape.window_tokens + 1, 0)
    return [b for b in range(prefix // shape.block_tokens) if (b + 1) * shape.block_tokens > max(oldest, begin)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[GroupShape], list[set[int]], int, int]:
    count = draw(st.integers(1, 3))
    shapes, there = [], []
    for group in range(count):
        block_tokens = draw(st.sampled_from([2, 4]))
        window = 0 if group == 0 else draw(st.sampled_from([0, 1, 3, 4, 9]))
        shapes.append(GroupShape(group, block_tokens, window))
        some = st.sets(st.integers(0, 32 // block_tokens - 1), max_size=draw(st.sampled_from([2, 16])))
        blocks = draw(some)  # those that are there, or, so that prefixes are long, those that are not
        there.append(blocks if draw(st.booleans()) else set(range(32 // block_tokens)) - blocks)
    return shapes, there, 4 * draw(st.integers(0, 4)), draw(st.integers(0, 32))


@given(cases())
def test_longest_prefix(case: tuple[list[GroupShape], list[set[int]], int, int]) -> None:
    shapes, there, begin, end = case
    asked: list[tuple[int, int]] = []

    def lookup(group: int, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        asked.extend((group, int(number)) for number in keys[:, 1])
        return np.array([int(number) in there[group] for number in keys[:, 1]], dtype=np.bool_)

    keys = [numbered_keys(shape.group, 32 // shape.block_tokens) for shape in shapes]
    got = longest_prefix(shapes, keys, lookup, begin, end, 4)
    expected = begin
    for prefix in range(begin, end + 1, 4):
        if all(there[s.group].issuperset(needed(s, begin, prefix)) for s in shapes):
            expected = prefix
    assert got == expected
    assert all(number >= begin // shapes[group].block_tokens for group, number in asked), "asked for what is there"


def test_a_larger_block_has_its_last_hash() -> None:
    hashes = [bytes([i]) * 32 for i in range(7)]
    assert keys_of(hashes, 16, 16)[:, 0].tolist() == list(range(7))
    assert keys_of(hashes, 16, 32)[:, 0].tolist() == [1, 3, 5]
    assert keys_of([], 16, 32).shape == (0, 16)


def test_a_window_needs_the_blocks_of_all_tokens_that_it_sees() -> None:
    for window in range(1, 14):
        for block_tokens in (1, 2, 4, 5):
            for prefix in range(0, 41, block_tokens):
                # The next token, at `prefix`, sees itself and window - 1 before it; of these, blocks are needed.
                seen = [at for at in range(prefix) if prefix - at < window]
                needed = min((at // block_tokens for at in seen), default=prefix // block_tokens)
                assert GroupShape(0, block_tokens, window).first_needed(prefix) == needed, (
                    window,
                    block_tokens,
                    prefix,
                )
