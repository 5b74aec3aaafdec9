"""HBM tier: how blocks get out of and into an engine's own cache. Interfaces only; implementations live in engines.

Nothing here may import torch. A staging area is host memory with one row a block; bytes in it are good once its event
has happened, and blocks of the device hold what was scattered once that event has happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class CopyEvent(Protocol):
    """The end of an asynchronous copy."""

    def wait(self, timeout_s: float) -> bool:
        """True once the copy is done, False if it is not by then. May be called again."""
        ...


class Done:
    """The event of a copy that is over when it is returned."""

    def wait(self, timeout_s: float) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Staging:
    """Host rows for some blocks: row `rows[i]` of `data` belongs to the i-th block asked for."""

    data: NDArray[np.uint8]  # uint8 (host rows, block_bytes)
    rows: NDArray[np.int64]
    event: CopyEvent
    release: Callable[[], None] = field(
        default=lambda: None
    )  # gives the rows back, also before the event; call it once


class BlockMemory(Protocol):
    """An engine's block-contiguous cache, seen as `block_count` rows of `block_bytes` bytes.

    The caller owns the blocks it names for as long as the copy lasts: nobody writes them during a gather, nobody reads
    or writes them during a scatter.
    """

    block_count: int
    block_bytes: int
    batch_blocks_max: int  # blocks in one call at most

    def gather(self, blocks: NDArray[np.int64]) -> Staging:
        """Starts copying blocks to host rows; they are readable once `event` has happened."""
        ...

    def receive(self, blocks: NDArray[np.int64]) -> Staging:
        """Host rows to fill with the bytes of `blocks`; usable once `event` has happened."""
        ...

    def scatter(self, staging: Staging, blocks: NDArray[np.int64], indices: NDArray[np.int64]) -> CopyEvent:
        """Starts copying row `staging.rows[i]` to `blocks[i]` for each i in `indices`; the others stay as they are."""
        ...
