"""The reading half of a source's core: leases, pins, look-ups and waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors, EntryState
from kvpool.core.bounds import PIN_TTL_US_MAX, TTL_US_MAX
from kvpool.core.errors import BadArgument, UnknownLease
from kvpool.core.expiry import Expiry
from kvpool.core.ids import Fidelity, KeyArray, LeaseId, PinId, SessionId, WaitId
from kvpool.core.index import NO_ENTRY, split_keys
from kvpool.core.namespace import SECTIONS_MAX
from kvpool.core.results import Leased, Pinned, PinRecord
from kvpool.core.source_base import SourceBase
from kvpool.core.waits import WaitState, Wakeup


class SourceReading(SourceBase):
    """What readers call."""

    def lease(
        self,
        session: SessionId,
        namespace_id: bytes,
        keys: KeyArray,
        ttl_us: int,
        now_us: int,
        *,
        handoff: str = "",
        names: Sequence[bytes] | None = None,
        fidelity_min: Fidelity = Fidelity.EXACT,
        counted: bool = True,
        incomplete: bool = False,
    ) -> Leased:
        """A read right on each block that is readable; a miss is a result. Counts as use.

        Args:
            handoff: request whose hand-off holds on these blocks end with the lease.
            names: one a key: objects with another whole name are misses.
            fidelity_min: EXACT: lossy copies are misses.
            counted: False for the source's own work: in no statistics, and no use.
            incomplete: also blocks that are being written of which sections are committed; those may be read. Should
                the block be given up, its slot stays until the lease ends.
        Raises: BadArgument, UnknownSession, UnknownNamespace, Overloaded.
        """
        number = self._check_call(session, namespace_id, keys, ttl_us)
        self._bounds.room_for_hold(self.holds, len(keys))
        look = self.store.readable_in_part if incomplete else self.store.readable
        entries, found = look(number, keys, _names(names, keys), fidelity_min)
        if counted:
            self.hits += int(found.sum())
            self.misses += int((~found).sum())
            complete = self.arrays.states[entries[found]] == EntryState.READABLE
            self.store.touch(entries[found][complete])
        lease = LeaseId(0)
        if found.any():
            lease = self._held.lease(session, entries[found], now_us + ttl_us, handoff)
        fidelity, sections = np.zeros(len(keys), dtype=np.uint8), np.zeros(len(keys), dtype=np.uint8)
        fidelity[found] = self.arrays.fidelities[entries[found]]
        sections[found] = self.store.sections_committed(entries[found])
        return Leased(lease, found, self.store.describe(keys, entries, found, SECTIONS_MAX), fidelity, sections)

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

    def end_handoff_for(self, namespace_id: bytes, keys: KeyArray, request_id: str, now_us: int) -> None:
        """Ends a request's hand-off holds on blocks, for readers that took no lease. Raises: as `lookup`."""
        entries, found = self.store.readable(self._look_up(keys, namespace_id), keys)
        self._held.end_handoff_of(request_id, np.unique(entries[found]))

    def readable_extents(self, lease: int) -> Descriptors:
        """Blocks that a lease holds; of one that is being written its committed sections. Raises: UnknownLease."""
        found = self.holds.leases.get(LeaseId(lease))
        if found is None:
            raise UnknownLease(f"no lease {lease}")
        return self.index.describe(found.entries)

    def pin(
        self, session: SessionId, namespace_id: bytes, keys: KeyArray, ttl_us: int, now_us: int, *, owner: str = ""
    ) -> Pinned:
        """Holds blocks against eviction; ttl 0 = until released. No use, unlike a lease.

        Args: owner: empty: the pin ends with its session; else it belongs to whoever this names, for at most 7 days
            or until that owner releases it, and does not.
        Raises: as `lease`.
        """
        number = self._check_call(session, namespace_id, keys, 1)
        if ttl_us:
            self._bounds.ttl(ttl_us, PIN_TTL_US_MAX if owner else TTL_US_MAX)
        self._bounds.room_for_hold(self.holds, len(keys))
        if owner:
            self._bounds.room_for_detached_pin(self.holds)
        entries, found = self.store.readable(number, keys)
        pin = PinId(0)
        if found.any():
            expires_us = now_us + ttl_us if ttl_us else 0
            pin = self._held.pin(SessionId(0) if owner else session, entries[found], expires_us, owner)
        return Pinned(pin, found)

    def unpin(self, session: SessionId, pin: int, now_us: int, *, owner: str = "") -> int:
        """Releases a pin of a session, or of an owner, or with 0 all pins of an owner. Returns how many.

        Raises: UnknownLease for a pin that is not there, or not theirs; BadArgument for neither pin nor owner.
        """
        if not pin:
            if not owner:
                raise BadArgument("a pin or an owner must be named")
            pins = self.holds.pins_of_owner(owner)
            for number in pins:
                self._held.end_pin(number)
            return len(pins)
        found = self.holds.pins.get(PinId(pin))
        if found is None or found.session != (SessionId(0) if owner else session) or found.owner != owner:
            raise UnknownLease(f"no pin {pin}", hint="it has expired, or is somebody else's")
        self._held.end_pin(PinId(pin))
        return 1

    def pins(self) -> list[PinRecord]:
        """All that is held, with who holds it and until when."""
        records = [
            PinRecord(lease, "", held.session, *self._extent(held.entries), held.expires_us, "lease")
            for lease, held in self.holds.leases.items()
        ]
        for pin, found in self.holds.pins.items():
            until = found.expires_us or None
            kind = "soft" if until else "hard"
            records.append(PinRecord(pin, found.owner, found.session, *self._extent(found.entries), until, kind))
        for request_id, handoff in self.holds.handoffs.items():
            extent = self._extent(np.fromiter(handoff.entries, dtype=np.int32))
            records.append(PinRecord(0, request_id, 0, *extent, handoff.expires_us, "hand-off"))
        return records

    def lookup(self, namespace_id: bytes, keys: KeyArray, *, names: Sequence[bytes] | None = None) -> NDArray[np.bool_]:
        """Which keys are readable, in whatever fidelity. Changes nothing, holds nothing.

        Raises: UnknownNamespace, BadArgument.
        """
        return self.store.readable(self._look_up(keys, namespace_id), keys, _names(names, keys))[1]

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
        number = self._check_call(session, namespace_id, keys, deadline_us - now_us)
        self._bounds.waits(len(self.waits), self.waits.awaited_keys + len(keys))
        wait = self.waits.add(session)
        entries = self.index.lookup(keys)
        for i, (entry, key) in enumerate(zip(entries.tolist(), split_keys(keys), strict=True)):
            foreign = entry != NO_ENTRY and int(self.arrays.namespaces[entry]) != number
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

    # ---------------------------------------------------------------- parts

    def _look_up(self, keys: KeyArray, namespace_id: bytes) -> int:
        self._bounds.keys(keys)
        return self.namespaces_known.number(namespace_id)

    def _extent(self, entries: NDArray[np.int32]) -> tuple[int, int]:
        """Blocks, each counted once, and their bytes."""
        entries = np.unique(entries)
        return len(entries), int(self.arrays.sizes[entries].sum())


def _names(names: Sequence[bytes] | None, keys: KeyArray) -> list[bytes] | None:
    """Raises: BadArgument unless there is one a key."""
    if names is not None and len(names) != len(keys):
        raise BadArgument(f"{len(names)} names do not name {len(keys)} objects")
    return None if names is None else list(names)
