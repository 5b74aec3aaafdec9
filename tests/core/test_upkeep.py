"""Quotas, pins that outlive sessions, removal by name, reads without a call, copies below: one promise a test."""

from __future__ import annotations

import numpy as np
import pytest
from source_clients import PAGE, SECOND, Client, keys_of

from kvpool.core.arrays import FLAG_LOWER_TIER, FLAGS, TABLE_VERSION
from kvpool.core.errors import (
    BadArgument,
    Draining,
    NoSpace,
    Overloaded,
    QuotaExceeded,
    UnknownLease,
    UnknownNamespace,
    UnknownReservation,
    Unsupported,
)
from kvpool.core.hashing import object_key
from kvpool.core.holds import Hold
from kvpool.core.ids import Fidelity
from kvpool.core.namespace import NamespaceSpec
from kvpool.core.results import ReserveStatus, SourceConfig
from kvpool.core.source import SourceCore

WEEK = 7 * 24 * 3600 * SECOND

# ---------------------------------------------------------------- quotas


def test_beyond_its_quota_a_tenants_own_blocks_go() -> None:
    c = Client(16)
    c.put(1, 2)
    c.core.set_quota(3 * PAGE, tenant="t")
    c.put(11, 12, 13, tenant="t")
    c.lease(12)
    c.core.take_changes()
    c.put(14, tenant="t")
    assert c.removed() == [13] and c.here(1, 2, 11, 12, 14) == [1, 2, 11, 12, 14]
    reserved = c.reserve(21, 22, 23, 24, tenant="t")
    assert reserved.status.tolist() == [ReserveStatus.RESERVED] * 2 + [ReserveStatus.OVER_QUOTA] * 2
    with pytest.raises(QuotaExceeded):
        c.reserve(31, tenant="t")
    quota = c.core.quotas()[0]
    assert (quota.tenant, quota.bytes_max, quota.bytes_used) == ("t", 3 * PAGE, 3 * PAGE)
    c.put(31, tenant="somebody else")


def test_a_quota_of_a_namespace_counts_all_of_its_tenants() -> None:
    c = Client(16)
    c.core.set_quota(2 * PAGE, namespace_id=c.objects)
    c.put_objects("a", "b", sizes=[PAGE - 5, PAGE - 5], tenant="t")
    c.put_objects("c", sizes=[PAGE - 5], tenant="u")
    assert len(c.core.list_blocks(0, 10)[0]) == 2
    c.put(1, 2, 3)
    assert c.core.namespaces()[1][2:] == (2, 2 * PAGE)


def test_both_quotas_hold_and_nothing_goes_for_what_one_of_them_refuses() -> None:
    c = Client(16)
    c.core.set_quota(2 * PAGE, namespace_id=c.namespace)
    c.core.set_quota(PAGE, tenant="t")
    c.put(1, tenant="t")
    c.lease(1)
    c.put(2)
    c.core.take_changes()
    with pytest.raises(QuotaExceeded):
        c.reserve(3, tenant="t")
    assert c.removed() == []


def test_a_smaller_quota_is_enforced_by_the_timer() -> None:
    c = Client(16)
    c.put(1, 2, 3, 4, tenant="t")
    c.core.set_quota(2 * PAGE, tenant="t")
    assert c.here(1, 2, 3, 4) == [1, 2, 3, 4]
    c.core.tick(1)
    assert c.here(1, 2, 3, 4) == [1, 2]
    c.core.set_quota(0, tenant="t")
    assert c.core.quotas() == []


def test_a_tenant_with_more_than_one_scan_finds_is_still_evicted_just_as_needed() -> None:
    c = Client(4096, entries=4096, eviction="prefix")
    c.put(*range(3000), tenant="t")
    c.put(*range(5000, 5100))
    c.core.set_quota(2000 * PAGE, tenant="t")
    c.core.tick(1)
    assert c.here(*range(3000)) == list(range(2000)), "of a chain the tail"
    assert len(c.here(*range(5000, 5100))) == 100
    c.put(*range(6000, 6010), tenant="t")
    assert c.core.quotas()[0].bytes_used == 2000 * PAGE


def test_quotas_and_tenants_are_bounded() -> None:
    c = Client(4, quotas_max=2, tenants_max=3)
    c.core.set_quota(1, tenant="a")
    c.core.set_quota(1, tenant="b")
    with pytest.raises(Overloaded):
        c.core.set_quota(1, tenant="c")
    with pytest.raises(Overloaded):
        c.put(1, tenant="d")
    for wrong in ({}, {"namespace_id": c.namespace, "tenant": "a"}):
        with pytest.raises(BadArgument):
            c.core.set_quota(1, **wrong)
    with pytest.raises(UnknownNamespace):
        c.core.set_quota(1, namespace_id=bytes(16))


