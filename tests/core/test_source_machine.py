"""SourceCore against a naive source: every answer, every piece of news, every victim, after every step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import naive_source as naive
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from naive_source import NaiveSource, Refused

from kvpool.core.changes import ChangeKind
from kvpool.core.errors import KvpoolError, NoSpace
from kvpool.core.holds import Hold
from kvpool.core.ids import KeyArray
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore

PAGE = 4096
KEY_COUNT = 9
KEYS = [bytes([i]) * 16 for i in range(KEY_COUNT)]

indices = st.lists(st.integers(0, KEY_COUNT - 1), max_size=6)
ttls = st.integers(1, 8)
#: Longer than leases mostly, so that leases end them.
holds = st.none() | st.tuples(st.sampled_from("pq"), st.sampled_from([20, 3, 40]))
pick = st.integers(0, 1 << 16)


def packed(keys: list[bytes]) -> KeyArray:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16)


def digest_of(key: bytes, section: int) -> int:
    return key[0] * 100 + section


class SourceMachine(RuleBasedStateMachine):
    """Small enough that every slot, entry and session is fought over."""

    #: (pages, sections) of the groups; key i belongs to group i % len(SIZES).
    SIZES: tuple[tuple[int, int], ...] = ((1, 2),)
    PAGES, SLAB_PAGES, ENTRIES = 6, 2, 5

    @initialize()
    def start(self) -> None:
        self.now = 0
        self.core = SourceCore(
            SourceConfig(
                capacity_bytes=self.PAGES * PAGE, entries_max=self.ENTRIES, slab_bytes=self.SLAB_PAGES * PAGE,
                high_watermark=1.0, low_watermark=1.0,
            )
        )  # fmt: skip
        groups = tuple(
            GroupSpec(i, GroupKind.FULL, tuple(range(sections)), 16, 1, sections, pages * PAGE)
            for i, (pages, sections) in enumerate(self.SIZES)
        )
        self.namespace = self.core.register_namespace(
            NamespaceSpec("m", "", "float32", "t", "lkthd", "sha256/1", groups)
        )
        self.groups = groups
        self.model = NaiveSource(self.PAGES // self.SIZES[0][0], self.ENTRIES)
        self.sessions: list[int] = []
        self.reservations: list[int] = []
        self.leases: list[int] = []
        self.pins: list[int] = []
        self.waits: list[int] = []
        self.open()

    # ---- calls

    def both(self, real: Any, model: Any) -> Any:
        """Runs both; they must agree on the result or on the error."""
        try:
            expected, refused = model(), ""
        except Refused as error:
            expected, refused = None, str(error)
        try:
            result = real()
        except KvpoolError as error:
            assert type(error).__name__ == refused
            return None
        assert not refused, f"expected {refused}"
        assert result == expected
        return result

    @rule()
    @precondition(lambda self: len(self.model.sessions) < 3)
    def open(self) -> None:
        session = int(self.core.open_session("client", self.now))
        self.model.sessions[session] = None
        self.sessions.append(session)

    @rule(pick=pick, writer_gone=st.booleans())
    @precondition(lambda self: self.sessions)
    def close(self, pick: int, writer_gone: bool) -> None:
        session = self.sessions[pick % len(self.sessions)]
        self.core.close_session(session, self.now, writer_gone=writer_gone)
        self.model.close_session(session, writer_gone)

    @rule(pick=pick)
    @precondition(lambda self: self.sessions)
    def writer_gone(self, pick: int) -> None:
        session = self.sessions[pick % len(self.sessions)]
        self.both(lambda: self.core.writer_gone(session, self.now), lambda: self.model.writer_gone(session))

    @rule(
        pick=pick,
        group=st.integers(0, 7),
        indices=indices,
        ttl=ttls,
        hold=holds,
    )
    @precondition(lambda self: self.model.sessions)
    def reserve(self, pick: int, group: int, indices: list[int], ttl: int, hold: tuple[str, int] | None) -> None:
        session = self.some(self.model.sessions, pick)
        group %= len(self.groups)
        keys = [KEYS[i] for i in indices if i % len(self.groups) == group]
        spec, (pages, sections) = self.groups[group], self.SIZES[group]
        predicted = self.model.victims(keys)
        readable_before = any(self.model.readable(k) for k in keys)
        wanted = self.model.statuses(keys).count(naive.RESERVED)
        try:
            reserved = self.core.reserve(
                session, self.namespace, spec, packed(keys), ttl, self.now, hold=Hold(*hold) if hold else None
            )
        except NoSpace:
            reserved = None
        removed = [k for kind, k in self.take_changes() if kind == naive.REMOVED]
        granted = 0 if reserved is None else int((reserved.status == naive.RESERVED).sum())
        assert (reserved is None) == (wanted > 0 and granted == 0 and not readable_before)
        if len(self.SIZES) == 1:
            assert (removed, granted) == ([b.key for b in predicted[0]], predicted[1])
        elif granted == 0:
            assert not removed, "evicted for nothing"
        self.model.evict(removed, keys)
        self.model.changes.clear()
        if granted < wanted:
            kept = [k for k in keys if self.model.readable(k)]
            assert not self.could_fit(kept, pages), "no space, although enough could be evicted"
        number = 0 if reserved is None else int(reserved.reservation)
        statuses = self.model.reserve(
            session, number, keys, granted, pages * PAGE, sections, self.now + ttl, hold, self.now
        )
        if reserved is None:
            return
        assert reserved.status.tolist() == statuses
        assert (number != 0) == (granted > 0)
        mask = reserved.status == naive.RESERVED
        assert (reserved.slots.sizes[mask] == pages * PAGE).all() and (reserved.slots.generations[mask] % 2 == 1).all()
        if number:
            self.reservations.append(number)

    @rule(
        session=pick,
        number=pick,
        items=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=6),
    )
    @precondition(lambda self: self.reservations)
    def commit(self, session: int, number: int, items: list[tuple[int, int, int]]) -> None:
        reservation = self.reservations[-1 - number % min(4, len(self.reservations))]
        known = self.model.reservations.get(reservation)
        # Mostly the owner, a few times anybody.
        owner = known.session if known and session % 8 else self.sessions[session % len(self.sessions)]
        rows = list(known.blocks) if known else [0]
        chosen = []
        for row, section, wrong in items:
            index = rows[row % len(rows)] if wrong != 1 else row
            key = known.blocks[index].key if known and index in known.blocks else KEYS[0]
            section = (
                section % known.blocks[index].sections if known and wrong != 2 and index in known.blocks else section
            )
            chosen.append((index, section, digest_of(key, section) + (wrong == 3)))
        columns = list(zip(*chosen, strict=True))
        self.both(
            lambda: self.core.commit(
                owner, reservation, np.array(columns[0], np.uint32), np.array(columns[1], np.uint32),
                np.array(columns[2], np.uint64), self.now,
            ),
            lambda: self.model.commit(owner, reservation, chosen, self.now),
        )  # fmt: skip

    @rule(pick=pick, group=st.integers(0, 7), indices=indices, hold=holds)
    @precondition(lambda self: self.model.sessions)
    def publish(self, pick: int, group: int, indices: list[int], hold: tuple[str, int] | None) -> None:
        """What a good writer does; without it histories with many readable blocks are rare."""
        before = len(self.reservations)
        self.reserve(pick, group, indices, 5, hold)
        if len(self.reservations) > before:
            self.finish(self.reservations[-1])

    @rule(number=pick)
    @precondition(lambda self: self.reservations)
    def commit_all(self, number: int) -> None:
        self.finish(self.reservations[-1 - number % min(4, len(self.reservations))])

    def finish(self, reservation: int) -> None:
        known = self.model.reservations.get(reservation)
        if known is None:
            return
        chosen = [(i, s, digest_of(b.key, s)) for i, b in known.pending.items() for s in range(b.sections)]
        chosen = [c for c in chosen if known.digests.get(c[:2], c[2]) == c[2]]
        self.both(
            lambda: self.core.commit(
                known.session, reservation, np.array([c[0] for c in chosen], np.uint32),
                np.array([c[1] for c in chosen], np.uint32), np.array([c[2] for c in chosen], np.uint64), self.now,
            ),
            lambda: self.model.commit(known.session, reservation, chosen, self.now),
        )  # fmt: skip

    @rule(session=pick, number=pick)
    @precondition(lambda self: self.reservations)
    def abort(self, session: int, number: int) -> None:
        reservation = self.reservations[-1 - number % min(4, len(self.reservations))]
        known = self.model.reservations.get(reservation)
        owner = known.session if known and session % 8 else self.sessions[session % len(self.sessions)]
        self.both(lambda: self.core.abort(owner, reservation, self.now), lambda: self.model.abort(owner, reservation))

    @rule(pick=pick, indices=indices, ttl=ttls, handoff=st.sampled_from(["p", "", "q"]))
    @precondition(lambda self: self.model.sessions)
    def lease(self, pick: int, indices: list[int], ttl: int, handoff: str) -> None:
        session, keys = self.some(self.model.sessions, pick), [KEYS[i] for i in indices]
        leased = self.core.lease(session, self.namespace, packed(keys), ttl, self.now, handoff=handoff)
        found = self.model.lease(session, int(leased.lease), keys, self.now + ttl, handoff)
        assert leased.found.tolist() == found and bool(leased.lease) == any(found)
        assert (leased.blocks.generations[leased.found] % 2 == 0).all()
        assert not leased.blocks.sizes[~leased.found].any()
        for key, hit, digests in zip(keys, found, leased.blocks.digests.tolist(), strict=True):
            if hit:
                committed = self.digests_of(key)
                assert digests[: len(committed)] == committed
        if leased.lease:
            self.leases.append(int(leased.lease))

    @rule(session=pick, numbers=st.lists(pick, max_size=3))
    @precondition(lambda self: self.leases)
    def release(self, session: int, numbers: list[int]) -> None:
        leases = [self.leases[n % len(self.leases)] for n in numbers]
        known = self.model.leases.get(leases[0]) if leases else None
        owner = known.session if known and session % 8 else self.sessions[session % len(self.sessions)]
        self.both(lambda: self.core.release(owner, leases, self.now), lambda: self.model.release(owner, leases))

    @rule(pick=pick, indices=indices, ttl=st.integers(0, 8))
    @precondition(lambda self: self.model.sessions)
    def pin(self, pick: int, indices: list[int], ttl: int) -> None:
        session, keys = self.some(self.model.sessions, pick), [KEYS[i] for i in indices]
        pinned = self.core.pin(session, self.namespace, packed(keys), ttl, self.now)
        found = self.model.pin(session, int(pinned.pin), keys, self.now + ttl if ttl else None)
        assert pinned.found.tolist() == found and bool(pinned.pin) == any(found)
        if pinned.pin:
            self.pins.append(int(pinned.pin))

    @rule(number=pick)
    @precondition(lambda self: self.pins)
    def unpin(self, number: int) -> None:
        pin = self.pins[number % len(self.pins)]
        known = self.model.pins.get(pin)
        owner = known.session if known else self.sessions[0]
        self.both(lambda: self.core.unpin(owner, pin, self.now), lambda: self.model.unpin(owner, pin))

    @rule(pick=pick, indices=indices, ttl=ttls, absent=st.booleans())
    @precondition(lambda self: self.model.sessions)
    def wait(self, pick: int, indices: list[int], ttl: int, absent: bool) -> None:
        session, keys = self.some(self.model.sessions, pick), [KEYS[i] for i in indices]
        wait = self.core.wait(
            session, self.namespace, packed(keys), self.now + ttl, self.now, absent_is_abandoned=absent
        )
        self.model.wait(session, int(wait), keys, self.now + ttl, absent)
        self.waits.append(int(wait))

    @rule(number=pick)
    @precondition(lambda self: self.waits)
    def cancel_wait(self, number: int) -> None:
        wait = self.waits[number % len(self.waits)]
        self.core.cancel_wait(wait)
        self.model.cancel_wait(wait)

    @rule(indices=indices)
    def remove(self, indices: list[int]) -> None:
        keys = [KEYS[i] for i in indices]
        self.both(lambda: self.core.remove(self.namespace, packed(keys), self.now), lambda: self.model.remove(keys))

    @rule(units=st.integers(1, 4))
    def pass_time(self, units: int) -> None:
        for _ in range(units):
            self.now += 1
            self.core.tick(self.now)
            self.model.tick(self.now)

    # ---- what must hold after each step

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.check_invariants()
        assert sorted(self.take_changes()) == sorted(self.model.changes)
        self.model.changes.clear()
        self.compare_news()
        assert self.core.lookup(self.namespace, packed(KEYS)).tolist() == [self.model.readable(k) for k in KEYS]
        model, counts = self.model, self.core.counts()
        assert counts.bytes_used == model.bytes_used()
        assert counts.blocks == sum(b.readable for b in model.blocks.values())
        assert counts.blocks_writing == sum(not b.readable for b in model.blocks.values())
        assert counts.sessions == len(model.sessions)
        assert counts.leases == len(model.leases)
        assert counts.pins == len(model.pins) + len(model.handoffs)
        assert counts.reservations == sum(not r.expired and bool(r.pending) for r in model.reservations.values())
        assert counts.quarantined == len(model.quarantined())
        assert counts.waiters == len(model.waits)
        assert (counts.hits, counts.misses, counts.evictions) == (model.hits, model.misses, model.evictions)
        self.no_write_right_on_others_bytes()

    def no_write_right_on_others_bytes(self) -> None:
        """Where two may touch the same bytes, neither of them may write (G1, G5)."""
        writable = []
        for number, reservation in self.model.reservations.items():
            if reservation.pending and not reservation.expired:
                slots = self.core.writable_extents(number)
                assert len(slots) == len(reservation.pending)
                writable += [(int(o), int(o) + int(s)) for o, s in zip(slots.offsets, slots.sizes, strict=True)]
        readable = {}
        for number in self.model.leases:
            blocks = self.core.readable_extents(number)
            readable.update({int(o): int(o) + int(s) for o, s in zip(blocks.offsets, blocks.sizes, strict=True)})
        spans = sorted(writable + list(readable.items()))
        for (_, end), (begin, _) in pairwise(spans):
            assert end <= begin

    def teardown(self) -> None:
        """After all clients are gone nothing is held (G5)."""
        if not hasattr(self, "core"):
            return
        for session in list(self.model.sessions):
            self.core.close_session(session, self.now, writer_gone=False)
            self.model.close_session(session, False)
        for session in self.sessions:
            self.core.writer_gone(session, self.now)
            self.model.writer_gone(session)
        self.pass_time(41)
        self.agree()
        counts = self.core.counts()
        assert (counts.sessions, counts.leases, counts.pins, counts.reservations) == (0, 0, 0, 0)
        assert (counts.quarantined, counts.waiters, counts.blocks_writing) == (0, 0, 0)
        self.core.remove_namespace(self.namespace, self.now)
        assert self.core.counts().bytes_used == 0
        assert self.core.next_deadline_us() is None

    # ---- parts

    def could_fit(self, kept: list[bytes], pages: int) -> bool:
        """Whether one more block of this size had a place and an entry if all went that may go."""
        records, _ = self.core.list_blocks(0, 100)
        staying = [r for r in records if r.state != "readable" or r.leases or r.pins or r.key in kept]
        if sum(r.state != "quarantined" for r in staying) >= self.ENTRIES:
            return False
        users: list[list[int]] = [[] for _ in range(self.PAGES // self.SLAB_PAGES)]
        for record in staying:
            first, size = record.offset // PAGE, record.size // PAGE
            for slab in range(first // self.SLAB_PAGES, (first + size - 1) // self.SLAB_PAGES + 1):
                users[slab].append(size)
        if pages <= self.SLAB_PAGES and any(u and u[0] == pages and len(u) < self.SLAB_PAGES // pages for u in users):
            return True
        count = -(-pages // self.SLAB_PAGES)
        return any(not any(users[i : i + count]) for i in range(len(users) - count + 1))

    def some(self, choices: dict[int, None], pick: int) -> int:
        return list(choices)[pick % len(choices)]

    def digests_of(self, key: bytes) -> list[int]:
        """What was committed for a readable block: by these writers the right digests, or `+ 1`."""
        entry = int(self.core.index.lookup(packed([key]))[0])
        count = self.model.blocks[key].sections
        digests = [int(d) for d in self.core.arrays.digests[entry, :count]]
        assert all(digests[s] - digest_of(key, s) in (0, 1) for s in range(count))
        return digests

    def take_changes(self) -> list[tuple[int, bytes]]:
        result = []
        for change in self.core.take_changes():
            assert change.kind in (ChangeKind.STORED, ChangeKind.REMOVED) and change.keys
            result += [(int(change.kind), change.keys[i : i + 16]) for i in range(0, len(change.keys), 16)]
        return result

    def compare_news(self) -> None:
        model, seen = self.model, {}
        for wakeup in self.core.take_wakeups():
            states = [int(s) for s in wakeup.states]
            triples = list(zip(wakeup.indices, states, wakeup.sections, strict=True))
            assert wakeup.done == (wakeup.wait in model.ended)
            seen[wakeup.wait] = sorted(triples)
        assert seen == {w: sorted(news) for w, news in model.news.items() if news or w in model.ended}
        model.news.clear()
        model.ended.clear()


class SizesMachine(SourceMachine):
    """Blocks of several sizes, one of them larger than a slab, on few slabs."""

    SIZES = ((1, 1), (2, 2), (3, 3))
    PAGES, SLAB_PAGES, ENTRIES = 10, 2, 7


#: Shrinking a long history takes minutes: a failure is printed as it was found.
ROUNDS = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("machine", [SourceMachine, SizesMachine])
def test_source_agrees_with_the_naive_one(machine: type[SourceMachine]) -> None:
    case = machine.TestCase
    case.settings = ROUNDS
    case("runTest").runTest()
