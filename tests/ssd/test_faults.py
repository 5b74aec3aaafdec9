"""Disks that fill up, fail, or come back damaged: fewer hits and a state that says so, never a crash or wrong bytes."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kvpool.core.errors import NoSsd
from kvpool.core.ssd.format import PAGE_BYTES, segment_name
from kvpool.core.ssd.records import SsdState
from kvpool.tiers.ssd.store import SsdStore
from kvpool.tiers.ssd.writer import Request

from .crash_files import CrashFiles
from .records_made import NAMESPACE, batch_of, content, keys_of, read_all
from .test_crash import SEGMENT_BYTES, open_on

RECORD_BYTES = 20_000


def fill(store, numbers, version=0):
    """Those acknowledged, of the numbers put one by one."""
    return [n for n in numbers if store.append(batch_of([(n, version, RECORD_BYTES)])).all()]


def check_all(store, numbers, version=0):
    for number, data in read_all(store, numbers).items():
        assert data == content(number, version, RECORD_BYTES).tobytes(), number


# ---------------------------------------------------------------- full


def test_a_disk_smaller_than_promised_is_used_as_far_as_it_goes():
    files = CrashFiles(capacity_bytes=PAGE_BYTES + 5 * SEGMENT_BYTES)
    store = open_on(files, 64 * SEGMENT_BYTES)
    assert fill(store, range(40)) == list(range(40))
    assert store.stats().counters.evicted > 0
    check_all(store, [39])
    assert store.audit() == ()
    store.close()


def test_a_full_disk_refuses_and_goes_on_when_there_is_room():
    files = CrashFiles()
    store = open_on(files)
    files.capacity_bytes = 0
    assert fill(store, range(3, 12)) == []
    stats = store.stats()
    assert stats.state is SsdState.FULL
    assert "no room" in stats.message
    assert stats.counters.append_refused == 9
    files.capacity_bytes = None
    assert fill(store, range(20, 30)) == list(range(20, 30))
    assert store.stats().state is SsdState.OK
    check_all(store, range(20, 30))
    assert store.audit() == ()
    store.close()


def test_a_disk_that_others_filled_is_used_as_far_as_the_store_has_it():
    files = CrashFiles()
    store = open_on(files)
    assert fill(store, range(9)) == list(range(9))
    files.capacity_bytes, segments = 0, len(store._log.core.segments)
    assert segments > 1
    assert fill(store, range(9, 40)) == list(range(9, 40))
    assert len(store._log.core.segments) == segments
    check_all(store, [38, 39])
    assert store.audit() == ()
    store.close()


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path):
    """In a process of its own: the limit holds for all that a process writes."""
    script = f"""
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from kvpool.tiers.ssd.store import SsdStore
from tests.ssd.records_made import batch_of
store = SsdStore.open(Path({str(tmp_path)!r}), "a", 8 << 20, segment_bytes=1 << 20)
print(store.append(batch_of([(1, 0, 100)])).tolist(), store.stats().state)
store.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["[False]", "full"], done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 600_000


# ---------------------------------------------------------------- I/O errors


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_a_failed_write_is_not_acknowledged_and_does_not_come_back(kind):
    files = CrashFiles()
    store = open_on(files)
    assert fill(store, [1]) == [1]
    files.faults[kind] = [errno.EIO]
    assert fill(store, [2]) == []
    assert store.stats().counters.io_errors == 1
    assert fill(store, [3]) == [3]
    assert store.stats().state is SsdState.OK
    assert store.audit() == ()
    check_all(store, [1, 3])
    store.close()
    again = open_on(files.copy())
    assert read_all(again, [2]) == {2: None}
    check_all(again, [1, 3])
    again.close()


def test_a_disk_that_fails_again_and_again_is_left_alone():
    files = CrashFiles()
    store = open_on(files)
    assert fill(store, [1, 2]) == [1, 2]
    files.faults["sync"] = [errno.EIO] * 1000
    assert fill(store, range(3, 9)) == []
    stats = store.stats()
    assert stats.state is SsdState.FAILED
    assert stats.message
    writes = stats.counters.writes
    assert fill(store, [9]) == []
    assert store.stats().counters.writes == writes
    check_all(store, [1, 2])
    # What is removed can't be read any more, and nobody is told that it is gone for good.
    assert store.remove(keys_of([1])).tolist() == [False]
    assert read_all(store, [1]) == {1: None}
    store.close()


