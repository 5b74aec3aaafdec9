"""Draining a source: it takes nothing new, and its blocks move to other sources until nothing is left."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import Unavailable
from kvpool.service import rpc
from kvpool.service.operations import Operation
from kvpool.service.ssd_tier import SsdTier
from kvpool.service.verifying import pages, parts
from kvpool.v1 import (
    block_source_pb2,
    block_source_pb2_grpc,
    common_pb2,
    source_admin_pb2,
    source_admin_pb2_grpc,
)

log = logging.getLogger(__name__)

BATCH_BLOCKS_MAX = 4096
#: Of a batch: small beside what there is to move, so that targets fill evenly, but worth a call.
BATCH_BYTES_MIN, BATCH_BYTES_MAX = 4 << 20, 256 << 20
BATCHES_PER_TARGET = 4
TIMEOUT_S = 5.0
PAGE_BELOW = 4096
#: A target may take this long for a batch, and a second for each so many bytes.
COPY_TIMEOUT_S, BYTES_PER_S_MIN = 30.0, 4 << 20


class _Listed(Protocol):
    """A block of a listing, of memory or of the SSD."""

    @property
    def key(self) -> bytes: ...

    @property
    def namespace_id(self) -> bytes: ...

    @property
    def size(self) -> int: ...


@dataclass
class _Target:
    """A source that blocks move to; `bytes_free` falls as they do, below zero where it has to evict for them."""

    address: str
    channel: grpc.Channel
    bytes_free: int

    def copy(self, request: source_admin_pb2.CopyRequest, timeout_s: float) -> Any:
        stub: Any = source_admin_pb2_grpc.SourceAdminStub(self.channel)
        return stub.Copy(request, timeout=timeout_s)


def drain_source(
    operation: Operation, own_address: str, addresses: Sequence[str], credential: str, tls: TlsConfig | None = None,
    *, lower: SsdTier | None = None, below: bool = False,
) -> None:  # fmt: skip
    """Has the targets pull all blocks of this source, each batch by the one with the most free bytes.

    Args: lower: the SSD below; with `below` what lies there alone is moved too.

    Targets that fail are left out from then on. Ends when nothing readable is left, or nothing moves any more.

    Raises: Unavailable if a target does not answer at the beginning.
    """
    targets = _open_targets(addresses, credential, tls)
    try:
        while targets and not operation.stopped and _pass(operation, own_address, targets):
            pass
        while below and lower and targets and not operation.stopped and _pass(operation, own_address, targets, lower):
            pass
        if not operation.stopped:
            _tell_rest(operation, targets, lower, below=below)
    finally:
        for target in targets:
            target.channel.close()


def _open_targets(addresses: Sequence[str], credential: str, tls: TlsConfig | None) -> list[_Target]:
    targets: list[_Target] = []
    try:
        for address in dict.fromkeys(addresses):
            channel = rpc.make_channel(address, credential=credential, tls=tls)
            targets.append(_Target(address, channel, 0))
            stub: Any = block_source_pb2_grpc.BlockSourceStub(channel)
            stats = stub.GetSourceStats(block_source_pb2.GetSourceStatsRequest(), timeout=TIMEOUT_S)
            targets[-1].bytes_free = stats.bytes_free
    except grpc.RpcError as error:
        for target in targets:
            target.channel.close()
        raise rpc.from_rpc_error(error, targets[-1].address) from error
    return targets


def _pass(operation: Operation, own_address: str, targets: list[_Target], lower: SsdTier | None = None) -> bool:
    """Goes once through all that is here, or through what is on the SSD alone; whether anything moved."""
    before = operation.counts.blocks_done
    left = operation.turn(lambda core, _: core.counts())
    blocks = left.blocks if lower is None else lower.stats().records
    operation.counts.blocks_total = operation.counts.blocks_done + blocks
    even = left.bytes_used // (BATCHES_PER_TARGET * len(targets))
    batch_bytes = min(max(even, BATCH_BYTES_MIN), BATCH_BYTES_MAX)
    for page in pages(operation, b"") if lower is None else _pages_below(operation, lower):
        for namespace_id in dict.fromkeys(bytes(record.namespace_id) for record in page):
            mine = [record for record in page if record.namespace_id == namespace_id]
            for batch in parts(mine, [r.size for r in mine], BATCH_BLOCKS_MAX, batch_bytes):
                if operation.stopped or not targets:
                    return False
                _move(operation, own_address, namespace_id, batch, targets)
    return operation.counts.blocks_done > before


def _pages_below(operation: Operation, lower: SsdTier) -> Iterator[list[block_source_pb2.BlockInfo]]:
    """What lies on the SSD alone, a page at a time."""
    cursor = 0
    while True:
        reply = operation.list_below(lower, block_source_pb2.ListBlocksRequest(cursor=cursor, limit=PAGE_BELOW))
        yield list(reply.blocks)
        cursor = reply.next_cursor
        if not cursor:
            return


def _move(
    operation: Operation, own_address: str, namespace_id: bytes, batch: Sequence[_Listed], targets: list[_Target]
) -> None:
    """Moves one batch to the target with the most free bytes, or, if that fails, to the next."""
    request = source_admin_pb2.CopyRequest(
        from_address=own_address, namespace_id=namespace_id, move=True,
        keys=common_pb2.KeyList(keys=b"".join(record.key for record in batch)),
    )  # fmt: skip
    size = sum(record.size for record in batch)
    while targets and not operation.stopped:
        target = max(targets, key=lambda t: (t.bytes_free, t.address))
        try:
            moved = _follow(operation, target, request, COPY_TIMEOUT_S + size / BYTES_PER_S_MIN)
        except grpc.RpcError as rpc_error:
            error = rpc.from_rpc_error(rpc_error, target.address)
            log.warning("%s takes no more blocks: %s", target.address, error)
            operation.counts.message = f"{target.address} takes no more blocks: {error}"
            targets.remove(target)
            target.channel.close()
            continue
        target.bytes_free -= moved
        return


def _follow(operation: Operation, target: _Target, request: source_admin_pb2.CopyRequest, timeout_s: float) -> int:
    """Waits for one copy of a target. Returns the bytes that it took."""
    call = target.copy(request, timeout_s)
    counts = operation.counts
    blocks, size = counts.blocks_done, counts.bytes_done
    last = source_admin_pb2.Progress()
    try:
        for last in call:
            counts.blocks_done, counts.bytes_done = blocks + last.blocks_done, size + last.bytes_done
            if operation.stopped:
                break
    finally:
        call.cancel()
    counts.blocks_bad += last.blocks_bad
    if last.message:
        counts.message = f"{target.address}: {last.message}"
    return int(last.bytes_done)


def _tell_rest(operation: Operation, targets: list[_Target], lower: SsdTier | None, *, below: bool) -> None:
    """What could not be moved, for whoever reads the last message."""
    left = operation.turn(lambda core, _: core.counts().blocks)
    counts = operation.counts
    on_ssd = lower.stats().records if lower is not None else 0
    if below:
        left = max(left, on_ssd)
    elif on_ssd and not left:
        counts.message = f"{on_ssd} blocks stay on its SSD"
    counts.blocks_failed = left
    if left and not targets:
        raise Unavailable(
            f"no target takes blocks any more, {left} are left here: {counts.message}", hint="drain again, to others"
        )
