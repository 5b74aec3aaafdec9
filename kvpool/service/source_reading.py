"""The reading half of a source's gRPC face: leases, waits, pins and look-ups."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from kvpool.channels.sections import block_keys, check_block
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, KvpoolError
from kvpool.core.ids import Fidelity, KeyArray, Tier
from kvpool.core.namespace import GroupSpec
from kvpool.service import wire
from kvpool.service.grants import Grants
from kvpool.service.lower_tier import LowerTier, Promoted
from kvpool.service.sessions import Session, Sessions
from kvpool.service.source_driver import SourceDriver
from kvpool.service.threads import in_thread
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import block_source_pb2_grpc

log = logging.getLogger(__name__)

AWAIT_GRACE_S = 5.0
#: Blocks of one report whose stored bytes are hashed again; the rest is counted only.
CORRUPT_CHECKED_MAX = 256
CORRUPT_CHECK_LEASE_US = 60_000_000
PIN_TTL_MS_MAX = 7 * 24 * 3600 * 1000
TEXT_MAX = 256


class ReadingServicer(block_source_pb2_grpc.BlockSourceServicer):
    """What readers call; `block_source.BlockSourceServicer` adds the rest."""

    def __init__(
        self,
        driver: SourceDriver,
        sessions: Sessions,
        grants: Grants,
        data: NDArray[np.uint8],
        tier: Tier,
        below: LowerTier | None,
    ) -> None:
        self._driver, self._core, self._sessions, self._grants = driver, driver.core, sessions, grants
        self._data, self._tier, self._below = data, tier, below
        self.digest_errors = 0

    async def Lease(self, request: pb.LeaseRequest, context: object) -> pb.LeaseReply:
        session = self._sessions.get(request.session_id)
        group, keys = self._keys(request.namespace_id, request.keys)
        fidelity_min = wire.fidelity_from_proto(request.fidelity_min)
        check_text("handoff_request_id", request.handoff_request_id, empty=True)
        ttl_us = wire.ttl_us(request.ttl_ms)
        names = names_of(request.names, len(keys))
        tiers = np.full(len(keys), int(self._tier), dtype=np.uint8)
        promote_us = wire.ttl_us(request.promote_ms, zero=0)
        promoted = await self._promote(session, request.namespace_id, keys, promote_us)
        tiers[promoted.below] = int(self._below.tier) if self._below is not None else 0
        with released_after(promoted), self._driver.turn() as now:
            leased = self._core.lease(
                session.id, request.namespace_id, keys, ttl_us, now, handoff=request.handoff_request_id,
                names=names, fidelity_min=fidelity_min, incomplete=request.incomplete,
            )  # fmt: skip
            sections = leased.sections if request.incomplete else None
            if leased.lease:
                self._grants.grant_read(
                    session.id, leased.lease, leased.blocks, leased.found, now + ttl_us, group.section_count, sections
                )
        return pb.LeaseReply(
            lease_id=leased.lease,
            found=leased.found.tolist(),
            blocks=wire.descriptors_to_proto(leased.blocks, group.section_count),
            fidelity=leased.fidelity.tolist(),
            tiers=tiers.tolist(),
            sections=[] if sections is None else sections.tolist(),
        )

    async def Release(self, request: pb.ReleaseRequest, context: object) -> pb.ReleaseReply:
        session = self._sessions.get(request.session_id)
        leases = list(request.lease_ids)
        self._grants.revoke_read(session.id, leases)
        try:
            # Before anything in the request can be found wrong: a hold must not outlive its reader for that.
            with self._driver.turn() as now:
                self._core.release(session.id, leases, now)
        finally:
            # Also where a lease had expired: what its reader says of the bytes is worth a look all the same.
            await self._hear_of(session, request)
        return pb.ReleaseReply()

    async def _hear_of(self, session: Session, request: pb.ReleaseRequest) -> None:
        """What a reader says besides: a hand-off is done, blocks were bad. Raises: KvpoolError if it makes no sense."""
        if request.handoff_request_id:
            _, handed_off = self._keys(request.namespace_id, request.handed_off)
            with self._driver.turn() as now:
                self._core.end_handoff_for(request.namespace_id, handed_off, request.handoff_request_id, now)
        corrupt: KeyArray = wire.keys_from_proto(request.corrupt)
        if len(corrupt):
            self._core.group(request.namespace_id, request.corrupt.group, request.corrupt.shard)
            self.digest_errors += len(corrupt)
            await self._check_stored(session, request.namespace_id, corrupt[:CORRUPT_CHECKED_MAX])

    async def Await(self, request: pb.AwaitRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.AwaitReply]:
        session = self._sessions.get(request.session_id)
        with session.waiting():
            async with contextlib.aclosing(self._await(session, request, context)) as replies:
                async for reply in replies:
                    yield reply

    async def _await(
        self, session: Session, request: pb.AwaitRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.AwaitReply, None]:
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
        check_text("owner", request.owner, empty=True)
        if request.owner and request.ttl_ms > PIN_TTL_MS_MAX:
            raise BadArgument("a pin lasts at most 7 days", hint="pin again before it ends, or give ttl 0")
        ttl_us = request.ttl_ms * 1000 if request.owner else wire.ttl_us(request.ttl_ms, zero=0)
        promoted = await self._promote(session, request.namespace_id, keys, wire.TTL_MS_MAX * 1000)
        with released_after(promoted), self._driver.turn() as now:
            pinned = self._core.pin(session.id, request.namespace_id, keys, ttl_us, now, owner=request.owner)
        return pb.PinReply(pin_id=pinned.pin, found=pinned.found.tolist())

    async def Unpin(self, request: pb.UnpinRequest, context: object) -> pb.UnpinReply:
        session_id = 0 if request.owner else self._sessions.get(request.session_id).id
        with self._driver.turn() as now:
            released = self._core.unpin(session_id, request.pin_id, now, owner=request.owner)
        return pb.UnpinReply(pins_released=released)

    async def Lookup(self, request: pb.LookupRequest, context: object) -> pb.LookupReply:
        _, keys = self._keys(request.namespace_id, request.keys)
        names = names_of(request.names, len(keys))
        found = self._core.lookup(request.namespace_id, keys, names=names)
        tiers = np.where(found, int(self._tier), 0)
        if self._below is not None:
            lower = self._below.contains(request.namespace_id, keys) & ~found
            tiers[lower] = int(self._below.tier)
            found = found | lower
        return pb.LookupReply(found=found.tolist(), tiers=tiers.tolist())

    # ------------------------------------------------------------ parts

    async def _promote(self, session: Session, namespace_id: bytes, keys: KeyArray, timeout_us: int) -> Promoted:
        """Brings up what is below only, within a time; 0 = nothing. Raises: Overloaded."""
        if self._below is None or timeout_us == 0:
            return Promoted(np.zeros(len(keys), dtype=np.bool_))
        with session.waiting():
            return await self._below.promote(namespace_id, keys, timeout_us / 1e6)

    def _keys(self, namespace_id: bytes, keys: Any) -> tuple[GroupSpec, KeyArray]:
        """The group that a call is about, and its keys as they are stored. Raises: UnknownNamespace, BadArgument."""
        group = self._core.group(namespace_id, keys.group, keys.shard)
        return group, wire.keys_from_proto(keys)

    async def _check_stored(self, session: Session, namespace_id: bytes, keys: KeyArray) -> None:
        """Hashes what is stored under these keys and removes what is bad here: it may be the reader's link alone."""
        with self._driver.turn() as now:
            leased = self._core.lease(
                session.id, namespace_id, keys, CORRUPT_CHECK_LEASE_US, now, fidelity_min=Fidelity.INT8, counted=False
            )
        if not leased.lease:
            return
        blocks = leased.blocks.take(leased.found)
        sections = self._core.arrays.section_counts[self._core.index.lookup(blocks.keys)]
        try:
            bad = await in_thread(self._bad_rows, blocks, sections)
        finally:
            with contextlib.suppress(KvpoolError), self._driver.turn() as now:
                self._core.release(session.id, [leased.lease], now)
        with self._driver.turn() as now:
            removed = self._core.remove(namespace_id, blocks.keys[bad], now) if len(bad) else 0
        log.error("%s reports %d bad blocks; %d are bad here, removed", session.client, len(keys), removed)

    def _bad_rows(self, blocks: Descriptors, sections: NDArray[np.uint8]) -> NDArray[np.int64]:
        rows = [
            i
            for i, (key, offset, size) in enumerate(
                zip(block_keys(blocks), blocks.offsets.tolist(), blocks.sizes.tolist(), strict=True)
            )
            if not check_block(self._data[offset : offset + size], key, blocks.digests[i, : sections[i]])
        ]
        return np.array(rows, dtype=np.int64)


@contextlib.contextmanager
def released_after(promoted: Promoted) -> Iterator[None]:
    """Keeps what was brought up until the caller holds it by itself."""
    try:
        yield
    finally:
        promoted.release()


def check_text(field: str, text: str, *, empty: bool = False) -> None:
    """Raises: BadArgument for a text that is too long, or empty where it must not be."""
    if len(text) > TEXT_MAX or not (text or empty):
        raise BadArgument(f"{field} must have {0 if empty else 1} to {TEXT_MAX} characters, not {len(text)}")


def names_of(names: Sequence[str], count: int) -> list[bytes] | None:
    """Names of objects, where a call gives them. Raises: BadArgument unless there is one a key."""
    if not names:
        return None
    if len(names) != count:
        raise BadArgument(f"{len(names)} names do not name {count} objects")
    return [name.encode() for name in names]