def test_a_page_that_cannot_be_read_is_a_miss():
    files = CrashFiles()
    store = open_on(files)
    assert fill(store, [1, 2, 3]) == [1, 2, 3]
    # The first read of the three together fails, then that of the first alone.
    files.faults["read"] = [errno.EIO, errno.EIO]
    found = read_all(store, [1, 2, 3])
    assert sum(value is None for value in found.values()) == 1
    assert store.stats().counters.io_errors == 2
    assert store.contains(keys_of([1, 2, 3])).sum() == 2
    assert len(store.take_changes().changes) == 4
    files.faults.clear()
    # Put again, it is there again.
    missing = [number for number, value in found.items() if value is None]
    assert fill(store, missing) == missing
    check_all(store, [1, 2, 3])
    store.close()


def test_reclaiming_that_fails_loses_nothing_that_stays():
    files = CrashFiles()
    store = open_on(files, 6 * SEGMENT_BYTES)
    fill(store, range(8))
    rng = np.random.default_rng(3)
    for number in range(8, 60):
        if rng.integers(3) == 0:
            files.faults[("write", "sync", "remove", "sync_names", "read", "create")[rng.integers(6)]] = [errno.EIO]
        acknowledged = fill(store, [number])
        # One success between failures keeps it alive.
        files.faults.clear()
        check_all(store, acknowledged)
        fill(store, [1000 + number])
        with store._log.lock:
            store._log.core.check_invariants()
    assert store.stats().state is SsdState.OK
    assert store.audit() == ()
    store.close()
    again = open_on(files.copy(), 6 * SEGMENT_BYTES)
    assert again.audit() == ()
    again.close()


def test_what_a_failed_write_has_left_is_not_said_to_be_gone():
    """It could not be undone: the record may be on disk, whole, though the index does not know it."""
    files = CrashFiles()
    store = open_on(files)
    assert fill(store, [1]) == [1]
    files.faults.update(sync=[errno.EIO], truncate=[errno.EIO])
    assert fill(store, [2]) == []
    assert store.unsure
    assert store.remove(keys_of([1, 2])).tolist() == [False, False]
    assert store.remove_namespace(NAMESPACE) is None
    found = read_all(open_on(files.copy()), [2])
    assert found[2] == content(2, 0, RECORD_BYTES).tobytes(), "it was there, as it may be"


def test_what_could_not_be_read_can_be_removed_for_good():
    files = CrashFiles()
    store = open_on(files)
    assert fill(store, [1, 2]) == [1, 2]
    files.faults["read"] = [errno.EIO] * 3
    assert read_all(store, [1, 2]) == {1: None, 2: None}
    files.faults.clear()
    assert store.undead(keys_of([1, 2, 3])).present.tolist() == [True, True, False]
    assert {key.tobytes() for key in store.lost_objects(NAMESPACE)} == {key.tobytes() for key in keys_of([1, 2])}
    assert not len(store.lost_objects(bytes(16)))
    assert store.remove(keys_of([1])).tolist() == [True]
    assert store.undead(keys_of([1, 2])).present.tolist() == [False, True]
    # As after a crash: what was not removed is back, what was is not.
    found = read_all(open_on(files.copy()), [1, 2])
    assert found == {1: None, 2: content(2, 0, RECORD_BYTES).tobytes()}
    assert fill(store, [2], version=1) == [2]
    assert not store.undead(keys_of([2])).present.any()
    store.close()


def test_a_segment_whose_file_does_not_go_keeps_its_objects_undead():
    files = CrashFiles()
    store = open_on(files, 6 * SEGMENT_BYTES)
    files.faults["remove"] = [errno.EIO] * 1000
    for number in range(40):
        fill(store, [number])
        files.faults["remove"] = [errno.EIO] * 1000
    keys = keys_of(range(40))
    gone = ~store.contains(keys) & store.undead(keys).present
    assert gone.any(), "none was evicted"
    evicted = np.flatnonzero(gone).tolist()
    files.faults.clear()
    assert store.remove(keys_of(evicted[:1])).all()
    again = open_on(files.copy(), 6 * SEGMENT_BYTES)
    assert read_all(again, evicted[:1]) == {evicted[0]: None}
    again.close()
    store.close()


