"""Objects of one tenant in the pool: on one node, or on all nodes of a cluster. Codes instead of errors.

Both pools answer alike: a method that is given n names returns n codes (int64), of which those of `get` are sizes where
they are not negative.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.mooncake.codes import Code, code_of
from engines.mooncake.memory import Bytes
from engines.mooncake.values import Values
from kvpool.client import BEING_WRITTEN, EXISTS, NO_SPACE, OVER_QUOTA, RESERVED, PoolClient, Reservation
from kvpool.cluster import ClusterClient
from kvpool.core.errors import BadArgument, NoSpace, Unavailable
from kvpool.core.hashing import object_keys
from kvpool.core.ids import NamespaceId
from kvpool.service.client_types import ObjectsResult
from kvpool.service.cluster_types import ClusterObjectsResult, ClusterRemoveResult
from kvpool.v1 import block_source_pb2 as pb

Codes = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: Deadline of a whole put or get.
TRANSFER_S = 30.0
#: The longest that the pool holds anything for somebody who may never come back.
PIN_S_MAX = 7 * 24 * 3600.0

_CODE_OF_STATUS = np.full(8, Code.INTERNAL_ERROR, dtype=np.int64)
_CODE_OF_STATUS[RESERVED] = Code.OK
_CODE_OF_STATUS[EXISTS] = Code.OBJECT_ALREADY_EXISTS
_CODE_OF_STATUS[BEING_WRITTEN] = Code.REPLICA_IS_NOT_READY
_CODE_OF_STATUS[NO_SPACE] = Code.NO_AVAILABLE_HANDLE
_CODE_OF_STATUS[OVER_QUOTA] = Code.TENANT_QUOTA_EXCEEDED


class ObjectPool(Protocol):
    """What a store needs of the pool. Calls may come from several threads.

    Raises: KvpoolError from every call, for what concerns all of its names.
    """

    def put(self, names: Sequence[str], values: Values, copies: int) -> Codes:
        """Stores objects. One that exists, or that somebody else writes, is left alone, and its code says so."""
        ...

    def get(self, names: Sequence[str], values: Values) -> Codes:
        """Reads objects, checked against their digests; the code is the object's size, or why it was not read."""
        ...

    def read(self, names: Sequence[str]) -> list[Bytes | None]:
        """Objects in memory of their own; None for a miss."""
        ...

    def exists(self, names: Sequence[str]) -> Bools: ...

    def sizes(self, names: Sequence[str]) -> Codes:
        """Bytes of each object, or OBJECT_NOT_FOUND."""
        ...

    def in_memory(self, names: Sequence[str]) -> Bools:
        """Which of the objects that exist are in memory; the others are on an SSD."""
        ...

    def remove(self, names: Sequence[str]) -> int:
        """Removes objects, pinned or not; returns how many were there."""
        ...

    def remove_all(self) -> int: ...

    def remove_matching(self, pattern: re.Pattern[str]) -> int: ...

    def pin(self, names: Sequence[str], ttl_s: float) -> None:
        """Holds objects against eviction."""
        ...

    def check(self) -> None:
        """Asks the pool itself: shared memory can still be read when nobody is behind it. Raises: as every call."""
        ...

    def close(self) -> None: ...


class ObjectReader(Protocol):
    """What looking and reading need of a client: `PoolClient` and `ClusterClient` both have it."""

    def get_objects(
        self, namespace: NamespaceId, names: Sequence[str], out: Sequence[Bytes] | None = None, *, ttl_s: float
    ) -> ObjectsResult | ClusterObjectsResult: ...

    def lookup_objects(self, namespace: NamespaceId, names: Sequence[str]) -> Bools: ...

    def object_sizes(self, namespace: NamespaceId, names: Sequence[str]) -> NDArray[np.uint64]: ...


