"""Made KV, and the plain oracle of the int8 codec: float32 arithmetic in numpy, one step after another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.codecs.int8 import DTYPE_CODES, HEADER, MAGIC, VERSION
from kvpool.codecs.layout import KvLayout
from kvpool.core.namespace import GroupKind, GroupSpec

F32 = NDArray[np.float32]


def group_of(layout: KvLayout, **changes: object) -> GroupSpec:
    fields: dict[str, object] = {
        "id": 0, "kind": GroupKind.FULL, "layers": tuple(range(layout.layers)), "block_tokens": layout.block_tokens,
        "shard_count": 1, "section_count": layout.section_count, "block_bytes": layout.block_bytes,
        "kv_heads": layout.kv_heads, "head_dim": layout.head_dim,
    }  # fmt: skip
    return GroupSpec(**{**fields, **changes})  # type: ignore[arg-type]


def narrow(values: F32, dtype: str) -> NDArray[np.generic]:
    """float32 to an element type, ties to even; bfloat16 as uint16."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(elements: NDArray[np.generic], dtype: str) -> F32:
    if dtype != "bfloat16":
        return elements.astype(np.float32)
    return (elements.astype(np.uint32) << 16).view(np.float32)


def to_blocks(values: F32, layout: KvLayout) -> NDArray[np.uint8]:
    """values: float32 (n, layers, 2, tokens, kv_heads, head_dim) -> uint8 (n, block_bytes)"""
    elements = np.ascontiguousarray(narrow(values, layout.dtype))
    return elements.view(np.uint8).reshape(len(values), layout.block_bytes)


def from_blocks(blocks: NDArray[np.uint8], layout: KvLayout) -> F32:
    stored = np.uint16 if layout.dtype == "bfloat16" else np.dtype(layout.dtype)
    shape = (len(blocks), layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
    return widen(np.ascontiguousarray(blocks).view(stored), layout.dtype).reshape(shape)


def normal_blocks(layout: KvLayout, count: int, seed: int) -> NDArray[np.uint8]:
    shape = (count, layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
    return to_blocks(np.random.default_rng(seed).normal(size=shape).astype(np.float32), layout)


def scale_bits(peak: F32) -> NDArray[np.uint32]:
    """bfloat16 above peak / 127 as float32 bits, never subnormal; 0 for 0."""
    bits = (peak / np.float32(127)).astype(np.float32).view(np.uint32).astype(np.uint64)
    up = ((bits + 0xFFFF) & 0xFFFF0000).astype(np.uint32)
    return np.where(peak == 0, np.uint32(0), np.maximum(up, np.uint32(0x00800000))).astype(np.uint32)


def tile_oracle(
    tile: F32, axis: tuple[int, ...], dtype: str
) -> tuple[NDArray[np.uint16], NDArray[np.int8], F32, float]:
    """Scales, values, decoded numbers and error of one tile (tokens, kv_heads, head_dim); `axis` shares a scale."""
    bits = scale_bits(np.abs(tile).max(axis=axis, keepdims=True))
    scales = bits.view(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        inverses = np.where(scales > 0, np.float32(1) / scales, np.float32(0)).astype(np.float32)
    steps = np.rint(tile * inverses) + np.float32(0)  # an int8 has no negative zero
    with np.errstate(over="ignore"):
        decoded = widen(narrow((steps * scales).astype(np.float32), dtype), dtype)
    wide, power = tile.astype(np.float64), np.sqrt(np.square(tile.astype(np.float64)).sum())
    with np.errstate(invalid="ignore"):
        error = np.sqrt(np.square(wide - decoded).sum()) / power if power else 0.0
    return (bits >> 16).astype(np.uint16).ravel(), steps.astype(np.int8).ravel(), decoded, float(error)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 64)


def encode_oracle(block: NDArray[np.uint8], layout: KvLayout) -> tuple[list[bytes], NDArray[np.uint8], list[float]]:
    """Stored sections without headers' errors, the decoded block, and the error of each section."""
    values = from_blocks(block[None], layout)[0]
    decoded, sections, errors = np.empty_like(values), [], []
    for first in range(0, layout.layers, layout.section_layers):
        tiles = []
        for layer in range(first, first + layout.section_layers):
            for kind, axis in ((0, (0,)), (1, (2,))):
                tiles.append(tile_oracle(values[layer, kind], axis, layout.dtype))
                decoded[layer, kind] = tiles[-1][2]
        header = np.zeros((), dtype=HEADER)
        header["magic"], header["version"], header["dtype"] = MAGIC, VERSION, DTYPE_CODES[layout.dtype]
        header["layers"], header["block_tokens"] = layout.section_layers, layout.block_tokens
        header["kv_heads"], header["head_dim"] = layout.kv_heads, layout.head_dim
        scales = b"".join(t[0].tobytes() for t in tiles[::2]) + b"".join(t[0].tobytes() for t in tiles[1::2])
        sections.append(padded(header.tobytes() + scales) + padded(b"".join(t[1].tobytes() for t in tiles)))
        errors.append(max(t[3] for t in tiles))
    return sections, to_blocks(decoded[None], layout)[0], errors


def without_errors(section: bytes) -> bytes:
    """A stored section with the two floats of its header zeroed."""
    return section[:24] + bytes(8) + section[32:]
