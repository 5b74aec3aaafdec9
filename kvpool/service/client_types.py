"""What a pool client takes and returns. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors
from kvpool.service.client_session import Session

#: Status of a key of a reservation.
RESERVED, EXISTS, BEING_WRITTEN, NO_SPACE, OVER_QUOTA = 1, 2, 3, 4, 5
#: State of an awaited key.
COMMITTED, ABANDONED, DEADLINE, SECTION = 1, 2, 3, 4

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Hold:
    """A hand-off hold: keeps committed blocks for the reader of one request, at most for `ttl_s`."""

    request_id: str
    ttl_s: float = 60.0


@dataclass(frozen=True, eq=False)
class Reservation:
    """Slots to write. `status` is RESERVED, EXISTS, BEING_WRITTEN, NO_SPACE or OVER_QUOTA for each key; `slots` run
    beside them. `expires_s`: monotonic time, never later than the source's; no write begins after it."""

    id: int  # 0: no key was reserved
    status: NDArray[np.uint8]
    slots: Descriptors
    session: Session
    expires_s: float


@dataclass(frozen=True, eq=False)
class PutResult:
    """`stored`: by this call. `existed`: readable before. Neither: no space, or somebody else is writing it."""

    stored: Bools
    existed: Bools
    bytes: int
    seconds: float
    channel: str


@dataclass(frozen=True, eq=False)
class GetResult:
    """`found`: the row holds the block, checked. `corrupt`: it was there, but its bytes were not what was committed.

    fidelities: uint8 (keys,), a `Fidelity` where found; None where the caller did not ask for it.
    """

    found: Bools
    corrupt: Bools
    bytes: int
    seconds: float
    channel: str
    fidelities: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class SectionsResult:
    """`found`: the row holds the section, checked. `corrupt` as in GetResult."""

    found: Bools
    corrupt: Bools
    bytes: int
    seconds: float
    channel: str


@dataclass(frozen=True, eq=False)
class ObjectsResult:
    """`values[i]`: uint8, the object's bytes, checked; None where it is not there. `corrupt` as in GetResult."""

    values: list[NDArray[np.uint8] | None]
    corrupt: Bools
    bytes: int
    seconds: float
    channel: str


@dataclass(frozen=True, eq=False)
class Waited:
    """News of some keys of a wait: state COMMITTED, ABANDONED, DEADLINE, or SECTION with its number."""

    indices: NDArray[np.int64]
    states: NDArray[np.uint8]
    sections: NDArray[np.int64]


class News(Iterator[Waited]):
    """News of one wait. `close`, or losing the last reference, ends the wait at the source too; for any thread."""

    def __init__(self, replies: Iterator[Waited], cancel: Callable[[], object]) -> None:
        self._replies, self._cancel = replies, cancel

    def __next__(self) -> Waited:
        return next(self._replies)

    def close(self) -> None:
        """Idempotent; whoever is waiting for news meanwhile gets Unavailable."""
        self._cancel()

    def __del__(self) -> None:
        self._cancel()


@dataclass
class Counters:
    """What this client saw, since its start."""

    digest_errors: int = 0
    hits: int = 0  # blocks and objects
    misses: int = 0
    hits_shared: int = 0  # of `hits`: without a call to the source
    bytes_read: int = 0
    bytes_written: int = 0
    channel_errors: int = 0
    sessions: int = 0
