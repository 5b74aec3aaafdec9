"""The node process: one DRAM segment, served over gRPC and the data channels, announced to the scheduler."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from kvpool.channels.tcp_server import TcpDataServer
from kvpool.core.arrays import SourceArrays
from kvpool.core.errors import BadArgument, KvpoolError
from kvpool.core.ids import Tier
from kvpool.core.namespace import HASHES, GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore
from kvpool.service import rpc
from kvpool.service.announcer import Announcer, SourceFacts
from kvpool.service.block_source import BlockSourceServicer, Channels
from kvpool.service.grants import Grants
from kvpool.service.host import host_id
from kvpool.service.sessions import Sessions
from kvpool.service.source_driver import SourceDriver
from kvpool.service.writer_lock import remove_orphans
from kvpool.tiers.dram import Segment
from kvpool.v1 import block_source_pb2_grpc

log = logging.getLogger(__name__)

#: Entries of the index: enough for blocks of this size on average; smaller blocks may use it up before the bytes.
ENTRY_BYTES_MIN = 16 << 10
ENTRIES_MIN, ENTRIES_MAX = 4096, 1 << 22
SLAB_BYTES_MAX = 64 << 20
SLABS_MIN = 16
STOP_GRACE_S = 0.5
MEMORY_BYTES_MIN = 4 << 20


@dataclass(frozen=True)
class NodeConfig:
    """What a node is told at its start."""

    source_id: str = "node-0"
    listen: str = "127.0.0.1:7701"
    data_listen: str = "127.0.0.1:0"
    scheduler: str = ""  # empty: announced to nobody
    memory_bytes: int = 1 << 30
    segment_dir: str = "/dev/shm"
    metrics_port: int = 0  # 0: no HTTP metrics
    credential: str = ""
    ping_interval_s: float = 2.0  # clients ping so often; after five intervals without one a session is closed


class NodeServer:
    """startup -> main_loop -> shutdown, all in one event loop."""

    def __init__(self, config: NodeConfig) -> None:
        if not config.source_id.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise BadArgument(f"a node can't be named {config.source_id!r}", hint="use letters, digits, '-', '_', '.'")
        if config.memory_bytes < MEMORY_BYTES_MIN:
            raise BadArgument(f"{config.memory_bytes} bytes of memory are too few", hint="--memory 64MiB or more")
        self.config = config
        self.epoch = time.time_ns()
        self.address = ""
        self._cleanup = contextlib.AsyncExitStack()

    async def startup(self) -> None:
        """Raises: KvpoolError if the memory or an address can't be had; nothing is left behind then."""
        try:
            await self._startup()
        except BaseException:
            await self._cleanup.aclose()
            raise

    async def _startup(self) -> None:
        config = self.config
        entries = min(max(config.memory_bytes // ENTRY_BYTES_MIN, ENTRIES_MIN), ENTRIES_MAX)
        # Allocating takes seconds for a large segment; nothing else runs in this loop yet.
        self.segment = Segment.create(
            Path(config.segment_dir),
            config.source_id,
            data_bytes=config.memory_bytes,
            index_bytes=SourceArrays.bytes_needed(entries),
        )
        self._cleanup.callback(self.segment.close)
        self.segment.prefault()
        remove_orphans()
        warm_up()
        arrays = SourceArrays.over(self.segment.index, entries, fresh=True)
        core = SourceCore(source_config(self.segment.layout.data_bytes, entries), arrays)
        self.grants = Grants()
        self.driver = SourceDriver(core, self.grants)
        self._cleanup.callback(self.driver.stop)

        data_host, data_port = split_address(config.data_listen)
        self.data_server = TcpDataServer(self.segment.data, self.grants, data_host, data_port)
        self._cleanup.callback(self.data_server.close)
        self.sessions = Sessions(self.driver, self.grants, self.data_server)
        self._cleanup.push_async_callback(self.sessions.close)
        await self._serve()
        self._start_announcer()
        if config.metrics_port:
            self._start_metrics(config.metrics_port)

    async def _serve(self) -> None:
        config = self.config
        host, _ = split_address(config.listen)
        facts = SourceFacts(
            source_id=config.source_id, epoch=self.epoch, tier=Tier.DRAM, host_id=host_id(),
            bytes_total=self.segment.layout.data_bytes,
        )  # fmt: skip
        channels = Channels(
            shm={"path": str(self.segment.path), "uuid": self.segment.uuid.hex()},
            tcp={"address": reachable(self.data_server.address)},
        )
        self.servicer = BlockSourceServicer(
            self.driver, self.sessions, self.grants, self.segment.data, facts, channels, config.ping_interval_s
        )

        def register(server: grpc.aio.Server) -> Sequence[str]:
            block_source_pb2_grpc.add_BlockSourceServicer_to_server(self.servicer, server)
            return ["kvpool.v1.BlockSource"]

        server, port = await rpc.serve(config.listen, register, credential=config.credential)
        self._cleanup.push_async_callback(server.stop, STOP_GRACE_S)
        self.address = reachable(f"{host}:{port}")
        self._facts = facts

    def _start_announcer(self) -> None:
        if not self.config.scheduler:
            return
        facts = SourceFacts(**{**self._facts.__dict__, "address": self.address})
        announcer = Announcer(
            self.config.scheduler,
            facts,
            snapshot=self.driver.snapshot,
            usage=self.driver.usage,
            credential=self.config.credential,
        )
        self.driver.announcer = announcer
        announcer.start()
        # In a thread: the announcer may be waiting for a snapshot from this very loop.
        self._cleanup.push_async_callback(asyncio.to_thread, announcer.close)

    def _start_metrics(self, port: int) -> None:
        from kvpool.service.metrics import serve_metrics

        stop = serve_metrics(port, self.config.source_id, self.servicer.stats, asyncio.get_running_loop())
        self._cleanup.callback(stop)

    def facts(self) -> dict[str, Any]:
        """What a supervisor wants to know of a node that serves."""
        return {
            "address": self.address,
            "data_address": self.data_server.address,
            "source": self.config.source_id,
            "segment": str(self.segment.path),
        }

    async def main_loop(self, stop: asyncio.Event) -> None:
        await stop.wait()

    async def shutdown(self) -> None:
        """Ends the sessions, the servers and the segment, in the order in which they depend on each other."""
        await self._cleanup.aclose()


def run_node(config: NodeConfig, *, on_ready: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Runs a node until SIGTERM or SIGINT. Raises: KvpoolError if it can't start."""
    asyncio.run(_run(config, on_ready))


async def _run(config: NodeConfig, on_ready: Callable[[dict[str, Any]], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    node = NodeServer(config)
    await node.startup()
    try:
        log.info("node %s serves at %s", config.source_id, node.address)
        on_ready(node.facts())
        await node.main_loop(stop)
    finally:
        await node.shutdown()


def source_config(data_bytes: int, entries: int) -> SourceConfig:
    """Slabs of at most 64 MiB, and at least 16 of them, so that several sizes of blocks fit side by side."""
    slab = SLAB_BYTES_MAX
    while slab > data_bytes // SLABS_MIN and slab > 1 << 20:
        slab //= 2
    return SourceConfig(capacity_bytes=data_bytes, entries_max=entries, slab_bytes=slab)


def warm_up() -> None:
    """Loads or compiles the core's kernels, so that no client waits for it."""
    core = SourceCore(SourceConfig(capacity_bytes=1 << 20, entries_max=16, slab_bytes=1 << 16))
    group = GroupSpec(0, GroupKind.FULL, (0,), 1, 1, 1, 1 << 16)
    spec = NamespaceSpec("warm-up", "", "", "", "", HASHES[0], (group,))
    namespace, session = core.register_namespace(spec), core.open_session("warm-up", 0)
    keys = np.arange(18 * 2, dtype=np.uint64).view(np.uint8).reshape(-1, 16)
    for first in range(0, len(keys), 6):
        reserved = core.reserve(session, namespace, group, keys[first : first + 6], 1, 0)
        rows = np.arange(6, dtype=np.uint32)
        core.commit(session, reserved.reservation, rows, np.zeros(6, np.uint32), np.zeros(6, np.uint64), 0)
    core.release(session, [core.lease(session, namespace, keys, 1, 0).lease], 0)
    core.remove(namespace, keys, 0)


def split_address(address: str) -> tuple[str, int]:
    """Raises: BadArgument."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise BadArgument(f"{address!r} is not host:port", hint="e.g. 127.0.0.1:7701, or port 0 for any free one")
    return host, int(port)


def reachable(address: str) -> str:
    """The address with which others reach a socket that listens on all interfaces."""
    host, port = address.rsplit(":", 1)
    return f"{socket.gethostname()}:{port}" if host in ("0.0.0.0", "[::]", "") else address


def main(arguments: Sequence[str] | None = None) -> int:
    """A node without the rest of the command line; prints its facts as one JSON line when it serves."""
    parser = argparse.ArgumentParser(prog="python -m kvpool.service.node", description=__doc__)
    defaults = NodeConfig()
    parser.add_argument("--id", default=defaults.source_id)
    parser.add_argument("--listen", default=defaults.listen)
    parser.add_argument("--data-listen", default=defaults.data_listen)
    parser.add_argument("--scheduler", default=defaults.scheduler)
    parser.add_argument("--memory-bytes", type=int, default=defaults.memory_bytes)
    parser.add_argument("--segment-dir", default=defaults.segment_dir)
    parser.add_argument("--metrics-port", type=int, default=defaults.metrics_port)
    parser.add_argument("--credential", default=defaults.credential)
    parser.add_argument("--ping-interval-s", type=float, default=defaults.ping_interval_s)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = NodeConfig(
        source_id=args.id, listen=args.listen, data_listen=args.data_listen, scheduler=args.scheduler,
        memory_bytes=args.memory_bytes, segment_dir=args.segment_dir, metrics_port=args.metrics_port,
        credential=args.credential, ping_interval_s=args.ping_interval_s,
    )  # fmt: skip
    try:
        run_node(config, on_ready=lambda facts: print(json.dumps(facts), flush=True))
    except KvpoolError as error:
        print(f"{error}\n{error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
