"""A node with an SSD tier: cold blocks go down, wanted ones come up, removed ones never come back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvpool.client import PoolClient
from tests.pool.node_process import BLOCK_BYTES, NodeProcess, eventually, held, namespace_spec, random_blocks

Start = Callable[..., NodeProcess]
Connect = Callable[..., PoolClient]
SPEC = namespace_spec("ssd")
MIB = 1 << 20
#: Twice what the memory of these nodes holds.
COUNT = 2 * 16 * MIB // BLOCK_BYTES
#: For reads that are to have what they ask for, however slow the disk is.
PATIENT = {"ttl_s": 100.0, "promote_s": 60.0}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def with_ssd(start: Start, disk: Path, **options: object) -> NodeProcess:
    return start(memory_bytes=16 * MIB, ssd_dir=str(disk), ssd_bytes=256 * MIB, ssd_demote_from=0.3, **options)


def fill(client: PoolClient, namespace: bytes, keys: np.ndarray, data: np.ndarray) -> None:
    """In steps, each of which waits until what is cold has been copied down, so that nothing is lost."""
    step, capacity = 64, int(0.3 * 16 * MIB) // BLOCK_BYTES
    for first in range(0, len(keys), step):
        assert client.put(namespace, keys[first : first + step], data[first : first + step]).stored.all()
        total = min(first + step, len(keys))
        assert eventually(lambda total=total: client.stats().ssd.records >= total - capacity - step)
    # What memory alone has may be lost when it makes room for others.
    assert eventually(lambda: client.stats().ssd.records >= len(keys))


@pytest.mark.parametrize("channel", ["shm", "tcp"])
def test_more_than_memory_holds_comes_back(start_node: Start, connect: Connect, disk: Path, channel: str) -> None:
    client = connect(with_ssd(start_node, disk), channels=(channel,))
    namespace = client.register(SPEC)
    keys, data = random_blocks(COUNT, [1])
    fill(client, namespace, keys, data)
    stats = client.stats()
    assert stats.ssd.state == "ok" and stats.evictions > 0 and stats.ssd.demotions > 0
    assert client.lookup(namespace, keys).all(), "in memory or on the SSD"
    out = np.zeros((64, BLOCK_BYTES), np.uint8)
    for first in range(0, COUNT, 64):
        got = client.get(namespace, keys[first : first + 64], out, **PATIENT)
        assert got.found.all() and np.array_equal(out, data[first : first + 64])
    assert client.stats().ssd.hits > 0
    assert not client.get(namespace, keys[:64], out, promote_s=0).found.all(), "nobody waited for the SSD"
    assert eventually(lambda: held(client.stats()).keys() <= {"sessions"})


def test_the_ssd_outlives_memory(start_node: Start, connect: Connect, disk: Path) -> None:
    node = with_ssd(start_node, disk)
    client = connect(node)
    namespace, domain = client.register(SPEC), client.register_objects("d")
    client.put_objects(domain, ["early"], [b"bird" * 1000])
    keys, data = random_blocks(COUNT, [2])
    fill(client, namespace, keys, data)
    below = client.stats().ssd.records
    client.close()
    node.kill()
    node.segment.unlink()  # as after a reboot
    client = connect(with_ssd(start_node, disk))
    client.register(SPEC)
    client.register_objects("d")
    stats = client.stats()
    assert stats.adopted == 0 and stats.ssd.records >= below
    out = np.zeros_like(data)
    got = client.get(namespace, keys[:128], out, **PATIENT)
    assert got.found.sum() >= min(128, below - COUNT // 2)
    assert np.array_equal(out[:128][got.found], data[:128][got.found])
    assert client.lookup_objects(domain, ["early", "late"]).tolist() == [True, False]
    assert client.object_sizes(domain, ["late", "early"]).tolist() == [0, 4000]
    assert client.object_sizes(domain, ["late", "early"], ask=False).tolist() == [0, 0], "it is on the SSD alone"
    early = client.get_objects(domain, ["early"], **PATIENT).values[0]
    assert early is not None and early.tobytes() == b"bird" * 1000


def test_what_is_removed_stays_removed(start_node: Start, connect: Connect, disk: Path) -> None:
    node = with_ssd(start_node, disk)
    client = connect(node)
    namespace, domain = client.register(SPEC), client.register_objects("d")
    client.put_objects(domain, ["a", "b"], [b"old" * 2000, b"other" * 2000])
    keys, data = random_blocks(COUNT, [3])
    fill(client, namespace, keys, data)
    assert client.remove(namespace, keys[:10]) == 10
    assert client.remove_objects(domain, ["a"]) == 1
    out = np.zeros_like(data)
    assert not client.get(namespace, keys[:10], out, **PATIENT).found.any()
    assert client.put_objects(domain, ["a"], [b"new" * 3000]).stored.all()
    assert client.get_objects(domain, ["a", "b"], **PATIENT).values[0].tobytes() == b"new" * 3000
    client.close()
    node.kill()
    node.segment.unlink()
    client = connect(with_ssd(start_node, disk))
    client.register(SPEC)
    client.register_objects("d")
    assert not client.lookup(namespace, keys[:10]).any()
    value = client.get_objects(domain, ["a"], **PATIENT).values[0]
    assert value is None or value.tobytes() == b"new" * 3000
    assert client.remove_all(namespace) > 0
    assert not client.lookup(namespace, keys).any()


def test_what_could_not_be_read_once_does_not_come_back(start_node: Start, connect: Connect, disk: Path) -> None:
    """A byte on the disk is bad, and later good again: meanwhile the object was put anew, or removed."""
    options = {"ssd_demote_from": 0.0, "memory_bytes": 16 * MIB, "ssd_dir": str(disk), "ssd_bytes": 256 * MIB}
    node = start_node(**options)
    client = connect(node)
    domain = client.register_objects("d")
    names = ["put again", "removed", "removed/by prefix"]
    assert client.put_objects(domain, names, [b"OLD!" * 5000] * 3).stored.all()
    assert eventually(lambda: client.stats().ssd.records == 3)
    evict(node, domain, names)
    segment = next(disk.glob("*/seg-*"))
    places = flip(segment, b"OLD!" * 100)
    assert client.get_objects(domain, names, **PATIENT).values == [None] * 3
    assert client.put_objects(domain, ["put again"], [b"NEW!" * 5000]).stored.all()
    client.remove_objects(domain, ["removed"])
    client.remove_objects(domain, prefix="removed/")
    client.close()
    node.kill()
    node.segment.unlink()  # as after a reboot
    assert flip(segment, b"", places) == places
    client = connect(start_node(**options))
    client.register_objects("d")
    for value in client.get_objects(domain, names, **PATIENT).values:
        assert value is None or value.tobytes() == b"NEW!" * 5000


def evict(node: NodeProcess, namespace: bytes, names: list[str]) -> None:
    from kvpool.core.hashing import object_keys
    from kvpool.service.rpc import make_channel
    from kvpool.service.source_calls import key_list
    from kvpool.v1 import source_admin_pb2, source_admin_pb2_grpc

    request = source_admin_pb2.EvictRequest(namespace_id=namespace, keys=key_list(object_keys(namespace, names), 0, 0))
    evicted = 0
    with make_channel(node.address) as channel:
        admin = source_admin_pb2_grpc.SourceAdminStub(channel)

        def all_gone() -> bool:
            # What is just being copied is held, and not evicted.
            nonlocal evicted
            evicted += admin.Evict(request, timeout=60).blocks
            return evicted == len(names)

        assert eventually(all_gone), evicted


def flip(path: Path, pattern: bytes, places: list[int] | None = None) -> list[int]:
    """Changes a bit of each record that holds a pattern, or of bytes at known places. Returns where."""
    data = bytearray(path.read_bytes())
    if places is None:
        places, at = [], data.find(pattern)
        while at >= 0:
            places.append(at)
            at = data.find(pattern, at + 16_384)
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(bytes([data[place] ^ 1]))
        file.flush()
        os.fsync(file.fileno())
    assert len(places) >= 3
    return places


def test_a_disk_that_can_not_be_used_costs_the_tier_only(start_node: Start, connect: Connect, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    client = connect(start_node(ssd_dir=str(blocked), ssd_bytes=256 * MIB))
    namespace = client.register(SPEC)
    keys, data = random_blocks(10, [4])
    assert client.put(namespace, keys, data).stored.all()
    assert client.stats().ssd.state in ("off", "failed") and client.stats().ssd.reason
