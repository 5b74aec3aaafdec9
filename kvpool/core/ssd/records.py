"""What goes into the SSD log and what comes out of it. Plain data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.changes import BlockChange
from kvpool.core.errors import BadArgument
from kvpool.core.ids import KEY_BYTES, KeyArray
from kvpool.core.namespace import SECTIONS_MAX
from kvpool.core.ssd.format import NAME_BYTES_MAX

_BYTE: Final = np.dtype(np.uint8)


class SsdState(StrEnum):
    """What the SSD tier can do."""

    OK = "ok"
    FULL = "full"  # the disk gave less than the capacity: it works with what it got, appends may be refused
    FAILED = "failed"  # writing failed again and again: reads go on, nothing is written until the next start
    OFF = "off"  # closed


@dataclass(frozen=True, slots=True, eq=False)
class RecordBatch:
    """Records to append, one row a key.

    keys and namespace_ids uint8 (n, 16); fidelities and section_counts uint8 (n); digests uint64 (n, up to 8), of
    sections that divide the payload; payloads: uint8 (size,), contiguous, unchanged until the append has returned.
    names: an object's key as it was given; b"" for blocks; none at all if no row has one.
    """

    keys: KeyArray
    namespace_ids: NDArray[np.uint8]
    fidelities: NDArray[np.uint8]
    section_counts: NDArray[np.uint8]
    digests: NDArray[np.uint64]
    payloads: Sequence[NDArray[np.uint8]]
    names: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(self.payloads)

    def validate(self) -> None:
        """Raises: BadArgument with what is wrong."""
        count = len(self.payloads)
        checks = {
            "keys must be uint8 (n, 16)": self.keys.shape == (count, KEY_BYTES),
            "namespace_ids must be uint8 (n, 16)": self.namespace_ids.shape == (count, KEY_BYTES),
            "fidelities must have one row a payload": self.fidelities.shape == (count,),
            "section_counts must have one row a payload": self.section_counts.shape == (count,),
            "digests must be uint64 (n, sections)": self.digests.ndim == 2 and len(self.digests) == count,
            f"names must be none, or one a payload of up to {NAME_BYTES_MAX} bytes": len(self.names) in (0, count)
            and all(len(name) <= NAME_BYTES_MAX for name in self.names),
        }
        for message, holds in checks.items():
            if not holds:
                raise BadArgument(message)
        sections = self.digests.shape[1]
        if not 1 <= sections <= SECTIONS_MAX or (
            count and not 1 <= self.section_counts.min() <= self.section_counts.max() <= sections
        ):
            raise BadArgument(f"section_counts must be 1 to {SECTIONS_MAX}, with a digest each")
        for payload, parts in zip(self.payloads, self.section_counts.tolist(), strict=True):
            if payload.dtype != _BYTE or payload.ndim != 1 or not payload.flags.c_contiguous or not payload.size:
                raise BadArgument("payloads must be contiguous uint8 arrays of at least one byte")
            if payload.size % parts:
                raise BadArgument(f"{parts} sections do not divide a payload of {payload.size} bytes")


@dataclass(frozen=True, slots=True, eq=False)
class SsdFacts:
    """What the index knows of keys, one row each; rows of absent keys are zero.

    present bool (n); sizes uint64 (n), bytes; section_counts, fidelities uint8 (n); namespace_ids uint8 (n, 16);
    name_bytes uint16 (n): length of the name on disk.
    """

    present: NDArray[np.bool_]
    sizes: NDArray[np.uint64]
    section_counts: NDArray[np.uint8]
    fidelities: NDArray[np.uint8]
    namespace_ids: NDArray[np.uint8]
    name_bytes: NDArray[np.uint16]


@dataclass(frozen=True, slots=True, eq=False)
class SsdRead:
    """Answer of a read: `good` rows were verified and their targets hold exactly what was committed.

    good bool (n); digests uint64 (n, 8); section_counts, fidelities uint8 (n); names: b"" for blocks and bad rows.
    A target of a row that is not good may hold anything.
    """

    good: NDArray[np.bool_]
    digests: NDArray[np.uint64]
    section_counts: NDArray[np.uint8]
    fidelities: NDArray[np.uint8]
    names: list[bytes]

    @classmethod
    def of(cls, count: int) -> SsdRead:
        """All rows bad, to be filled in."""
        return cls(
            np.zeros(count, np.bool_), np.zeros((count, SECTIONS_MAX), np.uint64), np.zeros(count, np.uint8),
            np.zeros(count, np.uint8), [b""] * count,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class SsdListing:
    """Some of the keys, uint8 (n, 16), and their facts. `next_cursor` None: these were the last."""

    keys: KeyArray
    facts: SsdFacts
    next_cursor: int | None


@dataclass(frozen=True, slots=True)
class SsdChanges:
    """What came and went since the last call, in order. `lost`: too much to keep; announce anew from a listing."""

    changes: tuple[BlockChange, ...]
    lost: bool


@dataclass(frozen=True, slots=True)
class Space:
    """Exact account of the capacity: bytes_live + bytes_dead + bytes_free == bytes_total.

    Live: records that can be read, and tombstones still needed. Dead: what reclaiming gives back, headers, footers and
    padding with it. Free: segments not made, and what is left of the one being written.
    """

    bytes_total: int
    bytes_live: int
    bytes_dead: int
    bytes_free: int
    payload_bytes: int
    records: int
    tombstones: int
    segments: int


@dataclass(slots=True)
class SsdCounters:
    """What happened since the store was opened; times in seconds, the rest counts or bytes."""

    appended: int = 0
    appended_bytes: int = 0
    append_refused: int = 0
    reads: int = 0
    read_bytes: int = 0
    read_misses: int = 0
    writes: int = 0
    write_bytes: int = 0
    syncs: int = 0
    io_errors: int = 0
    digest_errors: int = 0
    removed: int = 0
    evicted: int = 0
    compacted: int = 0
    copied: int = 0
    recovery_s: float = 0.0
    recovered_bytes: int = 0
    recovered_records: int = 0
    recovery_damaged: int = 0

    def copy(self) -> SsdCounters:
        return SsdCounters(*(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class SsdStats:
    """State, space, counters, and how the store does its I/O. `message` says why the state is not OK."""

    state: SsdState
    message: str
    direct: bool
    space: Space
    counters: SsdCounters
