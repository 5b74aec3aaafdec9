"""The node process: one DRAM segment, served over gRPC and the data channels, announced to the scheduler."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
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

from kvpool.channels.collective_server import CollectiveServer
from kvpool.channels.nixl_server import NixlServer
from kvpool.channels.tcp_server import TcpDataServer
from kvpool.channels.tls import TlsConfig
from kvpool.core.arrays import SourceArrays
from kvpool.core.catalog import Catalog
from kvpool.core.errors import BadArgument, KvpoolError, NoSsd
from kvpool.core.evictors import EVICTORS
from kvpool.core.ids import Tier
from kvpool.core.namespace import HASHES, GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore
from kvpool.service import rpc
from kvpool.service.announcer import Announcer, Snapshot, SourceFacts
from kvpool.service.block_source import BlockSourceServicer, ChannelServer
from kvpool.service.grants import Grants
from kvpool.service.host import host_id
from kvpool.service.offers import ServerOffer, ShmOffer, TcpOffer
from kvpool.service.sessions import DataServer, Sessions
from kvpool.service.source_admin import SourceAdminServicer
from kvpool.service.source_driver import SourceDriver
from kvpool.service.ssd_tier import SsdTier
from kvpool.service.writer_lock import WriterTable, remove_orphans
from kvpool.tiers.dram import WRITERS_MAX, Segment
from kvpool.tiers.ssd.store import SsdStore
from kvpool.v1 import block_source_pb2_grpc, source_admin_pb2_grpc

log = logging.getLogger(__name__)

#: Entries of the index: enough for blocks of this size on average; smaller blocks may use it up before the bytes.
ENTRY_BYTES_MIN = 16 << 10
ENTRIES_MIN, ENTRIES_MAX = 4096, 1 << 22
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
    eviction: str = "prefix"  # a name of `core.evictors`
    keep_memory: bool = False  # when told to stop, leave the segment for the next process of this name
    ssd_dir: str = ""  # empty: no SSD tier
    ssd_bytes: int = 0
    tls: TlsConfig | None = None  # of all that it serves and calls
    nixl: bool = False  # offer the nixl channel too
    collective: str = ""  # "gloo" or "nccl": offer the collective channel too
    collective_listen: str = "127.0.0.1:0"
    ssd_demote_from: float = 0.7  # of memory in use: beyond it the coldest blocks are copied to the SSD


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
        # Allocating takes seconds for a large segment; nothing else runs in this loop yet.
        self.segment, core = open_memory(config)
        self._keep, self._ssd_failure = False, ""
        self._late_writers: list[Callable[[], bool]] = []
        self._cleanup.callback(self._close_memory)
        self.segment.prefault()
        writers = WriterTable(self.segment, WRITERS_MAX)
        remove_orphans()
        warm_up()
        self.grants = Grants()
        self.driver = SourceDriver(core, self.grants, self.segment.write_catalog)
        self._cleanup.callback(self.driver.stop)
        with self.driver.turn():
            core.catalog_changed = True
            self.driver.save_catalog()
        self.ssd = await self._open_ssd()

        servers = await self._start_data_servers()
        self.sessions = Sessions(self.driver, self.grants, servers, writers)
        self._cleanup.push_async_callback(self.sessions.close)
        await self._serve()
        self._start_announcers()
        if self.ssd is not None:
            self.ssd.start()
        if config.metrics_port:
            self._start_metrics(config.metrics_port)

    async def _start_data_servers(self) -> list[DataServer]:
        """Servers of all channels that leave the host's memory; `offers` says what clients hear of them, best first."""
        config, data = self.config, self.segment.data
        host, port = split_address(config.data_listen)
        self.data_server = TcpDataServer(data, self.grants, host, port, tls_config=config.tls)
        self._cleanup.callback(self.data_server.close)
        self._offers: list[ChannelServer] = [
            ShmOffer(self.segment), TcpOffer(self.data_server, reachable(self.data_server.address))
        ]  # fmt: skip
        servers: list[DataServer] = [self.data_server]
        if config.nixl:
            # In a thread: it starts a process of its own.
            nixl = await asyncio.to_thread(NixlServer, self.segment.path, self.segment.uuid)
            self._cleanup.callback(nixl.close)
            servers.append(nixl)
            self._offers.insert(1, ServerOffer(nixl, "nixl"))
        if config.collective:
            host, port = split_address(config.collective_listen)
            collective = await asyncio.to_thread(
                CollectiveServer, data, self.grants, host, port, backend=config.collective
            )
            self._cleanup.callback(collective.close)
            servers.append(collective)
            self._offers.append(ServerOffer(collective, "collective"))
        return servers

    async def _open_ssd(self) -> SsdTier | None:
        config = self.config
        if not config.ssd_dir:
            return None
        try:
            store = await asyncio.to_thread(SsdStore.open, Path(config.ssd_dir), config.source_id, config.ssd_bytes)
        except NoSsd as error:
            # Losing the disk costs the tier, not the node.
            log.error("no SSD tier: %s (%s)", error, error.hint)
            self._ssd_failure = str(error)
            return None
        stats = store.stats()
        log.info(
            "SSD: %d blocks; %.2f GB of the log read in %.2f s",
            stats.space.records, stats.counters.recovered_bytes / 1e9, stats.counters.recovery_s,
        )  # fmt: skip
        tier = SsdTier(store, self.driver, self.segment.data, demote_from=config.ssd_demote_from)
        self._cleanup.push_async_callback(tier.close)
        self._late_writers.append(lambda: tier.left_behind)
        try:
            await tier.startup()
        except NoSsd as error:
            log.error("no SSD tier: %s (%s)", error, error.hint)
            self._ssd_failure = str(error)
            return None
        return tier

    async def _serve(self) -> None:
        config = self.config
        host, _ = split_address(config.listen)
        facts = SourceFacts(
            source_id=config.source_id, epoch=self.epoch, tier=Tier.DRAM, host_id=host_id(),
            bytes_total=self.segment.layout.data_bytes,
        )  # fmt: skip
        self.servicer = BlockSourceServicer(
            self.driver,
            self.sessions,
            self.grants,
            self.segment.data,
            facts,
            self._offers,
            config.ping_interval_s,
            self.ssd,
            self._ssd_failure,
        )

        self.admin = SourceAdminServicer(
            self.driver, self.sessions, self.segment.data, facts, lambda: self.address, credential=config.credential,
            tls=config.tls, lower=self.ssd,
        )  # fmt: skip
        self._cleanup.push_async_callback(self.admin.close)
        self._late_writers.append(lambda: self.admin.left_behind)

        def register(server: grpc.aio.Server) -> Sequence[str]:
            block_source_pb2_grpc.add_BlockSourceServicer_to_server(self.servicer, server)
            source_admin_pb2_grpc.add_SourceAdminServicer_to_server(self.admin, server)
            return ["kvpool.v1.BlockSource", "kvpool.v1.SourceAdmin"]

        server, port = await rpc.serve(config.listen, register, credential=config.credential, tls=config.tls)
        self._cleanup.push_async_callback(server.stop, STOP_GRACE_S)
        self.address = reachable(f"{host}:{port}")
        self._facts = facts

    def _start_announcers(self) -> None:
        if not self.config.scheduler:
            return
        facts = dataclasses.replace(self._facts, address=self.address)
        self.driver.announcer = self._announce(facts, self.driver.snapshot, self.driver.usage)
        if self.ssd is not None:
            # A source of its own in the directory, at the same address: a lease there brings blocks up first.
            facts = dataclasses.replace(
                facts, source_id=f"{facts.source_id}.ssd", tier=Tier.SSD, bytes_total=self.ssd.bytes_total
            )
            self.ssd.announcer = self._announce(facts, self.ssd.snapshot, self.ssd.usage)

    def _announce(
        self, facts: SourceFacts, snapshot: Callable[[], Snapshot], usage: Callable[[], tuple[int, int]]
    ) -> Announcer:
        announcer = Announcer(
            self.config.scheduler, facts, snapshot=snapshot, usage=usage, credential=self.config.credential,
            tls=self.config.tls,
        )  # fmt: skip
        announcer.start()
        # In a thread: the announcer may be waiting for a snapshot from this very loop.
        self._cleanup.push_async_callback(asyncio.to_thread, announcer.close)
        return announcer

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

    def _close_memory(self) -> None:
        """The last thing of all: by then it is known who may still write into it. No successor may have it then."""
        late = any(left_behind() for left_behind in self._late_writers)
        if self._keep and late:
            log.error("memory is not kept: a read of the SSD or a copy has not ended, and may still write into it")
        self.segment.close(keep=self._keep and not late)

    async def shutdown(self) -> None:
        """Ends the sessions, the servers and the segment, in the order in which they depend on each other."""
        self._keep = self.config.keep_memory
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


