"""What operators ask of a node: quotas, pins, copies between nodes, draining, verification. Against real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from kvpool.client import PoolClient
from kvpool.core.errors import Draining, KvpoolError
from kvpool.core.ids import Fidelity, NamespaceId
from kvpool.service.rpc import from_rpc_error, make_channel
from kvpool.service.verifying import Pace, parts
from kvpool.v1 import block_source_pb2, block_source_pb2_grpc, common_pb2, source_admin_pb2_grpc
from kvpool.v1 import source_admin_pb2 as pb
from tests.pool.node_process import BLOCK_BYTES, NodeProcess, eventually, held, namespace_spec, random_blocks

Connect = Callable[..., PoolClient]
DEADLINE_S = 60.0


class Node:
    """A node and the stub of its SourceAdmin service."""

    def __init__(self, process: NodeProcess, credential: str = "") -> None:
        self.process, self.address = process, process.address
        self._channel = make_channel(process.address, credential=credential)
        self.admin: Any = source_admin_pb2_grpc.SourceAdminStub(self._channel)  # type: ignore[no-untyped-call]
        self.blocks: Any = block_source_pb2_grpc.BlockSourceStub(self._channel)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._channel.close()

    def follow(self, call: Any) -> pb.Progress:
        """The last progress of a long operation."""
        *_, last = call
        assert last.done
        return last

    def copy(self, origin: Node, **fields: Any) -> pb.Progress:
        return self.follow(self.admin.Copy(pb.CopyRequest(from_address=origin.address, **fields), timeout=DEADLINE_S))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    """Two nodes for tests that leave no blocks behind."""
    folder = tmp_path_factory.mktemp("pair")
    with ThreadPoolExecutor(2) as threads:
        processes = list(threads.map(lambda name: NodeProcess(folder, id=f"node-{name}"), "ab"))
    with closing(Node(processes[0])) as a, closing(Node(processes[1])) as b:
        yield a, b
    assert [process.stop() for process in processes] == [0, 0]


@pytest.fixture
def a(pair: tuple[Node, Node]) -> Node:
    return pair[0]


@pytest.fixture
def b(pair: tuple[Node, Node]) -> Node:
    return pair[1]


@pytest.fixture
def here(a: Node, connect: Connect) -> PoolClient:
    return connect(a.process)


@pytest.fixture
def there(b: Node, connect: Connect) -> PoolClient:
    return connect(b.process)


@pytest.fixture
def namespace(here: PoolClient, there: PoolClient, request: pytest.FixtureRequest) -> Iterator[NamespaceId]:
    """Known on both nodes; empty again afterwards."""
    spec = namespace_spec(request.node.name)
    namespace = here.register(spec)
    there.register(spec)
    yield namespace
    here.remove_all(namespace)
    there.remove_all(namespace)


def start_all(start_node: Callable[..., NodeProcess], *sizes: int) -> list[NodeProcess]:
    """Nodes with so many bytes of memory, started at the same time."""
    with ThreadPoolExecutor(len(sizes)) as threads:
        return list(threads.map(lambda i: start_node(id=f"node-{i}", memory_bytes=sizes[i]), range(len(sizes))))


def failed(call: Callable[[], object]) -> KvpoolError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc_error(caught.value)


def keys_of(keys: np.ndarray) -> common_pb2.KeyList:
    return common_pb2.KeyList(keys=keys.tobytes())


# ---------------------------------------------------------------- copying


def test_copies_are_the_committed_bytes(
    a: Node, b: Node, here: PoolClient, there: PoolClient, namespace: NamespaceId
) -> None:
    keys, data = random_blocks(50, [1, *namespace])
    here.put(namespace, keys, data)
    last = b.copy(a, namespace_id=namespace)
    assert (last.blocks_done, last.bytes_done, last.blocks_failed, last.blocks_bad) == (50, data.nbytes, 0, 0)
    out = np.zeros_like(data)
    assert there.get(namespace, keys, out).found.all() and np.array_equal(out, data)
    assert here.lookup(namespace, keys).all(), "a copy leaves the origin alone"
    again = b.copy(a, namespace_id=namespace)
    assert (again.blocks_done, again.bytes_done, again.blocks_failed) == (50, 0, 0), "what is there is done"


def test_named_keys_of_any_shard(a: Node, b: Node, here: PoolClient, there: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(6, [2, *namespace])
    here.put(namespace, keys, data, shard=1)
    wanted = common_pb2.KeyList(keys=keys[:3].tobytes(), shard=1)
    last = b.copy(a, namespace_id=namespace, keys=wanted)
    assert last.blocks_done == 3
    assert there.lookup(namespace, keys, shard=1).tolist() == [True] * 3 + [False] * 3
    missing = b.copy(a, namespace_id=namespace, keys=keys_of(keys[:2]))
    assert missing.blocks_done == 0 and missing.blocks_failed == 2 and missing.message


def test_groups_of_different_cut(a: Node, b: Node, here: PoolClient, there: PoolClient) -> None:
    from dataclasses import replace

    from kvpool.core.namespace import GroupKind, GroupSpec

    small = GroupSpec(1, GroupKind.STATE, (4,), 16, 1, 1, 4096)
    spec = replace(namespace_spec("hybrid"), groups=(*namespace_spec().groups, small))
    namespace = here.register(spec)
    there.register(spec)
    keys, data = random_blocks(4, [3, *namespace])
    _, states = random_blocks(4, [4, *namespace], 4096)
    here.put(namespace, keys, data)
    here.put(namespace, keys, states, group=1)
    assert b.copy(a, namespace_id=namespace, move=True).blocks_done == 8
    out, out_states = np.zeros_like(data), np.zeros_like(states)
    assert there.get(namespace, keys, out).found.all() and np.array_equal(out, data)
    assert there.get(namespace, keys, out_states, group=1).found.all() and np.array_equal(out_states, states)
    there.remove_all(namespace)


def test_objects_keep_their_names(a: Node, b: Node, here: PoolClient, there: PoolClient) -> None:
    namespace = here.register_objects("test admin")
    there.register_objects("test admin")
    rng = np.random.default_rng(5)
    names = [f"file {i}" for i in range(30)]
    values = [rng.bytes(int(size)) for size in rng.integers(1, 200_000, 30)]
    here.put_objects(namespace, names, values)
    there.put_objects(namespace, names[:1], [b"something else"])
    last = b.copy(a, namespace_id=namespace, move=True)
    assert last.blocks_done == 29 and last.blocks_failed == 1 and "name" in last.message
    got = there.get_objects(namespace, names).values
    assert [v.tobytes() for v in got if v is not None] == [b"something else", *values[1:]]
    assert here.lookup_objects(namespace, names).tolist() == [True] + [False] * 29, "what was not taken is not lost"
    here.remove_all(namespace)
    there.remove_all(namespace)


def test_moved_blocks_leave(a: Node, b: Node, here: PoolClient, there: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(20, [6, *namespace])
    here.put(namespace, keys, data)
    there.put(namespace, keys[:5], data)
    last = b.copy(a, namespace_id=namespace, move=True)
    assert last.blocks_done == 20 and last.bytes_done == data[5:].nbytes
    assert not here.lookup(namespace, keys).any()
    out = np.zeros_like(data)
    assert there.get(namespace, keys, out).found.all() and np.array_equal(out, data)


def test_a_bad_block_is_not_copied(
    a: Node, b: Node, here: PoolClient, there: PoolClient, namespace: NamespaceId
) -> None:
    keys, data = random_blocks(5, [7, *namespace])
    here.put(namespace, keys, data)
    _spoil(a.process, data[2])
    last = b.copy(a, namespace_id=namespace, move=True)
    assert last.blocks_done == 4 and last.blocks_bad == 1 and last.message
    assert there.lookup(namespace, keys).tolist() == [True, True, False, True, True]
    assert not here.lookup(namespace, keys).any(), "the origin drops its bad block"


def test_lossy_copies_stay_lossy(a: Node, b: Node, here: PoolClient, there: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(4, [22, *namespace])
    half = BLOCK_BYTES // 2
    sizes = np.full(3, half, np.uint64)
    reservation = here.reserve(namespace, keys[:3], sizes=sizes, fidelity=Fidelity.INT8)
    here.commit(reservation, np.arange(3), here.write(reservation, np.arange(3), data[:3, :half].copy()))
    here.put(namespace, keys[3:], data[3:])
    there.put(namespace, keys[:1], data)
    last = b.copy(a, namespace_id=namespace, move=True)
    assert last.blocks_done == 4 and last.bytes_done == 2 * half + BLOCK_BYTES
    shown = {block.key: block for block in there.list_blocks(namespace=namespace)}
    found = [(shown[key.tobytes()].fidelity, shown[key.tobytes()].size) for key in keys]
    lossy, exact = (int(Fidelity.INT8), half), (int(Fidelity.EXACT), BLOCK_BYTES)
    assert found == [exact, lossy, lossy, exact], "an exact block is as good as its lossy copy, never the other way"
    assert there.get(namespace, keys, np.zeros_like(data)).found.tolist() == [True, False, False, True]
    # An exact block takes the place of a lossy copy.
    reservation = here.reserve(namespace, keys[:1], sizes=sizes[:1], fidelity=Fidelity.INT8)
    here.commit(reservation, np.arange(1), here.write(reservation, np.arange(1), data[:1, :half].copy()))
    assert a.copy(b, namespace_id=namespace, move=True).blocks_done == 4
    out = np.zeros_like(data)
    assert here.get(namespace, keys, out).found.tolist() == [True, False, False, True]
    assert np.array_equal(out[[0, 3]], data[[0, 3]]) and not there.lookup(namespace, keys).any()


def test_what_is_written_meanwhile_is_not_copied(
    a: Node, b: Node, here: PoolClient, there: PoolClient, namespace: NamespaceId
) -> None:
    keys, data = random_blocks(4, [8, *namespace])
    reservation = here.reserve(namespace, keys[:2])
    here.put(namespace, keys[2:], data[2:])
    theirs = there.reserve(namespace, keys[2:3])
    last = b.copy(a, namespace_id=namespace)
    assert last.blocks_done == 1 and last.blocks_failed == 1
    assert there.lookup(namespace, keys).tolist() == [False, False, False, True]
    here.abort(reservation)
    there.abort(theirs)


def test_errors_of_copies(a: Node, b: Node, namespace: NamespaceId) -> None:
    def copy(**fields: Any) -> KvpoolError:
        return failed(lambda: list(b.admin.Copy(pb.CopyRequest(**fields), timeout=DEADLINE_S)))

    assert copy(from_address="127.0.0.1:1").reason.name == "UNREACHABLE"
    assert "itself" in str(copy(from_address=b.address))
    assert copy(from_address="").reason.name == "BAD_ARGUMENT"
    assert copy(from_address=a.address, namespace_id=b"0" * 16).reason.name == "UNKNOWN_NAMESPACE"
    assert copy(from_address=a.address, keys=keys_of(np.zeros((1, 16), np.uint8))).reason.name == "BAD_ARGUMENT"


def test_nothing_fits_any_more(start_node: Callable[..., NodeProcess], connect: Connect) -> None:
    """A target full of held blocks: what fitted stays, and the copy says why it ended."""
    processes = start_all(start_node, 32 << 20, 4 << 20)
    with closing(Node(processes[0])) as large, closing(Node(processes[1])) as small:
        spec = namespace_spec()
        origin, target = connect(large.process), connect(small.process)
        namespace = origin.register(spec)
        target.register(spec)
        keys, data = random_blocks(200, [9])
        own_keys, own = random_blocks(100, [10])
        origin.put(namespace, keys, data)
        stored = target.put(namespace, own_keys, own).stored
        target.pin(namespace, own_keys[stored])
        last = small.copy(large, namespace_id=namespace)
        assert last.blocks_failed > 0 and last.blocks_done + last.blocks_failed == 200 and last.message
        assert target.lookup(namespace, own_keys[stored]).all(), "what is pinned stays"
        assert int(target.lookup(namespace, keys).sum()) <= last.blocks_done


# ---------------------------------------------------------------- draining


def test_a_drained_node_is_empty_and_takes_nothing(start_node: Callable[..., NodeProcess], connect: Connect) -> None:
    processes = start_all(start_node, 32 << 20, 17 << 20, 16 << 20)
    nodes = [Node(process) for process in processes]
    try:
        clients = [connect(process) for process in processes]
        for client in clients:
            namespace, objects = client.register(namespace_spec()), client.register_objects("drained")
        keys, data = random_blocks(300, [11])
        clients[0].put(namespace, keys, data)
        clients[0].put_objects(objects, ["name"], [b"value"])
        targets = [node.address for node in nodes[1:]]
        last = nodes[0].follow(nodes[0].admin.Drain(pb.DrainRequest(target_addresses=targets), timeout=DEADLINE_S))
        assert last.blocks_done == 301 and last.blocks_failed == 0
        assert clients[0].stats().blocks == 0 and clients[0].stats().draining
        out = np.zeros_like(data)
        found = [client.get(namespace, keys, out).found for client in clients[1:]]
        assert (found[0] ^ found[1]).all(), "each block is in one place"
        assert all(some.any() for some in found) and np.array_equal(out, data)
        with pytest.raises(Draining):
            clients[0].put(namespace, keys, data)
        assert nodes[0].follow(nodes[0].admin.Drain(pb.DrainRequest(undo=True))).done
        assert clients[0].put(namespace, keys, data).stored.all()
    finally:
        for node in nodes:
            node.close()


def test_drain_without_targets_only_refuses(a: Node, here: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(3, [12, *namespace])
    here.put(namespace, keys[:2], data)
    assert a.follow(a.admin.Drain(pb.DrainRequest())).blocks_total >= 2
    with pytest.raises(Draining):
        here.put(namespace, keys, data)
    assert here.get(namespace, keys[:2], np.zeros_like(data)).found.all(), "reads go on"
    a.follow(a.admin.Drain(pb.DrainRequest(undo=True)))
    assert here.put(namespace, keys, data).stored.tolist() == [False, False, True]


def test_errors_of_drains(a: Node) -> None:
    def drain(**fields: Any) -> KvpoolError:
        return failed(lambda: list(a.admin.Drain(pb.DrainRequest(**fields), timeout=DEADLINE_S)))

    assert "drained" in str(drain(target_addresses=[a.address]))
    assert drain(target_addresses=["127.0.0.1:1"], undo=True).reason.name == "BAD_ARGUMENT"
    assert drain(target_addresses=["127.0.0.1:1"]).reason.name == "UNREACHABLE"
    a.follow(a.admin.Drain(pb.DrainRequest(undo=True)))


# ---------------------------------------------------------------- verification


def test_verification_removes_what_is_bad(a: Node, here: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(40, [13, *namespace])
    here.put(namespace, keys, data)
    hits = here.stats().hits
    good = a.follow(a.admin.Verify(pb.VerifyRequest(namespace_id=namespace)))
    assert (good.blocks_total, good.blocks_done, good.blocks_bad, good.bytes_done) == (40, 40, 0, data.nbytes)
    _spoil(a.process, data[7])
    _spoil(a.process, data[33])
    bad = a.follow(a.admin.Verify(pb.VerifyRequest()))
    assert bad.blocks_bad == 2 and bad.blocks_done >= 40 and bad.message
    lost = np.flatnonzero(~here.lookup(namespace, keys)).tolist()
    assert lost == [7, 33]
    assert a.follow(a.admin.Verify(pb.VerifyRequest(namespace_id=namespace))).blocks_bad == 0
    assert here.stats().hits == hits and here.stats().pins == 0, "looking is not using"
    assert here.put(namespace, keys, data).stored.sum() == 2


def test_verification_of_a_namespace_that_is_not_there(a: Node) -> None:
    error = failed(lambda: list(a.admin.Verify(pb.VerifyRequest(namespace_id=b"0" * 16))))
    assert error.reason.name == "UNKNOWN_NAMESPACE"


def test_a_cancelled_verification_holds_nothing(a: Node, here: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(30, [14, *namespace])
    here.put(namespace, keys, data)
    # At this pace it would take an hour; its first message says that it runs.
    call = a.admin.Verify(pb.VerifyRequest(namespace_id=namespace, bytes_per_s_max=300))
    assert not next(call).done
    call.cancel()
    assert eventually(lambda: held(here.stats()) == {"sessions": 1}), held(here.stats())


def test_operations_are_bounded(a: Node, here: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(30, [15, *namespace])
    here.put(namespace, keys, data)
    slow = pb.VerifyRequest(namespace_id=namespace, bytes_per_s_max=300)
    calls: list[Any] = []

    def all_run() -> bool:
        for call in [a.admin.Verify(slow) for _ in range(8 - len(calls))]:
            # One of a test before may have its place still, for a moment after it has nothing else any more.
            with suppress(grpc.RpcError):
                assert not next(call).done
                calls.append(call)
        return len(calls) == 8

    assert eventually(all_run)
    assert failed(lambda: next(a.admin.Verify(slow))).reason.name == "OVERLOADED"
    for call in calls:
        call.cancel()

    def free() -> bool:
        try:
            return bool(a.follow(a.admin.Verify(pb.VerifyRequest(namespace_id=namespace))).done)
        except grpc.RpcError:
            return False

    assert eventually(free)


def test_pace_is_by_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    # Not the clock of all other threads.
    monkeypatch.setattr("kvpool.service.verifying.time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = Pace(1000)
    assert pace.behind_s(500) == pytest.approx(0.5)
    now[0] = 101.0
    assert pace.behind_s(500) == pytest.approx(-0.5), "late work is not held up"
    assert Pace(0).behind_s(1 << 40) == 0.0


def test_parts_are_bounded() -> None:
    sizes = [3, 3, 3, 50, 1, 1, 1, 1, 1]
    cut = list(parts(list(range(9)), sizes, 4, 9))
    assert cut == [[0, 1, 2], [3], [4, 5, 6, 7], [8]]
    assert list(parts([], [], 4, 9)) == []


# ---------------------------------------------------------------- quotas, pins, namespaces, eviction, links


def test_quotas(a: Node, here: PoolClient, namespace: NamespaceId) -> None:
    quota = a.admin.SetQuota(pb.Quota(namespace_id=namespace, bytes_max=10 * BLOCK_BYTES))
    assert quota.bytes_max == 10 * BLOCK_BYTES
    keys, data = random_blocks(25, [16, *namespace])
    for row in range(25):
        here.put(namespace, keys[row : row + 1], data[row : row + 1])
    kept = here.lookup(namespace, keys)
    assert 8 <= int(kept.sum()) <= 10 and kept[-1], "its own coldest blocks go first"
    (shown,) = [q for q in a.admin.ListQuotas(pb.ListQuotasRequest()).quotas if q.namespace_id == namespace]
    assert 0 < shown.bytes_used <= shown.bytes_max
    a.admin.SetQuota(pb.Quota(tenant="somebody", bytes_max=1 << 20))
    assert [q.tenant for q in a.admin.ListQuotas(pb.ListQuotasRequest()).quotas if q.tenant] == ["somebody"]
    for end in (pb.Quota(namespace_id=namespace), pb.Quota(tenant="somebody")):
        a.admin.SetQuota(end)
    assert not a.admin.ListQuotas(pb.ListQuotasRequest()).quotas
    for bad in (pb.Quota(bytes_max=5), pb.Quota(namespace_id=namespace, tenant="x", bytes_max=5)):
        assert failed(lambda q=bad: a.admin.SetQuota(q)).reason.name == "BAD_ARGUMENT"  # type: ignore[misc]


def test_pins_of_owners_outlive_their_session(
    a: Node, here: PoolClient, connect: Connect, namespace: NamespaceId
) -> None:
    keys, data = random_blocks(4, [17, *namespace])
    here.put(namespace, keys, data)
    other = connect(a.process, client="passer-by")
    other.register(namespace_spec("test_pins_of_owners_outlive_their_session"))
    other.pin(namespace, keys[:2], ttl_s=60)
    pin, _ = other.pin(namespace, keys, owner="job-7")
    shown = {p.owner: p for p in a.admin.ListPins(pb.ListPinsRequest()).pins}
    assert shown["passer-by"].kind == "soft" and 0 < shown["passer-by"].expires_in_ms <= 60_000
    assert shown["passer-by"].blocks == 2 and shown["passer-by"].session_id
    assert shown["job-7"].kind == "hard" and shown["job-7"].expires_in_ms == -1 and shown["job-7"].pin_id == pin
    assert shown["job-7"].session_id == 0 and shown["job-7"].bytes >= data.nbytes
    other.close()
    assert eventually(lambda: [p.owner for p in a.admin.ListPins(pb.ListPinsRequest()).pins] == ["job-7"])
    assert here.stats().pins_detached == 1
    assert a.blocks.Unpin(block_source_pb2.UnpinRequest(owner="job-7")).pins_released == 1
    assert not a.admin.ListPins(pb.ListPinsRequest()).pins


def test_namespaces_and_their_blocks(a: Node, here: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(7, [18, *namespace])
    here.put(namespace, keys, data)
    infos = {bytes(i.namespace_id): i for i in a.admin.ListNamespaces(pb.ListNamespacesRequest()).namespaces}
    assert infos[namespace].blocks == 7 and infos[namespace].bytes >= data.nbytes
    assert infos[namespace].spec.model == "test_namespaces_and_their_blocks"


def test_eviction_by_key_and_by_bytes(a: Node, here: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(10, [19, *namespace])
    here.put(namespace, keys, data)
    here.pin(namespace, keys[:1], ttl_s=60)
    reply = a.admin.Evict(pb.EvictRequest(namespace_id=namespace, keys=keys_of(keys[:3])))
    assert reply.blocks == 2 and reply.bytes >= 2 * BLOCK_BYTES, "held blocks stay"
    assert here.lookup(namespace, keys).tolist() == [True, False, False] + [True] * 7
    reply = a.admin.Evict(pb.EvictRequest(bytes=3 * BLOCK_BYTES))
    assert reply.blocks >= 3
    both = pb.EvictRequest(namespace_id=namespace, keys=keys_of(keys), bytes=1)
    assert failed(lambda: a.admin.Evict(both)).reason.name == "BAD_ARGUMENT"


def test_links_are_what_clients_report_and_copies_measure(
    a: Node, b: Node, here: PoolClient, namespace: NamespaceId
) -> None:
    keys, data = random_blocks(10, [20, *namespace])
    here.put(namespace, keys, data)
    b.copy(a, namespace_id=namespace)
    own = [link for link in b.admin.ListLinks(pb.ListLinksRequest()).links if link.to == "node-a"]
    assert own and all(getattr(link, "from") == "node-b" for link in own)
    assert any(link.bytes >= data.nbytes and link.state == "up" for link in own)
    with closing(_Session(a)) as session:
        link = pb.LinkInfo(to="elsewhere", kind="tcp", state="up", latency_us=12.5, bytes_per_s=1e9, age_ms=100)
        a.admin.ReportLinks(pb.ReportLinksRequest(session_id=session.id, links=[link]))
        (shown,) = [x for x in a.admin.ListLinks(pb.ListLinksRequest()).links if getattr(x, "from") == "reporter"]
        assert (shown.to, shown.kind, shown.latency_us) == ("node-a", "tcp", 12.5) and shown.age_ms >= 100
        many = pb.ReportLinksRequest(session_id=session.id, links=[link] * 17)
        assert failed(lambda: a.admin.ReportLinks(many)).reason.name == "BAD_ARGUMENT"
    assert eventually(
        lambda: all(getattr(x, "from") != "reporter" for x in a.admin.ListLinks(pb.ListLinksRequest()).links)
    )
    unknown = pb.ReportLinksRequest(session_id=1 << 40, links=[link])
    assert failed(lambda: a.admin.ReportLinks(unknown)).reason.name == "UNKNOWN_SESSION"


class _Session:
    """A bare session, without a client around it."""

    def __init__(self, node: Node) -> None:
        import threading

        self._ended = threading.Event()

        def pings() -> Iterator[block_source_pb2.SessionPing]:
            yield block_source_pb2.SessionPing(hello=block_source_pb2.SessionPing.Hello(client="reporter"))
            self._ended.wait(DEADLINE_S)

        self._call = node.blocks.OpenSession(pings())
        self.id = next(self._call).session_id

    def close(self) -> None:
        self._ended.set()
        self._call.cancel()


# ---------------------------------------------------------------- who may


def test_operators_need_the_credential(start_node: Callable[..., NodeProcess], connect: Connect) -> None:
    process = start_node(credential="secret")
    with closing(Node(process)) as stranger, closing(Node(process, "secret")) as operator:
        for call in (
            lambda: stranger.admin.SetQuota(pb.Quota(tenant="t", bytes_max=1)),
            lambda: stranger.admin.Evict(pb.EvictRequest(bytes=1)),
            lambda: list(stranger.admin.Drain(pb.DrainRequest())),
            lambda: list(stranger.admin.Verify(pb.VerifyRequest())),
            lambda: list(stranger.admin.Copy(pb.CopyRequest(from_address="127.0.0.1:1"))),
        ):
            assert failed(call).reason.name == "UNAUTHENTICATED"
        assert not operator.blocks.GetSourceStats(block_source_pb2.GetSourceStatsRequest()).draining
        assert operator.admin.SetQuota(pb.Quota(tenant="t", bytes_max=1)).bytes_max == 1
        # A node that stops does not wait for operations that would take an hour.
        client = connect(process, credential="secret")
        namespace = client.register(namespace_spec())
        client.put(namespace, *random_blocks(30, [23]))
        slow = operator.admin.Verify(pb.VerifyRequest(bytes_per_s_max=300))
        assert not next(slow).done
        assert process.stop() == 0


def test_nothing_is_held_after_all_that(a: Node, b: Node, here: PoolClient, there: PoolClient) -> None:
    assert eventually(lambda: held(here.stats()) == held(there.stats()) == {"sessions": 1}), (
        held(here.stats()), held(there.stats()),
    )  # fmt: skip


def _spoil(process: NodeProcess, block: np.ndarray) -> None:
    """Overwrites a part of a block in a node's memory."""
    with process.segment.open("r+b") as file:
        at = file.read().index(block[5000:5064].tobytes())
        file.seek(at)
        file.write(b"\0" * 64)
