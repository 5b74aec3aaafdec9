"""How much of a prompt the pool has, over groups of layers of different kinds. Pure.

Groups that attend to everything need every block of a prefix; groups with a window need those that the window behind
the prefix touches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
#: uint8 (blocks, 16).
Keys = NDArray[np.uint8]
#: (group, keys) -> which of them are there, in all shards.
Lookup = Callable[[int, Keys], Bools]

KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Of one group: tokens a block, and how far back it looks (0 = to the beginning)."""

    group: int
    block_tokens: int
    window_tokens: int = 0

    def first_needed(self, prefix_tokens: int) -> int:
        """The first block that is needed to go on behind `prefix_tokens`, which is a whole number of blocks."""
        if not self.window_tokens:
            return 0
        # The next token sees itself and window - 1 tokens before it.
        return max(prefix_tokens - (self.window_tokens - 1), 0) // self.block_tokens


def keys_of(
    hashes: Sequence[bytes], hash_tokens: int, block_tokens: int, first: int = 0, last: int | None = None
) -> Keys:
    """Keys of a group's full blocks from number `first` up to `last` (None: all): uint8 (blocks, 16).

    A hash covers all tokens up to its end, so that of a larger block is the last one within it. vLLM's hashes of 32
    bytes are sha256; 16 bytes of one are a key.
    """
    step = block_tokens // hash_tokens
    end = len(hashes) if last is None else last * step
    packed = b"".join(h[:KEY_BYTES] for h in hashes[first * step + step - 1 : end : step])
    return np.frombuffer(packed, dtype=np.uint8).reshape(-1, KEY_BYTES)


def longest_prefix(
    groups: Sequence[GroupShape],
    keys: Sequence[Keys],
    lookup: Lookup,
    begin_tokens: int,
    end_tokens: int,
    step_tokens: int,
) -> int:
    """The longest prefix that can be had, in tokens; `begin_tokens` if nothing beyond that can.

    Args:
        keys: of each group.
        begin_tokens: what is there already; nothing before it is looked up.
        end_tokens: what is wanted at most.
        step_tokens: a prefix is a whole number of these.
    """
    end_tokens = end_tokens // step_tokens * step_tokens
    found: list[Bools] = []
    for shape, own in zip(groups, keys, strict=True):
        first, last = begin_tokens // shape.block_tokens, min(end_tokens // shape.block_tokens, len(own))
        there = np.zeros(len(own) + 1, dtype=np.bool_)  # one more, never there: the end of every run
        there[:first] = True
        if last > first:
            there[first:last] = lookup(shape.group, own[first:last])
        found.append(there)
        if not shape.window_tokens:
            end_tokens = min(end_tokens, int(np.argmin(there)) * shape.block_tokens)
            if end_tokens <= begin_tokens:
                return begin_tokens
    prefix = end_tokens // step_tokens * step_tokens
    while prefix > begin_tokens:
        if all(_serves(shape, there, prefix) for shape, there in zip(groups, found, strict=True)):
            return prefix
        prefix -= step_tokens
    return begin_tokens


def _serves(shape: GroupShape, there: Bools, prefix_tokens: int) -> bool:
    return bool(there[shape.first_needed(prefix_tokens) : prefix_tokens // shape.block_tokens].all())
