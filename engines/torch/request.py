"""What goes into the engine and what comes out of it. Plain data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

#: Measurements of a kind that are kept until they are taken.
SAMPLES_MAX = 1024


class Phase(IntEnum):
    """Which part of a request is computed here; numbers as on the wire."""

    BOTH = 1
    PREFILL = 2
    DECODE = 3


class Finish(IntEnum):
    """How a request ended; numbers as on the wire."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4
    HANDED_OFF = 5


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. The draw for a token depends on the seed and its position alone."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `root` is the parent key of its first block: it holds namespace and tenant salt.

    `pull_tokens`: how many leading prompt tokens somebody may bring from outside before computing begins; 0 = none.
    In phase DECODE that is the whole prompt, partial last block included. `publish`: finished blocks are exported.
    """

    id: str
    prompt: NDArray[np.uint32]
    sampling: Sampling
    root: bytes
    phase: Phase = Phase.BOTH
    pull_tokens: int = 0
    publish: bool = False
    deadline_us: int = 0  # on the engine's clock; 0 = none


@dataclass(slots=True)
class Times:
    """What a request cost here; fields as RequestTimes on the wire."""

    queue_us: int = 0
    pull_us: int = 0
    prefill_us: int = 0
    cached_tokens_hbm: int = 0
    cached_tokens_pool: int = 0
    bytes_pulled: int = 0
    computed_tokens: int = 0
    blocks_published: int = 0
    pull_failures: int = 0
    read_us: int = 0  # DECODE: reading what was handed off
    exposed_us: int = 0  # DECODE: from the first token known here until what was handed off was here
    publish_us: int = 0  # PREFILL: publishing what is handed off


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What one step did for one request. After `finish` nothing more comes for it."""

    request_id: str
    tokens: tuple[int, ...] = ()
    finish: Finish = Finish.NONE
    error: str = ""
    times: Times | None = None  # with the first token and at the end
    logprobs: tuple[float, ...] = ()
    top2_gaps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class BlockSet:
    """Cache blocks lent to the I/O side: held, and not written by the engine, until given back.

    `keys[i]` is the key of `blocks[i]`; `first` is the index of the first one in its request. Where `tail_tokens` is
    not 0 the last block is partial, holds that many tokens and has a tail key. `parent`: key of the block before the
    first one, where there is one. `following`: keys of the blocks that a PREFILL request's next chunk will finish.
    """

    request_id: str
    first: int
    keys: NDArray[np.uint8]
    blocks: NDArray[np.int64]
    tail_tokens: int = 0
    parent: bytes = b""
    following: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 16), dtype=np.uint8))


@dataclass(frozen=True, slots=True)
class PrefillSample:
    """Measured prefill of one request: computing only."""

    new_tokens: int
    cached_tokens: int
    duration_us: int


@dataclass(frozen=True, slots=True)
class DecodeSample:
    """One measured step that only decoded."""

    batch: int
    kv_tokens: int
    duration_us: int


@dataclass(slots=True)
class Samples:
    """Measurements since they were last taken."""

    prefill: list[PrefillSample] = field(default_factory=list)
    decode: list[DecodeSample] = field(default_factory=list)
    finished_prefills: list[str] = field(default_factory=list)

    def extend(self, more: Samples) -> None:
        """Adds measurements; beyond `SAMPLES_MAX` of a kind the oldest go."""
        self.prefill = (self.prefill + more.prefill)[-SAMPLES_MAX:]
        self.decode = (self.decode + more.decode)[-SAMPLES_MAX:]
        self.finished_prefills = (self.finished_prefills + more.finished_prefills)[-SAMPLES_MAX:]


@dataclass(frozen=True, slots=True)
class Load:
    """How full the engine is."""

    running: int
    waiting: int
    kv_tokens_free: int  # neither held nor promised to admitted requests; cached blocks count as free
    kv_tokens_total: int
