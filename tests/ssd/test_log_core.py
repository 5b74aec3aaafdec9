"""The log's core beside a plain account of what is on disk: dictionaries, and what a restart would make of them."""

import numpy as np
import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvpool.core.errors import BadArgument
from kvpool.core.ssd.format import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    FOOTER_ENTRY,
    FORMAT_VERSION,
    PAGE_BYTES,
    RecordKind,
    align,
    descriptor_verifies,
    footer_bytes,
    is_packed,
    pack_footer,
    pack_segment_header,
    pack_store_header,
    place_seed,
    place_seeds,
    read_footer,
    read_segment_header,
    read_store_header,
    read_trailer,
    record_bytes,
    record_bytes_of,
    segment_name,
    segment_number,
    sign_descriptors,
)
from kvpool.core.ssd.log import LogConfig, LogCore, SegmentSpace
from kvpool.core.ssd.reclaim import Effort, heads_in, heads_to_bury, plan_reclaim
from kvpool.core.ssd.rows import NO_ROW, RowState

from .records_made import key_of, keys_of

CONFIG = LogConfig(segment_bytes=16 * PAGE_BYTES, segments_max=6, rows_max=512)
NUMBERS = st.lists(st.integers(0, 25), min_size=1, max_size=6, unique=True)
SIZES = st.sampled_from([1, 200, 4096, 16_384, 20_000])


