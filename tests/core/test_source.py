"""What SourceCore promises beside what the state machine and the scripts show: fidelity, namespaces, memory, paging."""

from __future__ import annotations

import numpy as np
import pytest

from kvpool.core.arrays import SourceArrays
from kvpool.core.errors import BadArgument, NoSpace, UnknownNamespace, UnknownSession
from kvpool.core.ids import Fidelity, KeyArray, NamespaceId, ReservationId, SessionId
from kvpool.core.namespace import SECTIONS_MAX, GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import ReserveStatus, SourceConfig
from kvpool.core.source import SourceCore

PAGE = 4096
SECOND = 1_000_000


def spec(model: str = "m", sections: int = 1, shards: int = 1) -> NamespaceSpec:
    group = GroupSpec(0, GroupKind.FULL, tuple(range(sections)), 16, shards, sections, PAGE)
    return NamespaceSpec(model, "", "float32", "t", "lkthd", "sha256/1", (group,))


def keys(*numbers: int) -> KeyArray:
    return np.frombuffer(b"".join(n.to_bytes(16, "big") for n in numbers), dtype=np.uint8).reshape(-1, 16)


class Writer:
    """A source with one client that writes."""

    def __init__(self, pages: int = 8, entries: int = 8, arrays: SourceArrays | None = None, sections: int = 1) -> None:
        self.core = SourceCore(
            SourceConfig(pages * PAGE, entries, "lru", PAGE, high_watermark=1.0, low_watermark=1.0), arrays
        )
        self.sections = sections
        self.namespace = self.core.register_namespace(spec(sections=sections))
        self.session = self.core.open_session("writer", 0)

    def publish(self, *numbers: int, namespace: NamespaceId | None = None, fidelity: Fidelity = Fidelity.EXACT) -> None:
        namespace = namespace or self.namespace
        group = self.core.group(namespace, 0, 0)
        reserved = self.core.reserve(
            self.session, namespace, group, keys(*numbers), SECOND, 0, fidelity=fidelity
        )  # fmt: skip
        rows = np.flatnonzero(reserved.status == ReserveStatus.RESERVED).astype(np.uint32)
        rows, sections = np.repeat(rows, self.sections), np.tile(np.arange(self.sections, dtype=np.uint32), len(rows))
        self.core.commit(self.session, reserved.reservation, rows, sections, rows.astype(np.uint64) + np.uint64(7), 0)
        self.core.check_invariants()


def test_a_copy_is_told_with_its_fidelity() -> None:
    w = Writer()
    w.publish(1, fidelity=Fidelity.INT8)
    w.publish(2)
    leased = w.core.lease(w.session, w.namespace, keys(1, 2, 3), SECOND, 0, fidelity_min=Fidelity.INT8)
    assert leased.fidelity.tolist() == [Fidelity.INT8, Fidelity.EXACT, 0]
    changes = w.core.take_changes()
    assert [(c.keys, c.fidelity) for c in changes] == [
        (keys(1).tobytes(), Fidelity.INT8),
        (keys(2).tobytes(), Fidelity.EXACT),
    ]


def test_slots_of_an_expired_reservation_are_free_once_a_ping_does_not_name_it() -> None:
    w = Writer()
    group = w.core.group(w.namespace, 0, 0)
    stranger = w.core.open_session("stranger", 0)
    lost, slow = (
        w.core.reserve(w.session, w.namespace, group, keys(*numbers), SECOND, 0).reservation
        for numbers in ((1, 2), (3, 4, 5))
    )
    assert w.core.next_pong(w.session) == 1
    assert w.core.written_no_more(w.session, 1, []) == [], "neither has expired: it may yet be written"
    w.core.tick(SECOND)
    assert w.core.counts().quarantined == 5
    assert w.core.written_no_more(w.session, 1, []) == [], "what that pong answers was sent before they expired"
    assert (w.core.next_pong(w.session), w.core.next_pong(stranger)) == (2, 1)
    assert w.core.written_no_more(w.session, 0, []) == [], "this client does not say what it writes"
    assert w.core.written_no_more(w.session, 1, []) == [], "has not seen that pong"
    assert w.core.written_no_more(stranger, 1, []) == []
    assert w.core.written_no_more(w.session, 2, [slow]) == [lost]
    assert w.core.written_no_more(w.session, 2, []) == [lost, slow]
    with pytest.raises(BadArgument):
        w.core.written_no_more(w.session, 3, [])
    with pytest.raises(UnknownSession):
        w.core.written_no_more(SessionId(99), 0, [])
    w.core.abort(w.session, lost, SECOND)
    w.core.check_invariants()
    assert w.core.counts().quarantined == 3
    assert w.core.written_no_more(w.session, 2, []) == [slow]
    w.core.close_session(w.session, SECOND, writer_gone=False)
    assert w.core.counts().quarantined == 3, "a session that ended pings no more: as before, its writer must be gone"
    w.core.check_invariants()


