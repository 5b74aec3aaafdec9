"""The gRPC face of a source: checks what comes from outside, calls the core, translates the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from kvpool import __version__
from kvpool.channels.sections import block_keys, check_block
from kvpool.codecs import codec_for
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, UnknownSession
from kvpool.core.holds import Hold
from kvpool.core.ids import KeyArray
from kvpool.core.namespace import HASHES, SECTIONS_MAX, GroupSpec
from kvpool.service import wire
from kvpool.service.announcer import SourceFacts
from kvpool.service.grants import Grants
from kvpool.service.sessions import Session, Sessions
from kvpool.service.source_driver import SourceDriver
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import block_source_pb2_grpc

log = logging.getLogger(__name__)

PINGS_MISSED_MAX = 5
HELLO_TIMEOUT_S = 5.0
AWAIT_GRACE_S = 5.0
#: Blocks of one report whose stored bytes are hashed again; the rest is counted only.
CORRUPT_CHECKED_MAX = 256
CORRUPT_CHECK_LEASE_US = 60_000_000
_LIST_DEFAULT, _LIST_MAX = 1000, 10_000
_TEXT_MAX = 256


@dataclass(frozen=True)
class Channels:
    """What this source offers, by kind: the parameters for a client of this or of another host."""

    shm: Mapping[str, str]
    tcp: Mapping[str, str]


class BlockSourceServicer(block_source_pb2_grpc.BlockSourceServicer):
    """One source, served from its event loop."""

    def __init__(
        self,
        driver: SourceDriver,
        sessions: Sessions,
        grants: Grants,
        data: NDArray[np.uint8],
        facts: SourceFacts,
        channels: Channels,
        ping_interval_s: float,
    ) -> None:
        self._driver, self._core, self._sessions, self._grants = driver, driver.core, sessions, grants
        self._data, self._facts, self._channels = data, facts, channels
        self._ping_interval_s = ping_interval_s
        self.digest_errors = 0

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
        _check_text("client", hello.client)
        session = self._sessions.open(hello.client, hello.host_id, hello.writer_lock)
        why = "its stream ended"
        try:
            yield self._pong(session)
            async for _ in _pings(reads, self._ping_interval_s):
                with self._driver.turn() as now:
                    self._core.ping(session.id, now)
                yield self._pong(session)
        except TimeoutError:
            why = f"{PINGS_MISSED_MAX} pings are missing"
            raise UnknownSession(f"session {session.id} ended: {why}") from None
        finally:
            self._sessions.end_soon(session, why)

    def _pong(self, session: Session) -> pb.SessionPong:
        return pb.SessionPong(
            session_id=session.id, epoch=self._facts.epoch, ping_interval_ms=round(self._ping_interval_s * 1000)
        )

    async def OpenChannel(self, request: pb.OpenChannelRequest, context: object) -> pb.OpenChannelReply:
        session = self._sessions.get(request.session_id)
        token = self._grants.token(session.id)
        assert token is not None
        offers: list[pb.ChannelOffer] = []
        if "shm" in request.channels and request.host_id == self._facts.host_id:
            # Without proof of a writer's end its slots could never be freed safely.
            writable = {"writable": "1" if session.proof is not None else "0"}
            offers.append(pb.ChannelOffer(kind="shm", parameters={**self._channels.shm, **writable}))
        if "tcp" in request.channels:
            offers.append(pb.ChannelOffer(kind="tcp", parameters={**self._channels.tcp, "token": token.hex()}))
        return pb.OpenChannelReply(offers=offers)

    async def RegisterNamespace(self, request: pb.RegisterNamespaceRequest, context: object) -> Any:
        spec = wire.namespace_from_proto(request.namespace)
        with self._driver.turn():
            return pb.RegisterNamespaceReply(namespace_id=self._core.register_namespace(spec))

    # ------------------------------------------------------------ writing

    async def Reserve(self, request: pb.ReserveRequest, context: object) -> pb.ReserveReply:
        session = self._sessions.get(request.session_id)
        group, keys = self._keys(request.namespace_id, request.keys)
        fidelity = wire.fidelity_from_proto(request.fidelity)
        codec_for(fidelity)
        hold = None
        if request.HasField("hold"):
            _check_text("hold.request_id", request.hold.request_id)
            hold = Hold(request.hold.request_id, wire.ttl_us(request.hold.ttl_ms))
        ttl_us = wire.ttl_us(request.ttl_ms)
        with self._driver.turn() as now:
            reserved = self._core.reserve(
                session.id, request.namespace_id, group, keys, ttl_us, now, hold=hold, fidelity=fidelity
            )
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
        return pb.CommitReply(blocks_complete=complete)

    async def Abort(self, request: pb.AbortRequest, context: object) -> pb.AbortReply:
        session = self._sessions.get(request.session_id)
        await self._sessions.revoke_writes(session, request.reservation_id)
        with self._driver.turn() as now:
            return pb.AbortReply(blocks_dropped=self._core.abort(session.id, request.reservation_id, now))

    # ------------------------------------------------------------ reading

    async def Lease(self, request: pb.LeaseRequest, context: object) -> pb.LeaseReply:
        session = self._sessions.get(request.session_id)
        group, keys = self._keys(request.namespace_id, request.keys)
        # A source of this release holds exact blocks only, which satisfy every minimum.
        wire.fidelity_from_proto(request.fidelity_min)
        _check_text("handoff_request_id", request.handoff_request_id, empty=True)
        ttl_us = wire.ttl_us(request.ttl_ms)
        with self._driver.turn() as now:
            leased = self._core.lease(
                session.id, request.namespace_id, keys, ttl_us, now, handoff=request.handoff_request_id
            )
            if leased.lease:
                self._grants.grant_read(session.id, leased.lease, leased.blocks, leased.found, now + ttl_us)
        return pb.LeaseReply(
            lease_id=leased.lease,
            found=leased.found.tolist(),
            blocks=wire.descriptors_to_proto(leased.blocks, group.section_count),
            fidelity=leased.fidelity.tolist(),
        )

    async def Release(self, request: pb.ReleaseRequest, context: object) -> pb.ReleaseReply:
        session = self._sessions.get(request.session_id)
        leases = list(request.lease_ids)
        corrupt: KeyArray = wire.keys_from_proto(request.corrupt)
        group = (
            self._core.group(request.namespace_id, request.corrupt.group, request.corrupt.shard)
            if len(corrupt)
            else None
        )
        self._grants.revoke_read(session.id, leases)
        with self._driver.turn() as now:
            self._core.release(session.id, leases, now)
        if group is not None:
            self.digest_errors += len(corrupt)
            await self._check_stored(session, request.namespace_id, group, corrupt[:CORRUPT_CHECKED_MAX])
        return pb.ReleaseReply()

    async def Await(self, request: pb.AwaitRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.AwaitReply]:
        session = self._sessions.get(request.session_id)
        _, keys = self._keys(request.namespace_id, request.keys)
        deadline_us = wire.ttl_us(request.deadline_ms)
        with self._driver.turn() as now:
            wait = self._core.wait(
                session.id, request.namespace_id, keys, now + deadline_us, now,
                absent_is_abandoned=request.absent_is_abandoned,
            )  # fmt: skip
            waiter = self._driver.wait_begun(wait, session.id)
        done = len(keys) == 0
        try:
            # Tells the client that the wait has begun.
            await context.send_initial_metadata(())
            while not done:
                reply = pb.AwaitReply()
                # The core ends the wait at its deadline; the extra time only guards against that not happening.
                for wakeup in await asyncio.wait_for(waiter.take(), deadline_us / 1e6 + AWAIT_GRACE_S):
                    reply.indices.extend(wakeup.indices)
                    reply.states.extend(wakeup.states)
                    reply.sections.extend(wakeup.sections)
                    done |= wakeup.done
                if len(reply.indices):
                    yield reply
        finally:
            self._driver.wait_ended(wait)
            with self._driver.turn():
                self._core.cancel_wait(wait)

    async def Pin(self, request: pb.PinRequest, context: object) -> pb.PinReply:
        session = self._sessions.get(request.session_id)
        _, keys = self._keys(request.namespace_id, request.keys)
        ttl_us = wire.ttl_us(request.ttl_ms, zero=0)
        with self._driver.turn() as now:
            pinned = self._core.pin(session.id, request.namespace_id, keys, ttl_us, now)
        return pb.PinReply(pin_id=pinned.pin, found=pinned.found.tolist())

    async def Unpin(self, request: pb.UnpinRequest, context: object) -> pb.UnpinReply:
        session = self._sessions.get(request.session_id)
        with self._driver.turn() as now:
            self._core.unpin(session.id, request.pin_id, now)
        return pb.UnpinReply()

    # ------------------------------------------------------------ looking, removing

    async def Lookup(self, request: pb.LookupRequest, context: object) -> pb.LookupReply:
        _, keys = self._keys(request.namespace_id, request.keys)
        return pb.LookupReply(found=self._core.lookup(request.namespace_id, keys).tolist())

    async def Remove(self, request: pb.RemoveRequest, context: object) -> pb.RemoveReply:
        _, keys = self._keys(request.namespace_id, request.keys)
        with self._driver.turn() as now:
            if request.all:
                return pb.RemoveReply(blocks_removed=self._core.remove_namespace(request.namespace_id, now))
            return pb.RemoveReply(blocks_removed=self._core.remove(request.namespace_id, keys, now))

    async def ListBlocks(self, request: pb.ListBlocksRequest, context: object) -> pb.ListBlocksReply:
        if request.limit > _LIST_MAX:
            raise BadArgument(f"limit must be 1 to {_LIST_MAX}, or 0 for {_LIST_DEFAULT}")
        if request.cursor >= 1 << 63:
            raise BadArgument("cursor must be 0 or a next_cursor")
        records, cursor = self._core.list_blocks(request.cursor, request.limit or _LIST_DEFAULT)
        return pb.ListBlocksReply(
            blocks=[wire.record_to_proto(r, self._facts.tier) for r in records], next_cursor=cursor
        )

    async def GetSourceStats(self, request: pb.GetSourceStatsRequest, context: object) -> pb.SourceStats:
        return self.stats()

    def stats(self) -> pb.SourceStats:
        return wire.counts_to_proto(
            self._core.counts(),
            bytes_read=self._grants.bytes_read,
            bytes_written=self._grants.bytes_written,
            digest_errors=self.digest_errors,
        )

    # ------------------------------------------------------------ parts

    def _keys(self, namespace_id: bytes, keys: Any) -> tuple[GroupSpec, KeyArray]:
        """The group that a call is about, and its keys as they are stored. Raises: UnknownNamespace, BadArgument."""
        group = self._core.group(namespace_id, keys.group, keys.shard)
        return group, wire.keys_from_proto(keys)

    async def _check_stored(self, session: Session, namespace_id: bytes, group: GroupSpec, keys: KeyArray) -> None:
        """Hashes what is stored under these keys and removes what is bad here: it may be the reader's link alone."""
        with self._driver.turn() as now:
            leased = self._core.lease(session.id, namespace_id, keys, CORRUPT_CHECK_LEASE_US, now)
        if not leased.lease:
            return
        blocks = leased.blocks.take(leased.found)
        bad = await asyncio.to_thread(self._bad_rows, blocks, group.section_count)
        with self._driver.turn() as now:
            self._core.release(session.id, [leased.lease], now)
            removed = self._core.remove(namespace_id, blocks.keys[bad], now) if len(bad) else 0
        log.error("%s reports %d bad blocks; %d are bad here, removed", session.client, len(keys), removed)

    def _bad_rows(self, blocks: Descriptors, section_count: int) -> NDArray[np.int64]:
        rows = [
            i
            for i, (key, offset, size) in enumerate(
                zip(block_keys(blocks), blocks.offsets.tolist(), blocks.sizes.tolist(), strict=True)
            )
            if not check_block(self._data[offset : offset + size], key, blocks.digests[i, :section_count])
        ]
        return np.array(rows, dtype=np.int64)


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


def _check_text(field: str, text: str, *, empty: bool = False) -> None:
    if len(text) > _TEXT_MAX or not (text or empty):
        raise BadArgument(f"{field} must have {0 if empty else 1} to {_TEXT_MAX} characters, not {len(text)}")
