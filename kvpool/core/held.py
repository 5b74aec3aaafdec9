"""Holding blocks and letting them go: ties the counts of holds to eviction and to their deadlines."""

from __future__ import annotations

from kvpool.core.expiry import Expiries, Expiry
from kvpool.core.holds import Hold, Holds
from kvpool.core.ids import LeaseId, PinId, SessionId
from kvpool.core.index import Entries
from kvpool.core.store import BlockStore


class HeldBlocks:
    """Every hold begins and ends here, so that it is counted, hidden from eviction, and has its end."""

    def __init__(self, holds: Holds, store: BlockStore, expiries: Expiries) -> None:
        self._holds, self._store, self._expiries = holds, store, expiries

    def lease(self, session: SessionId, entries: Entries, expires_us: int, handoff: str) -> LeaseId:
        self._store.hold(entries)
        lease = self._holds.add_lease(session, entries, expires_us, handoff)
        self._expiries.set(Expiry.LEASE, lease, expires_us)
        return lease

    def end_lease(self, lease: LeaseId) -> None:
        self._expiries.cancel(Expiry.LEASE, lease)
        handoff = self._holds.leases[lease].handoff
        self._store.unhold(self._holds.end_lease(lease))
        self._forget_ended(handoff)

    def pin(self, session: SessionId, entries: Entries, expires_us: int, owner: str) -> PinId:
        """`expires_us` 0 = until released; `session` 0 = it belongs to `owner`."""
        self._store.hold(entries)
        pin = self._holds.add_pin(session, entries, expires_us, owner)
        if expires_us:
            self._expiries.set(Expiry.PIN, pin, expires_us)
        return pin

    def end_pin(self, pin: PinId) -> None:
        self._expiries.cancel(Expiry.PIN, pin)
        self._store.unhold(self._holds.end_pin(pin))

    def hand_off(self, entries: Entries, hold: Hold, now_us: int) -> None:
        """Holds blocks for the request that `hold` names; its end moves to the later one."""
        if not len(entries):
            return
        self._store.hold(entries)
        for entry in entries.tolist():
            self._holds.add_handoff(hold.request_id, entry, now_us + hold.ttl_us)
        self._expiries.set(Expiry.HANDOFF, hold.request_id, self._holds.handoffs[hold.request_id].expires_us)

    def end_handoff(self, request_id: str) -> None:
        self._expiries.cancel(Expiry.HANDOFF, request_id)
        self._store.unhold(self._holds.end_handoff(request_id))

    def end_handoff_of(self, request_id: str, entries: Entries) -> None:
        """Ends a request's hand-off holds on some blocks; blocks that have none are passed over."""
        self._store.unhold(self._holds.end_handoff_of(request_id, entries))
        self._forget_ended(request_id)

    def end_session(self, session: SessionId) -> None:
        leases, pins = self._holds.of_session(session)
        for lease in leases:
            self.end_lease(lease)
        for pin in pins:
            self.end_pin(pin)

    def _forget_ended(self, request_id: str) -> None:
        if request_id and request_id not in self._holds.handoffs:
            self._expiries.cancel(Expiry.HANDOFF, request_id)
