"""Readers without leases against a writer that never rests and is killed again and again.

The bytes of a block are a function of its key, so a reader can tell by itself whether what it was given is right.
KVPOOL_TORTURE_S is how long it goes on; lives and kills are drawn from KVPOOL_TORTURE_SEED.
"""

import collections
import itertools
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from kvpool.channels.sections import copy_blocks_in
from kvpool.channels.shared_index import SharedIndex
from kvpool.core.arrays import SourceArrays
from kvpool.core.errors import NoSpace, Unavailable
from kvpool.core.namespace import SECTIONS_MAX, GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import ReserveStatus, SourceConfig
from kvpool.core.source import SourceCore
from kvpool.tiers.dram import Segment

DURATION_S = float(os.environ.get("KVPOOL_TORTURE_S", "8"))
SEED = int(os.environ.get("KVPOOL_TORTURE_SEED", "1"))
READERS = 2
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])  # imported once, not in each life

DATA_BYTES, ENTRIES = 6 << 20, 256
#: Bytes and sections of the blocks of namespaces 0 and 1: memory passes from one to the other all the time.
SHAPES = ((16 << 10, 4), (40_000, 1))
#: The first keys of each namespace are stored before anybody reads, and pinned.
KEYS, ANCHORS = 400, 8
UNIVERSE = np.random.default_rng(0).integers(0, 256, (2, KEYS, 16), dtype=np.uint8)


