"""Listing what lies on a node's SSD and not in its memory, page by page: what operators see, and copies begin from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ids import KeyArray, Tier, unpack_keys
from kvpool.core.index import NO_ENTRY
from kvpool.core.source import SourceCore
from kvpool.tiers.ssd.store import SsdStore, SsdStored
from kvpool.v1 import block_source_pb2 as pb

#: Names are read from the disk, a page each: a call reads no more of them, whatever its limit.
NAMES_PER_PAGE = 512


def read_page(store: SsdStore, request: pb.ListBlocksRequest, limit: int) -> tuple[KeyArray, SsdStored, int]:
    """Keys that a request asks for and what the disk knows of them, memory or not. Blocks: call it in a thread.

    Returns: keys, facts, and the cursor of the next page (0: these were the last). A page may be short before the end.
    """
    if request.keys:
        keys, following = unpack_keys(request.keys)[:limit], 0
    else:
        listing = store.list(request.cursor, min(limit, NAMES_PER_PAGE) if request.name_prefix else limit)
        keys, following = listing.keys, listing.next_cursor or 0
    facts = store.describe(keys)
    chosen = facts.present.copy()
    if request.namespace_id:
        chosen &= _equal(facts.namespace_ids, request.namespace_id)
    if request.name_prefix:
        chosen &= facts.name_bytes >= len(request.name_prefix.encode())
    keys = np.ascontiguousarray(keys[chosen])
    stored = _with_names(store, keys)
    if request.name_prefix:
        prefix = request.name_prefix.encode()
        named = np.array([name.startswith(prefix) for name in stored.names], dtype=np.bool_)
        keys, stored = np.ascontiguousarray(keys[named]), _with_names(store, keys[named])
    return keys, stored, following


def infos_of(core: SourceCore, keys: KeyArray, stored: SsdStored) -> list[pb.BlockInfo]:
    """Those of a page that are not in memory, in any state. In the core's loop."""
    facts = stored.facts
    alone = np.flatnonzero((core.index.lookup(keys) == NO_ENTRY) & facts.present)
    return [
        pb.BlockInfo(
            key=keys[row].tobytes(), namespace_id=facts.namespace_ids[row].tobytes(),
            tier=int(Tier.SSD), fidelity=int(facts.fidelities[row]),  # type: ignore[arg-type]
            size=int(facts.sizes[row]), section_count=int(facts.section_counts[row]), state="readable", on_ssd=True,
            name=stored.names[row].decode(errors="replace"),
        )
        for row in alone.tolist()
    ]  # fmt: skip


def _with_names(store: SsdStore, keys: KeyArray) -> SsdStored:
    """Facts of keys; names where there are any, else none is read."""
    facts = store.describe(np.ascontiguousarray(keys))
    named = np.flatnonzero(facts.name_bytes > 0)
    names = [b""] * len(keys)
    if len(named):
        stored = store.describe_stored(np.ascontiguousarray(keys[named]))
        facts.present[named] &= stored.facts.present
        for row, name in zip(named.tolist(), stored.names, strict=True):
            names[row] = name
    return SsdStored(facts, np.zeros((len(keys), 8), dtype=np.uint64), names)


def _equal(namespace_ids: NDArray[np.uint8], namespace_id: bytes) -> NDArray[np.bool_]:
    """Which rows of uint8 (n, 16) are this namespace."""
    equal: NDArray[np.bool_] = (namespace_ids == np.frombuffer(namespace_id, dtype=np.uint8)).all(axis=1)
    return equal
