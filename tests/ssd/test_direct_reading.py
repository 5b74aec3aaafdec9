"""The compiled loop reads what the plain way reads, and takes for good exactly what that takes for good."""

import mmap
import os

import numpy as np
import pytest

from kvpool.core.ssd.format import DESCRIPTOR_BYTES, is_packed
from kvpool.core.ssd.records import SsdRead
from kvpool.core.ssd.rows import NO_ROW
from kvpool.tiers.ssd import direct_reading, reading
from kvpool.tiers.ssd.direct_reading import RECORD_BYTES_MAX, read_directly, warm_up
from kvpool.tiers.ssd.lanes import Lanes
from kvpool.tiers.ssd.store import SsdStore

from .records_made import batch_of, content, keys_of, name_of

SEGMENT_BYTES = 8 << 20
#: Packed ones and large ones, whole pages and not; the last is too large for the loop.
SIZES = [8, 64, 4096, 16_384, 16_392, 20_480, 65_536, 100_008, 262_144, 3 << 20]


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def store(request, tmp_path):
    warm_up()
    store = SsdStore.open(
        tmp_path, "a", 16 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES, io_depth=4, direct=request.param
    )
    yield store
    store.close()


@pytest.fixture
def lanes():
    lanes = Lanes(4, "test-read", reading.ARENA_BYTES)
    yield lanes
    lanes.close()


@pytest.fixture(params=[0, 65_536, 1 << 20], ids=["straight", "both", "staged"])
def staged_bytes_max(request, monkeypatch):
    """Up to which size payloads go through the threads' memory."""
    monkeypatch.setattr(direct_reading, "STAGED_BYTES_MAX", request.param)


def target_of(size, aligned):
    memory = np.frombuffer(mmap.mmap(-1, size + 4096), np.uint8)
    return memory[:size] if aligned else memory[24 : 24 + size]


def fill(store, rng, count):
    """Records of all sizes in some order, objects and blocks, in groups of any length; (number, version, size) each."""
    records = [(number, 0, SIZES[rng.integers(len(SIZES) - 1)]) for number in range(count)]
    records += [(count + i, 0, size) for i, size in enumerate(SIZES)]
    at = 0
    while at < len(records):
        some = records[at : at + int(rng.integers(1, 40))]
        named = bool(rng.integers(2))
        assert store.append(batch_of(some, sections=int(rng.choice([1, 2, 4, 8])), named=named)).all()
        at += len(some)
    return records


class Asked:
    """What both ways are asked for: readable records of a store, each with a target of its own."""

    def __init__(self, store, records, rng):
        log, self.records = store._log, records
        self.targets = [target_of(size, bool(rng.integers(3))) for _, _, size in records]
        with log.lock:
            rows = log.core.rows.live(keys_of([number for number, _, _ in records]))
            assert (rows != NO_ROW).all()
            segments = [log.segments[number] for number in log.core.rows.segments[rows].tolist()]
            self.wanted = reading.locate(log, rows, segments, self.targets)
        self.log = log

    def directly(self, lanes, direct=None):
        """`direct`: as if the files bypassed the system's cache, which all files take."""
        answer = SsdRead.of(len(self.records))
        direct = self.log.files.direct if direct is None else direct
        return answer, read_directly(lanes, self.wanted, answer, direct=direct)

    def plainly(self, lanes):
        answer, rows = SsdRead.of(len(self.records)), list(range(len(self.records)))
        return answer, reading._read_plainly(self.log, lanes, self.wanted, rows, answer)


def segment_path(folder):
    """Of a store that has only one."""
    (path,) = (folder / "kvpool-a").glob("seg-*")
    return path


def check_same(one, other, rows):
    assert one.good[rows].tolist() == other.good[rows].tolist()
    assert np.array_equal(one.digests[rows], other.digests[rows])
    assert np.array_equal(one.section_counts[rows], other.section_counts[rows])
    assert np.array_equal(one.fidelities[rows], other.fidelities[rows])
    assert [one.names[row] for row in rows] == [other.names[row] for row in rows]


@pytest.mark.parametrize("seed", range(2))
def test_both_ways_read_the_same(store, lanes, staged_bytes_max, seed):
    rng = np.random.default_rng(seed)
    records = fill(store, rng, 200)
    # Neighbours, gaps between them, and the order they are asked for in.
    asked = Asked(store, [records[i] for i in rng.permutation(len(records))[: int(rng.integers(1, len(records)))]], rng)
    answer, quick = asked.directly(lanes)
    assert quick.bad == []
    large = [row for row, record in enumerate(asked.records) if record[2] > RECORD_BYTES_MAX]
    assert quick.left == large
    mine = [row for row in range(len(asked.records)) if row not in large]
    assert answer.good[mine].all()
    assert 0 < quick.reads <= len(mine)
    assert quick.read_bytes >= sum(asked.records[row][2] for row in mine)
    for row in mine:
        assert asked.targets[row].tobytes() == content(*asked.records[row]).tobytes()
        asked.targets[row][:] = 0
    plain, bad = asked.plainly(lanes)
    assert bad == []
    check_same(answer, plain, mine)
    assert set(plain.names) - {b""} <= {name_of(number) for number, _, _ in asked.records}
    for row, record in enumerate(asked.records):
        assert asked.targets[row].tobytes() == content(*record).tobytes()