def open_memory(config: NodeConfig) -> tuple[Segment, SourceCore]:
    """The node's segment and the core over it: with all that its last owner committed, where it had one.

    Raises: NoSpace, BadArgument, Unavailable.
    """
    entries = min(max(config.memory_bytes // ENTRY_BYTES_MIN, ENTRIES_MIN), ENTRIES_MAX)
    if config.eviction not in EVICTORS:
        raise BadArgument(f"no eviction policy {config.eviction!r}", hint=f"one of {', '.join(EVICTORS)}")

    def create(*, adopt: bool) -> tuple[Segment, SourceConfig]:
        segment = Segment.create(
            # Clients are told the path, wherever they run.
            Path(config.segment_dir).absolute(),
            config.source_id,
            data_bytes=config.memory_bytes,
            index_bytes=SourceArrays.bytes_needed(entries),
            touch_bytes=entries,
            adopt=adopt,
        )
        return segment, SourceConfig(segment.layout.data_bytes, entries, eviction=config.eviction)

    segment, core_config = create(adopt=True)
    if segment.adopted:
        try:
            return segment, adopt_core(segment, core_config)
        except KvpoolError as error:
            log.warning("what is in %s can't be used: %s; this node starts empty", segment.path, error)
        # In another file: a writer of the process before may still have the old one in its hands.
        segment.close()
        segment, core_config = create(adopt=False)
    arrays = SourceArrays.over(segment.index, entries, fresh=True, touches=segment.touches)
    return segment, SourceCore(core_config, arrays, segment.data)


def adopt_core(segment: Segment, config: SourceConfig) -> SourceCore:
    """Raises: BadArgument if what is in the segment makes no sense."""
    catalog = Catalog.from_bytes(segment.read_catalog())
    arrays = SourceArrays.over(segment.index, config.entries_max, fresh=False, touches=segment.touches)
    core = SourceCore.adopt(config, arrays, segment.data, catalog)
    log.info("took over %s with %d blocks", segment.path, core.adopted)
    return core


def warm_up() -> None:
    """Loads or compiles the core's kernels, so that no client waits for it."""
    core = SourceCore(SourceConfig(capacity_bytes=1 << 20, entries_max=16))
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
    parser.add_argument("--eviction", default=defaults.eviction)
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--nixl", action="store_true")
    parser.add_argument("--collective", default=defaults.collective)
    parser.add_argument("--collective-listen", default=defaults.collective_listen)
    for flag in ("--tls-cert", "--tls-key", "--tls-ca"):
        parser.add_argument(flag, default="")
    parser.add_argument("--ssd-dir", default=defaults.ssd_dir)
    parser.add_argument("--ssd-bytes", type=int, default=defaults.ssd_bytes)
    parser.add_argument("--ssd-demote-from", type=float, default=defaults.ssd_demote_from)
    parser.add_argument("--ping-interval-s", type=float, default=defaults.ping_interval_s)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = NodeConfig(
        source_id=args.id, listen=args.listen, data_listen=args.data_listen, scheduler=args.scheduler,
        memory_bytes=args.memory_bytes, segment_dir=args.segment_dir, metrics_port=args.metrics_port,
        credential=args.credential, ping_interval_s=args.ping_interval_s, eviction=args.eviction,
        keep_memory=args.keep_memory, ssd_dir=args.ssd_dir, ssd_bytes=args.ssd_bytes,
        ssd_demote_from=args.ssd_demote_from, nixl=args.nixl, collective=args.collective,
        collective_listen=args.collective_listen,
    )  # fmt: skip
    try:
        config = dataclasses.replace(config, tls=TlsConfig.of_files(args.tls_cert, args.tls_key, args.tls_ca))
        run_node(config, on_ready=lambda facts: print(json.dumps(facts), flush=True))
    except KvpoolError as error:
        print(f"{error}\n{error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
