"""Each eviction policy against its plain oracle, and what each promises: scans, prefixes, reuse of entries, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from naive_evictors import NAIVE

from kvpool.core.evictors import EVICTORS, Evictor, Prefix, S3Fifo
from kvpool.core.index import NO_ENTRY
from kvpool.core.kernels import evictors as list_kernels
from kvpool.core.kernels import prefixes

ENTRIES, CLASSES = 20, 3
EVERYTHING = np.arange(ENTRIES, dtype=np.int32)
POLICIES = sorted(EVICTORS)


def array(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def add(
    evictor: Evictor,
    entries: list[int],
    slot_class: int = 0,
    parents: list[int] | None = None,
    weight: int = 1,
    prints: list[int] | None = None,
) -> None:
    """A run of blocks in prompt order; by default each is the parent of the next."""
    count = len(entries)
    links = [NO_ENTRY, *entries[:-1]] if parents is None else parents
    fingerprints = np.array(entries if prints is None else prints, dtype=np.uint64)
    weights = np.full(count, weight, dtype=np.uint32)
    evictor.insert(array(entries), np.full(count, slot_class, np.int32), array(links)[:count], weights, fingerprints)


def state_of(evictor: Any) -> dict[str, bytes]:
    """All arrays but the memory of skipped entries, which is no decision."""
    return {
        name: (value[1:] if name == "_heads" else value).tobytes()
        for name, value in vars(evictor).items()
        if isinstance(value, np.ndarray)
    }


class Machine(RuleBasedStateMachine):
    """Drives a policy and its oracle with the same calls and compares all that they answer."""

    policy = ""

    def __init__(self) -> None:
        super().__init__()
        self.evictor: Evictor = EVICTORS[self.policy](ENTRIES, CLASSES)
        self.naive = NAIVE[self.policy](ENTRIES)

    def some(self, data: st.DataObject, hidden: bool | None = None) -> list[int]:
        found = [e for e, block in self.naive.blocks.items() if hidden is None or block.hidden == hidden]
        return data.draw(st.lists(st.sampled_from(found), max_size=6, unique=True)) if found else []

    @rule(data=st.data(), chain=st.booleans(), weight=st.sampled_from([1, 1, 2, 7, 1000]))
    def insert(self, data: st.DataObject, chain: bool, weight: int) -> None:
        free = [entry for entry in range(ENTRIES) if entry not in self.naive.blocks]
        entries = data.draw(st.lists(st.sampled_from(free), max_size=6, unique=True)) if free else []
        classes = data.draw(st.lists(st.integers(0, CLASSES - 1), min_size=6, max_size=6))
        roots = st.one_of(st.just(NO_ENTRY), st.integers(0, ENTRIES - 1))
        links = [data.draw(roots), *entries[:-1]] if chain else data.draw(st.lists(roots, min_size=6, max_size=6))
        prints = data.draw(st.lists(st.integers(0, 12), min_size=6, max_size=6))
        rows = list(zip(entries, classes, links, [weight] * 6, prints, strict=False))
        # A link to itself or to a block later in the batch is none.
        self.naive.insert(rows)
        columns = [array([row[i] for row in rows]) for i in range(3)]
        weights = np.array([row[3] for row in rows], dtype=np.uint32)
        self.evictor.insert(*columns, weights, np.array([row[4] for row in rows], dtype=np.uint64))

    @rule(data=st.data(), times=st.sampled_from([1, 1, 2, 50]))
    def touch(self, data: st.DataObject, times: int) -> None:
        entries = self.some(data) * times
        self.naive.touch(entries)
        self.evictor.touch(array(entries))

    @rule(data=st.data())
    def hide(self, data: st.DataObject) -> None:
        entries = self.some(data, hidden=False)
        self.naive.hide(entries, True)
        self.evictor.hide(array(entries))

    @rule(data=st.data())
    def show(self, data: st.DataObject) -> None:
        entries = self.some(data, hidden=True)
        self.naive.hide(entries, False)
        self.evictor.show(array(entries))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        entries = self.some(data)
        self.naive.remove(entries)
        self.evictor.remove(array(entries))

    @precondition(lambda self: self.naive.blocks)
    @rule(slot_class=st.integers(0, CLASSES - 1), count=st.integers(1, 5))
    def evict(self, slot_class: int, count: int) -> None:
        victims = self.evictor.victims(slot_class, count)
        self.naive.remove(victims.tolist())
        self.evictor.remove(victims)

    @rule(data=st.data())
    def ask_for_several(self, data: st.DataObject) -> None:
        entries = data.draw(st.lists(st.integers(0, ENTRIES - 1), max_size=12, unique=True))
        assert self.evictor.evictable_together(array(entries)).tolist() == self.naive.together(entries)

    @invariant()
    def agrees_with_the_oracle(self) -> None:
        self.evictor.check_invariants()
        before = state_of(self.evictor)
        blocks = self.naive.blocks
        for slot_class in range(CLASSES):
            expected = self.naive.victims(slot_class)
            assert self.evictor.victims(slot_class, ENTRIES).tolist() == expected
            assert self.evictor.victims(slot_class, 2).tolist() == expected[:2]
        assert self.evictor.next_class() == self.naive.next_class()
        assert self.evictor.rank(array(list(blocks))).tolist() == [self.naive.rank(b) for b in blocks.values()]
        hidden = [entry in blocks and blocks[entry].hidden for entry in range(ENTRIES)]
        assert self.evictor.hidden(EVERYTHING).tolist() == hidden
        assert self.evictor.evictable(EVERYTHING).tolist() == [self.naive.evictable(e) for e in range(ENTRIES)]
        assert state_of(self.evictor) == before, "a question changed something"


@pytest.mark.parametrize("policy", POLICIES)
def test_agrees_with_its_oracle(policy: str) -> None:
    machine = type(f"Machine_{policy}", (Machine,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))


@pytest.mark.parametrize("policy", POLICIES)
def test_victims_in_order_are_the_next_victims_one_by_one(policy: str) -> None:
    """What a batch promises is what happens when its entries go singly."""
    seed = 7
    random = np.random.default_rng(seed)
    evictor = EVICTORS[policy](400, 2)
    for first in range(0, 400, 20):
        add(evictor, list(range(first, first + 20)), slot_class=first // 20 % 2, weight=int(random.integers(1, 9)))
        evictor.touch(array(random.integers(0, first + 20, 60).tolist()))
    for slot_class in range(2):
        for entry in evictor.victims(slot_class, 150).tolist():
            assert evictor.victims(slot_class, 1).tolist() == [entry], f"seed {seed}"
            evictor.remove(array([entry]))
    evictor.check_invariants()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_calls_give_the_same_state(policy: str) -> None:
    states = []
    for _ in range(2):
        random = np.random.default_rng(3)
        evictor = EVICTORS[policy](500, 4)
        add(evictor, list(range(500)), slot_class=2)
        for _ in range(40):
            evictor.touch(array(random.integers(0, 500, 30).tolist()))
            victims = evictor.victims(2, 5)
            evictor.remove(victims)
            add(evictor, victims.tolist(), slot_class=2)
        states.append(state_of(evictor))
    assert states[0] == states[1]


class Cache:
    """A cache of `room` blocks of one class; a read of what is not there stores it."""

    def __init__(self, policy: str, room: int) -> None:
        self.evictor = EVICTORS[policy](room, 1)
        self.entry_of: dict[int, int] = {}
        self.key_of: dict[int, int] = {}
        self.free = list(range(room))[::-1]

    def read(self, key: int) -> bool:
        if key in self.entry_of:
            self.evictor.touch(array([self.entry_of[key]]))
            return True
        if not self.free:
            victims = self.evictor.victims(0, 1)
            self.evictor.remove(victims)
            self.free += victims.tolist()
            del self.entry_of[self.key_of.pop(int(victims[0]))]
        entry = self.free.pop()
        add(self.evictor, [entry], prints=[key])
        self.entry_of[key], self.key_of[entry] = entry, key
        return False


@pytest.mark.parametrize("policy", POLICIES)
def test_a_scan_does_not_push_out_what_is_read_again_and_again(policy: str) -> None:
    """lru is the contrast: it keeps nothing."""
    cache = Cache(policy, 200)
    hot = range(60)
    for _ in range(4):
        for key in hot:
            cache.read(key)
    for key in range(1000, 2000):
        cache.read(key)
    kept = sum(key in cache.entry_of for key in hot)
    cache.evictor.check_invariants()
    assert kept == (0 if policy == "lru" else len(hot))


@pytest.mark.parametrize("policy", ["lfu", "s3fifo", "prefix"])
def test_what_was_hot_goes_in_the_end(policy: str) -> None:
    """Without ageing, a working set of the past would hold its place for ever."""
    cache = Cache(policy, 100)
    for _ in range(6):
        for key in range(80):
            cache.read(key)
    for turn in range(60):
        for key in range(1000, 1090):
            cache.read(key + turn // 20 * 90)
    assert sum(key in cache.entry_of for key in range(80)) == 0


def test_s3fifo_what_comes_back_soon_goes_to_the_main_queue() -> None:
    cache = Cache("s3fifo", 40)
    for key in range(50):
        cache.read(key)
    gone = [key for key in range(50) if key not in cache.entry_of]
    assert gone == list(range(10))
    cache.read(9)
    for key in range(100, 180):
        cache.read(key)
    assert 9 in cache.entry_of and 49 not in cache.entry_of


def test_s3fifo_one_search_is_bounded() -> None:
    """With all blocks read often, the one behind the bound goes, and the queue has moved by as much."""
    entries = list_kernels.PASSES_MAX + 600
    evictor, naive = S3Fifo(entries, 1), NAIVE["s3fifo"](entries)
    rows = list(range(entries))
    add(evictor, rows)
    naive.insert([(entry, 0, NO_ENTRY, 1, entry) for entry in rows])

    def evict_the_first_after_three_reads() -> int:
        for _ in range(3):
            evictor.touch(array(rows))
            naive.touch(rows)
        expected = [block.entry for block in naive.evict(0, 3)[0]]
        assert evictor.victims(0, 3).tolist() == expected
        evictor.remove(array(expected[:1]))
        naive.remove(expected[:1])
        evictor.check_invariants()
        rows.remove(expected[0])
        return expected[0]

    assert evict_the_first_after_three_reads() == entries - 1 - list_kernels.PASSES_MAX
    # What was passed over is in the main queue now, and was read again.
    assert evict_the_first_after_three_reads() != entries - 1


def test_prefix_a_block_with_a_child_is_no_victim() -> None:
    evictor = Prefix(ENTRIES, 2)
    add(evictor, [0, 1, 2])
    add(evictor, [3, 4], parents=[1, 3], slot_class=1)
    evictor.touch(array([3, 4]))
    assert evictor.victims(0, 9).tolist() == [2], "1 has a child of another class"
    evictor.hide(array([4]))
    evictor.remove(array([2]))
    assert not evictor.victims(0, 9).tolist() and not evictor.victims(1, 9).tolist() and evictor.next_class() is None
    assert evictor.evictable_together(EVERYTHING[:5]).tolist() == [False] * 5, "a hidden tail keeps its prefix"
    evictor.show(array([4]))
    assert evictor.next_class() == 1 and evictor.victims(1, 9).tolist() == [4, 3]
    assert evictor.evictable_together(array([0, 1, 3, 4])).all()
    evictor.remove(array([4, 3]))
    assert evictor.victims(0, 9).tolist() == [1, 0]
    evictor.check_invariants()


def test_prefix_links_to_an_index_that_names_another_block_are_void() -> None:
    evictor = Prefix(ENTRIES, 1)
    add(evictor, [0, 1, 2])
    evictor.remove(array([1]))
    add(evictor, [1, 5], parents=[NO_ENTRY, 1])
    evictor.check_invariants()
    evictor.remove(array([2]))
    evictor.check_invariants()
    assert evictor.evictable(array([1, 5])).tolist() == [False, True]
    # A cycle of indices over several lives: 5 hangs on 1, and then 1 on 5.
    evictor.remove(array([1]))
    add(evictor, [1], parents=[5])
    evictor.check_invariants()
    assert evictor.victims(0, 9).tolist() == [0, 1, 5]


def test_prefix_what_costs_more_to_compute_stays_longer() -> None:
    evictor = Prefix(ENTRIES, 1)
    for entry, weight in enumerate((3, 1, 2, 9)):
        add(evictor, [entry], weight=weight)
    assert evictor.victims(0, 9).tolist()[-1] == 3 and evictor.victims(0, 1).tolist() == [1]


@pytest.mark.parametrize("seed", range(3))
def test_prefix_the_clock_may_start_again(seed: int) -> None:
    """Twins, one of them just below the bound of its clock: they name the same victims throughout."""
    twins = [Prefix(300, 1), Prefix(300, 1)]
    twins[1]._scalars[prefixes.CLOCK] = prefixes.CLOCK_MAX - 500
    random = np.random.default_rng(seed)
    for twin in twins:
        add(twin, list(range(300)), parents=[entry - 1 if entry % 10 else NO_ENTRY for entry in range(300)])
    for _ in range(30):
        touched = array(random.integers(0, 300, 40).tolist())
        names = [twin.victims(0, 20).tolist() for twin in twins]
        assert names[0] == names[1], f"seed {seed}"
        for twin in twins:
            twin.touch(touched)
            twin.remove(array(names[0]))
            add(twin, names[0][::-1], parents=[NO_ENTRY, *names[0][:0:-1]])
            twin.check_invariants()
    assert twins[1]._scalars[prefixes.CLOCK] < prefixes.CLOCK_MAX - 500, "the clock has started again"


def test_prefix_what_is_older_than_the_clock_reaches_is_all_the_same_age() -> None:
    evictor = Prefix(ENTRIES, 1)
    for entry in (5, 3, 9, 1, 7, 2):
        add(evictor, [entry])
    evictor._scalars[prefixes.CLOCK] = prefixes.CLOCK_MAX - 1
    add(evictor, [0, 4])
    evictor.check_invariants()
    assert evictor.victims(0, 9).tolist() == [1, 2, 3, 5, 7, 9, 4, 0]


@pytest.mark.parametrize("policy", POLICIES)
def test_bugs_of_the_caller_are_caught(policy: str) -> None:
    evictor = EVICTORS[policy](ENTRIES, CLASSES)
    add(evictor, [1, 2])
    evictor.hide(array([1]))
    for call in (
        lambda: evictor.hide(array([1])),
        lambda: evictor.show(array([2])),
        lambda: evictor.touch(array([3])),
        lambda: evictor.remove(array([3])),
        lambda: add(evictor, [2]),
        lambda: add(evictor, [3], slot_class=CLASSES),
    ):
        with pytest.raises(AssertionError):
            call()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_entry_costs_24_bytes_at_most(policy: str) -> None:
    count = 1 << 18
    evictor = EVICTORS[policy](count, 64)
    add(evictor, list(range(count)), parents=[NO_ENTRY] * count)
    owned = sum(value.nbytes for value in vars(evictor).values() if isinstance(value, np.ndarray))
    assert owned <= 24.1 * count
