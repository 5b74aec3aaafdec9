"""The library face of the pool: put, get, wait and the calls that they are made of. Synchronous, for any thread.

Every call ends within its time with a result or a KvpoolError. A miss is a result. Bytes are checked against their
digests before they count as found. The connection comes back by itself; what was held before is then gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import Memory
from kvpool.channels.links import Links
from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import BadArgument, NoSpace
from kvpool.core.hashing import object_keys
from kvpool.core.ids import Fidelity, NamespaceId
from kvpool.core.namespace import NamespaceSpec
from kvpool.service.client_lossy import LossyBlocks, LossyRead
from kvpool.service.client_objects import ObjectMemory
from kvpool.service.client_reads import RELEASES_MAX, ReadRequest, as_rows, rows_of
from kvpool.service.client_sections import SectionCalls
from kvpool.service.client_types import (
    ABANDONED,
    BEING_WRITTEN,
    COMMITTED,
    DEADLINE,
    EXISTS,
    NO_SPACE,
    OVER_QUOTA,
    RESERVED,
    SECTION,
    Bools,
    Counters,
    GetResult,
    Hold,
    ObjectsResult,
    PutResult,
    Reservation,
    SectionsResult,
    Waited,
)  # fmt: skip
from kvpool.service.client_writes import Lot
from kvpool.service.source_calls import DEFAULT_CHANNELS, Keys, check_keys, key_list
from kvpool.v1 import block_source_pb2 as pb

__all__ = [
    "ABANDONED", "BEING_WRITTEN", "COMMITTED", "DEADLINE", "EXISTS", "NO_SPACE", "OVER_QUOTA", "RESERVED", "SECTION",
    "Counters", "GetResult", "Hold", "ObjectsResult", "PoolClient", "PutResult", "Reservation",
    "SectionsResult", "Waited",
]  # fmt: skip

#: What an object may be given as: anything with the buffer interface.
Buffer = bytes | bytearray | memoryview | NDArray[np.generic]


class PoolClient(SectionCalls):
    """Whole operations on one source: blocks by key, objects by name; the calls they are made of are inherited."""

    def __init__(
        self,
        address: str,
        *,
        client: str = "client",
        credential: str = "",
        channels: Sequence[str] = DEFAULT_CHANNELS,
        timeout_s: float = 5.0,
        links: Links | None = None,
        tls: TlsConfig | None = None,
    ) -> None:
        super().__init__(
            address, client=client, credential=credential, channels=channels, timeout_s=timeout_s, links=links, tls=tls
        )
        self._releases = threading.BoundedSemaphore(RELEASES_MAX)

    # ------------------------------------------------------------ blocks

    def put(
        self,
        namespace: NamespaceId,
        keys: Keys,
        blocks: Memory,
        *,
        rows: NDArray[np.int64] | None = None,
        group: int = 0,
        shard: int = 0,
        parent: bytes = b"",
        tenant: str = "",
        hold: Hold | None = None,
        ttl_s: float = 30.0,
        fidelity: Fidelity = Fidelity.EXACT,
    ) -> PutResult:
        """Stores blocks: reserve, write, commit. Blocks that exist, or that somebody else writes, are left alone.

        Args:
            blocks: uint8 (rows, >= block bytes), or one array a row; rows[i], or i, is the row of key i.
            parent: key of the block before the first one: tells eviction what stands on what.
            tenant: whose quota the blocks count against.
            hold: put on the blocks, also on those that exist.
            ttl_s: time within which the call has to be through.
            fidelity: INT8 stores a quarter (of float32) or half of the bytes, for readers that allow it; blocks beyond
                the error bound are stored as they are.
        Raises: Unsupported if blocks of this group have no int8 form.
        """
        begin_s = time.monotonic()
        check_keys(keys)
        own = np.arange(len(keys), dtype=np.int64) if rows is None else as_rows(rows, len(keys))
        common = Common(group, shard, parent, tenant, hold, ttl_s)
        if fidelity is Fidelity.EXACT:
            return self._put(namespace, keys, in_one(blocks, own), common, begin_s)
        codec = self._codec(namespace, group)
        encoded, within = codec.encode(blocks, own)
        sizes = np.full(int(within.sum()), codec.stored_bytes, dtype=np.uint64)
        places = np.flatnonzero(within)
        lossy = self._put(namespace, keys[within], in_one(encoded, places), common, begin_s, sizes, fidelity)
        if within.all():
            return lossy
        exact = self._put(namespace, keys[~within], in_one(blocks, own[~within]), common, begin_s)
        return merged(within, lossy, exact)

    def put_lots(
        self,
        namespace: NamespaceId,
        keys: Keys,
        lots: Callable[[NDArray[np.int64]], Iterable[Lot]],
        *,
        group: int = 0,
        shard: int = 0,
        parent: bytes = b"",
        tenant: str = "",
        ttl_s: float = 30.0,
    ) -> PutResult:
        """As `put`, of blocks that are brought together lot by lot, and only those that are to be stored.

        Args: lots: given the keys that are (int64), makes them, as `fill` takes them; those it leaves out are not
            stored. Called at most once.
        """
        begin_s = time.monotonic()
        check_keys(keys)
        return self._put(namespace, keys, lots, Common(group, shard, parent, tenant, None, ttl_s), begin_s)

    def get(
        self,
        namespace: NamespaceId,
        keys: Keys,
        out: Memory,
        *,
        rows: NDArray[np.int64] | None = None,
        group: int = 0,
        shard: int = 0,
        handoff: str = "",
        ttl_s: float = 30.0,
        promote_s: float = 5.0,
        verify: bool = True,
        fidelity_min: Fidelity = Fidelity.EXACT,
    ) -> GetResult:
        """Copies blocks into rows of `out`, each checked against its digests.

        Args:
            out: uint8 (rows, >= block bytes), or one array a row; rows[i], or i, is the row for key i. Rows not found
                may hold anything.
            handoff: request whose hand-off hold on these blocks ends with this call.
            ttl_s: time within which the call has to be through.
            promote_s: how long to wait for blocks that are on the source's SSD only, at most 0.8 of the time that is
                left; 0 = they count as absent.
            verify: False for tests and benchmarks only.
            fidelity_min: INT8 also takes blocks that were stored as int8, decoded; see `fidelities` of the result.
        Raises: Unavailable, ChannelError, DeadlineExceeded (the source did not answer in time): nothing was read.
        """
        begin_s = time.monotonic()
        request = ReadRequest(
            namespace, keys, group, shard, handoff=handoff, ttl_s=ttl_s, promote_s=promote_s, verify=verify,
            fidelity_min=fidelity_min,
        )  # fmt: skip
        if fidelity_min is Fidelity.EXACT:
            outcome = self._read(request, rows_of(out, rows, len(keys)))
        else:
            lossy = LossyRead(self._codec(namespace, group), out, rows, len(keys))
            outcome = self._read(request, lossy.provide)
            lossy.finish(outcome)
        return GetResult(
            outcome.found, outcome.corrupt, outcome.bytes, time.monotonic() - begin_s, outcome.kind, outcome.fidelities
        )

    def free_hold(self, namespace: NamespaceId, keys: Keys, request_id: str, *, group: int = 0, shard: int = 0) -> None:
        """Ends a request's hand-off hold on those of `keys` that are there, without reading."""
        self._call(
            lambda s, t: s.stub.Release(
                pb.ReleaseRequest(
                    session_id=s.id, namespace_id=namespace, handoff_request_id=request_id,
                    handed_off=key_list(keys, group, shard),
                ),
                timeout=t,
            )
        )  # fmt: skip

    # ------------------------------------------------------------ objects

    def register_objects(self, domain: str) -> NamespaceId:
        """The namespace of objects of a domain; any two clients that name the same domain share it."""
        return self.register(NamespaceSpec.objects(domain))

    def put_objects(
        self,
        namespace: NamespaceId,
        names: Sequence[str],
        values: Sequence[Buffer],
        *,
        tenant: str = "",
        ttl_s: float = 30.0,
    ) -> PutResult:
        """Stores things of any size, from 1 byte to what a segment holds, under string names.

        What a name stands for never changes: a name that exists is left alone, until it is removed.
        """
        begin_s = time.monotonic()
        if len(names) != len(values):
            raise BadArgument(f"{len(names)} names do not name {len(values)} objects")
        arrays = [as_bytes(name, value) for name, value in zip(names, values, strict=True)]
        sizes = np.fromiter((len(array) for array in arrays), dtype=np.uint64, count=len(arrays))
        try:
            reservation = self.reserve(
                namespace, object_keys(namespace, names), ttl_s=ttl_s, tenant=tenant, sizes=sizes, names=names
            )
        except NoSpace:
            return nothing_stored(len(names), begin_s)
        return self._filled(reservation, in_one(arrays, np.arange(len(arrays))), ttl_s, begin_s)

    def get_objects(
        self,
        namespace: NamespaceId,
        names: Sequence[str],
        out: Sequence[NDArray[np.uint8]] | None = None,
        *,
        ttl_s: float = 30.0,
        promote_s: float = 5.0,
    ) -> ObjectsResult:
        """Reads objects, each checked against its digest.

        Args: out: contiguous uint8, one a name, long enough; values are then views of it. None = new memory.
        Raises: Unavailable, ChannelError: nothing was read. BadArgument: an array of `out` is too short.
        """
        begin_s = time.monotonic()
        memory = ObjectMemory(names, out)
        request = ReadRequest(namespace, object_keys(namespace, names), names=names, ttl_s=ttl_s, promote_s=promote_s)
        outcome = self._read(request, memory.provide)
        values = memory.values(outcome.found)
        return ObjectsResult(values, outcome.corrupt, outcome.bytes, time.monotonic() - begin_s, outcome.kind)

    def remove_objects(self, namespace: NamespaceId, names: Sequence[str] = (), *, prefix: str = "") -> int:
        """Removes objects by name, or all whose names begin with `prefix`. Returns how many were there."""
        if prefix:
            return self._remove(pb.RemoveRequest(namespace_id=namespace, name_prefix=prefix))
        return self.remove(namespace, object_keys(namespace, names))

    # ------------------------------------------------------------ parts

    def _codec(self, namespace: NamespaceId, group: int) -> LossyBlocks:
        spec = self._group(namespace, group)
        return LossyBlocks(self._specs[namespace], spec)

    def _put(
        self,
        namespace: NamespaceId,
        keys: Keys,
        lots: Callable[[NDArray[np.int64]], Iterable[Lot]],
        common: Common,
        begin_s: float,
        sizes: NDArray[np.uint64] | None = None,
        fidelity: Fidelity = Fidelity.EXACT,
    ) -> PutResult:
        try:
            reservation = self.reserve(
                namespace, keys, group=common.group, shard=common.shard, ttl_s=common.ttl_s, hold=common.hold,
                parent=common.parent, tenant=common.tenant, sizes=sizes, fidelity=fidelity,
            )  # fmt: skip
        except NoSpace:
            return nothing_stored(len(keys), begin_s)
        return self._filled(reservation, lots, common.ttl_s, begin_s)

    def _filled(
        self,
        reservation: Reservation,
        lots: Callable[[NDArray[np.int64]], Iterable[Lot]],
        ttl_s: float,
        begin_s: float,
    ) -> PutResult:
        """Writes and commits what was reserved."""
        reserved = np.flatnonzero(reservation.status == RESERVED)
        stored = np.zeros(len(reservation.status), dtype=np.bool_)
        if len(reserved):
            stored[self.fill(reservation, lots(reserved), deadline_s=ttl_s)] = True
        moved = int(reservation.slots.sizes[stored].sum(dtype=np.uint64))
        existed: Bools = reservation.status == EXISTS
        kind = reservation.session.channel.write_kind
        return PutResult(stored, existed, moved, time.monotonic() - begin_s, kind)