def content(key, size):
    """The only right bytes of a block."""
    low, high = key.view(np.uint64)
    words = np.arange(-(-size // 8), dtype=np.uint64) * (low | np.uint64(1)) ^ high
    return words.view(np.uint8)[:size]


class Writer:
    """One life of a source."""

    def __init__(self, folder, seed, late):
        self.rng, self.late = np.random.default_rng(seed), late
        index_bytes = SourceArrays.bytes_needed(ENTRIES, SECTIONS_MAX)
        self.segment = Segment.create(
            folder, "torture", data_bytes=DATA_BYTES, index_bytes=index_bytes, touch_bytes=ENTRIES
        )
        arrays = SourceArrays.over(
            self.segment.index, ENTRIES, SECTIONS_MAX, fresh=True, touches=self.segment.touches
        )  # fmt: skip
        self.core = SourceCore(SourceConfig(DATA_BYTES, ENTRIES), arrays)
        self.groups = [
            GroupSpec(0, GroupKind.FULL, tuple(range(sections)), 16, 1, sections, size) for size, sections in SHAPES
        ]
        self.namespaces = [
            self.core.register_namespace(NamespaceSpec(f"torture-{number}", "", "", "", "", "xxh3_128/1", (group,)))
            for number, group in enumerate(self.groups)
        ]
        self.session = self.core.open_session("torture", 0)
        self.now_us = 0
        self.given_up = []
        self.kill_stage = ""

    def reach(self, stage):
        """Ends this process here if that is its fate."""
        if stage == self.kill_stage:
            os.kill(os.getpid(), signal.SIGKILL)

    def store(self, number, keys, give_up=False):
        group = self.groups[number]
        reserved = self.core.reserve(self.session, self.namespaces[number], group, keys, 1_000_000, self.now_us)
        mine = np.flatnonzero(reserved.status == ReserveStatus.RESERVED)
        self.reach("reserved")
        if not len(mine):
            return
        slots = reserved.slots.take(mine)
        addresses = slots.offsets + np.uint64(self.segment.data.ctypes.data)
        data = np.stack([content(key, group.block_bytes) for key in slots.keys])
        rows = (data.ctypes.data + np.arange(len(mine)) * group.block_bytes).astype(np.uint64)
        half = np.full(len(mine), group.block_bytes // 2, dtype=np.uint64)
        copy_blocks_in(rows, addresses, half, slots.keys, 1, end_s=np.inf)
        self.reach("half written")
        if give_up:
            self.core.abort(self.session, reserved.reservation, self.now_us)
            self.reach("aborted")
            self.given_up += [(offset, group.block_bytes) for offset in slots.offsets.tolist()]
            return
        sizes = np.full(len(mine), group.block_bytes, dtype=np.uint64)
        digests = copy_blocks_in(rows, addresses, sizes, slots.keys, group.section_count, end_s=np.inf)
        self.reach("written")
        sections = np.arange(group.section_count, dtype=np.uint32)
        for some in np.array_split(np.arange(len(mine)), 2):
            self.core.commit(
                self.session, reserved.reservation, np.repeat(mine[some], len(sections)).astype(np.uint32),
                np.tile(sections, len(some)), digests[some].ravel(), self.now_us,
            )  # fmt: skip
            self.reach("partly committed")

    def store_anchors(self):
        for number in (0, 1):
            anchors = UNIVERSE[number, :ANCHORS]
            self.store(number, anchors)
            pinned = self.core.pin(self.session, self.namespaces[number], anchors, 0, self.now_us)
            assert pinned.found.all()

    def step(self):
        number = int(self.rng.integers(0, 2))
        keys = UNIVERSE[number, self.rng.choice(np.arange(ANCHORS, KEYS), int(self.rng.integers(1, 9)), replace=False)]
        self.now_us += 1000
        if self.late and self.given_up:  # a writer that goes on, though its slot may be another's by now
            offset, size = self.given_up.pop(int(self.rng.integers(0, len(self.given_up))))
            self.segment.data[offset : offset + size] = 0xEE
        action = self.rng.random()
        if action < 0.2:
            self.core.remove(self.namespaces[number], keys, self.now_us)
            self.reach("removed")
        else:
            try:
                self.store(number, keys, give_up=action > 0.9)
            except NoSpace:
                self.core.remove(self.namespaces[1 - number], UNIVERSE[1 - number, ANCHORS:], self.now_us)
        self.core.tick(self.now_us)
        self.core.take_changes()
        self.core.drain_touches()


STAGES = ("reserved", "half written", "aborted", "written", "partly committed", "removed", "")


def write(folder, seed, late, steps_max):
    """A life; it ends by a kill of its own, in a stage drawn from its seed, if nobody kills it before."""
    writer = Writer(folder, seed, late)
    writer.store_anchors()
    current = {"path": str(writer.segment.path), "uuid": writer.segment.uuid.hex(), "late": late}
    (folder / "next").write_text(json.dumps(current))
    (folder / "next").replace(folder / "current")
    for step in itertools.count():
        if step == steps_max:
            writer.kill_stage = str(writer.rng.choice(STAGES[:-1]))
        writer.step()
        if step == 100:
            writer.core.check_invariants()


#: What a reader counts, and what each must have seen before this may end.
COUNTED = {"good verified": 100, "good unverified": 100, "moved": 1, "misses": 100, "sources": 2, "unknown": 0}


class Reader:
    def __init__(self, folder, seed):
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.pointer, self.index, self.late = "", None, False
        self.out = np.zeros((16, max(size for size, _ in SHAPES)), dtype=np.uint8)
        self.counts = dict.fromkeys(COUNTED, 0)
        self.wrong = []
        self.earlier = collections.deque(maxlen=1000)  # what was found, to be read only after a while

    def follow(self):
        """Goes on to the newest source, as soon as it is there."""
        pointer = (self.folder / "current").read_text() if (self.folder / "current").exists() else ""
        if pointer == self.pointer:
            return
        offer = json.loads(pointer)
        try:
            fresh = SharedIndex.open(offer)
        except Unavailable:
            return  # it has ended already
        if self.index is not None:
            self.index.close()
        self.pointer, self.index, self.late = pointer, fresh, offer["late"]
        self.counts["sources"] += 1
        self.earlier.clear()

    def step(self):
        number, count = int(self.rng.integers(0, 2)), int(self.rng.integers(1, 17))
        chosen = self.rng.integers(0, KEYS, count)
        keys = UNIVERSE[number, chosen]
        found = self.index.find(number, keys)
        if (found.definite_miss & (chosen < ANCHORS)).any():
            self.wrong.append("a key that was always there was called missing")
        self.counts["misses"] += int(found.definite_miss.sum())
        self.counts["unknown"] += int((~found.hit & ~found.definite_miss).sum())
        self.earlier.append((number, chosen, keys, found))
        if self.rng.integers(0, 2):  # at once, or what was found some time ago and may have moved since
            number, chosen, keys, found = self.earlier[int(self.rng.integers(0, len(self.earlier)))]
        self.read(number, chosen, keys, found)

    def read(self, number, chosen, keys, found):
        verify, count = self.late or bool(self.rng.integers(0, 2)), len(found)
        self.out[:count] = 0x55
        good = self.index.read(found, self.out, verify=verify, deadline_s=100)
        size = SHAPES[number][0]
        for row in np.flatnonzero(good).tolist():
            if not np.array_equal(self.out[row, :size], content(keys[row], size)):
                self.wrong.append(f"wrong bytes of key {int(chosen[row])}, {verify=}, {self.late=}, {self.pointer}")
        self.counts["good verified" if verify else "good unverified"] += int(good.sum())
        self.counts["moved"] += int((found.hit & ~good).sum())


def read(folder, seed, stop, shared_counts, results):
    reader = Reader(folder, seed)
    while not stop.is_set() and not reader.wrong:
        reader.follow()
        if reader.index is None:
            time.sleep(0.01)
            continue
        for _ in range(20):
            reader.step()
        shared_counts[:] = list(reader.counts.values())
    results.put((reader.counts, reader.wrong))


def live(folder, rng, number):
    """One life of a writer. Returns whether it was ended from outside."""
    late, steps_max = number % 3 == 2, int(rng.integers(20, 300))
    writer = PROCESSES.Process(target=write, args=(folder, int(rng.integers(2**32)), late, steps_max), daemon=True)
    writer.start()
    # Every other life is ended wherever it may be: also in the middle of a change of its index.
    writer.join(float(rng.uniform(0.3, 1.5)) if number % 2 else 30)
    ended = writer.is_alive()
    if ended:
        writer.kill()
        writer.join()
    assert writer.exitcode == -signal.SIGKILL, f"life {number} ended by itself, with {writer.exitcode}"
    return ended


@pytest.mark.processes
@pytest.mark.timeout(DURATION_S + 200)
def test_no_reader_ever_gets_wrong_bytes(tmp_path):
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    stop, results = PROCESSES.Event(), PROCESSES.Queue()
    counts = [PROCESSES.Array("q", len(COUNTED), lock=False) for _ in range(READERS)]
    readers = [
        PROCESSES.Process(target=read, args=(tmp_path, SEED * 100 + i, stop, seen, results), daemon=True)
        for i, seen in enumerate(counts)
    ]
    for reader in readers:
        reader.start()

    def seen_enough():
        return all(have >= need for seen in counts for have, need in zip(seen, COUNTED.values(), strict=True))

    end_s, lives, ended = time.monotonic() + DURATION_S, 0, 0
    try:
        # On a busy machine until there was something to see; the test's own timeout ends it.
        while time.monotonic() < end_s or lives < 3 or not seen_enough():
            ended += live(tmp_path, rng, lives)
            lives += 1
            assert all(reader.is_alive() for reader in readers) or not results.empty()
            if not results.empty():
                break  # a reader has found something wrong
    finally:
        stop.set()
    outcomes = [results.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join(60)
    print(f"{lives} lives, {ended} of them ended from outside;", *(seen for seen, _ in outcomes))
    assert not [wrong for _, wrong in outcomes if wrong]
    assert seen_enough()


def test_the_expected_bytes_differ_from_key_to_key():
    blocks = {content(key, 64).tobytes() for key in UNIVERSE.reshape(-1, 16)}
    assert len(blocks) == 2 * KEYS