class LogMachine(RuleBasedStateMachine):
    """Writes always succeed here; what a disk may do is in test_crash and test_faults."""

    def __init__(self):
        super().__init__()
        self.log = LogCore(CONFIG)
        #: What lies in each segment: entries as in a footer.
        self.disk = {}
        #: What must be readable: number to (segment, place, size); lost ones are not.
        self.expected = {}
        self.number_of = {key_of(number).tobytes(): number for number in range(26)}
        self.lost_on_disk = set()

    def write(self, numbers, sizes, kind, *, reclaiming=False, copying=False):
        done = 0
        rounds = 0
        while done < len(numbers):
            rounds += 1
            assert rounds < 30, "reclaiming gains nothing"
            placed = self.log.place(np.array(sizes[done:], np.uint64), np.zeros(len(numbers) - done, np.uint16))
            if placed is None:
                if reclaiming:
                    assert self.log.may_open(reclaiming=True), "the reserve was not enough"
                    self.open()
                elif not self.log.may_open(reclaiming=False) or self.log.rows_short():
                    self.give_back(Effort.KEEP if rounds < 5 else Effort.EVICT)
                else:
                    self.open()
                continue
            rounds = 0
            entries = np.zeros(len(placed), FOOTER_ENTRY)
            some = numbers[done : done + len(placed)]
            entries["key"], entries["size"] = keys_of(some), sizes[done : done + len(placed)]
            entries["sequence"], entries["position"], entries["kind"] = placed.sequences, placed.offsets, kind
            entries["section_count"] = entries["fidelity"] = 1
            namespaces = self.log.name_namespaces(entries["namespace"])
            self.log.commit(placed, entries, namespaces)
            self.disk[placed.segment] += list(entries)
            for number, entry in zip(some, entries, strict=True):
                self.expected.pop(number, None)
                if kind == RecordKind.DATA:
                    self.expected[number] = (placed.segment, int(entry["position"]), int(entry["size"]))
            done += len(placed)

    def open(self):
        if self.log.active is not None:
            entries = self.log.seal()
            assert len(entries) == self.log.segments[self.log.next_segment - 1].records
        self.disk[self.log.open_segment().number] = []

    @rule(numbers=NUMBERS, data=st.data())
    def append(self, numbers, data):
        self.write(numbers, [data.draw(SIZES) for _ in numbers], RecordKind.DATA)

    @rule(numbers=NUMBERS)
    def remove(self, numbers):
        rows = self.log.rows
        heads = rows.heads(keys_of(numbers))
        held = [
            n for n, row in zip(numbers, heads, strict=True) if row != NO_ROW and rows.kinds[row] == RecordKind.DATA
        ]
        if held:
            self.write(held, [0] * len(held), RecordKind.TOMBSTONE)

    @rule(numbers=NUMBERS)
    def touch(self, numbers):
        self.log.touch(self.log.rows.live(keys_of(numbers)))

    @rule(numbers=NUMBERS)
    def lose(self, numbers):
        rows = self.log.rows.live(keys_of(numbers))
        rows = rows[rows != NO_ROW]
        gone = self.log.lose(rows, self.log.rows.sequences[rows])
        assert len(gone) == len(rows)
        for key in gone:
            del self.expected[self.number_of[key.tobytes()]]

    @precondition(lambda self: len(self.disk) > 2)
    @rule()
    def reclaim(self):
        self.give_back(Effort.KEEP)

    def give_back(self, effort):
        """As the cleaner does it."""
        log = self.log
        plan = plan_reclaim(log, effort if log.may_open(reclaiming=True) else Effort.DROP)
        if plan is None:
            log.allow_one_more()
            plan = plan_reclaim(log)
        rows = plan.copy
        numbers = [self.number_of[key.tobytes()] for key in log.rows.key_bytes(rows)]
        self.write(numbers, log.rows.sizes[rows].tolist(), RecordKind.DATA, reclaiming=True)
        heads = heads_in(log, plan.segment)
        live = heads[log.rows.states[heads] == RowState.LIVE]
        for key in log.lose(live, log.rows.sequences[live]):
            del self.expected[self.number_of[key.tobytes()]]
        buried = heads_to_bury(log, plan.segment, heads)
        numbers = [self.number_of[key.tobytes()] for key in log.rows.key_bytes(buried)]
        self.write(numbers, [0] * len(numbers), RecordKind.TOMBSTONE, reclaiming=True)
        log.drop_segment(plan.segment)
        del self.disk[plan.segment]

    @invariant()
    def accounts_are_right(self):
        self.log.check_invariants()

    @invariant()
    def readable_is_what_was_put_last(self):
        rows = self.log.rows
        found = rows.live(keys_of(range(26)))
        for number, row in enumerate(found.tolist()):
            if row == NO_ROW:
                assert number not in self.expected
            else:
                place = (
                    int(rows.segments[row]),
                    int(rows.offsets(found[number : number + 1])[0]),
                    int(rows.sizes[row]),
                )
                assert place == self.expected[number]

    @invariant()
    def a_restart_finds_the_same(self):
        """Also what was lost: on disk it is as good as before. But never anything else."""
        again = LogCore(CONFIG)
        entries = [entry for number in self.disk for entry in self.disk[number]]
        numbers = [number for number in self.disk for _ in self.disk[number]]
        spaces = [SegmentSpace(n, self.log.segments[n].used_bytes, records=len(self.disk[n])) for n in self.disk]
        array = np.array(entries, FOOTER_ENTRY) if entries else np.zeros(0, FOOTER_ENTRY)
        assert again.restore(spaces, array, np.array(numbers, np.uint32))
        again.check_invariants()
        mine, its = self.log.rows.heads(keys_of(range(26))), again.rows.live(keys_of(range(26)))
        for number in range(26):
            state = self.log.rows.states[mine[number]] if mine[number] != NO_ROW else None
            assert (its[number] != NO_ROW) == (state in (RowState.LIVE, RowState.LOST)), number
            if its[number] != NO_ROW:
                assert again.rows.sequences[its[number]] == self.log.rows.sequences[mine[number]]


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None, derandomize=True)


def test_a_listing_in_row_order_misses_nothing_that_stays():
    machine = LogMachine()
    machine.write(list(range(20)), [20_000] * 8 + [300] * 12, RecordKind.DATA)
    first, cursor = machine.log.live_page(0, 10)
    seen = {machine.number_of[key.tobytes()] for key in machine.log.rows.key_bytes(first)}
    # Segments are copied and keys replaced between the pages: rows of keys stay where they are.
    machine.write([20, 21, 22], [20_000] * 3, RecordKind.DATA)
    machine.reclaim()
    machine.write([5], [300], RecordKind.DATA)
    while cursor is not None:
        page, cursor = machine.log.live_page(cursor, 3)
        numbers = [machine.number_of[key.tobytes()] for key in machine.log.rows.key_bytes(page)]
        assert not seen & set(numbers)
        seen |= set(numbers)
    assert seen >= set(machine.expected) & set(range(20))


