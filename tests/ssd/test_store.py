"""The store on real files: what goes in comes out, replaced and removed things stay so, space is reclaimed."""

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvpool.core.changes import ChangeKind
from kvpool.core.errors import BadArgument, NoSsd
from kvpool.core.ssd.records import SsdState
from kvpool.tiers.ssd.store import SsdStore, segment_bytes_for

from .records_made import NAMESPACE, batch_of, content, digests_of, key_of, keys_of, name_of, read_all

SEGMENT_BYTES = 1 << 20
CAPACITY_BYTES = 16 << 20


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def store(request, tmp_path):
    store = SsdStore.open(tmp_path, "a", CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, io_depth=4, direct=request.param)
    yield store
    store.close()


def reopen(store, tmp_path):
    direct = store.stats().direct
    store.close()
    return SsdStore.open(tmp_path, "a", CAPACITY_BYTES, io_depth=4, direct=direct)


SIZES = [1, 63, 64, 300, 4095, 4096, 4097, 16_383, 16_384, 16_385, 20_480, 65_536, 100_001, 1 << 19]


def aligned(size):
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def test_every_size_comes_back_before_and_after_a_restart(store, tmp_path):
    records = [(number, 0, size) for number, size in enumerate(SIZES)]
    assert store.append(batch_of(records)).all()
    expected = {number: content(number, 0, size).tobytes() for number, size in enumerate(SIZES)}
    assert read_all(store, list(range(len(SIZES)))) == expected
    assert store.audit() == ()
    again = reopen(store, tmp_path)
    assert read_all(again, list(range(len(SIZES)))) == expected
    assert again.audit() == ()
    stats = again.stats()
    assert stats.space.records == len(SIZES)
    assert stats.space.payload_bytes == sum(SIZES)
    assert stats.counters.recovered_records == len(SIZES)
    # Only header, footer and trailer of one sealed segment were read.
    assert stats.counters.recovered_bytes == 3 * 4096
    again.close()


@pytest.mark.parametrize("sections", [1, 4, 8])
def test_memory_on_pages_is_read_and_written_in_place(store, sections):
    sizes = [32_768, 65_536, 40_000]
    payloads = [aligned(size) for size in sizes]
    keys = keys_of(range(3))
    for number, payload in enumerate(payloads):
        payload[:] = content(number, 0, payload.size)
    batch = batch_of([(number, 0, size) for number, size in enumerate(sizes)], sections=sections, named=False)
    batch.payloads[:] = payloads
    assert store.append(batch).all()
    targets = [aligned(size) for size in sizes]
    answer = store.read(keys, targets)
    assert answer.good.all()
    assert all((a == b).all() for a, b in zip(targets, payloads, strict=True))
    assert (answer.digests[:, :sections] == digests_of(keys, payloads, sections)).all()
    assert answer.section_counts.tolist() == [sections] * 3


def test_records_larger_than_one_read_come_in_parts(tmp_path):
    with_room = SsdStore.open(tmp_path, "big", 64 << 20, segment_bytes=16 << 20)
    size = (9 << 20) + 77
    assert with_room.append(batch_of([(1, 0, size), (2, 0, 100)])).all()
    assert read_all(with_room, [1, 2]) == {1: content(1, 0, size).tobytes(), 2: content(2, 0, 100).tobytes()}
    with_room.close()


def test_facts_digests_and_names(store):
    batch = batch_of([(1, 0, 400), (2, 0, 30_000)], sections=2, fidelity=2)
    assert store.append(batch).all()
    keys = keys_of([1, 9, 2])
    assert store.contains(keys).tolist() == [True, False, True]
    stored = store.describe_stored(keys)
    facts = stored.facts
    assert facts.present.tolist() == [True, False, True]
    assert facts.sizes.tolist() == [400, 0, 30_000]
    assert facts.section_counts.tolist() == [2, 0, 2]
    assert facts.fidelities.tolist() == [2, 0, 2]
    assert facts.namespace_ids[0].tobytes() == NAMESPACE
    assert stored.names == [name_of(1), b"", name_of(2)]
    assert (stored.digests[[0, 2], :2] == batch.digests).all()


def test_an_object_is_replaced_and_a_block_is_not_written_twice(store, tmp_path):
    assert store.append(batch_of([(1, 0, 5000)])).all()
    assert store.append(batch_of([(1, 1, 70_000)])).all()
    assert read_all(store, [1])[1] == content(1, 1, 70_000).tobytes()
    writes = store.stats().counters.writes
    blocks = batch_of([(2, 0, 5000)], named=False)
    assert store.append(blocks).all()
    assert store.append(blocks).all()
    assert store.stats().counters.writes == writes + 1
    again = reopen(store, tmp_path)
    assert read_all(again, [1])[1] == content(1, 1, 70_000).tobytes()
    assert again.audit() == ()
    again.close()


