"""Clients and nodes that die, stop or are replaced: what was held comes back, what was stored stays right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool.channels import tcp_wire as wire
from kvpool.channels.base import Channel
from kvpool.channels.shm import ShmChannel
from kvpool.channels.tcp import TcpChannel
from kvpool.client import PoolClient
from kvpool.core.errors import DeadlineExceeded, KvpoolError, NoSpace, ReservationExpired, Unavailable
from kvpool.service.node import main
from kvpool.service.source_calls import OPENERS
from kvpool.service.writer_lock import PREFIX, lock_folder
from kvpool.v1 import block_source_pb2 as pb
from tests.pool.node_process import (
    END_TIMEOUT_S,
    NodeProcess,
    eventually,
    free_port,
    held,
    namespace_spec,
    random_blocks,
    stand_still,
)

Start = Callable[..., NodeProcess]
Connect = Callable[..., PoolClient]
ONLY_ME = {"sessions": 1}


@contextmanager
def writer(node: NodeProcess, channel: str, blocks: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a reservation of so many blocks."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.pool.writer_process", node.address, channel, str(blocks)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(END_TIMEOUT_S)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("channel", ["shm", "tcp"])
def test_killed_writer(start_node: Start, connect: Connect, channel: str) -> None:
    node = start_node()
    client = connect(node)
    namespace = client.register(namespace_spec("writer"))
    keys, data = random_blocks(20, [99])
    with writer(node, channel, 20) as process:
        waiting = client.wait(namespace, keys, deadline_s=60)
        process.kill()
        states = [s for news in waiting for s in news.states.tolist()]
        assert states == [2] * 20, "readers are told that the writer is gone"
        assert eventually(lambda: held(client.stats()) == ONLY_ME), held(client.stats())
    assert client.stats().bytes_used == 0
    assert client.put(namespace, keys, data).stored.all()


def test_stopped_writer_keeps_its_slots_in_quarantine(start_node: Start, connect: Connect) -> None:
    """A writer that does not ping is gone for everybody, but until it is proven dead nobody gets its slots."""
    node = start_node(ping_interval_s=1.0)
    client = connect(node)
    client.register(namespace_spec("writer"))
    with writer(node, "shm", 20) as process:
        used = client.stats().bytes_used
        stand_still(process)
        assert eventually(lambda: client.stats().quarantined == 20), client.stats()
        assert client.stats().bytes_used == used and client.stats().sessions == 1
        process.kill()
        assert eventually(lambda: held(client.stats()) == ONLY_ME), held(client.stats())
    assert client.stats().bytes_used == 0


def test_stopped_node_loses_nothing(start_node: Start, connect: Connect) -> None:
    """A node that stood still for longer than it waits for pings finds its clients' sessions alive."""
    node = start_node(ping_interval_s=0.5)
    client = connect(node, timeout_s=4.0)
    namespace = client.register(namespace_spec())
    keys, data = random_blocks(4, [1])
    client.put(namespace, keys, data)
    stopped = connect(node, client="slow")
    stopped.register(namespace_spec())
    reservation = stopped.reserve(namespace, random_blocks(1, [2])[0], ttl_s=600)
    try:
        node.send(signal.SIGSTOP)
        with pytest.raises(KvpoolError):
            connect(node, timeout_s=0.5).stats()
        with pytest.raises(KvpoolError):
            client.reserve(namespace, random_blocks(1, [3])[0])
        assert client.connected and client.lookup(namespace, keys).all()
        with pytest.raises(DeadlineExceeded):  # what is not there is asked for
            client.lookup(namespace, random_blocks(1, [3])[0], timeout_s=0.1)
        assert client.get(namespace, keys, np.zeros_like(data)).found.all(), "reading what is there takes no call"
    finally:
        node.send(signal.SIGCONT)
    assert client.get(namespace, keys, np.zeros_like(data)).found.all()
    assert client.counters.sessions == 1
    assert stopped.abort(reservation) == 1


def test_expired_reservation_is_quarantined_until_acknowledged(start_node: Start, connect: Connect) -> None:
    node = start_node(ping_interval_s=60.0)  # so that no ping acknowledges it
    client = connect(node)
    namespace = client.register(namespace_spec())
    keys, data = random_blocks(3, [3])
    reservation = client.reserve(namespace, keys, ttl_s=0.05)
    assert eventually(lambda: client.stats().quarantined == 3)
    digests = np.zeros((3, 4), np.uint64)
    with pytest.raises(KvpoolError, match="expired"):
        client.commit(reservation, np.arange(3), digests)
    assert client.put(namespace, keys, data).stored.all(), "the keys are free, only the slots are not"
    client.abort(reservation)
    assert client.stats().quarantined == 0


