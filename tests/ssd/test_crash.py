"""Torture: power lost at any call, writes torn at any byte, unsynced ones kept or lost at will."""

import os
from pathlib import Path

import numpy as np
import pytest

from kvpool.core.ssd.format import segment_name, segment_seed
from kvpool.core.ssd.rows import RowState
from kvpool.core.ssd.scan import scan_segment
from kvpool.tiers.ssd.recovery import open_log
from kvpool.tiers.ssd.store import SsdStore
from kvpool.tiers.ssd.writer import LogWriter

from .crash_files import CrashFiles
from .records_made import batch_of, content, key_of, keys_of, read_all

SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = 16 * SEGMENT_BYTES
SEED = int(os.environ.get("KVPOOL_SEED", "20"))


def open_on(files, capacity_bytes=CAPACITY_BYTES):
    return SsdStore.open(
        Path("unused"), "t", capacity_bytes, segment_bytes=SEGMENT_BYTES, io_depth=3, files=files, records_max=1024
    )


# ---------------------------------------------------------------- every byte


def cut_at_each_byte(sizes):
    """A store with acknowledged records, and the bytes of one more group that were on their way when the power went."""
    files = CrashFiles()
    store = open_on(files)
    acknowledged = [(1, 1, 700), (2, 1, 20_000), (3, 1, 4096)]
    assert store.append(batch_of(acknowledged)).all()
    name = segment_name(1)
    before = files.copy()
    start = store._log.core.segments[1].used_bytes
    assert store.append(batch_of([(10 + i, 1, size) for i, size in enumerate(sizes)] + [(1, 2, 300)])).all()
    end = store._log.core.segments[1].used_bytes
    written = bytes(files.inodes[name].current[start:end])
    return before, name, start, written, acknowledged, store._log.uuid


def scan_of(data, uuid, *, newest=True):
    buffer = np.frombuffer(data, np.uint8)
    return scan_segment(
        lambda at, size: buffer[at : at + size], SEGMENT_BYTES, segment_seed(uuid, 1), newest=newest, first_sequence=1
    )


def live_keys(log):
    rows = np.flatnonzero(log.core.rows.states == RowState.LIVE).astype(np.int32)
    keys = log.core.rows.key_bytes(rows)
    places = log.core.rows.offsets(rows).tolist()
    return {key.tobytes(): place for key, place in zip(keys, places, strict=True)}


@pytest.mark.parametrize("sizes", [(1, 64, 500), (4096,)])
def test_a_group_torn_at_any_byte_takes_nothing_else_along(sizes):
    before, name, start, written, acknowledged, uuid = cut_at_each_byte(sizes)
    base = bytes(before.inodes[name].current)
    kept = {key_of(number).tobytes() for number, _, _ in acknowledged}
    new = {key_of(10 + i).tobytes() for i in range(len(sizes))}
    seen = set()
    for cut in range(len(written) + 1):
        torn = base[:start] + written[:cut] + base[start + cut :]
        scanned = {entry["key"].tobytes() for entry in scan_of(torn, uuid).entries}
        assert kept <= scanned <= kept | new, cut
        if cut % 16:
            continue
        files = before.copy()
        files.add(name, torn)
        log, damage = open_log(files, segment_bytes=SEGMENT_BYTES, capacity_bytes=CAPACITY_BYTES, rows_max=1024)
        found = live_keys(log)
        assert kept <= set(found), cut
        assert set(found) <= kept | new, cut
        assert not damage.suspects
        assert not damage.files
        seen.add(frozenset(found))
        log.core.check_invariants()
    # From none of the new records to all of them.
    assert len(seen) == len(sizes) + 1