def test_a_catalog_that_is_full_refuses_before_anything_changes() -> None:
    c = Client(4, catalog_bytes_max=900)
    with pytest.raises(Overloaded):
        for number in range(100):
            c.put(1, tenant=f"tenant {number}")
            c.core.remove(c.namespace, keys_of(1), 0)
    assert len(c.core.catalog().to_bytes()) < 1100
    assert c.core.counts().blocks == 0 and c.core.counts().reservations == 0
    with pytest.raises(Overloaded):
        c.core.register_namespace(NamespaceSpec.objects("x" * 200))


# ---------------------------------------------------------------- pins


def test_a_pin_with_an_owner_outlives_its_session() -> None:
    c = Client(2)
    c.put(1, 2)
    pin = c.core.pin(c.session, c.namespace, keys_of(1), WEEK, 0, owner="me").pin
    c.core.pin(c.session, c.namespace, keys_of(2), SECOND, 0)
    c.core.close_session(c.session, 0, writer_gone=True)
    assert c.core.counts().pins_detached == 1
    c.session = c.core.open_session("another", 0)
    c.put(3)
    assert c.here(1, 2, 3) == [1, 3]
    with pytest.raises(UnknownLease):
        c.core.unpin(c.session, pin, 0)
    with pytest.raises(UnknownLease):
        c.core.unpin(c.session, pin, 0, owner="you")
    assert c.core.unpin(0, pin, 0, owner="me") == 1
    c.put(4)
    assert c.core.counts().pins == 0


def test_pins_end_with_their_time_at_most_seven_days() -> None:
    c = Client(4, pins_detached_max=2)
    c.put(1, 2)
    for ttl_us in (WEEK + 1, -1):
        with pytest.raises(BadArgument):
            c.core.pin(c.session, c.namespace, keys_of(1), ttl_us, 0, owner="me")
    with pytest.raises(BadArgument):
        c.core.pin(c.session, c.namespace, keys_of(1), 601 * SECOND, 0)
    c.core.pin(c.session, c.namespace, keys_of(1), WEEK, 0, owner="me")
    c.core.pin(c.session, c.namespace, keys_of(1, 2), 0, 0, owner="me")
    with pytest.raises(Overloaded):
        c.core.pin(c.session, c.namespace, keys_of(1), WEEK, 0, owner="me")
    c.core.tick(WEEK)
    assert c.core.counts().pins == 1 and c.core.counts().expired >= 1
    assert c.core.unpin(0, 0, WEEK, owner="me") == 1
    assert c.core.unpin(0, 0, WEEK, owner="me") == 0


def test_what_is_held_is_listed_with_its_holder() -> None:
    c = Client(8)
    c.put(1, 2)
    lease = c.lease(1, 1, 2)
    soft = c.core.pin(c.session, c.namespace, keys_of(2), SECOND, 0).pin
    hard = c.core.pin(c.session, c.namespace, keys_of(1), 0, 0, owner="me").pin
    c.put(1, hold=Hold("request", SECOND))
    records = {(r.kind, r.pin, r.owner, r.session, r.blocks, r.bytes, r.expires_us) for r in c.core.pins()}
    assert records == {
        ("lease", lease, "", c.session, 2, 2 * PAGE, SECOND),
        ("soft", soft, "", c.session, 1, PAGE, SECOND),
        ("hard", hard, "me", 0, 1, PAGE, None),
        ("hand-off", 0, "request", 0, 1, PAGE, SECOND),
    }
    c.core.end_handoff_for(c.namespace, keys_of(1, 2, 3), "request", 0)
    c.core.end_handoff_for(c.namespace, keys_of(1), "nobody", 0)
    c.core.check_invariants()
    assert all(record.kind != "hand-off" for record in c.core.pins())


def test_rows_held_are_bounded() -> None:
    c = Client(8, held_rows_max=5)
    c.put(1, 2)
    lease = c.lease(1, 2, 1)
    with pytest.raises(Overloaded):
        c.lease(1, 2, 1)
    c.core.release(c.session, [lease], 0)
    c.lease(1, 2, 1)


# ---------------------------------------------------------------- objects


