"""The authority over one source's blocks: who writes, who reads, who holds, what is evicted, what is told to others.

Pure: every call takes the time, every effect is in the returned value, in `take_changes` or in `take_wakeups`. A shell
moves the bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors, EntryState, SourceArrays
from kvpool.core.changes import BlockChange
from kvpool.core.errors import (
    AlreadyCommitted,
    BadArgument,
    NoSpace,
    Overloaded,
    ReservationExpired,
    UnknownLease,
    UnknownNamespace,
    UnknownReservation,
    UnknownSession,
)
from kvpool.core.holds import Hold, Holds
from kvpool.core.ids import Fidelity, KeyArray, LeaseId, NamespaceId, PinId, ReservationId, SessionId, WaitId
from kvpool.core.index import NO_ENTRY, BlockIndex, Entries
from kvpool.core.listing import BlockRecord, SourceCounts, list_blocks
from kvpool.core.namespace import SECTIONS_MAX, GroupSpec, NamespaceSpec
from kvpool.core.reservations import Reservation, Reservations
from kvpool.core.store import BlockStore
from kvpool.core.waits import Waits, WaitState, Wakeup

TTL_US_MAX: Final = 600_000_000
NAMESPACES_MAX: Final = 1024


class ReserveStatus(IntEnum):
    """What became of one key of a reserve; numbers as on the wire."""

    RESERVED = 1
    EXISTS = 2
    BEING_WRITTEN = 3
    NO_SPACE = 4


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Sizes and bounds. At a bound a call is refused with Overloaded, unless said otherwise."""

    capacity_bytes: int
    entries_max: int  # blocks, whatever their size; beyond it the oldest are evicted
    slab_bytes: int = 64 << 20
    high_watermark: float = 0.95  # of capacity: beyond it `tick` evicts ...
    low_watermark: float = 0.90  # ... down to here
    sessions_max: int = 1024
    reservations_max: int = 65_536
    leases_max: int = 65_536  # leases and pins together
    waits_max: int = 16_384
    handoffs_max: int = 65_536
    keys_per_call_max: int = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class Reserved:
    """Status of each key; `slots` has a row a key, meaningful where RESERVED. `reservation` 0 = nothing reserved."""

    reservation: ReservationId
    status: NDArray[np.uint8]
    slots: Descriptors


@dataclass(frozen=True, slots=True, eq=False)
class Leased:
    """`blocks` has a row a key, meaningful where found. `lease` 0 = nothing found."""

    lease: LeaseId
    found: NDArray[np.bool_]
    blocks: Descriptors
    fidelity: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Pinned:
    pin: PinId
    found: NDArray[np.bool_]


