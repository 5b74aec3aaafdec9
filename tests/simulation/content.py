"""What is stored: names, keys and, for each version of a put, bytes that nothing else has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.core.hashing import object_key
from kvpool.core.ids import KEY_BYTES, Fidelity, KeyArray
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec

Bytes = NDArray[np.uint8]

_TABLE: Bytes = np.random.default_rng(61).integers(0, 256, 2 << 20, dtype=np.uint8)
_ITEMS_MAX = 64
_STEP = 16


def _blocks(model: str, sections: int, block_bytes: int) -> NamespaceSpec:
    group = GroupSpec(0, GroupKind.FULL, tuple(range(sections)), 16, 1, sections, block_bytes)
    return NamespaceSpec(model, "1", "bf16", "torch", "", "xxh3_128/1", (group,))


SMALL, LARGE, OBJECTS = _blocks("small", 2, 1200), _blocks("large", 3, 5100), NamespaceSpec.objects("things")
SPECS = (SMALL, LARGE, OBJECTS)
IDS = tuple(spec.id() for spec in SPECS)


@dataclass(frozen=True, slots=True)
class Item:
    """Something with a key. `number` is unique; `name` is empty for blocks; `spec` indexes SPECS."""

    number: int
    spec: int
    key: bytes
    name: str

    @property
    def is_object(self) -> bool:
        return bool(self.name)

    def size_bytes(self, version: int, fidelity: Fidelity) -> int:
        if self.is_object:
            return 300 + 997 * ((self.number * 7 + version * 3) % 6)
        block_bytes = SPECS[self.spec].groups[0].block_bytes
        return block_bytes if fidelity is Fidelity.EXACT else block_bytes // 2

    def content(self, version: int, fidelity: Fidelity) -> Bytes:
        """The one and only content of a version; blocks have just version 0."""
        assert self.is_object or version == 0
        at = ((version * 2 + int(fidelity) - 1) * _ITEMS_MAX + self.number) * _STEP % (len(_TABLE) - 8192)
        return _TABLE[at : at + self.size_bytes(version, fidelity)]


def _make_items() -> tuple[tuple[Item, ...], ...]:
    rng = np.random.default_rng(62)
    made: list[tuple[Item, ...]] = []
    number = 0
    for index, (spec, count) in enumerate(zip(SPECS, (10, 5, 8), strict=True)):
        names = [f"dir{i % 3}/thing{i}" if spec.is_objects else "" for i in range(count)]
        keys = [object_key(spec.id(), name) if name else rng.bytes(KEY_BYTES) for name in names]
        made.append(tuple(Item(number + i, index, keys[i], names[i]) for i in range(count)))
        number += count
    return tuple(made)


#: By namespace; blocks in the order of a prompt.
ITEMS = _make_items()
ALL_ITEMS = tuple(item for items in ITEMS for item in items)


def key_array(items: list[Item]) -> KeyArray:
    return np.frombuffer(b"".join(item.key for item in items), dtype=np.uint8).reshape(-1, KEY_BYTES)


def group_of(spec: int) -> GroupSpec | None:
    return SPECS[spec].groups[0] if SPECS[spec].groups else None


def sections_of(spec: int) -> int:
    group = group_of(spec)
    return group.section_count if group is not None else 1
