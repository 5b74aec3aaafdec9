"""Protocol messages to core types and back, with every check that a message from outside needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors
from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.errors import BadArgument
from kvpool.core.ids import Fidelity, KeyArray, Tier, qualify, unpack_keys
from kvpool.core.links import LinkSnapshot
from kvpool.core.listing import BlockRecord, SourceCounts
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.v1 import block_source_pb2, common_pb2, directory_pb2, source_admin_pb2

if TYPE_CHECKING:
    from kvpool.core.results import PinRecord, QuotaRecord

TTL_MS_MAX = 600_000
#: Keys of one call; a longer prompt asks twice.
KEYS_MAX = 1 << 16

# ---------------------------------------------------------------- from the wire


def keys_from_proto(keys: common_pb2.KeyList) -> KeyArray:
    """Keys as they are stored: group and shard folded in. Raises: BadKeyLength, BadArgument."""
    if len(keys.keys) > KEYS_MAX * 16:
        raise BadArgument(f"{len(keys.keys) // 16} keys are more than {KEYS_MAX} in one call", hint="ask in parts")
    return qualify(unpack_keys(keys.keys), keys.group, keys.shard)


def ttl_us(ttl_ms: int, *, zero: int | None = None) -> int:
    """Microseconds of a time to live. Raises: BadArgument if it is too long, or zero where that means nothing."""
    if ttl_ms == 0 and zero is not None:
        return zero
    if not 1 <= ttl_ms <= TTL_MS_MAX:
        raise BadArgument(f"ttl_ms must be 1 to {TTL_MS_MAX}, not {ttl_ms}")
    return ttl_ms * 1000


def fidelity_from_proto(value: int) -> Fidelity:
    """An unset fidelity is exact. Raises: BadArgument."""
    try:
        return Fidelity(value or Fidelity.EXACT)
    except ValueError:
        raise BadArgument(f"unknown fidelity {value}") from None


def namespace_from_proto(spec: common_pb2.NamespaceSpec) -> NamespaceSpec:
    """Raises: BadArgument if a field is out of its range."""
    try:
        groups = tuple(
            GroupSpec(
                id=g.id, kind=GroupKind(g.kind), layers=tuple(g.layers), block_tokens=g.block_tokens,
                shard_count=g.shard_count, section_count=g.section_count, block_bytes=g.block_bytes,
                kv_heads=g.kv_heads, head_dim=g.head_dim, window_tokens=g.window_tokens,
            )
            for g in spec.groups
        )  # fmt: skip
    except ValueError as error:
        raise BadArgument(f"bad group: {error}") from error
    result = NamespaceSpec(spec.model, spec.revision, spec.dtype, spec.backend, spec.layout, spec.hash, groups)
    result.validate()
    return result


def group_like(spec: NamespaceSpec, block: block_source_pb2.BlockInfo) -> int | None:
    """A group of the namespace that is cut like a stored block, whose own group can't be told from its key."""
    if spec.is_objects:
        return 0
    for group in spec.groups:
        if group.section_count == block.section_count and (
            group.block_bytes == block.size or block.fidelity != common_pb2.FIDELITY_EXACT
        ):
            return group.id
    return None


def array(values: Iterable[int], dtype: Any) -> NDArray[Any]:
    return np.fromiter(values, dtype=dtype)


def descriptors_from_proto(blocks: block_source_pb2.Descriptors, keys: KeyArray, section_count: int) -> Descriptors:
    """Descriptors beside `keys`; slots that are still to be written come without digests.

    Raises: BadArgument if the arrays do not match.
    """
    count = len(keys)
    if not len(blocks.offsets) == len(blocks.sizes) == len(blocks.generations) == count or (
        len(blocks.digests) not in (0, count * section_count)
    ):
        raise BadArgument(f"descriptor arrays do not run beside {count} keys")
    digests = array(blocks.digests, np.uint64) if blocks.digests else np.zeros(count * section_count, np.uint64)
    return Descriptors(
        keys=keys,
        offsets=array(blocks.offsets, np.uint64),
        sizes=array(blocks.sizes, np.uint64),
        generations=array(blocks.generations, np.uint32),
        digests=digests.reshape(count, section_count),
    )


# ---------------------------------------------------------------- to the wire


def namespace_to_proto(spec: NamespaceSpec) -> common_pb2.NamespaceSpec:
    return common_pb2.NamespaceSpec(
        model=spec.model, revision=spec.revision, dtype=spec.dtype, backend=spec.backend, layout=spec.layout,
        hash=spec.hash,
        groups=[
            common_pb2.GroupSpec(
                id=g.id, kind=int(g.kind), layers=g.layers, block_tokens=g.block_tokens, shard_count=g.shard_count,
                section_count=g.section_count, block_bytes=g.block_bytes, kv_heads=g.kv_heads, head_dim=g.head_dim,
                window_tokens=g.window_tokens,
            )
            for g in spec.groups
        ],
    )  # fmt: skip


