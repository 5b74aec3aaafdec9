"""What a source's core is told at its start and what it answers. Plain data only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors
from kvpool.core.ids import LeaseId, PinId, ReservationId


class ReserveStatus(IntEnum):
    """What became of one key of a reserve; numbers as on the wire."""

    RESERVED = 1
    EXISTS = 2
    BEING_WRITTEN = 3
    NO_SPACE = 4


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Sizes and bounds. At a bound a call is refused with Overloaded, unless said otherwise."""

    capacity_bytes: int
    entries_max: int  # blocks, whatever their size; beyond it the oldest are evicted
    slab_bytes: int = 64 << 20
    high_watermark: float = 0.95  # of capacity: beyond it `tick` evicts ...
    low_watermark: float = 0.90  # ... down to here
    sessions_max: int = 1024
    reservations_max: int = 65_536  # finished ones, kept to answer repeated commits, are forgotten instead
    leases_max: int = 65_536  # leases and pins together
    waits_max: int = 16_384
    awaited_keys_max: int = 1_048_576
    handoffs_max: int = 65_536
    keys_per_call_max: int = 65_536  # more: BadArgument


@dataclass(frozen=True, slots=True, eq=False)
class Reserved:
    """Status of each key; `slots` has a row a key, meaningful where RESERVED. `reservation` 0 = nothing reserved."""

    reservation: ReservationId
    status: NDArray[np.uint8]
    slots: Descriptors


@dataclass(frozen=True, slots=True, eq=False)
class Leased:
    """`blocks` has a row a key, meaningful where found. `lease` 0 = nothing found."""

    lease: LeaseId
    found: NDArray[np.bool_]
    blocks: Descriptors
    fidelity: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Pinned:
    """`pin` 0 = nothing found."""

    pin: PinId
    found: NDArray[np.bool_]
