"""Who has room for which blocks: an instance's HBM, a node's DRAM and SSD. Ground truth; pure.

Blocks are the trace's hash ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvpool.core.ids import Tier


class KvCache:
    """KV blocks of one instance: held by jobs, or idle and evicted when others need the room, the coldest first.

    A block that nobody else can find yet (being computed, or generated) is private to its job: only counted.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.private_blocks = 0
        self._held: dict[int, int] = {}  # block -> jobs that hold it
        self._idle: dict[int, None] = {}  # coldest first

    @property
    def available_blocks(self) -> int:
        """Free or evictable."""
        return self.capacity_blocks - self.private_blocks - len(self._held)

    def has(self, block: int) -> bool:
        return block in self._held or block in self._idle

    def match(self, blocks: Sequence[int]) -> int:
        """How many leading blocks are here."""
        count = 0
        for block in blocks:
            if block not in self._held and block not in self._idle:
                break
            count += 1
        return count

    def admit(self, reused: Sequence[int], private_blocks: int) -> list[int] | None:
        """Holds `reused`, which are here, and makes room for more; what was evicted for it, or None without room."""
        idle = sum(1 for block in reused if block in self._idle)
        if self.available_blocks - idle < private_blocks:
            return None
        for block in reused:
            if block in self._idle:
                del self._idle[block]
                self._held[block] = 1
            else:
                self._held[block] += 1
        self.private_blocks += private_blocks
        evicted = []
        while self.private_blocks + len(self._held) + len(self._idle) > self.capacity_blocks:
            block = next(iter(self._idle))
            del self._idle[block]
            evicted.append(block)
        return evicted

    def commit(self, block: int) -> bool:
        """A job's private block can be found from now on. False if one like it is here already: it stays private."""
        if block in self._held or block in self._idle:
            return False
        self.private_blocks -= 1
        self._held[block] = 1
        return True

    def release(self, held: Sequence[int], private_blocks: int) -> None:
        """A job lets go. Its blocks stay as cache, tails colder than heads."""
        self.private_blocks -= private_blocks
        for block in reversed(held):
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]
                self._idle[block] = None

    def count(self) -> int:
        """Blocks that can be found."""
        return len(self._held) + len(self._idle)

    def blocks(self) -> list[int]:
        return [*self._held, *self._idle]

    def check_invariants(self) -> None:
        assert self.private_blocks >= 0 and all(count > 0 for count in self._held.values())
        assert not self._held.keys() & self._idle.keys()
        assert self.private_blocks + len(self._held) + len(self._idle) <= self.capacity_blocks


@dataclass(slots=True)
class StoreChanges:
    """What a node has to tell the directory, by tier, removals before additions."""

    removed: dict[Tier, dict[int, None]] = field(default_factory=lambda: {Tier.DRAM: {}, Tier.SSD: {}})
    stored: dict[Tier, dict[int, None]] = field(default_factory=lambda: {Tier.DRAM: {}, Tier.SSD: {}})

    def drop(self, tier: Tier, block: int) -> None:
        """One that came and went within these changes is not spoken of."""
        if block in self.stored[tier]:
            del self.stored[tier][block]
        else:
            self.removed[tier][block] = None


class NodeStore:
    """Blocks of one node: DRAM by LRU, what is evicted from it goes to the SSD, if there is one, by LRU as well."""

    def __init__(self, dram_blocks: int, ssd_blocks: int) -> None:
        self.capacity_blocks = {Tier.DRAM: dram_blocks, Tier.SSD: ssd_blocks}
        self._kept: dict[Tier, dict[int, None]] = {Tier.DRAM: {}, Tier.SSD: {}}  # coldest first
        self._pins: dict[int, int] = {}

    def has(self, block: int, tier: Tier) -> bool:
        return block in self._kept[tier]

    def leading(self, blocks: Sequence[int], tier: Tier) -> int:
        """How many leading blocks a tier holds."""
        kept, count = self._kept[tier], 0
        for block in blocks:
            if block not in kept:
                break
            count += 1
        return count

    def touch(self, blocks: Sequence[int], tier: Tier) -> None:
        """They were read: the last goes first, so that heads outlive tails."""
        kept = self._kept[tier]
        for block in reversed(blocks):
            if block in kept:
                del kept[block]
                kept[block] = None

    def pin(self, blocks: Sequence[int]) -> None:
        """A hand-off needs them: they are not evicted from DRAM until `unpin`."""
        for block in blocks:
            self._pins[block] = self._pins.get(block, 0) + 1

    def unpin(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            count = self._pins.get(block, 0) - 1
            if count > 0:
                self._pins[block] = count
            else:
                self._pins.pop(block, None)

    def store(self, blocks: Sequence[int]) -> StoreChanges:
        """Writes blocks to DRAM. Those for which pinned ones leave no room are left out."""
        changes = StoreChanges()
        dram = self._kept[Tier.DRAM]
        stored = changes.stored[Tier.DRAM]
        for block in reversed(blocks):
            if block in dram:
                del dram[block]
            elif len(dram) < self.capacity_blocks[Tier.DRAM] or self._evict(changes):
                stored[block] = None
            else:
                continue
            dram[block] = None
        return changes

    def _evict(self, changes: StoreChanges) -> bool:
        dram = self._kept[Tier.DRAM]
        for block in dram:
            if block not in self._pins:
                break
        else:
            return False
        del dram[block]
        changes.drop(Tier.DRAM, block)
        ssd = self._kept[Tier.SSD]
        if not self.capacity_blocks[Tier.SSD]:
            return True
        if block in ssd:
            del ssd[block]
        else:
            if len(ssd) >= self.capacity_blocks[Tier.SSD]:
                coldest = next(iter(ssd))
                del ssd[coldest]
                changes.drop(Tier.SSD, coldest)
            changes.stored[Tier.SSD][block] = None
        ssd[block] = None
        return True

    def count(self, tier: Tier) -> int:
        return len(self._kept[tier])

    def blocks(self, tier: Tier) -> list[int]:
        return list(self._kept[tier])

    def check_invariants(self) -> None:
        for tier, kept in self._kept.items():
            assert len(kept) <= self.capacity_blocks[tier]
        assert all(count > 0 for count in self._pins.values())