def test_objects_of_any_size_are_found_by_their_whole_name() -> None:
    c = Client(64)
    names, sizes = ["a", "b" * 1024, "ünï"], [1, 10 * PAGE + 1, 40 * PAGE]
    reserved = c.put_objects(*names, sizes=sizes)
    assert reserved.slots.sizes.tolist() == sizes
    keys, encoded = c.object_keys(*names), [name.encode() for name in names]
    leased = c.core.lease(c.session, c.objects, keys, SECOND, 0, names=encoded)
    assert leased.found.all()
    wrong = c.core.lease(c.session, c.objects, keys, SECOND, 0, names=[b"a", b"x", b"y"])
    assert wrong.found.tolist() == [True, False, False]
    assert c.core.lookup(c.objects, keys, names=[b"b", *encoded[1:]]).tolist() == [False, True, True]
    page, _ = c.core.list_blocks(0, 10, namespace_id=c.objects)
    assert [(record.name, record.size) for record in page] == list(zip(encoded, sizes, strict=True))
    assert c.reserve_objects("a", sizes=[77]).status.tolist() == [ReserveStatus.EXISTS]


def test_a_name_does_not_touch_the_bytes_before_and_behind_it() -> None:
    c = Client(8)
    c.data[:] = 0xAA
    reserved = c.reserve_objects("name", sizes=[100])
    at = int(reserved.slots.offsets[0])
    assert c.data[at + 100 : at + 104].tobytes() == b"name"
    assert (np.delete(c.data, slice(at + 100, at + 104)) == 0xAA).all()


@pytest.mark.parametrize("size", [0, 8 * PAGE + 1])
def test_sizes_that_no_object_has(size: int) -> None:
    with pytest.raises(BadArgument):
        Client(8).reserve_objects("a", sizes=[size])


def test_as_large_as_the_segment_but_for_its_name() -> None:
    c = Client(8)
    c.put(1, 2, 3)
    with pytest.raises(NoSpace):
        c.put_objects("n", sizes=[8 * PAGE])
    assert c.here(1, 2, 3) == [1, 2, 3]
    c.put_objects("n", sizes=[8 * PAGE - 1])
    assert c.core.counts().blocks == 1


def test_objects_that_are_not_what_they_say() -> None:
    c = Client(8)
    with pytest.raises(BadArgument):
        c.core.reserve(c.session, c.objects, None, keys_of(1), SECOND, 0, sizes=np.ones(1, np.uint64), names=[b"a"])
    with pytest.raises(BadArgument):
        c.core.reserve(c.session, c.objects, None, c.object_keys("a"), SECOND, 0)
    with pytest.raises(BadArgument):
        c.core.reserve(c.session, c.namespace, c.groups[0], keys_of(1), SECOND, 0, names=[b"a"])
    with pytest.raises(BadArgument):
        c.core.reserve(c.session, c.namespace, None, keys_of(1), SECOND, 0)
    for name in ("", "x" * 1025):
        with pytest.raises(BadArgument):
            object_key(c.objects, name)
    blocks_only = SourceCore(c.config)
    objects = blocks_only.register_namespace(NamespaceSpec.objects("d"))
    session = blocks_only.open_session("c", 0)
    with pytest.raises(Unsupported):
        blocks_only.reserve(
            session, objects, None, c.object_keys("a"), SECOND, 0, sizes=np.ones(1, np.uint64), names=[b"a"]
        )


def test_removal_by_the_beginning_of_names() -> None:
    c = Client(8)
    c.put_objects("a/1", "a/2", "b/1", "a", sizes=[10] * 4)
    c.put(1)
    assert c.core.remove_prefix(c.objects, b"a/", 0) == 2
    assert c.core.remove_prefix(c.objects, b"", 0) == 2
    assert c.core.remove_prefix(c.namespace, b"", 0) == 0
    assert c.here(1) == [1]


def test_a_listing_by_name_is_whole_whatever_its_pages() -> None:
    c = Client(64)
    c.put_objects(*(f"{'ab'[n % 2]}{n:02}" for n in range(30)), sizes=[10] * 30)
    c.put(1, 2)
    for limit in (1, 4, 15, 16):
        names, cursor = [], 0
        while True:
            page, cursor = c.core.list_blocks(cursor, limit, namespace_id=c.objects, name_prefix=b"a")
            assert len(page) <= limit
            names += [record.name.decode() for record in page]
            if not cursor:
                break
        assert names == [f"a{n:02}" for n in range(0, 30, 2)]


# ---------------------------------------------------------------- fidelity, draining, what is below


