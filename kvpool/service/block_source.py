"""The gRPC face of a source: checks what comes from outside, calls the core, translates the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from kvpool import __version__
from kvpool.codecs import codec_for
from kvpool.core.errors import BadArgument, BadKeyLength, NoSsd, UnknownSession
from kvpool.core.holds import Hold
from kvpool.core.ids import KEY_BYTES, Fidelity, qualify, unpack_keys
from kvpool.core.namespace import HASHES, OBJECTS_GROUP, SECTIONS_MAX, GroupSpec
from kvpool.service import wire
from kvpool.service.announcer import SourceFacts
from kvpool.service.grants import Grants
from kvpool.service.lower_tier import LowerTier
from kvpool.service.removals import removals_of
from kvpool.service.sessions import Session, Sessions
from kvpool.service.source_driver import SourceDriver
from kvpool.service.source_reading import ReadingServicer, check_text, names_of
from kvpool.service.ssd_tier import SsdTier
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import common_pb2

log = logging.getLogger(__name__)

PINGS_MISSED_MAX = 5
HELLO_TIMEOUT_S = 5.0
_LIST_DEFAULT, _LIST_MAX = 1000, 10_000


class ChannelServer(Protocol):
    """One kind of data channel that a source serves, best kind first in its list."""

    kind: str

    def offer(self, session: Session, token: bytes, *, same_host: bool) -> Mapping[str, str] | None:
        """What a client needs to open it; None if this client can't."""
        ...