def test_a_namespace_reads_only_its_own_blocks() -> None:
    w = Writer()
    other = w.core.register_namespace(spec("other"))
    w.publish(1)
    w.publish(2, namespace=other)
    assert w.core.lookup(w.namespace, keys(1, 2)).tolist() == [True, False]
    assert w.core.lookup(other, keys(1, 2)).tolist() == [False, True]
    assert w.core.lease(w.session, other, keys(1), SECOND, 0).found.tolist() == [False]
    assert w.core.pin(w.session, other, keys(1), 0, 0).found.tolist() == [False]
    assert w.core.remove(other, keys(1), 0) == 0
    assert w.core.remove_namespace(other, 0) == 1
    assert w.core.lookup(w.namespace, keys(1)).tolist() == [True]


def test_registering_again_changes_nothing() -> None:
    w = Writer()
    assert w.core.register_namespace(spec()) == w.namespace
    assert w.core.register_namespace(spec("other")) != w.namespace


@pytest.mark.parametrize(("group", "shard"), [(1, 0), (-1, 0), (0, 2), (0, -1)])
def test_groups_and_shards_that_are_not_there(group: int, shard: int) -> None:
    w = Writer()
    namespace = w.core.register_namespace(spec("sharded", shards=2))
    assert w.core.group(namespace, 0, 1).shard_count == 2
    with pytest.raises(BadArgument):
        w.core.group(namespace, group, shard)


def test_strangers_are_refused() -> None:
    w = Writer()
    group = w.core.group(w.namespace, 0, 0)
    for namespace in (b"", bytes(16), bytes(3)):
        with pytest.raises(UnknownNamespace):
            w.core.group(namespace, 0, 0)
        with pytest.raises(UnknownNamespace):
            w.core.lookup(namespace, keys(1))
        with pytest.raises(UnknownNamespace):
            w.core.reserve(w.session, namespace, group, keys(1), SECOND, 0)
    nobody = SessionId(99)
    for call in (
        lambda: w.core.reserve(nobody, w.namespace, group, keys(1), SECOND, 0),
        lambda: w.core.lease(nobody, w.namespace, keys(1), SECOND, 0),
        lambda: w.core.pin(nobody, w.namespace, keys(1), 0, 0),
        lambda: w.core.wait(nobody, w.namespace, keys(1), SECOND, 0),
        lambda: w.core.ping(nobody, 0),
    ):
        with pytest.raises(UnknownSession):
            call()
    counts = w.core.counts()
    assert (counts.bytes_used, counts.reservations, counts.leases, counts.pins, counts.waiters) == (0, 0, 0, 0, 0)


def test_calls_without_keys_hold_nothing() -> None:
    w = Writer()
    none, group = keys(), w.core.group(w.namespace, 0, 0)
    assert w.core.reserve(w.session, w.namespace, group, none, SECOND, 0).reservation == 0
    assert w.core.lease(w.session, w.namespace, none, SECOND, 0).lease == 0
    assert w.core.pin(w.session, w.namespace, none, 0, 0).pin == 0
    wait = w.core.wait(w.session, w.namespace, none, SECOND, 0)
    assert [(news.wait, news.done) for news in w.core.take_wakeups()] == [(wait, True)]
    w.core.check_invariants()


def test_a_lease_names_bytes_and_digests() -> None:
    w = Writer(sections=2)
    w.publish(1, 2)
    blocks = w.core.lease(w.session, w.namespace, keys(2, 1, 5), SECOND, 0).blocks
    assert blocks.offsets.tolist()[:2] == [PAGE, 0]
    assert blocks.sizes.tolist() == [PAGE, PAGE, 0]
    assert blocks.digests.shape == (3, SECTIONS_MAX)
    assert blocks.digests[:, :2].tolist() == [[8, 8], [7, 7], [0, 0]]


