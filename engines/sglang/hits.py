"""From SGLang's page hashes to the pool's keys, and from what is there to how much of a prompt can be had. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ids import KEY_BYTES, NamespaceId

Bools = NDArray[np.bool_]
#: uint8 (pages, 16).
Keys = NDArray[np.uint8]

#: SGLang's hashes are sha256 in hex.
HASH_CHARS = 64


def page_keys(namespace: NamespaceId, hashes: Sequence[str]) -> Keys:
    """Keys of pages: uint8 (pages, 16).

    A hash covers the tokens of its prefix, LoRA and salt, but neither model nor form of the bytes. A source's index
    has room for one block a key, so the namespace is folded in: two models must not push each other out.
    """
    packed = b"".join(_digest(text)[:KEY_BYTES] for text in hashes)
    keys = np.frombuffer(packed, dtype=np.uint8).reshape(-1, KEY_BYTES)
    return keys ^ np.frombuffer(namespace, dtype=np.uint8)


def _digest(text: str) -> bytes:
    if len(text) == HASH_CHARS:
        try:
            return bytes.fromhex(text)
        except ValueError:
            pass
    return hashlib.sha256(text.encode()).digest()


def leading(there: Bools) -> int:
    """How many there are before the first that is not."""
    return len(there) if there.all() else int(np.argmin(there))


def ends_all(there: Bools) -> Bools:
    """Prefix lengths 1, 2, ... that can be had, where every page of the prefix is needed: bool (pages,)."""
    ends: Bools = np.logical_and.accumulate(there)
    return ends


def ends_trailing(there: Bools, window: int) -> Bools:
    """Prefix lengths 1, 2, ... that can be had, where only the last `window` pages of the prefix are needed.

    Args: window: pages, at least 1; a shorter prefix needs all of its pages.
    """
    missing = np.concatenate(([0], np.cumsum(~there)))
    ends = np.arange(1, len(there) + 1)
    complete: Bools = missing[ends] == missing[np.maximum(ends - window, 0)]
    return complete


def restorable(kv_pages: int, pools: Mapping[str, Bools]) -> tuple[list[int], dict[str, int]]:
    """Prefix lengths at which every pool can go on, and the longest of each pool by itself where it has any.

    Args:
        kv_pages: the longest prefix of the attention cache; every shorter one can be had too.
        pools: of each further pool, which prefix lengths 1, 2, ... it can go on at: bool (>= kv_pages,).
    """
    together = np.ones(kv_pages, dtype=np.bool_)
    longest: dict[str, int] = {}
    for name, ends in pools.items():
        own = np.flatnonzero(ends[:kv_pages])
        if len(own):
            longest[name] = int(own[-1]) + 1
        together &= ends[:kv_pages]
    return (np.flatnonzero(together) + 1).tolist(), longest
