"""One leg of a request on one engine. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from scheduler.core.commands import PullRun


class Leg(Enum):
    """What an engine is to do for a request."""

    WHOLE = "whole"  # prefill and decode
    PREFILL = "prefill"  # of a split request, up to its first token
    DECODE = "decode"  # of a split request, from its first token on


class Phase(Enum):
    """Where a job is on its engine."""

    NEW = "new"  # on its way to the engine
    WAITING = "waiting"  # for room
    PULLING = "pulling"  # holds its room; blocks are on their way
    READY = "ready"  # prompt tokens can be computed
    COMPLETE = "complete"  # all KV is there; the first token is not known yet
    DECODING = "decoding"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Job:
    """Fields up to `pull` come with it; the rest is the engine's."""

    request_id: str
    attempt: int  # of the gateway to have the request served; both legs of a split have the same
    leg: Leg
    prompt_tokens: int
    block_ids: tuple[int, ...]  # the prompt's full blocks
    block_tokens: int
    output_tokens: int  # that it will generate, the first counted; nobody but the engine knows
    max_tokens: int
    use_pool: bool
    pull: tuple[PullRun, ...]
    submitted_us: int

    phase: Phase = Phase.NEW
    admitted_us: int = 0
    ready_us: int = 0
    prefilled_us: int = 0
    own_blocks: int = 0  # found in HBM
    pulled_blocks: int = 0
    pull_failures: int = 0
    bytes_pulled: int = 0
    exported_blocks: int = 0  # leading ones that were given to the node, or need not be
    held: list[int] = field(default_factory=list)  # blocks of the cache, in prompt order
    private_blocks: int = 0
    kv_tokens: int = 0  # of the prompt that are there
    computed_tokens: int = 0
    share_us: float = 0.0  # of steps, by tokens
    first_token_us: int | None = None

    @property
    def usable_blocks(self) -> int:
        """Of the prompt that may come from a cache. Who makes the first token has a token to compute."""
        if self.leg is Leg.DECODE:
            return len(self.block_ids)
        return min(len(self.block_ids), (self.prompt_tokens - 1) // self.block_tokens)

    @property
    def room_blocks(self) -> int:
        """KV blocks it holds from its admission on."""
        tokens = self.prompt_tokens + (0 if self.leg is Leg.PREFILL else self.max_tokens)
        return -(-tokens // self.block_tokens)

    @property
    def tokens_left(self) -> int:
        """Prompt tokens still to be computed."""
        return self.prompt_tokens - self.kv_tokens
