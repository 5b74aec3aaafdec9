"""SGLang's host pools as pages of bytes: what they say about themselves, checked before anything is read or written.

A pool says where the runs of a page lie (`get_page_buffer_meta`); this module asks it about single pages only, so that
no list over all layers of all pages is ever built.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.sglang.pages import Pages, pages_of
from kvpool.core.errors import BadArgument, Unsupported

Int64s = NDArray[np.int64]


def has_bytes(pool: Any) -> bool:
    """False for a pool that only gives out places, whose bytes are in others."""
    return getattr(pool, "kv_buffer", None) is not None or bool(_further(pool))


def buffers(pool: Any) -> list[torch.Tensor]:
    """All memory of a pool. Who keeps these keeps the addresses of its pages valid."""
    own = getattr(pool, "kv_buffer", None)
    if own is None:
        return _further(pool)
    if isinstance(own, torch.Tensor):
        return [own]
    return [buffer for buffer in own if isinstance(buffer, torch.Tensor)] + _further(pool)


def _further(pool: Any) -> list[torch.Tensor]:
    get = getattr(pool, "get_hybrid_pool_buffer", None)
    found: Iterable[Any] = get() if get is not None else ()
    return [buffer for buffer in found if isinstance(buffer, torch.Tensor) and buffer.numel()]


def pool_pages(pool: Any, shard_count: int = 1) -> Pages:
    """The pages of a host pool. Raises: Unsupported if they are not in this host's memory, or can't be told."""
    memory = buffers(pool)
    if not memory or any(buffer.device.type != "cpu" for buffer in memory):
        raise Unsupported(f"the pages of {type(pool).__name__} are not in this host's memory")
    page_tokens = page_size(pool)

    def runs(page: int) -> tuple[Sequence[int], Sequence[int]]:
        indices = torch.arange(page * page_tokens, (page + 1) * page_tokens, dtype=torch.int64)
        try:
            if shard_count > 1:
                told = pool.get_split_heads_page_buffer_meta(indices, shard_count)
            else:
                told = pool.get_page_buffer_meta(indices)
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise Unsupported(f"{type(pool).__name__} does not tell where its pages lie: {error}") from error
        return told[0], told[1]

    one_buffer = len(memory) == 1
    pages = pages_of(runs, int(pool.size) // page_tokens, shard_count, one_buffer=one_buffer)
    _check_inside(pages, memory)
    return pages


def page_size(pool: Any) -> int:
    """Tokens, or states, a page."""
    return max(int(pool.page_size or 1), 1)


def page_numbers(pool: Any, host_indices: torch.Tensor, pages: int) -> Int64s:
    """Pages of the host pool that hold these places: int64 (pages,).

    Raises: BadArgument unless there are `pages` whole pages, each in order.
    """
    size = page_size(pool)
    indices = host_indices.detach().to(device="cpu", dtype=torch.int64).numpy()
    if indices.shape != (pages * size,):
        raise BadArgument(f"{indices.size} places are not {pages} pages of {size}")
    places = indices.reshape(pages, size)
    first = places[:, 0]
    if (first % size).any() or (places != first[:, None] + np.arange(size)).any():
        raise BadArgument("the places of a page do not follow one another")
    return first // size


def flat_page(pages: Pages, tensor: torch.Tensor, *, to_write: bool) -> NDArray[np.uint8]:
    """A flat page of SGLang's as bytes: uint8 (shard_bytes,). Raises: BadArgument if it is none."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size != pages.shard_bytes:
        raise BadArgument(f"{size} bytes on {tensor.device} are no page of {pages.shard_bytes} in host memory")
    if not tensor.is_contiguous():
        if to_write:
            raise BadArgument("a page to read into must be contiguous")
        tensor = tensor.contiguous()
    flat: NDArray[np.uint8] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat


def _check_inside(pages: Pages, memory: Sequence[torch.Tensor]) -> None:
    """Raises: Unsupported if a page, as told, is not inside the pool's memory."""
    ranges = [(buffer.data_ptr(), buffer.data_ptr() + buffer.numel() * buffer.element_size()) for buffer in memory]
    for plane in (plane for shard in pages.shards for plane in shard):
        end = plane.address + (pages.page_count - 1) * plane.stride_bytes + plane.run_bytes
        if not any(low <= plane.address and end <= high for low, high in ranges):
            raise Unsupported("the host pool tells of pages outside its own memory")