@pytest.mark.parametrize("sizes", [(1, 64, 500), (4096,)])
def test_any_garbled_byte_costs_its_record_and_no_other(sizes):
    before, name, start, written, _, uuid = cut_at_each_byte(sizes)
    base = bytes(before.inodes[name].current)
    whole = base[:start] + written + base[start + len(written) :]
    rng = np.random.default_rng(SEED)

    def entries(data, newest):
        scan = scan_of(data, uuid, newest=newest)
        return {entry.tobytes() for entry in scan.entries if entry["kind"] == 1}, scan

    good, _ = entries(whole, True)
    assert len(good) == 4 + len(sizes)
    for at in range(start, start + len(written)):
        data = bytearray(whole)
        data[at] ^= int(rng.integers(1, 256))
        found, scan = entries(bytes(data), bool(at % 2))
        assert found <= good, f"seed {SEED}, byte {at}"
        assert len(found) >= len(good) - 1, f"seed {SEED}, byte {at}"
        assert scan.next_sequence >= 4


@pytest.mark.parametrize("episode", range(60))
def test_sampled_cuts_in_large_records(episode):
    rng = np.random.default_rng([SEED, episode])
    before, name, start, written, acknowledged, _ = LARGE.setdefault("made", cut_at_each_byte((20_000, 9_000)))
    base, cut = bytes(before.inodes[name].current), int(rng.integers(len(written) + 1))
    files = before.copy()
    files.add(name, (base[:start] + written[:cut]).ljust(SEGMENT_BYTES if rng.integers(2) else 0, b"\0"))
    store = open_on(files)
    expected = {number: content(number, version, size).tobytes() for number, version, size in acknowledged}
    found = read_all(store, [1, 2, 3])
    replaced = content(1, 2, 300).tobytes()
    assert found[1] in (expected[1], replaced)
    assert (found[2], found[3]) == (expected[2], expected[3])
    assert store.audit() == ()
    store.close()


LARGE = {}


# ---------------------------------------------------------------- power lost anywhere


class Model:
    """What a store may answer: for each key the values (version and size, None: absent) that are possible now."""

    def __init__(self, *, evicting):
        self.possible, self.evicting, self.version = {}, evicting, 0

    def put(self, store, rng, numbers):
        self.version += 1
        sizes = rng.choice([1, 40, 300, 4096, 5000, 17_000], len(numbers)).tolist()
        records = [(number, self.version, size) for number, size in zip(numbers, sizes, strict=True)]
        for number, version, size in records:
            self.possible.setdefault(number, {None}).add((version, size))
        for number, version, size in np.array(records)[store.append(batch_of(records))].tolist():
            self.possible[number] = {(version, size)}

    def remove(self, store, numbers):
        gone = store.remove(keys_of(numbers))
        for number, acknowledged in zip(numbers, gone.tolist(), strict=True):
            self.possible[number] = {None} if acknowledged else self.possible.get(number, {None}) | {None}

    def check(self, store, context):
        """What is there is the newest that was acknowledged, or what was under way; from now on it is certain."""
        numbers = sorted(self.possible)
        found = read_all(store, numbers)
        # A full store makes room by itself: what it is about to give back may be there again after a crash.
        undead = store.undead(keys_of(numbers)).present.tolist()
        for (number, data), may_return in zip(found.items(), undead, strict=True):
            values = self.possible[number]
            if data is None:
                assert self.evicting or None in values, f"{context}: lost {number}, one of {values}"
                # What was evicted is gone for good.
                self.possible[number] = values | {None} if may_return else {None}
                continue
            matching = [value for value in values if value and content(number, *value).tobytes() == data]
            assert matching, f"{context}: {number} is none of {values}"
            self.possible[number] = set(matching)


