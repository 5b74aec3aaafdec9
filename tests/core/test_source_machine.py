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

from kvpool.core.arrays import EntryState, SourceArrays
from kvpool.core.catalog import Catalog
from kvpool.core.changes import ChangeKind
from kvpool.core.errors import KvpoolError, NoSpace, QuotaExceeded
from kvpool.core.hashing import object_key
from kvpool.core.holds import Hold
from kvpool.core.ids import KeyArray
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore

PAGE = 4096
KEY_COUNT = 9
BLOCK_KEYS = [bytes([i]) * 16 for i in range(KEY_COUNT)]
OBJECTS = NamespaceSpec.objects("things")
NAMES = [b"a", b"ab", b"b" * 90, b"c"]
OBJECT_KEYS = [object_key(OBJECTS.id(), name) for name in NAMES]
KEYS = BLOCK_KEYS + OBJECT_KEYS
SECTIONS_MAX = 8

indices = st.lists(st.integers(0, len(KEYS) - 1), max_size=6)
ttls = st.integers(1, 8)
#: Longer than leases mostly, so that leases end them.
holds = st.none() | st.tuples(st.sampled_from("pq"), st.sampled_from([20, 3, 40]))
pick = st.integers(0, 1 << 16)


def packed(keys: list[bytes]) -> KeyArray:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16)


def digest_of(key: bytes, section: int) -> int:
    return key[0] * 100 + section


def outcome_count(outcome: list[int], rows: list[int], status: int) -> int:
    return [outcome[i] for i in rows].count(status)


