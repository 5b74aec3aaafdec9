"""The backend against SGLang's own interface, factory and host pools, on CPU memory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.pool.node_process import NodeProcess, eventually, free_port
from tests.sglang.made_pools import hashes
from tests.sglang.real_pools import ALL_POOLS, PAGES, fill, flats, mha_pool, places, pool_of

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("sglang")]


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
        torch.cat([places(pool, 0)[:-1], places(pool, 2)[-1:], places(pool, 1)]),  # a page in two pieces
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
    node = start_node(listen=f"127.0.0.1:{free_port()}")
    node.kill()
    pool = mha_pool("page_first")
    with caplog.at_level(logging.WARNING):
        backend = backend_on(node.address, pool, there=False)

    def is_told() -> bool:
        return any(node.address in record.message and "can't be used" in record.message for record in caplog.records)

    assert eventually(is_told)
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
