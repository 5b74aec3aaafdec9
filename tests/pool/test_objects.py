"""Objects of any size under string names, through the library face, against a real node process."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvpool.client import PoolClient
from kvpool.core.errors import BadArgument, KvpoolError
from kvpool.core.ids import NamespaceId
from tests.pool.node_process import NodeProcess, eventually, held

Connect = Callable[..., PoolClient]
SIZES = (1, 2, 63, 64, 65, 4095, 4096, 4097, 100_000, (1 << 20) + 1, 5 << 20)


@pytest.fixture(params=["shm", "tcp"])
def client(request: pytest.FixtureRequest, shared_node: NodeProcess, connect: Connect) -> PoolClient:
    return connect(shared_node, channels=(request.param,), client=f"test-{request.param}")


@pytest.fixture
def domain(client: PoolClient, request: pytest.FixtureRequest) -> NamespaceId:
    return client.register_objects(request.node.name)


def values_of(sizes: tuple[int, ...], seed: int = 1) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(size) for size in sizes]


def test_any_size_comes_back(client: PoolClient, domain: NamespaceId) -> None:
    names, values = [f"object/{size}" for size in SIZES], values_of(SIZES)
    put = client.put_objects(domain, names, values)
    assert put.stored.all() and put.bytes == sum(SIZES)
    got = client.get_objects(domain, [*names, "missing"])
    assert [None if v is None else v.tobytes() for v in got.values] == [*values, None]
    assert client.lookup_objects(domain, [*names, "missing"]).tolist() == [True] * len(names) + [False]
    sizes = client.object_sizes(domain, [*names, "missing"])
    assert sizes.dtype == np.uint64 and sizes.tolist() == [*SIZES, 0]
    elsewhere = client.register_objects("another domain")
    assert not client.object_sizes(elsewhere, names).any() and not client.lookup_objects(elsewhere, names).any()
    assert client.object_sizes(domain, []).shape == client.lookup_objects(domain, []).shape == (0,)
    assert client.remove_objects(domain, names) == len(names)
    assert client.get_objects(domain, names).values == [None] * len(names)
    client.close()


def test_a_name_never_changes_its_meaning_until_it_is_removed(client: PoolClient, domain: NamespaceId) -> None:
    first, second = values_of((1000, 3000), 2)
    assert client.put_objects(domain, ["a"], [first]).stored.all()
    again = client.put_objects(domain, ["a"], [second])
    assert again.existed.all() and not again.stored.any()
    assert client.get_objects(domain, ["a"]).values[0].tobytes() == first
    client.remove_objects(domain, ["a"])
    assert client.put_objects(domain, ["a"], [second]).stored.all()
    assert client.get_objects(domain, ["a"]).values[0].tobytes() == second


def test_into_the_callers_memory(client: PoolClient, domain: NamespaceId) -> None:
    values = values_of((10, 5000), 3)
    client.put_objects(domain, ["x", "y"], values)
    room = [np.zeros(20, np.uint8), np.zeros(5000, np.uint8)]
    got = client.get_objects(domain, ["x", "y"], room)
    assert [v.tobytes() for v in got.values] == values
    assert np.shares_memory(got.values[0], room[0]) and not room[0][10:].any()
    with pytest.raises(BadArgument, match="only 9"):
        client.get_objects(domain, ["x"], [np.zeros(9, np.uint8)])


def test_on_the_same_host_reading_takes_no_call(shared_node: NodeProcess, connect: Connect) -> None:
    client = connect(shared_node)
    domain = client.register_objects("no call")
    names, values = [f"n/{size}" for size in SIZES], values_of(SIZES, 5)
    client.put_objects(domain, names, values)
    before = client.counters
    got = client.get_objects(domain, [*names, "absent"])
    assert [None if v is None else v.tobytes() for v in got.values] == [*values, None]
    after = client.counters
    assert after.hits_shared - before.hits_shared == after.hits - before.hits == len(names)
    client.remove_all(domain)


def test_removal_by_prefix(client: PoolClient, domain: NamespaceId) -> None:
    names = ["a/1", "a/2", "ab", "b/1"]
    client.put_objects(domain, names, values_of((10, 20, 30, 40), 4))
    assert client.remove_objects(domain, prefix="a/") == 2
    assert client.lookup_objects(domain, names).tolist() == [False, False, True, True]
    assert client.remove_all(domain) == 2


def test_domains_do_not_share_names(client: PoolClient, domain: NamespaceId) -> None:
    other = client.register_objects("another domain")
    client.put_objects(domain, ["n"], [b"one"])
    client.put_objects(other, ["n"], [b"two"])
    assert client.get_objects(domain, ["n"]).values[0].tobytes() == b"one"
    assert client.get_objects(other, ["n"]).values[0].tobytes() == b"two"
    client.remove_all(other)


@pytest.mark.parametrize(
    ("names", "values"),
    [(["a"], []), (["a"], [b""]), ([""], [b"x"]), (["n" * 1025], [b"x"]), (["big"], [np.zeros(1 << 30, np.uint8)])],
)
def test_bad_input(client: PoolClient, domain: NamespaceId, names: list[str], values: list[bytes]) -> None:
    try:
        put = client.put_objects(domain, names, values)
    except KvpoolError as error:
        assert str(error)
    else:
        assert not put.stored.any(), "too large for the segment: not stored, and said so"
    # Of a client of the test before, which did not wait for the answer to its last release.
    assert eventually(lambda: held(client.stats()).keys() <= {"sessions"}), held(client.stats())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"", "'the name' is empty"),
        ("text", "'the name': a bytes-like object"),
        (memoryview(b"abcd")[::2], "'the name': .*contiguous"),
        (np.zeros((4, 4))[:, ::2], "'the name' must be contiguous"),
        (np.zeros(64 << 20, np.uint8), "'the name' has 67108864 bytes, this source keeps 1 to 33554432"),
    ],
)
def test_an_object_that_can_not_be_stored_is_named(
    client: PoolClient, domain: NamespaceId, value: bytes, said: str
) -> None:
    with pytest.raises(BadArgument, match=said) as refused:
        client.put_objects(domain, ["fine", "the name"], [b"1", value])
    assert refused.value.hint
    assert client.lookup_objects(domain, ["fine"]).tolist() == [False]


def test_arrays_of_any_type_are_their_bytes(client: PoolClient, domain: NamespaceId) -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    client.put_objects(domain, ["tensor"], [value])
    got = client.get_objects(domain, ["tensor"]).values[0]
    assert np.array_equal(got.view(np.float32).reshape(3, 4), value)
    with pytest.raises(BadArgument, match="contiguous"):
        client.put_objects(domain, ["strided"], [value[:, ::2]])