def test_what_was_read_survives_one_eviction():
    machine = LogMachine()
    machine.write([1, 2, 3, 4, 5], [4096] * 5, RecordKind.DATA)
    for number in range(6, 26):
        if 1 not in machine.expected:
            break
        machine.touch([1])
        machine.write([number], [20_000], RecordKind.DATA)
        if 2 not in machine.expected:
            break
    assert 1 in machine.expected
    assert 2 not in machine.expected


def test_memory_a_record_is_bounded():
    log = LogCore(LogConfig(segment_bytes=1 << 30, segments_max=4, rows_max=1 << 16))
    assert log.rows.memory_bytes < 80 * 1024
    log.rows._allocate(1 << 16)
    assert log.rows.memory_bytes <= 80 * (1 << 16)


@pytest.mark.parametrize(
    "fields",
    [{"segment_bytes": 4097 * 8}, {"segment_bytes": PAGE_BYTES}, {"segments_max": 3}, {"rows_max": 3}],
)
def test_impossible_configurations_are_refused(fields):
    good = {"segment_bytes": 16 * PAGE_BYTES, "segments_max": 6, "rows_max": 512}
    with pytest.raises(BadArgument):
        LogConfig(**{**good, **fields})


def test_record_bytes_and_its_vector_agree():
    sizes = [0, 1, 64, 255, 4096, 16_384, 16_385, 20_480, 1 << 20, (1 << 20) + 1]
    for name in (0, 1, 1024):
        vector = record_bytes_of(np.array(sizes, np.uint64), np.full(len(sizes), name, np.uint16))
        assert vector.tolist() == [record_bytes(size, name) for size in sizes]
        assert all(bytes_ >= DESCRIPTOR_BYTES + name + size for bytes_, size in zip(vector[:6], sizes, strict=False))
        assert all(bytes_ == PAGE_BYTES + align(size) for bytes_, size in zip(vector[6:], sizes[6:], strict=True))


def test_headers_and_footers_verify_only_where_they_belong():
    uuid, other = bytes(range(16)), bytes(16)
    header = pack_segment_header(uuid, 5, 1 << 16, 77)
    assert read_segment_header(header, uuid, 5) == 77
    assert read_segment_header(header, uuid, 6) is read_segment_header(header, other, 5) is None
    assert read_store_header(pack_store_header(uuid, 1 << 16)) == (uuid, 1 << 16)
    entries = np.zeros(3, FOOTER_ENTRY)
    entries["sequence"] = [4, 5, 6]
    packed = pack_footer(uuid, 5, 1 << 16, 8192, entries)
    body, last = packed[:-PAGE_BYTES], packed[-PAGE_BYTES:]
    trailer = read_trailer(last, uuid, 5)
    assert (read_footer(body, trailer, uuid, 5) == entries).all()
    assert read_trailer(last, uuid, 6) is None
    for page, read in (
        (header, lambda raw: read_segment_header(raw, uuid, 5)),
        (last, lambda raw: read_trailer(raw, uuid, 5)),
    ):
        for at in (8, 20, 40, 60):
            garbled = bytearray(page)
            garbled[at] ^= 1
            assert read(bytes(garbled)) is None
    garbled = bytearray(body)
    garbled[100] ^= 1
    assert read_footer(bytes(garbled), trailer, uuid, 5) is None
    assert FORMAT_VERSION == 1
    assert [segment_number(segment_name(n)) for n in (0, 7, 1 << 40)] == [0, 7, 1 << 40]
    assert segment_number("store") is segment_number("seg-xyz") is segment_number("seg-" + "0" * 15 + "G") is None


