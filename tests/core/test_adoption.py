"""A source that is killed anywhere, and the one that takes its segment over (G10).

Every line of the modules that change the index is a place to be killed at, and so is the middle of every statement:
of the bytes that it changes, the first part is new, the rest still old. What was committed is known from outside.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import pytest

from kvpool.core import adoption, index, reservations, store
from kvpool.core.arrays import EntryState, SourceArrays
from kvpool.core.catalog import Catalog
from kvpool.core.errors import BadArgument
from kvpool.core.hashing import object_key, section_digest
from kvpool.core.ids import KeyArray
from kvpool.core.namespace import SECTIONS_MAX, GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import ReserveStatus, SourceConfig
from kvpool.core.source import SourceCore

SECOND = 1_000_000
PAGE = 4096
PAGES, ENTRIES = 12, 10
CONFIG = SourceConfig(PAGES * PAGE, ENTRIES, eviction="lru", unit_bytes=PAGE, high_watermark=1.0, low_watermark=1.0)
GROUP = GroupSpec(0, GroupKind.FULL, (0, 1), 16, 1, 2, PAGE // 4)
BLOCKS = NamespaceSpec("m", "", "float32", "t", "lkthd", "xxh3_128/1", (GROUP,))
OBJECTS = NamespaceSpec.objects("things")
#: Modules whose lines change the shared arrays, or run between lines that do.
TRACED = tuple(module.__file__ for module in (index, store, reservations))


def keys_of(numbers: list[int]) -> KeyArray:
    return np.frombuffer(b"".join(n.to_bytes(16, "big") for n in numbers), dtype=np.uint8).reshape(-1, 16)


def bytes_of(key: bytes, size: int) -> np.ndarray:
    return np.random.default_rng(int.from_bytes(key[-8:], "little")).integers(0, 256, size, dtype=np.uint8)


@dataclass
class Cut:
    """The segment as it was left, what its owner had told writers, and what it may have committed by then."""

    buffer: np.ndarray
    data: np.ndarray
    catalog: bytes
    writable: list[tuple[int, int]]  # extents that writers were told of and have not given back, whole slots
    committed: dict[bytes, int]  # key -> size, of all that was ever committed completely


@dataclass
class Owner:
    """A source on a segment, with its clients. Remembers what they were told."""

    buffer: np.ndarray = field(
        default_factory=lambda: np.zeros(SourceArrays.bytes_needed(ENTRIES, SECTIONS_MAX), dtype=np.uint8)
    )
    data: np.ndarray = field(default_factory=lambda: np.zeros(PAGES * PAGE, dtype=np.uint8))
    writable: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    pending: dict[int, list[tuple[int, bytes, int, int]]] = field(default_factory=dict)
    committed: dict[bytes, int] = field(default_factory=dict)
    now: int = 0

    def __post_init__(self) -> None:
        arrays = SourceArrays.over(self.buffer, ENTRIES, SECTIONS_MAX, fresh=True)
        self.core = SourceCore(CONFIG, arrays, self.data)
        self.begin()

    def begin(self) -> None:
        self.blocks = self.core.register_namespace(BLOCKS)
        self.objects = self.core.register_namespace(OBJECTS)
        self.session = self.core.open_session("writer", self.now)
        self.core.reserve(self.session, self.blocks, GROUP, keys_of([]), SECOND, self.now, tenant="t")
        self.catalog = self.core.catalog().to_bytes()

    def cut(self) -> Cut:
        told = [extent for extents in self.writable.values() for extent in extents]
        return Cut(self.buffer.copy(), self.data.copy(), self.catalog, told, dict(self.committed))

    # ---- what clients do

    def reserve_blocks(self, numbers: list[int], ttl: int = 10) -> int:
        return self._reserved(
            self.core.reserve(self.session, self.blocks, GROUP, keys_of(numbers), ttl * SECOND, self.now, tenant="t"),
            GROUP.section_count,
        )

    def reserve_objects(self, names: list[str], sizes: list[int], ttl: int = 10) -> int:
        keys = b"".join(object_key(self.objects, name) for name in names)
        packed = np.frombuffer(keys, dtype=np.uint8).reshape(-1, 16)
        return self._reserved(
            self.core.reserve(
                self.session, self.objects, None, packed, ttl * SECOND, self.now,
                sizes=np.array(sizes, np.uint64), names=[name.encode() for name in names],
            ),
            1,
        )  # fmt: skip

    def _reserved(self, reserved: Any, sections: int) -> int:
        rows = np.flatnonzero(reserved.status == ReserveStatus.RESERVED).tolist()
        slots, number = reserved.slots, int(reserved.reservation)
        self.pending[number] = [
            (row, slots.keys[row].tobytes(), int(slots.offsets[row]), int(slots.sizes[row])) for row in rows
        ]
        # From here on the writer knows its slots and may write into them at any time.
        self.writable[number] = [(offset, offset + size) for _, _, offset, size in self.pending[number]]
        self.sections = sections
        return number

    def write(self, number: int) -> None:
        for _, key, offset, size in self.pending[number]:
            self.data[offset : offset + size] = bytes_of(key, size)

    def commit(self, number: int, sections: list[int] | None = None) -> None:
        pending = self.pending[number]
        if not pending:
            return
        count = 2 if pending[0][3] == GROUP.block_bytes else 1
        chosen = list(range(count)) if sections is None else sections
        items = []
        for row, key, _, size in pending:
            content, part = bytes_of(key, size), size // count
            items += [(row, s, section_digest(content[s * part : (s + 1) * part], key, s)) for s in chosen]
        # Complete from the moment the call begins: what the writer says when it commits is true already.
        if sections is None or sections == [count - 1]:
            self.committed.update({key: size for _, key, _, size in pending})
            self.writable.pop(number)
        columns = list(zip(*items, strict=True))
        self.core.commit(
            self.session, number, np.array(columns[0], np.uint32), np.array(columns[1], np.uint32),
            np.array(columns[2], np.uint64), self.now,
        )  # fmt: skip

    def publish_blocks(self, numbers: list[int]) -> int:
        number = self.reserve_blocks(numbers)
        self.write(number)
        self.commit(number)
        return number

    def publish_objects(self, names: list[str], sizes: list[int]) -> int:
        number = self.reserve_objects(names, sizes)
        self.write(number)
        self.commit(number)
        return number

    def abort(self, number: int) -> None:
        self.writable.pop(number, None)
        self.core.abort(self.session, number, self.now)

    def gone(self) -> None:
        for number in list(self.writable):
            if self.core.reservations.get(number) is None or len(self.core.reservations.get(number).quarantined):  # type: ignore[arg-type,union-attr]
                del self.writable[number]
        self.core.writer_gone(self.session, self.now)


def history(owner: Owner) -> Iterator[Callable[[], Any]]:
    """All that changes an index, in one small life: each step in the state that those before it left."""
    yield lambda: owner.publish_blocks([1, 2, 3, 4])
    yield lambda: owner.publish_objects(["a", "b/long name"], [5000, 3 * PAGE - 11])
    lease = owner.core.lease(owner.session, owner.blocks, keys_of([1, 2]), SECOND, owner.now)
    yield lambda: owner.core.remove(owner.blocks, keys_of([1]), owner.now)
    numbers: list[int] = []
    yield lambda: numbers.append(owner.reserve_blocks([10, 11, 12]))
    owner.write(numbers[0])
    yield lambda: owner.commit(numbers[0], [0])
    yield lambda: owner.commit(numbers[0], [1])
    yield lambda: owner.core.release(owner.session, [lease.lease], owner.now)
    yield lambda: numbers.append(owner.reserve_objects(["late", "c"], [4097, 100], ttl=1))
    owner.now += 2 * SECOND
    yield lambda: owner.core.tick(owner.now)
    yield lambda: owner.publish_blocks([20, 21, 22, 23])
    owner.write(numbers[1])
    yield lambda: owner.gone()
    yield lambda: owner.publish_objects(["d"], [8 * PAGE - 1])
    yield lambda: numbers.append(owner.reserve_blocks([30, 31]))
    yield lambda: owner.abort(numbers[2])
    yield lambda: owner.publish_blocks([1, 40])
    yield lambda: owner.core.evict_bytes(PAGE, owner.now)
    yield lambda: owner.core.remove_namespace(owner.objects, owner.now)


def cuts_of(owner: Owner, step: Callable[[], Any]) -> Iterator[Cut]:
    """The segment before each line that the step runs in the traced modules, and after the step."""
    cuts = [owner.cut()]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        if event in ("line", "return") and not np.array_equal(cuts[-1].buffer, owner.buffer):
            cuts.append(owner.cut())
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(previous)
    cuts.append(owner.cut())
    yield from cuts


def torn(before: Cut, after: Cut, rng: random.Random) -> Cut:
    """Killed inside a statement: of the words that it changes the first ones are new.

    Nobody was told anything yet; who is known to have stopped was known when the step began.
    """
    changed = np.flatnonzero((before.buffer.reshape(-1, 4) != after.buffer.reshape(-1, 4)).any(axis=1))
    buffer = before.buffer.copy().reshape(-1, 4)
    new = changed[: rng.randint(0, len(changed))]
    buffer[new] = after.buffer.reshape(-1, 4)[new]
    writable = [extent for extent in before.writable if extent in after.writable]
    return Cut(buffer.reshape(-1), after.data, before.catalog, writable, {**before.committed, **after.committed})


def check_taken_over(cut: Cut) -> SourceCore:
    """The promise: what is readable was committed and is whole; no two have one place; nobody gets a late writer's."""
    arrays = SourceArrays.over(cut.buffer.copy(), ENTRIES, SECTIONS_MAX, fresh=False)
    core = SourceCore.adopt(CONFIG, arrays, cut.data, Catalog.from_bytes(cut.catalog))
    core.check_invariants()
    readable = np.flatnonzero(arrays.states == EntryState.READABLE)
    assert core.adopted == len(readable) == core.counts().blocks
    for entry in readable.tolist():
        key, offset, size = arrays.keys[entry].tobytes(), int(arrays.offsets[entry]), int(arrays.sizes[entry])
        assert cut.committed.get(key) == size, "never committed"
        content, sections = cut.data[offset : offset + size], int(arrays.section_counts[entry])
        part = size // sections
        for section in range(sections):
            digest = section_digest(content[section * part : (section + 1) * part], key, section)
            assert digest == int(arrays.digests[entry, section]), "other bytes than were committed"
    # Everything that can be had is asked for, in all sizes.
    session = core.open_session("after", 0)
    blocks = core.register_namespace(BLOCKS)
    reserved = core.reserve(session, blocks, GROUP, keys_of(list(range(1000, 1000 + ENTRIES))), SECOND, 0)
    mine = reserved.status == ReserveStatus.RESERVED
    for offset, size in zip(reserved.slots.offsets[mine].tolist(), reserved.slots.sizes[mine].tolist(), strict=True):
        for begin, end in cut.writable:
            assert offset >= end or offset + size <= begin, "a slot that an old writer may still write"
    core.check_invariants()
    core.close_session(session, 0, writer_gone=True)
    quarantined = core.counts().quarantined
    assert core.release_inherited(0) == quarantined and core.release_inherited(0) == 0
    core.check_invariants()
    core.remove_namespace(blocks, 0)
    core.remove_namespace(core.register_namespace(OBJECTS), 0)
    assert core.counts().bytes_used == 0
    return core


