"""Event log and announcer, against the scheduler's own Directory service."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from kvpool.client import PoolClient
from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.ids import Fidelity, KeyArray, Tier
from kvpool.service.announcer import Announcer, Snapshot, SourceFacts
from kvpool.service.event_log import EventLog
from kvpool.service.rpc import make_channel
from kvpool.v1 import common_pb2, directory_pb2, directory_pb2_grpc
from scheduler.service.server import SchedulerServer, SchedulerServerConfig
from tests.pool.node_process import NodeProcess, eventually, free_port, namespace_spec, random_blocks

# ---------------------------------------------------------------- event log


def stored(*numbers: int) -> BlockChange:
    return BlockChange(ChangeKind.STORED, b"".join(n.to_bytes(16, "little") for n in numbers))


def removed(*numbers: int) -> BlockChange:
    return BlockChange(ChangeKind.REMOVED, b"".join(n.to_bytes(16, "little") for n in numbers))


def test_batches_are_numbered_and_taken_in_order() -> None:
    log = EventLog()
    assert [log.append([stored(i)]) for i in range(1, 6)] == [1, 2, 3, 4, 5]
    assert log.take(2) == [stored(1), stored(2)]
    assert log.take(100) == [stored(3), stored(4), stored(5)]
    assert log.take(100) == []
    log.check_invariants()


def test_overflow_asks_for_a_snapshot() -> None:
    log = EventLog(keys_max=3)
    for i in range(1, 5):
        log.append([stored(i)])
        log.check_invariants()
    assert log.take(10) is None and log.overflows == 1
    number = log.append([stored(5)])
    log.snapshot_taken(number - 1)
    assert log.take(10) == [stored(5)]
    log.check_invariants()


def test_snapshot_forgets_what_it_holds() -> None:
    log = EventLog()
    for i in range(1, 5):
        log.append([stored(i)])
    log.snapshot_taken(2)
    assert log.take(10) == [stored(3), stored(4)]


def test_a_snapshot_older_than_the_overflow_does_not_help() -> None:
    log = EventLog(keys_max=2)
    for i in range(1, 4):
        log.append([stored(i)])
    log.snapshot_taken(1)
    assert log.take(10) is None
    log.snapshot_taken(3)
    assert log.take(10) == []


# ---------------------------------------------------------------- announcer


class Scheduler:
    """A scheduler's server in a thread of this process."""

    def __init__(self, listen: str = "127.0.0.1:0") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = SchedulerServer(SchedulerServerConfig(listen=listen))
        self._run(self._server.startup())
        self.address = f"127.0.0.1:{self._server.port}"
        self._channel = make_channel(self.address)
        self.directory = directory_pb2_grpc.DirectoryStub(self._channel)

    def _run(self, coroutine: object) -> None:
        future: Future[None] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)  # type: ignore[arg-type]
        future.result(60)

    def covered(self, keys: KeyArray) -> int:
        request = directory_pb2.MatchRequest(keys=[common_pb2.KeyList(keys=keys.tobytes())])
        return int(self.directory.Match(request, timeout=60).covered)

    def sources(self) -> dict[str, directory_pb2.SourceStatus]:
        reply = self.directory.ListSources(directory_pb2.ListSourcesRequest(), timeout=60)
        return {s.source.source_id: s for s in reply.sources}

    def stop(self) -> None:
        self._channel.close()
        self._run(self._server.shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()


@pytest.fixture
def start_scheduler() -> Iterator[Callable[..., Scheduler]]:
    started: list[Scheduler] = []

    def start(listen: str = "127.0.0.1:0") -> Scheduler:
        started.append(Scheduler(listen))
        return started[-1]

    yield start
    for one in started:
        if one._thread.is_alive():
            one.stop()


class Held:
    """What a source holds, as its core would know it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.numbers: dict[int, None] = {}
        self.announcer: Announcer | None = None

    def change(self, change: BlockChange) -> None:
        keys = [int.from_bytes(change.keys[i : i + 16], "little") for i in range(0, len(change.keys), 16)]
        with self.lock:
            for key in keys:
                if change.kind is ChangeKind.STORED:
                    self.numbers[key] = None
                else:
                    self.numbers.pop(key, None)
            assert self.announcer is not None
            self.announcer.publish([change])

    def snapshot(self) -> Snapshot:
        with self.lock:
            assert self.announcer is not None
            return [(keys_of(*self.numbers), Fidelity.EXACT)], self.announcer.last_number

    def usage(self) -> tuple[int, int]:
        return 100 * len(self.numbers), len(self.numbers)


def keys_of(*numbers: int) -> KeyArray:
    packed = b"".join(n.to_bytes(16, "little") for n in numbers)
    return np.frombuffer(packed, np.uint8).reshape(-1, 16)


@pytest.fixture
def announce() -> Iterator[Callable[[str], Held]]:
    made: list[Announcer] = []

    def start(address: str) -> Held:
        held = Held()
        facts = SourceFacts("worker-0.hbm", epoch=1, tier=Tier.HBM, bytes_total=1000)
        held.announcer = Announcer(address, facts, snapshot=held.snapshot, usage=held.usage)
        made.append(held.announcer)
        held.announcer.start()
        return held

    yield start
    for one in made:
        one.close()


def test_directory_follows(start_scheduler: Callable[..., Scheduler], announce: Callable[[str], Held]) -> None:
    scheduler = start_scheduler()
    held = announce(scheduler.address)
    assert held.announcer is not None and held.announcer.wait_attached(60)
    held.change(stored(1, 2, 3))
    assert eventually(lambda: scheduler.covered(keys_of(1, 2, 3, 4)) == 3)
    held.change(removed(2))
    held.change(stored(4))
    assert eventually(lambda: scheduler.covered(keys_of(1, 2)) == 1)
    assert eventually(lambda: scheduler.covered(keys_of(3, 4)) == 2)
    assert eventually(lambda: scheduler.sources()["worker-0.hbm"].bytes_used == 300)
    held.announcer.close()
    assert eventually(lambda: scheduler.sources() == {}), "the end of the life line is the end of the source"


def test_a_restarted_directory_is_told_everything(
    start_scheduler: Callable[..., Scheduler], announce: Callable[[str], Held]
) -> None:
    scheduler = start_scheduler(f"127.0.0.1:{free_port()}")
    held = announce(scheduler.address)
    assert held.announcer is not None and held.announcer.wait_attached(60)
    held.change(stored(*range(1, 200)))
    scheduler.stop()
    assert eventually(lambda: not held.announcer.attached)
    held.change(stored(*range(200, 300)))
    held.change(removed(150))
    again = start_scheduler(scheduler.address)
    assert eventually(lambda: again.covered(keys_of(*range(1, 300))) == 149)
    assert again.covered(keys_of(*range(151, 300))) == 149
    held.change(stored(150))
    assert eventually(lambda: again.covered(keys_of(*range(1, 300))) == 299)
    # More than once again where a first answer took its time.
    assert held.announcer.attachments >= 2


def test_overflow_is_caught_up_by_snapshot(
    start_scheduler: Callable[..., Scheduler], announce: Callable[[str], Held]
) -> None:
    scheduler = start_scheduler()
    held = announce(scheduler.address)
    assert held.announcer is not None and held.announcer.wait_attached(60)
    held.announcer._log._keys_max = 50
    for first in range(1, 5001, 10):
        held.change(stored(*range(first, first + 10)))
    assert eventually(lambda: scheduler.covered(keys_of(*range(1, 5001))) == 5000)
    held.change(stored(6000))
    assert eventually(lambda: scheduler.covered(keys_of(6000)) == 1)


def test_a_nodes_blocks_are_in_the_directory(
    start_scheduler: Callable[..., Scheduler],
    start_node: Callable[..., NodeProcess],
    connect: Callable[..., PoolClient],
) -> None:
    scheduler = start_scheduler()
    node = start_node(scheduler=scheduler.address, id="node-7")
    client = connect(node)
    namespace = client.register(namespace_spec())
    keys, data = random_blocks(20, [77])
    client.put(namespace, keys[:10], data)
    assert eventually(lambda: scheduler.covered(keys) == 10)
    client.put(namespace, keys, data)
    assert eventually(lambda: scheduler.covered(keys) == 20)
    status = scheduler.sources()["node-7"]
    assert status.source.address == node.address and status.source.tier == Tier.DRAM
    assert eventually(lambda: scheduler.sources()["node-7"].state == "alive")
    client.remove(namespace, keys[:1])
    assert eventually(lambda: scheduler.covered(keys) == 0)
    node.kill()
    assert eventually(lambda: "node-7" not in scheduler.sources())
