"""A source with one client, for tests of what one call does; keys are numbers, sizes are bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvpool.core.hashing import object_key
from kvpool.core.ids import Fidelity, KeyArray
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import Reserved, ReserveStatus, SourceConfig
from kvpool.core.source import SourceCore

PAGE = 4096
SECOND = 1_000_000


def keys_of(*numbers: int) -> KeyArray:
    return np.frombuffer(b"".join(n.to_bytes(16, "big") for n in numbers), dtype=np.uint8).reshape(-1, 16)


class Client:
    """Blocks are of the group of their size in `sizes`."""

    def __init__(
        self, pages: int, entries: int = 64, sizes: Sequence[int] = (PAGE,), eviction: str = "lru", **bounds: Any
    ) -> None:
        self.groups = tuple(GroupSpec(i, GroupKind.FULL, (0,), 16, 1, 1, size) for i, size in enumerate(sizes))
        config: dict[str, Any] = {"unit_bytes": PAGE, "high_watermark": 1.0, "low_watermark": 1.0, **bounds}
        self.config = SourceConfig(pages * PAGE, entries, eviction, **config)
        self.data = np.zeros(pages * PAGE, dtype=np.uint8)
        self.core = SourceCore(self.config, data=self.data)
        self.namespace = self.core.register_namespace(
            NamespaceSpec("m", "", "float32", "t", "lkthd", "sha256/1", self.groups)
        )
        self.objects = self.core.register_namespace(NamespaceSpec.objects("d"))
        self.session = self.core.open_session("client", 0)

    def reserve(self, *numbers: int, size: int | None = None, **options: Any) -> Reserved:
        group = self.groups[0] if size is None else next(g for g in self.groups if g.block_bytes == size)
        namespace = options.pop("namespace", self.namespace)
        return self.core.reserve(self.session, namespace, group, keys_of(*numbers), SECOND, 0, **options)

    def reserve_objects(self, *names: str, sizes: Sequence[int], **options: Any) -> Reserved:
        return self.core.reserve(
            self.session, self.objects, None, self.object_keys(*names), SECOND, 0,
            sizes=np.array(sizes, dtype=np.uint64), names=[name.encode() for name in names], **options,
        )  # fmt: skip

    def object_keys(self, *names: str) -> KeyArray:
        packed = b"".join(object_key(self.objects, name) for name in names)
        return np.frombuffer(packed, dtype=np.uint8).reshape(-1, 16)

    def commit(self, reserved: Reserved) -> Reserved:
        rows = np.flatnonzero(reserved.status == ReserveStatus.RESERVED).astype(np.uint32)
        if len(rows):
            sections = np.zeros(len(rows), dtype=np.uint32)
            self.core.commit(self.session, reserved.reservation, rows, sections, rows.astype(np.uint64), 0)
        self.core.check_invariants()
        return reserved

    def put(self, *numbers: int, **options: Any) -> Reserved:
        return self.commit(self.reserve(*numbers, **options))

    def put_objects(self, *names: str, sizes: Sequence[int], **options: Any) -> Reserved:
        return self.commit(self.reserve_objects(*names, sizes=sizes, **options))

    def lease(self, *numbers: int, **options: Any) -> int:
        return int(self.core.lease(self.session, self.namespace, keys_of(*numbers), SECOND, 0, **options).lease)

    def here(self, *numbers: int) -> list[int]:
        """Those that are readable."""
        found = self.core.lookup(self.namespace, keys_of(*numbers)).tolist()
        return [number for number, there in zip(numbers, found, strict=True) if there]

    def removed(self) -> list[int]:
        """What was removed since the last call, in order."""
        keys = b"".join(change.keys for change in self.core.take_changes() if change.kind == 2)
        return [int.from_bytes(keys[i : i + 16], "big") for i in range(0, len(keys), 16)]

    def publish_lossy(self, *numbers: int) -> Reserved:
        return self.put(*numbers, fidelity=Fidelity.INT8)
