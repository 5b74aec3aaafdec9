"""The asyncio faces of the library: the same verbs as the synchronous ones, and cancellation that leaves nothing."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from kvpool.aio import AsyncClusterClient, AsyncPoolClient
from kvpool.client import ABANDONED, COMMITTED, PoolClient
from kvpool.cluster import ClusterClient
from kvpool.core.errors import KvpoolError, Overloaded
from kvpool.service.host import host_id
from tests.pool.node_process import NodeProcess, held, namespace_spec, random_blocks
from tests.pool.pool_made import running_pool

DEADLINE_S = 100.0


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, DEADLINE_S))


async def eventually(holds: Any) -> bool:
    end_s = time.monotonic() + DEADLINE_S / 2
    while time.monotonic() < end_s:
        if await holds():
            return True
        await asyncio.sleep(0.01)
    return bool(await holds())


def verbs(kind: type) -> dict[str, Any]:
    """Public methods of a class and of its bases."""
    return {
        name: member
        for name, member in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and name != "close"
    }


@pytest.mark.parametrize(("sync", "other"), [(PoolClient, AsyncPoolClient), (ClusterClient, AsyncClusterClient)])
def test_verbs_and_their_signatures_are_the_same(sync: type, other: type) -> None:
    assert set(verbs(other)) == set(verbs(sync))
    for name, verb in verbs(sync).items():
        theirs = verbs(other)[name]
        assert inspect.signature(theirs) == inspect.signature(verb), name
        assert inspect.iscoroutinefunction(theirs) or inspect.isasyncgenfunction(theirs) or name == "list_blocks", name


def test_blocks_and_objects_come_back(shared_node: NodeProcess) -> None:
    async def test() -> None:
        async with AsyncPoolClient(shared_node.address, timeout_s=30.0) as client:
            namespace = await client.register(namespace_spec("aio"))
            keys, data = random_blocks(20, [21, *namespace])
            puts = [client.put(namespace, keys[i : i + 5], data[i : i + 5]) for i in range(0, 20, 5)]
            assert all(result.stored.all() for result in await asyncio.gather(*puts))
            out = np.zeros_like(data)
            assert (await client.get(namespace, keys, out)).found.all() and np.array_equal(out, data)
            assert (await client.lookup(namespace, keys)).all()
            listed = [block.key async for block in client.list_blocks(namespace=namespace, limit=7)]
            assert sorted(listed) == sorted(key.tobytes() for key in keys)
            objects = await client.register_objects("aio")
            await client.put_objects(objects, ["x"], [b"bytes"])
            got = await client.get_objects(objects, ["x", "y"])
            assert got.values[0] is not None and got.values[0].tobytes() == b"bytes" and got.values[1] is None
            with pytest.raises(KvpoolError):
                await client.get(namespace, keys, out[:, :10])
            assert await client.remove_all(namespace) == 20

    run(test())


def test_waiting_is_an_iteration(shared_node: NodeProcess) -> None:
    async def test() -> None:
        async with AsyncPoolClient(shared_node.address, timeout_s=30.0) as client:
            namespace = await client.register(namespace_spec("aio wait"))
            keys, data = random_blocks(4, [22, *namespace])

            async def read() -> dict[int, int]:
                states: dict[int, int] = {}
                async for news in client.wait(namespace, keys, deadline_s=DEADLINE_S):
                    states.update(zip(news.indices.tolist(), news.states.tolist(), strict=True))
                return states

            reader = asyncio.ensure_future(read())

            async def waits() -> bool:
                return (await client.stats()).waiters == 1

            assert await eventually(waits)
            await client.put(namespace, keys, data)
            assert await reader == dict.fromkeys(range(4), COMMITTED)
            absent, _ = random_blocks(1, [23])
            states = [
                n.states.tolist() async for n in client.wait(namespace, absent, deadline_s=9, absent_is_abandoned=True)
            ]
            assert states == [[ABANDONED]]

    run(test())


def test_a_cancelled_wait_ends_at_the_source(shared_node: NodeProcess) -> None:
    async def test() -> None:
        async with AsyncPoolClient(shared_node.address, timeout_s=30.0) as client:
            namespace = await client.register(namespace_spec("aio cancel"))
            keys, _ = random_blocks(2, [24])

            async def read() -> None:
                async for _ in client.wait(namespace, keys, deadline_s=600):
                    pass

            readers = [asyncio.ensure_future(read()) for _ in range(5)]

            async def all_wait() -> bool:
                return (await client.stats()).waiters == 5

            async def none_waits() -> bool:
                return (await client.stats()).waiters == 0

            assert await eventually(all_wait)
            for reader in readers:
                reader.cancel()
            done = await asyncio.gather(*readers, return_exceptions=True)
            assert all(isinstance(error, asyncio.CancelledError) for error in done)
            assert await eventually(none_waits)

    run(test())


def test_what_a_cancelled_call_came_to_hold_is_given_back(shared_node: NodeProcess) -> None:
    """Cancelled at every possible moment: reservations and pins end, also those that the source granted afterwards."""

    async def test() -> None:
        async with AsyncPoolClient(shared_node.address, timeout_s=30.0) as client:
            namespace = await client.register(namespace_spec("aio holds"))
            keys, data = random_blocks(8, [25, *namespace])
            await client.put(namespace, keys[:4], data)
            calls = [
                lambda: client.reserve(namespace, keys[4:], ttl_s=600),
                lambda: client.pin(namespace, keys[:4], ttl_s=600),
                lambda: client.pin(namespace, keys[:4], ttl_s=600, owner="aio"),
                lambda: client.get(namespace, keys, np.zeros_like(data)),
            ]
            for turns in range(12):
                for call in calls:
                    task = asyncio.ensure_future(call())
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    if turns % 3 == 2:
                        await client.info()
                    cancelled = task.cancel()
                    result = (await asyncio.gather(task, return_exceptions=True))[0]
                    if not cancelled and call is calls[0]:
                        await client.abort(result)
                    elif not cancelled and call is not calls[3]:
                        await client.unpin(result[0], owner="aio" if call is calls[2] else "")

            async def nothing_held() -> bool:
                return held(await client.stats()) == {"sessions": 1}

            assert await eventually(nothing_held), held(await client.stats())

    run(test())


def test_a_cancelled_put_does_not_read_its_memory_any_more(shared_node: NodeProcess) -> None:
    """What is stored under a key is what was given, whatever the caller does with its memory after a cancellation."""

    async def test() -> None:
        async with AsyncPoolClient(shared_node.address, timeout_s=30.0) as client:
            namespace = await client.register(namespace_spec("aio memory"))
            for turn in range(20):
                keys, data = random_blocks(16, [26, turn])
                memory = data.copy()
                task = asyncio.ensure_future(client.put(namespace, keys, memory))
                for _ in range(turn):
                    await asyncio.sleep(0.0005)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                memory[:] = 0xAA
                out = np.zeros_like(data)
                got = await client.get(namespace, keys, out)
                assert not got.corrupt.any() and np.array_equal(out[got.found], data[got.found])

    run(test())


def test_calls_beyond_the_threads_wait_and_waits_beyond_their_bound_are_refused(
    shared_node: NodeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr("kvpool.aio.WAITS_MAX", 1)
        async with AsyncPoolClient(shared_node.address, timeout_s=30.0, threads=1) as client:
            namespace = await client.register(namespace_spec("aio bounds"))
            keys, data = random_blocks(3, [27, *namespace])
            results = await asyncio.gather(*(client.lookup(namespace, keys) for _ in range(20)))
            assert not any(result.any() for result in results)

            async def one() -> int:
                return sum([len(news.indices) async for news in client.wait(namespace, keys, deadline_s=DEADLINE_S)])

            # Both look at the bound before either has begun.
            first, second = asyncio.ensure_future(one()), asyncio.ensure_future(one())
            with pytest.raises(Overloaded):
                await second

            async def waits() -> bool:
                return (await client.stats()).waiters == 1

            assert await eventually(waits)
            with pytest.raises(Overloaded):
                await one()
            await client.put(namespace, keys, data)
            assert await first >= 3

    run(test())


def test_the_cluster_for_asyncio(tmp_path: Any) -> None:
    async def test(address: str) -> None:
        async with AsyncClusterClient(address, timeout_s=30.0) as client:

            async def joined() -> bool:
                await client.refresh()
                return len(await client.nodes()) == 1

            assert await eventually(joined)
            namespace = await client.register(namespace_spec())
            keys, data = random_blocks(10, [28])
            assert (await client.put(namespace, keys, data)).copies.tolist() == [1] * 10
            out = np.zeros_like(data)
            assert (await client.get(namespace, keys, out)).found.all() and np.array_equal(out, data)
            assert (await client.stats())["node-0"].blocks == 10
            assert (await client.remove_all(namespace)).copies == 10

    with running_pool(tmp_path, [host_id()]) as pool:
        run(test(pool.address))
