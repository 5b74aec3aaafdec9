"""Plain oracles of the eviction policies: dictionaries and sorting, no lists, no heaps, no arrays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Block:
    entry: int
    slot_class: int
    stamp: int = 0
    uses: int = 0
    hidden: bool = False
    parent: Block | None = None
    weight: int = 16
    main: bool = False
    fingerprint: int = 0


class NaiveLru:
    """By last use."""

    def __init__(self, entries_max: int) -> None:
        self.entries_max, self.clock, self.period = entries_max, 0, 256
        self.blocks: dict[int, Block] = {}

    def insert(self, rows: list[tuple[int, int, int, int, int]]) -> None:
        """Rows: entry, class, parent, weight, fingerprint."""
        self.adapt(len(rows))
        for entry, slot_class, _, _, fingerprint in reversed(rows):
            self.blocks[entry] = Block(entry, slot_class, self.tick(), uses=1, fingerprint=fingerprint)

    def touch(self, entries: list[int]) -> None:
        for entry in reversed(entries):
            self.blocks[entry].stamp = self.tick()

    def hide(self, entries: list[int], hidden: bool) -> None:
        for entry in entries:
            self.blocks[entry].hidden = hidden

    def remove(self, entries: list[int]) -> None:
        for entry in entries:
            del self.blocks[entry]

    def adapt(self, fresh: int) -> None:
        """The period follows the number of blocks, and shrinks only when it is much too long."""
        wanted = 256
        while wanted < 4 * (len(self.blocks) + fresh):
            wanted *= 2
        if wanted > self.period or 4 * wanted < self.period:
            self.period = wanted

    def tick(self) -> int:
        self.clock += 1
        return self.clock - 1

    def rank(self, block: Block) -> int:
        return block.stamp

    def order(self, block: Block) -> tuple[int, int, int]:
        """Rank; of equal ones the lower class goes first, then what was used less."""
        return self.rank(block), block.slot_class, block.uses

    def candidates(self, gone: list[Block]) -> list[Block]:
        """What may go once `gone` are gone."""
        return [block for block in self.blocks.values() if not block.hidden and block not in gone]

    def victims(self, slot_class: int) -> list[int]:
        """All of a class that can go one after the other."""
        gone: list[Block] = []
        while own := [block for block in self.candidates(gone) if block.slot_class == slot_class]:
            gone.append(min(own, key=self.order))
        return [block.entry for block in gone]

    def next_class(self) -> int | None:
        candidates = self.candidates([])
        return min(candidates, key=self.order).slot_class if candidates else None

    def evictable(self, entry: int) -> bool:
        return entry in self.blocks and self.blocks[entry] in self.candidates([])

    def together(self, entries: list[int]) -> list[bool]:
        return [self.evictable(entry) for entry in entries]


class NaiveLfu(NaiveLru):
    """By power of two of a halved counter, a level being worth a period of stamps."""

    def touch(self, entries: list[int]) -> None:
        for entry in reversed(entries):
            block = self.blocks[entry]
            age = (self.clock - block.stamp) // self.period
            block.uses = min((block.uses >> min(age, 4)) + 1, 15)
            block.stamp = self.tick()

    def rank(self, block: Block) -> int:
        return block.stamp + (block.uses.bit_length() - 1) * self.period


class NaivePrefix(NaiveLru):
    """Leaves by last use plus a period for each use, by weight. Links are references, so no index dangles."""

    def __init__(self, entries_max: int) -> None:
        super().__init__(entries_max)
        self.mean = 0

    def insert(self, rows: list[tuple[int, int, int, int, int]]) -> None:
        self.adapt(len(rows))
        for i, (entry, slot_class, parent, weight, _) in enumerate(rows):
            block = Block(entry, slot_class, self.clock + len(rows) - 1 - i, uses=1)
            block.parent = self.blocks.get(parent)
            self.mean = self.mean or weight << 8
            self.mean += ((weight << 8) - self.mean) // 64
            block.weight = min(max((weight << 12) // max(self.mean, 1), 1), 255)
            self.blocks[entry] = block
        self.clock += len(rows)

    touch = NaiveLfu.touch

    def rank(self, block: Block) -> int:
        again = min(1 + 4 * (block.uses - 1) ** 2, 128)
        value = block.stamp + min(self.period * block.weight * again >> 9, 1 << 30)
        return value << 32 | block.entry

    def candidates(self, gone: list[Block]) -> list[Block]:
        left = [block for block in self.blocks.values() if block not in gone]
        parents = {id(block.parent) for block in left}
        return [block for block in left if not block.hidden and id(block) not in parents]

    def together(self, entries: list[int]) -> list[bool]:
        gone: list[Block] = []
        chosen = [self.blocks[entry] for entry in entries if entry in self.blocks]
        while more := [block for block in self.candidates(gone) if block in chosen]:
            gone += more
        return [entry in self.blocks and self.blocks[entry] in gone for entry in entries]


class NaiveS3Fifo(NaiveLru):
    """Two queues a class as lists of blocks, oldest first, and evictions that are really carried out on copies."""

    passes_max = 2048

    def __init__(self, entries_max: int) -> None:
        super().__init__(entries_max)
        self.queues: dict[int, tuple[list[Block], list[Block]]] = {}
        self.ghosts: list[list[int]] = [[] for _ in range(-(-entries_max // 4))]

    def insert(self, rows: list[tuple[int, int, int, int, int]]) -> None:
        remembered = [self.take_ghost(row[4]) for row in rows]
        for (entry, slot_class, _, _, fingerprint), main in reversed(list(zip(rows, remembered, strict=True))):
            block = Block(entry, slot_class, self.tick(), main=main, fingerprint=fingerprint)
            self.blocks[entry] = block
            self.queues.setdefault(slot_class, ([], []))[main].append(block)

    def touch(self, entries: list[int]) -> None:
        for entry in entries:
            self.blocks[entry].uses = min(self.blocks[entry].uses + 1, 3)

    def remove(self, entries: list[int]) -> None:
        chosen = [self.blocks.pop(entry) for entry in entries]
        for slot_class in sorted(self.queues):
            own = [block for block in chosen if block.slot_class == slot_class]
            victims, moves = self.evict(slot_class, len(own))
            if sorted(map(id, victims)) == sorted(map(id, own)):
                for block, uses in moves:
                    self.queues[slot_class][block.main].remove(block)
                    block.main, block.uses, block.stamp = True, uses, self.tick()
                    self.queues[slot_class][1].append(block)
        for block in chosen:
            self.queues[block.slot_class][block.main].remove(block)
            if not block.main:
                place, tag = self.ghost(block.fingerprint)
                self.ghosts[place] = [tag, *self.ghosts[place]][:4]

    def evict(self, slot_class: int, count: int) -> tuple[list[Block], list[tuple[Block, int]]]:
        small, main = (list(queue) for queue in self.queues.get(slot_class, ([], [])))
        small = [(block, block.uses) for block in small if not block.hidden]
        main = [(block, block.uses) for block in main if not block.hidden]
        victims: list[Block] = []
        moves: list[tuple[Block, int]] = []
        passes = 0
        while len(victims) < count and small + main:
            if small and (not main or len(small) * 10 >= len(small) + len(main)):
                block, uses = small.pop(0)
                moved = (block, 0) if uses > 1 else None
            else:
                block, uses = main.pop(0)
                moved = (block, uses - 1) if uses > 0 else None
            if moved is None or passes == self.passes_max:
                victims.append(block)
                passes = 0
            else:
                main.append(moved)
                moves.append(moved)
                passes += 1
        return victims, moves

    def victims(self, slot_class: int) -> list[int]:
        return [block.entry for block in self.evict(slot_class, len(self.blocks))[0]]

    def rank(self, block: Block) -> int:
        return block.stamp + (block.uses + 1 if block.main else block.uses > 1) * self.entries_max

    def next_class(self) -> int | None:
        first = [victims[0] for slot_class in sorted(self.queues) if (victims := self.evict(slot_class, 1)[0])]
        return min(first, key=self.rank).slot_class if first else None

    def take_ghost(self, fingerprint: int) -> bool:
        place, tag = self.ghost(fingerprint)
        if tag not in self.ghosts[place]:
            return False
        self.ghosts[place].remove(tag)
        return True

    def ghost(self, fingerprint: int) -> tuple[int, int]:
        mixed = fingerprint * 0x9E3779B97F4A7C15 % 2**64
        mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 % 2**64 >> 32
        return mixed * len(self.ghosts) >> 32, mixed * 0x9E3779B1 % 2**16 | 1


NAIVE = {"lru": NaiveLru, "lfu": NaiveLfu, "s3fifo": NaiveS3Fifo, "prefix": NaivePrefix}
