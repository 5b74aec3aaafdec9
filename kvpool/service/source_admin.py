"""The operators' face of a source: quotas, pins, links, and the long operations that move or check its blocks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.links import Links
from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import BadArgument, UnknownSession
from kvpool.core.ids import SessionId
from kvpool.service import wire
from kvpool.service.announcer import SourceFacts
from kvpool.service.copying import copy_blocks
from kvpool.service.draining import drain_source
from kvpool.service.operations import Operation, Operations
from kvpool.service.sessions import Sessions
from kvpool.service.source_driver import SourceDriver
from kvpool.service.ssd_tier import SsdTier
from kvpool.service.verifying import verify_source
from kvpool.v1 import source_admin_pb2 as pb
from kvpool.v1 import source_admin_pb2_grpc

if TYPE_CHECKING:
    import grpc.aio

log = logging.getLogger(__name__)

LINKS_PER_SESSION_MAX = 16
TARGETS_MAX = 64
TEXT_MAX = 256


class SourceAdminServicer(source_admin_pb2_grpc.SourceAdminServicer):
    """One source, served from its event loop, beside its `BlockSourceServicer`.

    Args:
        data: uint8, the data of the segment that the core describes; copies arrive in it directly.
        own_address: under which other sources reach this one; asked for when it is needed, since a server learns its
            port late.
        credential, tls: with which this source calls others.
        lower: the tier below: verified too, and what a copy takes back is removed from it.
        links: what this process measures of its own links to other sources; copies use it.
    """

    def __init__(
        self,
        driver: SourceDriver,
        sessions: Sessions,
        data: NDArray[np.uint8],
        facts: SourceFacts,
        own_address: Callable[[], str],
        *,
        credential: str = "",
        tls: TlsConfig | None = None,
        lower: SsdTier | None = None,
        links: Links | None = None,
    ) -> None:
        self._driver, self._core, self._sessions = driver, driver.core, sessions
        self._data, self._facts, self._own_address = data, facts, own_address
        self._credential, self._tls, self._lower, self._links = credential, tls, lower, links or Links()
        self._operations = Operations(driver)
        self._drains: list[Operation] = []
        self._reported: dict[SessionId, tuple[float, list[pb.LinkInfo]]] = {}

    async def close(self) -> None:
        """Ends all operations. To be awaited before the segment is closed: their threads write into it."""
        await self._operations.close()

    @property
    def left_behind(self) -> bool:
        """After `close`: whether a copy did not end in time, and may still write into memory."""
        return self._operations.left_behind

    # ------------------------------------------------------------ blocks

    async def Evict(self, request: pb.EvictRequest, context: object) -> pb.EvictReply:
        keys = wire.keys_from_proto(request.keys)
        if len(keys) and request.bytes:
            raise BadArgument("name keys or bytes to evict, not both")
        with self._driver.turn() as now:
            if request.bytes:
                blocks, size = self._core.evict_bytes(request.bytes, now)
            else:
                blocks, size = self._core.evict_keys(request.namespace_id, keys, now)
        return pb.EvictReply(blocks=blocks, bytes=size)

    async def Verify(self, request: pb.VerifyRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.Progress]:
        def work(operation: Operation) -> None:
            verify_source(operation, self._data, request.namespace_id, request.bytes_per_s_max, self._lower)

        async for progress in self._run("verification", work):
            yield progress

    async def Copy(self, request: pb.CopyRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.Progress]:
        if not request.from_address:
            raise BadArgument("from_address must name a source")

        def work(operation: Operation) -> None:
            copy_blocks(
                operation, request, self._data, self._facts.source_id, self._credential, self._links, self._lower,
                self._tls,
            )  # fmt: skip

        async for progress in self._run(f"copy from {request.from_address}", work, writes=True):
            yield progress

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.Progress]:
        targets = list(request.target_addresses)
        if len(targets) > TARGETS_MAX or (request.undo and targets):
            raise BadArgument(f"name at most {TARGETS_MAX} targets, and none to undo a drain")
        if self._own_address() in targets:
            raise BadArgument(f"{self._own_address()} is the source that is to be drained")
        self._core.draining = not request.undo
        log.info("draining: %s", self._core.draining)
        if request.undo or not targets:
            for operation in self._drains:
                operation.stop()
            yield pb.Progress(done=True, blocks_total=0 if request.undo else self._core.counts().blocks)
            return

        def work(operation: Operation) -> None:
            self._drains.append(operation)
            try:
                drain_source(
                    operation, self._own_address(), targets, self._credential, self._tls,
                    lower=self._lower, below=request.below,
                )  # fmt: skip
            finally:
                self._drains.remove(operation)

        async for progress in self._run("drain", work):
            yield progress

    async def _run(
        self, name: str, work: Callable[[Operation], None], *, writes: bool = False
    ) -> AsyncIterator[pb.Progress]:
        """The progress of one operation, which ends with this stream."""
        async with contextlib.aclosing(self._operations.run(name, work, writes=writes)) as stream:
            async for progress in stream:
                yield progress

    # ------------------------------------------------------------ quotas, pins, namespaces

    async def SetQuota(self, request: pb.Quota, context: object) -> pb.Quota:
        if bool(request.namespace_id) == bool(request.tenant):
            raise BadArgument("a quota is of a namespace or of a tenant: name one of the two")
        if len(request.tenant) > TEXT_MAX:
            raise BadArgument(f"a tenant's name has at most {TEXT_MAX} characters")
        with self._driver.turn():
            self._core.set_quota(request.bytes_max, namespace_id=request.namespace_id, tenant=request.tenant)
            self._driver.save_catalog()
        for quota in self._core.quotas():
            if (quota.namespace_id, quota.tenant) == (request.namespace_id, request.tenant):
                return wire.quota_to_proto(quota)
        return pb.Quota(namespace_id=request.namespace_id, tenant=request.tenant)

    async def ListQuotas(self, request: pb.ListQuotasRequest, context: object) -> pb.ListQuotasReply:
        return pb.ListQuotasReply(quotas=[wire.quota_to_proto(quota) for quota in self._core.quotas()])

    async def ListPins(self, request: pb.ListPinsRequest, context: object) -> pb.ListPinsReply:
        clients = self._core.sessions
        with self._driver.turn() as now:
            pins = [wire.pin_to_proto(pin, clients.get(SessionId(pin.session), ""), now) for pin in self._core.pins()]
        return pb.ListPinsReply(pins=pins)

    async def ListNamespaces(self, request: pb.ListNamespacesRequest, context: object) -> pb.ListNamespacesReply:
        return pb.ListNamespacesReply(
            namespaces=[
                pb.NamespaceInfo(
                    namespace_id=namespace_id, spec=wire.namespace_to_proto(spec), blocks=blocks, bytes=size
                )
                for namespace_id, spec, blocks, size in self._core.namespaces()
            ]
        )

    # ------------------------------------------------------------ links

    async def ListLinks(self, request: pb.ListLinksRequest, context: object) -> pb.ListLinksReply:
        self._forget_ended()
        links = [wire.link_to_proto(link, self._facts.source_id) for link in self._links.snapshot()]
        for reported_s, reported in self._reported.values():
            passed_ms = int((time.monotonic() - reported_s) * 1000)
            for link in reported:
                aged = pb.LinkInfo()
                aged.CopyFrom(link)
                aged.age_ms = min(link.age_ms + passed_ms, 0xFFFFFFFF)
                links.append(aged)
        return pb.ListLinksReply(links=links)

    async def ReportLinks(self, request: pb.ReportLinksRequest, context: object) -> pb.ReportLinksReply:
        session = self._sessions.get(request.session_id)
        if len(request.links) > LINKS_PER_SESSION_MAX:
            raise BadArgument(f"more than {LINKS_PER_SESSION_MAX} links in one report")
        for link in request.links:
            if max(len(getattr(link, name)) for name in ("from", "to", "kind", "state")) > TEXT_MAX:
                raise BadArgument(f"a text of a link has at most {TEXT_MAX} characters")
        self._forget_ended()
        named = []
        for link in request.links:
            # A client speaks for itself alone, and of its links to this source alone.
            own = pb.LinkInfo()
            own.CopyFrom(link)
            setattr(own, "from", session.client)
            own.to = self._facts.source_id
            named.append(own)
        self._reported[session.id] = (time.monotonic(), named)
        return pb.ReportLinksReply()

    def _forget_ended(self) -> None:
        """Reports go with the session that made them, so that there are no more of them than sessions."""
        for session_id in list(self._reported):
            try:
                self._sessions.get(session_id)
            except UnknownSession:
                del self._reported[session_id]
