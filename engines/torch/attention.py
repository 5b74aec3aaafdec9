"""Paged attention for Hugging Face model code, registered as "kvpool_paged".

One step is a flat batch: rows of several sequences one after another. `PagedBatch` says where each row's KV is written
and what each row may read; it travels to `paged_attention` as a keyword of `model.forward`. Two ways to compute:

* exact: queries are cut on an absolute grid of 64 positions, each piece is an SDPA call of its own over the keys up to
  the piece's end, and no call has fewer than 16 rows. A row's result then depends on its sequence alone: it is bitwise
  the same in prefill and in decode, alone and in any batch.
* fast: one SDPA call a prompt chunk, and one for all decoding rows of similar length.

Both run on CPU and CUDA through torch's SDPA. On CUDA this was never run: speed and bitwise equality are unverified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kvpool.core.errors import Unsupported

ATTENTION = "kvpool_paged"
#: Rows of a piece of the query grid.
GRID_TOKENS = 64
#: Matrix products give a row the same bits whatever else is in the call only for some row counts: measured with MKL on
#: AVX2, multiples of 4 and everything from 12 on, for linear layers and for SDPA alike.
ROWS_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [first, first + count) of a sequence whose KV lies in `blocks` (those before `first` included)."""

    first: int
    count: int
    blocks: Sequence[int]


_Masks: TypeAlias = dict[tuple[int, int, int | None], torch.Tensor]


def _down(position: int, multiple: int) -> int:
    return position // multiple * multiple


