"""Reads through shared memory alone: they take no call, and they keep what they read from being evicted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvpool.client import PoolClient
from tests.pool.node_process import BLOCK_BYTES, NodeProcess, namespace_spec, random_blocks

Connect = Callable[..., PoolClient]
MEMORY_BYTES = 16 << 20
HOT, ROUND, ROUNDS = 32, 64, 40  # the scan brings five times what fits


@pytest.mark.parametrize("eviction", ["prefix", "lru", "lfu", "s3fifo"])
def test_what_is_read_through_shared_memory_survives_a_scan(
    start_node: Callable[..., NodeProcess], connect: Connect, eviction: str
) -> None:
    node = start_node(memory_bytes=MEMORY_BYTES, eviction=eviction)
    client = connect(node, channels=("shm",))
    namespace = client.register(namespace_spec())
    keys, blocks = random_blocks(HOT, [1])
    idle_keys, idle_blocks = random_blocks(HOT, [2])
    assert client.put(namespace, keys, blocks).stored.all()
    assert client.put(namespace, idle_keys, idle_blocks).stored.all()
    out = np.zeros_like(blocks)
    for number in range(ROUNDS):
        found = client.get(namespace, keys, out).found
        assert found.all(), f"round {number}: {int((~found).sum())} blocks that are read all the time were evicted"
        scan_keys, scan_blocks = random_blocks(ROUND, [3, number])
        assert client.put(namespace, scan_keys, scan_blocks).stored.all()
    # All, but for a look that fell into a change of the index: then the source was asked.
    asked = HOT * ROUNDS - client.counters.hits_shared
    assert client.stats().hits == asked <= HOT
    assert np.array_equal(out, blocks)
    assert client.stats().evictions > 0
    assert not client.lookup(namespace, idle_keys).any(), "what nobody read was kept instead"


def test_hits_and_misses_of_this_host_take_no_call(start_node: Callable[..., NodeProcess], connect: Connect) -> None:
    node = start_node()
    client = connect(node, channels=("shm",))
    namespace = client.register(namespace_spec())
    keys, blocks = random_blocks(8, [4])
    client.put(namespace, keys, blocks)
    missing, _ = random_blocks(4, [5])
    out = np.zeros((12, BLOCK_BYTES), np.uint8)
    got = client.get(namespace, np.concatenate([missing[:2], keys, missing[2:]]), out)
    assert got.found.tolist() == [False] * 2 + [True] * 8 + [False] * 2
    assert np.array_equal(out[2:10], blocks)
    stats = client.stats()
    assert (stats.hits, stats.misses) == (0, 0), "the source was asked"
    assert client.counters.hits_shared == 8


def test_lookup_agrees_with_the_source(start_node: Callable[..., NodeProcess], connect: Connect) -> None:
    node = start_node()
    near, far = connect(node, channels=("shm",)), connect(node, channels=("tcp",))
    for client in (near, far):
        namespace = client.register(namespace_spec())
    keys, blocks = random_blocks(8, [6])
    near.put(namespace, keys[::2], blocks, rows=np.arange(0, 8, 2))
    near.put(namespace, keys[1:2], blocks, rows=np.array([1]), shard=1)
    for shard in (0, 1):
        shown = [client.lookup(namespace, keys, shard=shard).tolist() for client in (near, far)]
        assert shown[0] == shown[1]
    assert near.lookup(namespace, keys).tolist() == [True, False] * 4
    near.remove(namespace, keys[:1])
    assert near.lookup(namespace, keys).tolist() == [False] + [False, True] * 3 + [False]