# ---------------------------------------------------------------- a disk that fails while a store is opened


def removed_at_the_end():
    """Files of a store that was killed after object 1 was removed; the removal is the last that was written."""
    files = CrashFiles()
    store = open_on(files)
    assert store.append(batch_of([(1, 0, 3000), (2, 0, 3000)])).all()
    assert store.remove(keys_of([1])).all()
    return files.copy()


@pytest.mark.parametrize("kind", ["open", "read"])
def test_a_call_that_fails_once_at_the_start_costs_nothing(kind):
    for calls_before in range(6):
        files = removed_at_the_end()
        files.faults[kind] = [None] * calls_before + [errno.EIO]
        try:
            store = open_on(files)
        except NoSsd:
            assert calls_before == 0, "only the store's own header is read by itself"
            continue
        files.faults.clear()
        assert read_all(store, [1, 2]) == {1: None, 2: small(2)}, calls_before
        store.close()


@pytest.mark.parametrize("kind", ["open", "read"])
def test_what_can_not_be_read_at_the_start_may_hide_removals(kind):
    """Also at the log's end, where a record that is missing was usually never acknowledged."""
    for calls_before in range(1, 8):
        files = removed_at_the_end()
        files.faults[kind] = [None] * calls_before + [errno.EIO] * 6
        try:
            store = open_on(files)
        except NoSsd:
            continue
        files.faults.clear()
        assert read_all(store, [1])[1] is None, calls_before
        store.close()
        assert read_all(open_on(files.copy()), [1])[1] is None, calls_before


@pytest.mark.parametrize("kind", ["write", "sync", "create"])
def test_damage_that_can_not_be_put_right_is_seen_again(kind):
    damaged = with_a_damaged_removal([3, 4])
    damaged.faults[kind] = [errno.EIO] * 1000
    with pytest.raises(NoSsd):
        open_on(damaged)
    damaged.faults.clear()
    again = open_on(damaged.copy())
    assert read_all(again, [1, 2]) == {1: None, 2: None}


def test_a_segment_that_can_not_be_used_goes_before_anything_is_written():
    files = CrashFiles()
    store = open_on(files)
    for number in range(10):
        fill(store, [number])
    damaged = files.copy()
    damaged.faults["open"] = [None, None, errno.EIO, errno.EIO]
    damaged.faults["remove"] = [errno.EIO]
    with pytest.raises(NoSsd):
        open_on(damaged)
    damaged.faults["open"] = [None, None, errno.EIO, errno.EIO]
    again = open_on(damaged)
    assert again.stats().counters.recovery_damaged == 1
    assert again.audit() == ()
    again.close()


# ---------------------------------------------------------------- a disk that hangs


def test_a_store_on_a_disk_that_hangs_can_be_left():
    files = CrashFiles()
    store = open_on(files)
    assert fill(store, [1]) == [1]
    files.hanging["write"] = threading.Event()
    writer = threading.Thread(target=fill, args=(store, [2]))
    writer.start()
    assert files.waiting.wait(60)
    assert store.remove(keys_of([1]), timeout_s=0.05).tolist() == [False]
    assert store.close(timeout_s=0.05) is False
    files.hanging["write"].set()
    writer.join(60)
    assert not writer.is_alive()
    check_all(open_on(files.copy()), [1])


class GivenUpMeanwhile(threading.Event):
    """Time is up; and before that can be said, the writer gives up all that waits for it."""

    def __init__(self, writer):
        super().__init__()
        self._writer = writer

    def wait(self, timeout=None):
        if not self.is_set():
            self._writer._give_up()
            return False
        return True


def test_a_request_may_be_given_up_just_when_its_time_is_up():
    files = CrashFiles()
    store = open_on(files)
    assert fill(store, [1]) == [1]
    files.hanging["write"] = threading.Event()
    writing = threading.Thread(target=fill, args=(store, [2]))
    writing.start()
    assert files.waiting.wait(60)
    request = Request(keys=keys_of([1]), acknowledged=np.zeros(1, np.bool_), done=GivenUpMeanwhile(store._writer))
    assert store._writer.submit(request, 0.0) is False
    assert not request.acknowledged.any()
    files.hanging["write"].set()
    writing.join(60)
    store.close()