def in_one(memory: Memory, rows: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], Iterable[Lot]]:
    """All that is to be stored as one lot; rows: of `memory` for each key."""
    return lambda indices: [(indices, memory, rows[indices])]


def as_bytes(name: str, value: Buffer) -> NDArray[np.uint8]:
    """Raises: BadArgument for what has no contiguous bytes, or none at all."""
    try:
        array = value if isinstance(value, np.ndarray) else np.frombuffer(value, dtype=np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise BadArgument(f"object {name!r}: {error}", hint="give bytes or a contiguous array") from error
    if not array.flags.c_contiguous:
        raise BadArgument(f"object {name!r} must be contiguous in memory", hint="numpy.ascontiguousarray makes it so")
    if not array.nbytes:
        raise BadArgument(f"object {name!r} is empty", hint="an object has at least 1 byte")
    return array.reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Common:
    """What all blocks of one `put` share."""

    group: int
    shard: int
    parent: bytes
    tenant: str
    hold: Hold | None
    ttl_s: float


def merged(first: Bools, one: PutResult, other: PutResult) -> PutResult:
    """The result of two halves of one call: of the keys in `first`, and of the others."""
    stored, existed = np.zeros(len(first), dtype=np.bool_), np.zeros(len(first), dtype=np.bool_)
    stored[first], stored[~first] = one.stored, other.stored
    existed[first], existed[~first] = one.existed, other.existed
    return PutResult(
        stored, existed, one.bytes + other.bytes, max(one.seconds, other.seconds), one.channel or other.channel
    )


def nothing_stored(count: int, begin_s: float) -> PutResult:
    none = np.zeros(count, dtype=np.bool_)
    return PutResult(none, none.copy(), 0, time.monotonic() - begin_s, "")
