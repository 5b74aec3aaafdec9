"""An engine's KV cache as runs of bytes: where each block lies, and copying blocks in and out.

A block of a group is a run in each of its layers' tensors, or one run altogether where the engine keeps a block's
layers together; then blocks are moved between pool and cache directly, else by way of a small buffer that stays in the
processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engines.attached import planes
from engines.attached.planes import Plane
from kvpool.core.errors import Unsupported


def planes_of(tensors: Sequence[torch.Tensor], block_count: int) -> tuple[Plane, ...]:
    """Where blocks lie in the layers' tensors, in order; neighbouring runs become one.

    Raises: Unsupported if the bytes of a block are not in one piece in each layer, or not in host memory.
    """
    return planes.merged(_plane(tensor, block_count) for tensor in tensors)


def _plane(tensor: torch.Tensor, block_count: int) -> Plane:
    if tensor.device.type != "cpu":
        raise Unsupported(f"a KV cache on {tensor.device}: only host memory is supported by the kvpool connector yet")
    rows = tensor.shape[0]
    if rows % block_count:
        raise Unsupported(f"a KV cache of shape {tuple(tensor.shape)} for {block_count} blocks")
    # A block of the manager may be several of the attention kernel's, one behind the other.
    inner = tensor[: rows // block_count]
    span = 1 + sum((size - 1) * stride for size, stride in zip(inner.shape, inner.stride(), strict=True))
    if span != inner.numel():
        raise Unsupported("the bytes of a block are not in one piece")
    size = tensor.element_size()
    return Plane(tensor.data_ptr(), tensor.stride(0) * (rows // block_count) * size, inner.numel() * size)


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """One group's blocks. Whoever made the tensors keeps them alive."""

    planes: tuple[Plane, ...]
    block_bytes: int

    def gather(self, block_ids: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        """Copies blocks into rows of uint8 (n, block_bytes)."""
        planes.gather(self.planes, block_ids, rows)

    def scatter(self, rows: NDArray[np.uint8], block_ids: NDArray[np.int64]) -> None:
        """Copies rows into blocks."""
        planes.scatter(self.planes, rows, block_ids)


def group_memory(tensors: Sequence[torch.Tensor], block_count: int, block_bytes: int) -> GroupMemory:
    """Raises: Unsupported if the tensors are not what the configuration says."""
    found = planes_of(tensors, block_count)
    if planes.row_bytes(found) != block_bytes:
        raise Unsupported(
            f"blocks have {planes.row_bytes(found)} bytes in the cache, {block_bytes} by the configuration"
        )
    return GroupMemory(found, block_bytes)
