"""Leases, pins and hand-off holds: what keeps a block from being evicted, each with an owner and an end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ids import LeaseId, PinId, SessionId
from kvpool.core.index import Entries


@dataclass(frozen=True, slots=True)
class Hold:
    """Asks for a hand-off hold: blocks stay until a lease for `request_id` ends, or for `ttl_us`."""

    request_id: str
    ttl_us: int


@dataclass(slots=True, eq=False)
class Lease:
    session: SessionId
    entries: Entries
    expires_us: int
    handoff: str


@dataclass(slots=True, eq=False)
class Pin:
    """`session` 0: it belongs to `owner` and outlives sessions."""

    session: SessionId
    entries: Entries
    expires_us: int  # 0 = until released
    owner: str


@dataclass(slots=True)
class Handoff:
    entries: dict[int, None]
    expires_us: int


class Holds:
    """Counts holds of each entry. Every method that ends holds returns the entries that nobody holds any more."""

    def __init__(self, entries_max: int) -> None:
        self.lease_counts = np.zeros(entries_max, dtype=np.uint32)
        self.pin_counts = np.zeros(entries_max, dtype=np.uint32)  # hand-off holds included
        self.leases: dict[LeaseId, Lease] = {}
        self.pins: dict[PinId, Pin] = {}
        self.handoffs: dict[str, Handoff] = {}
        self.rows = 0  # of leases and pins
        self.detached = 0  # pins
        self._next = 1

    def held(self, entries: Entries) -> NDArray[np.bool_]:
        held: NDArray[np.bool_] = (self.lease_counts[entries] + self.pin_counts[entries]) > 0
        return held

    def add_lease(self, session: SessionId, entries: Entries, expires_us: int, handoff: str) -> LeaseId:
        lease = LeaseId(self._number())
        self.leases[lease] = Lease(session, entries, expires_us, handoff)
        self.rows += len(entries)
        np.add.at(self.lease_counts, entries, 1)
        return lease

    def end_lease(self, lease: LeaseId) -> Entries:
        """Ends a lease, and the hand-off holds that its blocks had for its request."""
        found = self.leases.pop(lease)
        self.rows -= len(found.entries)
        np.subtract.at(self.lease_counts, found.entries, 1)
        self._end_handoff_part(found.handoff, found.entries)
        return self._unheld(found.entries)

    def add_pin(self, session: SessionId, entries: Entries, expires_us: int, owner: str = "") -> PinId:
        """`session` 0 = detached."""
        pin = PinId(self._number())
        self.pins[pin] = Pin(session, entries, expires_us, owner)
        self.rows += len(entries)
        self.detached += not session
        np.add.at(self.pin_counts, entries, 1)
        return pin

    def end_pin(self, pin: PinId) -> Entries:
        found = self.pins.pop(pin)
        self.rows -= len(found.entries)
        self.detached -= not found.session
        np.subtract.at(self.pin_counts, found.entries, 1)
        return self._unheld(found.entries)

    def add_handoff(self, request_id: str, entry: int, expires_us: int) -> None:
        """Holds one block for a request; its end moves to the later one."""
        handoff = self.handoffs.setdefault(request_id, Handoff({}, expires_us))
        handoff.expires_us = max(handoff.expires_us, expires_us)
        if entry not in handoff.entries:
            handoff.entries[entry] = None
            self.pin_counts[entry] += np.uint32(1)

    def end_handoff(self, request_id: str) -> Entries:
        entries = np.fromiter(self.handoffs.pop(request_id).entries, dtype=np.int32)
        self.pin_counts[entries] -= np.uint32(1)
        return self._unheld(entries)

    def end_handoff_of(self, request_id: str, entries: Entries) -> Entries:
        """Ends a request's hand-off holds on some blocks; others of the request stay."""
        held = self.handoffs.get(request_id)
        mine = [e for e in entries.tolist() if held is not None and e in held.entries]
        self._end_handoff_part(request_id, entries)
        return self._unheld(np.array(mine, dtype=np.int32))

    def of_session(self, session: SessionId) -> tuple[list[LeaseId], list[PinId]]:
        leases = [lease for lease, found in self.leases.items() if found.session == session]
        return leases, [pin for pin, found in self.pins.items() if found.session == session]

    def pins_of_owner(self, owner: str) -> list[PinId]:
        return [pin for pin, found in self.pins.items() if not found.session and found.owner == owner]

    def check_invariants(self) -> None:
        leases = np.zeros_like(self.lease_counts)
        pins = np.zeros_like(self.pin_counts)
        for lease in self.leases.values():
            np.add.at(leases, lease.entries, 1)
        for pin in self.pins.values():
            np.add.at(pins, pin.entries, 1)
            assert pin.session or pin.owner
        for handoff in self.handoffs.values():
            assert handoff.entries
            np.add.at(pins, list(handoff.entries), 1)
        assert (leases == self.lease_counts).all() and (pins == self.pin_counts).all()
        rows = sum(len(lease.entries) for lease in self.leases.values())
        assert self.rows == rows + sum(len(pin.entries) for pin in self.pins.values())
        assert self.detached == sum(not pin.session for pin in self.pins.values())

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _end_handoff_part(self, request_id: str, entries: Entries) -> None:
        handoff = self.handoffs.get(request_id)
        if handoff is None:
            return
        mine = [e for e in entries.tolist() if handoff.entries.pop(e, 0) is None]
        self.pin_counts[mine] -= np.uint32(1)
        if not handoff.entries:
            del self.handoffs[request_id]

    def _unheld(self, entries: Entries) -> Entries:
        free = entries[~self.held(entries)]
        # Keeps prompt order, names each entry once.
        _, first = np.unique(free, return_index=True)
        return free[np.sort(first)]
