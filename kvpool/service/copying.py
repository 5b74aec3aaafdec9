"""Pulling blocks of another source into this one: straight from a data channel into reserved slots of the segment.

Idempotent: what is here already counts as done, so that a copy that ended early is simply begun again. A block that is
moved leaves its origin only after its commit here.

An object that is removed or put again meanwhile, here or there, is not copied: a lease keeps it readable for the copy,
but its name is no longer its own. What a move drops at its origin is what it has brought here, by digest, never what
came under the same name since.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.links import Links
from kvpool.channels.tls import TlsConfig
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, NoSpace, NoSsd, Unavailable, UnknownNamespace, UnknownReservation
from kvpool.core.ids import Fidelity, KeyArray, NamespaceId, SessionId, Tier
from kvpool.core.index import NO_ENTRY
from kvpool.core.namespace import GroupSpec, NamespaceSpec
from kvpool.core.results import Reserved, ReserveStatus
from kvpool.core.source import SourceCore
from kvpool.service import wire
from kvpool.service.client_session import Session
from kvpool.service.copy_origin import Alike, Origin
from kvpool.service.operations import Operation
from kvpool.service.removals import removals_of
from kvpool.service.ssd_tier import SsdTier
from kvpool.service.verifying import parts
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import source_admin_pb2

log = logging.getLogger(__name__)

BATCH_BLOCKS_MAX, BATCH_BYTES_MAX = 1024, 64 << 20
#: Of blocks on the origin's SSD: they need room in its memory on their way.
SSD_BATCH_BYTES_MAX = 8 << 20
#: A batch that fails for its link is tried again so often.
ATTEMPTS_MAX = 3
#: Batches in a row that find no room at all; after these nothing fits any more.
REFUSED_MAX = 4
#: A batch may take this long, and a second for each so many bytes.
BATCH_TIMEOUT_S, BYTES_PER_S_MIN = 10.0, 8 << 20
_TTL_S_MAX = 600.0


@dataclass(frozen=True, eq=False)
class _Leased:
    """Blocks that are leased at the origin, and what a copy needs to take them.

    names: one a block, empty unless they are objects.
    mark: of the removals here, from before the lease.
    """

    alike: Alike
    session: Session
    lease: int
    blocks: Descriptors
    names: list[str]
    timeout_s: float
    mark: int

    @property
    def objects(self) -> bool:
        return bool(self.names and self.names[0])


class _Committed:
    """What a commit made readable here; belongs to the loop until the turn is over. int64 rows of the leased blocks."""

    def __init__(self) -> None:
        self.rows = np.empty(0, dtype=np.int64)
        self._entries = np.empty(0, dtype=np.int32)
        self._generations = np.empty(0, dtype=np.uint32)

    def note(self, core: SourceCore, keys: KeyArray, rows: NDArray[np.int64]) -> None:
        self.rows, self._entries = rows, core.index.lookup(keys[rows])
        self._generations = core.arrays.generations[self._entries].copy()

    def not_replaced(self, core: SourceCore, keys: KeyArray) -> NDArray[np.int64]:
        """The rows under whose keys nothing else came since: these blocks still, or nothing in memory."""
        entries = core.index.lookup(keys[self.rows])
        same = (entries == self._entries) & (core.arrays.generations[self._entries] == self._generations)
        rows: NDArray[np.int64] = self.rows[same | (entries == NO_ENTRY)]
        return rows


def copy_blocks(
    operation: Operation, request: source_admin_pb2.CopyRequest, data: NDArray[np.uint8], own_id: str,
    credential: str, links: Links, lower: SsdTier | None = None, tls: TlsConfig | None = None,
) -> None:  # fmt: skip
    """Pulls what `request` names.

    Args: data: uint8, the data of this source's own segment; lower: its tier below.
    Raises: Unavailable if the origin does not answer; NoSpace if nothing fits any more.
    """
    keys = wire.keys_from_proto(request.keys)
    if len(keys) and not request.namespace_id:
        raise BadArgument("keys need the namespace they are of")
    origin = Origin(request.from_address, client=f"copy to {own_id}", credential=credential, links=links, tls=tls)
    try:
        if origin.source_id == own_id:
            raise BadArgument(f"{request.from_address} is this source itself")
        with operation.session(f"copy from {origin.source_id}") as session:
            _Copy(operation, origin, session, data, request.move, lower).run(request.namespace_id, keys)
    except Unavailable as error:
        raise Unavailable(
            f"the source at {request.from_address} failed: {error}", hint="begin again: what arrived stays"
        ) from error
    finally:
        origin.close()


class _Copy:
    """One copy under way."""

    def __init__(
        self, operation: Operation, origin: Origin, session: SessionId, data: NDArray[np.uint8], move: bool,
        lower: SsdTier | None,
    ) -> None:  # fmt: skip
        self._operation, self._counts, self._origin = operation, operation.counts, origin
        self._session, self._data, self._move, self._lower = session, data, move, lower
        self._specs: dict[bytes, NamespaceSpec] = {}
        self._refused = 0

    def run(self, namespace_id: bytes, keys: KeyArray) -> None:
        held = self._learn_namespaces(namespace_id)
        self._counts.blocks_total = len(keys) or held
        seen = 0
        for page in self._origin.describe(keys) if len(keys) else self._origin.pages(namespace_id):
            seen += len(page)
            # What is on the SSD alone was in no count.
            self._counts.blocks_total = max(self._counts.blocks_total, seen)
            for alike, blocks in self._alike(page).items():
                bytes_max = BATCH_BYTES_MAX if alike.tier != Tier.SSD else SSD_BATCH_BYTES_MAX
                for batch in parts(blocks, [b.size for b in blocks], BATCH_BLOCKS_MAX, bytes_max):
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

    def _alike(self, page: list[pb.BlockInfo]) -> dict[Alike, list[pb.BlockInfo]]:
        """Blocks by what one call must have in common."""
        found: dict[Alike, list[pb.BlockInfo]] = defaultdict(list)
        for block in page:
            spec = self._specs.get(block.namespace_id)
            group = None if spec is None else wire.group_like(spec, block)
            if group is None:
                self._counts.failed(1, "some blocks are of no known namespace or group")
                continue
            found[Alike(block.namespace_id, group, block.tenant, block.fidelity, block.tier)].append(block)
        return found

    # ------------------------------------------------------------ one batch

    def _pull(self, alike: Alike, batch: list[pb.BlockInfo]) -> None:
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                self._pull_once(alike, batch)
                return
            except Unavailable as error:
                if attempt == ATTEMPTS_MAX or self._operation.stopped:
                    raise
                log.info("copy from %s, attempt %d: %s", self._origin.address, attempt, error)
                self._operation.pause(0.2 * attempt)

    def _pull_once(self, alike: Alike, batch: list[pb.BlockInfo]) -> None:
        keys = np.frombuffer(b"".join(b.key for b in batch), dtype=np.uint8).reshape(-1, 16)
        timeout_s = min(BATCH_TIMEOUT_S + sum(b.size for b in batch) / BYTES_PER_S_MIN, _TTL_S_MAX / 2)
        # Before the lease: what is removed from here on stays readable under it, but must not come back.
        mark = self._operation.turn(lambda core, _: removals_of(core).mark())
        session, reply = self._origin.lease(alike, keys, 2 * timeout_s)
        found = np.fromiter(reply.found, dtype=np.bool_, count=len(keys))
        self._counts.failed(int((~found).sum()), "some blocks were gone before they could be read")
        if not reply.lease_id:
            return
        corrupt = keys[:0]
        try:
            # Digests come from the origin's own index: what arrives is what was committed there, or is not kept.
            sections = _section_count(self._specs[alike.namespace_id], alike.group)
            blocks = wire.descriptors_from_proto(reply.blocks, keys, sections).take(found)
            listed = [block for block, there in zip(batch, found.tolist(), strict=True) if there]
            # The other form of a block may have taken its place since it was listed: its slots here would not fit it.
            alike_still = np.fromiter(reply.fidelity, dtype=np.uint8, count=len(keys))[found] == alike.fidelity
            alike_still &= blocks.sizes == np.array([block.size for block in listed], dtype=np.uint64)
            self._counts.failed(int((~alike_still).sum()), "some blocks were replaced before they could be read")
            fits = blocks.sizes <= len(self._data)
            self._counts.failed(int((alike_still & ~fits).sum()), "some objects are larger than all memory here")
            kept = np.flatnonzero(alike_still & fits)
            names = [listed[row].name for row in kept.tolist()]
            leased = _Leased(alike, session, reply.lease_id, blocks.take(kept), names, timeout_s, mark)
            done, corrupt = self._take(leased)
            if self._move and len(done):
                self._drop(leased, done)
        finally:
            self._origin.release(session, reply.lease_id, alike, corrupt)

    def _drop(self, leased: _Leased, rows: NDArray[np.int64]) -> None:
        """Removes at the origin what is here now; what can't be removed there was not moved."""
        dropped, why = 0, "some blocks changed at their origin before they could be removed there"
        try:
            dropped = self._origin.drop(leased.alike, leased.blocks.take(rows))
        except NoSsd as error:
            why = f"copied, and not removed from their origin: {error}"
        left = max(len(rows) - dropped, 0)
        self._counts.blocks_done -= left
        self._counts.failed(left, why)

    def _take(self, leased: _Leased) -> tuple[NDArray[np.int64], KeyArray]:
        """Reserves, reads and commits leased blocks.

        Returns: rows of those that are here now as they are at the origin, and the keys of those whose bytes are bad.
        """
        blocks = leased.blocks
        answer = self._reserve(leased) if len(blocks) else None
        if answer is None:
            return np.empty(0, dtype=np.int64), blocks.keys[:0]
        reserved, equal = answer
        status = np.asarray(reserved.status)
        mine = np.flatnonzero(status == ReserveStatus.RESERVED)
        self._note_left_out(status, equal)
        good, committed = np.zeros(len(mine), dtype=np.bool_), _Committed()
        try:
            if len(mine):
                targets = _targets(self._data, reserved.slots.take(mine))
                good = leased.session.channel.read(
                    leased.lease, blocks.take(mine), targets, deadline_s=leased.timeout_s, verify=True
                )
                self._operation.turn(
                    lambda core, now: _commit(core, self._session, reserved, leased, mine[good], now, committed)
                )
            same = self._look_again(leased, committed)
        except BaseException:
            # Also where only the answer of the commit was late: it is carried out before this.
            if leased.objects:
                self._take_back(leased, committed, np.zeros(len(blocks), dtype=np.bool_))
            raise
        finally:
            if len(mine) and len(committed.rows) < len(mine):
                with contextlib.suppress(UnknownReservation):  # a late commit may have finished it
                    self._operation.turn(lambda core, now: core.abort(self._session, reserved.reservation, now))
        arrived = committed.rows[same[committed.rows]]
        self._counts.failed(int(good.sum()) - len(arrived), "some objects were removed meanwhile")
        self._count(blocks, arrived, int(equal.sum()), int((~good).sum()))
        here = equal
        here[arrived] = True
        return np.flatnonzero(here & same), blocks.keys[mine[~good]]

    def _reserve(self, leased: _Leased) -> tuple[Reserved, NDArray[np.bool_]] | None:
        """Slots for leased blocks, and which of them are here already; None, and counted, if none may come."""
        blocks, lower = leased.blocks, self._lower
        with contextlib.ExitStack() as held:
            if leased.objects and lower is not None:
                # What stands under an object's name below is to be compared too: it would come up again.
                held.enter_context(self._operation.promoted(lower, leased.alike.namespace_id, blocks.keys))

            def reserve(core: SourceCore, now: int) -> tuple[Reserved, NDArray[np.bool_]]:
                if leased.objects:
                    self._operation.check_objects()
                reserved = _slots_for(core, self._session, leased, now, lower)
                equal = np.asarray(reserved.status) == ReserveStatus.EXISTS
                equal[equal] = _equal_here(core, blocks.take(equal), objects=leased.objects)
                return reserved, equal

            try:
                answer = self._operation.turn(reserve)
            except (NoSpace, NoSsd) as error:
                self._counts.failed(len(blocks), str(error))
                self._refused += isinstance(error, NoSpace)
                if self._refused >= REFUSED_MAX:
                    raise
                return None
        self._refused = 0
        return answer

    def _look_again(self, leased: _Leased, committed: _Committed) -> NDArray[np.bool_]:
        """Which leased blocks the origin still has as they were leased; others that were committed are removed here.

        While they were on their way here, a removal at the origin could not reach them.
        """
        if not leased.objects:
            return np.ones(len(leased.blocks), dtype=np.bool_)
        same = self._origin.unchanged(leased.alike, leased.blocks, leased.timeout_s)
        self._take_back(leased, committed, same)
        return same

    def _take_back(self, leased: _Leased, committed: _Committed, same: NDArray[np.bool_]) -> None:
        """Removes here what was committed and is not the `same`, unless something else came under its name since."""
        keys = leased.blocks.keys
        namespace_id = leased.alike.namespace_id

        def remove(core: SourceCore, now: int) -> NDArray[np.int64]:
            gone = committed.not_replaced(core, keys)
            gone = gone[~same[gone]]
            core.remove(namespace_id, keys[gone], now)
            return gone

        def remove_promoted(core: SourceCore) -> int:
            there = leased.blocks.take(gone)
            return core.remove(namespace_id, there.keys[_equal_here(core, there, objects=True)], 0)

        gone = self._operation.turn(remove)
        if self._lower is not None and len(gone):
            self._operation.remove_below(self._lower, namespace_id, keys[gone], remove_promoted)

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