def test_a_reader_of_the_same_memory_can_tell_a_block_that_moved() -> None:
    """What same-host readers rely on: key, offset and generation agree before and after the copy, or it was nothing."""
    arrays = SourceArrays.over(np.zeros(SourceArrays.bytes_needed(8), dtype=np.uint8), 8, fresh=True)
    w = Writer(pages=1, arrays=arrays)
    seen = []
    for number in (1, 2, 1, 1):
        if number == 1:
            w.core.remove(w.namespace, keys(1), 0)
        w.publish(number)
        entry = int(w.core.index.lookup(keys(number))[0])
        assert arrays.keys[entry].tobytes() == keys(number).tobytes()
        assert arrays.generations[entry] % 2 == 0
        seen.append((entry, int(arrays.generations[entry])))
    assert len(dict.fromkeys(seen)) == len(seen), "the same place twice, never in the same generation"


def test_pages_of_a_listing_add_up() -> None:
    w = Writer()
    w.publish(1, 2, 3)
    w.core.lease(w.session, w.namespace, keys(2), SECOND, 0)
    group = w.core.group(w.namespace, 0, 0)
    w.core.reserve(w.session, w.namespace, group, keys(4, 5), SECOND, 0)
    w.core.reserve(w.session, w.namespace, group, keys(6), 2 * SECOND, 0)
    w.core.tick(SECOND)
    whole, end = w.core.list_blocks(0, 100)
    assert end == 0
    states = sorted(record.state for record in whole)
    assert states == ["quarantined", "quarantined", "readable", "readable", "readable", "writing"]
    for limit in range(1, 7):
        pages, cursor = [], 0
        while True:
            page, cursor = w.core.list_blocks(cursor, limit)
            assert len(page) <= limit
            pages += page
            if not cursor:
                break
        assert pages == whole
    for cursor, limit in ((0, 0), (0, 10_001), (-1, 5)):
        with pytest.raises(BadArgument):
            w.core.list_blocks(cursor, limit)


def test_a_snapshot_holds_what_is_readable() -> None:
    w = Writer()
    w.publish(1, 2, 3)
    w.core.remove(w.namespace, keys(2), 0)
    w.core.reserve(w.session, w.namespace, w.core.group(w.namespace, 0, 0), keys(4), SECOND, 0)
    w.publish(5, fidelity=Fidelity.INT8)
    held = {fidelity: sorted(k.tobytes() for k in found) for found, fidelity in w.core.snapshot_keys()}
    assert held == {Fidelity.EXACT: [keys(1).tobytes(), keys(3).tobytes()], Fidelity.INT8: [keys(5).tobytes()]}


def test_arguments_of_unequal_length_are_refused() -> None:
    w = Writer()
    reserved = w.core.reserve(w.session, w.namespace, w.core.group(w.namespace, 0, 0), keys(1), SECOND, 0)
    one, two = np.zeros(1, dtype=np.uint32), np.zeros(2, dtype=np.uint32)
    with pytest.raises(BadArgument):
        w.core.commit(w.session, reserved.reservation, one, two, np.zeros(1, dtype=np.uint64), 0)
    assert (
        w.core.commit(w.session, ReservationId(reserved.reservation), one[:0], one[:0], np.zeros(0, np.uint64), 0) == 0
    )


def test_what_ended_early_leaves_no_deadline() -> None:
    """Otherwise a client that leases, waits and releases in a loop grows the source for ten minutes."""
    w = Writer()
    w.publish(1)
    for _ in range(300):
        lease = w.core.lease(w.session, w.namespace, keys(1), 600 * SECOND, 0).lease
        w.core.release(w.session, [lease], 0)
        w.core.unpin(w.session, w.core.pin(w.session, w.namespace, keys(1), 600 * SECOND, 0).pin, 0)
        w.core.wait(w.session, w.namespace, keys(1), 600 * SECOND, 0)
        w.core.cancel_wait(w.core.wait(w.session, w.namespace, keys(2), 600 * SECOND, 0))
        w.core.take_wakeups()
    w.core.tick(2 * SECOND)  # over for the finished reservation, too
    assert w.core.next_deadline_us() is None