class _Expiry(IntEnum):
    LEASE = 1
    PIN = 2
    HANDOFF = 3
    RESERVATION = 4
    WAIT = 5


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
        self._waits = Waits()
        self._namespaces: dict[NamespaceId, NamespaceSpec] = {}
        self._namespace_numbers: dict[NamespaceId, int] = {}
        self._sessions: dict[SessionId, str] = {}
        self._expiries: list[tuple[int, int, int | str]] = []
        self._next_session = 1
        self._hits = self._misses = 0

    # ---------------------------------------------------------------- namespaces and sessions

    def register_namespace(self, spec: NamespaceSpec) -> NamespaceId:
        """Makes a namespace known. Idempotent. Raises: BadArgument, Overloaded."""
        spec.validate()
        namespace = spec.id()
        if namespace not in self._namespaces:
            if len(self._namespaces) >= NAMESPACES_MAX:
                raise Overloaded(f"{NAMESPACES_MAX} namespaces are registered already")
            self._namespaces[namespace] = spec
            self._namespace_numbers[namespace] = len(self._namespace_numbers)
        return namespace

    def group(self, namespace_id: bytes, group: int, shard: int) -> GroupSpec:
        """The group of a namespace. Raises: UnknownNamespace, BadArgument."""
        self._namespace(namespace_id)
        groups = self._namespaces[NamespaceId(namespace_id)].groups
        if not 0 <= group < len(groups):
            raise BadArgument(f"group {group} is not one of the namespace's {len(groups)}")
        if not 0 <= shard < groups[group].shard_count:
            raise BadArgument(f"shard {shard} is not one of the group's {groups[group].shard_count}")
        return groups[group]

    def open_session(self, client: str, now_us: int) -> SessionId:
        """Raises: Overloaded."""
        if len(self._sessions) >= self.config.sessions_max:
            raise Overloaded(f"{self.config.sessions_max} sessions are open already", hint="close idle clients")
        session = SessionId(self._next_session)
        self._next_session += 1
        self._sessions[session] = client
        return session

    def ping(self, session: SessionId, now_us: int) -> None:
        """Raises: UnknownSession."""
        if session not in self._sessions:
            raise UnknownSession(f"no session {session}", hint="the connection was lost; open a new session")

    def close_session(self, session: SessionId, now_us: int, *, writer_gone: bool) -> None:
        """Ends what a session holds. Its slots go to quarantine unless its writer is proven gone. Idempotent."""
        if self._sessions.pop(session, None) is None:
            return
        leases, pins = self.holds.of_session(session)
        for lease in leases:
            self.store.unhold(self.holds.end_lease(lease))
        for pin in pins:
            self.store.unhold(self.holds.end_pin(pin))
        self._waits.cancel_session(session)
        for reservation in self.reservations.of_session(session):
            self._drop_reservation(reservation, quarantine=not writer_gone)
        if writer_gone:
            self.writer_gone(session, now_us)

    def writer_gone(self, session: SessionId, now_us: int) -> int:
        """The writer behind a session can't write any more: its quarantined slots are free. Returns how many."""
        slots = self.reservations.release_quarantine_of(session)
        self.store.free_slots(slots)
        return len(slots)

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
        self._check_call(session, namespace_id, keys, ttl_us)
        if hold is not None:
            self._check_hold(hold)
        if len(self.reservations) >= self.config.reservations_max:
            raise Overloaded(f"{self.config.reservations_max} reservations are open already")
        status = np.empty(len(keys), dtype=np.uint8)
        entries = self.index.lookup(keys)
        known = entries != NO_ENTRY
        readable = np.zeros(len(keys), dtype=bool)
        readable[known] = self.arrays.states[entries[known]] == EntryState.READABLE
        status[readable] = ReserveStatus.EXISTS
        status[known & ~readable] = ReserveStatus.BEING_WRITTEN
        # Held first, so that what this call found is not what it evicts.
        guard = entries[readable]
        self.store.guard(guard)
        fresh = self._first_of_each(keys, np.flatnonzero(~known))
        status[~known] = ReserveStatus.BEING_WRITTEN
        status[fresh] = ReserveStatus.NO_SPACE
        taken = self.store.allocate(keys[fresh], group.block_bytes)
        if hold is not None:
            self._hand_off(guard.tolist(), hold, now_us)
        self.store.unguard(guard)
        rows = fresh[: len(taken)]
        status[rows] = ReserveStatus.RESERVED
        entries[rows] = taken
        if len(fresh) and not len(taken) and not readable.any():
            raise NoSpace(
                f"no room for {len(fresh)} blocks of {group.block_bytes} bytes: all others are held or being written",
                hint="give the node more --memory, or wait until readers release",
            )
        reservation = ReservationId(0)
        if len(taken):
            self.arrays.fidelities[taken] = fidelity
            self.store.set_namespace(taken, self._namespace_numbers[NamespaceId(namespace_id)])
            reservation = self.reservations.add(
                Reservation(session, rows, taken, group.section_count, now_us + ttl_us, hold)
            )
            self._expire_at(now_us + ttl_us, _Expiry.RESERVATION, reservation)
        return Reserved(reservation, status, self._describe(keys, entries, status == ReserveStatus.RESERVED, 0))

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

        Args: indices (n) into the keys of the reserve call; sections (n); digests (n).
        Raises: UnknownReservation, ReservationExpired, BadArgument, AlreadyCommitted (same section, other digest).
        """
        if not len(indices) == len(sections) == len(digests):
            raise BadArgument("indices, sections and digests must have the same length")
        found = self.reservations.find(session, reservation)
        if found.expired or found.expires_us <= now_us:
            raise ReservationExpired(f"reservation {reservation} has expired", hint="abort it and reserve again")
        entries = found.entries_of(indices)
        if len(sections) and int(sections.max()) >= found.section_count:
            raise BadArgument(f"section {int(sections.max())} is not one of {found.section_count}")
        done = self.store.section_done(entries, sections)
        again = done & (self.arrays.digests[entries, sections] != digests)
        if again.any():
            raise AlreadyCommitted(f"section {int(sections[again][0])} was committed with another digest")
        complete = self.store.commit_sections(entries, sections, digests, found.section_count)
        self._tell_sections(entries[~done], sections[~done])
        if len(complete):
            # Held before anybody else acts, so that nothing evicts a block on its way to its reader.
            if found.hold is not None:
                self._hand_off(complete.tolist(), found.hold, now_us)
            self.store.publish(complete)
            for key in self._keys(complete):
                self._waits.key_changed(key, WaitState.COMMITTED)
            if self.reservations.complete(reservation, complete):
                self.reservations.remove(reservation)
        return len(complete)

    def abort(self, session: SessionId, reservation: ReservationId, now_us: int) -> int:
        """Gives a reservation back, and with it the writer's word that it has stopped. Returns blocks dropped.

        Raises: UnknownReservation.
        """
        found = self.reservations.find(session, reservation)
        if found.expired:
            self.store.free_slots(self.reservations.release_quarantine(reservation))
            return 0
        return self._drop_reservation(reservation, quarantine=False)

    # ---------------------------------------------------------------- reading

    def lease(
        self, session: SessionId, namespace_id: bytes, keys: KeyArray, ttl_us: int, now_us: int, *, handoff: str = ""
    ) -> Leased:
        """A read right on each block that is readable; a miss is a result.

        Raises: BadArgument, UnknownSession, UnknownNamespace, Overloaded.
        """
        self._check_call(session, namespace_id, keys, ttl_us)
        self._check_room_for_hold()
        entries, found = self._readable(namespace_id, keys)
        self._hits += int(found.sum())
        self._misses += int((~found).sum())
        lease = LeaseId(0)
        if found.any():
            held = np.ascontiguousarray(entries[found])
            self.store.hold(held)
            lease = self.holds.add_lease(session, held, now_us + ttl_us, handoff)
            self._expire_at(now_us + ttl_us, _Expiry.LEASE, lease)
        fidelity = np.zeros(len(keys), dtype=np.uint8)
        fidelity[found] = self.arrays.fidelities[entries[found]]
        return Leased(lease, found, self._describe(keys, entries, found, SECTIONS_MAX), fidelity)

    def release(self, session: SessionId, leases: Sequence[int], now_us: int) -> None:
        """Gives leases back; the known ones even where one is not. Raises: UnknownLease."""
        unknown = None
        for number in leases:
            lease = LeaseId(number)
            found = self.holds.leases.get(lease)
            if found is None or found.session != session:
                unknown = number
                continue
            self.store.unhold(self.holds.end_lease(lease))
        if unknown is not None:
            raise UnknownLease(f"no lease {unknown}", hint="it has expired; what was read under it may be stale")

    def readable_extents(self, lease: int) -> Descriptors:
        """What a lease allows to read. Raises: UnknownLease."""
        found = self.holds.leases.get(LeaseId(lease))
        if found is None:
            raise UnknownLease(f"no lease {lease}")
        return self.index.describe(found.entries)

    def writable_extents(self, reservation: int) -> Descriptors:
        """Where a live reservation allows to write. Raises: UnknownReservation, ReservationExpired."""
        found = self.reservations.get(ReservationId(reservation))
        if found is None:
            raise UnknownReservation(f"no reservation {reservation}")
        if found.expired:
            raise ReservationExpired(f"reservation {reservation} has expired")
        return self.index.describe(found.entries)

    def pin(self, session: SessionId, namespace_id: bytes, keys: KeyArray, ttl_us: int, now_us: int) -> Pinned:
        """Holds blocks against eviction; ttl 0 = until released. Raises: as `lease`."""
        self._check_call(session, namespace_id, keys, ttl_us or 1)
        self._check_room_for_hold()
        entries, found = self._readable(namespace_id, keys)
        pin = PinId(0)
        if found.any():
            held = np.ascontiguousarray(entries[found])
            self.store.hold(held)
            pin = self.holds.add_pin(session, held, now_us + ttl_us if ttl_us else 0)
            if ttl_us:
                self._expire_at(now_us + ttl_us, _Expiry.PIN, pin)
        return Pinned(pin, found)

    def unpin(self, session: SessionId, pin: int, now_us: int) -> None:
        """Raises: UnknownLease."""
        found = self.holds.pins.get(PinId(pin))
        if found is None or found.session != session:
            raise UnknownLease(f"no pin {pin}")
        self.store.unhold(self.holds.end_pin(PinId(pin)))

    def lookup(self, namespace_id: bytes, keys: KeyArray) -> NDArray[np.bool_]:
        """Which keys are readable. Changes nothing, holds nothing. Raises: UnknownNamespace, BadArgument."""
        self._check_keys(keys)
        self._namespace(namespace_id)
        return self._readable(namespace_id, keys)[1]

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
        if len(self._waits) >= self.config.waits_max:
            raise Overloaded(f"{self.config.waits_max} readers are waiting already")
        wait = self._waits.add(session, deadline_us)
        entries = self.index.lookup(keys)
        for i, (entry, key) in enumerate(zip(entries.tolist(), self._split(keys), strict=True)):
            if entry != NO_ENTRY and self.store.namespace_of(entry) != self._namespace(namespace_id):
                self._waits.tell(wait, i, WaitState.ABANDONED)
            elif entry == NO_ENTRY:
                if absent_is_abandoned:
                    self._waits.tell(wait, i, WaitState.ABANDONED)
                else:
                    self._waits.await_key(wait, i, key)
            elif self.arrays.states[entry] == EntryState.READABLE:
                self._waits.tell(wait, i, WaitState.COMMITTED)
            else:
                for section in self.store.sections_of(entry):
                    self._waits.tell(wait, i, WaitState.SECTION, section)
                self._waits.await_key(wait, i, key)
        self._waits.close_if_complete(wait)
        self._expire_at(deadline_us, _Expiry.WAIT, wait)
        return wait

    def cancel_wait(self, wait: WaitId) -> None:
        self._waits.cancel(wait)

    def take_wakeups(self) -> list[Wakeup]:
        return self._waits.take()

    # ---------------------------------------------------------------- removal, time, inspection

    def remove(self, namespace_id: bytes, keys: KeyArray, now_us: int) -> int:
        """Drops readable blocks; those that are held lose their keys now and their bytes later. Returns how many."""
        self._check_keys(keys)
        entries, found = self._readable(namespace_id, keys)
        victims = np.unique(entries[found]).astype(np.int32)
        self.store.drop(victims)
        return len(victims)

    def remove_namespace(self, namespace_id: bytes, now_us: int) -> int:
        victims = self.store.readable_of(self._namespace(namespace_id))
        self.store.drop(victims)
        return len(victims)

    def tick(self, now_us: int) -> None:
        """Ends what has expired, and evicts down to the low watermark where the high one is passed."""
        while self._expiries and self._expiries[0][0] <= now_us:
            _, kind, number = heapq.heappop(self._expiries)
            self._expire(_Expiry(kind), number, now_us)
        config = self.config
        if self.store.slots.bytes_used > config.high_watermark * config.capacity_bytes:
            self.store.evict_to(int(config.low_watermark * config.capacity_bytes))

    def next_deadline_us(self) -> int | None:
        """When `tick` has something to do."""
        return self._expiries[0][0] if self._expiries else None

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
        return list_blocks(self, list(self._namespaces), cursor, limit)

    def counts(self) -> SourceCounts:
        states = self.arrays.states
        return SourceCounts(
            bytes_total=self.store.slots.capacity_bytes,
            bytes_used=self.store.slots.bytes_used,
            blocks=int(np.count_nonzero(states == EntryState.READABLE)),
            blocks_writing=int(np.count_nonzero(states == EntryState.WRITING)),
            sessions=len(self._sessions),
            leases=len(self.holds.leases),
            pins=len(self.holds.pins) + len(self.holds.handoffs),
            reservations=self.reservations.live,
            quarantined=self.reservations.quarantined,
            waiters=len(self._waits),
            hits=self._hits,
            misses=self._misses,
            evictions=self.store.evictions,
        )

    def check_invariants(self) -> None:
        self.index.check_invariants()
        self.holds.check_invariants()
        self._waits.check_invariants()
        self.store.check_invariants(self.reservations.quarantined_slots())
        writing = np.flatnonzero(self.arrays.states == EntryState.WRITING)
        assert np.array_equal(writing, self.reservations.entries_being_written())
        owners = [lease.session for lease in self.holds.leases.values()]
        owners += [pin.session for pin in self.holds.pins.values()]
        assert all(session in self._sessions for session in owners)

    # ---------------------------------------------------------------- parts

    def _namespace(self, namespace_id: bytes) -> int:
        number = self._namespace_numbers.get(NamespaceId(namespace_id))
        if number is None:
            raise UnknownNamespace(
                f"namespace {bytes(namespace_id).hex() or '(empty)'} is not registered", hint="call RegisterNamespace"
            )
        return number

    def _check_keys(self, keys: KeyArray) -> None:
        if len(keys) > self.config.keys_per_call_max:
            raise BadArgument(f"{len(keys)} keys in one call; at most {self.config.keys_per_call_max}")

    def _check_call(self, session: SessionId, namespace_id: bytes, keys: KeyArray, ttl_us: int) -> None:
        self._check_keys(keys)
        if not 0 < ttl_us <= TTL_US_MAX:
            raise BadArgument(f"a time to live must be over 0 and at most {TTL_US_MAX // 1_000_000} s")
        self.ping(session, 0)
        self._namespace(namespace_id)

    def _check_hold(self, hold: Hold) -> None:
        if not hold.request_id or not 0 < hold.ttl_us <= TTL_US_MAX:
            raise BadArgument("a hand-off hold needs a request id and a time to live")
        if len(self.holds.handoffs) >= self.config.handoffs_max:
            raise Overloaded(f"{self.config.handoffs_max} hand-offs are held already")

    def _check_room_for_hold(self) -> None:
        if len(self.holds.leases) + len(self.holds.pins) >= self.config.leases_max:
            raise Overloaded(f"{self.config.leases_max} leases and pins are held already")

    def _readable(self, namespace_id: bytes, keys: KeyArray) -> tuple[Entries, NDArray[np.bool_]]:
        number = self._namespace(namespace_id)
        entries = self.index.lookup(keys)
        found = entries != NO_ENTRY
        known = entries[found]
        found[found] = (self.arrays.states[known] == EntryState.READABLE) & self.store.in_namespace(known, number)
        return entries, found

    def _describe(self, keys: KeyArray, entries: Entries, valid: NDArray[np.bool_], sections: int) -> Descriptors:
        """A row a key; rows that are not valid are zero."""
        rows = self.index.describe(np.where(valid, entries, 0), sections)
        blank = ~valid
        for column in (rows.offsets, rows.sizes, rows.generations, rows.digests):
            column[blank] = 0
        return Descriptors(keys, rows.offsets, rows.sizes, rows.generations, rows.digests)

    @staticmethod
    def _first_of_each(keys: KeyArray, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows without those whose key stands in an earlier one."""
        seen: dict[bytes, int] = {}
        for row, key in zip(rows.tolist(), SourceCore._split(keys[rows]), strict=True):
            seen.setdefault(key, row)
        return np.fromiter(seen.values(), dtype=np.int64, count=len(seen))

    @staticmethod
    def _split(keys: KeyArray) -> list[bytes]:
        packed = keys.tobytes()
        return [packed[i : i + 16] for i in range(0, len(packed), 16)]

    def _keys(self, entries: Entries) -> list[bytes]:
        return self._split(self.arrays.keys[entries].view(np.uint8).reshape(-1, 16))

    def _tell_sections(self, entries: Entries, sections: NDArray[np.uint32]) -> None:
        if len(self._waits):
            for key, section in zip(self._keys(entries), sections.tolist(), strict=True):
                self._waits.key_changed(key, WaitState.SECTION, section)

    def _hand_off(self, entries: list[int], hold: Hold, now_us: int) -> None:
        if not entries:
            return
        self.store.hold(np.asarray(entries, dtype=np.int32))
        for entry in entries:
            self.holds.add_handoff(hold.request_id, entry, now_us + hold.ttl_us)
        self._expire_at(now_us + hold.ttl_us, _Expiry.HANDOFF, hold.request_id)

    def _drop_reservation(self, reservation: ReservationId, *, quarantine: bool) -> int:
        entries = self.reservations.pending(reservation)
        keys = self._keys(entries)
        slots = self.store.discard(entries)
        if quarantine:
            self.reservations.quarantine(reservation, slots)
        else:
            self.reservations.remove(reservation)
            self.store.free_slots(slots)
        for key in keys:
            self._waits.key_changed(key, WaitState.ABANDONED)
        return len(entries)

    def _expire_at(self, deadline_us: int, kind: _Expiry, number: int | str) -> None:
        heapq.heappush(self._expiries, (deadline_us, int(kind), number))

    def _expire(self, kind: _Expiry, number: int | str, now_us: int) -> None:
        """Ends one hold if it is still there and its time has come; it may have ended or been prolonged since."""
        if kind is _Expiry.HANDOFF:
            handoff = self.holds.handoffs.get(str(number))
            if handoff is not None and handoff.expires_us <= now_us:
                self.store.unhold(self.holds.end_handoff(str(number)))
        elif kind is _Expiry.LEASE:
            if LeaseId(int(number)) in self.holds.leases:
                self.store.unhold(self.holds.end_lease(LeaseId(int(number))))
        elif kind is _Expiry.PIN:
            if PinId(int(number)) in self.holds.pins:
                self.store.unhold(self.holds.end_pin(PinId(int(number))))
        elif kind is _Expiry.WAIT:
            self._waits.expire(WaitId(int(number)), now_us)
        else:
            found = self.reservations.get(ReservationId(int(number)))
            if found is not None and not found.expired:
                self._drop_reservation(ReservationId(int(number)), quarantine=True)
