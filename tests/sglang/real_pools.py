"""SGLang's own host pools and storage configuration, with memory of the CPU. Only calls need SGLang."""

from __future__ import annotations

from typing import Any

import torch

LAYERS, TOKENS, HEADS, HEAD_DIM, PAGES = 3, 4, 2, 8, 8
#: SGLang leaves 10 GB of a host to others before it makes a pool, unless it is told what it may have.
BUDGET_BYTES = 1 << 30
MHA_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
MLA_LAYOUTS = ("layer_first", "page_first", "page_first_direct")
EXTRA = {
    "backend_name": "kvpool",
    "module_path": "engines.sglang.backend",
    "class_name": "KVPoolHiCacheStorage",
    "model_id": "made-up/1",
    # A crowded machine may take long.
    "lookup_timeout_ms": 60_000,
    "load_timeout_s": 60.0,
    "store_timeout_s": 60.0,
}


def pointers(tensors: tuple[Any, ...]) -> Any:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def mha_pool(layout: str, *, layers: int = LAYERS, heads: int = HEADS, dtype: Any = None, tokens: int = TOKENS) -> Any:
    """SGLang's own host pool of K and V."""
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    dtype = dtype or torch.bfloat16
    k, v = (tuple(torch.zeros(2 * tokens, heads, HEAD_DIM, dtype=dtype) for _ in range(layers)) for _ in range(2))
    info = MHABufferInfo(
        buffers=KVBuffers(k=k, v=v, k_data_ptrs=pointers(k), v_data_ptrs=pointers(v), layout=KVBufferLayout.NHD),
        page_size=tokens, head_num=heads, head_dim=HEAD_DIM, v_head_dim=HEAD_DIM, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip
    with host_memory_budget_scope(BUDGET_BYTES):
        return MHATokenToKVPoolHost(
            info, 1.0, 0, tokens, layout, pin_memory=False, device_capacity_tokens=2 * tokens, start_layer=0,
            end_layer=layers, host_token_capacity=PAGES * tokens,
        )  # fmt: skip


def mla_pool(layout: str) -> Any:
    """SGLang's own host pool of compressed KV."""
    from sglang.srt.mem_cache.device_pool_info import MLABufferInfo
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    width = 24
    buffers = tuple(torch.zeros(2 * TOKENS, 1, width, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=buffers, data_ptrs=pointers(buffers), layer_indices=tuple(range(LAYERS)), device_layer_num=LAYERS,
        page_size=TOKENS, kv_lora_rank=16, qk_rope_head_dim=8, kv_cache_dim=width, dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )  # fmt: skip
    with host_memory_budget_scope(BUDGET_BYTES):
        return MLATokenToKVPoolHost(
            info, 1.0, 0, TOKENS, layout, pin_memory=False, device_capacity_tokens=2 * TOKENS, start_layer=0,
            end_layer=LAYERS, target_layer_num=LAYERS, host_token_capacity=PAGES * TOKENS,
        )  # fmt: skip


ALL_POOLS = [("mha", layout) for layout in MHA_LAYOUTS] + [("mla", layout) for layout in MLA_LAYOUTS]


def pool_of(kind: str, layout: str) -> Any:
    return mha_pool(layout) if kind == "mha" else mla_pool(layout)


def fill(pool: Any, seed: int) -> None:
    flat = pool.kv_buffer.view(torch.uint8)
    flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))


def flats(pool: Any, pages: range) -> list[bytes]:
    """Pages by SGLang's own reading of its pool."""
    return [
        pool.get_data_page(page * pool.page_size, flat=True).contiguous().view(torch.uint8).numpy().tobytes()
        for page in pages
    ]


def places(pool: Any, *pages: int) -> Any:
    return torch.cat([torch.arange(page * pool.page_size, (page + 1) * pool.page_size) for page in pages])


def config(node: str, *, mla: bool = False, **others: Any) -> Any:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    extra = {**EXTRA, "node": node, **others.pop("extra", {})}
    return HiCacheStorageConfig(
        **{
            "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
            "is_mla_model": mla, "enable_storage_metrics": True, "is_page_first_layout": False, "model_name": "made",
            "extra_config": extra, **others,
        }
    )  # fmt: skip
