"""The writing half of a source's core: reserve, commit, abort."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors, EntryState
from kvpool.core.errors import (
    BadArgument,
    Draining,
    NoSpace,
    Overloaded,
    QuotaExceeded,
    ReservationExpired,
    UnknownReservation,
)
from kvpool.core.expiry import Expiry
from kvpool.core.hashing import object_key
from kvpool.core.holds import Hold
from kvpool.core.ids import KEY_BYTES, Fidelity, KeyArray, ReservationId, SessionId
from kvpool.core.index import NO_ENTRY, Entries, first_of_each, split_keys
from kvpool.core.namespace import SECTIONS_MAX, GroupSpec
from kvpool.core.reservations import Lineage, Reservation, ReservationState
from kvpool.core.results import Reserved, ReserveStatus
from kvpool.core.source_base import SourceBase
from kvpool.core.store import Demand
from kvpool.core.waits import WaitState

#: Weight of what can't be computed again here, or at an unknown cost: that of a usual KV block.
_WEIGHT_USUAL = 64
#: Layers and tokens of a KiB that weigh 1.
_WEIGHT_SCALE = 256


class SourceWriting(SourceBase):
    """What writers call."""

    def reserve(
        self,
        session: SessionId,
        namespace_id: bytes,
        group: GroupSpec | None,
        keys: KeyArray,
        ttl_us: int,
        now_us: int,
        *,
        hold: Hold | None = None,
        fidelity: Fidelity = Fidelity.EXACT,
        sizes: NDArray[np.uint64] | None = None,
        names: Sequence[bytes] | None = None,
        tenant: str = "",
        parent: bytes = b"",
        exists: NDArray[np.bool_] | None = None,
        promoting: bool = False,
    ) -> Reserved:
        """Reserves a slot for each key that is neither stored nor being written; evicts exactly what that needs.

        An exact block takes the place of a lossy copy under its key; that is dropped.

        Args:
            group: of the keys; None for objects.
            keys: uint8 (n, 16), in prompt order.
            sizes: bytes, uint64 (n); None: the group's. Each must be cut evenly by the group's sections.
            names: of objects, UTF-8, one a key: needed for them, and for nothing else.
            tenant: whose quota it counts against; empty = nobody's.
            parent: key of the block before the first one; empty = there is none, or it is not known.
            exists: bool (n), keys that a lower tier has: they are answered EXISTS if nothing is known of them here.
            promoting: they come up from a lower tier: a source that is being drained takes them too.
        Raises: BadArgument, UnknownSession, UnknownNamespace, Overloaded, Draining, Unsupported (objects in a source
            that keeps none); NoSpace if nothing was had, and QuotaExceeded if each key is over a quota.
        """
        number = self._check_call(session, namespace_id, keys, ttl_us)
        if self.draining and not promoting:
            raise Draining("this source is being drained: it takes nothing new", hint="put it to another node")
        if hold is not None:
            self._bounds.hold(hold, self.holds)
        if parent and len(parent) != KEY_BYTES:
            raise BadArgument(f"a parent has {KEY_BYTES} bytes, not {len(parent)}")
        sizes = self._sizes(namespace_id, group, keys, sizes, names)
        self._check_room_for_reservation()
        sections = group.section_count if group is not None else 1
        known_names = None if names is None else list(names)
        demand = Demand(number, self._tenant(tenant), fidelity, sections, sizes, known_names)
        status, entries = self.store.status(demand, keys)
        found = status == ReserveStatus.EXISTS
        if exists is not None:
            status[exists & (entries == NO_ENTRY)] = ReserveStatus.EXISTS
        wanted = status == 0
        rows, taken = self._take_slots(keys, demand, status, entries, found, hold, now_us)
        if not len(taken):
            if not found.any():
                self._check_not_refused(status[wanted])
            nothing = np.zeros(len(keys), dtype=np.bool_)
            return Reserved(ReservationId(0), status, self.store.describe(keys, entries, nothing, 0))
        weight = _weight(group, demand.footprints)
        lineage = Lineage(keys if names is None else None, parent, weight)
        reservation = self.reservations.add(
            Reservation(session, rows, taken, sections, now_us + ttl_us, hold, lineage)
        )  # fmt: skip
        self._expiries.set(Expiry.RESERVATION, reservation, now_us + ttl_us)
        mine = status == ReserveStatus.RESERVED
        return Reserved(reservation, status, self.store.describe(keys, entries, mine, 0))

    def commit(
        self,
        session: SessionId,
        reservation: ReservationId,
        indices: NDArray[np.uint32],
        sections: NDArray[np.uint32],
        digests: NDArray[np.uint64],
        now_us: int,
    ) -> int:
        """Commits written sections; all or none. Returns the blocks that became readable.

        Committing a section again with the same digest changes nothing, until the reservation's time is over.

        Args: indices (n) into the keys of the reserve call; sections (n); digests (n).
        Raises: UnknownReservation, ReservationExpired, BadArgument, AlreadyCommitted (same section, other digest).
        """
        if not len(indices) == len(sections) == len(digests):
            raise BadArgument("indices, sections and digests must have the same length")
        found = self.reservations.find(session, reservation)
        if found.state is ReservationState.EXPIRED or found.expires_us <= now_us:
            raise ReservationExpired(f"reservation {reservation} has expired", hint="abort it and reserve again")
        positions = found.positions(indices)
        fresh = found.accept(positions, sections, digests)
        entries = found.entries[positions[fresh]]
        self.store.commit_sections(entries, sections[fresh], digests[fresh])
        self._tell_sections(entries, sections[fresh])
        rows, complete = found.take_complete()
        if len(complete):
            self._publish(found, rows, complete, now_us)
            if not found.pending.any():
                self.reservations.finish(reservation)
        return len(complete)

    def abort(self, session: SessionId, reservation: ReservationId, now_us: int) -> int:
        """Gives a reservation back, and with it the writer's word that it has stopped. Returns blocks dropped.

        Raises: UnknownReservation.
        """
        found = self.reservations.find(session, reservation)
        if found.state is ReservationState.LIVE:
            return self._drop_reservation(reservation, quarantine=False)
        self.store.end_quarantine(self.reservations.remove(reservation))
        self._expiries.cancel(Expiry.RESERVATION, reservation)
        return 0

    def writable_extents(self, reservation: int) -> Descriptors:
        """Where a live reservation allows to write: blocks that are not complete.

        Raises: UnknownReservation, ReservationExpired.
        """
        found = self.reservations.get(ReservationId(reservation))
        if found is None:
            raise UnknownReservation(f"no reservation {reservation}")
        if found.state is ReservationState.EXPIRED:
            raise ReservationExpired(f"reservation {reservation} has expired")
        return self.index.describe(found.pending_entries)

    # ---------------------------------------------------------------- parts

    def _sizes(
        self,
        namespace_id: bytes,
        group: GroupSpec | None,
        keys: KeyArray,
        sizes: NDArray[np.uint64] | None,
        names: Sequence[bytes] | None,
    ) -> NDArray[np.uint64]:
        """Payload bytes of each key. Raises: BadArgument, Unsupported."""
        if self.namespaces_known.spec(namespace_id).is_objects:
            self.names.check_supported()
            if sizes is None or names is None or len(names) != len(keys):
                raise BadArgument("objects need a size and a name each")
            for key, name in zip(split_keys(keys), names, strict=True):
                if object_key(namespace_id, name) != key:
                    raise BadArgument(f"the key of an object must be made of its name {name[:64]!r}")
        elif names is not None:
            raise BadArgument("blocks have no names", hint="register a namespace with the layout 'objects'")
        elif group is None:
            raise BadArgument("blocks are of a group")
        if sizes is None:
            assert group is not None
            return np.full(len(keys), group.block_bytes, dtype=np.uint64)
        sections = np.uint64(group.section_count if group is not None else 1)
        if len(sizes) != len(keys):
            raise BadArgument(f"{len(sizes)} sizes for {len(keys)} keys")
        capacity_bytes = self.config.capacity_bytes
        wrong = np.flatnonzero((sizes < 1) | (sizes > capacity_bytes))
        if len(wrong):
            size = int(sizes[wrong[0]])
            if names is None:
                raise BadArgument(f"sizes must be 1 to {capacity_bytes} bytes, not {size}")
            name = names[wrong[0]].decode(errors="replace")
            raise BadArgument(
                f"object {name!r} has {size} bytes, this source keeps 1 to {capacity_bytes}",
                hint="store it in pieces, or give the node more --memory",
            )
        if not 1 <= sections <= SECTIONS_MAX or (sizes % sections).any():
            raise BadArgument(f"{sections} sections do not divide each size")
        return sizes.astype(np.uint64)

    def _take_slots(
        self,
        keys: KeyArray,
        demand: Demand,
        status: NDArray[np.uint8],
        entries: Entries,
        found: NDArray[np.bool_],
        hold: Hold | None,
        now_us: int,
    ) -> tuple[NDArray[np.int64], Entries]:
        """Slots for the keys whose status is 0; fills in `status` and `entries`. Returns rows and entries taken."""
        # Held first, so that what this call found is not what it evicts.
        guarded = self.store.guard(entries[found])
        wanting = np.flatnonzero(status == 0)
        firsts = first_of_each(keys, wanting)
        fresh = np.unique(firsts)
        status[fresh] = ReserveStatus.NO_SPACE
        allowed = fresh
        if len(self.quotas_set) and len(fresh):
            slots_bytes = self.store.slots.slots_bytes(demand.footprints[fresh])
            allowed = fresh[: self.quotas_set.admit(demand.namespace, demand.tenant, slots_bytes)]
            status[fresh[len(allowed) :]] = ReserveStatus.OVER_QUOTA
        rows, taken = self.store.allocate(keys, allowed, demand)
        if hold is not None:
            self._held.hand_off(entries[found], hold, now_us)
        self.store.unguard(guarded)
        self.store.touch(entries[found])
        status[rows] = ReserveStatus.RESERVED
        entries[rows] = taken
        repeated = firsts != wanting
        outcome = status[firsts[repeated]]
        status[wanting[repeated]] = np.where(outcome == ReserveStatus.RESERVED, ReserveStatus.BEING_WRITTEN, outcome)
        return rows, taken

    def _check_not_refused(self, status: NDArray[np.uint8]) -> None:
        """Raises: NoSpace or QuotaExceeded where something was wanted; `status` is that of what was."""
        refused, over = len(status), int((status == ReserveStatus.OVER_QUOTA).sum())
        if over and over == refused:
            raise QuotaExceeded(
                f"{over} blocks are over their quota, and nothing of the same holder may go",
                hint="raise the quota with kvctl quota, or wait until readers release",
            )
        if refused:
            raise NoSpace(
                f"no room for {refused} blocks: all others are held or being written",
                hint="give the node more --memory, or wait until readers release",
            )

    def _publish(self, found: Reservation, rows: NDArray[np.int64], complete: Entries, now_us: int) -> None:
        # Held before anybody else acts, so that nothing evicts a block on its way to its reader.
        if found.hold is not None:
            self._held.hand_off(complete, found.hold, now_us)
        parents = found.lineage.parents(rows, self.index)
        known = parents != NO_ENTRY
        known[known] = (self.arrays.states[parents[known]] == EntryState.READABLE) | np.isin(parents[known], complete)
        parents[~known] = NO_ENTRY
        self.store.publish(complete, parents, np.full(len(complete), found.lineage.weight, dtype=np.uint32))
        if len(self.waits):
            for key in self.index.keys_of(complete):
                self.waits.key_changed(key, WaitState.COMMITTED)

    def _check_room_for_reservation(self) -> None:
        if self.reservations.unfinished >= self.config.reservations_max:
            raise Overloaded(f"{self.config.reservations_max} reservations are open already")
        config = self.config
        for number in self.reservations.forget_finished(config.reservations_max - 1, config.finished_rows_max):
            self._expiries.cancel(Expiry.RESERVATION, number)

    def _tell_sections(self, entries: Entries, sections: NDArray[np.uint32]) -> None:
        if len(self.waits):
            for key, section in zip(self.index.keys_of(entries), sections.tolist(), strict=True):
                self.waits.key_changed(key, WaitState.SECTION, section)


def _weight(group: GroupSpec | None, footprints: NDArray[np.int64]) -> int:
    """What it costs to compute a KiB again: layers times tokens, so that latent KV outweighs full KV."""
    if group is None or not group.layers or not len(footprints):
        return _WEIGHT_USUAL
    return max(1, _WEIGHT_SCALE * len(group.layers) * group.block_tokens * 1024 // int(footprints[0]))
