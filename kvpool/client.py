"""The library face of the pool: put, get, wait and the calls that they are made of. Synchronous, for any thread.

Every call ends within its time with a result or a KvpoolError. A miss is a result. Bytes are checked against their
digests before they count as found. The connection comes back by itself; what was held before is then gone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence

import grpc
import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import NamespaceId, qualify
from kvpool.service import wire
from kvpool.service.client_session import Session
from kvpool.service.client_types import (
    ABANDONED,
    BEING_WRITTEN,
    COMMITTED,
    DEADLINE,
    EXISTS,
    NO_SPACE,
    RESERVED,
    SECTION,
    Bools,
    Counters,
    GetResult,
    Hold,
    PutResult,
    Reservation,
    Waited,
)  # fmt: skip
from kvpool.service.source_calls import OPENERS, Keys, SourceCalls, key_list, ms
from kvpool.v1 import block_source_pb2 as pb

log = logging.getLogger(__name__)

__all__ = [
    "ABANDONED", "BEING_WRITTEN", "COMMITTED", "DEADLINE", "EXISTS", "NO_SPACE", "RESERVED", "SECTION",
    "Counters", "GetResult", "Hold", "PoolClient", "PutResult", "Reservation", "Waited",
]  # fmt: skip

#: Releases that no reply has come to yet; beyond it a `get` waits for its own.
RELEASES_MAX = 64


class PoolClient(SourceCalls):
    """Whole operations on one source: see `put` and `get`; the calls they are made of are inherited."""

    def __init__(
        self,
        address: str,
        *,
        client: str = "client",
        credential: str = "",
        channels: Sequence[str] = tuple(OPENERS),
        timeout_s: float = 5.0,
    ) -> None:
        super().__init__(address, client=client, credential=credential, channels=channels, timeout_s=timeout_s)
        self._releases = threading.BoundedSemaphore(RELEASES_MAX)

    def put(
        self,
        namespace: NamespaceId,
        keys: Keys,
        blocks: NDArray[np.uint8],
        *,
        rows: NDArray[np.int64] | None = None,
        group: int = 0,
        shard: int = 0,
        hold: Hold | None = None,
        ttl_s: float = 30.0,
    ) -> PutResult:
        """Stores blocks: reserve, write, commit. Blocks that exist, or that somebody else writes, are left alone.

        Args:
            blocks: uint8 (rows, >= block bytes); rows[i], or i, is the row of key i.
            hold: put on the blocks, also on those that exist.
            ttl_s: time within which the call has to be through.
        """
        begin_s = time.monotonic()
        try:
            reservation = self.reserve(namespace, keys, group=group, shard=shard, ttl_s=ttl_s, hold=hold)
        except KvpoolError as error:
            if error.reason.name != "NO_SPACE":
                raise
            none = np.zeros(len(keys), dtype=np.bool_)
            return PutResult(none, none.copy(), 0, time.monotonic() - begin_s, "")
        indices = np.flatnonzero(reservation.status == RESERVED)
        stored = np.zeros(len(keys), dtype=np.bool_)
        moved = 0
        if len(indices):
            try:
                own_rows = indices if rows is None else rows[indices]
                digests = self.write(reservation, indices, blocks, own_rows, deadline_s=ttl_s)
                self.commit(reservation, indices, digests)
            except BaseException:
                with contextlib.suppress(KvpoolError):
                    self.abort(reservation)
                raise
            stored[indices] = True
            moved = int(reservation.slots.sizes[indices].sum(dtype=np.uint64))
        existed: Bools = reservation.status == EXISTS
        return PutResult(stored, existed, moved, time.monotonic() - begin_s, reservation.session.writer.kind)

    def get(
        self,
        namespace: NamespaceId,
        keys: Keys,
        out: NDArray[np.uint8],
        *,
        rows: NDArray[np.int64] | None = None,
        group: int = 0,
        shard: int = 0,
        handoff: str = "",
        ttl_s: float = 30.0,
        verify: bool = True,
    ) -> GetResult:
        """Copies blocks into rows of `out`: lease, read, verify, release.

        Args:
            out: uint8 (rows, >= block bytes); rows[i], or i, is the row for key i. Rows not found may hold anything.
            handoff: request whose hand-off hold on these blocks ends with this call.
            ttl_s: time within which the call has to be through.
            verify: False for tests and benchmarks only.
        Raises: Unavailable, ChannelError: nothing was read.
        """
        begin_s = time.monotonic()

        def lease(session: Session, timeout_s: float) -> tuple[Session, pb.LeaseReply]:
            request = pb.LeaseRequest(
                session_id=session.id, namespace_id=namespace, keys=key_list(keys, group, shard), ttl_ms=ms(ttl_s),
                handoff_request_id=handoff,
            )  # fmt: skip
            return session, session.stub.Lease(request, timeout=timeout_s)

        session, reply = self._call(lease)
        leased: Bools = np.fromiter(reply.found, dtype=np.bool_, count=len(keys))
        found, corrupt = np.zeros(len(keys), dtype=np.bool_), np.zeros(len(keys), dtype=np.bool_)
        if not reply.lease_id:
            return GetResult(found, corrupt, 0, time.monotonic() - begin_s, session.channel.kind)
        section_count = self._group(namespace, group).section_count
        blocks = wire.descriptors_from_proto(reply.blocks, qualify(keys, group, shard), section_count).take(leased)
        indices = np.flatnonzero(leased)
        try:
            own_rows = indices if rows is None else rows[indices]
            left_s = max(ttl_s - (time.monotonic() - begin_s), 0.001)
            good = session.channel.read(reply.lease_id, blocks, out, own_rows, deadline_s=left_s, verify=verify)
            found[indices] = good
            # Unchecked bytes are as good as the lease that covered them; a lease that ended proves nothing bad.
            in_time = time.monotonic() - begin_s < ttl_s
            corrupt[indices] = ~good & in_time
            if not verify and not in_time:
                found[:] = False
        except ChannelError:
            self._count(channel_errors=1)
            raise
        finally:
            self._release(session, reply.lease_id, namespace, keys[corrupt], group, shard)
        moved = int(blocks.sizes[good].sum(dtype=np.uint64))
        self._count(bytes_read=moved, digest_errors=int(corrupt.sum()))
        if corrupt.any():
            log.error("%d blocks from %s failed their digest", int(corrupt.sum()), self.address)
        return GetResult(found, corrupt, moved, time.monotonic() - begin_s, session.channel.kind)

    def free_hold(self, namespace: NamespaceId, keys: Keys, request_id: str, *, group: int = 0, shard: int = 0) -> int:
        """Ends a request's hand-off hold on those of `keys` that are there, without reading. Returns how many are."""

        def call(session: Session, timeout_s: float) -> int:
            request = pb.LeaseRequest(
                session_id=session.id, namespace_id=namespace, keys=key_list(keys, group, shard),
                ttl_ms=ms(self._timeout_s), handoff_request_id=request_id,
            )  # fmt: skip
            reply = session.stub.Lease(request, timeout=timeout_s)
            if reply.lease_id:
                release = pb.ReleaseRequest(session_id=session.id, lease_ids=[reply.lease_id])
                session.stub.Release(release, timeout=timeout_s)
            return sum(reply.found)

        return self._call(call)

    def _release(
        self, session: Session, lease: int, namespace: NamespaceId, corrupt: Keys, group: int, shard: int
    ) -> None:
        """Gives a lease back, without waiting for the answer: should it be lost, the lease expires."""
        request = pb.ReleaseRequest(session_id=session.id, lease_ids=[lease])
        if len(corrupt):
            request.namespace_id = namespace
            request.corrupt.CopyFrom(key_list(corrupt, group, shard))
        with contextlib.suppress(grpc.RpcError, ValueError):  # ValueError: the session's channel was closed meanwhile
            if len(corrupt) or not self._releases.acquire(blocking=False):
                session.stub.Release(request, timeout=self._timeout_s)
                return
            try:
                future = session.stub.Release.future(request, timeout=self._timeout_s)
            except BaseException:
                self._releases.release()
                raise
            future.add_done_callback(lambda _: self._releases.release())
