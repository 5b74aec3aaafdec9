"""Which cache block holds what: free list, reference counts, promises and the prefix cache. Knows no tensors.

Blocks that nobody references keep their content and stay findable until they are handed out again. They are handed out
in this order: blocks without a key first, then the least recently released; of one request its tail first, so that
prefixes live longest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from kvpool.core.ids import KEY_BYTES, KeyArray


class BlockPool:
    """Blocks 0 to `block_count` - 1 and who holds them. Not thread-safe: it belongs to the thread that computes."""

    def __init__(self, block_count: int) -> None:
        self.block_count = block_count
        self._references = [0] * block_count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(block_count))
        self._key_of: list[bytes | None] = [None] * block_count
        self._block_of: dict[bytes, int] = {}
        self._promised = 0
        self._changes: list[tuple[bool, bytes]] = []

    @property
    def available(self) -> int:
        """Blocks that are neither referenced nor promised."""
        return len(self._free) - self._promised

    @property
    def cached(self) -> int:
        return len(self._block_of)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest leading run of keys in the prefix cache. Changes nothing."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def lendable(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Blocks by key, of those that are cached, as many as can be acquired without what is promised to others."""
        found: dict[bytes, int] = {}
        spare = self.available
        for key in keys:
            block = self._block_of.get(key)
            if block is None or key in found:
                continue
            spare -= self._references[block] == 0
            if spare < 0:
                break
            found[key] = block
        return found

    def unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` would leave the free list if they were acquired."""
        return sum(self._references[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each block."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Takes a reference from each block; `blocks` in prompt order, released from the tail."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released once too often"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._key_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def promise(self, count: int) -> None:
        """Sets `count` free blocks aside for later `allocate` calls."""
        assert 0 <= count <= self.available
        self._promised += count

    def unpromise(self, count: int) -> None:
        assert 0 <= count <= self._promised
        self._promised -= count

    def allocate(self) -> int:
        """Turns one promised block into a referenced one; what it held before is forgotten."""
        assert self._promised > 0, "allocate without promise"
        self._promised -= 1
        block, _ = self._free.popitem(last=False)
        self._references[block] = 1
        self._forget(block)
        return block

    def register(self, block: int, key: bytes) -> bool:
        """Makes a referenced, completely written block findable. False if its content is cached elsewhere already."""
        assert self._references[block] > 0
        if key in self._block_of or self._key_of[block] is not None:
            return False
        self._block_of[key] = block
        self._key_of[block] = key
        self._changes.append((True, key))
        return True

    def clear(self) -> None:
        """Forgets every cached block that nobody references."""
        for block in self._free:
            self._forget(block)

    def take_changes(self) -> list[tuple[bool, bytes]]:
        """(stored or removed, key) since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def cached_keys(self) -> KeyArray:
        """Keys of all cached blocks; uint8 (blocks, 16)."""
        packed = np.frombuffer(b"".join(self._block_of), dtype=np.uint8)
        return packed.reshape(-1, KEY_BYTES)

    def check_invariants(self) -> None:
        assert 0 <= self._promised <= len(self._free)
        for block, references in enumerate(self._references):
            assert (references == 0) == (block in self._free), f"block {block}: {references} references"
            key = self._key_of[block]
            assert key is None or self._block_of[key] == block
        assert sum(key is not None for key in self._key_of) == len(self._block_of)

    def check_references(self, held: Sequence[int], promised: int) -> None:
        """Asserts that reference counts and promises are exactly what their owners say."""
        assert self._references == list(held), "references differ from what owners hold"
        assert self._promised == promised

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            self._key_of[block] = None
            del self._block_of[key]
            self._changes.append((False, key))
