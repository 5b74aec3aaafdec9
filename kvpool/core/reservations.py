"""Reservations, and the quarantine of slots whose writer may still be at work.

A reservation is live until each of its blocks is complete, aborted, or out of time. It then is finished (kept for a
while, to answer a repeated commit) or expired (kept, with its entries in state QUARANTINED, until its writer has
stopped).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import AlreadyCommitted, BadArgument, UnknownReservation
from kvpool.core.holds import Hold
from kvpool.core.ids import KeyArray, ReservationId, SessionId
from kvpool.core.index import NO_ENTRY, BlockIndex, Entries


class ReservationState(IntEnum):
    LIVE = 1
    FINISHED = 2
    EXPIRED = 3


_NOBODY = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Lineage:
    """What stands on what in a reserve call: its keys in prompt order, and the block before the first one.

    keys uint8 (n, 16); parent: a key, or empty; weight: see `Evictor.insert`. Objects stand on nothing: keys None.
    """

    keys: KeyArray | None
    parent: bytes
    weight: int

    def parents(self, rows: NDArray[np.int64], index: BlockIndex) -> Entries:
        """Entries of the blocks before those of `rows`, of whatever state, or NO_ENTRY; int32 (n)."""
        if self.keys is None:
            return np.full(len(rows), NO_ENTRY, dtype=np.int32)
        before = self.keys[np.maximum(rows - 1, 0)]
        parents = index.lookup(before)
        first = rows == 0
        if first.any():
            parents[first] = NO_ENTRY
            if self.parent:
                parents[first] = index.lookup(np.frombuffer(self.parent, dtype=np.uint8).reshape(1, -1))[0]
        return parents


@dataclass(slots=True, eq=False)
class Reservation:
    """Slots that a session writes. `rows[i]` is the index, in the reserve call's keys, of `entries[i]`.

    Entries belong to the reservation only while they are pending: a complete block may be evicted, and its entry be
    somebody else's, before the reservation ends. What was committed is therefore remembered here.
    """

    session: SessionId
    rows: NDArray[np.int64]
    entries: Entries
    section_count: int
    expires_us: int
    hold: Hold | None
    lineage: Lineage
    state: ReservationState = ReservationState.LIVE
    quarantined: Entries = field(default_factory=lambda: _NOBODY)
    last_pong: int = 0  # of its session when it expired
    pending: NDArray[np.bool_] = field(init=False)
    _masks: NDArray[np.uint32] = field(init=False)  # sections committed, a bit each
    _digests: NDArray[np.uint64] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.rows)
        self.pending = np.ones(count, dtype=bool)
        self._masks = np.zeros(count, dtype=np.uint32)
        self._digests = np.zeros((count, self.section_count), dtype=np.uint64)

    @property
    def pending_entries(self) -> Entries:
        return self.entries[self.pending]

    def positions(self, indices: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Where indices of the reserve call stand in `rows`. Raises: BadArgument for one that is not reserved here."""
        size = int(self.rows.max()) + 1
        by_row = np.full(size, NO_ENTRY, dtype=np.int64)
        by_row[self.rows] = np.arange(len(self.rows))
        wrong = indices >= size
        wrong[~wrong] = by_row[indices[~wrong]] == NO_ENTRY
        if wrong.any():
            raise BadArgument(f"index {int(indices[wrong][0])} is not part of the reservation")
        return by_row[indices]

    def accept(
        self, positions: NDArray[np.int64], sections: NDArray[np.uint32], digests: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """Notes sections as committed, all or none. Returns which of them (indices into the arguments) are new.

        Raises: BadArgument for a section that does not exist; AlreadyCommitted for one that has another digest.
        """
        if len(sections) and int(sections.max()) >= self.section_count:
            raise BadArgument(f"section {int(sections.max())} is not one of {self.section_count}")
        places = positions * self.section_count + sections
        _, first = np.unique(places, return_index=True)
        again = np.ones(len(places), dtype=bool)
        again[first] = (self._masks[positions[first]] >> sections[first]) & np.uint32(1) != 0
        known = self._digests.reshape(-1).copy()
        fresh = np.sort(first[~again[first]])
        known[places[fresh]] = digests[fresh]
        clash = known[places] != digests
        if clash.any():
            raise AlreadyCommitted(f"section {int(sections[clash][0])} was committed with another digest")
        self._digests.reshape(-1)[places[fresh]] = digests[fresh]
        np.bitwise_or.at(self._masks, positions[fresh], np.uint32(1) << sections[fresh])
        return fresh

    def take_complete(self) -> tuple[NDArray[np.int64], Entries]:
        """Rows and entries that are complete by now and no longer the reservation's."""
        complete = self.pending & (self._masks == np.uint32((1 << self.section_count) - 1))
        self.pending &= ~complete
        return self.rows[complete], self.entries[complete]


class Reservations:
    """All reservations of a source."""

    def __init__(self) -> None:
        self._reservations: dict[ReservationId, Reservation] = {}
        self._finished: dict[ReservationId, None] = {}  # oldest first
        self._expired: dict[ReservationId, None] = {}  # oldest first
        self._finished_rows = 0
        self._next = 1
        self.live = 0

    def __len__(self) -> int:
        return len(self._reservations)

    @property
    def unfinished(self) -> int:
        return len(self._reservations) - len(self._finished)

    def add(self, reservation: Reservation) -> ReservationId:
        number = ReservationId(self._next)
        self._next += 1
        self._reservations[number] = reservation
        self.live += 1
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
        return [n for n, r in self._reservations.items() if r.session == session]

    def expired_before(self, session: SessionId, pong: int) -> list[ReservationId]:
        """Reservations of a session that had expired when this pong was sent, oldest first."""
        expired = ((number, self._reservations[number]) for number in self._expired)
        return [number for number, r in expired if r.session == session and r.last_pong < pong]

    def finish(self, number: ReservationId) -> None:
        """Each block is complete: kept only to answer a repeated commit."""
        found = self._reservations[number]
        found.state = ReservationState.FINISHED
        self._finished[number] = None
        self._finished_rows += len(found.rows)
        self.live -= 1

    def forget_finished(self, count_max: int, rows_max: int) -> list[ReservationId]:
        """Forgets the oldest finished reservations beyond so many reservations, or so many rows of finished ones."""
        forgotten = []
        while self._finished and (len(self) > count_max or self._finished_rows > rows_max):
            forgotten.append(next(iter(self._finished)))
            self.remove(forgotten[-1])
        return forgotten

    def remove(self, number: ReservationId) -> Entries:
        """Forgets a reservation; returns the entries it had in quarantine."""
        found = self._reservations.pop(number)
        self.live -= found.state is ReservationState.LIVE
        if found.state is ReservationState.FINISHED:
            del self._finished[number]
            self._finished_rows -= len(found.rows)
        self._expired.pop(number, None)
        return found.quarantined

    def quarantine(self, number: ReservationId, last_pong: int) -> None:
        """Keeps the slots of a dropped reservation from being used until its writer has stopped.

        Args: last_pong: number of the last pong that its session was sent.
        """
        found = self._reservations[number]
        found.state, found.quarantined = ReservationState.EXPIRED, found.pending_entries
        found.last_pong = last_pong
        self._expired[number] = None
        found.pending[:] = False
        self.live -= 1

    def quarantined_entries(self) -> Entries:
        return np.concatenate([_NOBODY, *(r.quarantined for r in self._reservations.values())])

    def entries_being_written(self) -> Entries:
        entries = [r.pending_entries for r in self._reservations.values()]
        return np.sort(np.concatenate(entries)) if entries else np.empty(0, dtype=np.int32)

    def check_invariants(self) -> None:
        states = [r.state for r in self._reservations.values()]
        assert states.count(ReservationState.LIVE) == self.live
        assert states.count(ReservationState.FINISHED) == len(self._finished)
        expired = [n for n, r in self._reservations.items() if r.state is ReservationState.EXPIRED]
        assert sorted(self._expired) == sorted(expired)
        assert self._finished_rows == sum(len(self._reservations[n].rows) for n in self._finished)
        for r in self._reservations.values():
            assert r.pending.any() == (r.state is ReservationState.LIVE)
            assert not len(r.quarantined) or r.state is ReservationState.EXPIRED
