"""What vLLM's scheduler side tells its workers each step, and what they count. Plain data that pickles."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class LoadMode(Enum):
    """How blocks come from the pool.

    IN_STEP: within the step that needs them; a block that is lost is recomputed by vLLM in the next one.
    AHEAD: the request waits for a step of its own; a lost block makes it begin anew without the pool. For caches and
        runners of vLLM that can't take back a step's lost block.
    """

    OFF = "off"
    IN_STEP = "in step"
    AHEAD = "ahead"


@dataclass(frozen=True, slots=True)
class GroupBlocks:
    """Blocks of one group of layers: packed 16-byte keys, and the engine's block for each."""

    group: int  # as the pool numbers it
    keys: bytes
    block_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.block_ids)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Blocks of one request, from its token `begin_tokens` on, to be loaded, or to be stored."""

    request_id: str
    blocks: tuple[GroupBlocks, ...]
    begin_tokens: int = 0

    @property
    def block_ids(self) -> tuple[int, ...]:
        return tuple(block for part in self.blocks for block in part.block_ids)


@dataclass(slots=True)
class StepPlan:
    """All that one step loads, and what the workers are to store, by the number of the step that computed it."""

    number: int = 0
    idle: bool = False  # nothing is computed in this step
    awaits: bool = False  # some request waits for blocks that another engine stores
    ahead: bool = False  # requests wait to hear that their loads are through
    loads: list[Transfer] = field(default_factory=list)
    saves: dict[int, list[Transfer]] = field(default_factory=dict)


@dataclass(slots=True)
class Counts:
    """Since they were last taken; of a worker, or of the scheduler's side."""

    blocks_loaded: int = 0
    blocks_failed: int = 0
    blocks_saved: int = 0
    blocks_unsaved: int = 0
    bytes_loaded: int = 0
    bytes_saved: int = 0
    load_us: int = 0
    save_us: int = 0
    lookups: int = 0
    lookup_us: int = 0
