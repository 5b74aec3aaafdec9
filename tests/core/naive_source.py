"""A source as one would write it in an afternoon, one block at a time: the oracle that SourceCore is tested against.

Shares no code with it. Least recently used blocks go first. Where several block sizes compete for space, or another
policy decides, it does not say who has to go: it takes the victims from the outside and judges them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

RESERVED, EXISTS, BEING_WRITTEN, NO_SPACE, OVER_QUOTA = 1, 2, 3, 4, 5
COMMITTED, ABANDONED, DEADLINE, SECTION = 1, 2, 3, 4
STORED, REMOVED = 1, 2


class Refused(Exception):
    """Carries the name of the error that the real core must raise."""


@dataclass(eq=False)
class Block:
    key: bytes
    slot_bytes: int
    sections: int
    namespace: str = "blocks"
    tenant: str = ""
    name: bytes = b""
    readable: bool = False
    on_lower: bool = False
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
    session: int  # 0: it belongs to `owner`
    blocks: list[Block]
    expires: int | None
    handoff: str = ""
    owner: str = ""


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
        self.order: list[Block] = []  # readable, least recently used first
        self.reservations: dict[int, Reservation] = {}
        self.pongs: dict[int, list[list[int]]] = {}  # by session: what had expired when each of them was sent
        self.leases: dict[int, Held] = {}
        self.pins: dict[int, Held] = {}
        self.handoffs: dict[str, Handoff] = {}
        self.waits: dict[int, Wait] = {}
        self.news: dict[int, list[tuple[int, int, int]]] = {}
        self.ended: dict[int, None] = {}
        self.changes: list[tuple[int, bytes]] = []
        self.quotas: dict[str, int] = {}  # bytes, of a namespace or a tenant
        self.inherited: list[Block] = []  # slots of a process before, whose writers may still be at work
        self.hits = self.misses = self.evictions = self.expired = self.adopted = 0

    # ---- what is there

    def removed_but_held(self) -> list[Block]:
        holders = [b for h in [*self.leases.values(), *self.pins.values()] for b in h.blocks]
        holders += [b for h in self.handoffs.values() for b in h.blocks]
        return [b for b in dict.fromkeys(holders) if b.gone]

    def quarantined(self) -> list[Block]:
        return self.inherited + [b for r in self.reservations.values() for b in r.quarantined]

    def entries_used(self) -> int:
        return len(self.blocks) + len(self.removed_but_held()) + len(self.quarantined())

    def all_with_slots(self) -> list[Block]:
        return [*self.blocks.values(), *self.removed_but_held(), *self.quarantined()]

    def bytes_used(self, holder: str | None = None) -> int:
        """Of a namespace, of a tenant, or of all."""
        return sum(b.slot_bytes for b in self.all_with_slots() if holder in (None, b.namespace, b.tenant))

    def may_go(self, kept: list[bytes], holder: str | None = None) -> list[Block]:
        return [b for b in self.order if not b.held and b.key not in kept and holder in (None, b.namespace, b.tenant)]

    def admitted(self, keys: list[bytes], slots_bytes: list[int], holders: tuple[str, str]) -> int:
        """How many of the blocks that want a slot, of such sizes in order, the quotas let come."""
        count = len(slots_bytes)
        for holder in holders:
            if holder in self.quotas:
                own = sum(b.slot_bytes for b in self.may_go(keys, holder))
                left = self.quotas[holder] - self.bytes_used(holder) + own
                while count and sum(slots_bytes[:count]) > left:
                    count -= 1
        return count

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
        free = min(self.slots, self.entries) - self.entries_used()
        candidates = self.may_go(keys)
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
        self, session: int, number: int, new: list[Block], outcome: list[int], expires: int,
        hold: tuple[str, int] | None, now: int,
    ) -> list[int]:  # fmt: skip
        """`new` has a block for each key; those that want a slot get it where `outcome` says so, or its refusal.

        Victims are gone already.
        """
        keys = [b.key for b in new]
        statuses, blocks, refused = self.statuses(keys), {}, {}
        for i, key in enumerate(keys):
            if statuses[i] == RESERVED and outcome[i] == RESERVED:
                blocks[i] = new[i]
            elif statuses[i] == RESERVED:
                assert outcome[i] in (NO_SPACE, OVER_QUOTA)
                statuses[i] = refused[key] = outcome[i]
            elif key in refused:
                statuses[i] = refused[key]
        found = list(dict.fromkeys(self.blocks[k] for k, s in zip(keys, statuses, strict=True) if s == EXISTS))
        if hold is not None:
            self._hand_off(found, hold, now)
        self._touch(found)
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
        rows = sorted(dict.fromkeys(i for i, _ in fresh))
        complete = [reservation.blocks[i] for i in rows if i in before and i not in after]
        for block in complete:
            block.readable = True
            self.changes.append((STORED, block.key))
        if reservation.hold is not None:
            self._hand_off(complete, reservation.hold, now)
        self._touch(complete)
        for block in complete:
            self._tell(block.key, COMMITTED)
        return len(complete)

    def abort(self, session: int, number: int) -> int:
        reservation = self._reservation(session, number)
        blocks = list(reservation.pending.values())
        dropped = 0 if reservation.expired else self._drop(reservation)
        # Where somebody reads sections, the slot is his until he is through.
        for block in [*reservation.quarantined, *([] if reservation.expired else blocks)]:
            block.gone = True
        del self.reservations[number]
        return dropped

    def pong(self, session: int) -> int:
        if session not in self.sessions:
            raise Refused("UnknownSession")
        sent = self.pongs.setdefault(session, [])
        sent.append([n for n, r in self.reservations.items() if r.session == session and r.expired])
        return len(sent)

    def written_no_more(self, session: int, seen: int, writing: list[int]) -> list[int]:
        if session not in self.sessions:
            raise Refused("UnknownSession")
        sent = self.pongs.get(session, [])
        if seen > len(sent):
            raise Refused("BadArgument")
        return sorted(n for n in (sent[seen - 1] if seen else []) if n in self.reservations and n not in writing)

    def writer_gone(self, session: int) -> int:
        mine = [n for n, r in self.reservations.items() if r.session == session and r.expired]
        freed = [b for n in mine for b in self.reservations.pop(n).quarantined]
        for block in freed:
            block.gone = True
        return len(freed)

    # ---- reading and holding

    def sections(self, key: bytes, incomplete: bool) -> list[int]:
        """Those that may be read."""
        if self.readable(key):
            return list(range(self.blocks[key].sections))
        return self._sections_done(key) if incomplete and key in self.blocks else []

    def lease(
        self, session: int, number: int, keys: list[bytes], expires: int, handoff: str, incomplete: bool
    ) -> list[bool]:
        found = [bool(self.sections(key, incomplete)) for key in keys]
        self.hits += found.count(True)
        self.misses += found.count(False)
        if any(found):
            blocks = [self.blocks[k] for k, f in zip(keys, found, strict=True) if f]
            for block in blocks:
                block.leases += 1
            self._touch(list(dict.fromkeys(b for b in blocks if b.readable)))
            self.leases[number] = Held(session, blocks, expires, handoff)
        return found

    def end_lease(self, number: int) -> None:
        lease = self.leases.pop(number)
        for block in lease.blocks:
            block.leases -= 1
        self.end_handoff_part(lease.handoff, lease.blocks)

    def end_handoff_part(self, request: str, blocks: list[Block]) -> None:
        handoff = self.handoffs.get(request)
        if handoff is None:
            return
        for block in dict.fromkeys(blocks):
            if block in handoff.blocks:
                handoff.blocks.remove(block)
                block.pins -= 1
        if not handoff.blocks:
            del self.handoffs[request]

    def touch(self, keys: list[bytes]) -> int:
        """Read by somebody who told nobody; keys in the order of their entries."""
        blocks = [self.blocks[k] for k in keys if self.readable(k)]
        self._touch(blocks)
        return len(blocks)

    def release(self, session: int, numbers: list[int]) -> None:
        unknown = False
        for number in numbers:
            if number in self.leases and self.leases[number].session == session:
                self.end_lease(number)
            else:
                unknown = True
        if unknown:
            raise Refused("UnknownLease")

    def pin(self, session: int, number: int, keys: list[bytes], expires: int | None, owner: str) -> list[bool]:
        found = [self.readable(key) for key in keys]
        if any(found):
            blocks = [self.blocks[k] for k, f in zip(keys, found, strict=True) if f]
            for block in blocks:
                block.pins += 1
            self.pins[number] = Held(0 if owner else session, blocks, expires, owner=owner)
        return found

    def end_pin(self, number: int) -> None:
        blocks = self.pins.pop(number).blocks
        for block in blocks:
            block.pins -= 1

    def unpin(self, session: int, number: int, owner: str) -> int:
        if not number:
            mine = [n for n, h in self.pins.items() if not h.session and h.owner == owner]
            for pin in mine:
                self.end_pin(pin)
            return len(mine)
        held = self.pins.get(number)
        if held is None or (held.session, held.owner) != (0 if owner else session, owner):
            raise Refused("UnknownLease")
        self.end_pin(number)
        return 1

    def remove(self, keys: list[bytes]) -> int:
        chosen = [self.blocks[k] for k in dict.fromkeys(keys) if self.readable(k)]
        for block in chosen:
            self._remove(block)
        return len(chosen)

    def remove_named(self, prefix: bytes) -> int:
        return self.remove([b.key for b in self.blocks.values() if b.name and b.name.startswith(prefix)])

    # ---- another process

    def adopt(self, order: list[Block]) -> None:
        """All clients, and what they held, are gone; late writers may still be at work. `order`: of entries."""
        self.inherited = [*self.quarantined(), *(b for b in self.blocks.values() if not b.readable)]
        self.blocks = {key: b for key, b in self.blocks.items() if b.readable}
        for block in self.blocks.values():
            block.leases = block.pins = 0
            block.on_lower = False
        for group in (
            self.sessions,
            self.pongs,
            self.reservations,
            self.leases,
            self.pins,
            self.handoffs,
            self.waits,
            self.news,
        ):
            group.clear()  # type: ignore[attr-defined]
        self.ended.clear()
        self.changes.clear()
        self.order = []
        self._touch([b for b in order if b.readable])
        self.hits = self.misses = self.evictions = self.expired = 0
        self.adopted = len(self.blocks)

    def release_inherited(self) -> int:
        count, self.inherited = len(self.inherited), []
        return count

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
            self.expired += 1
        for number in sorted(n for n, h in self.pins.items() if h.expires is not None and h.expires <= now):
            self.end_pin(number)
            self.expired += 1
        for request in sorted(r for r, h in self.handoffs.items() if h.expires <= now):
            blocks = self.handoffs.pop(request).blocks
            self.expired += 1
            for block in blocks:
                block.pins -= 1
        for number in sorted(n for n, r in self.reservations.items() if r.expires <= now and not r.expired):
            reservation = self.reservations[number]
            slots = list(reservation.pending.values())
            self.expired += bool(slots)
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

    def _touch(self, blocks: list[Block]) -> None:
        """Just used, tail first."""
        self._untouch(blocks)
        self.order += reversed(blocks)

    def _untouch(self, blocks: list[Block]) -> None:
        self.order = [b for b in self.order if b not in blocks]

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
