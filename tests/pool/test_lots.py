"""Blocks that are brought together lot by lot in the same memory: one reservation and one commit for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from kvpool.client import PoolClient
from kvpool.service.client_writes import Lot
from tests.pool.node_process import NodeProcess, held, namespace_spec, random_blocks

Connect = Callable[..., PoolClient]
Rows = NDArray[np.int64]
LOT = 4


@pytest.fixture(params=["shm", "tcp"])
def client(shared_node: NodeProcess, connect: Connect, request: pytest.FixtureRequest) -> PoolClient:
    return connect(shared_node, channels=(request.param,), client=f"lots-{request.param}")


def lots_of(data: NDArray[np.uint8], taken: list[int], end: int = 1 << 30) -> Callable[[Rows], Iterator[Lot]]:
    """`LOT` blocks at a time, all in the same memory, which is spoiled as soon as a lot is through; until `end`."""

    def lots(rows: Rows) -> Iterator[Lot]:
        memory = np.empty((LOT, data.shape[1]), dtype=np.uint8)
        for first in range(0, min(len(rows), end), LOT):
            some = rows[first : first + LOT]
            memory[: len(some)] = data[some]
            taken.extend(some.tolist())
            yield some, memory, None
            memory[:] = 0xAA

    return lots


def test_only_what_is_not_there_is_brought_together(client: PoolClient, request: pytest.FixtureRequest) -> None:
    namespace = client.register(namespace_spec(request.node.name))
    keys, data = random_blocks(11, [1, *namespace])
    assert client.put(namespace, keys[3:5], data[3:5]).stored.all()
    taken: list[int] = []
    put = client.put_lots(namespace, keys, lots_of(data, taken))
    assert taken == [0, 1, 2, *range(5, 11)] and put.stored.sum() == 9 and put.existed.sum() == 2
    out = np.zeros_like(data)
    assert client.get(namespace, keys, out).found.all() and np.array_equal(out, data)
    assert not client.put_lots(namespace, keys, lots_of(data, taken)).stored.any() and len(taken) == 9


def test_what_is_left_out_is_given_back(client: PoolClient, request: pytest.FixtureRequest) -> None:
    namespace = client.register(namespace_spec(request.node.name))
    keys, data = random_blocks(11, [2, *namespace])
    put = client.put_lots(namespace, keys, lots_of(data, [], end=2 * LOT))
    assert put.stored.tolist() == [True] * 8 + [False] * 3 and put.bytes == data[:8].nbytes
    assert client.lookup(namespace, keys).tolist() == [True] * 8 + [False] * 3
    assert client.put_lots(namespace, keys, lots_of(data, [], end=0)).stored.sum() == 0
    assert client.put(namespace, keys[8:], data[8:]).stored.all()  # nobody is still writing them


def test_nothing_is_held_or_readable_where_a_lot_fails(client: PoolClient, request: pytest.FixtureRequest) -> None:
    namespace = client.register(namespace_spec(request.node.name))
    keys, data = random_blocks(11, [3, *namespace])
    before = held(client.stats())

    def breaks(rows: Rows) -> Iterator[Lot]:
        yield next(lots_of(data, [])(rows))
        raise ValueError("made up")

    with pytest.raises(ValueError, match="made up"):
        client.put_lots(namespace, keys, breaks)
    assert not client.lookup(namespace, keys).any() and held(client.stats()) == before
    reservation = client.reserve(namespace, keys)
    assert client.fill(reservation, lots_of(data, [])(np.arange(11))).tolist() == list(range(11))
