"""Loads every kernel before it is needed, so that no first request waits for the compiler."""

from __future__ import annotations

import numpy as np

from kvpool.core.arrays import SourceArrays
from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.directory import Directory, SourceRecord
from kvpool.core.evictors import EVICTORS
from kvpool.core.hashing import block_keys
from kvpool.core.ids import KeyArray, SourceId, Tier
from kvpool.core.kernels import copying, int8, names, probing
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore

_UNIT_BYTES = 4096


def compile_kernels() -> None:
    """Runs the kernels once on tiny inputs, through the classes that use them: compiled, or loaded from the cache."""
    # One input for each length class of the hash: up to 128, up to 240, and more bytes.
    for block_tokens in (16, 32, 64):
        keys = block_keys(bytes(16), np.arange(8 * block_tokens, dtype=np.uint32), block_tokens)
    block_keys(bytes(16), list(range(16)), 16)
    _use_directory(keys)
    for eviction in EVICTORS:
        _use_source(keys, eviction)
    copying.warm_up()
    probing.warm_up()
    int8.warm_up()
    names.warm_up()


def _use_directory(keys: KeyArray) -> None:
    directory = Directory()
    source = SourceId("warm")
    directory.attach(SourceRecord(source, 1, Tier.DRAM, "", "", "", 0), 0)
    directory.apply_snapshot_part(source, 1, 0, 0, True, keys, 1, 0)
    directory.apply(source, 1, 1, (BlockChange(ChangeKind.STORED, keys.tobytes()),), 0)
    directory.match(keys)
    directory.apply(source, 1, 2, (BlockChange(ChangeKind.REMOVED, keys[:1].tobytes()),), 0)
    directory.detach(source)


def _use_source(keys: KeyArray, eviction: str) -> None:
    """Fills a source, evicts for blocks of the same size and of another one, reads, removes, and takes it over."""
    groups = tuple(GroupSpec(i, GroupKind.FULL, (0,), 16, 1, 1, size) for i, size in enumerate((1024, 4096, 8192)))
    config = SourceConfig(2 * _UNIT_BYTES, 6, eviction, _UNIT_BYTES)
    buffer = np.zeros(SourceArrays.bytes_needed(config.entries_max), dtype=np.uint8)
    core = SourceCore(config, SourceArrays.over(buffer, config.entries_max, fresh=True))
    namespace = core.register_namespace(NamespaceSpec("warm", "", "", "", "", "xxh3_128/1", groups))
    session = core.open_session("warm", 0)
    for group, first, last in ((0, 0, 4), (0, 3, 7), (1, 7, 8), (2, 2, 3), (0, 0, 1)):
        reserved = core.reserve(session, namespace, groups[group], keys[first:last], 1000, 0)
        if not reserved.reservation:
            continue
        rows = np.flatnonzero(reserved.status == 1).astype(np.uint32)
        sections = np.zeros(len(rows), dtype=np.uint32)
        core.commit(session, reserved.reservation, rows, sections, rows.astype(np.uint64), 0)
    core.release(session, [core.lease(session, namespace, keys[:2], 1000, 0).lease], 0)
    core.evict_bytes(1, 0)
    core.demotion_candidates(1, 1)
    core = SourceCore.adopt(config, core.arrays, None, core.catalog())
    core.remove_namespace(namespace, 0)
    core.counts()
