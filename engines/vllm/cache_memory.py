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

from kvpool.core.errors import Unsupported
from kvpool.core.kernels.copying import copy_blocks


@dataclass(frozen=True, slots=True)
class Plane:
    """Runs of one or more layers: block b has `run_bytes` at `address + b * stride_bytes`."""

    address: int
    stride_bytes: int
    run_bytes: int


def planes_of(tensors: Sequence[torch.Tensor], block_count: int) -> tuple[Plane, ...]:
    """Where blocks lie in the layers' tensors, in order; neighbouring runs become one.

    Raises: Unsupported if the bytes of a block are not in one piece in each layer, or not in host memory.
    """
    planes: list[Plane] = []
    for tensor in tensors:
        plane = _plane(tensor, block_count)
        last = planes[-1] if planes else None
        if (
            last is not None
            and last.stride_bytes == plane.stride_bytes
            and last.address + last.run_bytes == plane.address
            and last.run_bytes + plane.run_bytes <= plane.stride_bytes
        ):
            planes[-1] = Plane(last.address, last.stride_bytes, last.run_bytes + plane.run_bytes)
        else:
            planes.append(plane)
    return tuple(planes)


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
        sources, targets, sizes = self._copies(block_ids, rows)
        copy_blocks(sources, targets, sizes)

    def scatter(self, rows: NDArray[np.uint8], block_ids: NDArray[np.int64]) -> None:
        """Copies rows into blocks."""
        targets, sources, sizes = self._copies(block_ids, rows)
        copy_blocks(sources, targets, sizes)

    def _copies(
        self, block_ids: NDArray[np.int64], rows: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
        """Addresses in the cache and in `rows`, and sizes, of all runs."""
        assert rows.flags.c_contiguous and rows.shape[1] == self.block_bytes and len(rows) >= len(block_ids)
        count = len(block_ids)
        cache, buffer, sizes = [], [], []
        offset = rows.ctypes.data
        line = np.arange(count, dtype=np.int64) * self.block_bytes
        for plane in self.planes:
            cache.append(block_ids * plane.stride_bytes + plane.address)
            buffer.append(line + offset)
            sizes.append(np.full(count, plane.run_bytes, dtype=np.uint64))
            offset += plane.run_bytes
        return (
            np.concatenate(cache).astype(np.uint64),
            np.concatenate(buffer).astype(np.uint64),
            np.concatenate(sizes),
        )


def group_memory(tensors: Sequence[torch.Tensor], block_count: int, block_bytes: int) -> GroupMemory:
    """Raises: Unsupported if the tensors are not what the configuration says."""
    planes = planes_of(tensors, block_count)
    total = sum(plane.run_bytes for plane in planes)
    if total != block_bytes:
        raise Unsupported(f"blocks have {total} bytes in the cache, {block_bytes} by the configuration")
    return GroupMemory(planes, block_bytes)
