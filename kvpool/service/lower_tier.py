"""What a source may have below its memory: blocks that it can bring up when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ids import KeyArray, Tier


@dataclass(frozen=True, eq=False)
class Promoted:
    """What a promotion brought; it is held in memory until `release`.

    below: bool (keys,), which blocks were not in memory by themselves.
    """

    below: NDArray[np.bool_]
    release: Callable[[], None] = lambda: None


class LowerTier(Protocol):
    """Called in the event loop of the source. An SSD below a node's DRAM; an engine's HBM below its staging memory."""

    tier: Tier

    def contains(self, namespace_id: bytes, keys: KeyArray) -> NDArray[np.bool_]:
        """Which keys are down there in this namespace; changes nothing."""
        ...

    async def promote(self, namespace_id: bytes, keys: KeyArray, timeout_s: float) -> Promoted:
        """Brings blocks into memory that are down there only.

        They are held there until the caller, who has leased them by then, calls `release`. Blocks that can't be
        brought (no room, bad bytes, no time) stay where they are, and are absent to the caller.
        """
        ...

    async def remove(
        self, namespace_id: bytes, keys: KeyArray | None, name_prefix: bytes, remove_above: Callable[[], int]
    ) -> int:
        """Removes keys, or with None all of a namespace whose names begin so, down there and then from memory.

        Args: remove_above: removes from memory, and says how many blocks were there.
        Returns: blocks removed, once they can't come back.
        Raises: KvpoolError if that can't be had now; memory is left as it is.
        """
        ...
