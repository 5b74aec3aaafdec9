"""A worker's HBM as a source for others: a staging segment, its core and channels, served beside the Engine service.

Read only: what is in HBM is decided by the engine alone. Lives in the event loop of the worker's one gRPC server.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from engines.torch.counters import Counters
from engines.torch.hbm_tier import CachedBlocks, HbmTier
from kvpool.channels.tcp_server import TcpDataServer
from kvpool.channels.tls import TlsConfig
from kvpool.core.arrays import SourceArrays
from kvpool.core.errors import BadArgument, KvpoolError, NamespaceMismatch, Unsupported
from kvpool.core.namespace import NamespaceSpec
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore
from kvpool.service import wire
from kvpool.service.announcer import SourceFacts
from kvpool.service.block_source import BlockSourceServicer, ChannelServer
from kvpool.service.grants import Grants
from kvpool.service.node import warm_up
from kvpool.service.offers import ShmOffer, TcpOffer
from kvpool.service.sessions import Session, Sessions
from kvpool.service.source_driver import SourceDriver
from kvpool.service.writer_lock import WriterTable
from kvpool.tiers.dram import WRITERS_MAX, Segment
from kvpool.tiers.hbm import BlockMemory
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import block_source_pb2_grpc

log = logging.getLogger(__name__)

PING_INTERVAL_S = 2.0
#: Blocks that the staging memory has to hold at least, else one read would evict what another has just asked for.
STAGED_BLOCKS_MIN = 4


@dataclass(frozen=True)
class StagingConfig:
    """Where blocks of HBM lie while others read them."""

    size_bytes: int
    segment_dir: str
    host: str  # to listen on for data
    public_host: str  # under which others reach it
    tls: TlsConfig | None = None  # of the tcp channel


class ReadOnlyServicer(BlockSourceServicer):
    """A source that nobody writes to from outside, of one namespace."""

    namespace: bytes = b""

    async def RegisterNamespace(self, request: pb.RegisterNamespaceRequest, context: object) -> object:
        if wire.namespace_from_proto(request.namespace).id() != self.namespace:
            raise NamespaceMismatch(
                "this worker's HBM holds blocks of another namespace",
                hint="were all workers started with the same options?",
            )
        return await super().RegisterNamespace(request, context)

    async def Reserve(self, request: pb.ReserveRequest, context: object) -> pb.ReserveReply:
        raise Unsupported("a worker's HBM can be read only", hint="write to a node")


@dataclass(frozen=True)
class ReadOnlyShmOffer(ShmOffer):
    """The staging segment, for processes of this host."""

    def offer(self, session: Session, token: bytes, *, same_host: bool) -> Mapping[str, str] | None:
        parameters = super().offer(session, token, same_host=same_host)
        return None if parameters is None else {**parameters, "writable": "0"}


class HbmSource:
    """`start` -> serves -> `close`, all in one event loop. `changed` from any thread.

    Args:
        facts: of the source; its address is not known yet.
    """

    def __init__(
        self,
        spec: NamespaceSpec,
        facts: SourceFacts,
        config: StagingConfig,
        *,
        cached: CachedBlocks,
        memory: BlockMemory,
        counters: Counters,
    ) -> None:
        self._spec, self._facts, self._config = spec, facts, config
        self._cached, self._memory, self._counters = cached, memory, counters
        self._cleanup = contextlib.AsyncExitStack()
        self._tier: HbmTier | None = None
        self._servicer: ReadOnlyServicer | None = None

    @property
    def serving(self) -> bool:
        return self._servicer is not None

    def stats(self) -> pb.SourceStats | None:
        """In the loop only."""
        return self._servicer.stats() if self._servicer is not None else None

    def changed(self, changes: Sequence[tuple[bool, bytes]]) -> None:
        """(stored or removed, key) of the engine's prefix cache, in order; called in the computing thread."""
        if self._tier is not None:
            self._tier.changed(changes)

    async def start(self) -> None:
        """Before the engine computes. Without memory or a port it does not serve: the worker goes on without."""
        try:
            self._start()
        except KvpoolError as error:
            log.warning("HBM is no source for others: %s (%s)", error, error.hint)
            await self.close()
        except BaseException:
            await self.close()
            raise

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Adds the service where it could be started. Returns its full name."""
        if self._servicer is None:
            return ()
        block_source_pb2_grpc.add_BlockSourceServicer_to_server(self._servicer, server)
        return ("kvpool.v1.BlockSource",)

    async def close(self) -> None:
        """Ends the sessions, then the memory that they read from."""
        self._servicer = None
        await self._cleanup.aclose()

    def _start(self) -> None:
        config, block_bytes = self._config, self._spec.groups[0].block_bytes
        count = config.size_bytes // block_bytes
        if count < STAGED_BLOCKS_MIN:
            raise BadArgument(
                f"{config.size_bytes} bytes hold {count} blocks of {block_bytes} bytes",
                hint=f"give the HBM staging memory at least {STAGED_BLOCKS_MIN * block_bytes} bytes, or 0 for none",
            )
        entries = 2 * count  # slots in quarantine count too
        segment = Segment.create(
            Path(config.segment_dir).absolute(),  # clients are told it
            re.sub(r"[^A-Za-z0-9._-]", "_", self._facts.source_id),
            data_bytes=config.size_bytes,
            index_bytes=SourceArrays.bytes_needed(entries),
            touch_bytes=entries,
        )
        self._cleanup.callback(segment.close)
        segment.prefault()
        warm_up()
        arrays = SourceArrays.over(segment.index, entries, fresh=True, touches=segment.touches)
        core = SourceCore(SourceConfig(segment.layout.data_bytes, entries), arrays, segment.data)
        grants = Grants()
        driver = SourceDriver(core, grants)
        self._cleanup.callback(driver.stop)
        server = TcpDataServer(segment.data, grants, config.host, 0, tls_config=config.tls)
        self._cleanup.callback(server.close)
        tier = HbmTier(self._spec, driver, segment.data, self._cached, self._memory, self._counters)
        self._cleanup.push_async_callback(tier.close)
        sessions = Sessions(driver, grants, [server], WriterTable(segment, WRITERS_MAX))
        self._cleanup.push_async_callback(sessions.close)
        port = server.address.rpartition(":")[2]
        offers: list[ChannelServer] = [ReadOnlyShmOffer(segment), TcpOffer(server, f"{config.public_host}:{port}")]
        servicer = ReadOnlyServicer(driver, sessions, grants, segment.data, self._facts, offers, PING_INTERVAL_S, tier)
        servicer.namespace = self._spec.id()
        self._tier, self._servicer = tier, servicer
