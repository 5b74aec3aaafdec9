"""What may be read, kept in plain lists by somebody who has never seen the implementation.

A put *may* be there from the call that commits it, and is *certain* once that was acknowledged or read. A removal ends
all puts that were settled (acknowledged or failed) before it began, once it was acknowledged. A later certain put of an
object ends the earlier ones. What has ended is never read by a read that begins afterwards; everything may be missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvpool.core.ids import Fidelity
from tests.simulation.content import Bytes, Item


class Violation(AssertionError):
    """The pool broke a promise."""


@dataclass(eq=False, slots=True)
class Put:
    """Times count events. `ended_at` None: a read may see it."""

    item: Item
    version: int
    fidelity: Fidelity
    begun: int
    settled: int | None = None
    certain: bool = False
    ended_at: int | None = None

    def ends(self, at: int) -> None:
        if self.ended_at is None:
            self.ended_at = at


@dataclass(eq=False, slots=True)
class Removal:
    """Items, by number, that somebody wants removed; it takes effect at some time before it is acknowledged."""

    numbers: list[int]
    acknowledged_at: int | None = None

    def may_be_after(self, at: int) -> bool:
        return self.acknowledged_at is None or self.acknowledged_at > at


@dataclass(eq=False, slots=True)
class Grant:
    """Bytes that somebody was told he may write, in one memory, until he has stopped for good."""

    memory: int
    begin: int
    end: int
    who: str


class Auditor:
    """All histories of all sources. `source` is a name."""

    def __init__(self) -> None:
        self._time = 0
        self._puts: dict[tuple[str, int], list[Put]] = {}
        self._grants: dict[int, dict[int, Grant]] = {}
        self._next_grant = 0
        self.reads = self.hits = 0

    def now(self) -> int:
        self._time += 1
        return self._time

    # ------------------------------------------------------------ puts, removals

    def put_begins(self, source: str, item: Item, version: int, fidelity: Fidelity) -> Put:
        put = Put(item, version, fidelity, self.now())
        self._puts.setdefault((source, item.number), []).append(put)
        return put

    def put_failed(self, put: Put) -> None:
        """Nobody knows whether it took effect; it will not any more."""
        put.settled = self.now()

    def put_acknowledged(self, source: str, put: Put) -> None:
        put.settled = self.now()
        self._is_certain(source, put)

    def _is_certain(self, source: str, put: Put) -> None:
        if put.certain:
            return
        put.certain = True
        if put.item.is_object:
            for other in self._puts[source, put.item.number]:
                if other is not put and other.settled is not None and other.settled < put.begun:
                    other.ends(self._time)

    def removal_acknowledged(self, source: str, begun: int, covers: Callable[[Item], bool]) -> None:
        at = self.now()
        for (name, _), puts in self._puts.items():
            if name == source:
                for put in puts:
                    if put.settled is not None and put.settled < begun and covers(put.item):
                        put.ends(at)

    def blocks_may_be_back(self, source: str) -> None:
        """Damage took records of removals, or the disk was away when they were acknowledged: the one exception.

        Blocks are named by their content, so that what comes back is right. Objects have no exception.
        """
        for (name, _), puts in self._puts.items():
            if name == source:
                for put in puts:
                    if not put.item.is_object:
                        put.ended_at = None

    # ------------------------------------------------------------ reads

    def read(self, source: str, item: Item, content: Bytes, begun: int, fidelity_min: Fidelity, *, how: str) -> None:
        """A read that began at `begun` says that this is the content. Raises: Violation."""
        self.reads += 1
        at = self.now()
        known = self._puts.get((source, item.number), [])
        alike = [
            put
            for put in known
            if put.fidelity <= fidelity_min
            and len(content) == item.size_bytes(put.version, put.fidelity)
            and (content == item.content(put.version, put.fidelity)).all()
        ]
        legal = [put for put in alike if put.ended_at is None or put.ended_at > begun]
        if not alike:
            raise Violation(f"{how} of {item} from {source}: bytes that were never put ({len(content)} bytes)")
        if not legal:
            story = [(p.version, p.begun, p.settled, p.ended_at) for p in known]
            raise Violation(
                f"{how} of {item} from {source}, begun at {begun}, now {at}: removed or replaced before;"
                f" version {alike[-1].version} of (version, begun, settled, ended) {story}"
            )
        self.hits += 1
        if len(legal) == 1:
            self._is_certain(source, legal[0])

    # ------------------------------------------------------------ who writes where

    def granted(self, memory: int, begin: int, end: int, who: str) -> int:
        """Somebody may write bytes of a memory. Returns a number for `stopped`. Raises: Violation if others may too."""
        mine = self._grants.setdefault(memory, {})
        for other in mine.values():
            if other.begin < end and begin < other.end:
                raise Violation(f"{who} may write {begin} to {end}, and so may {other.who}: {other.begin}..{other.end}")
        self._next_grant += 1
        mine[self._next_grant] = Grant(memory, begin, end, who)
        return self._next_grant

    def stopped(self, memory: int, grant: int) -> None:
        self._grants[memory].pop(grant, None)