class Reads:
    """Looking and reading, on one node or several."""

    def __init__(self, reader: ObjectReader, namespace: NamespaceId) -> None:
        self._reader, self.namespace = reader, namespace

    def get(self, names: Sequence[str], values: Values) -> Codes:
        return read_into(names, values, self._read)

    def read(self, names: Sequence[str]) -> list[Bytes | None]:
        return self._read(names, None)

    def _read(self, names: Sequence[str], out: Sequence[Bytes] | None) -> list[Bytes | None]:
        return self._reader.get_objects(self.namespace, names, out, ttl_s=TRANSFER_S).values

    def exists(self, names: Sequence[str]) -> Bools:
        return self._reader.lookup_objects(self.namespace, names)

    def sizes(self, names: Sequence[str]) -> Codes:
        sizes = self._reader.object_sizes(self.namespace, names).astype(np.int64)
        return np.where(sizes > 0, sizes, Code.OBJECT_NOT_FOUND)


class NodePool(Reads):
    """Objects on one node."""

    def __init__(self, client: PoolClient, domain: str, tenant: str) -> None:
        """Raises: KvpoolError if the node can't be reached."""
        super().__init__(client, client.register_objects(domain))
        self._client, self._tenant = client, tenant
        self._bytes_total = int(client.stats().bytes_total)

    def put(self, names: Sequence[str], values: Values, copies: int) -> Codes:
        codes = np.where(values.sizes > self._bytes_total, Code.NO_AVAILABLE_HANDLE, Code.OK)
        rows = np.flatnonzero(codes == Code.OK)
        if len(rows):
            codes[rows] = self._put([names[row] for row in rows.tolist()], values, rows)
        return codes

    def _put(self, names: Sequence[str], values: Values, rows: NDArray[np.int64]) -> Codes:
        keys = object_keys(self.namespace, names)
        try:
            reservation = self._client.reserve(
                self.namespace, keys, ttl_s=TRANSFER_S, tenant=self._tenant, sizes=values.sizes[rows], names=names
            )
        except NoSpace as error:  # not one could be had: what exists was not told of
            there = self._client.lookup_objects(self.namespace, names)
            return np.where(there, Code.OBJECT_ALREADY_EXISTS, code_of(error))
        reserved = np.flatnonzero(reservation.status == RESERVED)
        if len(reserved):
            self._fill(reservation, reserved, values, rows)
        codes: Codes = _CODE_OF_STATUS[reservation.status]
        return codes

    def _fill(
        self, reservation: Reservation, reserved: NDArray[np.int64], values: Values, rows: NDArray[np.int64]
    ) -> None:
        place_of = np.zeros(int(rows.max()) + 1, dtype=np.int64)
        place_of[rows] = np.arange(len(rows))
        lots = ((place_of[lot_rows], lot, None) for lot_rows, lot in values.lend(rows[reserved]))
        self._client.fill(reservation, lots, deadline_s=TRANSFER_S)

    def in_memory(self, names: Sequence[str]) -> Bools:
        keys = object_keys(self.namespace, names)
        blocks = self._client.list_blocks(namespace=self.namespace, keys=keys)
        there = {block.name for block in blocks if block.state == "readable"}
        return np.fromiter((name in there for name in names), dtype=np.bool_, count=len(names))

    def remove(self, names: Sequence[str]) -> int:
        keys = object_keys(self.namespace, names)
        pinned = pin_owners(self._client.list_blocks(namespace=self.namespace, keys=keys))
        removed = self._client.remove_objects(self.namespace, names)
        self._unpin(pinned)
        return removed

    def remove_all(self) -> int:
        pins = self._client.stats().pins
        pinned = pin_owners(self._client.list_blocks(namespace=self.namespace)) if pins else []
        removed = self._client.remove_all(self.namespace)
        self._unpin(pinned)
        return removed

    def _unpin(self, owners: Sequence[str]) -> None:
        """Ends the pins of removed objects, whose memory would be held otherwise until they expire."""
        for owner in owners:
            self._client.unpin(owner=owner)

    def remove_matching(self, pattern: re.Pattern[str]) -> int:
        names = [block.name for block in self._client.list_blocks(namespace=self.namespace)]
        found = [name for name in names if pattern.search(name)]
        return self.remove(found) if found else 0

    def pin(self, names: Sequence[str], ttl_s: float) -> None:
        for key in object_keys(self.namespace, names):
            self._client.pin(self.namespace, key.reshape(1, -1), ttl_s=ttl_s, owner=pin_owner(key.tobytes()))

    def check(self) -> None:
        self._client.stats()

    def close(self) -> None:
        self._client.close()


