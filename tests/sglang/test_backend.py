"""The backend against SGLang's own interface, factory, host pools and cache controller, on CPU memory."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here")

from tests.pool.node_process import NodeProcess, eventually  # noqa: E402
from tests.sglang.made_pools import hashes  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("sglang")]

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
    "lookup_timeout_ms": 20_000,
    "load_timeout_s": 20.0,
    "store_timeout_s": 20.0,
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


@pytest.fixture
def backend_on() -> Iterator[Callable[..., Any]]:
    """Backends as SGLang's factory makes them, with a host pool."""
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    backends: list[Any] = []

    def make(node: str, pool: Any, **others: Any) -> Any:
        backend = StorageBackendFactory.create_backend("dynamic", config(node, **others), pool)
        backends.append(backend)
        backend.register_mem_pool_host(pool)
        backend.on_host_pools_registered()
        return backend

    yield make
    for backend in backends:
        backend.close()


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize(("kind", "layout"), ALL_POOLS)
def test_pages_come_back_bit_for_bit(node: NodeProcess, backend_on: Callable[..., Any], kind: str, layout: str) -> None:
    one, other = pool_of(kind, layout), pool_of(kind, layout)
    writer, reader = (backend_on(node.address, pool, mla=kind == "mla") for pool in (one, other))
    fill(one, 1)
    keys = hashes(4, (kind, layout))
    assert reader.batch_exists(keys) == 0 and not reader.exists(keys[0])
    assert writer.batch_set_v1(keys, places(one, 0, 3, 1, 7)) == [True] * 4
    assert reader.batch_exists(keys) == 4 and reader.exists(keys[3])
    assert reader.batch_exists([*keys[:2], *hashes(1, "gap"), keys[3]]) == 2
    assert reader.batch_get_v1(keys, places(other, 7, 5, 6, 0)) == [True] * 4
    written, read = flats(one, range(PAGES)), flats(other, range(PAGES))
    assert [read[7], read[5], read[6], read[0]] == [written[0], written[3], written[1], written[7]]
    assert not any(any(read[page]) for page in (1, 2, 3, 4))  # other pages are untouched


@pytest.mark.parametrize(("kind", "layout"), ALL_POOLS)
def test_both_of_sglangs_interfaces_share_pages(
    node: NodeProcess, backend_on: Callable[..., Any], kind: str, layout: str
) -> None:
    pool = pool_of(kind, layout)
    backend = backend_on(node.address, pool, mla=kind == "mla")
    fill(pool, 2)
    in_place, flat = hashes(2, ("in place", kind, layout)), hashes(2, ("flat", kind, layout))
    assert backend.batch_set_v1(in_place, places(pool, 0, 1)) == [True] * 2
    got = backend.batch_get(in_place, [pool.get_dummy_flat_data_page() for _ in in_place])
    assert [page.view(torch.uint8).numpy().tobytes() for page in got] == flats(pool, range(2))
    assert backend.batch_set(flat, got) and backend.set(flat[0], got[0])
    assert backend.batch_get_v1(flat, places(pool, 4, 5)) == [True] * 2
    assert flats(pool, range(4, 6)) == flats(pool, range(2))
    single = backend.get(flat[1])
    assert single is not None and single.view(torch.uint8).numpy().tobytes() == flats(pool, range(1, 2))[0]
    assert backend.get(hashes(1, "absent")[0], pool.get_dummy_flat_data_page()) is None


