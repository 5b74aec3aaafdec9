"""Reads without a call: what is found, what is a miss for certain, and what the reader must not believe."""

import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvpool.channels.base import ChannelError
from kvpool.channels.sections import digest_blocks
from kvpool.channels.shared_index import SharedIndex
from kvpool.channels.shm import READERS, ShmChannel
from kvpool.core.arrays import FLAG_LOWER_TIER, FLAGS, TABLE_VERSION, TOUCHES_MAX, EntryState, SourceArrays
from kvpool.core.errors import BadArgument, Unavailable
from kvpool.core.ids import Fidelity
from kvpool.core.index import BlockIndex, NewEntries
from kvpool.core.kernels import probing
from kvpool.tiers.dram import Segment

ENTRIES, DATA_BYTES, NUMBER = 64, 4 << 20, 3
SLOT_BYTES = DATA_BYTES // ENTRIES


def new_entries(keys, *, size=4096, sections=4, number=NUMBER, fidelity=1):
    count = len(keys)
    return NewEntries(
        keys, np.zeros(count, dtype=np.int64), np.full(count, size, dtype=np.uint64), np.zeros(count, dtype=np.uint16),
        number, 0, Fidelity(fidelity), sections,
    )  # fmt: skip


class Source:
    """A segment with an index and blocks, each in the slot of its entry."""

    def __init__(self, folder, entries=ENTRIES):
        self.segment = Segment.create(
            folder,
            "shared",
            data_bytes=DATA_BYTES,
            index_bytes=SourceArrays.bytes_needed(entries),
            touch_bytes=entries,
        )
        self.arrays = SourceArrays.over(self.segment.index, entries, fresh=True, touches=self.segment.touches)
        self.index = BlockIndex(self.arrays)
        self.rng = np.random.default_rng(5)
        self.parameters = {"path": str(self.segment.path), "uuid": self.segment.uuid.hex()}

    def store(self, count, *, size=4096, sections=4, number=NUMBER, fidelity=1, keys=None, publish=True):
        """Blocks with random bytes. Returns keys, data, entries."""
        if keys is None:
            keys = self.rng.integers(0, 256, (count, 16), dtype=np.uint8)
        data = self.rng.integers(0, 256, (count, size), dtype=np.uint8)
        entries = self.index.insert(new_entries(keys, size=size, sections=sections, number=number, fidelity=fidelity))
        a = self.arrays
        a.offsets[entries] = entries * SLOT_BYTES
        addresses = (data.ctypes.data + np.arange(count) * size).astype(np.uint64)
        a.digests[entries, :sections] = digest_blocks(addresses, np.full(count, size, np.uint64), keys, sections)
        for row, entry in enumerate(entries.tolist()):
            self.segment.data[entry * SLOT_BYTES : entry * SLOT_BYTES + size] = data[row]
        if publish:
            self.index.publish(entries)
        return keys, data, entries

    def remove(self, entries):
        self.index.unlink(entries)
        self.index.free(entries)


@pytest.fixture
def source(tmp_path):
    made = Source(tmp_path)
    yield made
    made.segment.close()


@pytest.fixture
def shared(source):
    index = SharedIndex.open(source.parameters)
    yield index
    index.close()


def read_all(shared, found, size=4096, **options):
    out = np.zeros((len(found), size), dtype=np.uint8)
    return shared.read(found, out, deadline_s=60, **options), out


def test_what_is_stored_is_found_and_read(source, shared):
    keys, data, entries = source.store(10)
    found = shared.find(NUMBER, keys)
    assert found.hit.all() and not found.definite_miss.any() and len(found) == 10
    assert (found.entries == entries).all() and (found.sizes == 4096).all() and (found.section_counts == 4).all()
    assert shared.lookup(NUMBER, keys)[0].all()
    for verify in (True, False):
        good, out = read_all(shared, found, verify=verify)
        assert good.all() and np.array_equal(out, data)


def test_what_is_not_readable_is_a_definite_miss(source, shared):
    keys, _, _ = source.store(2)
    writing, _, _ = source.store(2, publish=False)
    lossy, _, _ = source.store(2, fidelity=2)
    removed, _, entries = source.store(2)
    source.remove(entries)
    elsewhere, _, _ = source.store(2, number=NUMBER + 1)
    for missing in (writing, lossy, removed, elsewhere, source.rng.integers(0, 256, (5, 16), dtype=np.uint8)):
        found = shared.find(NUMBER, missing)
        assert found.definite_miss.all() and not found.hit.any()
        hit, miss = shared.lookup(NUMBER, missing)
        assert miss.all() and not hit.any()
        good, out = read_all(shared, found)
        assert not good.any() and not out.any()
    assert shared.find(NUMBER + 1, elsewhere).hit.all() and shared.find(NUMBER, keys).hit.all()