class ClusterPool(Reads):
    """Objects on all nodes of a cluster, in as many copies as asked for."""

    def __init__(self, client: ClusterClient, domain: str, tenant: str) -> None:
        """Raises: KvpoolError if the directory can't be reached."""
        super().__init__(client, client.register_objects(domain))
        self._client, self._tenant = client, tenant
        client.refresh()

    def put(self, names: Sequence[str], values: Values, copies: int) -> Codes:
        codes = np.full(len(names), Code.NO_AVAILABLE_HANDLE, dtype=np.int64)
        for rows, lot in values.lend(np.arange(len(names))):
            result = self._client.put_objects(
                self.namespace, [names[row] for row in rows.tolist()], lot, replicas=copies, tenant=self._tenant,
                ttl_s=TRANSFER_S,
            )  # fmt: skip
            codes[rows[result.being_written]] = Code.REPLICA_IS_NOT_READY
            codes[rows[result.existed]] = Code.OBJECT_ALREADY_EXISTS
            codes[rows[result.stored]] = Code.OK
        return codes

    def in_memory(self, names: Sequence[str]) -> Bools:
        return self.exists(names)

    def remove(self, names: Sequence[str]) -> int:
        there = int(np.count_nonzero(self.exists(names)))
        self._gone(self._client.remove_objects(self.namespace, names))
        return there

    def remove_all(self) -> int:
        return self._gone(self._client.remove_all(self.namespace))

    @staticmethod
    def _gone(result: ClusterRemoveResult) -> int:
        """Copies removed. Raises: Unavailable if a node may still have some, which must not come back as new ones."""
        if result.unreached:
            raise Unavailable(f"{', '.join(result.unreached)} did not answer, and may still have copies")
        return result.copies

    def remove_matching(self, pattern: re.Pattern[str]) -> int:
        raise BadArgument("a cluster does not list its objects", hint="give one node as master_server_addr")

    def pin(self, names: Sequence[str], ttl_s: float) -> None:
        """Copies are chosen by the pool, which keeps what is used: there is no pin over several nodes."""

    def check(self) -> None:
        self._client.refresh()

    def close(self) -> None:
        self._client.close()


def pin_owner(key: bytes) -> str:
    """Who a pin of an object belongs to: the object, so that it outlives the process that put it, and ends with it."""
    return f"mooncake/{key.hex()}"


def pin_owners(blocks: Iterable[pb.BlockInfo]) -> list[str]:
    """Owners of the pins of those objects that have any."""
    return [pin_owner(block.key) for block in blocks if block.pins]


class _Reader(Protocol):
    def __call__(self, names: Sequence[str], out: Sequence[Bytes]) -> list[Bytes | None]: ...


def read_into(names: Sequence[str], values: Values, read: _Reader) -> Codes:
    """Reads objects into lent memory; the code of one with too little room is INVALID_PARAMS."""
    codes = np.zeros(len(names), dtype=np.int64)
    for rows, lot in values.lend(np.arange(len(names))):
        some = [names[row] for row in rows.tolist()]
        for first, lot_codes in _read_lot(some, lot, read):
            codes[rows[first : first + len(lot_codes)]] = lot_codes
        if values.exact:
            short = (codes[rows] >= 0) & (codes[rows] != values.sizes[rows].astype(np.int64))
            codes[rows[short]] = Code.TRANSFER_FAIL
        good = codes[rows] >= 0
        values.arrived(rows[good], [array for array, ok in zip(lot, good.tolist(), strict=True) if ok])
    return codes


def _read_lot(names: Sequence[str], lot: Sequence[Bytes], read: _Reader) -> Iterator[tuple[int, list[int]]]:
    try:
        yield 0, [size_of(value) for value in read(names, lot)]
    except BadArgument:
        if len(names) == 1:
            yield 0, [Code.INVALID_PARAMS]
            return
        # One of them has too little room, and the others are to be read all the same.
        for row, name in enumerate(names):
            for _, codes in _read_lot([name], [lot[row]], read):
                yield row, codes


def size_of(value: Bytes | None) -> int:
    """A read's code."""
    return Code.OBJECT_NOT_FOUND if value is None else len(value)
