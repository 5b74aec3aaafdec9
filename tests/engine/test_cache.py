"""The block pool against a naive one, and the order in which blocks are handed out again."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engines.torch.cache import BlockPool

BLOCKS = 12


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def filled(pool: BlockPool, first_key: int, count: int) -> list[int]:
    pool.promise(count)
    blocks = [pool.allocate() for _ in range(count)]
    for i, block in enumerate(blocks):
        assert pool.register(block, key(first_key + i))
    return blocks


def test_prefixes_outlive_tails() -> None:
    pool = BlockPool(8)
    pool.release(filled(pool, 0, 4))
    pool.release(filled(pool, 10, 4))
    filled(pool, 20, 3)
    assert pool.match([key(0), key(1)]) and len(pool.match([key(i) for i in range(4)])) == 1
    assert len(pool.match([key(i) for i in range(10, 14)])) == 4


def test_blocks_without_content_go_first() -> None:
    pool = BlockPool(4)
    pool.release(filled(pool, 0, 2))
    pool.promise(2)
    pool.release([pool.allocate(), pool.allocate()])
    filled(pool, 10, 2)
    assert len(pool.match([key(0), key(1)])) == 2


def test_changes_tell_the_whole_story() -> None:
    pool = BlockPool(2)
    pool.release(filled(pool, 0, 2))
    filled(pool, 10, 1)
    assert pool.take_changes() == [(True, key(0)), (True, key(1)), (False, key(1)), (True, key(10))]
    assert pool.take_changes() == []
    pool.clear()
    assert pool.take_changes() == [(False, key(0))]
    assert [k.tobytes() for k in pool.cached_keys()] == [key(10)]


class PoolMachine(RuleBasedStateMachine):
    """Requests that acquire, allocate, register and release; what is known is kept beside the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.held: list[list[int]] = []
        self.promises: list[int] = []
        self.known: set[bytes] = set()

    @rule(count=st.integers(1, 4))
    def promise(self, count: int) -> None:
        if count <= self.pool.available:
            self.pool.promise(count)
            self.promises.append(count)

    @precondition(lambda self: bool(self.promises))
    @rule(keys=st.lists(st.integers(0, 20), min_size=4, max_size=4), registered=st.booleans())
    def allocate(self, keys: list[int], registered: bool) -> None:
        blocks = [self.pool.allocate() for _ in range(self.promises.pop())]
        if registered:
            for block, number in zip(blocks, keys, strict=False):
                self.pool.register(block, key(number))
        self.held.append(blocks)

    @precondition(lambda self: bool(self.promises))
    @rule()
    def unpromise(self) -> None:
        self.pool.unpromise(self.promises.pop())

    @rule(keys=st.lists(st.integers(0, 20), max_size=4))
    def reuse(self, keys: list[int]) -> None:
        blocks = list(dict.fromkeys(self.pool.match([key(k) for k in keys])))
        if self.pool.unreferenced(blocks) <= self.pool.available:
            self.pool.acquire(blocks)
            self.held.append(blocks)

    @precondition(lambda self: bool(self.held))
    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        self.pool.release(self.held.pop(which % len(self.held)))

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check_invariants()
        references = [0] * BLOCKS
        for blocks in self.held:
            for block in blocks:
                references[block] += 1
        self.pool.check_references(references, sum(self.promises))
        for stored, changed in self.pool.take_changes():
            assert stored != (changed in self.known)
            self.known.symmetric_difference_update({changed})
        assert self.known == {k.tobytes() for k in self.pool.cached_keys()}


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_what_is_promised_is_not_lent() -> None:
    pool = BlockPool(4)
    pool.promise(3)
    blocks = [pool.allocate() for _ in range(3)]
    keys = [bytes([i]) * 16 for i in range(3)]
    for block, key in zip(blocks, keys, strict=True):
        pool.register(block, key)
    pool.release(blocks[:2])
    pool.promise(2)
    # One spare block; the one that somebody references already costs nothing.
    assert pool.lendable([keys[2], keys[0], keys[1], b"x" * 16]) == {keys[2]: blocks[2], keys[0]: blocks[0]}
    assert pool.lendable([keys[0], keys[0]]) == {keys[0]: blocks[0]} and pool.lendable([b"x" * 16]) == {}
    lent = list(pool.lendable(keys[:1]).values())
    pool.acquire(lent)
    pool.check_invariants()
    assert pool.available == 0 and [pool.allocate() for _ in range(2)]
    pool.check_invariants()
