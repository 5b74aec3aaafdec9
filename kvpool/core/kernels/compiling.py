"""Loads every kernel before it is needed, so that no first request waits for the compiler."""

from __future__ import annotations

import numpy as np

from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.directory import Directory, SourceRecord
from kvpool.core.hashing import block_keys
from kvpool.core.ids import SourceId, Tier
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore


def compile_kernels() -> None:
    """Runs the kernels once on tiny inputs, through the classes that use them: compiled, or loaded from the cache."""
    # One input for each length class of the hash: up to 128, up to 240, and more bytes.
    for block_tokens in (16, 32, 64):
        keys = block_keys(bytes(16), np.arange(4 * block_tokens, dtype=np.uint32), block_tokens)

    directory = Directory()
    source = SourceId("warm")
    directory.attach(SourceRecord(source, 1, Tier.DRAM, "", "", "", 0), 0)
    directory.apply_snapshot_part(source, 1, 0, 0, True, keys, 1, 0)
    directory.apply(source, 1, 1, (BlockChange(ChangeKind.STORED, keys.tobytes()),), 0)
    directory.match(keys)
    directory.apply(source, 1, 2, (BlockChange(ChangeKind.REMOVED, keys[:1].tobytes()),), 0)
    directory.detach(source)

    group = GroupSpec(0, GroupKind.FULL, (0,), 16, 1, 1, 4096)
    core = SourceCore(SourceConfig(capacity_bytes=4096 * 2, entries_max=4))
    namespace = core.register_namespace(NamespaceSpec("warm", "", "", "", "", "xxh3_128/1", (group,)))
    session = core.open_session("warm", 0)
    indices, sections = np.arange(1, dtype=np.uint32), np.zeros(1, dtype=np.uint32)
    for key in keys[:3]:  # the third evicts the first
        reserved = core.reserve(session, namespace, group, key.reshape(1, 16), 1000, 0)
        core.commit(session, reserved.reservation, indices, sections, indices.astype(np.uint64), 0)
