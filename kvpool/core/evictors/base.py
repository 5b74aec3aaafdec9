"""What an eviction policy is to the store: entries in, victims out. Interfaces and bounds only, no policy.

Entries are indices below `entries_max`; a policy keeps arrays over them. A victim is asked for by slot class, since a
slot is of use to objects of its own class. Nothing here knows keys, bytes or time: the clock of a policy is the number
of blocks that were inserted and read.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvpool.core.index import Entries

#: Classes must fit in the bits of `state` that hold them.
CLASSES_MAX: Final = 1024

Mask = NDArray[np.bool_]
Ranks = NDArray[np.uint64]


#: A policy that counts uses lets them age over so many times the blocks that there are.
PERIODS: Final = 4
_RESIDENTS_FEW: Final = 63


def period_of(residents: int, period: int) -> int:
    """In how many insertions and reads uses age, for a number of blocks; `period` is what it was.

    In powers of two, and with slack before it shrinks: a change costs a look at each block.
    """
    wanted = PERIODS << max(residents - 1, _RESIDENTS_FEW).bit_length()
    return wanted if wanted > period or 4 * wanted < period else period


def as_entries(entries: NDArray[Any]) -> Entries:
    """int32 (n), contiguous, as kernels want them."""
    return np.ascontiguousarray(entries, dtype=np.int32)


class Evictor(Protocol):
    """One policy. Arrays have a row an entry; batches are in prompt order, and of a batch the tail goes first."""

    name: str

    def __init__(self, entries_max: int, classes: int) -> None: ...

    def insert(
        self,
        entries: Entries,
        slot_classes: NDArray[np.int32],
        parents: NDArray[np.int32],
        weights: NDArray[np.uint32],
        fingerprints: NDArray[np.uint64],
    ) -> None:
        """New readable blocks, evictable at once.

        Args:
            slot_classes: int32 (n), below `classes`.
            parents: int32 (n), entry of the block before in the prefix; NO_ENTRY where there is none or it is unknown.
            weights: uint32 (n) >= 1, cost of computing a KiB again, in any unit.
            fingerprints: uint64 (n), a hash of the key: the same if the block comes back in another entry.
        """

    def touch(self, entries: Entries) -> None:
        """Blocks were read, hidden or not."""

    def hide(self, entries: Entries) -> None:
        """Somebody holds these: no victims until `show`. Hidden twice is the caller's bug."""

    def show(self, entries: Entries) -> None:
        """Nobody holds these any more. Not a touch: each is where it would be had it never been hidden."""

    def remove(self, entries: Entries) -> None:
        """Gone, evicted or removed, hidden or not; their indices may name other blocks from now on."""

    def hidden(self, entries: Entries) -> Mask:
        """Which are hidden; bool (n)."""

    def evictable(self, entries: Entries) -> Mask:
        """Which may go now, each for itself; bool (n)."""

    def evictable_together(self, entries: Entries) -> Mask:
        """Which may go now if the others of `entries` go with them; bool (n). For emptying a whole span."""

    def victims(self, slot_class: int, count: int) -> Entries:
        """At most `count` entries of a class in the order in which they go: take them from the front. int32.

        Each may go once those before it have gone. Changes no decision.
        """

    def next_class(self) -> int | None:
        """The class whose next victim goes first of all; None if nothing is evictable."""

    def rank(self, entries: Entries) -> Ranks:
        """uint64 (n), comparable over all classes until the next change: lower goes earlier."""

    def check_invariants(self) -> None: ...
