"""Caches against plain ones: who holds what, who goes first."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.ids import Tier
from scheduler.simulator.memory import KvCache, NodeStore


def test_jobs_share_blocks_and_leave_them_behind_as_cache() -> None:
    cache = KvCache(10)
    assert cache.admit([], 4) == []
    assert all(cache.commit(block) for block in (1, 2, 3))
    assert cache.match([1, 2, 3, 4]) == 3
    assert cache.admit([1, 2], 3) == []  # a second job reuses two of them
    assert cache.available_blocks == 10 - 3 - 1 - 3
    cache.release([1, 2, 3], 1)
    assert cache.match([1, 2, 3]) == 3 and cache.available_blocks == 10 - 2 - 3
    assert cache.admit([], 6) is None  # 2 are held and 3 private
    assert cache.admit([], 5) == [3]  # the tail goes first
    cache.check_invariants()


def test_a_block_that_another_job_has_committed_stays_private() -> None:
    cache = KvCache(4)
    assert cache.admit([], 1) == [] and cache.admit([], 1) == []
    assert cache.commit(7) and not cache.commit(7)
    cache.release([7], 0)
    cache.release([], 1)
    assert cache.available_blocks == 4 and cache.match([7]) == 1


class PlainStore:
    """Two LRU lists, the obvious way."""

    def __init__(self, dram: int, ssd: int) -> None:
        self.size = {Tier.DRAM: dram, Tier.SSD: ssd}
        self.kept: dict[Tier, OrderedDict[int, None]] = {Tier.DRAM: OrderedDict(), Tier.SSD: OrderedDict()}

    def store(self, blocks: list[int]) -> None:
        dram, ssd = self.kept[Tier.DRAM], self.kept[Tier.SSD]
        for block in reversed(blocks):
            if block not in dram and len(dram) >= self.size[Tier.DRAM]:
                if not dram:
                    continue
                out, _ = dram.popitem(last=False)
                if self.size[Tier.SSD]:
                    if out not in ssd and len(ssd) >= self.size[Tier.SSD]:
                        ssd.popitem(last=False)
                    ssd[out] = None
                    ssd.move_to_end(out)
            dram[block] = None
            dram.move_to_end(block)


@settings(max_examples=150, deadline=None)
@given(
    dram=st.integers(0, 6),
    ssd=st.integers(0, 6),
    batches=st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=8, unique=True), max_size=20),
)
def test_a_node_keeps_what_two_plain_lru_lists_keep_and_tells_all_changes(
    dram: int, ssd: int, batches: list[list[int]]
) -> None:
    store, plain = NodeStore(dram, ssd), PlainStore(dram, ssd)
    told: dict[Tier, dict[int, None]] = {Tier.DRAM: {}, Tier.SSD: {}}
    for batch in batches:
        changes = store.store(batch)
        plain.store(batch)
        store.check_invariants()
        for tier in (Tier.DRAM, Tier.SSD):
            for block in changes.removed[tier]:
                del told[tier][block]
            for block in changes.stored[tier]:
                assert block not in told[tier]
                told[tier][block] = None
            assert store.blocks(tier) == list(plain.kept[tier])
            assert sorted(told[tier]) == sorted(store.blocks(tier))


def test_blocks_of_a_hand_off_are_not_evicted() -> None:
    store = NodeStore(2, 0)
    store.store([1, 2])
    store.pin([1, 2])
    assert not store.store([3]).stored[Tier.DRAM]
    store.unpin([2])
    assert list(store.store([3]).removed[Tier.DRAM]) == [2]
    assert store.has(1, Tier.DRAM)
