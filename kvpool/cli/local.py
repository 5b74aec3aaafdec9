"""A whole cluster on one machine: node, scheduler, gateway and workers as child processes, no external service."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from kvpool.channels.tls import TlsConfig
from kvpool.cli.flags import tls_environment
from kvpool.cli.processes import Interrupted, Process, ProcessFailed, Supervisor
from kvpool.service import rpc
from kvpool.service.scheduler_list import target
from kvpool.v1 import common_pb2, directory_pb2, directory_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

READY_TIMEOUT_S = 300.0
#: For one question to the scheduler meanwhile.
ASK_TIMEOUT_S = 5.0
#: Names nodes of clusters that one process supervises: node-local-<its process id>.
NODE_PREFIX = "node-local-"
DRAIN_S = 5


def remove_orphans(segment_dir: Path) -> None:
    """Removes segments of such nodes that were killed together with their supervisor: nobody would start them again."""
    for path in segment_dir.glob(f"kvpool-{NODE_PREFIX}*.segment"):
        with contextlib.suppress(OSError), path.open("rb") as segment:
            fcntl.flock(segment, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@dataclass(frozen=True)
class LocalOptions:
    """What `kvpool serve` starts. Ports of 0 are picked by the system."""

    model: str
    served_name: str = ""
    prefill: int = 1
    decode: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    scheduler_port: int = 0
    memory_bytes: int = 1 << 30
    segment_dir: str = "/dev/shm"
    kv_tokens: int = 32768
    block_tokens: int = 64
    chunk_tokens: int = 512
    batch_max: int = 32
    threads: int = 1
    dtype: str = "auto"
    device: str = "auto"
    deterministic: bool = False
    journal: str = ""
    credential: str = ""
    tls: TlsConfig | None = None
    gateways: int = 1
    ssd_dir: str = ""
    ssd_bytes: int = 0
    hbm_staging_bytes: int = 0
    metrics_port: int = 0


def metrics_ports(options: LocalOptions) -> list[int]:
    """Ports of /metrics: the scheduler's, the node's, those of prefill and then of decode workers; none without."""
    count = 2 + options.prefill + options.decode
    return list(range(options.metrics_port, options.metrics_port + count)) if options.metrics_port else []


def node_name(options: LocalOptions) -> str:
    """Of its own for each cluster of a machine; with an SSD always the same, to find the blocks again."""
    if not options.ssd_dir:
        return f"{NODE_PREFIX}{os.getpid()}"
    folder = hashlib.sha256(str(Path(options.ssd_dir).absolute()).encode()).hexdigest()
    return f"{NODE_PREFIX}ssd-{folder[:6]}"


class LocalCluster:
    """Starts the roles in order, knows their addresses, restarts them where they were."""

    def __init__(self, options: LocalOptions, log_folder: Path) -> None:
        self.options = options
        env = {"KVPOOL_CREDENTIAL": options.credential} if options.credential else {}
        self.supervisor = Supervisor(log_folder, env | tls_environment(options.tls))

    def start(self, progress: Callable[[str], None] = lambda _: None, stop: threading.Event | None = None) -> None:
        """Starts all roles and waits until each serves.

        Raises: ProcessFailed, or Interrupted once `stop` is set; either after stopping what ran.
        """
        remove_orphans(Path(self.options.segment_dir))
        try:
            for step in self._steps():
                progress(f"starting {', '.join(p.name for p in step)}")
                for process in step:
                    process.wait_ready(READY_TIMEOUT_S, stop)
            self._wait_served(stop)
        except BaseException:
            self.stop()
            raise

    def _wait_served(self, stop: threading.Event | None) -> None:
        """Node and workers join the scheduler by themselves once they are ready; the gateway then lists their model.

        All of them: where only those that prefill have joined, a request would be refused.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        options = self.options
        address = target(self.scheduler_address)
        with rpc.make_channel(address, credential=options.credential, tls=options.tls) as channel:
            while not (self._joined(channel) and self._models()):
                if stop is not None and stop.is_set():
                    raise Interrupted
                if time.monotonic() > deadline:
                    raise ProcessFailed(f"node and workers have not all joined after {READY_TIMEOUT_S:.0f} s")
                time.sleep(0.1)

    def _joined(self, channel: grpc.Channel) -> bool:
        """Whether the scheduler knows every worker as alive, and the node for what they hand over."""
        scheduler: Any = scheduler_pb2_grpc.SchedulerStub(channel)  # type: ignore[no-untyped-call]
        directory: Any = directory_pb2_grpc.DirectoryStub(channel)  # type: ignore[no-untyped-call]
        try:
            status = scheduler.GetStatus(scheduler_pb2.GetStatusRequest(), timeout=ASK_TIMEOUT_S)
            listed = directory.ListSources(directory_pb2.ListSourcesRequest(), timeout=ASK_TIMEOUT_S)
        except grpc.RpcError:  # too busy to answer
            return False
        nodes = [one for one in listed.sources if one.source.tier == common_pb2.TIER_DRAM]
        return bool(status.instances_alive == len(self._roles()) and nodes)

    def _models(self) -> list[str]:
        with urllib.request.urlopen(f"{self.gateway_url}/v1/models", timeout=READY_TIMEOUT_S) as reply:
            return [model["id"] for model in json.load(reply)["data"]]

    def _steps(self) -> Iterator[list[Process]]:
        """Groups of processes: each group starts together once the one before it serves."""
        o, start = self.options, self.supervisor.start
        scheduler = ["scheduler", "--listen", f"{o.host}:{o.scheduler_port}"]
        ports = iter(metrics_ports(o))
        metrics = {}
        for name in ("scheduler", "node", *(name for name, _ in self._roles())):
            port = next(ports, None)
            metrics[name] = ["--metrics-port", str(port)] if port is not None else []
        scheduler += [*(["--journal", o.journal] if o.journal else []), *metrics["scheduler"]]
        yield [start("scheduler", scheduler)]
        node = ["node", "--id", node_name(o), "--listen", f"{o.host}:0", "--data-listen", f"{o.host}:0"]
        node += ["--scheduler", self.scheduler_address, *metrics["node"]]
        node += ["--ssd-dir", o.ssd_dir, "--ssd-size", str(o.ssd_bytes)] if o.ssd_dir else []
        yield [start("node", [*node, "--memory", str(o.memory_bytes), "--segment-dir", o.segment_dir])]
        gateways = [self._gateway(i) for i in range(o.gateways)]
        workers = [start(name, [*self._worker(name, role), *metrics[name]]) for name, role in self._roles()]
        yield [*workers, *gateways]

    def _roles(self) -> list[tuple[str, str]]:
        """Workers by name, with their roles."""
        o = self.options
        roles = [(f"prefill-{i}", "prefill") for i in range(o.prefill)]
        return roles + [(f"decode-{i}", "decode") for i in range(o.decode)]

    def _gateway(self, index: int) -> Process:
        o = self.options
        name = "gateway" if index == 0 else f"gateway-{index}"
        port = o.port if index == 0 else 0
        return self.supervisor.start(
            name,
            [
                "gateway",
                "--id",
                name,
                "--listen",
                f"{o.host}:{port}",
                "--scheduler",
                self.scheduler_address,
                "--drain",
                str(DRAIN_S),
            ],
        )

    def _worker(self, name: str, role: str) -> list[str]:
        o = self.options
        options = {
            "--id": name, "--role": role, "--listen": f"{o.host}:0", "--scheduler": self.scheduler_address,
            "--node": self.node_address, "--model": o.model, "--served-name": o.served_name, "--kv-tokens": o.kv_tokens,
            "--block-tokens": o.block_tokens, "--chunk-tokens": o.chunk_tokens, "--batch-max": o.batch_max,
            "--threads": o.threads, "--dtype": o.dtype, "--device": o.device, "--hbm-staging": o.hbm_staging_bytes,
            "--segment-dir": o.segment_dir,
        }  # fmt: skip
        flags = [text for flag, value in options.items() if value != "" for text in (flag, str(value))]
        return ["worker", *flags, *(["--deterministic"] if o.deterministic else [])]

    def address(self, name: str) -> str:
        """Where a process that was ready listens."""
        return str(self.supervisor.processes[name].facts["address"])

    @property
    def scheduler_address(self) -> str:
        return self.address("scheduler")

    @property
    def node_address(self) -> str:
        return self.address("node")

    @property
    def gateway_url(self) -> str:
        return f"http://{self.address('gateway')}"

    def process(self, name: str) -> Process:
        return self.supervisor.processes[name]

    def restart(self, name: str, *, wait: bool = True) -> Process:
        """Starts a process that has ended again, listening where it did."""
        old = self.supervisor.processes[name]
        arguments = list(old.arguments)
        arguments[arguments.index("--listen") + 1] = old.facts["address"]
        process = self.supervisor.start(name, arguments, old.env)
        if wait:
            process.wait_ready(READY_TIMEOUT_S)
        return process

    def stop(self) -> None:
        """Clients first: nobody then sees a peer vanish, and gateways can end their streams."""
        for prefix in ("gateway", "prefill", "decode", ""):
            self.supervisor.stop(prefix)

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