def test_an_exact_reader_does_not_see_a_lossy_copy_and_an_exact_writer_replaces_it() -> None:
    c = Client(4)
    c.publish_lossy(1)
    assert not c.lease(1) and c.lease(1, fidelity_min=Fidelity.INT8)
    assert c.publish_lossy(1).status.tolist() == [ReserveStatus.EXISTS]
    c.core.take_changes()
    c.put(1)
    changes = [(change.kind, change.fidelity) for change in c.core.take_changes()]
    assert changes == [(2, Fidelity.INT8), (1, Fidelity.EXACT)]
    assert c.lease(1)
    assert c.publish_lossy(1).status.tolist() == [ReserveStatus.EXISTS]
    # The lossy one was held: its slot stays until its reader is done.
    assert c.core.counts().bytes_used == 2 * PAGE


def test_a_lossy_copy_stays_where_there_is_no_room_for_an_exact_one() -> None:
    c = Client(1)
    c.publish_lossy(1)
    c.lease(1, fidelity_min=Fidelity.INT8)
    with pytest.raises(NoSpace):
        c.put(1)
    assert c.here(1) == [1]


def test_a_draining_source_takes_nothing_new_and_still_serves() -> None:
    c = Client(4)
    c.put(1)
    c.core.draining = True
    with pytest.raises(Draining):
        c.reserve(2)
    assert c.lease(1) and c.core.counts().draining
    c.core.draining = False
    c.put(2)


def test_what_exists_below_is_not_reserved_again() -> None:
    c = Client(4)
    reserved = c.reserve(1, 2, exists=np.array([True, False]))
    assert reserved.status.tolist() == [ReserveStatus.EXISTS, ReserveStatus.RESERVED]
    assert c.reserve(1, exists=np.array([True])).reservation == 0


def test_blocks_are_offered_for_demotion_in_the_order_in_which_they_would_go() -> None:
    c = Client(16)
    c.put(1, 2, 3, tenant="t")
    c.put_objects("o", sizes=[100])
    c.lease(2)
    cold = c.core.demotion_candidates(1 << 30, 10)
    assert [int.from_bytes(k.tobytes(), "big") for k in cold.keys[:2]] == [3, 1]
    assert cold.names == [b"", b"", b"o"] and cold.tenants == ["t", "t", ""]
    assert cold.namespace_ids == [c.namespace, c.namespace, c.objects]
    assert cold.blocks.sizes.tolist() == [PAGE, PAGE, 100] and cold.section_counts.tolist() == [1, 1, 1]
    assert len(c.core.demotion_candidates(PAGE, 10)) == 1
    assert len(c.core.demotion_candidates(1, 10)) == 1, "at least one, however large"
    assert cold.take(np.array([False, False, True])).names == [b"o"]
    c.core.mark_lower(cold.keys, True)
    assert len(c.core.demotion_candidates(1 << 30, 10)) == 0
    c.core.mark_lower(keys_of(3), False)
    assert len(c.core.demotion_candidates(1 << 30, 10)) == 1
    c.core.evict_keys(c.namespace, keys_of(1, 2, 3), 0)
    assert (c.core.counts().evictions, c.core.counts().evictions_unsaved) == (2, 1)


def test_a_block_that_is_written_again_is_not_taken_for_one_that_is_below() -> None:
    c = Client(4, entries=1)
    c.put(1)
    c.core.mark_lower(keys_of(1), True)
    c.core.remove(c.namespace, keys_of(1), 0)
    c.put(2)
    assert [key.tobytes() for key in c.core.demotion_candidates(1 << 30, 9).keys] == [keys_of(2).tobytes()]
    assert not c.core.records_of(keys_of(2))[0].on_lower


def test_the_index_says_that_there_is_a_lower_tier() -> None:
    c = Client(4)
    c.core.set_lower_tier(True)
    assert int(c.core.arrays.header[FLAGS]) & FLAG_LOWER_TIER
    c.core.set_lower_tier(False)
    assert not int(c.core.arrays.header[FLAGS]) & FLAG_LOWER_TIER


# ---------------------------------------------------------------- use, eviction, what readers of the memory see


def test_reads_without_a_call_keep_blocks_from_going() -> None:
    """The hottest blocks are those that nobody asks the source for."""
    c = Client(4)
    c.put(1, 2, 3, 4)
    c.core.arrays.touches[c.core.index.lookup(keys_of(4, 3))] = 1
    c.core.take_changes()
    c.put(5, 6)
    assert c.removed() == [2, 1]
    assert c.core.counts().touches == 2 and not c.core.arrays.touches.any()


