"""Real processes with three schedulers: one is killed under load, Redis is killed, and no request is lost."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from kvpool.cli.kvctl import Cluster
from kvpool.cli.local import LocalCluster, LocalOptions
from kvpool.cli.processes import Process
from tests.e2e.conftest import Running, eventually, options, prompts, reference
from tests.scheduler_log.redis_process import REDIS, RedisProcess

# Eight processes: on a busy machine their start alone takes a minute.
pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]
Cut = Callable[[int, int], list[int]]
Generate = Callable[[list[int], int], list[int]]
SCHEDULERS = 3

__all__ = ["prompts", "reference"]  # fixtures


class SeveralLocal(LocalCluster):
    """Three schedulers instead of one."""

    def __init__(self, redis: RedisProcess, chosen: LocalOptions, folder: Path) -> None:
        super().__init__(chosen, folder)
        self.redis = redis
        self.clients: dict[str, Cluster] = {}

    def _steps(self) -> Iterator[list[Process]]:
        start = self.supervisor.start
        yield [
            start(
                f"scheduler-{i}",
                ["scheduler", "--listen", "127.0.0.1:0", "--id", f"scheduler-{i}", "--redis", self.redis.url],
            )
            for i in range(SCHEDULERS)
        ]
        node = ["node", "--id", "node-several", "--listen", "127.0.0.1:0", "--scheduler", self.scheduler_address]
        yield [start("node", [*node, "--memory", str(128 << 20), "--segment-dir", self.options.segment_dir])]
        yield [*(start(f"worker-{i}", self._worker(f"worker-{i}", "both")) for i in range(2)), self._gateway(0)]

    @property
    def scheduler_address(self) -> str:
        return ",".join(self.address(f"scheduler-{i}") for i in range(SCHEDULERS))

    def each(self) -> list[Cluster]:
        """A client of each scheduler that runs."""
        names = [f"scheduler-{i}" for i in range(SCHEDULERS)]
        addresses = [self.address(name) for name in names if self.process(name).running]
        for address in addresses:
            if address not in self.clients:
                self.clients[address] = Cluster(address)
        return [self.clients[address] for address in addresses]

    def views(self) -> list[tuple[list[str], list[tuple[str, int, str]]]]:
        """Of each scheduler that runs: instances that are alive; sources with the number of their blocks."""
        return [
            (
                sorted(i["info"]["instance_id"] for i in cluster.instances() if i["state"] == "alive"),
                sorted((s["source"]["source_id"], s["blocks"], s["state"]) for s in cluster.sources()),
            )
            for cluster in self.each()
        ]

    def all_know(self) -> bool:
        """Whether each scheduler that runs knows the same: both workers, their caches and the node, alive."""
        try:
            views = self.views()
        except grpc.RpcError:
            return False
        instances, sources = views[0]
        alive = [source for source in sources if source[2] == "alive"]
        return instances == ["worker-0", "worker-1"] and len(alive) == 3 and all(view == views[0] for view in views)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if REDIS is None:
        pytest.skip("redis-server is not installed")
    import torch

    # The plain model's threads would wait for each other on a machine that is busy with eight processes.
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("several")
    redis = RedisProcess(folder)
    redis.start()
    try:
        local = SeveralLocal(redis, options(), folder / "logs")
        local.start()
        running = Running(local)
        try:
            eventually(local.all_know, "three schedulers know two workers and a node")
            yield running
        finally:
            running.http.close()
            local.stop()
    finally:
        redis.kill()


def several(cluster: Running) -> SeveralLocal:
    assert isinstance(cluster.local, SeveralLocal)
    return cluster.local


def nothing_held(cluster: Running) -> None:
    def nothing() -> bool:
        try:
            held = [c.status() for c in several(cluster).each()]
        except grpc.RpcError:
            return False
        return all(s["active_requests"] == 0 and s["kv_tokens_reserved"] == 0 for s in held)

    eventually(nothing, "no scheduler holds anything")


def under_load(cluster: Running, prompts: Cut, reference: Generate, first: int, strike: Callable[[], None]) -> None:
    """Sixteen requests, six at a time; in the middle something happens; each answer is right."""
    asked = [prompts(first + i, 200 + 60 * (i % 5)) for i in range(16)]
    struck = threading.Event()

    def ask(index: int) -> list[int]:
        answer = cluster.complete(asked[index], 12)
        if index == 4:
            strike()
            struck.set()
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(len(asked))))
    assert struck.is_set()
    for prompt, tokens in zip(asked, answers, strict=True):
        assert tokens == reference(prompt, 12)


def test_a_scheduler_is_killed_under_load(cluster: Running, prompts: Cut, reference: Generate) -> None:
    """The first of the list: the gateway asks it, and it has all life lines."""
    local = several(cluster)
    under_load(cluster, prompts, reference, 0, local.process("scheduler-0").kill)
    eventually(local.all_know, "the two that are left know all")
    nothing_held(cluster)
    local.restart("scheduler-0")
    eventually(local.all_know, "the one that came late knows all")
    # What the killed one placed was known to the others: the whole prefix is found again.
    prompt = prompts(2, 320)
    answer = cluster.complete(prompt, 4)
    assert answer["choices"][0]["token_ids"] == reference(prompt, 4)
    assert int(answer["usage"]["prompt_tokens_details"]["cached_tokens"]) >= 256
    # Whoever placed it explains it.
    assert cluster.control.explain(answer["id"])["choice"]["placement"]
    nothing_held(cluster)


def test_redis_is_killed_under_load(cluster: Running, prompts: Cut, reference: Generate) -> None:
    local = several(cluster)
    under_load(cluster, prompts, reference, 20, local.redis.kill)
    eventually(lambda: all(not c.status()["event_log"]["up"] for c in local.each()), "they say that it is down")
    prompt = prompts(60, 300)
    assert cluster.complete(prompt, 8)["choices"][0]["token_ids"] == reference(prompt, 8)
    local.redis.start()
    eventually(local.all_know, "they agree again")
    eventually(lambda: all(c.status()["event_log"]["up"] for c in local.each()), "they say that it is up")
    nothing_held(cluster)