def descriptors_to_proto(blocks: Descriptors, section_count: int) -> block_source_pb2.Descriptors:
    """Digests of a group's own sections; the source may keep room for more."""
    return block_source_pb2.Descriptors(
        offsets=blocks.offsets.tolist(),
        sizes=blocks.sizes.tolist(),
        generations=blocks.generations.tolist(),
        digests=blocks.digests[:, :section_count].ravel().tolist(),
    )


_EVENT_KINDS = {
    ChangeKind.STORED: directory_pb2.BlockEvent.STORED,
    ChangeKind.REMOVED: directory_pb2.BlockEvent.REMOVED,
    ChangeKind.CLEARED: directory_pb2.BlockEvent.CLEARED,
}


def change_to_proto(change: BlockChange) -> directory_pb2.BlockEvent:
    """Keys go as they are stored: with group and shard folded in already, so in group 0, shard 0."""
    return directory_pb2.BlockEvent(
        kind=_EVENT_KINDS[change.kind], keys=common_pb2.KeyList(keys=change.keys), fidelity=int(change.fidelity)
    )


def counts_to_proto(
    counts: SourceCounts, *, bytes_read: int, bytes_written: int, digest_errors: int
) -> block_source_pb2.SourceStats:
    """Counts of the core, and those that only the shell knows."""
    return block_source_pb2.SourceStats(
        bytes_total=counts.bytes_total, bytes_used=counts.bytes_used, blocks=counts.blocks,
        blocks_writing=counts.blocks_writing, sessions=counts.sessions, leases=counts.leases, pins=counts.pins,
        reservations=counts.reservations, quarantined=counts.quarantined, waiters=counts.waiters, hits=counts.hits,
        misses=counts.misses, evictions=counts.evictions, bytes_read=bytes_read, bytes_written=bytes_written,
        digest_errors=digest_errors, bytes_free=counts.bytes_free, bytes_largest_extent=counts.bytes_largest_extent,
        fragmentation=counts.fragmentation, entries_total=counts.entries_total, pins_detached=counts.pins_detached,
        eviction=counts.eviction, draining=counts.draining, adopted=counts.adopted, touches=counts.touches,
        expired=counts.expired,
    )  # fmt: skip


def record_to_proto(record: BlockRecord, tier: Tier) -> block_source_pb2.BlockInfo:
    return block_source_pb2.BlockInfo(
        key=record.key, namespace_id=record.namespace_id, tier=int(tier), fidelity=int(record.fidelity),
        offset=record.offset, size=record.size, generation=record.generation, leases=record.leases, pins=record.pins,
        state=record.state, name=record.name.decode(errors="replace"), tenant=record.tenant,
        section_count=record.section_count, on_ssd=record.on_lower,
    )  # fmt: skip


def quota_to_proto(quota: QuotaRecord) -> source_admin_pb2.Quota:
    return source_admin_pb2.Quota(
        namespace_id=quota.namespace_id, tenant=quota.tenant, bytes_max=quota.bytes_max, bytes_used=quota.bytes_used
    )


def pin_to_proto(pin: PinRecord, client: str, now_us: int) -> source_admin_pb2.PinInfo:
    """Args: client: of the session that the pin belongs to; shown where the pin names no owner of its own."""
    left_ms = -1 if pin.expires_us is None else max(0, pin.expires_us - now_us) // 1000
    return source_admin_pb2.PinInfo(
        pin_id=pin.pin, owner=pin.owner or client, session_id=pin.session, blocks=pin.blocks, bytes=pin.bytes,
        expires_in_ms=left_ms, kind=pin.kind,
    )  # fmt: skip


def link_to_proto(
    link: LinkSnapshot, client: str, *, active: bool = False, age_ms: int = 0
) -> source_admin_pb2.LinkInfo:
    """A measured link of `client`; what was never measured is 0."""
    info = source_admin_pb2.LinkInfo(
        to=link.source, kind=link.channel, state=str(link.state), latency_us=link.latency_us or 0,
        bytes_per_s=link.bandwidth_bytes_s or link.bandwidth_shared_bytes_s or 0, transfers=link.samples,
        bytes=link.bytes_total, errors=link.errors, active=active, age_ms=age_ms,
    )  # fmt: skip
    setattr(info, "from", client)
    return info
