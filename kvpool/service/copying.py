"""Pulling blocks of another source into this one: straight from a data channel into reserved slots of the segment.

Idempotent: what is here already counts as done, so that a copy that ended early is simply begun again. A block that is
moved leaves its origin only after its commit here.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.links import Links
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, KvpoolError, NoSpace, Unavailable, UnknownNamespace
from kvpool.core.ids import Fidelity, KeyArray, NamespaceId, SessionId, Tier, qualify
from kvpool.core.index import NO_ENTRY
from kvpool.core.namespace import GroupSpec, NamespaceSpec
from kvpool.core.results import ReserveStatus
from kvpool.core.source import SourceCore
from kvpool.service import rpc, wire
from kvpool.service.client_session import Session
from kvpool.service.operations import Operation
from kvpool.service.source_calls import SourceCalls
from kvpool.service.verifying import parts
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import common_pb2, source_admin_pb2, source_admin_pb2_grpc

log = logging.getLogger(__name__)

BATCH_BLOCKS_MAX, BATCH_BYTES_MAX = 1024, 64 << 20
PAGE = 4096
#: A batch that fails for its link is tried again so often.
ATTEMPTS_MAX = 3
#: Batches in a row that find no room at all; after these nothing fits any more.
REFUSED_MAX = 4
#: A batch may take this long, and a second for each so many bytes.
BATCH_TIMEOUT_S, BYTES_PER_S_MIN = 10.0, 8 << 20
_TTL_S_MAX = 600.0


@dataclass(frozen=True)
class _Alike:
    """What blocks of one lease and one reservation have in common."""

    namespace_id: bytes
    group: int  # of the namespace: one with these sections; keys are stored with group and shard folded in
    tenant: str
    fidelity: int
    tier: int


class Origin(SourceCalls):
    """The other source, seen as a source sees it: keys are as they are stored."""

    def __init__(self, address: str, *, client: str, credential: str, links: Links) -> None:
        # Of channels whose reads are over when they return: they go straight into slots.
        super().__init__(address, client=client, credential=credential, channels=("shm", "tcp"), links=links)
        self._admin_channel = rpc.make_channel(address, credential=credential)
        self._admin: Any = source_admin_pb2_grpc.SourceAdminStub(self._admin_channel)

    def close(self) -> None:
        super().close()
        self._admin_channel.close()

    def namespaces(self) -> list[source_admin_pb2.NamespaceInfo]:
        """All namespaces known there, with what they hold."""
        request = source_admin_pb2.ListNamespacesRequest()
        return list(self._call(lambda _, t: self._admin.ListNamespaces(request, timeout=t)).namespaces)

    def pages(self, namespace_id: bytes) -> Iterator[list[pb.BlockInfo]]:
        """Readable blocks of a namespace (empty: of all), a page at a time."""
        cursor = 0
        while True:
            request = pb.ListBlocksRequest(cursor=cursor, limit=PAGE, namespace_id=namespace_id)
            reply = self._call(lambda s, t, r=request: s.stub.ListBlocks(r, timeout=t))  # type: ignore[misc]
            yield [block for block in reply.blocks if block.state == "readable"]
            cursor = reply.next_cursor
            if not cursor:
                return

    def describe(self, keys: KeyArray) -> Iterator[list[pb.BlockInfo]]:
        """Those of `keys` that are readable, a page at a time."""
        for first in range(0, len(keys), PAGE):
            request = pb.ListBlocksRequest(keys=keys[first : first + PAGE].tobytes())
            reply = self._call(lambda s, t, r=request: s.stub.ListBlocks(r, timeout=t))  # type: ignore[misc]
            yield [block for block in reply.blocks if block.state == "readable"]

    def lease(self, alike: _Alike, keys: KeyArray, ttl_s: float) -> tuple[Session, pb.LeaseReply]:
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

    def release(self, session: Session, lease: int, alike: _Alike, corrupt: KeyArray) -> None:
        """Gives a lease back, and tells which blocks failed their digest. Should it fail, the lease expires."""
        request = pb.ReleaseRequest(session_id=session.id, lease_ids=[lease])
        if len(corrupt):
            request.namespace_id = alike.namespace_id
            request.corrupt.CopyFrom(_key_list(alike.group, corrupt))
        try:
            self._call(lambda s, t: s.stub.Release(request, timeout=t), session=session)
        except KvpoolError as error:
            log.info("a lease on %s was not given back: %s", self.address, error)

    def drop(self, alike: _Alike, keys: KeyArray) -> None:
        """Removes blocks there, after they were moved."""
        request = pb.RemoveRequest(namespace_id=alike.namespace_id, keys=_key_list(alike.group, keys))
        self._call(lambda s, t: s.stub.Remove(request, timeout=t))


def _key_list(group: int, stored: KeyArray) -> common_pb2.KeyList:
    """Stored keys as a call about shard 0 of a group must name them; `qualify` is its own inverse."""
    return common_pb2.KeyList(group=group, keys=qualify(np.ascontiguousarray(stored), group, 0).tobytes())


def copy_blocks(
    operation: Operation, request: source_admin_pb2.CopyRequest, data: NDArray[np.uint8], own_id: str,
    credential: str, links: Links,
) -> None:  # fmt: skip
    """Pulls what `request` names.

    Args: data: uint8, the data of this source's own segment.
    Raises: Unavailable if the origin does not answer; NoSpace if nothing fits any more.
    """
    keys = wire.keys_from_proto(request.keys)
    if len(keys) and not request.namespace_id:
        raise BadArgument("keys need the namespace they are of")
    origin = Origin(request.from_address, client=f"copy to {own_id}", credential=credential, links=links)
    try:
        if origin.source_id == own_id:
            raise BadArgument(f"{request.from_address} is this source itself")
        with operation.session(f"copy from {origin.source_id}") as session:
            _Copy(operation, origin, session, data, request.move).run(request.namespace_id, keys)
    except Unavailable as error:
        raise Unavailable(
            f"the source at {request.from_address} failed: {error}", hint="begin again: what arrived stays"
        ) from error
    finally:
        origin.close()


class _Copy:
    """One copy under way."""

    def __init__(
        self, operation: Operation, origin: Origin, session: SessionId, data: NDArray[np.uint8], move: bool
    ) -> None:
        self._operation, self._counts, self._origin = operation, operation.counts, origin
        self._session, self._data, self._move = session, data, move
        self._specs: dict[bytes, NamespaceSpec] = {}
        self._refused = 0

    def run(self, namespace_id: bytes, keys: KeyArray) -> None:
        held = self._learn_namespaces(namespace_id)
        self._counts.blocks_total = len(keys) or held
        seen = 0
        for page in self._origin.describe(keys) if len(keys) else self._origin.pages(namespace_id):
            seen += len(page)
            for alike, blocks in self._alike(page).items():
                for batch in parts(blocks, [b.size for b in blocks], BATCH_BLOCKS_MAX, BATCH_BYTES_MAX):
                    if self._operation.stopped:
                        return
                    self._pull(alike, batch)
        if len(keys):
            self._counts.failed(len(keys) - seen, "some keys are not there")

    def _learn_namespaces(self, namespace_id: bytes) -> int:
        """Registers here what is to come. Returns how many blocks that is."""
        chosen = [info for info in self._origin.namespaces() if namespace_id in (b"", info.namespace_id)]
        if namespace_id and not chosen:
            raise UnknownNamespace(f"{self._origin.address} has no namespace {namespace_id.hex()}")
        for info in chosen:
            spec = self._specs[info.namespace_id] = wire.namespace_from_proto(info.spec)
            self._operation.turn(lambda core, _, s=spec: core.register_namespace(s))  # type: ignore[misc]
        return sum(info.blocks for info in chosen)

    def _alike(self, page: list[pb.BlockInfo]) -> dict[_Alike, list[pb.BlockInfo]]:
        """Blocks by what one call must have in common."""
        found: dict[_Alike, list[pb.BlockInfo]] = defaultdict(list)
        for block in page:
            spec = self._specs.get(block.namespace_id)
            group = None if spec is None else wire.group_like(spec, block)
            if group is None:
                self._counts.failed(1, "some blocks are of no known namespace or group")
                continue
            found[_Alike(block.namespace_id, group, block.tenant, block.fidelity, block.tier)].append(block)
        return found

    # ------------------------------------------------------------ one batch

    def _pull(self, alike: _Alike, batch: list[pb.BlockInfo]) -> None:
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                self._pull_once(alike, batch)
                return
            except Unavailable as error:
                if attempt == ATTEMPTS_MAX or self._operation.stopped:
                    raise
                log.info("copy from %s, attempt %d: %s", self._origin.address, attempt, error)
                self._operation.pause(0.2 * attempt)

    def _pull_once(self, alike: _Alike, batch: list[pb.BlockInfo]) -> None:
        keys = np.frombuffer(b"".join(b.key for b in batch), dtype=np.uint8).reshape(-1, 16)
        timeout_s = min(BATCH_TIMEOUT_S + sum(b.size for b in batch) / BYTES_PER_S_MIN, _TTL_S_MAX / 2)
        session, reply = self._origin.lease(alike, keys, 2 * timeout_s)
        found = np.fromiter(reply.found, dtype=np.bool_, count=len(keys))
        self._counts.failed(int((~found).sum()), "some blocks were gone before they could be read")
        if not reply.lease_id:
            return
        corrupt = keys[:0]
        done = keys[:0]
        try:
            # Digests come from the origin's own index: what arrives is what was committed there, or is not kept.
            sections = _section_count(self._specs[alike.namespace_id], alike.group)
            blocks = wire.descriptors_from_proto(reply.blocks, keys, sections).take(found)
            fits = blocks.sizes <= len(self._data)
            self._counts.failed(int((~fits).sum()), "some objects are larger than all memory here")
            kept = np.flatnonzero(found)[fits].tolist()
            blocks, names = blocks.take(fits), [batch[row].name for row in kept]
            done, corrupt = self._take(alike, session, reply.lease_id, blocks, names, timeout_s)
        finally:
            self._origin.release(session, reply.lease_id, alike, corrupt)
        if self._move and len(done):
            self._origin.drop(alike, done)

    def _take(
        self, alike: _Alike, session: Session, lease: int, blocks: Descriptors, names: list[str], timeout_s: float
    ) -> tuple[KeyArray, KeyArray]:
        """Reserves, reads and commits leased blocks.

        Returns: the keys that are here now, and those whose bytes are bad.
        """
        if not len(blocks):
            return blocks.keys, blocks.keys
        try:
            reserved = self._operation.turn(
                lambda core, now: _reserve(core, self._session, alike, blocks, names, 2 * timeout_s, now)
            )
        except NoSpace as error:
            self._counts.failed(len(blocks), str(error))
            self._refused += 1
            if self._refused >= REFUSED_MAX:
                raise
            return blocks.keys[:0], blocks.keys[:0]
        self._refused = 0
        status = np.asarray(reserved.status)
        equal = status == ReserveStatus.EXISTS
        rows = np.flatnonzero(equal)
        if len(rows):
            there = blocks.take(rows)
            equal[rows] = self._operation.turn(lambda core, _: _equal_here(core, there, objects=bool(names[0])))
        mine = np.flatnonzero(status == ReserveStatus.RESERVED)
        self._note_left_out(status, equal)
        good = np.zeros(len(mine), dtype=np.bool_)
        try:
            if len(mine):
                targets = _targets(self._data, reserved.slots.take(mine))
                good = session.channel.read(lease, blocks.take(mine), targets, deadline_s=timeout_s, verify=True)
                self._operation.turn(lambda core, now: _commit(core, self._session, reserved, blocks, mine[good], now))
        finally:
            if len(mine) and not good.all():
                self._operation.turn(lambda core, now: core.abort(self._session, reserved.reservation, now))
        self._count(blocks, mine[good], int(equal.sum()), int((~good).sum()))
        here = equal
        here[mine[good]] = True
        return blocks.keys[here], blocks.keys[mine[~good]]

    def _note_left_out(self, status: NDArray[np.uint8], equal: NDArray[np.bool_]) -> None:
        """Counts what was neither reserved nor is here already."""
        self._counts.failed(int(((status == ReserveStatus.EXISTS) & ~equal).sum()), "something else has this name here")
        for number, why in (
            (ReserveStatus.BEING_WRITTEN, "some blocks are being written here by others"),
            (ReserveStatus.NO_SPACE, "no room for some blocks"),
            (ReserveStatus.OVER_QUOTA, "some blocks are over their quota here"),
        ):
            self._counts.failed(int((status == number).sum()), why)

    def _count(self, blocks: Descriptors, arrived: NDArray[np.int64], existed: int, bad: int) -> None:
        self._counts.blocks_done += len(arrived) + existed
        self._counts.bytes_done += int(blocks.sizes[arrived].sum(dtype=np.uint64))
        self._counts.blocks_bad += bad
        if bad:
            self._counts.message = "some blocks arrived with bytes that were never committed, and were not kept"


def _section_count(spec: NamespaceSpec, group: int) -> int:
    return 1 if spec.is_objects else spec.groups[group].section_count


def _reserve(
    core: SourceCore, session: SessionId, alike: _Alike, blocks: Descriptors, names: list[str], ttl_s: float, now: int
) -> Any:
    """Slots of the sizes that the origin's blocks have, under the same names and for the same tenant."""
    group: GroupSpec = core.group(alike.namespace_id, alike.group, 0)
    objects = bool(names and names[0])
    sized = objects or alike.fidelity != Fidelity.EXACT
    return core.reserve(
        session, NamespaceId(alike.namespace_id), group, blocks.keys, int(ttl_s * 1e6), now,
        fidelity=Fidelity(alike.fidelity), sizes=np.asarray(blocks.sizes, dtype=np.uint64) if sized else None,
        names=[name.encode() for name in names] if objects else None, tenant=alike.tenant,
    )  # fmt: skip