@pytest.mark.parametrize("limit", [1, 7, 64, 1000])
def test_pages_list_each_readable_row_once(monkeypatch, limit):
    monkeypatch.setattr("kvpool.core.ssd.log._PAGE_ROWS", 16)
    core = LogCore(LogConfig(8 * PAGE_BYTES, 8, 1024))
    rng = np.random.default_rng(limit)
    core.rows.states[:] = np.where(rng.random(1024) < 0.2, RowState.LIVE, rng.integers(0, 6, 1024))
    found, cursor = [], 0
    while cursor is not None:
        rows, cursor = core.live_page(cursor, limit)
        assert len(rows) == limit or cursor is None
        found += rows.tolist()
    assert found == np.flatnonzero(core.rows.states == RowState.LIVE).tolist()


def test_seeds_of_many_places_are_those_of_each():
    rng = np.random.default_rng(5)
    seeds = rng.integers(0, 1 << 64, 200, dtype=np.uint64)
    offsets = rng.integers(0, 1 << 40, 200)
    one_by_one = [place_seed(seed, offset) for seed, offset in zip(seeds.tolist(), offsets.tolist(), strict=True)]
    assert place_seeds(seeds, offsets).tolist() == one_by_one


@pytest.mark.parametrize("count", [0, 1, 300])
def test_signed_descriptors_verify_where_they_were_signed(count):
    """As one by one, with another implementation of the checksum; names are part of it."""
    rng = np.random.default_rng(count)
    descriptors = rng.integers(0, 256, count * DESCRIPTOR_BYTES, dtype=np.uint8).view(DESCRIPTOR)
    names = [rng.bytes(rng.integers(1, 1000)) if rng.integers(2) else b"" for _ in range(count)]
    descriptors["kind"], descriptors["section_count"] = RecordKind.DATA, 1
    descriptors["name_bytes"] = [len(name) for name in names]
    offsets, seed = rng.integers(0, 1 << 40, count), int(rng.integers(0, 1 << 64, dtype=np.uint64))
    sign_descriptors(descriptors, names, offsets, seed)
    for row, (name, offset) in enumerate(zip(names, offsets.tolist(), strict=True)):
        raw = np.frombuffer(descriptors[row].tobytes() + name, np.uint8)
        assert xxhash.xxh3_64_intdigest(raw[16:], place_seed(seed, offset)) == int(descriptors[row]["checksum"])
        assert descriptor_verifies(raw, offset, seed)
        assert not descriptor_verifies(raw, offset + 64, seed)


@pytest.mark.parametrize("seed", range(20))
def test_many_records_lie_where_each_would(seed):
    """As one by one: large ones begin on a page, and none lies beyond where the footer of all must begin."""
    rng = np.random.default_rng(seed)
    kinds = [[1, 200, 16_384], [16_385, 20_000, 65_536], [1, 16_384, 16_385, 65_536]][seed % 3]
    sizes, name_bytes = rng.choice(kinds, 200).astype(np.uint64), rng.integers(0, 1000, 200).astype(np.uint16)
    core = LogCore(LogConfig(int(rng.integers(8, 900)) * PAGE_BYTES, 8, 8 * int(rng.integers(8, 300))))
    segment = core.open_segment()
    segment.used_bytes = PAGE_BYTES * int(rng.integers(1, 8))
    expected, at = [], segment.used_bytes
    for size, name in zip(sizes.tolist(), name_bytes.tolist(), strict=True):
        begin = at if is_packed(size) else align(at)
        end = begin + record_bytes(size, name)
        if len(expected) == core.config.rows_max // 8:
            break
        if align(end) + footer_bytes(len(expected) + 1) > core.config.segment_bytes:
            break
        expected.append(begin)
        at = end
    placed = core.place(sizes, name_bytes)
    assert (placed.offsets.tolist() if placed else []) == expected
    if placed:
        assert (placed.end, segment.used_bytes) == (align(at), align(at))
        assert placed.sequences.tolist() == list(range(1, len(expected) + 1))
