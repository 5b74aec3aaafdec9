"""A source as one would write it in an afternoon, one block at a time: the oracle that SourceCore is tested against.

Shares no code with it. Where several block sizes compete for slabs it does not say who has to go: it takes the victims
from the outside and judges them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

RESERVED, EXISTS, BEING_WRITTEN, NO_SPACE = 1, 2, 3, 4
COMMITTED, ABANDONED, DEADLINE, SECTION = 1, 2, 3, 4
STORED, REMOVED = 1, 2


class Refused(Exception):
    """Carries the name of the error that the real core must raise."""


@dataclass(eq=False)
class Block:
    key: bytes
    slot_bytes: int
    sections: int
    readable: bool = False
    gone: bool = False  # removed while somebody held it
    leases: int = 0
    pins: int = 0

    @property
    def held(self) -> bool:
        return self.leases + self.pins > 0


@dataclass(eq=False)
class Reservation:
    session: int
    blocks: dict[int, Block]  # by index into the call's keys
    expires: int
    hold: tuple[str, int] | None
    digests: dict[tuple[int, int], int] = field(default_factory=dict)  # (index, section)
    expired: bool = False
    quarantined: list[Block] = field(default_factory=list)

    @property
    def pending(self) -> dict[int, Block]:
        return {i: b for i, b in self.blocks.items() if any((i, s) not in self.digests for s in range(b.sections))}


@dataclass(eq=False)
class Held:
    session: int
    blocks: list[Block]
    expires: int | None
    handoff: str = ""


@dataclass(eq=False)
class Handoff:
    blocks: list[Block]
    expires: int


@dataclass(eq=False)
class Wait:
    session: int
    deadline: int
    pending: dict[int, bytes]


class NaiveSource:
    def __init__(self, slots: int, entries: int) -> None:
        self.slots, self.entries = slots, entries  # `slots` counts only where all blocks have one size
        self.sessions: dict[int, None] = {}
        self.blocks: dict[bytes, Block] = {}
        self.order: list[Block] = []  # readable and held by nobody, oldest first
        self.reservations: dict[int, Reservation] = {}
        self.leases: dict[int, Held] = {}
        self.pins: dict[int, Held] = {}
        self.handoffs: dict[str, Handoff] = {}
        self.waits: dict[int, Wait] = {}
        self.news: dict[int, list[tuple[int, int, int]]] = {}
        self.ended: dict[int, None] = {}
        self.changes: list[tuple[int, bytes]] = []
        self.hits = self.misses = self.evictions = 0

    # ---- what is there

    def removed_but_held(self) -> list[Block]:
        holders = [b for h in [*self.leases.values(), *self.pins.values()] for b in h.blocks]
        holders += [b for h in self.handoffs.values() for b in h.blocks]
        return [b for b in dict.fromkeys(holders) if b.gone]

    def quarantined(self) -> list[Block]:
        return [b for r in self.reservations.values() for b in r.quarantined]

    def entries_used(self) -> int:
        return len(self.blocks) + len(self.removed_but_held())

    def bytes_used(self) -> int:
        return sum(b.slot_bytes for b in [*self.blocks.values(), *self.removed_but_held(), *self.quarantined()])

    def readable(self, key: bytes) -> bool:
        return key in self.blocks and self.blocks[key].readable

    # ---- writing

    def statuses(self, keys: list[bytes]) -> list[int]:
        """Status of each key, with RESERVED for each that wants a slot, and for its repetitions BEING_WRITTEN."""
        result, wanted = [], {}
        for key in keys:
            if self.readable(key):
                result.append(EXISTS)
            elif key in self.blocks or key in wanted:
                result.append(BEING_WRITTEN)
            else:
                wanted[key] = None
                result.append(RESERVED)
        return result

    def victims(self, keys: list[bytes]) -> tuple[list[Block], int]:
        """With one block size: who must go for a reserve, and how many keys then get a slot."""
        wanted = self.statuses(keys).count(RESERVED)
        free = min(self.slots - len(self.quarantined()) - self.entries_used(), self.entries - self.entries_used())
        candidates = [b for b in self.order if b.key not in keys]
        victims = candidates[: max(0, wanted - free)]
        return victims, min(wanted, free + len(victims))

    def evict(self, keys: list[bytes], kept: list[bytes]) -> None:
        for key in keys:
            block = self.blocks.get(key)
            assert block is not None and block.readable and not block.held, "a victim that nobody could name"
            assert key not in kept, "evicted what the same call found"
            self.evictions += 1
            self._remove(block)

    def reserve(
        self, session: int, number: int, keys: list[bytes], granted: int, slot_bytes: int, sections: int,
        expires: int, hold: tuple[str, int] | None, now: int,
    ) -> list[int]:  # fmt: skip
        """The first `granted` keys that want a slot get one. Victims are gone already."""
        statuses, blocks, refused = self.statuses(keys), {}, {}
        for i, key in enumerate(keys):
            if statuses[i] == RESERVED and len(blocks) < granted:
                blocks[i] = Block(key, slot_bytes, sections)
            elif statuses[i] == RESERVED:
                statuses[i] = NO_SPACE
                refused[key] = None
            elif key in refused:
                statuses[i] = NO_SPACE
        found = list(dict.fromkeys(self.blocks[k] for k, s in zip(keys, statuses, strict=True) if s == EXISTS))
        if hold is not None:
            self._hand_off(found, hold, now)
        self._touch([b for b in found if not b.held])
        if blocks:
            self.reservations[number] = Reservation(session, blocks, expires, hold)
            self.blocks.update({b.key: b for b in blocks.values()})
        return statuses

    def commit(self, session: int, number: int, items: list[tuple[int, int, int]], now: int) -> int:
        reservation = self._reservation(session, number)
        if reservation.expired:
            raise Refused("ReservationExpired")
        for index, section, _ in items:
            if index not in reservation.blocks or section >= reservation.blocks[index].sections:
                raise Refused("BadArgument")
        fresh: dict[tuple[int, int], int] = {}
        for index, section, digest in items:
            if reservation.digests.get((index, section), fresh.get((index, section), digest)) != digest:
                raise Refused("AlreadyCommitted")
            if (index, section) not in reservation.digests:
                fresh[(index, section)] = digest
        before = reservation.pending
        reservation.digests.update(fresh)
        for index, section in fresh:
            self._tell(reservation.blocks[index].key, SECTION, section)
        after = reservation.pending
        complete = [reservation.blocks[i] for i in dict.fromkeys(i for i, _ in fresh) if i in before and i not in after]
        for block in complete:
            block.readable = True
            self.changes.append((STORED, block.key))
        if reservation.hold is not None:
            self._hand_off(complete, reservation.hold, now)
        self._touch([b for b in complete if not b.held])
        for block in complete:
            self._tell(block.key, COMMITTED)
        return len(complete)

    def abort(self, session: int, number: int) -> int:
        reservation = self._reservation(session, number)
        dropped = 0 if reservation.expired else self._drop(reservation)
        del self.reservations[number]
        return dropped

    def writer_gone(self, session: int) -> int:
        mine = [n for n, r in self.reservations.items() if r.session == session and r.expired]
        return sum(len(self.reservations.pop(n).quarantined) for n in mine)

    # ---- reading and holding

    def lease(self, session: int, number: int, keys: list[bytes], expires: int, handoff: str) -> list[bool]:
        found = [self.readable(key) for key in keys]
        self.hits += found.count(True)
        self.misses += found.count(False)
        if any(found):
            blocks = [self.blocks[k] for k, f in zip(keys, found, strict=True) if f]
            for block in blocks:
                block.leases += 1
            self._untouch(blocks)
            self.leases[number] = Held(session, blocks, expires, handoff)
        return found

    def end_lease(self, number: int) -> None:
        lease = self.leases.pop(number)
        for block in lease.blocks:
            block.leases -= 1
        handoff = self.handoffs.get(lease.handoff)
        if handoff is not None:
            for block in dict.fromkeys(lease.blocks):
                if block in handoff.blocks:
                    handoff.blocks.remove(block)
                    block.pins -= 1
            if not handoff.blocks:
                del self.handoffs[lease.handoff]
        self._let_go(lease.blocks)

    def release(self, session: int, numbers: list[int]) -> None:
        unknown = False
        for number in numbers:
            if number in self.leases and self.leases[number].session == session:
                self.end_lease(number)
            else:
                unknown = True
        if unknown:
            raise Refused("UnknownLease")

    def pin(self, session: int, number: int, keys: list[bytes], expires: int | None) -> list[bool]:
        found = [self.readable(key) for key in keys]
        if any(found):
            blocks = [self.blocks[k] for k, f in zip(keys, found, strict=True) if f]
            for block in blocks:
                block.pins += 1
            self._untouch(blocks)
            self.pins[number] = Held(session, blocks, expires)
        return found

    def end_pin(self, number: int) -> None:
        blocks = self.pins.pop(number).blocks
        for block in blocks:
            block.pins -= 1
        self._let_go(blocks)

    def unpin(self, session: int, number: int) -> None:
        if number not in self.pins or self.pins[number].session != session:
            raise Refused("UnknownLease")
        self.end_pin(number)

    def remove(self, keys: list[bytes]) -> int:
        chosen = [self.blocks[k] for k in dict.fromkeys(keys) if self.readable(k)]
        for block in chosen:
            self._remove(block)
        return len(chosen)

    # ---- waiting

    def wait(self, session: int, number: int, keys: list[bytes], deadline: int, absent_is_abandoned: bool) -> None:
        wait = Wait(session, deadline, {})
        self.waits[number] = wait
        self.news[number] = []
        for i, key in enumerate(keys):
            if self.readable(key):
                self.news[number].append((i, COMMITTED, 0))
            elif key not in self.blocks and absent_is_abandoned:
                self.news[number].append((i, ABANDONED, 0))
            else:
                wait.pending[i] = key
                if key in self.blocks:
                    self.news[number] += [(i, SECTION, s) for s in self._sections_done(key)]
        self._end_if_complete(number)

    def cancel_wait(self, number: int) -> None:
        self.waits.pop(number, None)
        self.news.pop(number, None)
        self.ended.pop(number, None)

    # ---- sessions and time

    def close_session(self, session: int, writer_gone: bool) -> None:
        if session not in self.sessions:
            return
        del self.sessions[session]
        for number in [n for n, h in self.leases.items() if h.session == session]:
            self.end_lease(number)
        for number in [n for n, h in self.pins.items() if h.session == session]:
            self.end_pin(number)
        for number in [n for n, w in self.waits.items() if w.session == session]:
            self.cancel_wait(number)
        for number in [n for n, r in self.reservations.items() if r.session == session and not r.expired]:
            reservation = self.reservations[number]
            slots = list(reservation.pending.values())
            self._drop(reservation)
            reservation.expired, reservation.quarantined = True, slots
        if writer_gone:
            self.writer_gone(session)
        self._forget_empty()

    def tick(self, now: int) -> None:
        """Called at each unit of time, so that what is due is due now."""
        for number in sorted(n for n, h in self.leases.items() if h.expires is not None and h.expires <= now):
            self.end_lease(number)
        for number in sorted(n for n, h in self.pins.items() if h.expires is not None and h.expires <= now):
            self.end_pin(number)
        for request in sorted(r for r, h in self.handoffs.items() if h.expires <= now):
            blocks = self.handoffs.pop(request).blocks
            for block in blocks:
                block.pins -= 1
            self._let_go(blocks)
        for number in sorted(n for n, r in self.reservations.items() if r.expires <= now and not r.expired):
            reservation = self.reservations[number]
            slots = list(reservation.pending.values())
            self._drop(reservation)
            reservation.expired, reservation.quarantined = True, slots
        self._forget_empty()
        for number in sorted(n for n, w in self.waits.items() if w.deadline <= now):
            wait = self.waits[number]
            for index in list(wait.pending):
                self.news.setdefault(number, []).append((index, DEADLINE, 0))
            wait.pending.clear()
            self._end_if_complete(number)

    # ---- parts

    def _forget_empty(self) -> None:
        """A reservation whose time is over and of which nothing is in quarantine was complete: it is forgotten."""
        for number in [n for n, r in self.reservations.items() if r.expired and not r.quarantined]:
            del self.reservations[number]

    def _reservation(self, session: int, number: int) -> Reservation:
        if number not in self.reservations or self.reservations[number].session != session:
            raise Refused("UnknownReservation")
        return self.reservations[number]

    def _drop(self, reservation: Reservation) -> int:
        blocks = list(reservation.pending.values())
        for block in blocks:
            del self.blocks[block.key]
        for block in blocks:
            self._tell(block.key, ABANDONED)
        return len(blocks)

    def _remove(self, block: Block) -> None:
        self.changes.append((REMOVED, block.key))
        self._untouch([block])
        del self.blocks[block.key]
        block.gone = True

    def _hand_off(self, blocks: list[Block], hold: tuple[str, int], now: int) -> None:
        request, ttl = hold
        if not blocks:
            return
        handoff = self.handoffs.setdefault(request, Handoff([], now + ttl))
        handoff.expires = max(handoff.expires, now + ttl)
        for block in blocks:
            if block not in handoff.blocks:
                handoff.blocks.append(block)
                block.pins += 1
        self._untouch(blocks)

    def _touch(self, blocks: list[Block]) -> None:
        """Just used, tail first."""
        self._untouch(blocks)
        self.order += reversed(blocks)

    def _untouch(self, blocks: list[Block]) -> None:
        self.order = [b for b in self.order if b not in blocks]

    def _let_go(self, blocks: list[Block]) -> None:
        self._touch([b for b in dict.fromkeys(blocks) if not b.held and not b.gone])

    def _sections_done(self, key: bytes) -> list[int]:
        for r in self.reservations.values():
            for index, block in r.blocks.items():
                if block is self.blocks[key]:
                    return sorted(s for i, s in r.digests if i == index)
        raise AssertionError("a block that nobody writes")

    def _tell(self, key: bytes, state: int, section: int = 0) -> None:
        for number in list(self.waits):
            wait = self.waits[number]
            for index in [i for i, k in wait.pending.items() if k == key]:
                self.news.setdefault(number, []).append((index, state, section))
                if state != SECTION:
                    del wait.pending[index]
            self._end_if_complete(number)

    def _end_if_complete(self, number: int) -> None:
        if number in self.waits and not self.waits[number].pending:
            del self.waits[number]
            self.ended[number] = None
            self.news.setdefault(number, [])