class BlockSourceServicer(ReadingServicer):
    """One source, served from its event loop."""

    def __init__(
        self,
        driver: SourceDriver,
        sessions: Sessions,
        grants: Grants,
        data: NDArray[np.uint8],
        facts: SourceFacts,
        offers: Sequence[ChannelServer],
        ping_interval_s: float,
        below: LowerTier | None = None,
        ssd_failure: str = "",
    ) -> None:
        """Args: ssd_failure: why there is no SSD tier though one was asked for."""
        super().__init__(driver, sessions, grants, data, facts.tier, below)
        self._ssd_failure = ssd_failure
        driver.check_objects = self._check_objects
        self._facts, self._offers, self._ping_interval_s = facts, offers, ping_interval_s

    async def GetSourceInfo(self, request: pb.GetSourceInfoRequest, context: object) -> pb.SourceInfo:
        f = self._facts
        return pb.SourceInfo(
            source_id=f.source_id, epoch=f.epoch, tier=int(f.tier), host_id=f.host_id, version=__version__,
            hashes=HASHES,
        )  # fmt: skip

    # ------------------------------------------------------------ sessions

    async def OpenSession(
        self, requests: AsyncIterator[pb.SessionPing], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.SessionPong]:
        reads = requests.__aiter__()
        try:
            first = await asyncio.wait_for(anext(reads), HELLO_TIMEOUT_S)
        except (StopAsyncIteration, TimeoutError):
            raise BadArgument("a session begins with hello") from None
        if not first.HasField("hello"):
            raise BadArgument("the first message of a session is hello")
        hello = first.hello
        check_text("client", hello.client)
        session = self._sessions.open(hello.client, hello.host_id, hello.writer_lock)
        why = "its stream ended"
        try:
            yield self._pong(session)
            async for ping in _pings(reads, self._ping_interval_s):
                self._sessions.pinged(session, ping.seen, ping.writing)
                yield self._pong(session)
        except TimeoutError:
            why = f"{PINGS_MISSED_MAX} pings are missing"
            raise UnknownSession(f"session {session.id} ended: {why}") from None
        finally:
            self._sessions.end_soon(session, why)

    def _pong(self, session: Session) -> pb.SessionPong:
        return pb.SessionPong(
            session_id=session.id, epoch=self._facts.epoch, ping_interval_ms=round(self._ping_interval_s * 1000),
            number=self._core.next_pong(session.id),
        )  # fmt: skip

    async def OpenChannel(self, request: pb.OpenChannelRequest, context: object) -> pb.OpenChannelReply:
        session = self._sessions.get(request.session_id)
        token = self._grants.token(session.id)
        assert token is not None
        same_host = request.host_id == self._facts.host_id
        offers: list[pb.ChannelOffer] = []
        for server in self._offers:
            parameters = server.offer(session, token, same_host=same_host) if server.kind in request.channels else None
            if parameters is not None:
                offers.append(pb.ChannelOffer(kind=server.kind, parameters=parameters))
        return pb.OpenChannelReply(offers=offers)

    async def RegisterNamespace(self, request: pb.RegisterNamespaceRequest, context: object) -> Any:
        spec = wire.namespace_from_proto(request.namespace)
        with self._driver.turn():
            namespace = self._core.register_namespace(spec)
            self._driver.save_catalog()
        return pb.RegisterNamespaceReply(namespace_id=namespace, number=self._core.namespace_number(namespace))

    # ------------------------------------------------------------ writing

    async def Reserve(self, request: pb.ReserveRequest, context: object) -> pb.ReserveReply:
        session = self._sessions.get(request.session_id)
        group, keys = self._keys(request.namespace_id, request.keys)
        fidelity = wire.fidelity_from_proto(request.fidelity)
        codec = codec_for(fidelity)
        self._check_ssd_for(group)
        hold = None
        if request.HasField("hold"):
            check_text("hold.request_id", request.hold.request_id)
            hold = Hold(request.hold.request_id, wire.ttl_us(request.hold.ttl_ms))
        check_text("tenant", request.tenant, empty=True)
        ttl_us = wire.ttl_us(request.ttl_ms)
        sizes = wire.array(request.sizes, np.uint64) if request.sizes else None
        if fidelity is not Fidelity.EXACT and sizes is None:
            sizes = np.full(len(keys), codec.stored_bytes(group), dtype=np.uint64)
        exists = None
        # What stands under an object's name below may be something else: nothing may be written beside it.
        if isinstance(self._below, SsdTier) and request.names:
            await self._below.make_way(keys)
            exists = self._below.holds(request.namespace_id, keys)
        with self._driver.turn() as now:
            reserved = self._core.reserve(
                session.id, request.namespace_id, group, keys, ttl_us, now, hold=hold, fidelity=fidelity, sizes=sizes,
                names=names_of(request.names, len(keys)), tenant=request.tenant, parent=_parent(request.keys),
                exists=exists,
            )  # fmt: skip
            self._driver.save_catalog()
            if reserved.reservation:
                mine = np.asarray(reserved.status) == pb.ReserveReply.RESERVED
                self._grants.grant_write(
                    session.id, reserved.reservation, reserved.slots, mine, group.section_count, now + ttl_us
                )
        return pb.ReserveReply(
            reservation_id=reserved.reservation,
            status=reserved.status.tolist(),
            slots=wire.descriptors_to_proto(reserved.slots, group.section_count),
        )

    async def Commit(self, request: pb.CommitRequest, context: object) -> pb.CommitReply:
        session = self._sessions.get(request.session_id)
        if not len(request.indices) == len(request.sections) == len(request.digests):
            raise BadArgument("indices, sections and digests must be of one length")
        if len(request.indices) > wire.KEYS_MAX * SECTIONS_MAX:
            raise BadArgument(f"more than {wire.KEYS_MAX * SECTIONS_MAX} sections in one call", hint="commit in parts")
        indices = wire.array(request.indices, np.uint32)
        sections = wire.array(request.sections, np.uint32)
        digests = wire.array(request.digests, np.uint64)
        with self._driver.turn() as now:
            complete = self._core.commit(session.id, request.reservation_id, indices, sections, digests, now)
            self._grants.committed(request.reservation_id, request.indices, request.sections)
        if isinstance(self._below, SsdTier):
            self._below.wake()
        return pb.CommitReply(blocks_complete=complete)

    async def Abort(self, request: pb.AbortRequest, context: object) -> pb.AbortReply:
        session = self._sessions.get(request.session_id)
        await self._sessions.revoke_writes(session, request.reservation_id)
        with self._driver.turn() as now:
            return pb.AbortReply(blocks_dropped=self._core.abort(session.id, request.reservation_id, now))

    # ------------------------------------------------------------ removing, inspecting

    async def Remove(self, request: pb.RemoveRequest, context: object) -> pb.RemoveReply:
        group, keys = self._keys(request.namespace_id, request.keys)
        self._check_ssd_for(group)
        prefix = request.name_prefix.encode()
        digests = _digests(request, group, len(keys))
        if digests is not None:
            # What it is now decides what goes below too; memory is looked at once more when its turn has come.
            same = self._core.unchanged(request.namespace_id, keys, digests)
            keys, digests = keys[same], digests[same]

        def remove() -> int:
            with self._driver.turn() as now:
                if group is OBJECTS_GROUP:
                    removals_of(self._core).note(
                        request.namespace_id, None if request.all or prefix else keys, b"" if request.all else prefix
                    )
                if request.all:
                    return self._core.remove_namespace(request.namespace_id, now)
                if prefix:
                    return self._core.remove_prefix(request.namespace_id, prefix, now)
                return self._core.remove(request.namespace_id, keys, now, digests=digests)

        if self._below is None:
            return pb.RemoveReply(blocks_removed=remove())
        # Answered once it can't come back: what is removed stays removed.
        chosen = None if request.all or prefix else keys
        return pb.RemoveReply(blocks_removed=await self._below.remove(request.namespace_id, chosen, prefix, remove))

    async def ListBlocks(self, request: pb.ListBlocksRequest, context: object) -> pb.ListBlocksReply:
        if request.limit > _LIST_MAX:
            raise BadArgument(f"limit must be 1 to {_LIST_MAX}, or 0 for {_LIST_DEFAULT}")
        if request.cursor >= 1 << 63:
            raise BadArgument("cursor must be 0 or a next_cursor")
        if request.below:
            if not isinstance(self._below, SsdTier):
                return pb.ListBlocksReply()
            return await self._below.list_alone(request, _LIST_MAX if request.keys else request.limit or _LIST_DEFAULT)
        if request.keys:
            records, cursor = self._core.records_of(unpack_keys(request.keys)[:_LIST_MAX]), 0
        else:
            records, cursor = self._core.list_blocks(
                request.cursor, request.limit or _LIST_DEFAULT, namespace_id=request.namespace_id,
                name_prefix=request.name_prefix.encode(),
            )  # fmt: skip
        return pb.ListBlocksReply(
            blocks=[wire.record_to_proto(r, self._facts.tier) for r in records], next_cursor=cursor
        )

    def _check_ssd_for(self, group: GroupSpec) -> None:
        """Objects are not changed while the disk is out of reach: an older one there would come back with it."""
        if group is OBJECTS_GROUP:
            self._check_objects()

    def _check_objects(self) -> None:
        if isinstance(self._below, SsdTier):
            self._below.check_objects()
        if self._ssd_failure:
            raise NoSsd(
                f"objects can't be changed while the SSD is out of reach: {self._ssd_failure}",
                hint="repair it, or start the node with another, empty --ssd-dir",
            )

    async def GetSourceStats(self, request: pb.GetSourceStatsRequest, context: object) -> pb.SourceStats:
        return self.stats()

    def stats(self) -> pb.SourceStats:
        stats = wire.counts_to_proto(
            self._core.counts(),
            bytes_read=self._grants.bytes_read,
            bytes_written=self._grants.bytes_written,
            digest_errors=self.digest_errors,
        )
        if isinstance(self._below, SsdTier):
            stats.ssd.CopyFrom(self._below.stats())
        elif self._ssd_failure:
            stats.ssd.CopyFrom(pb.SsdStats(state="failed", reason=self._ssd_failure))
        return stats