def test_the_last_of_equal_keys_in_a_batch_wins(store):
    assert store.append(batch_of([(1, 0, 500), (2, 0, 10), (1, 1, 600)])).all()
    assert read_all(store, [1, 2]) == {1: content(1, 1, 600).tobytes(), 2: content(2, 0, 10).tobytes()}


def test_a_removed_key_stays_removed_and_can_be_put_again(store, tmp_path):
    assert store.append(batch_of([(n, 0, 3000) for n in range(6)])).all()
    assert store.append(batch_of([(2, 1, 3000)])).all()
    assert store.remove(keys_of([1, 2, 2, 77])).all()
    again = reopen(store, tmp_path)
    found = read_all(again, range(6))
    assert [n for n in range(6) if found[n] is None] == [1, 2]
    assert again.append(batch_of([(2, 2, 9)])).all()
    third = reopen(again, tmp_path)
    assert read_all(third, [1, 2]) == {1: None, 2: content(2, 2, 9).tobytes()}
    assert third.audit() == ()
    third.close()


def test_a_namespace_goes_as_a_whole(store, tmp_path):
    other = bytes(16)
    assert store.append(batch_of([(n, 0, 100) for n in range(50)])).all()
    assert store.append(batch_of([(n, 0, 100) for n in range(50, 60)], namespace=other)).all()
    assert store.remove_namespace(NAMESPACE) == 50
    assert store.remove_namespace(b"x" * 16) == 0
    again = reopen(store, tmp_path)
    assert again.contains(keys_of(range(60))).tolist() == [False] * 50 + [True] * 10
    again.close()


def test_a_full_store_evicts_the_oldest_and_keeps_what_is_read(store):
    favourite = content(0, 0, 50_000).tobytes()
    assert store.append(batch_of([(0, 0, 50_000)])).all()
    for number in range(1, 500):
        assert store.append(batch_of([(number, 0, 80_000)])).all()
        if number % 20 == 0:
            assert read_all(store, [0])[0] == favourite
    stats = store.stats()
    assert stats.counters.evicted > 200
    assert stats.counters.copied > 0
    assert read_all(store, [0, 499]) == {0: favourite, 499: content(499, 0, 80_000).tobytes()}
    assert store.audit() == ()
    assert stats.space.bytes_total == CAPACITY_BYTES


def test_dead_space_is_reclaimed_without_losing_anything(store):
    """Replaced again and again: all of it stays, in a store only twice as large."""
    for version in range(12):
        for first in range(0, 60, 20):
            assert store.append(batch_of([(n, version, 60_000) for n in range(first, first + 20)])).all()
    assert all(read_all(store, range(60))[n] == content(n, 11, 60_000).tobytes() for n in range(60))
    stats = store.stats()
    assert stats.counters.evicted == 0
    assert stats.counters.compacted > 0 or stats.counters.copied == 0
    assert store.audit() == ()


def test_changes_are_told_in_order(store):
    assert store.append(batch_of([(1, 0, 100)], fidelity=2)).all()
    assert store.append(batch_of([(2, 0, 100)])).all()
    assert store.remove(keys_of([1])).all()
    taken = store.take_changes()
    assert [(change.kind, change.keys, change.fidelity) for change in taken.changes] == [
        (ChangeKind.STORED, key_of(1).tobytes(), 2),
        (ChangeKind.STORED, key_of(2).tobytes(), 1),
        (ChangeKind.REMOVED, key_of(1).tobytes(), 1),
    ]
    assert not taken.lost
    assert store.take_changes().changes == ()


def test_changes_add_up_to_what_is_there(store):
    for number in range(400):
        assert store.append(batch_of([(number, 0, 80_000)])).all()
        if number % 7 == 0:
            store.remove(keys_of([number]))
    held, listed = set(), None
    # A full store makes room by itself: until nothing has gone while it was listed.
    while (changes := store.take_changes().changes) or listed is None:
        for change in changes:
            keys = {change.keys[at : at + 16] for at in range(0, len(change.keys), 16)}
            held = held | keys if change.kind is ChangeKind.STORED else held - keys
        listed, cursor = set(), 0
        while cursor is not None:
            page = store.list(cursor, 37)
            listed |= {key.tobytes() for key in page.keys}
            cursor = page.next_cursor
    assert held == listed