def run_episode(seed, *, evicting):
    rng = np.random.default_rng(seed)
    model = Model(evicting=evicting)
    capacity = (6 if evicting else 64) * SEGMENT_BYTES
    files = CrashFiles(steps=int(rng.integers(20, 150)))
    for crash in range(4):
        context = f"seed {seed}, crash {crash}"
        try:
            store = open_on(files, capacity)
        except Exception:
            # The power went while it opened.
            assert files.steps == 0, context
            files = files.after_crash(rng, steps=int(rng.integers(20, 150)))
            continue
        model.check(store, context) if files.steps else None
        for _ in range(1000):
            if not files.steps:
                break
            numbers = rng.choice(40, int(rng.integers(1, 8)), replace=False).tolist()
            if rng.integers(4):
                model.put(store, rng, numbers)
            else:
                model.remove(store, numbers)
            if files.steps:
                with store._log.lock:
                    store._log.core.check_invariants()
        else:
            raise AssertionError(f"{context}: the store writes nothing any more: {store.stats()}")
        store.close()
        files = files.after_crash(rng, steps=None if crash == 2 else int(rng.integers(20, 150)))
    if files.steps == 0:
        files = files.after_crash(rng)
    files.steps = None
    store = open_on(files, capacity)
    model.check(store, f"seed {seed}, end")
    assert store.audit() == (), f"seed {seed}"
    store.close()


@pytest.mark.parametrize("episode", range(int(os.environ.get("KVPOOL_SSD_EPISODES", "25"))))
@pytest.mark.parametrize("evicting", [False, True], ids=["roomy", "evicting"])
def test_power_lost_anywhere(episode, evicting):
    run_episode([SEED, episode, evicting], evicting=evicting)


# ---------------------------------------------------------------- killed, and later the power


#: More than fit where it is evicted.
KEYS = 60


def killed(rng, files, capacity, steps):
    """What a process leaves that was killed after so many calls of its disk."""
    files.steps = steps
    try:
        store = open_on(files, capacity)
    except Exception:
        assert files.steps == 0
        return files.after_kill()
    for version in range(1000):
        if not files.steps:
            break
        numbers = rng.choice(KEYS, int(rng.integers(1, 5)), replace=False).tolist()
        if rng.integers(3):
            store.append(batch_of([(number, version, int(rng.choice([300, 17_000]))) for number in numbers]))
        else:
            store.remove(keys_of(numbers))
    store.close()
    return files.after_kill()


@pytest.mark.parametrize("evicting", [False, True], ids=["roomy", "evicting"])
@pytest.mark.parametrize("steps", range(1, 160, 4))
def test_what_a_start_finds_stands_when_the_power_goes(steps, evicting, monkeypatch):
    """Nobody had synced it; but what is absent may be put in memory now, and what is there is taken for saved."""
    rng = np.random.default_rng([SEED, steps, evicting])
    capacity = (6 if evicting else 64) * SEGMENT_BYTES
    for more in range(4):
        files = killed(rng, CrashFiles(), capacity, steps + more)
        if more % 2:
            files = killed(rng, files, capacity, int(rng.integers(1, 8)))
        with monkeypatch.context() as patched:
            # Nobody reclaims anything either.
            patched.setattr(LogWriter, "start", lambda self: None)
            store = open_on(files, capacity)
            undead = store.undead(keys_of(range(KEYS))).present.tolist()
            found = read_all(store, range(KEYS))
            for _ in range(3):
                after = read_all(open_on(files.after_crash(rng), capacity), range(KEYS))
                for number, is_undead in enumerate(undead):
                    assert is_undead or after[number] == found[number], f"seed {SEED}, {more}: {number}"


def test_a_segment_is_gone_for_good_before_anything_relies_on_it():
    """Else a crash could bring a segment back, and not the younger one whose tombstones hid its records."""
    files = CrashFiles()
    store = open_on(files, 6 * SEGMENT_BYTES)
    for number in range(60):
        assert store.append(batch_of([(number % 20, number, 20_000)])).all()
        if number % 3 == 0:
            assert store.remove(keys_of([number % 20])).all()
    assert len([name for name in files.names() if name != "store"]) <= 6, "with the one that is kept for the next"
    store.close()
    after = [files.calls[at + 1] for at, kind in enumerate(files.calls) if kind == "remove"]
    assert len(after) > 5
    assert set(after) == {"sync_names"}
    assert files.reused > 5, "so that what is left of older segments is there to be mistaken for records"