def test_no_keys_at_all(shared):
    found = shared.find(NUMBER, np.zeros((0, 16), dtype=np.uint8))
    assert len(found) == 0 and shared.lookup(NUMBER, np.zeros((0, 16), dtype=np.uint8))[0].shape == (0,)
    assert len(read_all(shared, found)[0]) == 0


def test_rows_of_any_order_sizes_and_memory(source, shared):
    small, small_data, _ = source.store(3, size=1000, sections=1)
    large, large_data, _ = source.store(3, size=8000, sections=8)
    missing = source.rng.integers(0, 256, (1, 16), dtype=np.uint8)
    found = shared.find(NUMBER, np.concatenate([small, missing, large]))
    assert found.hit.tolist() == [True] * 3 + [False] + [True] * 3
    out = np.zeros((9, 8000), dtype=np.uint8)
    rows = np.array([8, 0, 4, 1, 2, 7, 6], dtype=np.int64)
    good = shared.read(found, out, rows, deadline_s=60)
    assert (good == found.hit).all() and not out[[1, 3, 5]].any()
    assert np.array_equal(out[[8, 0, 4], :1000], small_data) and np.array_equal(out[[2, 7, 6]], large_data)

    hits = found.take(found.hit)
    memory = [np.zeros(int(size), dtype=np.uint8) for size in hits.sizes]
    assert shared.read(hits, memory, deadline_s=60).all()
    expected = [*small_data, *large_data]
    assert all(np.array_equal(one, other) for one, other in zip(memory, expected, strict=True))
    with pytest.raises(BadArgument, match="can't hold"):
        shared.read(hits, np.zeros((9, 7999), dtype=np.uint8), deadline_s=60)


def test_reading_marks_as_used_and_finding_does_not(source, shared):
    keys, _, entries = source.store(6)
    found = shared.find(NUMBER, keys)
    shared.lookup(NUMBER, keys)
    assert not source.arrays.touches.any()
    source.segment.data[int(entries[0]) * SLOT_BYTES] ^= 1
    good, _ = read_all(shared, found.take(np.arange(4)))
    assert good.tolist() == [False, True, True, True]
    assert np.flatnonzero(source.arrays.touches).tolist() == sorted(entries[1:4].tolist())
    assert source.arrays.touches.max() == 1
    for reads in (2, 3, 3):
        read_all(shared, found.take(np.arange(2, 4)))
        assert source.arrays.touches[entries[2:4]].tolist() == [min(reads, TOUCHES_MAX)] * 2, "counted, up to a bound"
    assert source.arrays.touches[entries[1]] == 1


def test_bytes_that_changed_are_not_good(source, shared):
    keys, data, entries = source.store(3)
    found = shared.find(NUMBER, keys)
    source.segment.data[int(entries[1]) * SLOT_BYTES + 4095] ^= 1
    good, out = read_all(shared, found)
    assert good.tolist() == [True, False, True] and np.array_equal(out[[0, 2]], data[[0, 2]])
    # What only a digest can see, a reader that wants none does not see.
    assert read_all(shared, found, verify=False)[0].all()


@pytest.mark.parametrize("verify", [True, False])
def test_an_entry_that_changed_after_the_look_is_not_good(source, shared, verify):
    keys, _, entries = source.store(4)
    found = shared.find(NUMBER, keys)
    source.remove(entries[:1])  # gone
    source.remove(entries[1:2])
    source.store(1, keys=keys[1:2])  # in the same entry and place, with other bytes
    source.index.unlink(entries[2:3])  # going, its bytes still there
    good, _ = read_all(shared, found, verify=verify)
    assert good.tolist() == [False, False, False, True]


def test_a_miss_while_the_table_changes_is_not_definite(source, shared):
    keys, _, _ = source.store(3)
    missing = source.rng.integers(0, 256, (700, 16), dtype=np.uint8)  # more than there are retries
    source.arrays.header[TABLE_VERSION] += np.uint64(1)
    found = shared.find(NUMBER, np.concatenate([keys, missing]))
    assert found.hit.tolist() == [True] * 3 + [False] * 700 and not found.definite_miss.any()
    assert shared.lookup(NUMBER, keys)[0].all()
    source.arrays.header[TABLE_VERSION] += np.uint64(1)
    assert shared.find(NUMBER, missing).definite_miss.all()