@pytest.mark.parametrize("call", ["recovery._restore", "store.seal_scanned"])
def test_a_store_that_can_not_be_opened_keeps_nothing_open(call, tmp_path, monkeypatch):
    def opened():
        links = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # closed by another thread meanwhile
                links.append(link.readlink())
        return [link for link in links if link.is_relative_to(tmp_path)]

    def refuse(*_):
        raise OSError(errno.EIO, "injected")

    def attempt():
        return SsdStore.open(tmp_path, "t", 16 << 20)

    store = attempt()
    assert fill(store, range(6)) == list(range(6))
    assert opened()
    store.close()
    with monkeypatch.context() as patched:
        patched.setattr(f"kvpool.tiers.ssd.{call}", refuse)
        threads = set(threading.enumerate())
        with pytest.raises(NoSsd):
            attempt()
        assert not opened()
        for thread in set(threading.enumerate()) - threads:
            thread.join(60)
            assert not thread.is_alive()
    store = attempt()
    check_all(store, range(6))
    store.close()


# ---------------------------------------------------------------- damage


def stored_on(files, versions=1):
    store = open_on(files)
    for version in range(versions):
        assert fill(store, range(6), version) == list(range(6))
    store.close()
    return files.copy()


def test_rot_in_a_payload_is_a_miss_and_the_older_version_does_not_return():
    files = stored_on(CrashFiles(), versions=2)
    store = open_on(files)
    number, offset = 3, 9000
    segment, place = place_of(store, number)
    files.inodes[segment_name(segment)].current[place + offset] ^= 1
    assert read_all(store, [number]) == {number: None}
    assert store.stats().counters.digest_errors == 1
    store.close()
    again = open_on(files.copy())
    assert read_all(again, [number]) == {number: None}
    check_all(again, [0, 1, 2, 4, 5], 1)
    again.close()


def place_of(store, number):
    rows = store._log.core.rows
    row = rows.live(keys_of([number]))
    return int(rows.segments[row[0]]), int(rows.offsets(row)[0])


def test_a_lost_removal_brings_no_object_back():
    """The record that said so is damaged, and its segment has no footer: every older object goes."""
    damaged = with_a_damaged_removal([3, 4])
    for _ in range(2):
        again = open_on(damaged)
        assert read_all(again, [1, 2, 3, 4]) == {1: None, 2: None, 3: small(3), 4: small(4)}
        damaged = again._log.files.copy()
    assert again.stats().counters.recovery_damaged == 0, "the second time its footer says what is there"


def test_a_removal_lost_at_the_end_of_a_segment_is_noticed_too():
    """Nothing follows it there, but the next segment says which sequences came before."""
    damaged = with_a_damaged_removal([], then_large=True)
    again = open_on(damaged)
    assert again.stats().counters.recovery_damaged == 1
    assert read_all(again, [1, 2]) == {1: None, 2: None}
    check_all(again, range(10, 13))


@pytest.mark.parametrize("ending", ["removed", "put and removed"])
def test_what_a_footer_calls_lost_stays_gone_when_the_footer_rots(ending):
    """A read of object 1 failed once; only the footer says so, and without it a start may find the record readable."""
    files = CrashFiles()
    store = open_on(files)
    assert store.append(batch_of([(1, 0, 3000), (2, 0, 3000)])).all()
    files.faults["read"] = [errno.EIO]
    assert read_all(store, [1]) == {1: None}
    store.close()
    second = open_on(files.copy())
    assert read_all(second, [1, 2]) == {1: None, 2: small(2)}
    assert second.undead(keys_of([1, 2])).present.tolist() == [True, False], "so that a put of its name says so below"
    if ending == "put and removed":
        assert second.append(batch_of([(1, 1, 3000)])).all()
    assert second.remove(keys_of([1])).all()
    second.close()
    rotten = second._log.files.copy()
    rotten.inodes[segment_name(1)].current[-PAGE_BYTES + 20] ^= 1
    third = open_on(rotten)
    assert read_all(third, [1, 2]) == {1: None, 2: small(2)}
    assert third.audit() == ()
    third.close()