def test_reads_beside_appends_and_reclaiming_never_see_other_bytes(store):
    stop = threading.Event()

    def read_on(seed):
        rng, good = np.random.default_rng(seed), 0
        # To the first good read at least, however late this thread comes to run.
        while not (stop.is_set() and good):
            numbers = rng.choice(80, 6, replace=False).tolist()
            keys = keys_of(numbers)
            targets = [np.zeros(size, np.uint8) for size in store.describe(keys).sizes.tolist()]
            for number, target, right in zip(numbers, targets, store.read(keys, targets).good.tolist(), strict=True):
                if right:
                    good += 1
                    # Its content names its version.
                    version = int.from_bytes(target[:4].tobytes(), "little")
                    assert (target[4:] == number ^ (version & 0xFF)).all()
        return good

    def put(number, version):
        payload = np.full(30_000 + 100 * number, number ^ (version & 0xFF), np.uint8)
        payload[:4] = np.frombuffer(version.to_bytes(4, "little"), np.uint8)
        batch = batch_of([(number, 0, payload.size)])
        batch.payloads[0] = payload
        batch.digests[:] = digests_of(batch.keys, [payload], 1)
        assert store.append(batch).all()

    with ThreadPoolExecutor(6) as threads:
        readers = [threads.submit(read_on, seed) for seed in (1, 2)]
        try:
            for version in range(4):
                list(threads.map(put, range(80), [version] * 80))
        finally:
            stop.set()
        assert all(reader.result() > 0 for reader in readers)
    assert store.audit() == ()


def test_appends_side_by_side_share_syncs(store):
    gate = threading.Barrier(8)

    def put(number):
        gate.wait(60)
        for i in range(10):
            assert store.append(batch_of([(number * 100 + i, 0, 100)])).all()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put, range(8)))
    assert store.stats().counters.appended == 80
    assert len([v for v in read_all(store, [n * 100 + i for n in range(8) for i in range(10)]).values() if v]) == 80


def test_wrong_sizes_and_shapes_are_refused(store):
    assert store.append(batch_of([(1, 0, 100)])).all()
    keys = keys_of([1])
    assert not store.read(keys, [np.zeros(99, np.uint8)]).good.any()
    assert store.contains(keys).all()
    for targets in ([], [np.zeros(100, np.uint16)], [np.zeros(200, np.uint8)[::2]]):
        with pytest.raises(BadArgument):
            store.read(keys, targets)
    read_only = np.zeros(100, np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(BadArgument):
        store.read(keys, [read_only])
    with pytest.raises(BadArgument):
        store.contains(keys[0])
    batch = batch_of([(1, 0, 100)])
    batch.section_counts[0] = 3
    with pytest.raises(BadArgument):
        store.append(batch)
    most = store.payload_bytes_max
    assert store.append(batch_of([(5, 0, most), (6, 0, most + 1)], named=False)).tolist() == [True, False]


def test_one_process_owns_a_store(store, tmp_path):
    with pytest.raises(NoSsd, match="owns"):
        SsdStore.open(tmp_path, "a", CAPACITY_BYTES)


def test_a_closed_store_says_so(tmp_path):
    store = SsdStore.open(tmp_path, "a", CAPACITY_BYTES)
    store.close()
    store.close()
    assert store.stats().state is SsdState.OFF
    with pytest.raises(NoSsd, match="closed"):
        store.append(batch_of([(1, 0, 10)]))
    with pytest.raises(NoSsd, match="closed"):
        store.read(keys_of([1]), [np.zeros(1, np.uint8)])


def test_close_waits_for_reads_in_flight(store):
    assert store.append(batch_of([(n, 0, 60_000) for n in range(40)])).all()
    keys, results, gate = keys_of(range(40)), [], threading.Barrier(2)

    def read_until_closed():
        gate.wait(60)
        while True:
            targets = [np.zeros(60_000, np.uint8) for _ in range(40)]
            try:
                good = store.read(keys, targets).good
            except NoSsd:
                return
            results.append(good.all() and all((t == content(n, 0, 60_000)).all() for n, t in enumerate(targets)))

    reader = threading.Thread(target=read_until_closed)
    reader.start()
    gate.wait(60)
    while not results:
        assert reader.is_alive()
    store.close()
    reader.join(60)
    assert not reader.is_alive() and all(results)


def test_bad_arguments_of_open(tmp_path):
    for name, capacity in (("", CAPACITY_BYTES), ("a/b", CAPACITY_BYTES), ("a", 1000)):
        with pytest.raises(BadArgument):
            SsdStore.open(tmp_path, name, capacity)


def test_a_smaller_capacity_is_reached_by_evicting(store, tmp_path):
    for number in range(150):
        assert store.append(batch_of([(number, 0, 80_000)])).all()
    direct = store.stats().direct
    store.close()
    small = SsdStore.open(tmp_path, "a", 5 * SEGMENT_BYTES, io_depth=4, direct=direct)
    assert small.append(batch_of([(1000, 0, 80_000)])).all()
    for number in range(1001, 1020):
        assert small.append(batch_of([(number, 0, 80_000)])).all()
    assert small.stats().space.bytes_total == 5 * SEGMENT_BYTES
    assert small.audit() == ()
    small.close()


@pytest.mark.parametrize("capacity", [4 << 20, 64 << 20, 4 << 30, 100 << 30, 4 << 40])
def test_segments_fit_their_capacity(capacity):
    size = segment_bytes_for(capacity)
    assert size % 4096 == 0
    assert 4 <= capacity // size <= 512
    assert size == 256 << 20 or capacity != 100 << 30