def _digests(request: pb.RemoveRequest, group: GroupSpec, count: int) -> NDArray[np.uint64] | None:
    """What a removal by key asks its blocks to be, uint64 (keys, sections). Raises: BadArgument."""
    if not request.digests:
        return None
    if request.all or request.name_prefix or len(request.digests) != count * group.section_count:
        raise BadArgument(f"{len(request.digests)} digests are not {group.section_count} for each of {count} keys")
    return wire.array(request.digests, np.uint64).reshape(count, group.section_count)


def _parent(keys: common_pb2.KeyList) -> bytes:
    """The parent of a list's first key as it is stored. Raises: BadKeyLength."""
    if not keys.parent:
        return b""
    if len(keys.parent) != KEY_BYTES:
        raise BadKeyLength(f"a parent has {KEY_BYTES} bytes, not {len(keys.parent)}")
    return qualify(unpack_keys(keys.parent), keys.group, keys.shard).tobytes()


async def _pings(reads: AsyncIterator[pb.SessionPing], interval_s: float) -> AsyncIterator[pb.SessionPing]:
    """Pings until the client ends its stream. Raises: TimeoutError when too many in a row are missing.

    Intervals are counted, not seconds: a source that was stopped itself finds one missing, not all.
    """
    missing = 0
    read = asyncio.ensure_future(anext(reads))
    try:
        while missing < PINGS_MISSED_MAX:
            done, _ = await asyncio.wait({read}, timeout=interval_s)
            if not done:
                missing += 1
                continue
            try:
                ping = read.result()
            except StopAsyncIteration:
                return
            missing = 0
            yield ping
            read = asyncio.ensure_future(anext(reads))
        raise TimeoutError
    finally:
        read.cancel()
