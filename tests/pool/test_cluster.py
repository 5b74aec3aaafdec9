"""A client of a whole cluster, against real node processes: copies, losses, and what is left of each."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.channels.links import Links
from kvpool.client import PoolClient
from kvpool.cluster import ClusterClient
from kvpool.cluster.members import Claim, GivenUp
from kvpool.cluster.placement import Place, choose, rank
from kvpool.cluster.spreading import Holders, Stored, make_runs
from kvpool.core.errors import BadArgument, Unavailable, UnknownNamespace
from kvpool.core.ids import NamespaceId, Tier
from kvpool.core.namespace import NamespaceSpec
from kvpool.service.rpc import make_channel
from kvpool.v1 import source_admin_pb2, source_admin_pb2_grpc
from tests.pool.conftest import PATIENT
from tests.pool.node_process import eventually, held, namespace_spec, random_blocks
from tests.pool.pool_made import HostedNode, Pool, running_pool

Connect = Callable[..., ClusterClient]
#: Of a call, and of it what nodes have to say what they hold: far more than they need.
TIMEOUT_S, LOOKUP_S = 30.0, 8.0


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Three nodes on two hosts, none of them this one, for tests that leave nothing behind."""
    with running_pool(tmp_path_factory.mktemp("pool"), ["host-a", "host-a", "host-b"]) as pool:
        yield pool
        assert all(node.process.poll() is None for node in pool.nodes.values())


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No node is passed over because this machine was slow for a second or two."""
    monkeypatch.setattr("kvpool.cluster.client.LOOKUP_S_MAX", LOOKUP_S)
    monkeypatch.setattr("kvpool.cluster.members.Links", lambda: Links(PATIENT))


@pytest.fixture
def connect(pool: Pool) -> Iterator[Connect]:
    clients: list[ClusterClient] = []

    def make(**options: object) -> ClusterClient:
        clients.append(ClusterClient(pool.address, **{"timeout_s": TIMEOUT_S, **options}))  # type: ignore[arg-type]
        assert pool.joined(clients[-1], len([n for n in pool.nodes.values() if n.process.poll() is None]))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Connect) -> ClusterClient:
    return connect()


@pytest.fixture
def namespace(client: ClusterClient, request: pytest.FixtureRequest) -> NamespaceId:
    return client.register(namespace_spec(request.node.name))


def holders(pool: Pool, namespace: NamespaceId, keys: np.ndarray, model: str) -> list[set[str]]:
    """Which nodes have each key, as each of them says."""
    found: list[set[str]] = [set() for _ in keys]
    for node in pool.nodes.values():
        if node.process.poll() is None:
            with PoolClient(node.address, timeout_s=TIMEOUT_S) as client:
                client.register(namespace_spec(model))
                for row in np.flatnonzero(client.lookup(namespace, keys)).tolist():
                    found[row].add(node.name)
    return found


def test_blocks_come_back_from_wherever_they_are(pool: Pool, client: ClusterClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(150, [1, *namespace])
    put = client.put(namespace, keys, data)
    assert put.copies.tolist() == [1] * 150 and put.stored.all() and not put.existed.any() and put.bytes == data.nbytes
    assert not put.hosts_shared.any()
    out = np.zeros_like(data)
    got = client.get(namespace, keys, out)
    assert got.found.all() and not got.corrupt.any() and got.bytes == data.nbytes
    assert np.array_equal(out, data)
    where = holders(pool, namespace, keys, "test_blocks_come_back_from_wherever_they_are")
    assert [{source} for source in got.sources] == where
    assert len(set(got.sources)) > 1, "all blocks went to one node"
    assert client.lookup(namespace, keys).all()


def test_copies_are_on_distinct_hosts(pool: Pool, client: ClusterClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(60, [2, *namespace])
    put = client.put(namespace, keys, data, replicas=2)
    assert put.copies.tolist() == [2] * 60 and not put.hosts_shared.any()
    hosts = {"node-0": "host-a", "node-1": "host-a", "node-2": "host-b"}
    for where in holders(pool, namespace, keys, "test_copies_are_on_distinct_hosts"):
        assert {hosts[name] for name in where} == {"host-a", "host-b"}
    three = client.put(namespace, keys, data, replicas=3)
    assert three.copies.tolist() == [3] * 60 and three.existed.all() and three.stored.all()
    assert three.hosts_shared.all(), "three copies on two hosts"
    four = client.put(namespace, keys, data, replicas=4)
    assert four.copies.tolist() == [3] * 60 and not four.stored.any(), "there are but three nodes"


def test_rows_shards_and_misses(client: ClusterClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(6, [3, *namespace])
    rows = np.array([4, 2, 0, 1, 3, 5])
    client.put(namespace, keys[:4], data, rows=rows[:4], shard=1)
    out = np.zeros((12, data.shape[1]), np.uint8)
    got = client.get(namespace, keys, out, rows=rows + 6, shard=1)
    assert got.found.tolist() == [True] * 4 + [False] * 2 and got.sources[4:] == ["", ""]
    assert np.array_equal(out[rows[:4] + 6], data[rows[:4]]) and not out[:6].any()
    assert not client.get(namespace, keys, out).found.any(), "another shard is another block"


def test_objects_of_any_size(client: ClusterClient) -> None:
    namespace = client.register_objects("test cluster")
    rng = np.random.default_rng(4)
    names = [f"dir/{i}" for i in range(40)]
    values = [rng.bytes(int(size)) for size in rng.integers(1, 300_000, 40)]
    put = client.put_objects(namespace, names, values, replicas=2)
    assert put.copies.tolist() == [2] * 40
    got = client.get_objects(namespace, [*names, "missing"])
    assert got.values[-1] is None and got.sources[-1] == ""
    assert [value.tobytes() for value in got.values[:-1] if value is not None] == values
    places = [np.zeros(300_000, np.uint8) for _ in names]
    into = client.get_objects(namespace, names, places)
    assert [place[: len(value)].tobytes() for place, value in zip(places, values, strict=True)] == values
    assert all(v is not None and v.base is not None for v in into.values)
    removed = client.remove_objects(namespace, names[:3])
    assert removed.copies == 6 and removed.unreached == []
    assert client.lookup_objects(namespace, names).tolist() == [False] * 3 + [True] * 37
    assert client.remove_objects(namespace, prefix="dir/").copies == 74
    assert not client.lookup_objects(namespace, names).any()


def test_remove_reaches_every_copy(pool: Pool, client: ClusterClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(5, [5, *namespace])
    client.put(namespace, keys, data, replicas=3)
    assert client.remove(namespace, keys[:2]).copies == 6
    assert client.lookup(namespace, keys).tolist() == [False, False, True, True, True]
    assert client.remove_all(namespace).copies == 9
    assert not any(holders(pool, namespace, keys, "test_remove_reaches_every_copy"))


def test_what_an_engine_keeps_for_itself_is_not_asked_to_remove(
    client: ClusterClient, namespace: NamespaceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse, be left alone for that, and stand among the unreached for ever."""
    engine = client._members.all()[0]
    monkeypatch.setattr(engine, "tier", int(Tier.HBM))
    keys, data = random_blocks(4, [15, *namespace])
    files = client.register_objects("not for engines")
    assert client.put(namespace, keys, data, replicas=2).copies.tolist() == [2] * 4
    assert client.put_objects(files, ["a"], [b"1"], replicas=3).copies.tolist() == [2]
    asked = []
    for call in ("remove", "remove_all", "remove_objects", "lookup"):
        monkeypatch.setattr(engine, call, lambda *_, call=call, **__: asked.append(call))
    removed = [
        client.remove_objects(files, ["a"]), client.remove(namespace, keys[:1]), client.remove_all(namespace),
    ]  # fmt: skip
    assert [(r.copies, r.unreached) for r in removed] == [(2, []), (2, []), (6, [])]
    assert not client.lookup_objects(files, ["a"]).any() and client.get_objects(files, ["a"]).values == [None]
    assert not asked and not engine.resting


