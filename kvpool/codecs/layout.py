"""What a codec must know of a block to read its elements: how KV is laid out, and where rows lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import BadArgument, Unsupported
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec

#: Rows of bytes: uint8 (rows, bytes) with contiguous rows, or one contiguous uint8 array a row.
Memory: TypeAlias = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]

#: Bytes of an element by the name that a namespace gives its dtype.
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

#: The layout of blocks whose elements can be told apart: [layer][k,v][token][kv_head][head_dim].
KNOWN_LAYOUT = "lkthd"

_KINDS = (GroupKind.FULL, GroupKind.WINDOW)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Elements of one shard of one block: dtype (layers, 2, block_tokens, kv_heads, head_dim)."""

    dtype: str
    layers: int
    block_tokens: int
    kv_heads: int
    head_dim: int
    section_count: int

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            raise Unsupported(
                f"KV of dtype {self.dtype!r} can't be transcoded, only {', '.join(ELEMENT_BYTES)}",
                hint="ask for exact blocks",
            )

    @classmethod
    def of(cls, spec: NamespaceSpec, group: GroupSpec) -> KvLayout:
        """Raises: Unsupported if elements can't be told apart: opaque layouts, objects, MLA, state."""
        if spec.layout != KNOWN_LAYOUT:
            raise Unsupported(
                f"blocks of layout {spec.layout!r} are moved whole: their elements are not known",
                hint=f"ask for exact blocks; only layout {KNOWN_LAYOUT!r} can be transcoded",
            )
        return cls.of_group(group, spec.dtype)

    @classmethod
    def of_group(cls, group: GroupSpec, dtype: str) -> KvLayout:
        """As `of`, for a group of a namespace that is known to be laid out `KNOWN_LAYOUT`. Raises: Unsupported."""
        if group.kind not in _KINDS or not group.kv_heads or not group.head_dim:
            raise Unsupported(
                f"group {group.id} ({group.kind.name.lower()}) is not made of K and V by heads",
                hint="ask for exact blocks",
            )
        layout = cls(dtype, len(group.layers), group.block_tokens, group.kv_heads, group.head_dim, group.section_count)
        if layout.block_bytes != group.block_bytes:
            raise Unsupported(
                f"group {group.id} has blocks of {group.block_bytes} bytes, not the {layout.block_bytes} that its "
                f"layers, heads and dtype {dtype} make",
                hint="check kv_heads (of one shard), head_dim and dtype of the namespace",
            )
        return layout

    @property
    def block_bytes(self) -> int:
        elements = self.layers * 2 * self.block_tokens * self.kv_heads * self.head_dim
        return elements * ELEMENT_BYTES[self.dtype]

    @property
    def section_layers(self) -> int:
        return self.layers // self.section_count

    @property
    def section_bytes(self) -> int:
        return self.block_bytes // self.section_count

    def one_section(self) -> KvLayout:
        """The layout of a section by itself, for blocks that are coded section by section."""
        return replace(self, layers=self.section_layers, section_count=1)


def row_addresses(memory: Memory, rows: NDArray[np.int64], size_bytes: int, what: str) -> NDArray[np.uint64]:
    """Where rows begin; uint64 (rows,). Valid as long as the memory lives.

    Raises: BadArgument if a row does not exist, is shorter than `size_bytes` or is not contiguous bytes.
    """
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(memory)):
        raise BadArgument(f"{what}: rows must be 0 to {len(memory) - 1}")
    if isinstance(memory, np.ndarray):
        if memory.ndim != 2:
            raise BadArgument(f"{what} has {memory.ndim} dimensions, not rows of bytes")
        if len(memory):
            _check_row(memory[0], size_bytes, what)
        first, step = memory.ctypes.data, memory.strides[0]
        return np.array([first + int(row) * step for row in rows], dtype=np.uint64)
    addresses = np.empty(len(rows), dtype=np.uint64)
    for i, row in enumerate(rows.tolist()):
        _check_row(memory[row], size_bytes, what)
        addresses[i] = memory[row].ctypes.data
    return addresses


def _check_row(row: NDArray[np.uint8], size_bytes: int, what: str) -> None:
    if row.dtype != np.uint8 or row.ndim != 1 or (len(row) > 1 and row.strides[0] != 1):
        raise BadArgument(f"{what}: a row is not contiguous bytes (uint8)")
    if len(row) < size_bytes:
        raise BadArgument(f"{what}: a row has {len(row)} bytes, {size_bytes} are needed")


def check_writable(memory: Memory, what: str) -> None:
    """Raises: BadArgument if the memory may only be read."""
    arrays = (memory,) if isinstance(memory, np.ndarray) else memory
    if not all(array.flags.writeable for array in arrays):
        raise BadArgument(f"{what} can't be written to", hint="give memory that is mapped for writing")
