"""The authority over one source's blocks: who writes, who reads, who holds, what is evicted, what is told to others.

Pure: every call takes the time, every effect is in the returned value, in `take_changes` or in `take_wakeups`. A shell
moves the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors, EntryState, SourceArrays
from kvpool.core.bounds import Bounds
from kvpool.core.changes import BlockChange
from kvpool.core.errors import (
    BadArgument,
    NoSpace,
    Overloaded,
    ReservationExpired,
    UnknownLease,
    UnknownReservation,
    UnknownSession,
)  # fmt: skip
from kvpool.core.expiry import Expiries, Expiry
from kvpool.core.held import HeldBlocks
from kvpool.core.holds import Hold, Holds
from kvpool.core.ids import Fidelity, KeyArray, LeaseId, NamespaceId, PinId, ReservationId, SessionId, WaitId
from kvpool.core.index import NO_ENTRY, BlockIndex, Entries, first_of_each, split_keys
from kvpool.core.listing import BlockRecord, SourceCounts, count_source, list_blocks
from kvpool.core.namespace import SECTIONS_MAX, GroupSpec, Namespaces, NamespaceSpec
from kvpool.core.reservations import Reservation, Reservations, ReservationState
from kvpool.core.results import Leased, Pinned, Reserved, ReserveStatus, SourceConfig
from kvpool.core.store import BlockStore
from kvpool.core.waits import Waits, WaitState, Wakeup


class SourceCore:
    """One source. Not thread-safe: one thread calls it."""

    def __init__(self, config: SourceConfig, arrays: SourceArrays | None = None) -> None:
        self.config = config
        self.arrays = arrays or SourceArrays.allocate(config.entries_max, SECTIONS_MAX)
        assert self.arrays.entries == config.entries_max and self.arrays.sections == SECTIONS_MAX
        self.index = BlockIndex(self.arrays)
        self.holds = Holds(config.entries_max)
        self.store = BlockStore(self.index, self.holds, config.capacity_bytes, config.slab_bytes)
        self.reservations = Reservations()
        self.waits = Waits()
        self.sessions: dict[SessionId, str] = {}
        self.hits = self.misses = 0  # blocks asked for by lease
        self._namespaces = Namespaces()
        self._bounds = Bounds(config)
        self._expiries = Expiries()
        self._held = HeldBlocks(self.holds, self.store, self._expiries)
        self._next_session = 1

    # ---------------------------------------------------------------- namespaces and sessions

    def register_namespace(self, spec: NamespaceSpec) -> NamespaceId:
        """Makes a namespace known. Idempotent. Raises: BadArgument, Overloaded."""
        return self._namespaces.register(spec)

    def group(self, namespace_id: bytes, group: int, shard: int) -> GroupSpec:
        """A group of a namespace. Raises: UnknownNamespace, BadArgument."""
        return self._namespaces.group(namespace_id, group, shard)

    def open_session(self, client: str, now_us: int) -> SessionId:
        """Raises: Overloaded."""
        if len(self.sessions) >= self.config.sessions_max:
            raise Overloaded(f"{self.config.sessions_max} sessions are open already", hint="close idle clients")
        session = SessionId(self._next_session)
        self._next_session += 1
        self.sessions[session] = client
        return session

    def ping(self, session: SessionId, now_us: int) -> None:
        """Raises: UnknownSession."""
        if session not in self.sessions:
            raise UnknownSession(f"no session {session}", hint="the connection was lost; open a new session")

    def close_session(self, session: SessionId, now_us: int, *, writer_gone: bool) -> None:
        """Ends what a session holds. Its slots go to quarantine unless its writer is proven gone. Idempotent."""
        if self.sessions.pop(session, None) is None:
            return
        self._held.end_session(session)
        for wait in self.waits.of_session(session):
            self.cancel_wait(wait)
        for reservation in self.reservations.of_session(session):
            if self.reservations.find(session, reservation).state is ReservationState.LIVE:
                self._drop_reservation(reservation, quarantine=not writer_gone)
            elif self.reservations.find(session, reservation).state is ReservationState.FINISHED:
                self.reservations.remove(reservation)
                self._expiries.cancel(Expiry.RESERVATION, reservation)
        if writer_gone:
            self.writer_gone(session, now_us)

    def writer_gone(self, session: SessionId, now_us: int) -> int:
        """The writer behind a session can't write any more: its quarantined slots are free. Returns how many."""
        freed = 0
        for reservation in self.reservations.of_session(session):
            if self.reservations.find(session, reservation).state is ReservationState.EXPIRED:
                slots = self.reservations.remove(reservation)
                self.store.free_slots(slots)
                freed += len(slots)
        return freed

    # ---------------------------------------------------------------- writing

    def reserve(
        self,
        session: SessionId,
        namespace_id: bytes,
        group: GroupSpec,
        keys: KeyArray,
        ttl_us: int,
        now_us: int,
        *,
        hold: Hold | None = None,
        fidelity: Fidelity = Fidelity.EXACT,
    ) -> Reserved:
        """Reserves a slot for each key that is neither stored nor being written; evicts exactly what that needs.

        Raises: BadArgument, UnknownSession, UnknownNamespace, Overloaded; NoSpace if nothing was had.
        """
        namespace = self._check_call(session, namespace_id, keys, ttl_us)
        if hold is not None:
            self._bounds.hold(hold, self.holds)
        self._check_room_for_reservation()
        status, entries = self.store.status(namespace, keys)
        found = status == ReserveStatus.EXISTS
        # Held first, so that what this call found is not what it evicts.
        guarded = entries[found]
        self.store.guard(guarded)
        firsts = first_of_each(keys, np.flatnonzero(status == 0))
        fresh = np.fromiter(dict.fromkeys(firsts.values()), dtype=np.int64)
        taken = self.store.allocate(keys[fresh], group.block_bytes)
        if hold is not None:
            self._held.hand_off(guarded, hold, now_us)
        self.store.unguard(guarded)
        reserved = fresh[: len(taken)]
        taken_rows = set(reserved.tolist())
        for row, first in firsts.items():
            status[row] = ReserveStatus.BEING_WRITTEN if first in taken_rows else ReserveStatus.NO_SPACE
        status[reserved] = ReserveStatus.RESERVED
        entries[reserved] = taken
        if len(fresh) and not len(taken) and not found.any():
            raise NoSpace(
                f"no room for {len(fresh)} blocks of {group.block_bytes} bytes: all others are held or being written",
                hint="give the node more --memory, or wait until readers release",
            )
        reservation = ReservationId(0)
        if len(taken):
            self.arrays.fidelities[taken] = fidelity
            self.store.set_namespace(taken, namespace)
            reservation = self.reservations.add(
                Reservation(session, reserved, taken, group.section_count, now_us + ttl_us, hold)
            )
            self._expiries.set(Expiry.RESERVATION, reservation, now_us + ttl_us)
        return Reserved(reservation, status, self.store.describe(keys, entries, status == ReserveStatus.RESERVED, 0))

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
        complete = found.take_complete()
        if len(complete):
            # Held before anybody else acts, so that nothing evicts a block on its way to its reader.
            if found.hold is not None:
                self._held.hand_off(complete, found.hold, now_us)
            self.store.publish(complete)
            for key in self.index.keys_of(complete):
                self.waits.key_changed(key, WaitState.COMMITTED)
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
        self.store.free_slots(self.reservations.remove(reservation))
        self._expiries.cancel(Expiry.RESERVATION, reservation)
        return 0

    # ---------------------------------------------------------------- reading

    def lease(
        self, session: SessionId, namespace_id: bytes, keys: KeyArray, ttl_us: int, now_us: int, *, handoff: str = ""
    ) -> Leased:
        """A read right on each block that is readable; a miss is a result.

        Raises: BadArgument, UnknownSession, UnknownNamespace, Overloaded.
        """
        self._check_call(session, namespace_id, keys, ttl_us)
        self._bounds.room_for_hold(self.holds)
        entries, found = self.store.readable(self._namespaces.number(namespace_id), keys)
        self.hits += int(found.sum())
        self.misses += int((~found).sum())
        lease = LeaseId(0)
        if found.any():
            lease = self._held.lease(session, entries[found], now_us + ttl_us, handoff)
        fidelity = np.zeros(len(keys), dtype=np.uint8)
        fidelity[found] = self.arrays.fidelities[entries[found]]
        return Leased(lease, found, self.store.describe(keys, entries, found, SECTIONS_MAX), fidelity)

    def release(self, session: SessionId, leases: Sequence[int], now_us: int) -> None:
        """Gives leases back; the known ones even where one is not. Raises: UnknownLease."""
        unknown = None
        for number in leases:
            lease = LeaseId(number)
            found = self.holds.leases.get(lease)
            if found is None or found.session != session:
                unknown = number
                continue
            self._held.end_lease(lease)
        if unknown is not None:
            raise UnknownLease(f"no lease {unknown}", hint="it has expired; what was read under it may be stale")

    def readable_extents(self, lease: int) -> Descriptors:
        """What a lease allows to read. Raises: UnknownLease."""
        found = self.holds.leases.get(LeaseId(lease))
        if found is None:
            raise UnknownLease(f"no lease {lease}")
        return self.index.describe(found.entries)

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

    def pin(self, session: SessionId, namespace_id: bytes, keys: KeyArray, ttl_us: int, now_us: int) -> Pinned:
        """Holds blocks against eviction; ttl 0 = until released. Raises: as `lease`."""
        self._check_call(session, namespace_id, keys, ttl_us or 1)
        self._bounds.room_for_hold(self.holds)
        entries, found = self.store.readable(self._namespaces.number(namespace_id), keys)
        pin = PinId(0)
        if found.any():
            pin = self._held.pin(session, entries[found], now_us + ttl_us if ttl_us else 0)
        return Pinned(pin, found)

    def unpin(self, session: SessionId, pin: int, now_us: int) -> None:
        """Raises: UnknownLease."""
        found = self.holds.pins.get(PinId(pin))
        if found is None or found.session != session:
            raise UnknownLease(f"no pin {pin}")
        self._held.end_pin(PinId(pin))

    def lookup(self, namespace_id: bytes, keys: KeyArray) -> NDArray[np.bool_]:
        """Which keys are readable. Changes nothing, holds nothing. Raises: UnknownNamespace, BadArgument."""
        self._bounds.keys(keys)
        self._namespaces.number(namespace_id)
        return self.store.readable(self._namespaces.number(namespace_id), keys)[1]

    # ---------------------------------------------------------------- waiting

    def wait(
        self,
        session: SessionId,
        namespace_id: bytes,
        keys: KeyArray,
        deadline_us: int,
        now_us: int,
        *,
        absent_is_abandoned: bool = False,
    ) -> WaitId:
        """Awaits keys; what is known already comes with the next `take_wakeups`.

        Raises: BadArgument, UnknownSession, UnknownNamespace, Overloaded.
        """
        self._check_call(session, namespace_id, keys, deadline_us - now_us)
        self._bounds.waits(len(self.waits), self.waits.awaited_keys + len(keys))
        wait = self.waits.add(session)
        entries = self.index.lookup(keys)
        number = self._namespaces.number(namespace_id)
        for i, (entry, key) in enumerate(zip(entries.tolist(), split_keys(keys), strict=True)):
            foreign = entry != NO_ENTRY and self.store.namespace_of(entry) != number
            if foreign or (entry == NO_ENTRY and absent_is_abandoned):
                self.waits.tell(wait, i, WaitState.ABANDONED)
            elif entry == NO_ENTRY:
                self.waits.await_key(wait, i, key)
            elif self.arrays.states[entry] == EntryState.READABLE:
                self.waits.tell(wait, i, WaitState.COMMITTED)
            else:
                for section in self.store.sections_of(entry):
                    self.waits.tell(wait, i, WaitState.SECTION, section)
                self.waits.await_key(wait, i, key)
        self.waits.close_if_complete(wait)
        self._expiries.set(Expiry.WAIT, wait, deadline_us)
        return wait

    def cancel_wait(self, wait: WaitId) -> None:
        """Forgets a wait; nothing more is told to it."""
        self._expiries.cancel(Expiry.WAIT, wait)
        self.waits.cancel(wait)

    def take_wakeups(self) -> list[Wakeup]:
        """News for waiting readers since the last call."""
        news = self.waits.take()
        for wakeup in news:
            if wakeup.done:
                self._expiries.cancel(Expiry.WAIT, wakeup.wait)
        return news

    # ---------------------------------------------------------------- removal, time, inspection

    def remove(self, namespace_id: bytes, keys: KeyArray, now_us: int) -> int:
        """Drops readable blocks; those that are held lose their keys now and their bytes later. Returns how many."""
        self._bounds.keys(keys)
        entries, found = self.store.readable(self._namespaces.number(namespace_id), keys)
        victims = np.unique(entries[found]).astype(np.int32)
        self.store.drop(victims)
        return len(victims)

    def remove_namespace(self, namespace_id: bytes, now_us: int) -> int:
        victims = self.store.readable_of(self._namespaces.number(namespace_id))
        self.store.drop(victims)
        return len(victims)

    def tick(self, now_us: int) -> None:
        """Ends what has expired, and evicts down to the low watermark where the high one is passed."""
        for kind, number in self._expiries.due(now_us):
            self._expire(kind, number, now_us)
        config = self.config
        if self.store.slots.bytes_used > config.high_watermark * config.capacity_bytes:
            self.store.evict_to(int(config.low_watermark * config.capacity_bytes))

    def next_deadline_us(self) -> int | None:
        """When `tick` has something to do."""
        return self._expiries.next_us()

    def take_changes(self) -> list[BlockChange]:
        """What became readable or was removed since the last call, in order."""
        return self.store.take_changes()

    def snapshot_keys(self) -> KeyArray:
        """Keys of all readable blocks."""
        entries = np.flatnonzero(self.arrays.states == EntryState.READABLE)
        return self.arrays.keys[entries].view(np.uint8).reshape(-1, 16)

    def list_blocks(self, cursor: int, limit: int) -> tuple[list[BlockRecord], int]:
        """A page of blocks, and the cursor of the next page (0 = end). Raises: BadArgument."""
        if not 1 <= limit <= 10_000 or cursor < 0:
            raise BadArgument("limit must be 1 to 10000, cursor as it was returned")
        return list_blocks(self, self._namespaces.ids, cursor, limit)

    def counts(self) -> SourceCounts:
        return count_source(self)

    def check_invariants(self) -> None:
        self.index.check_invariants()
        self.holds.check_invariants()
        self.waits.check_invariants()
        self.reservations.check_invariants()
        self.store.check_invariants(self.reservations.quarantined_slots())
        writing = np.flatnonzero(self.arrays.states == EntryState.WRITING)
        assert np.array_equal(writing, self.reservations.entries_being_written())
        owners = [lease.session for lease in self.holds.leases.values()]
        owners += [pin.session for pin in self.holds.pins.values()]
        assert all(session in self.sessions for session in owners)

    # ---------------------------------------------------------------- parts

    def _check_call(self, session: SessionId, namespace_id: bytes, keys: KeyArray, ttl_us: int) -> int:
        """The namespace's number, where all is well."""
        self._bounds.keys(keys)
        self._bounds.ttl(ttl_us)
        self.ping(session, 0)
        return self._namespaces.number(namespace_id)

    def _check_room_for_reservation(self) -> None:
        if self.reservations.unfinished >= self.config.reservations_max:
            raise Overloaded(f"{self.config.reservations_max} reservations are open already")
        for number in self.reservations.forget_finished(len(self.reservations) + 1 - self.config.reservations_max):
            self._expiries.cancel(Expiry.RESERVATION, number)

    def _tell_sections(self, entries: Entries, sections: NDArray[np.uint32]) -> None:
        if len(self.waits):
            for key, section in zip(self.index.keys_of(entries), sections.tolist(), strict=True):
                self.waits.key_changed(key, WaitState.SECTION, section)

    def _drop_reservation(self, reservation: ReservationId, *, quarantine: bool) -> int:
        """Ends a live reservation: its incomplete blocks are dropped, their slots freed or put in quarantine."""
        found = self.reservations.get(reservation)
        assert found is not None and found.state is ReservationState.LIVE
        entries = found.pending_entries
        keys = self.index.keys_of(entries)
        slots = self.store.discard(entries)
        self._expiries.cancel(Expiry.RESERVATION, reservation)
        if quarantine:
            self.reservations.quarantine(reservation, slots)
        else:
            self.reservations.remove(reservation)
            self.store.free_slots(slots)
        for key in keys:
            self.waits.key_changed(key, WaitState.ABANDONED)
        return len(entries)

    def _expire(self, kind: Expiry, number: int | str, now_us: int) -> None:
        """Ends one holder whose time has come."""
        if kind is Expiry.HANDOFF:
            self._held.end_handoff(str(number))
        elif kind is Expiry.LEASE:
            self._held.end_lease(LeaseId(int(number)))
        elif kind is Expiry.PIN:
            self._held.end_pin(PinId(int(number)))
        elif kind is Expiry.WAIT:
            self.waits.expire(WaitId(int(number)))
        else:
            found = self.reservations.get(ReservationId(int(number)))
            assert found is not None
            if found.state is ReservationState.LIVE:
                self._drop_reservation(ReservationId(int(number)), quarantine=True)
            else:
                self.reservations.remove(ReservationId(int(number)))