class SourceMachine(RuleBasedStateMachine):
    """Small enough that every slot, entry and session is fought over."""

    #: (pages, sections) of the groups; key i belongs to group i % len(SIZES).
    SIZES: tuple[tuple[int, int], ...] = ((1, 2),)
    PAGES, ENTRIES, EVICTION = 6, 5, "lru"
    #: Bytes of the objects NAMES: each has a slot of a page, its name included.
    OBJECT_BYTES: tuple[int, ...] = (4000, 4094, 3990, 4095)
    #: Whether all slots have one size and the policy is the oracle's, so that each victim is known beforehand.
    PREDICTED = True

    @initialize()
    def start(self) -> None:
        self.now = 0
        self.config = SourceConfig(
            capacity_bytes=self.PAGES * PAGE, entries_max=self.ENTRIES, eviction=self.EVICTION, unit_bytes=PAGE,
            high_watermark=1.0, low_watermark=1.0,
        )  # fmt: skip
        self.data = np.zeros(self.config.capacity_bytes, dtype=np.uint8)
        buffer = np.zeros(SourceArrays.bytes_needed(self.ENTRIES, SECTIONS_MAX), dtype=np.uint8)
        self.arrays = SourceArrays.over(buffer, self.ENTRIES, SECTIONS_MAX, fresh=True)
        self.core = SourceCore(self.config, self.arrays, self.data)
        groups = tuple(
            GroupSpec(i, GroupKind.FULL, tuple(range(sections)), 16, 1, sections, pages * PAGE)
            for i, (pages, sections) in enumerate(self.SIZES)
        )
        self.namespace = self.core.register_namespace(
            NamespaceSpec("m", "", "float32", "t", "lkthd", "sha256/1", groups)
        )
        self.objects = self.core.register_namespace(OBJECTS)
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
        tenant=st.sampled_from(["", "t"]),
    )
    @precondition(lambda self: self.model.sessions)
    def reserve(
        self, pick: int, group: int, indices: list[int], ttl: int, hold: tuple[str, int] | None, tenant: str
    ) -> None:
        session = self.some(self.model.sessions, pick)
        new = self.wanted(group, indices, tenant)
        keys = [block.key for block in new]
        rows = [i for i, status in enumerate(self.model.statuses(keys)) if status == naive.RESERVED]
        readable_before = any(self.model.readable(k) for k in keys)
        namespace = "objects" if group % 4 == 3 else "blocks"
        slots_bytes = [new[i].slot_bytes for i in rows]
        admitted = self.model.admitted(keys, slots_bytes, (namespace, tenant))
        predicted = self.model.victims([keys[i] for i in rows[:admitted]] + [k for k in keys if self.model.readable(k)])
        quotas = bool({namespace, tenant} & self.model.quotas.keys())
        try:
            reserved = self.call_reserve(session, group, new, ttl, hold, tenant)
            outcome = reserved.status.tolist()
        except NoSpace as error:
            reserved = None
            refusal = naive.OVER_QUOTA if isinstance(error, QuotaExceeded) else naive.NO_SPACE
            # Some may have been over the quota, if the error says that there was no space.
            outcome = [refusal] * len(keys)
        removed = [k for kind, k in self.take_changes() if kind == naive.REMOVED]
        granted = outcome.count(naive.RESERVED)
        assert (reserved is None) == (bool(rows) and granted == 0 and not readable_before)
        if self.PREDICTED and not quotas:
            assert (removed, granted) == ([b.key for b in predicted[0]], predicted[1])
        elif granted == 0 and not quotas:
            assert not removed, "evicted for nothing"
        for key in removed if quotas else []:
            assert self.model.readable(key)
        self.model.evict(removed, keys)
        self.model.changes.clear()
        if reserved is not None or refusal == naive.OVER_QUOTA:
            assert outcome_count(outcome, rows, naive.OVER_QUOTA) == len(rows) - admitted
        kept = [k for k in keys if self.model.readable(k)]
        for i in rows:
            if outcome[i] == naive.NO_SPACE and reserved is not None:
                assert not self.could_fit(kept, -(-new[i].slot_bytes // PAGE)), "no space, although there could be"
        number = 0 if reserved is None else int(reserved.reservation)
        statuses = self.model.reserve(session, number, new, outcome, self.now + ttl, hold, self.now)
        if reserved is None:
            return
        assert outcome == statuses
        assert (number != 0) == (granted > 0)
        for i, block in enumerate(new):
            if outcome[i] == naive.RESERVED:
                assert int(reserved.slots.sizes[i]) == self.size_of(block)
                assert int(reserved.slots.generations[i]) % 2 == 1
        if number:
            self.reservations.append(number)

    def wanted(self, group: int, indices: list[int], tenant: str) -> list[naive.Block]:
        """What a reserve call asks for: blocks of one group, or objects."""
        if group % 4 == 3:
            chosen = [i % len(NAMES) for i in indices]
            return [
                naive.Block(OBJECT_KEYS[i], self.slot_bytes(self.OBJECT_BYTES[i] + len(NAMES[i])), 1, "objects", tenant,
                            NAMES[i])
                for i in chosen
            ]  # fmt: skip
        group %= len(self.groups)
        pages, sections = self.SIZES[group]
        numbers = [i for i in indices if i < KEY_COUNT and i % len(self.groups) == group]
        return [naive.Block(BLOCK_KEYS[i], pages * PAGE, sections, "blocks", tenant) for i in numbers]

    def call_reserve(
        self, session: int, group: int, new: list[naive.Block], ttl: int, hold: tuple[str, int] | None, tenant: str
    ) -> Any:
        held, keys = Hold(*hold) if hold else None, packed([block.key for block in new])
        if group % 4 == 3:
            return self.core.reserve(
                session, self.objects, None, keys, ttl, self.now, hold=held, tenant=tenant,
                sizes=np.array([self.size_of(block) for block in new], np.uint64), names=[block.name for block in new],
            )  # fmt: skip
        spec = self.groups[group % len(self.groups)]
        return self.core.reserve(session, self.namespace, spec, keys, ttl, self.now, hold=held, tenant=tenant)

    def slot_bytes(self, size: int) -> int:
        return int(self.core.store.slots.slot_bytes(size))

    def size_of(self, block: naive.Block) -> int:
        return self.OBJECT_BYTES[NAMES.index(block.name)] if block.name else block.slot_bytes

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
        self.commit_sections(owner, reservation, chosen)

    def commit_sections(self, owner: int, reservation: int, chosen: list[tuple[int, int, int]]) -> None:
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
        self.reserve(pick, group, indices, 5, hold, "t" if pick % 3 == 0 else "")
        if len(self.reservations) > before:
            self.finish(self.reservations[-1])

    @rule(pick=pick, indices=indices, ttl=ttls, give_up=st.booleans())
    @precondition(lambda self: self.model.sessions)
    def read_while_it_is_written(self, pick: int, indices: list[int], ttl: int, give_up: bool) -> None:
        """A writer commits the first sections, a reader leases them at once; the writer may give up then."""
        before, group = len(self.reservations), pick % len(self.groups)
        self.reserve(pick, group, indices, ttl, None, "")
        if len(self.reservations) == before:
            return
        known = self.model.reservations[self.reservations[-1]]
        keys = [block.key for block in known.blocks.values()]
        chosen = [(i, 0, digest_of(block.key, 0)) for i, block in known.blocks.items()]
        self.commit_sections(known.session, self.reservations[-1], chosen)
        self.lease_keys(self.some(self.model.sessions, pick), self.namespace, keys, 2 * ttl, "", True)
        if give_up:
            self.abort(1, 0)

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

    @rule(pick=pick)
    @precondition(lambda self: self.sessions)
    def pong(self, pick: int) -> None:
        session = self.sessions[pick % len(self.sessions)]
        self.both(lambda: self.core.next_pong(session), lambda: self.model.pong(session))

    @rule(pick=pick, missed=st.integers(-1, 2), writing=st.lists(pick, max_size=2))
    @precondition(lambda self: self.sessions)
    def ping(self, pick: int, missed: int, writing: list[int]) -> None:
        """A client says what it writes; it has seen all pongs but the last few, or one that was never sent."""
        session = self.sessions[pick % len(self.sessions)]
        seen = max(0, len(self.model.pongs.get(session, [])) - missed)
        named = [self.reservations[n % len(self.reservations)] for n in writing if self.reservations]
        over = self.both(
            lambda: sorted(self.core.written_no_more(session, seen, named)),
            lambda: self.model.written_no_more(session, seen, named),
        )
        for reservation in over or []:
            self.core.abort(session, reservation, self.now)
            self.model.abort(session, reservation)

    def in_one_namespace(self, pick: int, indices: list[int]) -> tuple[bytes, list[bytes]]:
        objects = pick % 3 == 0
        keys = [KEYS[i] for i in indices if (i >= KEY_COUNT) == objects]
        return self.objects if objects else self.namespace, keys

    @rule(pick=pick, indices=indices, ttl=ttls, handoff=st.sampled_from(["p", "", "q"]), incomplete=st.booleans())
    @precondition(lambda self: self.model.sessions)
    def lease(self, pick: int, indices: list[int], ttl: int, handoff: str, incomplete: bool) -> None:
        namespace, keys = self.in_one_namespace(pick, indices)
        self.lease_keys(self.some(self.model.sessions, pick), namespace, keys, ttl, handoff, incomplete)

    def lease_keys(
        self, session: int, namespace: bytes, keys: list[bytes], ttl: int, handoff: str, incomplete: bool
    ) -> None:
        names = [NAMES[OBJECT_KEYS.index(k)] for k in keys] if namespace == self.objects and ttl % 2 else None
        leased = self.core.lease(
            session, namespace, packed(keys), ttl, self.now, handoff=handoff, names=names, incomplete=incomplete
        )
        may_read = [self.model.sections(key, incomplete) for key in keys]
        found = self.model.lease(session, int(leased.lease), keys, self.now + ttl, handoff, incomplete)
        assert leased.found.tolist() == found and bool(leased.lease) == any(found)
        assert leased.sections.tolist() == [sum(1 << section for section in sections) for sections in may_read]
        complete = np.array([self.model.readable(key) for key in keys], dtype=np.bool_)
        assert ((leased.blocks.generations % 2 == 0) == complete)[leased.found].all()
        assert not leased.blocks.sizes[~leased.found].any()
        for key, sections, digests in zip(keys, may_read, leased.blocks.digests.tolist(), strict=True):
            if sections:
                committed = self.digests_of(key)
                assert [digests[s] for s in sections] == [committed[s] for s in sections]
        if leased.lease:
            self.leases.append(int(leased.lease))

    @rule(pick=pick, indices=indices, request=st.sampled_from("pq"))
    def end_handoff(self, pick: int, indices: list[int], request: str) -> None:
        namespace, keys = self.in_one_namespace(pick, indices)
        self.core.end_handoff_for(namespace, packed(keys), request, self.now)
        mine = [self.model.blocks[k] for k in keys if self.model.readable(k)]
        self.model.end_handoff_part(request, mine)

    @rule(session=pick, numbers=st.lists(pick, max_size=3))
    @precondition(lambda self: self.leases)
    def release(self, session: int, numbers: list[int]) -> None:
        leases = [self.leases[n % len(self.leases)] for n in numbers]
        known = self.model.leases.get(leases[0]) if leases else None
        owner = known.session if known and session % 8 else self.sessions[session % len(self.sessions)]
        self.both(lambda: self.core.release(owner, leases, self.now), lambda: self.model.release(owner, leases))

    @rule(pick=pick, indices=indices, ttl=st.integers(0, 8), owner=st.sampled_from(["", "", "me", "you"]))
    @precondition(lambda self: self.model.sessions)
    def pin(self, pick: int, indices: list[int], ttl: int, owner: str) -> None:
        session, (namespace, keys) = self.some(self.model.sessions, pick), self.in_one_namespace(pick, indices)
        pinned = self.core.pin(session, namespace, packed(keys), ttl, self.now, owner=owner)
        found = self.model.pin(session, int(pinned.pin), keys, self.now + ttl if ttl else None, owner)
        assert pinned.found.tolist() == found and bool(pinned.pin) == any(found)
        if pinned.pin:
            self.pins.append(int(pinned.pin))

    @rule(number=pick, owner=st.sampled_from(["", "", "me"]))
    @precondition(lambda self: self.pins)
    def unpin(self, number: int, owner: str) -> None:
        pin = self.pins[number % len(self.pins)]
        known = self.model.pins.get(pin)
        # Mostly whoever has it, a few times anybody.
        session = known.session if known else 1
        owner = known.owner if known and number % 8 else owner
        self.both(
            lambda: self.core.unpin(session, pin, self.now, owner=owner), lambda: self.model.unpin(session, pin, owner)
        )

    @rule(owner=st.sampled_from(["me", "you", "nobody"]))
    def unpin_all_of(self, owner: str) -> None:
        self.both(lambda: self.core.unpin(0, 0, self.now, owner=owner), lambda: self.model.unpin(0, 0, owner))

    @rule(pick=pick, indices=indices, ttl=ttls, absent=st.booleans())
    @precondition(lambda self: self.model.sessions)
    def wait(self, pick: int, indices: list[int], ttl: int, absent: bool) -> None:
        session, (namespace, keys) = self.some(self.model.sessions, pick), self.in_one_namespace(pick, indices)
        wait = self.core.wait(session, namespace, packed(keys), self.now + ttl, self.now, absent_is_abandoned=absent)
        self.model.wait(session, int(wait), keys, self.now + ttl, absent)
        self.waits.append(int(wait))

    @rule(number=pick)
    @precondition(lambda self: self.waits)
    def cancel_wait(self, number: int) -> None:
        wait = self.waits[number % len(self.waits)]
        self.core.cancel_wait(wait)
        self.model.cancel_wait(wait)

    @rule(pick=pick, indices=indices)
    def remove(self, pick: int, indices: list[int]) -> None:
        namespace, keys = self.in_one_namespace(pick, indices)
        self.both(lambda: self.core.remove(namespace, packed(keys), self.now), lambda: self.model.remove(keys))

    @rule(prefix=st.sampled_from([b"a", b"ab", b"b", b"bbbbbbbbb", b"x", b"abc"]))
    def remove_prefix(self, prefix: bytes) -> None:
        self.both(
            lambda: self.core.remove_prefix(self.objects, prefix, self.now), lambda: self.model.remove_named(prefix)
        )

    @rule(pick=pick, indices=indices)
    def evict_keys(self, pick: int, indices: list[int]) -> None:
        namespace, keys = self.in_one_namespace(pick, indices)
        mine = [k for k in dict.fromkeys(keys) if self.model.readable(k) and not self.model.blocks[k].held]
        size = sum(self.model.blocks[k].slot_bytes for k in mine)
        assert self.core.evict_keys(namespace, packed(keys), self.now) == (len(mine), size)
        self.model.evict(mine, [])

    @rule(pages=st.integers(1, 4))
    def evict_bytes(self, pages: int) -> None:
        free = self.model.may_go([])
        blocks, size = self.core.evict_bytes(pages * PAGE, self.now)
        removed = [k for kind, k in self.take_changes() if kind == naive.REMOVED]
        if self.PREDICTED:
            assert removed == [b.key for b in free[:pages]]
        sizes = [self.model.blocks[k].slot_bytes for k in removed]
        assert (blocks, size) == (len(removed), sum(sizes))
        assert size >= min(pages * PAGE, sum(b.slot_bytes for b in free))
        assert not sizes or size - sizes[-1] < pages * PAGE, "evicted more than was asked for"
        self.model.evict(removed, [])
        self.model.changes.clear()

    @rule(pick=pick, indices=indices)
    def read_without_a_call(self, pick: int, indices: list[int]) -> None:
        entries = self.core.index.lookup(packed([KEYS[i] for i in indices]))
        entries = np.unique(entries[entries >= 0])
        self.arrays.touches[entries] = 1
        keys = self.core.index.keys_of(entries)
        assert self.core.drain_touches() == self.model.touch(keys)
        assert not self.arrays.touches.any()

    @rule(holder=st.sampled_from(["blocks", "objects", "t"]), pages=st.sampled_from([0, 0, 2, 3, 5, 0]))
    def set_quota(self, holder: str, pages: int) -> None:
        namespaces = {"blocks": self.namespace, "objects": self.objects}
        if holder in namespaces:
            self.core.set_quota(pages * PAGE, namespace_id=namespaces[holder])
        else:
            self.core.set_quota(pages * PAGE, tenant=holder)
        if pages:
            self.model.quotas[holder] = pages * PAGE
        else:
            self.model.quotas.pop(holder, None)

    @rule(indices=indices, present=st.booleans())
    def mark_lower(self, indices: list[int], present: bool) -> None:
        keys = [KEYS[i] for i in indices]
        self.core.mark_lower(packed(keys), present)
        for key in keys:
            if self.model.readable(key):
                self.model.blocks[key].on_lower = present

    @rule(count=st.integers(1, 5))
    def demotion_candidates(self, count: int) -> None:
        cold = self.core.demotion_candidates(1 << 40, count)
        keys = [key.tobytes() for key in cold.keys]
        wanted = [b.key for b in self.model.may_go([]) if not b.on_lower]
        assert bool(keys) == bool(wanted) and len(keys) <= count
        if self.PREDICTED:
            assert keys == wanted[:count]
        for key, name in zip(keys, cold.names, strict=True):
            assert key in wanted and self.model.blocks[key].name == name

    def may_go(self, holder: str) -> bool:
        return bool(self.model.may_go([], holder))

    @rule(units=st.integers(1, 4))
    def pass_time(self, units: int) -> None:
        for _ in range(units):
            self.now += 1
            self.core.tick(self.now)
            self.model.tick(self.now)
            removed = [k for kind, k in self.take_changes() if kind == naive.REMOVED]
            self.model.evict(removed, [])
            self.model.changes.clear()
            for holder, bytes_max in self.model.quotas.items():
                assert self.model.bytes_used(holder) <= bytes_max or not self.may_go(holder)

    @rule(chance=st.integers(0, 3))
    def another_process_takes_over(self, chance: int) -> None:
        """The old one is killed between two calls; `test_adoption` does it inside of them."""
        if chance:
            return
        catalog = Catalog.from_bytes(self.core.catalog().to_bytes())
        self.take_changes()
        self.core = SourceCore.adopt(self.config, self.arrays, self.data, catalog)
        readable = np.flatnonzero(self.arrays.states == EntryState.READABLE).astype(np.int32)
        self.model.adopt([self.model.blocks[key] for key in self.core.index.keys_of(readable)])
        for known in (self.sessions, self.reservations, self.leases, self.pins, self.waits):
            known.clear()
        self.open()

    @rule()
    @precondition(lambda self: self.model.inherited)
    def old_writers_are_gone(self) -> None:
        self.both(lambda: self.core.release_inherited(self.now), self.model.release_inherited)

    # ---- what must hold after each step

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.check_invariants()
        assert sorted(self.take_changes()) == sorted(self.model.changes)
        self.model.changes.clear()
        self.compare_news()
        for namespace, known in ((self.namespace, BLOCK_KEYS), (self.objects, OBJECT_KEYS)):
            assert self.core.lookup(namespace, packed(known)).tolist() == [self.model.readable(k) for k in known]
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
        assert (counts.expired, counts.adopted) == (model.expired, model.adopted)
        assert counts.pins_detached == sum(not h.session for h in model.pins.values())
        assert (
            counts.bytes_free
            == counts.bytes_total - counts.bytes_used - self.core.store.slots.occupancy().bytes_span_waste
        )
        for (_, _, blocks, size), name in zip(self.core.namespaces(), ("blocks", "objects"), strict=True):
            assert blocks == sum(b.readable for b in model.blocks.values() if b.namespace == name)
            assert size == model.bytes_used(name)
        assert [
            (q.tenant or ("objects" if q.namespace_id == self.objects else "blocks"), q.bytes_max, q.bytes_used)
            for q in self.core.quotas()
        ] == [(h, m, model.bytes_used(h)) for h, m in model.quotas.items()]
        for record in self.core.records_of(packed(KEYS)):
            block = model.blocks[record.key]
            assert (record.name, record.tenant, record.on_lower) == (block.name, block.tenant, block.on_lower)
            assert (record.leases, record.pins) == (block.leases, block.pins)
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
            # Of a block that is being written others than its writer write nothing either; sections are told apart by
            # who commits what.
            blocks = self.core.readable_extents(number)
            blocks = blocks.take(self.arrays.states[self.core.holds.leases[number].entries] != EntryState.WRITING)
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
        self.old_writers_are_gone()
        for owner in ("me", "you"):
            self.unpin_all_of(owner)
        self.pass_time(41)
        self.agree()
        counts = self.core.counts()
        assert (counts.sessions, counts.leases, counts.pins, counts.reservations) == (0, 0, 0, 0)
        assert (counts.quarantined, counts.waiters, counts.blocks_writing) == (0, 0, 0)
        self.core.remove_namespace(self.namespace, self.now)
        self.core.remove_namespace(self.objects, self.now)
        assert self.core.counts().bytes_used == 0
        assert self.core.next_deadline_us() is None

    # ---- parts

    def could_fit(self, kept: list[bytes], pages: int) -> bool:
        """Whether one more block of this size had a place and an entry if all went that may go."""
        records, _ = self.core.list_blocks(0, 100)
        staying = [r for r in records if r.state != "readable" or r.leases or r.pins or r.key in kept]
        if len(staying) >= self.ENTRIES:
            return False
        used = [False] * self.PAGES
        for record in staying:
            first, size = record.offset // PAGE, -(-self.slot_bytes(record.size + len(record.name)) // PAGE)
            used[first : first + size] = [True] * size
        return any(not any(used[i : i + pages]) for i in range(self.PAGES - pages + 1))

    def some(self, choices: dict[int, None], pick: int) -> int:
        return list(choices)[pick % len(choices)]

    def digests_of(self, key: bytes) -> list[int]:
        """What was committed for a readable block: by these writers the right digests, or `+ 1`."""
        entry = int(self.core.index.lookup(packed([key]))[0])
        count = self.model.blocks[key].sections
        digests = [int(d) for d in self.core.arrays.digests[entry, :count]]
        done = self.model.sections(key, True)
        assert all(digests[s] - digest_of(key, s) in (0, 1) for s in done)
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
    """Blocks of several sizes on few pages."""

    SIZES = ((1, 1), (2, 2), (3, 3))
    PAGES, ENTRIES = 10, 7
    OBJECT_BYTES = (4000, 8000, 12_000, 30_000)
    PREDICTED = False


class PrefixMachine(SizesMachine):
    EVICTION = "prefix"

    def may_go(self, holder: str) -> bool:
        """None that another one stands on: one that is held keeps those below it."""
        keys = b"".join(block.key for block in self.model.may_go([], holder))
        entries = self.core.store.index.lookup(np.frombuffer(keys, np.uint8).reshape(-1, 16))
        return bool(self.core.store.evictor.evictable(entries).any())


class LfuMachine(SourceMachine):
    EVICTION, PREDICTED = "lfu", False


class S3FifoMachine(SourceMachine):
    EVICTION, PREDICTED = "s3fifo", False


#: Shrinking a long history takes minutes: a failure is printed as it was found.
ROUNDS = settings(
    max_examples=30,
    stateful_step_count=50,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("machine", [SourceMachine, SizesMachine, PrefixMachine, LfuMachine, S3FifoMachine])
def test_source_agrees_with_the_naive_one(machine: type[SourceMachine]) -> None:
    case = machine.TestCase
    case.settings = ROUNDS
    case("runTest").runTest()
