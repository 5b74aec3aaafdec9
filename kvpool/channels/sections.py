"""Copying blocks section by section, hashing each section while it is in the CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument
from kvpool.core.hashing import section_digest


def bounds(size: int, section_count: int) -> Iterator[tuple[int, int, int]]:
    """(section, start, stop) of each section of a block. Raises: BadArgument if sections don't divide `size`."""
    if section_count < 1 or size % section_count:
        raise BadArgument(f"{section_count} sections do not divide a block of {size} bytes")
    step = size // section_count
    for section in range(section_count):
        yield section, section * step, (section + 1) * step


def digest_block(data: NDArray[np.uint8], key: bytes, section_count: int, out: NDArray[np.uint64]) -> None:
    """Digests of a block's sections, into `out` uint64 (section_count,)."""
    for section, start, stop in bounds(len(data), section_count):
        out[section] = section_digest(data[start:stop], key, section)


def copy_in(source: NDArray[np.uint8], target: NDArray[np.uint8], key: bytes, digests: NDArray[np.uint64]) -> None:
    """Copies a block and stores the digests of what was copied.

    Each section is hashed first: the copy then finds it in the cache, and what is hashed is the caller's own memory,
    so that a digest never covers bytes that differ from the caller's.
    """
    for section, start, stop in bounds(len(source), len(digests)):
        digests[section] = section_digest(source[start:stop], key, section)
        np.copyto(target[start:stop], source[start:stop])


def copy_out(source: NDArray[np.uint8], target: NDArray[np.uint8], key: bytes, digests: NDArray[np.uint64]) -> bool:
    """Copies a block and says whether what arrived has these digests. Hashes the copy, never the shared original."""
    for section, start, stop in bounds(len(source), len(digests)):
        np.copyto(target[start:stop], source[start:stop])
        if section_digest(target[start:stop], key, section) != digests[section]:
            return False
    return True


def check_block(data: NDArray[np.uint8], key: bytes, digests: NDArray[np.uint64]) -> bool:
    """Whether a whole block has these digests."""
    return all(
        section_digest(data[start:stop], key, section) == digests[section]
        for section, start, stop in bounds(len(data), len(digests))
    )


def block_keys(blocks: Descriptors) -> list[bytes]:
    """Keys as bytes, one object each."""
    packed = blocks.keys.tobytes()
    return [packed[i : i + 16] for i in range(0, len(packed), 16)]