@pytest.mark.parametrize("eviction", ["prefix", "lru", "lfu", "s3fifo"])
@pytest.mark.parametrize("reads", [2, 3, 255])
def test_each_read_without_a_call_counts(eviction: str, reads: int) -> None:
    """Also where all of them come between two looks of the source, and the policy wants more than one."""
    c = Client(20, eviction=eviction)
    for number in range(10):
        c.put(number)
    c.core.arrays.touches[c.core.index.lookup(keys_of(3, 4))] = reads
    for number in range(100, 118):
        c.put(number)
    assert c.here(*range(10)) == [3, 4]
    assert c.core.counts().touches == 2


def test_marks_of_what_is_gone_or_being_written_are_forgotten() -> None:
    c = Client(4, entries=5)
    c.put(1)
    c.core.arrays.touches[:] = 1
    assert c.core.drain_touches() == 1
    c.core.check_invariants()


def test_evicting_bytes_takes_the_next_ones_and_no_more() -> None:
    c = Client(8)
    c.put(1, 2, 3, 4)
    c.lease(3)
    c.core.take_changes()
    assert c.core.evict_bytes(PAGE + 1, 0) == (2, 2 * PAGE)
    assert c.removed() == [4, 2]
    assert c.core.evict_bytes(1 << 40, 0) == (1, PAGE)
    assert c.core.evict_keys(c.namespace, keys_of(3), 0) == (0, 0), "held"


def test_the_tables_version_moves_with_each_change_and_is_even_at_rest() -> None:
    c = Client(4)
    header = c.core.arrays.header
    versions = [int(header[TABLE_VERSION])]
    c.put(1)
    versions.append(int(header[TABLE_VERSION]))
    c.lease(1)
    assert int(header[TABLE_VERSION]) == versions[-1], "reading changes nothing"
    c.core.remove(c.namespace, keys_of(1), 0)
    versions.append(int(header[TABLE_VERSION]))
    assert versions == sorted(set(versions)) and not any(version % 2 for version in versions)


def test_a_prefix_outlives_its_tail_whatever_the_order_of_commits() -> None:
    c = Client(6, eviction="prefix")
    first = c.reserve(1, 2, 3)
    rows = np.array([0, 1, 2], np.uint32)
    c.core.commit(c.session, first.reservation, rows, np.zeros(3, np.uint32), np.zeros(3, np.uint64), 0)
    c.put(4, 5, parent=keys_of(3).tobytes())
    c.core.take_changes()
    c.put(100, 101, 102)
    assert c.removed() == [5, 4]
    with pytest.raises(BadArgument):
        c.reserve(7, parent=b"short")


def test_own_work_is_neither_counted_nor_a_use() -> None:
    c = Client(2)
    c.put(1, 2)
    c.core.release(c.session, [c.lease(2, counted=False)], 0)
    assert (c.core.hits, c.core.misses) == (0, 0)
    c.core.take_changes()
    c.put(3)
    assert c.removed() == [2]


def test_unknown_policies_and_other_sizes_are_refused() -> None:
    with pytest.raises(BadArgument):
        SourceCore(SourceConfig(1 << 20, 4, eviction="newest"))
    with pytest.raises(BadArgument):
        SourceCore(SourceConfig(1 << 20, 4), Client(4, entries=5).core.arrays)


def test_a_thousand_blocks_need_no_more_scans_than_a_few() -> None:
    """What is over a quota must not cost a look at every entry for each call."""
    c = Client(4096, entries=1 << 16)
    c.core.set_quota(2048 * PAGE, tenant="t")
    for first in range(0, 8000, 100):
        c.put(*range(first, first + 100), tenant="t")
    quota = next(iter(c.core.quotas_set._quotas.values()))
    assert quota.coldest.scans < 30


def test_finished_reservations_are_forgotten_beyond_a_number_of_keys() -> None:
    """They are kept for writers that lost the answer of a commit, not for ever and in any number."""
    c = Client(64, finished_rows_max=10)
    first, second = c.put(*range(6)).reservation, c.put(*range(6, 12)).reservation
    c.put(20)
    no_rows = np.zeros(0, np.uint32)
    with pytest.raises(UnknownReservation):
        c.core.commit(c.session, first, no_rows, no_rows, no_rows.astype(np.uint64), 0)
    assert c.core.commit(c.session, second, no_rows, no_rows, no_rows.astype(np.uint64), 0) == 0
