"""Shards with real bytes, written at one degree and read at another; groups against a brute-force oracle."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvpool.core.errors import BadArgument
from kvpool.core.matching import (
    match_groups,
    needed_blocks,
    shard_count_for,
    shard_places,
    shards_of_rank,
    writes_shard,
)
from kvpool.core.namespace import GroupKind, GroupSpec

DEGREES = (1, 2, 4)


def full_group(shards, heads, *, layers=2, tokens=4, dim=3, element_bytes=2):
    size = layers * 2 * tokens * heads * dim * element_bytes
    return GroupSpec(0, GroupKind.FULL, tuple(range(layers)), tokens, shards, 1, size, heads, dim)


# ------------------------------------------------------------ shards


def own_blocks(whole, degree, rank):
    """Blocks as rank `rank` holds them: (n, layers, 2, tokens, its heads, dim) as rows of bytes."""
    heads = whole.shape[4] // degree
    part = np.ascontiguousarray(whole[:, :, :, :, rank * heads : (rank + 1) * heads])
    return part.view(np.uint8).reshape(len(whole), -1)


def write_all(group, whole, degree):
    stored = {}
    for rank in range(degree):
        blocks = own_blocks(whole, degree, rank)
        for place in shard_places(group, rank, degree):
            assert place.shard not in stored
            assert place.size_bytes == group.block_bytes
            stored[place.shard] = place.view(blocks).reshape(len(blocks), -1).copy()
    return stored


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(DEGREES), st.sampled_from(DEGREES), st.sampled_from([4, 8]), st.integers(1, 3), st.integers(1, 3),
    st.integers(1, 5), st.integers(1, 7), st.sampled_from([np.uint16, np.uint32]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_what_one_degree_writes_another_reads(writers, readers, shards, heads, layers, tokens, dim, dtype, seed):
    group = full_group(shards, heads, layers=layers, tokens=tokens, dim=dim, element_bytes=np.dtype(dtype).itemsize)
    shape = (2, layers, 2, tokens, shards * heads, dim)
    whole = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
    stored = write_all(group, whole, writers)
    assert sorted(stored) == list(range(shards))
    for shard, content in stored.items():
        assert np.array_equal(content, own_blocks(whole, shards, shard)), "stored bytes depend on who wrote them"
    for rank in range(readers):
        own = own_blocks(whole, readers, rank)
        read = np.full_like(own, 0x55)
        for place in shard_places(group, rank, readers):
            place.view(read)[:] = stored[place.shard].reshape(2, place.run_count, place.run_bytes)
        assert np.array_equal(read, own)


@pytest.mark.parametrize("degree", DEGREES)
def test_each_shard_has_one_reader_and_one_writer(degree):
    group = full_group(8, 1)
    read = [shard for rank in range(degree) for shard in shards_of_rank(group, rank, degree)]
    assert read == list(range(8))
    writers = [[r for r in range(degree) if writes_shard(group, shard, r, degree)] for shard in range(8)]
    assert writers == [[shard * degree // 8] for shard in range(8)]


def test_a_rank_with_one_shard_holds_the_stored_block_itself():
    group = full_group(4, 2)
    for rank in range(4):
        (place,) = shard_places(group, rank, 4)
        assert place.is_contiguous and place.offset_bytes == 0 and place.run_bytes == group.block_bytes
    assert not any(place.is_contiguous for place in shard_places(group, 0, 2))


@pytest.mark.parametrize("kind", [GroupKind.FULL, GroupKind.WINDOW, GroupKind.STATE])
def test_degrees_that_do_not_divide_are_refused(kind):
    group = replace(full_group(4, 2), kind=kind)
    for degree in (3, 8, 5):
        with pytest.raises(BadArgument) as caught:
            shards_of_rank(group, 0, degree)
        assert caught.value.hint
    for rank, degree in ((0, 0), (-1, 2), (2, 2)):
        with pytest.raises(BadArgument):
            shards_of_rank(group, rank, degree)


def test_more_ranks_than_heads_share_copies():
    group = full_group(2, 1)
    assert [list(shards_of_rank(group, rank, 4)) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [rank for rank in range(4) if any(writes_shard(group, s, rank, 4) for s in range(2))] == [0, 2]
    with pytest.raises(BadArgument):
        shards_of_rank(group, 0, 3)


@pytest.mark.parametrize("degree", [1, 2, 3, 8])
def test_mla_is_one_shard_for_every_rank(degree):
    group = GroupSpec(0, GroupKind.MLA, (0, 1), 16, 1, 1, 16 * 576 * 2 * 2)
    for rank in range(degree):
        assert list(shards_of_rank(group, rank, degree)) == [0]
        assert writes_shard(group, 0, rank, degree) == (rank == 0)
        assert shard_places(group, rank, degree)[0].size_bytes == group.block_bytes


def test_opaque_blocks_are_never_taken_apart():
    group = replace(full_group(4, 2), kv_heads=0, head_dim=0)
    assert shard_places(group, 1, 4)[0].shard == 1
    with pytest.raises(BadArgument) as caught:
        shard_places(group, 0, 2)
    assert "4 ranks" in caught.value.hint


def test_views_refuse_rows_that_are_too_short():
    place = shard_places(full_group(4, 2), 0, 2)[1]
    row_bytes = 2 * full_group(4, 2).block_bytes
    assert place.view(np.zeros((1, row_bytes), dtype=np.uint8)).size == place.size_bytes
    for wrong in (
        np.zeros((1, row_bytes - 1), dtype=np.uint8), np.zeros(row_bytes, dtype=np.uint8),
        np.zeros((1, row_bytes), dtype=np.uint16), np.zeros((1, 2 * row_bytes), dtype=np.uint8)[:, ::2],
    ):  # fmt: skip
        with pytest.raises(BadArgument):
            place.view(wrong)
    frozen = np.zeros((1, row_bytes), dtype=np.uint8)
    frozen.flags.writeable = False
    assert not place.view(frozen).flags.writeable


def test_shard_counts():
    assert shard_count_for(8, [1]) == 1
    assert shard_count_for(8, [1, 2, 4]) == 4
    assert shard_count_for(6, [2, 3]) == 6
    assert shard_count_for(2, [1, 4]) == 2
    for heads, degrees in ((8, [3]), (4, [6]), (12, [8]), (0, [1]), (8, []), (8, [0])):
        with pytest.raises(BadArgument):
            shard_count_for(heads, degrees)


@given(st.integers(1, 64), st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=4))
def test_every_degree_fits_the_shard_count(heads, degrees):
    try:
        shards = shard_count_for(heads, degrees)
    except BadArgument:
        return
    group = full_group(shards, heads // shards)
    for degree in degrees:
        read = [shard for rank in range(degree) for shard in shards_of_rank(group, rank, degree)]
        assert sorted(dict.fromkeys(read)) == list(range(shards))
        assert len(read) == max(degree, shards)


# ------------------------------------------------------------ groups


def plain_usable(group, present, tokens):
    """By the rule, token by token: who is needed for the prefix [0, tokens)?"""
    if tokens % group.block_tokens:
        return False
    if group.kind is GroupKind.STATE:
        needed = [tokens - 1] if tokens else []
    elif group.kind is GroupKind.WINDOW:
        needed = range(max(tokens - group.window_tokens, 0), tokens)
    else:
        needed = range(tokens)
    blocks = [token // group.block_tokens for token in needed]
    return all(block < len(present) and present[block] for block in blocks)


def plain_match(groups, presence):
    limit = max(len(p) * g.block_tokens for g, p in zip(groups, presence, strict=True))
    usable = [
        tokens
        for tokens in range(limit + 1)
        if all(plain_usable(g, p, tokens) for g, p in zip(groups, presence, strict=True))
    ]
    return max(usable)


def made_group(number, kind, block_tokens, window):
    return GroupSpec(
        number, kind, (number,), block_tokens, 1, 1, 64, window_tokens=window if kind is GroupKind.WINDOW else 0
    )


@st.composite
def group_lists(draw):
    groups, presence = [], []
    for number in range(draw(st.integers(1, 4))):
        group = made_group(
            number, draw(st.sampled_from(list(GroupKind))), draw(st.sampled_from([1, 2, 3, 4, 8])),
            draw(st.integers(1, 20)),
        )  # fmt: skip
        groups.append(group)
        holes = draw(st.integers(0, 3))
        present = np.ones(draw(st.integers(0, 48 // group.block_tokens)), dtype=bool)
        for _ in range(holes if len(present) else 0):
            present[draw(st.integers(0, len(present) - 1))] = False
        presence.append(present)
    return groups, presence


@settings(max_examples=500, deadline=None)
@given(group_lists())
@example(([made_group(0, GroupKind.WINDOW, 2, 4)], [np.array([0, 1, 1, 0, 0], dtype=bool)]))
def test_groups_match_as_the_plain_rule_says(case):
    groups, presence = case
    before = [p.copy() for p in presence]
    tokens = match_groups(groups, presence)
    assert tokens == plain_match(groups, presence)
    assert all(np.array_equal(a, b) for a, b in zip(before, presence, strict=True))
    for group, present in zip(groups, presence, strict=True):
        needed = needed_blocks(group, tokens)
        assert all(present[block] for block in needed), "what is needed is there"


@settings(max_examples=200, deadline=None)
@given(group_lists(), st.data())
def test_more_blocks_never_match_less(case, data):
    groups, presence = case
    tokens = match_groups(groups, presence)
    which = data.draw(st.integers(0, len(groups) - 1))
    if not len(presence[which]):
        return
    presence[which][data.draw(st.integers(0, len(presence[which]) - 1))] = True
    assert match_groups(groups, presence) >= tokens


def test_the_kinds_by_example():
    full, window = made_group(0, GroupKind.FULL, 4, 0), made_group(1, GroupKind.WINDOW, 4, 6)
    state = made_group(2, GroupKind.STATE, 8, 0)
    holes = np.array([True, False, True, True, True, False])
    assert match_groups([full], [holes]) == 4
    assert match_groups([replace(full, kind=GroupKind.MLA)], [holes]) == 4
    assert match_groups([window], [holes]) == 20
    assert match_groups([state], [holes]) == 40
    assert match_groups([full, window], [np.ones(6, dtype=bool), holes]) == 20
    assert match_groups([full, window, state], [np.ones(6, dtype=bool), holes, np.array([1, 1, 0], dtype=bool)]) == 16
    assert list(needed_blocks(window, 20)) == [3, 4]
    assert list(needed_blocks(state, 16)) == [1]
    assert list(needed_blocks(full, 8)) == [0, 1]
    assert [list(needed_blocks(g, 0)) for g in (full, window, state)] == [[], [], []]


def test_a_long_window_prefix_needs_few_blocks():
    window = made_group(0, GroupKind.WINDOW, 16, 4096)
    present = np.zeros(8192, dtype=bool)
    present[-256:] = True
    assert match_groups([window], [present]) == 8192 * 16
    present[-256] = False
    assert match_groups([window], [present]) == 0
