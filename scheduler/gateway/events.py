"""Events that enter the life of a request, and commands that it answers with. Plain data only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from kvpool.core.errors import Reason


class Leg(Enum):
    """One submission of an attempt to an engine. An attempt that is not split has the decode leg alone."""

    PREFILL = "prefill"
    DECODE = "decode"


class Finish(Enum):
    """How a leg or a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    HANDED_OFF = "handed_off"
    INSTANCE_LOST = "instance_lost"


class FailureKind(Enum):
    """Why a request ended without an answer."""

    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    ENGINE = "engine"
    DEADLINE = "deadline"
    GATEWAY = "gateway"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Failure:
    """What to tell the client. `reason` and `retry_after_ms` belong to REFUSED."""

    kind: FailureKind
    message: str
    reason: Reason | None = None
    retry_after_ms: int = 0


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Placed:
    attempt: int
    prefill: str
    decode: str
    split: bool


@dataclass(frozen=True, slots=True)
class Refused:
    attempt: int
    reason: Reason
    message: str
    retry_after_ms: int


@dataclass(frozen=True, slots=True)
class PlaceFailed:
    """The scheduler could not be reached until the deadline."""

    attempt: int
    message: str


@dataclass(frozen=True, slots=True)
class PrefillTokens:
    attempt: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeTokens:
    """`last`: the engine says with these tokens that it has ended; `DecodeEnded` follows."""

    attempt: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()
    last: bool = False


@dataclass(frozen=True, slots=True)
class PrefillEnded:
    attempt: int
    finish: Finish
    error: str = ""


@dataclass(frozen=True, slots=True)
class DecodeEnded:
    attempt: int
    finish: Finish
    error: str = ""


@dataclass(frozen=True, slots=True)
class PrefillLost:
    attempt: int
    error: str


@dataclass(frozen=True, slots=True)
class DecodeLost:
    attempt: int
    error: str


@dataclass(frozen=True, slots=True)
class StopMatched:
    """The text of the emitted tokens contains a stop string."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client is gone, or does not read."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    pass


@dataclass(frozen=True, slots=True)
class Broken:
    """The gateway can't go on with this request: a bug of its own came up, or it has to stop."""

    message: str
    kind: FailureKind = FailureKind.GATEWAY


Event: TypeAlias = (
    Placed
    | Refused
    | PlaceFailed
    | PrefillTokens
    | DecodeTokens
    | PrefillEnded
    | DecodeEnded
    | PrefillLost
    | DecodeLost
    | StopMatched
    | Cancelled
    | DeadlinePassed
    | Broken
)

# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Place:
    """Ask the scheduler for a place for the prompt and what was emitted, after `delay_ms`."""

    attempt: int
    exclude: tuple[str, ...] = ()
    delay_ms: int = 0


@dataclass(frozen=True, slots=True)
class Submit:
    """Send prompt + emitted tokens to the engine of a leg, to generate at most `max_tokens` more."""

    attempt: int
    leg: Leg
    max_tokens: int


@dataclass(frozen=True, slots=True)
class ForwardFirstToken:
    attempt: int
    token: int


@dataclass(frozen=True, slots=True)
class Abort:
    attempt: int
    leg: Leg


@dataclass(frozen=True, slots=True)
class Emit:
    """Tokens for the client; each is emitted once, whatever is lost."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReportFirst:
    attempt: int


@dataclass(frozen=True, slots=True)
class ReportEnd:
    """The placement of this attempt is over; exactly one for each that was granted."""

    attempt: int
    finish: Finish
    error: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """Nothing more comes. Exactly one for each request, the last command but for late reports."""

    finish: Finish
    failure: Failure | None = None


Command: TypeAlias = Place | Submit | ForwardFirstToken | Abort | Emit | ReportFirst | ReportEnd | End
