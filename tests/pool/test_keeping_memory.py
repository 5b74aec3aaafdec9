"""Memory that is kept for the next process: not where something of this one may still write into it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool.client import PoolClient
from kvpool.service.node import NodeConfig, NodeServer
from kvpool.service.ssd_tier import SsdTier
from kvpool.tiers.ssd.store import SsdStore
from tests.pool.node_process import eventually, namespace_spec, random_blocks

SPEC = namespace_spec("keeping memory")
COUNT = 8


def copied_down_and_evicted(node: NodeServer, client: PoolClient, in_loop: Callable[..., Any]) -> np.ndarray:
    """Blocks that are on the SSD alone; their keys."""
    namespace = client.register(SPEC)
    keys, data = random_blocks(COUNT, [1])
    assert client.put(namespace, keys, data).stored.all()
    assert eventually(lambda: client.stats().ssd.records == COUNT)

    def alone_there() -> bool:
        # A block that is just being copied is held, and not evicted.
        in_loop(lambda: node.driver.core.evict_keys(namespace, keys, 0))
        return not client.lookup(namespace, keys, ask=False).any()

    assert eventually(alone_there)
    return keys


@pytest.mark.parametrize("hangs", [True, False])
def test_memory_that_a_hung_read_may_write_into_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    """A disk that answers late would write into slots that the successor has given to others."""
    if hangs:
        monkeypatch.setitem(SsdTier.close.__kwdefaults__, "timeout_s", 0.2)
    reading, answer, read = threading.Event(), threading.Event(), SsdStore.read

    def slow_read(store: SsdStore, *args: Any) -> Any:
        reading.set()
        answer.wait()
        return read(store, *args)

    async def story() -> None:
        node = NodeServer(
            NodeConfig(
                source_id="kept", listen="127.0.0.1:0", memory_bytes=8 << 20, segment_dir=str(tmp_path),
                ssd_dir=str(tmp_path), ssd_bytes=64 << 20, ssd_demote_from=0.0, keep_memory=True,
            )
        )  # fmt: skip
        await node.startup()
        loop = asyncio.get_running_loop()

        def in_loop(call: Callable[[], Any]) -> Any:
            async def run() -> Any:
                return call()

            return asyncio.run_coroutine_threadsafe(run(), loop).result(60)

        def use(client: PoolClient) -> None:
            keys = copied_down_and_evicted(node, client, in_loop)
            out = np.zeros((COUNT, SPEC.groups[0].block_bytes), np.uint8)
            if hangs:
                monkeypatch.setattr(SsdStore, "read", slow_read)
            assert client.get(SPEC.id(), keys, out, promote_s=0.1 if hangs else 60.0).found.all() is np.bool_(not hangs)
            assert reading.wait(60.0 if hangs else 0.0) == hangs  # a promotion outlives its reader

        client = PoolClient(node.address, timeout_s=60)
        try:
            await asyncio.to_thread(use, client)
        finally:
            await asyncio.to_thread(client.close)
            await node.shutdown()
        assert node.segment.path.exists() is not hangs

    try:
        asyncio.run(story())
    finally:
        answer.set()