def test_another_tp_degree_reads_the_heads_it_needs(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    """Two ranks of two heads each write what one rank of four heads reads, and the other way round."""
    halves = [mha_pool("page_head", heads=2) for _ in range(2)]
    whole = mha_pool("page_head", heads=4)
    of_two = [
        backend_on(node.address, pool, tp_rank=rank, tp_size=2, tp_lcm_size=2) for rank, pool in enumerate(halves)
    ]
    of_one = backend_on(node.address, whole, tp_size=1, tp_lcm_size=2, should_split_heads=True)
    for seed, pool in enumerate(halves):
        fill(pool, seed)
    keys = hashes(2, "halves")
    assert of_two[0].batch_set_v1(keys, places(halves[0], 0, 1)) == [True] * 2
    assert of_one.batch_exists(keys) == 0  # a half is not a page
    assert of_two[1].batch_set_v1(keys, places(halves[1], 0, 1)) == [True] * 2
    assert of_one.batch_get_v1(keys, places(whole, 2, 3)) == [True] * 2
    joined = torch.cat([pool.kv_buffer[:, 0:2] for pool in halves], dim=2)
    assert torch.equal(whole.kv_buffer[:, 2:4].view(torch.uint8), joined.view(torch.uint8))
    fill(whole, 9)
    back = hashes(1, "whole")
    assert of_one.batch_set_v1(back, places(whole, 5)) == [True]
    for rank, (backend, pool) in enumerate(zip(of_two, halves, strict=True)):
        assert backend.batch_get_v1(back, places(pool, 6)) == [True]
        mine = whole.kv_buffer[:, 5, 2 * rank : 2 * rank + 2]
        assert torch.equal(pool.kv_buffer[:, 6].view(torch.uint8), mine.view(torch.uint8))


# ---------------------------------------------------------------- who shares


def test_only_equal_engines_share(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    """Every pair of engines that differ in one thing: the one finds nothing of the other's."""
    made = {
        "plain": (mha_pool("page_first"), {}),
        "layout": (mha_pool("page_first_direct"), {}),
        "layer first": (mha_pool("layer_first"), {}),
        "dtype": (mha_pool("page_first", dtype=torch.float16), {}),
        "page size": (mha_pool("page_first", tokens=2 * TOKENS), {}),
        "layers": (mha_pool("page_first", layers=LAYERS + 1), {}),
        "heads": (mha_pool("page_first", heads=2 * HEADS), {}),
        "model": (mha_pool("page_first"), {"extra": {"model_id": "made-up/2"}}),
        "tag": (mha_pool("page_first"), {"extra": {"extra_backend_tag": "staging"}}),
        "tp degree": (mha_pool("page_first"), {"tp_size": 2}),
        "tp rank": (mha_pool("page_first"), {"tp_size": 2, "tp_rank": 1}),
        "pp stage": (mha_pool("page_first"), {"pp_size": 2, "pp_rank": 1}),
        "mla": (mla_pool("page_first"), {"mla": True}),
    }
    backends = {name: backend_on(node.address, pool, **others) for name, (pool, others) in made.items()}
    keys = hashes(2, "shared")
    for seed, (name, (pool, _)) in enumerate(made.items()):
        fill(pool, seed)
        assert backends[name].batch_exists(keys) == 0, f"{name} finds what others stored"
        assert backends[name].batch_set_v1(keys, places(pool, 0, 1)) == [True] * 2
    for name, (pool, _) in made.items():
        wanted = flats(pool, range(2))
        assert backends[name].batch_get_v1(keys, places(pool, 4, 5)) == [True] * 2
        assert flats(pool, range(4, 6)) == wanted, name


def test_ranks_of_mla_share_one_copy(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    pools = [mla_pool("page_first") for _ in range(2)]
    first, second = (
        backend_on(node.address, pool, mla=True, tp_rank=rank, tp_size=2) for rank, pool in enumerate(pools)
    )
    fill(pools[0], 1)
    keys = hashes(2, "mla")
    assert first.batch_set_v1(keys, places(pools[0], 0, 1)) == [True] * 2
    assert second.batch_get_v1(keys, places(pools[1], 0, 1)) == [True] * 2
    assert flats(pools[1], range(2)) == flats(pools[0], range(2))


def test_weights_that_nothing_identifies_are_refused(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    """The name that a model is served under is no identity."""
    from kvpool.core.errors import Unsupported

    with pytest.raises(Unsupported, match="which weights") as caught:
        backend_on(node.address, mha_pool("page_first"), extra={"model_id": ""})
    assert "model_id" in caught.value.hint


def test_wrong_settings_are_refused_by_name(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    from kvpool.core.errors import BadArgument

    with pytest.raises(BadArgument, match="nodes"):
        backend_on(node.address, mha_pool("page_first"), extra={"nodes": "a:1"})


# ---------------------------------------------------------------- trouble


def test_calls_that_fit_nothing_are_misses(
    node: NodeProcess, backend_on: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    pool = mha_pool("page_first")
    backend = backend_on(node.address, pool)
    keys = hashes(2, "wrong")
    before = pool.kv_buffer.clone()
    wrong = [
        places(pool, 0),  # too few
        places(pool, 0, 1) + 1,  # not at a page's beginning
        places(pool, 0, 1).flip(0),
        places(pool, 0, PAGES),  # beyond the pool
        torch.empty(0, dtype=torch.int64),
    ]
    for indices in wrong:
        assert backend.batch_set_v1(keys, indices) == [False, False]
        assert backend.batch_get_v1(keys, indices) == [False, False]
    assert backend.batch_exists(keys) == 0
    assert backend.set(keys[0], torch.zeros(3)) is False and backend.set(keys[0]) is False
    assert backend.get(keys[0], torch.zeros(3)) is None
    assert backend.batch_set(keys, [torch.zeros(3)]) is False
    assert torch.equal(pool.kv_buffer.view(torch.uint8), before.view(torch.uint8))
    assert any("taken for a miss" in record.message for record in caplog.records)


def test_a_node_that_is_not_there(
    start_node: Callable[..., NodeProcess], backend_on: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    node = start_node()
    node.kill()
    pool = mha_pool("page_first")
    with caplog.at_level(logging.WARNING):
        backend = backend_on(node.address, pool)
    assert any(node.address in record.message and "can't be used" in record.message for record in caplog.records)
    keys = hashes(2, "nobody")
    assert backend.batch_exists(keys) == 0 and backend.batch_set_v1(keys, places(pool, 0, 1)) == [False] * 2
    start_node(listen=node.address)
    assert eventually(lambda: backend.batch_set_v1(keys, places(pool, 0, 1)) == [True] * 2)
    assert backend.batch_get_v1(keys, places(pool, 2, 3)) == [True] * 2


def test_clear_removes_this_models_pages_only(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    pools = [mha_pool("page_first") for _ in range(2)]
    one, other = (backend_on(node.address, p, extra={"model_id": str(i)}) for i, p in enumerate(pools))
    keys = hashes(2, "clear")
    for backend, pool in ((one, pools[0]), (other, pools[1])):
        assert backend.batch_set_v1(keys, places(pool, 0, 1)) == [True] * 2
    assert one.clear()
    assert one.batch_exists(keys) == 0 and other.batch_exists(keys) == 2


def test_stats_are_sglangs_own(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    pool = mha_pool("page_first")
    backend = backend_on(node.address, pool)
    keys = hashes(3, "stats")
    backend.batch_set_v1(keys, places(pool, 0, 1, 2))
    backend.batch_get_v1(keys, places(pool, 0, 1, 2))
    stats = backend.get_stats()
    assert stats.prefetch_pgs == [3] and stats.backup_pgs == [3]
    assert stats.prefetch_bandwidth[0] > 0 and stats.backup_bandwidth[0] > 0
    assert backend.get_stats().prefetch_pgs == []


# ---------------------------------------------------------------- several pools (v2)


def test_pools_beside_the_kv(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    kv, beside = mha_pool("page_first"), mha_pool("page_first", heads=1)
    backend = backend_on(node.address, kv)
    backend.register_mem_host_pool_v2(kv, PoolName.KV)
    backend.register_mem_host_pool_v2(beside, PoolName.SWA)
    fill(kv, 1)
    fill(beside, 2)
    keys = hashes(6, "beside")
    assert backend.batch_set_v1(keys, places(kv, *range(6))) == [True] * 6
    some = [0, 2, 3, 4]
    stored = PoolTransfer(PoolName.SWA, host_indices=places(beside, *some), keys=[keys[i] for i in some])
    assert backend.batch_set_v2([stored]) == {PoolName.SWA: [True] * 4}

    def ask(policy: Any, window: int = 1) -> Any:
        wanted = PoolTransfer(PoolName.SWA, keys=keys[:window], hit_policy=policy)
        return backend.batch_exists_v2(keys, [wanted])

    plain = ask(PoolHitPolicy.ALL_PAGES)
    assert (plain.kv_hit_pages, plain.restorable_prefix_pages) == (1, [1])
    assert plain.extra_pool_hit_pages == {PoolName.KV: 6, PoolName.SWA: 1}
    windowed = ask(PoolHitPolicy.TRAILING_PAGES, 2)
    assert (windowed.kv_hit_pages, windowed.restorable_prefix_pages) == (5, [1, 4, 5])
    assert ask(PoolHitPolicy.TRAILING_PAGES).restorable_prefix_pages == [1, 3, 4, 5]
    assert ask(PoolHitPolicy.BLOCK_GROUPS).kv_hit_pages == 6

    wanted = flats(beside, range(2, 5))
    beside.kv_buffer.zero_()
    loads = [PoolTransfer(PoolName.SWA, host_indices=places(beside, 5, 6, 7), keys=keys[2:5])]
    assert backend.batch_get_v2(loads) == {PoolName.SWA: [True] * 3}
    assert flats(beside, range(5, 8)) == wanted
    absent = [PoolTransfer(PoolName.SWA, host_indices=places(beside, 0, 1), keys=[keys[1], keys[2]])]
    assert backend.batch_get_v2(absent) == {PoolName.SWA: [False, False]}
    unknown = [PoolTransfer(PoolName.INDEXER, host_indices=places(beside, 0), keys=keys[:1])]
    assert backend.batch_get_v2(unknown) == {PoolName.INDEXER: [False]}


# ---------------------------------------------------------------- SGLang's cache controller


class DevicePool:
    """What the controller asks of the engine's own cache when only storage is used."""

    device, layer_num = "cpu", LAYERS

    def register_layer_transfer_counter(self, counter: object) -> None:
        pass

    def get_kvcache(self) -> DevicePool:
        return self


@pytest.fixture
def controller_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """SGLang's own HiCacheController with its threads; no CUDA events and streams, which only copies to a GPU need."""
    import sglang.srt.managers.cache_controller as controllers
    from sglang.srt.runtime_context import get_parallel

    class NoEvent:
        def query(self) -> bool:
            return True

    monkeypatch.setattr(controllers.device_module, "Event", NoEvent, raising=False)
    monkeypatch.setattr(controllers, "L2TransferEngine", lambda io_backend: None)
    monkeypatch.setattr(controllers.HiCacheController, "_create_sync_groups", lambda self: [])
    made: list[Any] = []

    def make(node: str, pool: Any, **extra: Any) -> Any:
        controller = controllers.HiCacheController(
            DevicePool(), pool, pool.page_size, None, None, io_backend="direct", storage_backend="dynamic",
            prefetch_threshold=0, model_name="served", enable_storage_metrics=True,
            storage_backend_extra_config=json.loads(json.dumps({**EXTRA, "node": node, **extra})),
        )  # fmt: skip
        made.append(controller)
        return controller

    ranks = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_dcp_size": 1, "attn_dcp_rank": 0}
    with get_parallel().override(**ranks):
        yield make
        for controller in made:
            controller.detach_storage_backend()


def drained(queue: Any, done: Callable[[Any], bool]) -> list[Any]:
    """Everything of a queue of the controller's up to what is `done`."""
    seen = []
    while not (seen and done(seen[-1])):
        seen.append(queue.get(timeout=60))
    return seen


@pytest.mark.parametrize("interface_v1", [0, 1])
@pytest.mark.parametrize(("kind", "layout"), [("mha", "page_first"), ("mha", "layer_first"), ("mla", "page_first")])
def test_sglangs_controller_backs_up_and_prefetches(
    node: NodeProcess, controller_on: Callable[..., Any], kind: str, layout: str, interface_v1: int
) -> None:
    """Two engines: one backs pages up, the other finds and prefetches them; then a prompt that is half known."""
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    pools = [pool_of(kind, layout) for _ in range(2)]
    one, other = (controller_on(node.address, pool, interface_v1=interface_v1) for pool in pools)
    fill(pools[0], 1)
    tokens = list(range(1000, 1000 + 4 * TOKENS))
    names = get_storage_hash_str(tokens, None, page_size=TOKENS)
    one.write_storage(places(pools[0], 0, 1, 2, 3), tokens, hash_value=names)
    backed_up = one.ack_backup_queue.get(timeout=60)
    assert backed_up.completed_tokens == len(tokens)

    for prompt, known in ((tokens, 4), ([*tokens[: 2 * TOKENS], *range(5000, 5000 + 2 * TOKENS)], 2)):
        operation = other.prefetch("request", prompt)
        assert other.prefetch_hit_queue.get(timeout=60) is operation
        assert operation.storage_hit_count == known * TOKENS
        operation.host_indices = pools[1].alloc(known * TOKENS)
        other.prefetch_buffer.put(operation)
        acks = drained(other.ack_prefetch_queue, lambda ack: ack.completed_req)
        assert acks[0].completed_tokens == known * TOKENS
        first = int(operation.host_indices[0]) // TOKENS
        assert flats(pools[1], range(first, first + known)) == flats(pools[0], range(known))
        pools[1].free(operation.host_indices)


def test_a_prefetch_while_the_node_dies_ends(
    start_node: Callable[..., NodeProcess], controller_on: Callable[..., Any]
) -> None:
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    node = start_node()
    pool = mha_pool("page_first")
    controller = controller_on(node.address, pool, interface_v1=1, load_timeout_s=1.0, lookup_timeout_ms=500)
    fill(pool, 1)
    tokens = list(range(4 * TOKENS))
    names = get_storage_hash_str(tokens, None, page_size=TOKENS)
    controller.write_storage(places(pool, 0, 1, 2, 3), tokens, hash_value=names)
    controller.ack_backup_queue.get(timeout=60)
    operation = controller.prefetch("request", tokens)
    controller.prefetch_hit_queue.get(timeout=60)
    node.kill()
    operation.host_indices = pool.alloc(4 * TOKENS)
    wanted = flats(pool, range(4))
    controller.prefetch_buffer.put(operation)
    acks = drained(controller.ack_prefetch_queue, lambda ack: ack.completed_req)
    got = acks[0].completed_tokens // TOKENS
    assert flats(pool, range(got)) == wanted[:got]
    # Later requests are told at once that there is nothing.
    assert eventually(lambda: not controller.storage_backend.batch_exists(hashes(1, "x")))
    controller.prefetch("next", list(range(900, 900 + 4 * TOKENS)))
    assert controller.prefetch_hit_queue.get(timeout=60).storage_hit_count == 0


def test_the_interface_has_not_changed() -> None:
    """What this backend overrides is what SGLang calls, by name and parameters."""
    import inspect

    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

    from engines.sglang.backend import KVPoolHiCacheStorage

    ours = {name for name, _ in inspect.getmembers(KVPoolHiCacheStorage, inspect.isfunction) if name[0] != "_"}
    theirs = {name for name, _ in inspect.getmembers(HiCacheStorage, inspect.isfunction) if name[0] != "_"}
    assert theirs <= ours and ours - theirs == {"close"}
    for name in sorted(theirs):
        own, base = (inspect.signature(getattr(cls, name)) for cls in (KVPoolHiCacheStorage, HiCacheStorage))
        pairs = itertools.zip_longest(own.parameters, base.parameters)
        assert all(mine == given for mine, given in pairs), f"{name}{base} is {name}{own} here"