@pytest.mark.parametrize("end", ["abort", "expiry", "completion"])
def test_a_slot_stays_with_the_reader_of_its_sections(end: str) -> None:
    """Whatever becomes of the block: nobody else gets the bytes before the last reader is through."""
    core = SourceCore(SourceConfig(PAGE, 4, unit_bytes=PAGE, high_watermark=1.0))
    namespace, session = core.register_namespace(spec(sections=2)), core.open_session("client", 0)
    group = core.group(namespace, 0, 0)
    reserved = core.reserve(session, namespace, group, keys(1), SECOND, 0)
    row, digest = np.zeros(1, np.uint32), np.array([7], np.uint64)
    core.commit(session, reserved.reservation, row, row + np.uint32(1), digest, 0)
    assert not core.lease(session, namespace, keys(1), 9 * SECOND, 0).lease, "not for who wants whole blocks"
    leased = core.lease(session, namespace, keys(1), 9 * SECOND, 0, incomplete=True)
    assert leased.sections.tolist() == [0b10] and int(leased.blocks.digests[0, 1]) == 7
    if end == "abort":
        assert core.abort(session, reserved.reservation, 0) == 1
    elif end == "expiry":
        core.tick(2 * SECOND)
        assert core.counts().quarantined == 1
        core.writer_gone(session, 0)
    else:
        assert core.commit(session, reserved.reservation, row, row, digest, 0) == 1
    core.check_invariants()
    assert (core.counts().quarantined, core.counts().bytes_used) == (0, PAGE)
    with pytest.raises(NoSpace):
        core.reserve(session, namespace, group, keys(2), SECOND, 0)
    core.release(session, [leased.lease], 0)
    core.check_invariants()
    assert core.counts().bytes_used == (PAGE if end == "completion" else 0)
    assert core.reserve(session, namespace, group, keys(2), SECOND, 0).status.tolist() == [ReserveStatus.RESERVED]


def test_sections_that_are_not_wanted_are_not_leased() -> None:
    """Of another namespace, of less fidelity, or without a committed section."""
    w = Writer()
    other = w.core.register_namespace(spec("other", sections=2))
    group = w.core.group(other, 0, 0)
    lossy = w.core.reserve(
        w.session, other, group, keys(1), SECOND, 0, fidelity=Fidelity.INT8, sizes=np.array([100], np.uint64)
    )
    bare = w.core.reserve(w.session, other, group, keys(2), SECOND, 0)
    row, digest = np.zeros(1, np.uint32), np.array([7], np.uint64)
    w.core.commit(w.session, lossy.reservation, row, row, digest, 0)

    def sections(namespace: bytes, number: int, **options: Fidelity) -> int:
        leased = w.core.lease(w.session, namespace, keys(number), SECOND, 0, incomplete=True, **options)
        assert bool(leased.lease) == bool(leased.sections[0])
        return int(leased.sections[0])

    assert sections(other, 1, fidelity_min=Fidelity.INT8) == 1
    assert sections(other, 1) == sections(other, 2) == sections(w.namespace, 1, fidelity_min=Fidelity.INT8) == 0
    w.core.commit(w.session, bare.reservation, row, row, digest, 0)
    assert sections(other, 2) == 1
    w.core.check_invariants()


def test_what_changed_under_its_key_is_not_removed() -> None:
    w = Writer()
    w.publish(1, 2, 3)
    held = w.core.lease(w.session, w.namespace, keys(1, 2, 3, 4), SECOND, 0).blocks.digests[:, :1]
    wrong = held.copy()
    wrong[1] += np.uint64(1)
    assert w.core.unchanged(w.namespace, keys(1, 2, 3, 4), wrong).tolist() == [True, False, True, False]
    assert w.core.remove(w.namespace, keys(1, 2, 3, 4), 0, digests=wrong) == 2
    assert w.core.lookup(w.namespace, keys(1, 2, 3)).tolist() == [False, True, False]
    for digests in (held[:3], np.zeros((4, SECTIONS_MAX + 1), np.uint64)):
        with pytest.raises(BadArgument):
            w.core.remove(w.namespace, keys(1, 2, 3, 4), 0, digests=digests)
