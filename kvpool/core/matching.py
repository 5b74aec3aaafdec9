"""Which stored blocks an engine needs: of the shards by its place in tensor parallelism, of the groups by their kind.

Pure functions over a namespace's groups. A block is stored in `shard_count` shards, each a fixed run of KV heads, so
that engines of any degree share what is stored: they choose shards, stored bytes are never cut. In an engine's own
block, which has the heads of all its shards side by side, a shard is a strip: equal runs at equal distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from kvpool.core.errors import BadArgument
from kvpool.core.namespace import GroupKind, GroupSpec

# ------------------------------------------------------------ shards


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """Where the bytes of one shard lie in an engine's own block: `run_count` runs of `run_bytes`, in stored order."""

    shard: int
    offset_bytes: int
    run_bytes: int
    stride_bytes: int
    run_count: int

    @property
    def size_bytes(self) -> int:
        return self.run_bytes * self.run_count

    @property
    def is_contiguous(self) -> bool:
        return self.run_count == 1 or self.run_bytes == self.stride_bytes

    def view(self, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The shard within blocks, without a copy: uint8 (n, block bytes) -> uint8 (n, run_count, run_bytes).

        Assign to it to fill the shard in; `.reshape(n, -1)` of it is what is stored.

        Raises: BadArgument if the rows are too short or not contiguous.
        """
        last = self.offset_bytes + (self.run_count - 1) * self.stride_bytes + self.run_bytes
        if blocks.ndim != 2 or blocks.dtype != np.uint8 or blocks.shape[1] < last:
            raise BadArgument(f"rows of at least {last} bytes are needed, not {blocks.dtype} {blocks.shape}")
        if blocks.strides[1] != 1:
            raise BadArgument("the bytes of a row must be contiguous")
        return as_strided(
            blocks[:, self.offset_bytes :],
            shape=(len(blocks), self.run_count, self.run_bytes),
            strides=(blocks.strides[0], self.stride_bytes, 1),
            writeable=bool(blocks.flags.writeable),
        )


def shard_count_for(kv_heads_total: int, degrees: Sequence[int]) -> int:
    """The fewest shards that engines of all these degrees can share.

    Args:
        kv_heads_total: of the whole model.
        degrees: of tensor parallelism, each at least 1. One larger than the number of heads is a multiple of it: its
            ranks hold copies of heads.
    Raises: BadArgument if the heads can't be cut so.
    """
    if kv_heads_total < 1 or not degrees or min(degrees) < 1:
        raise BadArgument("at least one KV head and one degree of 1 or more are needed")
    for degree in degrees:
        if degree > kv_heads_total and degree % kv_heads_total:
            raise BadArgument(f"{degree} ranks are not a multiple of {kv_heads_total} KV heads")
    count = math.lcm(*(min(degree, kv_heads_total) for degree in degrees))
    if kv_heads_total % count:
        raise BadArgument(
            f"{kv_heads_total} KV heads can't be cut in {count} equal shards for degrees "
            f"{', '.join(map(str, degrees))}",
            hint="leave out a degree, or give it a namespace of its own",
        )
    return count


def shards_of_rank(group: GroupSpec, rank: int, degree: int) -> range:
    """Shards that rank `rank` of an engine with `degree` ranks reads.

    Where every rank holds everything (MLA), or has a copy of a single head, several ranks read the same shard.

    Raises: BadArgument if the degree does not fit the group.
    """
    if degree < 1 or not 0 <= rank < degree:
        raise BadArgument(f"rank {rank} is not one of {degree}")
    shards = group.shard_count
    if shards % degree == 0 and not _is_replicated(group):
        return range(rank * shards // degree, (rank + 1) * shards // degree)
    if _is_replicated(group) or (group.kv_heads == 1 and degree % shards == 0):
        first = rank * shards // degree
        return range(first, first + 1)
    raise BadArgument(
        f"group {group.id} is stored in {shards} shards: an engine of {degree} ranks can't share it",
        hint=f"use a degree that divides {shards}, or store it with a shard count that is a multiple of {degree}",
    )


def writes_shard(group: GroupSpec, shard: int, rank: int, degree: int) -> bool:
    """Whether this rank is the one that writes a shard: the first of those that hold it. Raises: BadArgument."""
    return shard in shards_of_rank(group, rank, degree) and (
        rank == 0 or shard not in shards_of_rank(group, rank - 1, degree)
    )


def shard_places(group: GroupSpec, rank: int, degree: int) -> tuple[ShardPlace, ...]:
    """Where each shard of `shards_of_rank` lies in this rank's own blocks, in order of shards.

    A rank's own block is [layer][k,v][token][its kv_heads][head_dim]; where it holds one shard, that is the stored
    block itself.

    Raises: BadArgument if the degree does not fit, or if heads of an opaque layout would have to be told apart.
    """
    shards = shards_of_rank(group, rank, degree)
    if len(shards) == 1:
        return (ShardPlace(shards[0], 0, group.block_bytes, group.block_bytes, 1),)
    run_count = 2 * len(group.layers) * group.block_tokens
    if not group.kv_heads or group.block_bytes % (run_count * group.kv_heads):
        raise BadArgument(
            f"group {group.id}: where heads lie in its blocks is not known, so a rank can't hold {len(shards)} shards",
            hint=f"read it with {group.shard_count} ranks",
        )
    run_bytes = group.block_bytes // run_count
    return tuple(
        ShardPlace(shard, i * run_bytes, run_bytes, run_bytes * len(shards), run_count)
        for i, shard in enumerate(shards)
    )


def _is_replicated(group: GroupSpec) -> bool:
    return group.kind is GroupKind.MLA and group.shard_count == 1


# ------------------------------------------------------------ groups


def needed_blocks(group: GroupSpec, tokens: int) -> range:
    """Blocks of a group without which computing can't go on after the first `tokens` tokens.

    All of them for full attention and MLA, those with one of the last `window_tokens` tokens for a window, and the
    last one for a state.

    Args: tokens: a multiple of the group's `block_tokens`.
    """
    assert tokens >= 0 and tokens % group.block_tokens == 0, "a prefix ends with a block"
    end = tokens // group.block_tokens
    if group.kind is GroupKind.WINDOW:
        return range(max(tokens - group.window_tokens, 0) // group.block_tokens, end)
    if group.kind is GroupKind.STATE:
        return range(max(end - 1, 0), end)
    return range(end)


def match_groups(groups: Sequence[GroupSpec], presence: Sequence[NDArray[np.bool_]]) -> int:
    """Tokens of the longest prefix that can be used in all groups at once.

    It ends where a block ends in every group. Other prefixes than the longest leading run can be usable: a window or a
    state does without old blocks.

    Args:
        groups: of one namespace; at least one.
        presence: for each group, whether its blocks 0, 1, 2, ... can be read, all shards of them; bool (blocks,).
            Blocks beyond the end are missing.
    Returns: 0 if nothing can be used.
    Cost: O(blocks).
    """
    assert groups and len(groups) == len(presence), "one presence for each group"
    step = math.lcm(*(group.block_tokens for group in groups))
    count = min(len(present) * group.block_tokens for group, present in zip(groups, presence, strict=True)) // step
    ends = np.arange(count + 1, dtype=np.int64) * step
    usable = np.ones(count + 1, dtype=np.bool_)
    for group, present in zip(groups, presence, strict=True):
        usable &= _usable(group, present, ends)
    return int(ends[np.flatnonzero(usable)[-1]])


def _usable(group: GroupSpec, present: NDArray[np.bool_], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether all of `needed_blocks` are there, for each end of a prefix."""
    last = ends // group.block_tokens
    if group.kind is GroupKind.WINDOW:
        first = np.maximum(ends - group.window_tokens, 0) // group.block_tokens
    elif group.kind is GroupKind.STATE:
        first = np.maximum(last - 1, 0)
    else:
        first = np.zeros_like(last)
    missing = np.zeros(len(present) + 1, dtype=np.int64)  # before each block
    np.cumsum(~np.asarray(present, dtype=np.bool_), out=missing[1:])
    return np.asarray(missing[last] == missing[first], dtype=np.bool_)
