"""Blocks kept as int8: only for readers that allow it, within the bound, and never published as exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvpool.client import PoolClient
from kvpool.core.errors import Unsupported
from kvpool.core.ids import Fidelity, NamespaceId
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from tests.pool.node_process import NodeProcess, namespace_spec, random_blocks

Connect = Callable[..., PoolClient]
LAYERS, TOKENS, HEADS, DIM = 4, 16, 2, 64
SHAPE = (LAYERS, 2, TOKENS, HEADS, DIM)
BLOCK_BYTES = int(np.prod(SHAPE)) * 4


@pytest.fixture(params=["shm", "tcp"])
def client(request: pytest.FixtureRequest, shared_node: NodeProcess, connect: Connect) -> PoolClient:
    return connect(shared_node, channels=(request.param,), client=f"test-{request.param}")


@pytest.fixture
def namespace(client: PoolClient, request: pytest.FixtureRequest) -> NamespaceId:
    group = GroupSpec(0, GroupKind.FULL, tuple(range(LAYERS)), TOKENS, 1, 2, BLOCK_BYTES, HEADS, DIM)
    return client.register(NamespaceSpec(request.node.name, "", "float32", "t", "lkthd", "xxh3_128/1", (group,)))


def normal_blocks(count: int, seed: int, namespace: NamespaceId) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, blocks as bytes, and the same as numbers."""
    rng = np.random.default_rng([seed, *namespace])
    values = rng.standard_normal((count, *SHAPE)).astype(np.float32)
    return rng.integers(0, 256, (count, 16), dtype=np.uint8), values.view(np.uint8).reshape(count, -1), values


def error_of(out: np.ndarray, values: np.ndarray) -> float:
    got = out.view(np.float32).reshape(values.shape)
    return float(np.sqrt(((got - values) ** 2).mean() / (values**2).mean()))


def test_a_quarter_of_the_bytes_within_the_bound(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data, values = normal_blocks(8, 1, namespace)
    put = client.put(namespace, keys, data, fidelity=Fidelity.INT8)
    assert put.stored.all() and put.bytes < 0.3 * data.nbytes
    out = np.zeros_like(data)
    got = client.get(namespace, keys, out, fidelity_min=Fidelity.INT8)
    assert got.found.all() and (got.fidelities == Fidelity.INT8).all() and got.bytes < 0.3 * data.nbytes
    assert 0 < error_of(out, values) < 0.01


def test_exact_readers_never_see_it(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data, _ = normal_blocks(4, 2, namespace)
    client.put(namespace, keys, data, fidelity=Fidelity.INT8)
    out = np.zeros_like(data)
    assert not client.get(namespace, keys, out).found.any() and not out.any()
    assert client.put(namespace, keys, data).stored.all(), "what is exact takes the place of what is not"
    assert client.get(namespace, keys, out).found.all() and np.array_equal(out, data)
    again = client.put(namespace, keys, data, fidelity=Fidelity.INT8)
    assert again.existed.all(), "and stays"
    got = client.get(namespace, keys, out, fidelity_min=Fidelity.INT8)
    assert (got.fidelities == Fidelity.EXACT).all() and np.array_equal(out, data)


def test_a_block_beyond_the_bound_is_kept_as_it_is(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data, values = normal_blocks(6, 3, namespace)
    values[2, 0, 1, :, :, 7] = 100.0  # one element of each token of V drowns the others of its scale
    values[4, 1, 1, 0, 0, 0] = np.nan
    put = client.put(namespace, keys, data, fidelity=Fidelity.INT8)
    assert put.stored.all()
    out = np.zeros_like(data)
    got = client.get(namespace, keys, out, fidelity_min=Fidelity.INT8)
    assert got.found.all()
    assert got.fidelities.tolist() == [2, 2, 1, 2, 1, 2]
    assert np.array_equal(out[[2, 4]], data[[2, 4]])
    assert error_of(out[[0, 1, 3, 5]], values[[0, 1, 3, 5]]) < 0.01
    rows = np.array([5, 0, 1, 2, 3, 4])
    shuffled = np.zeros_like(data)
    client.get(namespace, keys, shuffled, rows=rows, fidelity_min=Fidelity.INT8)
    assert np.array_equal(shuffled[rows], out)


def test_what_can_not_be_encoded(client: PoolClient) -> None:
    spec = namespace_spec("opaque to the codec")
    namespace = client.register(spec)
    keys, data = random_blocks(2, [1])
    with pytest.raises(Unsupported):
        client.put(namespace, keys, data, fidelity=Fidelity.INT8)
    with pytest.raises(Unsupported):
        client.get(namespace, keys, data, fidelity_min=Fidelity.INT8)


def test_an_exact_block_may_be_as_long_as_an_encoded_one(client: PoolClient) -> None:
    group = GroupSpec(0, GroupKind.FULL, (0,), 8, 1, 1, 2 * 8 * 8 * 2, 1, 8)
    spec = NamespaceSpec("as long", "", "float16", "t", "lkthd", "xxh3_128/1", (group,))
    namespace = client.register(spec)
    rng = np.random.default_rng([7, *namespace, ord(client.channel[0])])
    keys, data = rng.integers(0, 256, (3, 16), dtype=np.uint8), rng.integers(0, 200, (3, 256), dtype=np.uint8)
    assert client.put(namespace, keys, data).stored.all()
    out = np.zeros_like(data)
    got = client.get(namespace, keys, out, fidelity_min=Fidelity.INT8)
    assert got.found.all() and (got.fidelities == Fidelity.EXACT).all() and np.array_equal(out, data)