def test_killed_at_any_line_or_inside_it() -> None:
    owner, rng, places, kept = Owner(), random.Random(11), 0, 0
    for step in history(owner):
        before: Cut | None = None
        for cut in cuts_of(owner, step):
            check_taken_over(cut)
            for _ in range(3 if before is not None else 0):
                assert before is not None
                check_taken_over(torn(before, cut, rng))
            before = cut
            places += 1
            kept += check_adopted_count(cut)
        owner.core.check_invariants()
    assert places > 150 and kept > 500, "the history has become too short to show anything"


def check_adopted_count(cut: Cut) -> int:
    arrays = SourceArrays.over(cut.buffer.copy(), ENTRIES, SECTIONS_MAX, fresh=False)
    return SourceCore.adopt(CONFIG, arrays, cut.data, Catalog.from_bytes(cut.catalog)).adopted


def states_of_taking_over(cut: Cut) -> list[np.ndarray]:
    """The index at each line of its taking over that finds it changed."""
    buffer = cut.buffer.copy()
    seen = [buffer.copy()]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in (*TRACED, adoption.__file__):
            return None
        if not np.array_equal(seen[-1], buffer):
            seen.append(buffer.copy())
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        arrays = SourceArrays.over(buffer, ENTRIES, SECTIONS_MAX, fresh=False)
        SourceCore.adopt(CONFIG, arrays, cut.data, Catalog.from_bytes(cut.catalog))
    finally:
        sys.settrace(previous)
    return [*seen, buffer]