def _commit(
    core: SourceCore, session: SessionId, reserved: Any, blocks: Descriptors, rows: NDArray[np.int64], now: int
) -> None:
    """Commits whole blocks with the digests that their origin gave."""
    sections = blocks.digests.shape[1]
    indices = np.repeat(rows, sections).astype(np.uint32)
    numbers = np.tile(np.arange(sections, dtype=np.uint32), len(rows))
    digests = np.ascontiguousarray(blocks.digests[rows]).ravel()
    core.commit(session, reserved.reservation, indices, numbers, digests, now)


def _targets(data: NDArray[np.uint8], slots: Descriptors) -> list[NDArray[np.uint8]]:
    """The slots themselves, as a channel's memory: one row each."""
    return [
        data[begin : begin + size] for begin, size in zip(slots.offsets.tolist(), slots.sizes.tolist(), strict=True)
    ]


def _equal_here(core: SourceCore, blocks: Descriptors, *, objects: bool) -> NDArray[np.bool_]:
    """Whether what is here already is as good as what the origin has.

    Blocks are named by their content: an exact one is as good as any. An object may have been put again under its
    name, and a lossy block is worth less than an exact one: these must have the same digests.
    """
    entries = core.index.lookup(blocks.keys)
    result = np.zeros(len(blocks), dtype=np.bool_)
    for row, entry in enumerate(entries.tolist()):
        if entry == NO_ENTRY:
            continue
        exact = int(core.arrays.fidelities[entry]) == Fidelity.EXACT
        digests = core.arrays.digests[entry, : blocks.digests.shape[1]]
        same = int(core.arrays.sizes[entry]) == int(blocks.sizes[row]) and bool((digests == blocks.digests[row]).all())
        result[row] = same or (exact and not objects)
    return result
