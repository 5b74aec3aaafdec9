"""A node that ends takes its memory back when it is started again: killed, or told to keep it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvpool.client import PoolClient
from kvpool.core.errors import KvpoolError
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
SPEC = namespace_spec("restart")


@pytest.mark.parametrize("channel", ["shm", "tcp"])
def test_blocks_survive_a_killed_node_and_clients_come_back(start_node: Start, connect: Connect, channel: str) -> None:
    listen = f"127.0.0.1:{free_port()}"
    node = start_node(listen=listen)
    client = connect(node, channels=(channel,))
    namespace, domain = client.register(SPEC), client.register_objects("d")
    keys, data = random_blocks(50, [1])
    client.put(namespace, keys, data)
    client.put_objects(domain, ["name/1", "name/2"], [b"one", b"two" * 1000])
    pinned, _ = client.pin(namespace, keys[:3])
    assert pinned
    open_reservation = client.reserve(namespace, random_blocks(4, [2])[0], ttl_s=600)
    assert open_reservation.id
    epoch = client.epoch
    node.kill()

    again = start_node(listen=listen)
    assert again.facts["segment"] == node.facts["segment"]
    out = np.zeros_like(data)

    def back() -> bool:
        # Until it hears that the first process has ended, it reads what that left in memory.
        try:
            return client.epoch != epoch and bool(client.lookup(namespace, keys).all())
        except KvpoolError:
            return False

    assert eventually(back)
    got = client.get(namespace, keys, out)
    assert got.found.all() and np.array_equal(out, data)
    values = client.get_objects(domain, ["name/1", "name/2"]).values
    assert [v.tobytes() for v in values] == [b"one", b"two" * 1000]
    stats = client.stats()
    assert stats.adopted == 52 and stats.pins == 0 and stats.reservations == 0
    # What was reserved but never committed is nobody's once its writer has let go of the old session.
    assert eventually(lambda: held(client.stats()).keys() <= {"sessions"})
    assert client.put(namespace, *random_blocks(4, [2])).stored.all()


def test_slots_of_a_living_writer_are_not_given_away(start_node: Start, connect: Connect, tmp_path: Path) -> None:
    node = start_node()
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.pool.writer_process", node.address, "shm", "6"], stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"written\n"
        # Standing still, it can't notice that its session is gone, and may go on writing at any time.
        stand_still(writer)
        node.kill()
        again = start_node()
        client = connect(again)
        assert client.stats().quarantined == 6
        namespace = client.register(namespace_spec("other"))
        keys, data = random_blocks(1000, [3])
        client.put(namespace, keys, data)
        assert client.stats().quarantined == 6, "room is short, but these are not taken"
    finally:
        writer.kill()
        writer.wait(END_TIMEOUT_S)
        assert writer.stdout is not None
        writer.stdout.close()
    assert eventually(lambda: client.stats().quarantined == 0)


def test_memory_is_kept_on_request_only(start_node: Start, connect: Connect, tmp_path: Path) -> None:
    keys, data = random_blocks(5, [4])
    node = start_node(id="keeping")
    client = connect(node)
    namespace = client.register(SPEC)
    client.put(namespace, keys, data)
    client.close()
    assert node.stop() == 0 and not node.segment.exists()

    node = NodeProcess(tmp_path, id="keeping", flags=("--keep-memory",))
    client = connect(node)
    client.register(SPEC)
    client.put(namespace, keys, data)
    client.close()
    assert node.stop() == 0 and node.segment.exists()
    node = start_node(id="keeping")
    client = connect(node)
    client.register(SPEC)
    assert client.lookup(namespace, keys).all()


def test_a_corrupt_segment_costs_its_blocks_and_nothing_else(start_node: Start, connect: Connect) -> None:
    node = start_node()
    client = connect(node)
    namespace = client.register(SPEC)
    keys, data = random_blocks(20, [5])
    client.put(namespace, keys, data)
    places = {bytes(b.key): b.offset for b in client.list_blocks()}
    client.close()
    node.kill()
    with node.segment.open("r+b") as file:
        data_offset = node.segment.stat().st_size - (32 << 20)
        for key in keys[:5]:
            file.seek(data_offset + places[key.tobytes()] + 100)
            file.write(b"\xff\x00\xff\x00")
    again = start_node()
    client = connect(again)
    client.register(SPEC)
    out = np.zeros_like(data)
    got = client.get(namespace, keys, out)
    assert got.found.tolist() == [False] * 5 + [True] * 15
    assert np.array_equal(out[5:], data[5:])
    assert eventually(lambda: client.stats().blocks == 15), "what is bad is removed"


@pytest.mark.parametrize("at", [8, 5000, (1 << 20) + 300_000])
def test_a_harmed_header_or_index_means_an_empty_start(start_node: Start, connect: Connect, at: int) -> None:
    node = start_node()
    client = connect(node)
    namespace = client.register(SPEC)
    keys, data = random_blocks(20, [6])
    client.put(namespace, keys, data)
    client.close()
    node.kill()
    with node.segment.open("r+b") as file:
        file.seek(at)
        file.write(np.random.default_rng(at).bytes(64))
    again = start_node()
    client = connect(again)
    client.register(SPEC)
    out = np.zeros_like(data)
    got = client.get(namespace, keys, out)
    for row in np.flatnonzero(got.found).tolist():
        assert np.array_equal(out[row], data[row])
    assert client.put(namespace, *random_blocks(3, [7])).stored.all()