def test_taking_over_may_itself_be_killed_anywhere() -> None:
    """A second process takes over what the first one left of its taking over, and finds the same."""
    owner, states = Owner(), 0
    for step in history(owner):
        for cut in list(cuts_of(owner, step))[::4]:
            whole = check_adopted_count(cut)
            for state in states_of_taking_over(cut)[1:]:
                again = Cut(state, cut.data, cut.catalog, cut.writable, cut.committed)
                check_taken_over(again)
                assert check_adopted_count(again) == whole
                states += 1
    assert states > 100


def test_what_was_committed_is_there_after_a_kill() -> None:
    """Not only no wrong block: at rest every readable one is kept, with its tenant, its name and its quota."""
    owner = Owner()
    owner.core.set_quota(9 * PAGE, tenant="t")
    owner.catalog = owner.core.catalog().to_bytes()
    owner.publish_blocks([1, 2, 3])
    owner.publish_objects(["a", "b"], [1, 5000])
    cut = owner.cut()
    arrays = SourceArrays.over(cut.buffer, ENTRIES, SECTIONS_MAX, fresh=False)
    core = SourceCore.adopt(CONFIG, arrays, cut.data, Catalog.from_bytes(cut.catalog))
    assert core.lookup(owner.blocks, keys_of([1, 2, 3, 4])).tolist() == [True, True, True, False]
    names = sorted(record.name for record in core.list_blocks(0, 100, namespace_id=owner.objects)[0])
    assert names == [b"a", b"b"]
    assert core.quotas() == owner.core.quotas() and core.quotas()[0].bytes_used == 3 * GROUP.block_bytes
    assert core.namespaces() == owner.core.namespaces()
    assert not core.catalog_changed and core.catalog() == Catalog.from_bytes(cut.catalog)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_index_is_refused_or_what_is_left_of_it_is_consistent(seed: int) -> None:
    """Bytes that no source of ours wrote: never two blocks in one place, never an exception that says nothing."""
    rng = np.random.default_rng(seed)
    owner = Owner()
    for step in history(owner):
        step()
        if rng.random() < 0.15:
            break
    cut = owner.cut()
    header = SourceArrays.over(cut.buffer, ENTRIES, SECTIONS_MAX, fresh=False)
    begin = header.keys.__array_interface__["data"][0] - cut.buffer.__array_interface__["data"][0]
    for at in rng.integers(begin, len(cut.buffer), rng.integers(1, 60)).tolist():
        cut.buffer[at] = rng.integers(0, 256)
    arrays = SourceArrays.over(cut.buffer, ENTRIES, SECTIONS_MAX, fresh=False)
    try:
        core = SourceCore.adopt(CONFIG, arrays, cut.data, Catalog.from_bytes(cut.catalog))
    except BadArgument as error:
        assert error.hint
        return
    core.check_invariants()
    core.list_blocks(0, 1000)
    core.release_inherited(0)
    core.check_invariants()


def test_a_catalog_says_when_it_is_damaged() -> None:
    owner = Owner()
    text = owner.core.catalog().to_bytes()
    assert Catalog.from_bytes(text) == owner.core.catalog()
    for at in range(0, len(text), 7):
        damaged = bytearray(text)
        damaged[at] ^= 1
        with pytest.raises(BadArgument):
            Catalog.from_bytes(bytes(damaged))
    for cut in (b"", text[:10], text[:-1], text + b" "):
        with pytest.raises(BadArgument):
            Catalog.from_bytes(cut)
