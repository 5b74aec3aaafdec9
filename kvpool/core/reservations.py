"""Reservations, and the quarantine of slots whose writer may still be at work."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import BadArgument, UnknownReservation
from kvpool.core.holds import Hold
from kvpool.core.ids import ReservationId, SessionId
from kvpool.core.index import NO_ENTRY, Entries


@dataclass(frozen=True, slots=True)
class QuarantinedSlot:
    """A place that nobody may be given yet."""

    offset: int
    size: int
    generation: int
    key: bytes


@dataclass(slots=True, eq=False)
class Reservation:
    """Slots that a session writes. `rows[i]` is the index, in the reserve call's keys, of `entries[i]`."""

    session: SessionId
    rows: NDArray[np.int64]
    entries: Entries
    section_count: int
    expires_us: int
    hold: Hold | None
    expired: bool = False
    pending: dict[int, None] = field(default_factory=dict)  # entries not complete yet
    quarantined: list[QuarantinedSlot] = field(default_factory=list)

    def entries_of(self, indices: NDArray[np.uint32]) -> Entries:
        """Raises: BadArgument for an index that is not reserved here."""
        size = int(self.rows.max()) + 1
        by_row = np.full(size, NO_ENTRY, dtype=np.int32)
        by_row[self.rows] = self.entries
        if len(indices) and int(indices.max()) >= size:
            raise BadArgument(f"index {int(indices.max())} is not part of the reservation")
        entries = by_row[indices]
        if (entries == NO_ENTRY).any():
            raise BadArgument(f"index {int(indices[entries == NO_ENTRY][0])} is not part of the reservation")
        return entries


class Reservations:
    """Live reservations, and expired ones whose slots are in quarantine."""

    def __init__(self) -> None:
        self._reservations: dict[ReservationId, Reservation] = {}
        self._next = 1
        self.quarantined = 0

    def __len__(self) -> int:
        return len(self._reservations)

    @property
    def live(self) -> int:
        return sum(not r.expired for r in self._reservations.values())

    def add(self, reservation: Reservation) -> ReservationId:
        number = ReservationId(self._next)
        self._next += 1
        reservation.pending = dict.fromkeys(reservation.entries.tolist())
        self._reservations[number] = reservation
        return number

    def get(self, number: ReservationId) -> Reservation | None:
        return self._reservations.get(number)

    def find(self, session: SessionId, number: ReservationId) -> Reservation:
        """Raises: UnknownReservation if it is not there or not this session's."""
        found = self._reservations.get(number)
        if found is None or found.session != session:
            raise UnknownReservation(f"no reservation {number} of this session")
        return found

    def of_session(self, session: SessionId) -> list[ReservationId]:
        """Live ones."""
        return [n for n, r in self._reservations.items() if r.session == session and not r.expired]

    def complete(self, number: ReservationId, entries: Entries) -> bool:
        """Takes complete blocks off; True if none is left."""
        pending = self._reservations[number].pending
        for entry in entries.tolist():
            del pending[entry]
        return not pending

    def remove(self, number: ReservationId) -> None:
        del self._reservations[number]

    def pending(self, number: ReservationId) -> Entries:
        return np.fromiter(self._reservations[number].pending, dtype=np.int32)

    def quarantine(self, number: ReservationId, slots: list[QuarantinedSlot]) -> None:
        """Keeps the slots of a dropped reservation from being used until its writer has stopped."""
        found = self._reservations[number]
        found.expired, found.quarantined = True, slots
        found.pending.clear()
        self.quarantined += len(slots)

    def release_quarantine(self, number: ReservationId) -> list[QuarantinedSlot]:
        found = self._reservations.pop(number)
        self.quarantined -= len(found.quarantined)
        return found.quarantined

    def release_quarantine_of(self, session: SessionId) -> list[QuarantinedSlot]:
        expired = [n for n, r in self._reservations.items() if r.session == session and r.expired]
        return [slot for number in expired for slot in self.release_quarantine(number)]

    def quarantined_slots(self) -> list[QuarantinedSlot]:
        return [slot for r in self._reservations.values() for slot in r.quarantined]

    def entries_being_written(self) -> Entries:
        entries = [e for r in self._reservations.values() for e in r.pending]
        return np.sort(np.asarray(entries, dtype=np.int32))