def _slots_for(core: SourceCore, session: SessionId, leased: _Leased, now: int, lower: SsdTier | None) -> Reserved:
    """Slots of the sizes that the origin's blocks have, under the same names and for the same tenant."""
    alike, blocks, objects = leased.alike, leased.blocks, leased.objects
    group: GroupSpec = core.group(alike.namespace_id, alike.group, 0)
    # Nothing is written beside what stands under an object's name below, or may be back there after a crash.
    below = lower.holds(alike.namespace_id, blocks.keys) if objects and lower is not None else None
    return core.reserve(
        session, NamespaceId(alike.namespace_id), group, blocks.keys, int(2e6 * leased.timeout_s), now,
        fidelity=Fidelity(alike.fidelity), sizes=np.asarray(blocks.sizes, dtype=np.uint64),
        names=[name.encode() for name in leased.names] if objects else None, tenant=alike.tenant, exists=below,
    )  # fmt: skip


def _commit(
    core: SourceCore, session: SessionId, reserved: Reserved, leased: _Leased, rows: NDArray[np.int64], now: int,
    committed: _Committed,
) -> None:  # fmt: skip
    """Commits whole blocks with the digests that their origin gave, but no object that was removed here meanwhile."""
    blocks = leased.blocks
    if leased.objects:
        names = [leased.names[row].encode() for row in rows.tolist()]
        rows = rows[~removals_of(core).since(leased.mark, leased.alike.namespace_id, blocks.keys[rows], names)]
    sections = blocks.digests.shape[1]
    indices = np.repeat(rows, sections).astype(np.uint32)
    numbers = np.tile(np.arange(sections, dtype=np.uint32), len(rows))
    digests = np.ascontiguousarray(blocks.digests[rows]).ravel()
    core.commit(session, reserved.reservation, indices, numbers, digests, now)
    committed.note(core, blocks.keys, rows)


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
