"""The source that a copy pulls from, seen as a source sees it: keys are as they are stored."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.links import Links
from kvpool.channels.tls import TlsConfig
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import KeyArray, Tier, qualify
from kvpool.service import rpc, wire
from kvpool.service.client_session import Session
from kvpool.service.source_calls import SourceCalls
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import common_pb2, source_admin_pb2, source_admin_pb2_grpc

log = logging.getLogger(__name__)

PAGE = 4096


@dataclass(frozen=True)
class Alike:
    """What blocks of one lease and one reservation have in common."""

    namespace_id: bytes
    group: int  # of the namespace: one with these sections; keys are stored with group and shard folded in
    tenant: str
    fidelity: int
    tier: int


class Origin(SourceCalls):
    """The other source: what it has, read rights of it, and what to drop there."""

    def __init__(
        self, address: str, *, client: str, credential: str, links: Links, tls: TlsConfig | None = None
    ) -> None:
        # Of channels whose reads are over when they return: they go straight into slots.
        super().__init__(address, client=client, credential=credential, channels=("shm", "tcp"), links=links, tls=tls)
        self._admin_channel = rpc.make_channel(address, credential=credential, tls=tls)
        self._admin: Any = source_admin_pb2_grpc.SourceAdminStub(self._admin_channel)

    def close(self) -> None:
        super().close()
        self._admin_channel.close()

    def namespaces(self) -> list[source_admin_pb2.NamespaceInfo]:
        """All namespaces known there, with what they hold."""
        request = source_admin_pb2.ListNamespacesRequest()
        return list(self._call(lambda _, t: self._admin.ListNamespaces(request, timeout=t)).namespaces)

    def pages(self, namespace_id: bytes) -> Iterator[list[pb.BlockInfo]]:
        """Readable blocks of a namespace (empty: of all), a page at a time: first those in memory.

        What goes from memory to the SSD meanwhile is in a later page; what comes up is in none, and is found next time.
        """
        for below in (False, True):
            cursor = 0
            while True:
                request = pb.ListBlocksRequest(cursor=cursor, limit=PAGE, namespace_id=namespace_id, below=below)
                reply = self._call(lambda s, t, r=request: s.stub.ListBlocks(r, timeout=t))  # type: ignore[misc]
                yield [block for block in reply.blocks if block.state == "readable"]
                cursor = reply.next_cursor
                if not cursor:
                    break

    def describe(self, keys: KeyArray) -> Iterator[list[pb.BlockInfo]]:
        """Those of `keys` that are readable, in memory or on the SSD alone, a page at a time."""
        for first in range(0, len(keys), PAGE):
            found: dict[bytes, pb.BlockInfo] = {}
            for below in (False, True):
                request = pb.ListBlocksRequest(keys=keys[first : first + PAGE].tobytes(), below=below)
                reply = self._call(lambda s, t, r=request: s.stub.ListBlocks(r, timeout=t))  # type: ignore[misc]
                # Once only, also of one that goes down between the two looks.
                found = {block.key: block for block in reply.blocks if block.state == "readable"} | found
            yield list(found.values())

    def lease(self, alike: Alike, keys: KeyArray, ttl_s: float) -> tuple[Session, pb.LeaseReply]:
        """A read right in whatever fidelity it is stored; what is on the SSD alone is brought up for it."""

        def call(session: Session, timeout_s: float) -> tuple[Session, pb.LeaseReply]:
            ttl_ms = int(ttl_s * 1000)
            promote_ms = int(timeout_s * 1000) if alike.tier == Tier.SSD else 0
            request = pb.LeaseRequest(
                session_id=session.id, namespace_id=alike.namespace_id, keys=_key_list(alike.group, keys),
                ttl_ms=ttl_ms, fidelity_min=common_pb2.FIDELITY_INT8, promote_ms=promote_ms,
            )  # fmt: skip
            return session, session.stub.Lease(request, timeout=2 * timeout_s)

        return self._call(call)

    def release(self, session: Session, lease: int, alike: Alike, corrupt: KeyArray) -> None:
        """Gives a lease back, and tells which blocks failed their digest. Should it fail, the lease expires."""
        request = pb.ReleaseRequest(session_id=session.id, lease_ids=[lease])
        if len(corrupt):
            request.namespace_id = alike.namespace_id
            request.corrupt.CopyFrom(_key_list(alike.group, corrupt))
        try:
            self._call(lambda s, t: s.stub.Release(request, timeout=t), session=session)
        except KvpoolError as error:
            log.info("a lease on %s was not given back: %s", self.address, error)

    def unchanged(self, alike: Alike, blocks: Descriptors, ttl_s: float) -> NDArray[np.bool_]:
        """Which blocks still stand under their keys there, with the same digests."""
        session, reply = self.lease(alike, blocks.keys, ttl_s)
        found = np.fromiter(reply.found, dtype=np.bool_, count=len(blocks))
        if reply.lease_id:
            try:
                now = wire.descriptors_from_proto(reply.blocks, blocks.keys, blocks.digests.shape[1])
                found &= (now.sizes == blocks.sizes) & (now.digests == blocks.digests).all(axis=1)
            finally:
                self.release(session, reply.lease_id, alike, blocks.keys[:0])
        return found

    def drop(self, alike: Alike, blocks: Descriptors) -> int:
        """Removes blocks there, after they were moved. Returns how many; what is another one by now stays."""
        request = pb.RemoveRequest(
            namespace_id=alike.namespace_id, keys=_key_list(alike.group, blocks.keys),
            digests=blocks.digests.ravel().tolist(),
        )  # fmt: skip
        return self._call(lambda s, t: int(s.stub.Remove(request, timeout=t).blocks_removed))


def _key_list(group: int, stored: KeyArray) -> common_pb2.KeyList:
    """Stored keys as a call about shard 0 of a group must name them; `qualify` is its own inverse."""
    return common_pb2.KeyList(group=group, keys=qualify(np.ascontiguousarray(stored), group, 0).tobytes())
