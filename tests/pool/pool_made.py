"""A whole pool of real processes: a scheduler, and nodes that may say that they are on hosts of their own."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from kvpool.cluster import ClusterClient
from tests.pool.node_process import END_TIMEOUT_S, START_TIMEOUT_S, NodeProcess, eventually

_SCHEDULER = """
import json
from scheduler.service.server import SchedulerServerConfig, run_scheduler
run_scheduler(SchedulerServerConfig(listen="127.0.0.1:0"), on_ready=lambda facts: print(json.dumps(facts), flush=True))
"""
_NODE = """
import sys
from kvpool.service import host
host.host_id = lambda: sys.argv[1]
from kvpool.service.node import main
sys.exit(main(sys.argv[2:]))
"""


class HostedNode(NodeProcess):
    """A node process that says that it is on the host that is named."""

    def __init__(self, folder: Path, host: str, **options: object) -> None:
        settings = {"listen": "127.0.0.1:0", "memory_bytes": 32 << 20, "segment_dir": str(folder), **options}
        flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        log = folder / f"{settings.get('id', 'node')}.log"
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _NODE, host, *flags], stdout=subprocess.PIPE, stderr=self._log
        )
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], START_TIMEOUT_S)[0]
        line = self.process.stdout.readline() if ready else b""
        assert line, f"the node did not start: {log.read_text()}"
        self.facts = json.loads(line)

    @property
    def name(self) -> str:
        return str(self.facts["source"])


class SchedulerProcess:
    """A scheduler, for its directory."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", _SCHEDULER], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], START_TIMEOUT_S)[0]
        line = self.process.stdout.readline() if ready else b""
        assert line, "the scheduler did not start"
        self.address = str(json.loads(line)["address"])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(END_TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Pool:
    """A scheduler and its nodes, by name."""

    def __init__(self, folder: Path, scheduler: SchedulerProcess) -> None:
        self._folder, self.scheduler = folder, scheduler
        self.nodes: dict[str, HostedNode] = {}

    @property
    def address(self) -> str:
        return self.scheduler.address

    def start(self, hosts: Sequence[str], **options: object) -> list[HostedNode]:
        """Starts nodes on these hosts, all at once; their names go on from those that there are."""
        first = len(self.nodes)

        def one(number: int) -> HostedNode:
            host = hosts[number - first]
            return HostedNode(self._folder, host, id=f"node-{number}", scheduler=self.address, **options)

        with ThreadPoolExecutor(len(hosts)) as threads:
            made = list(threads.map(one, range(first, first + len(hosts))))
        self.nodes |= {node.name: node for node in made}
        return made

    def joined(self, client: ClusterClient, count: int) -> bool:
        """Whether a client comes to know so many nodes."""

        def there() -> bool:
            client.refresh()
            return len(client.nodes()) == count

        return eventually(there)

    def stop(self) -> None:
        for node in self.nodes.values():
            if node.process.poll() is None:
                node.kill()
        self.scheduler.kill()


@contextmanager
def running_pool(folder: Path, hosts: Sequence[str], **options: object) -> Iterator[Pool]:
    pool = Pool(folder, SchedulerProcess())
    try:
        pool.start(hosts, **options)
        yield pool
    finally:
        pool.stop()