def places(asked, row, rng):
    """Where in its file a record's bytes are that decide: all of its descriptor and name, some of its payload."""
    wanted, size = asked.wanted, asked.records[row][2]
    head = DESCRIPTOR_BYTES + wanted.name_bytes[row]
    payload = head if is_packed(size) else 4096
    some = [payload, payload + size - 1, payload + int(rng.integers(size))]
    return [wanted.offsets[row] + at for at in [*range(head), *some]]


@pytest.mark.parametrize("size", [64, 16_384, 20_480, 20_488])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_no_changed_byte_is_taken_for_good(tmp_path, lanes, size, named, direct):
    """A buffered store, so that what is written beside it is seen."""
    rng = np.random.default_rng(size)
    store = SsdStore.open(tmp_path, "a", 16 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES, direct=False)
    assert store.append(batch_of([(n, 0, size) for n in range(3)], sections=4, named=named)).all()
    asked = Asked(store, [(n, 0, size) for n in range(3)], rng)
    with segment_path(tmp_path).open("r+b", buffering=0) as file:
        for place in places(asked, 1, rng):
            before = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([before[0] ^ (1 << int(rng.integers(8)))]), place)
            answer, quick = asked.directly(lanes, direct)
            assert (quick.bad, quick.left) == ([1], []), place
            assert answer.good.tolist() == [True, False, True]
            plain, bad = asked.plainly(lanes)
            assert bad == [1]
            check_same(answer, plain, [0, 1, 2])
            os.pwrite(file.fileno(), before, place)
    assert asked.directly(lanes, direct)[0].good.all()
    store.close()


def test_records_that_lie_elsewhere_are_not_taken_for_good(store, lanes):
    """Each is whole, but not the one that is asked for: another key, version, size or place."""
    rng = np.random.default_rng(1)
    assert store.append(batch_of([(1, 0, 20_480), (2, 0, 20_480)], named=False)).all()
    asked = Asked(store, [(1, 0, 20_480), (2, 0, 20_480)], rng)
    wanted = asked.wanted
    wanted.offsets[0], wanted.ends[0] = wanted.offsets[1], wanted.ends[1]
    answer, quick = asked.directly(lanes)
    assert quick.bad == [0]
    assert answer.good.tolist() == [False, True]
    wanted = Asked(store, [(1, 0, 20_480), (2, 0, 20_480)], rng).wanted
    wanted.sequences[1] += 1
    answer = SsdRead.of(2)
    assert read_directly(lanes, wanted, answer, direct=store.stats().direct).bad == [1]


def test_the_end_of_a_file_is_left_and_then_a_miss(store, tmp_path):
    assert store.append(batch_of([(n, 0, 65_536) for n in range(8)], named=False)).all()
    os.truncate(segment_path(tmp_path), 300_000)
    keys = keys_of(range(8))
    targets = [target_of(65_536, True) for _ in range(8)]
    good = store.read(keys, targets).good
    # A header page, then 17 pages a record: four of them end within 300 000 bytes.
    assert good.tolist() == [True] * 4 + [False] * 4
    assert [targets[n].tobytes() == content(n, 0, 65_536).tobytes() for n in range(4)] == [True] * 4
    assert store.contains(keys).tolist() == good.tolist()
    assert store.stats().counters.digest_errors == 4


def test_an_error_is_found_by_the_plain_way(store):
    assert store.append(batch_of([(n, 0, 65_536) for n in range(3)], named=False)).all()
    # From now on the file's descriptor is one that can't be read from.
    (segment,) = store._log.segments.values()
    fd = segment.file._fd
    kept, unreadable = os.dup(fd), os.open("/dev/null", os.O_WRONLY)
    os.dup2(unreadable, fd)
    answer = store.read(keys_of([0]), [target_of(65_536, True)])
    os.dup2(kept, fd)
    os.close(kept)
    os.close(unreadable)
    assert not answer.good.any()
    assert store.stats().counters.io_errors == 1
    assert store.contains(keys_of(range(3))).tolist() == [False, True, True]
    assert store.read(keys_of([1, 2]), [target_of(65_536, True) for _ in range(2)]).good.all()


def test_the_same_record_may_be_asked_for_twice(store):
    assert store.append(batch_of([(1, 0, 300), (2, 0, 65_536)])).all()
    sizes = [300, 65_536, 300, 65_536]
    targets = [target_of(size, i < 2) for i, size in enumerate(sizes)]
    assert store.read(keys_of([1, 2, 1, 2]), targets).good.all()
    for number, size, target in zip([1, 2, 1, 2], sizes, targets, strict=True):
        assert target.tobytes() == content(number, 0, size).tobytes()
