"""SGLang's own mooncake backend of HiCache, as it is in the wheel, on kvpool's `mooncake.store`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from engines.mooncake.shadowing import SHIM
from tests.pool.node_process import NodeProcess
from tests.sglang import real_sglang

torch = pytest.importorskip("torch")
if missing := real_sglang.why_not():
    pytest.skip(missing, allow_module_level=True)

PAGES, TOKENS, ELEMENTS = 26, 4, 96


class HostPool:
    """Memory of an engine's KV as SGLang's host pools describe it to the backend: pages of one or two pieces."""

    def __init__(self, pieces: int) -> None:
        self.pieces, self.layout, self.page_size = pieces, "page_first", TOKENS
        self.kv_buffer = torch.zeros((PAGES, pieces, ELEMENTS), dtype=torch.bfloat16)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        pages = [int(index) // TOKENS for index in indices[::TOKENS]]
        pieces = [self.kv_buffer[page, piece] for page in pages for piece in range(self.pieces)]
        return [piece.data_ptr() for piece in pieces], [piece.nbytes for piece in pieces]

    def get_ksize_per_token(self) -> int:
        return self.pieces * ELEMENTS * 2 // TOKENS

    def fill(self, seed: int) -> torch.Tensor:
        self.kv_buffer.copy_(torch.randn(self.kv_buffer.shape, generator=torch.Generator().manual_seed(seed)))
        return self.kv_buffer.clone()

    @staticmethod
    def tokens(pages: range) -> torch.Tensor:
        return torch.arange(pages.start * TOKENS, pages.stop * TOKENS)


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real_sglang.prepare()
    monkeypatch.syspath_prepend(str(SHIM))
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mooncake"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "mooncake"]:
        del sys.modules[name]
    sys.modules.update(before)


def backend(node: NodeProcess, *, mla: bool, rank: int = 0, ranks: int = 1, **extra: object) -> Any:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore

    config = HiCacheStorageConfig(
        tp_rank=rank, tp_size=ranks, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=mla,
        enable_storage_metrics=True, is_page_first_layout=True, model_name="made/model",
        extra_config={"master_server_address": node.address, **extra},
    )  # fmt: skip
    store = MooncakeStore(config)
    assert type(store.store).__module__ == "engines.mooncake.store"
    return store


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_pages_come_back_to_another_engine(sglang: None, node: NodeProcess, mla: bool, groups: bool) -> None:
    writer_pool, reader_pool = HostPool(1 if mla else 2), HostPool(1 if mla else 2)
    keys = [f"{mla} {groups} page {number}" for number in range(10)]
    writer = backend(node, mla=mla, enable_group_semantics=groups)
    writer.register_mem_pool_host(writer_pool)
    written = writer_pool.fill(7)
    assert all(writer.batch_set_v1(keys[:8], HostPool.tokens(range(8))))
    assert writer.batch_exists(keys) == 8
    reader = backend(node, mla=mla)
    reader.register_mem_pool_host(reader_pool)
    # Other places, so that nothing comes back by having stayed; and two pages that are not there.
    got = reader.batch_get_v1(keys, HostPool.tokens(range(12, 22)))
    assert got == [True] * 8 + [False] * 2
    assert torch.equal(reader_pool.kv_buffer[12:20], written[:8])
    # A page that is there is not stored again.
    writer_pool.fill(8)
    assert all(writer.batch_set_v1(keys[:8], HostPool.tokens(range(8))))
    assert all(reader.batch_get_v1(keys[:8], HostPool.tokens(range(8))))
    assert torch.equal(reader_pool.kv_buffer[:8], written[:8])


def test_ranks_keep_their_own_parts(sglang: None, node: NodeProcess) -> None:
    stores, pools, written = [], [], []
    for rank in range(2):
        store, pool = backend(node, mla=False, rank=rank, ranks=2), HostPool(2)
        store.register_mem_pool_host(pool)
        written.append(pool.fill(rank))
        assert all(store.batch_set_v1(["page"], HostPool.tokens(range(1))))
        stores.append(store)
        pools.append(pool)
    for rank in range(2):
        assert all(stores[rank].batch_get_v1(["page"], HostPool.tokens(range(5, 6))))
        assert torch.equal(pools[rank].kv_buffer[5], written[rank][0])


def test_single_calls_and_clear(sglang: None, node: NodeProcess) -> None:
    store, pool = backend(node, mla=True), HostPool(1)
    store.register_mem_pool_host(pool)
    written = pool.fill(3)
    pointers, sizes = pool.get_page_buffer_meta(HostPool.tokens(range(2)))
    assert store.set("one", target_location=pointers[0], target_sizes=sizes[0]) and store.exists("one")
    assert store.get("one", target_location=pointers[1], target_sizes=sizes[1])
    assert torch.equal(pool.kv_buffer[1], written[0])
    store.clear()
    assert not store.exists("one")


def test_embeddings(sglang: None, node: NodeProcess) -> None:
    from sglang.srt.mem_cache.storage.mooncake_store.mooncake_embedding_store import MooncakeEmbeddingStore

    class Config:
        extra_config = {"master_server_address": node.address, "tenant_id": "embeddings"}

    store = MooncakeEmbeddingStore(Config())
    source, target = torch.randn(4, 64), torch.zeros(4, 64)
    for tensor in (source, target):
        store.register_buffer(tensor)
    rows = [[source[2 * i].data_ptr(), source[2 * i + 1].data_ptr()] for i in range(2)]
    into = [[target[2 * i].data_ptr(), target[2 * i + 1].data_ptr()] for i in range(2)]
    assert store.batch_put_from_multi_buffers(["a", "b"], rows, [[256, 256]] * 2) == [True, True]
    assert store.batch_is_exist(["a", "c"]) == [True, False]
    assert store.batch_get_into_multi_buffers(["a", "b"], into, [[256, 256]] * 2) == [True, True]
    assert torch.equal(source, target)
    assert store.batch_get(["a", "c"], [target.data_ptr()] * 2, [512, 512]) == [True, False]
