"""Copying blocks and computing or checking the digests of their sections, a whole batch in one call without the GIL.

Blocks are named by addresses in this process: the caller makes sure that the memory stays mapped and is as long as it
says. All arrays are C-contiguous, aligned and writable, so that each kernel is compiled for one signature only:

 * sources, targets, sizes: uint64 (n): addresses and bytes; a size is a multiple of the block's section count
 * keys: uint64 (n, 2); section_counts: uint64 (n), each 1 to the width of `digests`
 * digests: uint64 (n, sections); good: bool (n)

A digest always covers the bytes that arrived: each byte of the source is loaded once, and hashed from the register or
the private copy that is also what gets stored. Seeds are those of `hashing.section_seed`.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvpool.core.kernels.atomics import fence_stores
from kvpool.core.kernels.stripes import BLOCK_BYTES, GROUP_BYTES, move_bytes, stream_blocks, stream_groups
from kvpool.core.kernels.xxh3_64 import HASH_ONLY, SCRATCH_WORDS, STORE, STREAM, move_and_hash

U64: TypeAlias = NDArray[np.uint64]
Bools: TypeAlias = NDArray[np.bool_]

#: Batches from this size on are stored past the caches: their ends would push their beginnings out anyway, and the old
#: bytes of the targets need not be read.
STREAM_BYTES_MIN: Final = 1 << 20

_SEED_SECTION = np.uint64(0x9E3779B97F4A7C15)
_LINE = np.uint64(64)


@njit
def _is_large(sizes: U64) -> bool:
    total = np.uint64(0)
    for i in range(len(sizes)):
        total += sizes[i]
    return bool(total >= np.uint64(STREAM_BYTES_MIN))


@njit(inline="always")
def _how_to_store(large: bool, target: np.uint64, step: np.uint64) -> int:
    aligned = target % _LINE == np.uint64(0) and step % _LINE == np.uint64(0)
    return STREAM if large and aligned else STORE


@njit(inline="always")
def _seed(keys: U64, block: int, section: int) -> np.uint64:
    return keys[block, 0] ^ keys[block, 1] ^ (np.uint64(section) * _SEED_SECTION)


@njit(nogil=True, cache=True)
def copy_out_blocks(
    sources: U64, targets: U64, sizes: U64, keys: U64, digests: U64, section_counts: U64, good: Bools
) -> None:
    """Copies blocks; good[i] says whether what arrived has the digests. A bad block is not copied further."""
    large = _is_large(sizes)
    scratch = np.empty(SCRATCH_WORDS, dtype=np.uint64)
    for i in range(len(sizes)):
        step = sizes[i] // section_counts[i]
        store = _how_to_store(large, targets[i], step)
        good[i] = True
        for section in range(np.int64(section_counts[i])):
            at = np.uint64(section) * step
            digest = move_and_hash(sources[i] + at, targets[i] + at, step, _seed(keys, i, section), store, scratch)
            if digest != digests[i, section]:
                good[i] = False
                break
    fence_stores()


@njit(nogil=True, cache=True)
def copy_in_blocks(sources: U64, targets: U64, sizes: U64, keys: U64, section_counts: U64, digests: U64) -> None:
    """Copies blocks and fills in the digests of what was copied."""
    large = _is_large(sizes)
    scratch = np.empty(SCRATCH_WORDS, dtype=np.uint64)
    for i in range(len(sizes)):
        step = sizes[i] // section_counts[i]
        store = _how_to_store(large, targets[i], step)
        for section in range(np.int64(section_counts[i])):
            at = np.uint64(section) * step
            digests[i, section] = move_and_hash(
                sources[i] + at, targets[i] + at, step, _seed(keys, i, section), store, scratch
            )
    fence_stores()


@njit(nogil=True, cache=True)
def copy_blocks(sources: U64, targets: U64, sizes: U64) -> None:
    """Copies blocks, whatever they hold."""
    large = _is_large(sizes)
    for i in range(len(sizes)):
        streamed = np.uint64(0)
        if _how_to_store(large, targets[i], _LINE) == STREAM:
            groups = sizes[i] // np.uint64(GROUP_BYTES)
            stream_groups(sources[i], targets[i], groups)
            streamed = groups * np.uint64(GROUP_BYTES)
            blocks = (sizes[i] - streamed) // np.uint64(BLOCK_BYTES)
            stream_blocks(sources[i] + streamed, targets[i] + streamed, blocks)
            streamed += blocks * np.uint64(BLOCK_BYTES)
        move_bytes(sources[i] + streamed, targets[i] + streamed, sizes[i] - streamed)
    fence_stores()


@njit(nogil=True, cache=True)
def digest_blocks(sources: U64, sizes: U64, keys: U64, section_counts: U64, digests: U64) -> None:
    """Fills in the digests of blocks, where they lie."""
    scratch = np.empty(SCRATCH_WORDS, dtype=np.uint64)
    for i in range(len(sizes)):
        step = sizes[i] // section_counts[i]
        for section in range(np.int64(section_counts[i])):
            at = sources[i] + np.uint64(section) * step
            digests[i, section] = move_and_hash(at, at, step, _seed(keys, i, section), HASH_ONLY, scratch)


@njit(nogil=True, cache=True)
def check_blocks(sources: U64, sizes: U64, keys: U64, digests: U64, section_counts: U64, good: Bools) -> None:
    """good[i] says whether block i has its digests, where it lies."""
    scratch = np.empty(SCRATCH_WORDS, dtype=np.uint64)
    for i in range(len(sizes)):
        step = sizes[i] // section_counts[i]
        good[i] = True
        for section in range(np.int64(section_counts[i])):
            at = sources[i] + np.uint64(section) * step
            if move_and_hash(at, at, step, _seed(keys, i, section), HASH_ONLY, scratch) != digests[i, section]:
                good[i] = False
                break


def warm_up() -> None:
    """Runs each kernel once: compiled, or loaded from the cache."""
    source, target = np.arange(512, dtype=np.uint8), np.zeros(512, dtype=np.uint8)
    sources = np.array([source.ctypes.data], dtype=np.uint64)
    targets = np.array([target.ctypes.data], dtype=np.uint64)
    sizes, ones = np.array([512], dtype=np.uint64), np.ones(1, dtype=np.uint64)
    keys, digests = np.zeros((1, 2), dtype=np.uint64), np.zeros((1, 1), dtype=np.uint64)
    good = np.zeros(1, dtype=np.bool_)
    copy_in_blocks(sources, targets, sizes, keys, ones, digests)
    copy_out_blocks(sources, targets, sizes, keys, digests, ones, good)
    assert good[0] and np.array_equal(source, target)
    check_blocks(targets, sizes, keys, digests, ones, good)
    assert good[0]
    digest_blocks(sources, sizes, keys, ones, digests)
    copy_blocks(sources, targets, sizes)