def _up(position: int, multiple: int) -> int:
    return -(-position // multiple) * multiple


def _mask(positions: torch.Tensor, key_count: int, window: int | None) -> torch.Tensor:
    """Additive float32 (rows, keys): 0 where the row at `positions` may look, else -inf."""
    keys = torch.arange(key_count, device=positions.device)
    visible = keys[None, :] <= positions[:, None]
    if window is not None:
        visible &= keys[None, :] > positions[:, None] - window
    return torch.zeros(visible.shape, device=positions.device).masked_fill_(~visible, float("-inf"))


def _keys_values(layer: torch.Tensor, table: torch.Tensor, key_count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathers the blocks of one sequence, or of several as long.

    Args: table: (blocks,) or (batch, blocks).
    Returns: keys and values, (..., kv_heads, key_count, head_dim) each.
    """
    # One index_select each is one copy; indexing both at once and flattening is two.
    return (
        _selected(layer[:, 0], table)[..., :key_count, :, :].transpose(-3, -2),
        _selected(layer[:, 1], table)[..., :key_count, :, :].transpose(-3, -2),
    )


def _selected(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    taken = pages.index_select(0, table.reshape(-1))
    return taken.reshape(*table.shape[:-1], -1, *pages.shape[2:])


class _ExactChunk:
    """One sequence of an exact step."""

    def __init__(self, chunk: Chunk, row: int, table: torch.Tensor, masks: _Masks) -> None:
        self._chunk, self._row, self._table, self._masks = chunk, row, table, masks

    def attend(
        self, layer: torch.Tensor, query: torch.Tensor, out: torch.Tensor, scale: float | None, window: int | None
    ) -> None:
        first, end = self._chunk.first, self._chunk.first + self._chunk.count
        keys, values = _keys_values(layer, self._table, _up(end, GRID_TOKENS))
        for piece in range(_down(first, GRID_TOKENS), end, GRID_TOKENS):
            start, stop = max(first, piece), min(end, piece + GRID_TOKENS)
            rows = slice(self._row + start - first, self._row + stop - first)
            # Rows that are not computed now still take part where a call would have too few without them.
            low, high = _down(start, ROWS_MULTIPLE), _up(stop, ROWS_MULTIPLE)
            places = slice(start - low, stop - low)
            padded = query.new_zeros(1, query.shape[0], high - low, query.shape[2])
            padded[0, :, places] = query[:, rows]
            visible = piece + GRID_TOKENS
            attended = scaled_dot_product_attention(
                padded,
                keys[None, :, :visible],
                values[None, :, :visible],
                attn_mask=self._mask_of(low, high, visible, window, query),
                scale=scale,
                enable_gqa=True,
            )
            out[rows] = attended[0, :, places].transpose(0, 1)

    def _mask_of(self, low: int, high: int, visible: int, window: int | None, query: torch.Tensor) -> torch.Tensor:
        mask = self._masks.get((low, high, window))
        if mask is None:
            mask = _mask(torch.arange(low, high, device=query.device), visible, window).to(query.dtype)
            self._masks[low, high, window] = mask
        return mask


class _FastChunk:
    """One prompt chunk of a fast step."""

    def __init__(self, chunk: Chunk, row: int, table: torch.Tensor) -> None:
        self._chunk, self._row, self._table = chunk, row, table
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(
        self, layer: torch.Tensor, query: torch.Tensor, out: torch.Tensor, scale: float | None, window: int | None
    ) -> None:
        first, count = self._chunk.first, self._chunk.count
        keys, values = _keys_values(layer, self._table, first + count)
        rows = slice(self._row, self._row + count)
        causal = first == 0 and window is None
        mask = None
        if not causal:
            mask = self._masks.get(window)
            if mask is None:
                positions = torch.arange(first, first + count, device=query.device)
                mask = self._masks[window] = _mask(positions, first + count, window).to(query.dtype)
        attended = scaled_dot_product_attention(
            query[None, :, rows],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=True,
        )
        out[rows] = attended[0].transpose(0, 1)


class _FastDecode:
    """Rows of a fast step that decode, of similar length, padded to the longest."""

    def __init__(self, rows: torch.Tensor, tables: torch.Tensor, positions: torch.Tensor, key_count: int) -> None:
        self._rows, self._tables, self._positions, self._key_count = rows, tables, positions, key_count
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(
        self, layer: torch.Tensor, query: torch.Tensor, out: torch.Tensor, scale: float | None, window: int | None
    ) -> None:
        mask = self._masks.get(window)
        if mask is None:
            mask = self._masks[window] = _mask(self._positions, self._key_count, window).to(query.dtype)
        keys, values = _keys_values(layer, self._tables, self._key_count)
        batch, kv_heads, head_dim = keys.shape[0], keys.shape[1], keys.shape[3]
        # Query heads that share a KV head become rows of one call: cheaper than enable_gqa for single rows.
        grouped = query[:, self._rows].transpose(0, 1).reshape(batch, kv_heads, -1, head_dim)
        attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask[:, None, None], scale=scale)
        out[self._rows] = attended.reshape(batch, -1, head_dim)


class PagedBatch:
    """One step's layout: where KV is written, who reads what.

    Args:
        cache: (blocks + 1, layers, 2, block_tokens, kv_heads, head_dim); the last block is scratch.
        chunks: in row order; exact steps append rows that are written to the scratch block and attend to nothing.
        exact: see the module.
    """

    def __init__(self, cache: torch.Tensor, chunks: Sequence[Chunk], *, exact: bool) -> None:
        self.cache = cache
        self.row_count = sum(chunk.count for chunk in chunks)
        self.padding = -self.row_count % ROWS_MULTIPLE if exact else 0
        self._block_tokens, self._scratch, self._device = cache.shape[3], cache.shape[0] - 1, cache.device
        slots: list[int] = []
        positions: list[int] = []
        for chunk in chunks:
            span = range(chunk.first, chunk.first + chunk.count)
            positions.extend(span)
            slots.extend(
                chunk.blocks[p // self._block_tokens] * self._block_tokens + p % self._block_tokens for p in span
            )
        slots.extend([self._scratch * self._block_tokens] * self.padding)
        positions.extend([0] * self.padding)
        slot = torch.tensor(slots, device=self._device)
        self.slot_blocks, self.slot_offsets = slot // self._block_tokens, slot % self._block_tokens
        self.positions = torch.tensor(positions, device=self._device)
        self.works: list[_ExactChunk | _FastChunk | _FastDecode] = []
        self._plan_exact(chunks) if exact else self._plan_fast(chunks)

    def _table(self, chunk: Chunk, key_count: int) -> torch.Tensor:
        blocks = -(-key_count // self._block_tokens)
        table = list(chunk.blocks[:blocks])
        return torch.tensor(table + [self._scratch] * (blocks - len(table)), device=self._device)

    def _plan_exact(self, chunks: Sequence[Chunk]) -> None:
        row = 0
        masks: _Masks = {}
        for chunk in chunks:
            grid_end = _up(chunk.first + chunk.count, GRID_TOKENS)
            self.works.append(_ExactChunk(chunk, row, self._table(chunk, grid_end), masks))
            row += chunk.count

    def _plan_fast(self, chunks: Sequence[Chunk]) -> None:
        row = 0
        single: dict[int, list[tuple[int, Chunk]]] = {}
        for chunk in chunks:
            if chunk.count == 1:
                # Lengths within a factor of two share a call: at most half of it is padding.
                single.setdefault((chunk.first // self._block_tokens + 1).bit_length(), []).append((row, chunk))
            else:
                self.works.append(_FastChunk(chunk, row, self._table(chunk, chunk.first + chunk.count)))
            row += chunk.count
        for group in single.values():
            key_count = max(chunk.first for _, chunk in group) + 1
            tables = torch.stack([self._padded_table(chunk, key_count) for _, chunk in group])
            rows = torch.tensor([r for r, _ in group], device=self._device)
            positions = torch.tensor([chunk.first for _, chunk in group], device=self._device)
            self.works.append(_FastDecode(rows, tables, positions, key_count))

    def _padded_table(self, chunk: Chunk, key_count: int) -> torch.Tensor:
        own = Chunk(chunk.first, chunk.count, chunk.blocks[: chunk.first // self._block_tokens + 1])
        return self._table(own, key_count)


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    paged: PagedBatch | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Writes a step's keys and values to the cache and attends over it.

    Args:
        query: (1, heads, rows, head_dim), rotated; key, value: (1, kv_heads, rows, head_dim).
        paged: the step; given to `model.forward` by name.
    Returns: (1, rows, heads, head_dim), and no weights.
    """
    if paged is None:
        raise Unsupported("this model was loaded for paged steps; call it through kvpool's engine")
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise Unsupported("attention with soft-capping or sinks is not supported by the torch engine")
    layer = paged.cache[:, module.layer_idx]
    layer[:, 0][paged.slot_blocks, paged.slot_offsets] = key[0].transpose(0, 1)
    layer[:, 1][paged.slot_blocks, paged.slot_offsets] = value[0].transpose(0, 1)
    out = query.new_zeros(query.shape[2], query.shape[1], query.shape[3])
    for work in paged.works:
        work.attend(layer, query[0], out, scaling, sliding_window)
    return out[None], None


AttentionInterface.register(ATTENTION, paged_attention)