@pytest.mark.parametrize("before, after, held", [(4, 4, True), (4, 6, False), (4, 5, False), (5, 5, False)])
def test_a_table_held_still_if_its_version_was_even_and_is_the_same(before, after, held):
    header = np.zeros(16, dtype=np.uint64)
    header[TABLE_VERSION] = after
    assert probing._table_held(probing.read_only(header), np.uint64(before)) is held


def test_objects_are_left_to_the_source(source, shared):
    keys, _, entries = source.store(2)
    source.arrays.name_bytes[entries[0]] = 5
    found = shared.find(NUMBER, keys)
    assert found.hit.tolist() == [False, True] and not found.definite_miss.any()
    hit, miss = shared.lookup(NUMBER, keys)
    assert hit.tolist() == [False, True] and not miss.any()


@pytest.mark.parametrize(
    "field, value",
    [("offsets", DATA_BYTES - 4095), ("offsets", 2**64 - 1), ("sizes", DATA_BYTES + 1), ("sizes", 2**64 - 4),
     ("section_counts", 0), ("section_counts", 9), ("section_counts", 7)],
)  # fmt: skip
def test_an_index_that_makes_no_sense_leads_nowhere(source, shared, field, value):
    keys, _, entries = source.store(2)
    getattr(source.arrays, field)[entries[0]] = value
    found = shared.find(NUMBER, keys)
    assert found.hit.tolist() == [False, True] and not found.definite_miss.any()


def test_a_table_that_makes_no_sense_ends_the_search(source, shared):
    keys, _, _ = source.store(2)
    source.arrays.buckets[:] = 1  # full, and all of it one entry
    found = shared.find(NUMBER, keys)
    assert found.hit.tolist() == [True, False]
    source.arrays.buckets[:] = 0xFFFFFFFF
    assert not shared.find(NUMBER, keys).hit.any()


def test_the_flag_of_a_lower_tier_is_read_anew(source, shared):
    assert not shared.has_lower_tier
    source.arrays.header[FLAGS] = FLAG_LOWER_TIER
    assert shared.has_lower_tier


def test_no_time_is_an_error_and_not_a_wait(source, shared):
    keys, _, _ = source.store(3)
    with pytest.raises(ChannelError, match="deadline"):
        read_all_late = np.zeros((3, 4096), dtype=np.uint8)
        shared.read(shared.find(NUMBER, keys), read_all_late, deadline_s=-1)


def test_closing(source):
    shared = SharedIndex.open(source.parameters)
    keys, data, _ = source.store(2)
    found = shared.find(NUMBER, keys)
    shared.close()
    shared.close()
    for call in (
        lambda: shared.find(NUMBER, keys), lambda: shared.lookup(NUMBER, keys), lambda: read_all(shared, found),
        lambda: shared.has_lower_tier,
    ):  # fmt: skip
        with pytest.raises(ChannelError, match="closed"):
            call()
    again = SharedIndex.open(source.parameters)
    assert np.array_equal(read_all(again, again.find(NUMBER, keys))[1], data)
    again.close()


def test_bad_offers_and_keys(source, shared, tmp_path):
    with pytest.raises(BadArgument):
        SharedIndex.open({"path": source.parameters["path"]})
    with pytest.raises(Unavailable):
        SharedIndex.open({"path": str(tmp_path / "none"), "uuid": source.parameters["uuid"]})
    with pytest.raises(Unavailable):
        SharedIndex.open({**source.parameters, "uuid": bytes(16).hex()})
    with pytest.raises(BadArgument):
        shared.find(NUMBER, np.zeros((2, 8), dtype=np.uint8))
    odd = np.zeros(16 * 3 + 1, dtype=np.uint8)[1:].reshape(3, 16)  # not aligned
    odd.flags.writeable = False
    assert shared.find(NUMBER, odd).definite_miss.all()


def test_an_index_of_another_layout_is_refused(source):
    source.arrays.header[1] += np.uint64(1)
    with pytest.raises(Unavailable, match="another layout"):
        SharedIndex.open(source.parameters)
    source.arrays.header[1] -= np.uint64(1)
    SharedIndex.open(source.parameters).close()


def test_one_mapping_serves_all_users_of_a_segment(source):
    first, second = SharedIndex.open(source.parameters), SharedIndex.open(source.parameters)
    channel = ShmChannel.open(source.parameters)
    path, uuid = source.segment.path, source.segment.uuid
    mapping = READERS.acquire(path, uuid)
    READERS.release(mapping)
    keys, data, _ = source.store(1)
    first.close()
    channel.close()
    assert READERS.acquire(path, uuid) is mapping
    READERS.release(mapping)
    assert np.array_equal(read_all(second, second.find(NUMBER, keys))[1], data)
    second.close()
    assert len(mapping.data) == 0
    fresh = READERS.acquire(path, uuid)
    assert fresh is not mapping
    READERS.release(fresh)


