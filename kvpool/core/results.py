"""What a source's core is told at its start and what it answers. Plain data only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import Descriptors
from kvpool.core.ids import LeaseId, PinId, ReservationId


class ReserveStatus(IntEnum):
    """What became of one key of a reserve; numbers as on the wire.

    NO_SPACE is also the answer for a key that something else has: a block of another namespace, or an object with
    another name. Neither happens with keys that are hashes.
    """

    RESERVED = 1
    EXISTS = 2
    BEING_WRITTEN = 3
    NO_SPACE = 4
    OVER_QUOTA = 5


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Sizes and bounds. At a bound a call is refused with Overloaded, unless said otherwise."""

    capacity_bytes: int
    entries_max: int  # blocks, whatever their size, and slots in quarantine; beyond it the coldest are evicted
    eviction: str = "prefix"  # a name of `evictors.EVICTORS`
    unit_bytes: int | None = None  # of the segment's heap, a power of two from 4096; None: by capacity
    high_watermark: float = 0.95  # of capacity: beyond it `tick` evicts ...
    low_watermark: float = 0.90  # ... down to here
    sessions_max: int = 1024
    reservations_max: int = 65_536  # finished ones, kept to answer repeated commits, are forgotten instead
    finished_rows_max: int = 131_072  # keys of finished reservations; beyond it the oldest of them are forgotten
    leases_max: int = 65_536  # leases and pins together
    pins_detached_max: int = 4096  # pins that outlive their sessions
    held_rows_max: int = 16_777_216  # keys of all leases and pins, repeated ones counted each
    waits_max: int = 16_384
    awaited_keys_max: int = 1_048_576
    handoffs_max: int = 65_536
    keys_per_call_max: int = 65_536  # more: BadArgument
    tenants_max: int = 65_535
    quotas_max: int = 1024
    catalog_bytes_max: int = 440 << 10  # of namespaces and tenants, which a segment keeps beside its index


@dataclass(frozen=True, slots=True, eq=False)
class Reserved:
    """Status of each key; `slots` has a row a key, meaningful where RESERVED. `reservation` 0 = nothing reserved."""

    reservation: ReservationId
    status: NDArray[np.uint8]
    slots: Descriptors


@dataclass(frozen=True, slots=True, eq=False)
class Leased:
    """`blocks` has a row a key, meaningful where found. `lease` 0 = nothing found.

    sections: uint8 (keys), those that are committed, as bits: all of them, but for blocks that are being written.
    """

    lease: LeaseId
    found: NDArray[np.bool_]
    blocks: Descriptors
    fidelity: NDArray[np.uint8]
    sections: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Pinned:
    """`pin` 0 = nothing found."""

    pin: PinId
    found: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PinRecord:
    """One hold, as `kvctl pins` shows it.

    pin: of the pin or lease, 0 for hand-offs. owner: whom a detached pin names, or the request of a hand-off.
    session: 0 if it belongs to none. kind: "lease", "soft", "hard" or "hand-off".
    """

    pin: int
    owner: str
    session: int
    blocks: int
    bytes: int
    expires_us: int | None
    kind: str


@dataclass(frozen=True, slots=True)
class QuotaRecord:
    """A quota of a namespace (`tenant` empty) or of a tenant (`namespace_id` empty).

    bytes_used: in slots of blocks that are readable, being written, in quarantine, or removed but held.
    """

    namespace_id: bytes
    tenant: str
    bytes_max: int
    bytes_used: int
