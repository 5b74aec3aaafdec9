"""The pool through its library face, against a real node process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvpool.client import (
    ABANDONED,
    BEING_WRITTEN,
    COMMITTED,
    DEADLINE,
    RESERVED,
    SECTION,
    Hold,
    PoolClient,
)
from kvpool.core.errors import BadArgument, KvpoolError, Overloaded, Unavailable, UnknownNamespace, UnknownReservation
from kvpool.core.ids import Fidelity, NamespaceId
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.service.sessions import WAITING_CALLS_MAX
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import common_pb2
from tests.pool.node_process import SECTIONS, NodeProcess, eventually, free_port, held, namespace_spec, random_blocks

Connect = Callable[..., PoolClient]


@pytest.fixture(params=["shm", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(shared_node: NodeProcess, connect: Connect, kind: str) -> PoolClient:
    return connect(shared_node, channels=(kind,), client=f"test-{kind}")


@pytest.fixture
def namespace(client: PoolClient, kind: str, request: pytest.FixtureRequest) -> NamespaceId:
    """A namespace of its own for each test."""
    return client.register(namespace_spec(f"{request.node.name}"))


def test_stored_bytes_are_loaded_bytes(client: PoolClient, namespace: NamespaceId, kind: str) -> None:
    keys, data = random_blocks(30, [1, *namespace])
    put = client.put(namespace, keys, data)
    assert put.stored.all() and not put.existed.any() and put.channel == kind
    out = np.zeros_like(data)
    got = client.get(namespace, keys, out)
    assert got.found.all() and not got.corrupt.any() and got.bytes == data.nbytes
    assert np.array_equal(out, data)
    assert client.lookup(namespace, keys).all()


def test_a_second_put_leaves_blocks_alone(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(4, [2, *namespace])
    client.put(namespace, keys[:2], data)
    again = client.put(namespace, keys, data)
    assert again.existed.tolist() == [True, True, False, False]
    assert again.stored.tolist() == [False, False, True, True]


def test_misses_are_results(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(6, [3, *namespace])
    client.put(namespace, keys[::2], data[::2])
    out = np.zeros_like(data)
    got = client.get(namespace, keys, out)
    assert got.found.tolist() == [True, False] * 3
    assert np.array_equal(out[::2], data[::2]) and not out[1::2].any()
    nothing = client.get(namespace, random_blocks(2, [4, *namespace])[0], out)
    assert not nothing.found.any() and nothing.bytes == 0


def test_rows(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(5, [5, *namespace])
    rows = np.array([4, 2, 0, 1, 3])
    client.put(namespace, keys, data, rows=rows)
    out = np.zeros((12, data.shape[1]), np.uint8)
    assert client.get(namespace, keys, out, rows=rows + 6).found.all()
    assert np.array_equal(out[6:11], data)


def test_shards_are_different_blocks(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(3, [6, *namespace])
    client.put(namespace, keys, data, shard=1)
    assert not client.lookup(namespace, keys).any()
    out = np.zeros_like(data)
    assert client.get(namespace, keys, out, shard=1).found.all()
    assert np.array_equal(out, data)


def test_sections_wake_readers_as_they_come(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(1, [7, *namespace])
    reservation = client.reserve(namespace, keys)
    assert client.reserve(namespace, keys).status.tolist() == [BEING_WRITTEN]
    news = client.wait(namespace, keys, deadline_s=60)
    digests = client.write(reservation, np.array([0]), data)
    for section in range(SECTIONS):
        client.commit_sections(reservation, np.array([0]), np.array([section]), digests[0, section : section + 1])
    seen = [(s, x) for w in news for s, x in zip(w.states.tolist(), w.sections.tolist(), strict=True)]
    assert [x for s, x in seen if s == SECTION] == list(range(SECTIONS))
    assert seen[-1][0] == COMMITTED


def test_one_waits_for_what_another_writes(
    shared_node: NodeProcess, connect: Connect, client: PoolClient, namespace: NamespaceId
) -> None:
    keys, data = random_blocks(8, [8, *namespace])
    reader = connect(shared_node, client="reader")
    reader.register(namespace_spec())
    states: dict[int, int] = {}

    def read() -> None:
        for news in reader.wait(namespace, keys, deadline_s=60):
            states.update(zip(news.indices.tolist(), news.states.tolist(), strict=True))

    thread = threading.Thread(target=read)
    thread.start()
    assert eventually(lambda: client.stats().waiters == 1)
    client.put(namespace, keys, data)
    thread.join(60)
    assert states == dict.fromkeys(range(8), COMMITTED)


def test_waits_of_a_session_are_bounded(
    shared_node: NodeProcess, connect: Connect, client: PoolClient, namespace: NamespaceId
) -> None:
    keys, _ = random_blocks(1, [14, *namespace])
    waits = [client.wait(namespace, keys, deadline_s=100) for _ in range(WAITING_CALLS_MAX)]
    with pytest.raises(Overloaded, match="of this session"):
        next(client.wait(namespace, keys, deadline_s=100))
    other = connect(shared_node, client="somebody else")
    other.register(namespace_spec())
    news = other.wait(namespace, keys, deadline_s=100)
    assert client.stats().waiters == WAITING_CALLS_MAX + 1
    waits.pop()  # nobody has it any more, and nobody ever asked it for news: it ends
    assert eventually(lambda: client.stats().waiters == WAITING_CALLS_MAX)
    waits.append(client.wait(namespace, keys, deadline_s=100))
    for wait in [*waits, news]:
        wait.close()
    assert eventually(lambda: client.stats().waiters == 0)
    with pytest.raises(Unavailable, match="was ended"):
        next(waits[0])


def test_waits_end(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(3, [9, *namespace])
    client.put(namespace, keys[:1], data)

    def last_states(**options: object) -> list[int]:
        states = [0, 0, 0]
        for news in client.wait(namespace, keys, **options):  # type: ignore[arg-type]
            for i, state in zip(news.indices.tolist(), news.states.tolist(), strict=True):
                states[i] = state
        return states

    assert last_states(deadline_s=60, absent_is_abandoned=True) == [COMMITTED, ABANDONED, ABANDONED]
    assert last_states(deadline_s=0.05) == [COMMITTED, DEADLINE, DEADLINE]
    reservation = client.reserve(namespace, keys[1:])
    waiting = client.wait(namespace, keys, deadline_s=60)
    client.abort(reservation)
    final = [(i, s) for w in waiting for i, s in zip(w.indices.tolist(), w.states.tolist(), strict=True)]
    assert sorted(final) == [(0, COMMITTED), (1, ABANDONED), (2, ABANDONED)]


def test_abort_frees_the_keys(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(2, [10, *namespace])
    reservation = client.reserve(namespace, keys)
    assert reservation.status.tolist() == [RESERVED, RESERVED]
    client.write(reservation, np.array([0, 1]), data)
    assert client.abort(reservation) == 2
    with pytest.raises(UnknownReservation):
        client.abort(reservation)
    assert client.put(namespace, keys, data).stored.all()


def test_handoff_hold_ends_with_its_reader(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(4, [11, *namespace])
    client.put(namespace, keys, data, hold=Hold("request-1", ttl_s=60))
    assert client.stats().pins > 0
    client.get(namespace, keys, np.zeros_like(data), handoff="request-1")
    assert eventually(lambda: client.stats().pins == 0)


def test_hold_is_added_to_blocks_that_exist(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(2, [12, *namespace])
    client.put(namespace, keys, data)
    assert client.put(namespace, keys, data, hold=Hold("request-2")).existed.all()
    assert client.stats().pins > 0
    client.get(namespace, keys, np.zeros_like(data), handoff="request-2")
    assert eventually(lambda: client.stats().pins == 0)


def test_many_threads_many_clients(
    shared_node: NodeProcess, connect: Connect, client: PoolClient, namespace: NamespaceId, kind: str
) -> None:
    other = connect(shared_node, channels=(kind,))
    other.register(namespace_spec(f"test_many_threads_many_clients[{kind}]"))
    keys, data = random_blocks(48, [13, *namespace])

    def work(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        one = client if seed % 2 else other
        for _ in range(6):
            some = rng.permutation(48)[:16]
            one.put(namespace, keys[some], data[some])
            out = np.zeros((16, data.shape[1]), np.uint8)
            got = one.get(namespace, keys[some], out)
            if got.corrupt.any() or not np.array_equal(out[got.found], data[some][got.found]):
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))
    assert client.get(namespace, keys, np.zeros_like(data)).found.all()
    assert client.counters.digest_errors == other.counters.digest_errors == 0


def test_a_corrupt_block_is_a_miss_reported_and_dropped(
    shared_node: NodeProcess, client: PoolClient, namespace: NamespaceId
) -> None:
    keys, data = random_blocks(3, [14, *namespace])
    client.put(namespace, keys, data)
    errors = client.stats().digest_errors
    marked = data[1, 5000:5064].tobytes()
    with shared_node.segment.open("r+b") as file:
        at = file.read().index(marked)
        file.seek(at)
        file.write(b"\0" * 64)
    got = client.get(namespace, keys, np.zeros_like(data))
    assert got.found.tolist() == [True, False, True] and got.corrupt.tolist() == [False, True, False]
    assert client.counters.digest_errors == 1 and client.stats().digest_errors == errors + 1
    assert client.lookup(namespace, keys).tolist() == [True, False, True], "the bad copy is still offered"
    assert client.put(namespace, keys, data).stored.tolist() == [False, True, False]
    assert client.get(namespace, keys, np.zeros_like(data)).found.all()


def test_a_lease_ends_whatever_else_its_release_says(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(2, [21, *namespace])
    client.put(namespace, keys, data)
    session = client._session()
    # Of a client of the test before, which did not wait for the answer to its last release.
    assert eventually(lambda: client.stats().leases == 0)
    named = common_pb2.KeyList(keys=keys.tobytes())
    for wrong in (
        {"corrupt": common_pb2.KeyList(keys=b"short")},
        {"corrupt": named, "namespace_id": b"unknown"},
        {"handed_off": named, "handoff_request_id": "r", "namespace_id": b"unknown"},
    ):
        lease = pb.LeaseRequest(session_id=session.id, namespace_id=namespace, keys=named, ttl_ms=600_000)
        leased = session.stub.Lease(lease, timeout=60)
        assert client.stats().leases == 1
        with pytest.raises(grpc.RpcError):
            session.stub.Release(
                pb.ReleaseRequest(session_id=session.id, lease_ids=[leased.lease_id], **wrong), timeout=60
            )
        assert client.stats().leases == 0, wrong


def test_nothing_is_held_after_all_that(shared_node: NodeProcess, connect: Connect, client: PoolClient) -> None:
    observer = connect(shared_node, client="observer")
    assert client.connected or client.epoch
    client.close()
    assert eventually(lambda: held(observer.stats()) == {"sessions": 1}), held(observer.stats())


def test_bad_arguments(shared_node: NodeProcess, connect: Connect) -> None:
    with pytest.raises(BadArgument):
        PoolClient(shared_node.address, channels=("pigeon",))
    client = connect(shared_node)
    keys, data = random_blocks(1, [15])
    with pytest.raises(UnknownNamespace):
        client.put(NamespaceId(b"0" * 16), keys, data)
    namespace = client.register(namespace_spec())
    for bad in (keys[0], keys.astype(np.uint16), keys[:, :8]):
        with pytest.raises(BadArgument):
            client.lookup(namespace, bad)
    with pytest.raises(BadArgument):
        client.put(namespace, keys, data, group=3)
    with pytest.raises(BadArgument):
        client.put(namespace, keys, data[:, :100])
    with pytest.raises(BadArgument):
        client.reserve(namespace, keys, ttl_s=3600)
    assert eventually(lambda: client.stats().reservations == 0)


def test_nobody_there(connect: Connect) -> None:
    client = PoolClient("127.0.0.1:1", timeout_s=30.0)
    try:
        for _ in range(3):
            with pytest.raises(Unavailable):
                client.stats()
    finally:
        client.close()
    with pytest.raises(KvpoolError):
        client.stats()


def test_somebody_who_says_nothing(connect: Connect) -> None:
    """It is no session that is missing, whether the wait for it ended first or the attempt to open it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = PoolClient(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        try:
            for _ in range(4):
                with pytest.raises(Unavailable):
                    client.stats()
        finally:
            client.close()


def test_credentials(start_node: Callable[..., NodeProcess], connect: Connect) -> None:
    node = start_node(credential="secret")
    with pytest.raises(KvpoolError, match="credential"):
        connect(node).stats()
    assert connect(node, credential="secret").stats().bytes_total > 0


def test_a_restarted_node_is_found_again(start_node: Callable[..., NodeProcess], connect: Connect) -> None:
    node = start_node(listen=f"127.0.0.1:{free_port()}")
    client = connect(node)
    namespace = client.register(namespace_spec())
    keys, data = random_blocks(2, [16, *namespace])
    client.put(namespace, keys, data)
    epoch = client.epoch
    node.kill()
    with pytest.raises(KvpoolError):
        client.put(namespace, *random_blocks(2, [17, *namespace]))
    start_node(listen=node.address)

    def stored() -> bool:
        try:
            return bool(client.put(namespace, keys, data).existed.all())
        except KvpoolError:
            return False

    assert eventually(stored)
    assert client.epoch > epoch and client.counters.sessions == 2
    assert client.get(namespace, keys, np.zeros_like(data)).found.all()


def test_pins_keep_blocks(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(3, [17, *namespace])
    client.put(namespace, keys[:2], data)
    pin, pinned = client.pin(namespace, keys, ttl_s=60)
    assert pin and pinned.tolist() == [True, True, False]
    assert client.stats().pins == 1
    assert client.remove(namespace, keys) == 2
    assert not client.lookup(namespace, keys).any()
    client.unpin(pin)
    assert client.stats().pins == 0
    assert client.pin(namespace, keys)[0] == 0


def test_without_a_writer_lock_bytes_go_over_tcp(
    shared_node: NodeProcess, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kvpool.service.writer_lock.lock_folder", lambda: tmp_path / "missing")
    client = connect(shared_node)
    namespace = client.register(namespace_spec("no lock"))
    keys, data = random_blocks(3, [18])
    assert client.put(namespace, keys, data).channel == "tcp"
    out = np.zeros_like(data)
    got = client.get(namespace, keys, out)
    assert got.channel == "shm" and got.found.all() and np.array_equal(out, data)


def test_memory_that_may_not_be_written(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(2, [30, *namespace])
    client.put(namespace, keys, data)
    out = np.zeros_like(data)
    out.setflags(write=False)
    with pytest.raises(BadArgument, match="read-only"):
        client.get(namespace, keys, out)
    assert not out.any()
    with pytest.raises(BadArgument, match="uint8"):
        client.get(namespace, ["ab"], np.zeros_like(data))  # type: ignore[arg-type]


def test_holds_end_for_blocks_read_with_and_without_a_call(client: PoolClient, namespace: NamespaceId) -> None:
    keys, data = random_blocks(5, [31, *namespace])
    client.put(namespace, keys[:4], data[:4], hold=Hold("r", 600))
    assert client.stats().pins >= 1
    got = client.get(namespace, keys, np.zeros_like(data), handoff="r")
    assert got.found.tolist() == [True] * 4 + [False]
    assert eventually(lambda: client.stats().pins == 0)


@pytest.mark.parametrize("fidelity", [Fidelity.EXACT, Fidelity.INT8])
def test_arguments_of_other_types_are_refused(client: PoolClient, fidelity: Fidelity) -> None:
    """A typed error each, whatever the call is made of inside; nothing is written to memory that is too short."""
    group = GroupSpec(0, GroupKind.FULL, (0,), 16, 1, 1, 2 * 16 * 2 * 64 * 4, kv_heads=2, head_dim=64)
    namespace = client.register(NamespaceSpec("types", "", "float32", "test", "lkthd", "xxh3_128/1", (group,)))
    keys, _ = random_blocks(2, [17, *namespace])
    data = np.random.default_rng(18).standard_normal((2, group.block_bytes // 4)).astype(np.float32).view(np.uint8)
    frozen = data.copy()
    frozen.flags.writeable = False
    assert client.put(namespace, keys, data, fidelity=fidelity, rows=[1, 0]).stored.all()  # type: ignore[arg-type]
    put, get = partial(client.put, fidelity=fidelity), partial(client.get, fidelity_min=fidelity)
    bad: list[Callable[[], object]] = [
        lambda: put(namespace, ["ab", "cd"], data),  # type: ignore[arg-type]
        lambda: get(namespace, ["ab", "cd"], data),  # type: ignore[arg-type]
        lambda: client.lookup(namespace, ["ab"]),  # type: ignore[arg-type]
        lambda: list(client.list_blocks(keys=["ab"])),  # type: ignore[arg-type]
        lambda: put(namespace, keys[:, ::-1], data, rows=np.array([[0], [1]])),
        lambda: get(namespace, keys, data, rows=["a", "b"]),  # type: ignore[arg-type]
        lambda: get(namespace, keys, data, rows=np.array([0])),
        lambda: get(namespace, keys, data[:1]),
        lambda: get(namespace, keys, data[:, :-1]),
        lambda: get(namespace, keys, frozen),
        lambda: put(namespace, random_blocks(2, [19])[0], data[:, :-1]),
        lambda: put(namespace, random_blocks(2, [19])[0], data, rows=np.array([0, 2])),
    ]
    for number, call in enumerate(bad):
        with pytest.raises(BadArgument):
            print(number, call())
    for unknown in (put, get):
        with pytest.raises(UnknownNamespace):
            unknown(NamespaceId(b"0" * 16), keys, data)
    client.remove_all(namespace)
