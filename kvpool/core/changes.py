"""What a source says about its blocks: facts in order, between a source's core and a directory. Plain data only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from kvpool.core.ids import Fidelity


class ChangeKind(IntEnum):
    """What happened to the keys of a change; numbers as on the wire."""

    STORED = 1
    REMOVED = 2
    CLEARED = 3


@dataclass(frozen=True, slots=True)
class BlockChange:
    """One kind of change to a run of keys.

    `keys` are packed, 16 bytes each, as they are stored: with group and shard folded in. CLEARED has none: the source
    holds nothing any more. `fidelity` means something for STORED only.
    """

    kind: ChangeKind
    keys: bytes
    fidelity: Fidelity = Fidelity.EXACT