def test_a_mapping_is_not_given_to_new_users_once_its_owner_has_ended(tmp_path):
    source = Source(tmp_path)
    keys, data, _ = source.store(2)
    first = SharedIndex.open(source.parameters)
    del source.arrays, source.index  # the lock goes with the last view of the owner's mapping
    source.segment.close(keep=True)
    with pytest.raises(Unavailable, match="has ended"):
        SharedIndex.open(source.parameters)
    good, out = read_all(first, first.find(NUMBER, keys))  # what it left is still right
    assert good.all() and np.array_equal(out, data)
    first.close()


def test_kernels_are_compiled_for_one_signature(source, shared):
    """Of a reader's mapping and of the owner's own: a second signature would be compiled in a request."""
    keys, _, _ = source.store(1)
    read_all(shared, shared.find(NUMBER, keys))
    shared.lookup(NUMBER, keys)
    probing.warm_up()
    assert [len(kernel.signatures) for kernel in (probing.probe, probing.find, probing.confirm)] == [1, 1, 1]


def test_keys_that_stay_are_never_missed_while_others_come_and_go(tmp_path):
    """A writer in another thread shifts buckets all the time; many chains run through those of keys that stay."""
    source = Source(tmp_path, entries=2048)
    kept = source.rng.integers(0, 256, (1000, 16), dtype=np.uint8)
    source.index.publish(source.index.insert(new_entries(kept)))
    shared = SharedIndex.open(source.parameters)
    stop = threading.Event()

    def churn():
        rng = np.random.default_rng(11)
        while not stop.is_set():
            entries = source.index.insert(new_entries(rng.integers(0, 256, (1040, 16), dtype=np.uint8)))
            source.index.discard(entries)
            source.index.free(entries)

    thread = threading.Thread(target=churn)
    thread.start()
    asked, hits = np.tile(kept, (20, 1)), 0
    try:
        for _ in range(300):
            found = shared.find(NUMBER, asked)
            assert not found.definite_miss.any()
            hits += int(found.hit.sum())
    finally:
        stop.set()
        thread.join()
    assert hits and shared.lookup(NUMBER, kept)[0].all()
    shared.close()
    source.segment.close()


class AgainstADict(RuleBasedStateMachine):
    """Any sequence of changes: find and read answer as a dictionary of what was committed."""

    def __init__(self):
        super().__init__()
        entries = 16
        arrays = SourceArrays.allocate(entries)
        self.index, self.arrays = BlockIndex(arrays), arrays
        self.readable, self.writing = {}, {}
        self.universe = np.random.default_rng(2).integers(0, 256, (24, 16), dtype=np.uint8)

    @rule(key=st.integers(0, 23), number=st.integers(0, 2), fidelity=st.integers(1, 2))
    def insert(self, key, number, fidelity):
        if key in self.readable or key in self.writing or not self.index.free_count:
            return
        entries = self.index.insert(new_entries(self.universe[key : key + 1], number=number, fidelity=fidelity))
        self.writing[key] = (entries, number, fidelity)

    @rule(data=st.data())
    def publish(self, data):
        if self.writing:
            key = data.draw(st.sampled_from(sorted(self.writing)))
            self.readable[key] = self.writing.pop(key)
            self.index.publish(self.readable[key][0])

    @rule(data=st.data())
    def remove(self, data):
        if both := {**self.readable, **self.writing}:
            key = data.draw(st.sampled_from(sorted(both)))
            if self.writing.pop(key, None):
                self.index.discard(both[key][0])
            else:
                del self.readable[key]
                self.index.unlink(both[key][0])
            self.index.free(both[key][0])

    @invariant()
    def answers_are_those_of_the_dict(self):
        words = self.universe.view(np.uint64)
        for number in range(3):
            answers = np.empty(24, dtype=np.uint8)
            probing.probe(number, words, *probing.searched_arrays(self.arrays), answers)
            expected = [
                probing.HIT if self.readable.get(key, (None, None, None))[1:] == (number, 1) else probing.MISS
                for key in range(24)
            ]
            assert answers.tolist() == expected
        assert int(self.arrays.header[TABLE_VERSION]) % 2 == 0
        readable = {int(entry[0][0]) for entry in self.readable.values()}
        assert set(np.flatnonzero(self.arrays.states == EntryState.READABLE).tolist()) == readable


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