def test_a_second_thread_waits_until_the_node_knows_the_namespace(
    client: ClusterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, spec = client._members.all()[0], namespace_spec("known by two threads at once")
    begun, answer, calls = threading.Event(), threading.Event(), []
    register = member.register

    def slow(spec: NamespaceSpec) -> NamespaceId:
        calls.append(spec)
        begun.set()
        assert answer.wait(60)
        return register(spec)

    monkeypatch.setattr(member, "register", slow)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(member.know, spec.id(), spec)
        assert begun.wait(60)
        second = threads.submit(lambda: (member.know(spec.id(), spec), answer.is_set()))
        answer.set()
        first.result(60)
        assert second.result(60)[1] and len(calls) == 1
    keys, _ = random_blocks(1, [16])
    assert member.lookup(spec.id(), keys).tolist() == [False]


def test_a_bad_copy_is_replaced_by_a_good_one(pool: Pool, client: ClusterClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(8, [6, *namespace])
    client.put(namespace, keys, data, replicas=2)
    first = client.get(namespace, keys, np.zeros_like(data)).sources
    for row, source in enumerate(first):
        _spoil(pool.nodes[source], data[row])
    out = np.zeros_like(data)
    got = client.get(namespace, keys, out)
    assert got.found.all() and not got.corrupt.any() and np.array_equal(out, data)
    assert all(a != b for a, b in zip(first, got.sources, strict=True))


def test_all_copies_bad_is_a_miss(pool: Pool, client: ClusterClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(2, [7, *namespace])
    client.put(namespace, keys, data, replicas=2)
    for node in pool.nodes.values():
        _spoil(node, data[0])
    got = client.get(namespace, keys, np.zeros_like(data))
    assert got.found.tolist() == [False, True] and got.corrupt.tolist() == [True, False]


def _spoil(node: HostedNode, block: np.ndarray) -> None:
    """Overwrites a part of a block in a node's memory, if it is there."""
    with node.segment.open("r+b") as file:
        at = file.read().find(block[9000:9064].tobytes())
        if at >= 0:
            file.seek(at)
            file.write(b"\0" * 64)


def test_lost_nodes_cost_misses_or_nothing(tmp_path: Path) -> None:
    """With two copies nothing is missed when one node dies; with one, its blocks are; then all is stored elsewhere."""
    with (
        running_pool(tmp_path, ["host-a", "host-b", "host-c"]) as pool,
        ClusterClient(pool.address, timeout_s=TIMEOUT_S) as client,
    ):
        assert pool.joined(client, 3)
        namespace = client.register(namespace_spec())
        keys, data = random_blocks(96, [8])
        twice, once = slice(0, 48), slice(48, 96)
        client.put(namespace, keys[twice], data[twice], replicas=2)
        client.put(namespace, keys[once], data[once])
        before = client.get(namespace, keys, np.zeros_like(data)).sources
        lost = max(set(before[48:]), key=before[48:].count)
        pool.nodes[lost].kill()
        out = np.zeros_like(data)
        got = client.get(namespace, keys, out)
        expected = [True] * 48 + [source != lost for source in before[48:]]
        assert got.found.tolist() == expected
        assert np.array_equal(out[got.found], data[got.found])
        assert lost not in got.sources
        again = client.put(namespace, keys, data, replicas=2)
        assert again.copies.tolist() == [2] * 96
        assert client.get(namespace, keys, out).found.all() and np.array_equal(out, data)
        # A scheduler that is gone changes nothing either.
        pool.scheduler.process.kill()
        out[:] = 0
        assert client.get(namespace, keys, out).found.all() and np.array_equal(out, data)


@contextmanager
def stopped(*nodes: HostedNode) -> Iterator[None]:
    """Nodes that stand still for as long as the block lasts."""
    try:
        for node in nodes:
            node.send(signal.SIGSTOP)
        yield
    finally:
        for node in nodes:
            node.send(signal.SIGCONT)


def test_a_stuck_node_costs_no_more_than_the_time_given(
    pool: Pool, client: ClusterClient, namespace: NamespaceId
) -> None:
    keys, data = random_blocks(40, [9, *namespace])
    assert client.put(namespace, keys, data, replicas=2).copies.tolist() == [2] * 40
    with stopped(pool.nodes["node-0"]):
        out = np.zeros_like(data)
        begin_s = time.monotonic()
        got = client.get(namespace, keys, out, ttl_s=3 * LOOKUP_S)
        put = client.put(namespace, *random_blocks(4, [10, *namespace]), replicas=3, ttl_s=LOOKUP_S)
        took_s = time.monotonic() - begin_s
    assert got.found.all() and np.array_equal(out, data) and "node-0" not in got.sources
    assert put.copies.tolist() == [2] * 4
    # Not a matter of speed: both calls have half of it, and would hang for ever without a deadline.
    assert took_s < 2 * 4 * LOOKUP_S


def test_what_stuck_nodes_do_later_touches_nobodys_memory(
    pool: Pool, client: ClusterClient, namespace: NamespaceId
) -> None:
    """Calls that were given up leave their memory alone: nothing arrives in it, and nothing is stored from it."""
    keys, data = random_blocks(40, [14, *namespace])
    assert client.put(namespace, keys[:20], data[:20]).stored.all()
    with stopped(*pool.nodes.values()):
        out, given = np.zeros_like(data), data.copy()
        got = client.get(namespace, keys[:20], out, ttl_s=0.4)
        put = client.put(namespace, keys[20:], given[20:], ttl_s=0.4)
        assert not got.found.any() and not put.stored.any()
        out[:], given[:] = 0xAA, 0xBB
    # The calls that were given up are answered before these.
    assert eventually(lambda: bool(client.lookup(namespace, keys[:20]).all()))
    check = np.zeros_like(data)
    later = client.get(namespace, keys, check)
    assert not later.corrupt.any() and np.array_equal(check[later.found], data[later.found])
    assert (out == 0xAA).all()


def test_draining_nodes_are_passed_over(pool: Pool, client: ClusterClient, namespace: NamespaceId) -> None:
    with make_channel(pool.nodes["node-0"].address) as channel:
        stub = source_admin_pb2_grpc.SourceAdminStub(channel)  # type: ignore[no-untyped-call]
        assert list(stub.Drain(source_admin_pb2.DrainRequest()))[-1].done
        keys, data = random_blocks(200, [11, *namespace])
        assert client.put(namespace, keys, data).copies.tolist() == [1] * 200
        assert set(client.get(namespace, keys, np.zeros_like(data)).sources) == {"node-1", "node-2"}
        assert client.stats()["node-0"].draining
        assert list(stub.Drain(source_admin_pb2.DrainRequest(undo=True)))[-1].done


def test_this_host_is_asked_first(
    pool: Pool, client: ClusterClient, namespace: NamespaceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, data = random_blocks(64, [12, *namespace])
    client.put(namespace, keys, data, replicas=3)
    monkeypatch.setattr("kvpool.cluster.members.host_id", lambda: "host-b")
    with ClusterClient(pool.address, timeout_s=TIMEOUT_S) as local:
        assert pool.joined(local, 3)
        local.register(namespace_spec("test_this_host_is_asked_first"))
        assert set(local.get(namespace, keys, np.zeros_like(data)).sources) == {"node-2"}


def test_arguments(client: ClusterClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(2, [13, *namespace])
    with pytest.raises(BadArgument):
        client.put(namespace, keys, data, replicas=0)
    with pytest.raises(UnknownNamespace):
        client.get(NamespaceId(b"0" * 16), keys, data)
    with pytest.raises(BadArgument):
        client.put(namespace, keys, data[:, :100])
    with pytest.raises(BadArgument):
        client.put_objects(client.register_objects("test"), ["a", "b"], [b"1"])
    with pytest.raises(BadArgument, match="object 'b' is empty"):
        client.put_objects(client.register_objects("test"), ["a", "b"], [b"1", b""])
    with pytest.raises(Unavailable), ClusterClient("127.0.0.1:1", timeout_s=TIMEOUT_S) as nowhere:
        nowhere.nodes()


def test_nothing_is_held_after_all_that(pool: Pool, client: ClusterClient) -> None:
    def counts() -> list[dict[str, int]]:
        return [{k: v for k, v in held(stats).items() if k != "sessions"} for stats in client.stats().values()]

    assert eventually(lambda: counts() == [{}] * 3), counts()


# ---------------------------------------------------------------- placement and claims

places = st.lists(
    st.builds(
        Place, source_id=st.text(min_size=1, max_size=4), host_id=st.sampled_from(["a", "b", "c"]),
        bytes_total=st.integers(0, 1 << 40), bytes_used=st.integers(0, 1 << 40),
    ),
    min_size=1, max_size=6, unique_by=lambda place: place.source_id,
)  # fmt: skip


@given(places, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_ranking_is_a_permutation_that_losses_do_not_shuffle(some: list[Place], seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 256, (20, 16), dtype=np.uint8)
    order = rank(keys, some)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(len(some)), (20, 1)))
    rest = some[1:]
    if rest:
        fewer = rank(keys, rest)
        for row in range(20):
            assert [some[i] for i in order[row].tolist() if i != 0] == [rest[i] for i in fewer[row].tolist()]


def test_places_get_their_share() -> None:
    some = [Place("a", "a", 1 << 30, 0), Place("b", "b", 3 << 30, 0), Place("full", "c", 4 << 30, 4 << 30)]
    keys = np.random.default_rng(1).integers(0, 256, (20_000, 16), dtype=np.uint8)
    first = np.bincount(rank(keys, some)[:, 0], minlength=3) / 20_000
    total = sum(place.weight for place in some)
    assert np.allclose(first, [place.weight / total for place in some], atol=0.02)
    assert first[1] > 2 * first[0] > 0 and first[2] > 0


@given(st.permutations(range(5)), st.lists(st.sampled_from("xyz"), min_size=5, max_size=5), st.integers(1, 5))
def test_copies_avoid_hosts_that_have_one(order: list[int], hosts: list[str], count: int) -> None:
    chosen = choose(order, hosts, [], count)
    assert len(chosen) == len(set(chosen)) == count
    assert len({hosts[place] for place in chosen}) == min(count, len(set(hosts)))


@given(
    st.lists(st.sampled_from("xyz"), min_size=0, max_size=6),
    st.integers(0, 40),
    st.integers(1, 4),
    st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_copies_are_as_many_as_nodes_take(hosts: list[str], count: int, replicas: int, seed: int) -> None:
    """Nodes take, have, or refuse each key at random; each is asked once, and stops only when it must."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    some = [Place(str(i), host, 1 << 30, 0) for i, host in enumerate(hosts)]
    answers = rng.integers(0, 3, (len(some), count))  # 0 refuses, 1 stores, 2 has it already
    state, runs = Stored(count, hosts), make_runs(keys, 8, some)
    asked: list[set[int]] = [set() for _ in range(count)]
    while wanted := state.assign(runs, replicas):
        for place, rows in wanted:
            assert all(place not in asked[row] for row in rows.tolist())
            for row in rows.tolist():
                asked[row].add(place)
            state.note(place, rows[answers[place, rows] == 1], stored=True, size_bytes=1)
            state.note(place, rows[answers[place, rows] == 2], stored=False)
    result = state.result(time.monotonic())
    for row in range(count):
        took = [place for place in asked[row] if answers[place, row]]
        assert result.copies[row] == len(took)
        assert len(took) >= min(replicas, int((answers[:, row] > 0).sum()))
        assert result.hosts_shared[row] == (len({hosts[place] for place in took}) < len(took))
        assert result.stored[row] == any(answers[place, row] == 1 for place in took)


@given(st.integers(1, 5), st.integers(0, 30), st.integers(0, 2**32))
def test_each_holder_is_named_once_first_ones_first(nodes: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    has = rng.random((nodes, count)) < 0.4
    holders = Holders(count, nodes)
    for place in range(nodes):
        holders.note(place, np.arange(count), has[place])
    left, named = np.arange(count), [list[int]() for _ in range(count)]
    while taken := holders.take(left):
        for place, rows, again in taken:
            assert again == any(has[place + 1 :, row].any() for row in rows.tolist())
            for row in rows.tolist():
                named[row].append(place)
    assert named == [np.flatnonzero(has[:, row]).tolist() for row in range(count)]


def test_a_claim_that_is_given_up_lets_nobody_begin() -> None:
    claim = Claim()
    with claim.touching():
        pass
    claim.give_up()
    with pytest.raises(GivenUp):
        claim.begin()