@pytest.mark.parametrize("channel", ["shm", "tcp"])
def test_slots_come_back_when_the_reply_to_the_reservation_is_lost(
    start_node: Start, connect: Connect, channel: str
) -> None:
    """Nobody can give back what nobody knows of; nor can anybody write there, and the client's pings say so."""
    node = start_node(ping_interval_s=1.0)
    client, other = connect(node, channels=(channel,)), connect(node)
    namespace = client.register(namespace_spec())
    keys, data = random_blocks(20, [8])
    forgotten = client.reserve(namespace, keys, ttl_s=0.3)
    assert eventually(lambda: other.stats().expired == 1)
    assert eventually(lambda: other.stats().quarantined == 0), other.stats()
    assert other.stats().bytes_used == 0 and held(other.stats()) == {"sessions": 2}
    # Whoever knew of it after all finds it expired, whatever he does.
    with pytest.raises(ReservationExpired):
        client.write(forgotten, np.arange(20), data)
    with pytest.raises(ReservationExpired):
        client.commit(forgotten, np.arange(20), np.zeros((20, 4), np.uint64))
    assert client.abort(forgotten) == 0
    assert client.put(namespace, keys, data).stored.all()
    assert client.counters.sessions == 1


def test_slots_stay_in_quarantine_while_they_are_written(
    start_node: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that takes longer than its reservation lives is named in each ping until it has ended."""
    begun, go_on, opener = threading.Event(), threading.Event(), OPENERS["shm"]

    class SlowChannel(ShmChannel):
        def write(self, *args: Any, **options: Any) -> Any:
            begun.set()
            assert go_on.wait(100)
            return super().write(*args, **options)

    monkeypatch.setitem(OPENERS, "shm", SlowChannel.open)
    node = start_node(ping_interval_s=1.0)
    client = connect(node, channels=("shm",))
    monkeypatch.setitem(OPENERS, "shm", opener)
    other = connect(node)
    namespace = client.register(namespace_spec())
    other.register(namespace_spec())
    keys, data = random_blocks(3, [9])
    # The write has to begin before it is over.
    reservation = client.reserve(namespace, keys, ttl_s=5.0)
    errors: list[KvpoolError] = []

    def write() -> None:
        try:
            client.write(reservation, np.arange(3), data, deadline_s=100.0)
        except KvpoolError as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert begun.wait(60)
        assert eventually(lambda: other.stats().quarantined == 3)
        # Expires later and comes back: so there was a ping that could have freed the first one too.
        client.reserve(namespace, random_blocks(5, [10])[0], ttl_s=0.1)
        assert eventually(lambda: other.stats().expired == 2)
        assert eventually(lambda: other.stats().quarantined == 3)
        fresh = random_blocks(3, [9, 1])[1]
        assert other.put(namespace, keys, fresh).stored.all()
        assert other.stats().quarantined == 3
    finally:
        go_on.set()
        thread.join(60)
    assert not errors
    assert eventually(lambda: other.stats().quarantined == 0)
    out = np.zeros_like(fresh)
    assert other.get(namespace, keys, out).found.all() and np.array_equal(out, fresh)
    with pytest.raises(ReservationExpired):
        client.write(reservation, np.arange(3), data)


def test_abort_waits_for_a_tcp_write_under_way(start_node: Start, connect: Connect) -> None:
    """A late writer can't touch slots that were given to somebody else: its connection is gone before they are."""
    node = start_node()
    client = connect(node, channels=("tcp",))
    namespace = client.register(namespace_spec())
    keys, data = random_blocks(4, [4])
    reservation = client.reserve(namespace, keys)
    slots, session = reservation.slots, reservation.session
    offers = session.stub.OpenChannel(pb.OpenChannelRequest(session_id=session.id, channels=["tcp"]), timeout=60).offers
    channel = TcpChannel.open(dict(offers[0].parameters))
    deadline = wire.Deadline(60)
    with channel._connection(deadline) as connection:
        head = wire.REQUEST.pack(wire.Operation.WRITE, 4, reservation.id, 0, data.nbytes)
        packed = wire.pack_descriptors(slots.offsets, slots.sizes, slots.generations)
        wire.send_all(connection.sock, [head, *packed, memoryview(data[0])], deadline)
        client.abort(reservation)
        other = connect(node)
        other.register(namespace_spec())
        assert other.put(namespace, keys, data).stored.all()
        with pytest.raises(KvpoolError):
            for _ in range(100):
                wire.send_all(connection.sock, [bytes(1 << 20)], deadline)
            wire.receive_bytes(connection.sock, 1, deadline)
    assert other.get(namespace, keys, np.zeros_like(data)).found.all()
    channel.close()


def test_eviction_makes_room_but_not_from_what_is_held(start_node: Start, connect: Connect) -> None:
    node = start_node(memory_bytes=8 << 20)
    client = connect(node)
    namespace = client.register(namespace_spec())
    keys, data = random_blocks(400, [5])
    for first in range(0, 400, 50):
        assert client.put(namespace, keys[first : first + 50], data[first : first + 50]).stored.all()
    assert client.stats().evictions > 0
    found = client.lookup(namespace, keys)
    assert not found[:50].any() and found[-50:].all(), "the oldest go first"
    held_keys = keys[-50:]
    assert eventually(lambda: client.stats().leases == 0)
    reservation = client.reserve(namespace, random_blocks(500, [6])[0])
    assert (reservation.status == 4).any()
    with pytest.raises(NoSpace):
        client.reserve(namespace, random_blocks(1, [7])[0])
    assert not client.put(namespace, random_blocks(1, [7])[0], data).stored.any(), "no space is a result of put"
    client.abort(reservation)
    assert not client.lookup(namespace, held_keys).any()


def test_a_failed_start_names_the_flag(tmp_path: Path, start_node: Start, capsys: pytest.CaptureFixture[str]) -> None:
    def message(**options: str) -> str:
        flags = {"listen": "127.0.0.1:0", "segment-dir": str(tmp_path), "memory-bytes": str(8 << 20), **options}
        assert main([text for name, value in flags.items() for text in (f"--{name}", value)]) == 1
        return capsys.readouterr().err

    assert "--memory" in message(**{"memory-bytes": str(1 << 50)})
    assert "--memory" in message(**{"memory-bytes": "10"})
    assert "--segment-dir" in message(**{"segment-dir": str(tmp_path / "missing")})
    node = start_node(id="one")
    assert "--id" in message(id="one")
    assert "--listen" in message(listen=node.address, id="two")
    assert "--data-listen" in message(**{"data-listen": node.facts["data_address"], "id": "two"})
    assert [p.name for p in tmp_path.glob("*.segment")] == [node.segment.name], "a failed start leaves nothing"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clean_end(start_node: Start, connect: Connect, number: signal.Signals) -> None:
    node = start_node()
    client = connect(node)
    assert client.stats().bytes_total
    node.send(number)
    assert node.process.wait(END_TIMEOUT_S) == 0
    assert not node.segment.exists()
    assert eventually(lambda: not client.connected)
    with pytest.raises(Unavailable):
        client.stats()


def test_writer_locks_go(start_node: Start, connect: Connect) -> None:
    def locks(pid: int) -> int:
        return len(list(lock_folder().glob(f"{PREFIX}{pid}-*")))

    # A client that was closed lets go of its lock when its thread has ended.
    assert eventually(lambda: locks(os.getpid()) == 0)
    node = start_node()
    client = connect(node)
    client.stats()
    with writer(node, "shm", 1) as process:
        assert locks(os.getpid()) == locks(process.pid) == 1
        process.kill()
        assert eventually(lambda: held(client.stats()) == ONLY_ME)
    client.close()
    assert eventually(lambda: locks(os.getpid()) + locks(process.pid) == 0)


def test_waits_of_an_ended_session_end(start_node: Start, connect: Connect) -> None:
    node = start_node()
    client = connect(node)
    namespace = client.register(namespace_spec())
    waiting = client.wait(namespace, random_blocks(2, [8])[0], deadline_s=500)
    client._keeper.forget(client._session())
    with pytest.raises(Unavailable):
        list(waiting)
    assert eventually(lambda: connect(node).stats().waiters == 0)


def test_metrics(start_node: Start, connect: Connect) -> None:
    port = free_port()
    client = connect(start_node(metrics_port=port, id="metered"), channels=("tcp",))
    namespace = client.register(namespace_spec())
    keys, data = random_blocks(3, [9])
    client.put(namespace, keys, data)
    client.get(namespace, keys, np.zeros_like(data))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    assert 'kvpool_source_blocks{source="metered"} 3.0' in lines
    assert 'kvpool_source_hits_total{source="metered"} 3.0' in lines


def test_a_session_that_fails_unexpectedly_is_opened_again(
    start_node: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The life line's thread outlives what nobody thought of: a client is never cut off for good."""
    node = start_node()
    opener, raised, healed = OPENERS["shm"], list[type[Exception]](), threading.Event()

    def failing(parameters: Mapping[str, str]) -> Channel:
        if healed.is_set():
            return opener(parameters)
        raised.append(AssertionError if len(raised) % 2 else RuntimeError)
        raise raised[-1]("made")

    monkeypatch.setitem(OPENERS, "shm", failing)
    client = connect(node, channels=("shm",))
    with pytest.raises(Unavailable, match="made"):
        client.info()
    assert eventually(lambda: {AssertionError, RuntimeError} <= set(raised)), raised
    healed.set()
    assert eventually(lambda: opened(client))


def opened(client: PoolClient) -> bool:
    try:
        return client.info().source_id != ""
    except Unavailable:
        return False