def test_a_footer_that_a_crash_cut_off_costs_nothing():
    files = CrashFiles()
    store = open_on(files)
    assert store.append(batch_of([(1, 0, 3000), (2, 0, 3000)])).all()
    store.close()
    torn = files.copy()
    torn.inodes[segment_name(1)].current[-PAGE_BYTES:] = b"\1" * PAGE_BYTES
    again = open_on(torn)
    assert read_all(again, [1, 2]) == {1: small(1), 2: small(2)}
    assert again.stats().counters.recovery_damaged == 0


def with_a_damaged_removal(numbers, *, then_large=False):
    """Files of a store that removed object 1, then put others; the record of the removal is damaged."""
    files = CrashFiles()
    store = open_on(files)
    assert store.append(batch_of([(1, 0, 3000), (2, 0, 3000)])).all()
    assert store.remove(keys_of([1])).all()
    used = store._log.core.segments[1].used_bytes
    for number in numbers:
        assert store.append(batch_of([(number, 0, 3000)])).all()
    if then_large:
        assert fill(store, range(10, 13)) == list(range(10, 13))
        # One of them does not fit into the first segment; it loses its footer, and what lies behind the removal.
        assert len(store._log.core.segments) == 2
    damaged = files.copy()
    data = damaged.inodes[segment_name(1)].current
    data[used - PAGE_BYTES + 40] ^= 1
    data[-PAGE_BYTES:] = bytes(PAGE_BYTES)
    return damaged


def small(number):
    return content(number, 0, 3000).tobytes()


@pytest.mark.parametrize("seed", range(25))
def test_garbage_anywhere_gives_misses_or_the_right_bytes(seed):
    rng = np.random.default_rng(seed)
    files = stored_on(CrashFiles())
    for name in [name for name in files.inodes if name.startswith("seg-")]:
        data = files.inodes[name].current
        at = int(rng.integers(len(data)))
        if rng.integers(2):
            del data[at:]
        else:
            size = int(rng.integers(1, 5000))
            data[at : at + size] = rng.integers(0, 256, len(data[at : at + size]), dtype=np.uint8).tobytes()
    store = open_on(files)
    for number, data in read_all(store, range(6)).items():
        assert data in (None, content(number, 0, RECORD_BYTES).tobytes()), f"seed {seed}"
    assert store.audit() == (), f"seed {seed}"
    assert fill(store, [77]) == [77]
    store.close()


def test_a_file_of_another_version_is_named_and_not_touched(tmp_path):
    SsdStore.open(tmp_path, "a", 8 << 20).close()
    header = tmp_path / "kvpool-a" / "store"
    data = bytearray(header.read_bytes())
    data[16] = 9
    header.write_bytes(data)
    with pytest.raises(NoSsd, match="version 9") as caught:
        SsdStore.open(tmp_path, "a", 8 << 20)
    assert "delete" in caught.value.hint
    assert header.read_bytes() == bytes(data)


def test_segments_without_a_store_are_refused(tmp_path):
    store = SsdStore.open(tmp_path, "a", 8 << 20)
    assert store.append(batch_of([(1, 0, 10)])).all()
    store.close()
    os.truncate(tmp_path / "kvpool-a" / "store", 10)
    with pytest.raises(NoSsd, match="header"):
        SsdStore.open(tmp_path, "a", 8 << 20)


def test_a_folder_that_cannot_be_used_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NoSsd, match="can't be used"):
        SsdStore.open(tmp_path / "file", "a", 8 << 20)


@pytest.mark.parametrize("seed", range(6))
def test_removals_in_a_full_store_never_wedge_it(seed):
    """Tombstones need room too, more than ordinary records are given."""
    rng = np.random.default_rng(seed)
    store = open_on(CrashFiles(), 6 * SEGMENT_BYTES)
    for version in range(1, 150):
        numbers = rng.choice(40, int(rng.integers(1, 8)), replace=False).tolist()
        if rng.integers(3):
            sizes = rng.choice([1, 300, 4096, 17_000], len(numbers)).tolist()
            records = [(number, version, size) for number, size in zip(numbers, sizes, strict=True)]
            assert store.append(batch_of(records)).all(), f"seed {seed}, version {version}, {store.stats()}"
        else:
            assert store.remove(keys_of(numbers)).all(), f"seed {seed}, version {version}, {store.stats()}"
    assert store.audit() == ()
    assert store.stats().space.bytes_total == 6 * SEGMENT_BYTES
    store.close()
