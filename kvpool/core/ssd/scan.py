"""Reads the records of a segment that has no footer: after a crash, or if its footer is damaged.

A group is written only when all before it in the segment is durable, and each record names its group's first sequence:
so whatever a crash left of the last group was never acknowledged, and whatever is amiss before it is damage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvpool.core.hashing import section_seed
from kvpool.core.ssd.format import (
    DESCRIPTOR_BYTES,
    FOOTER_ENTRY,
    NAME_BYTES_MAX,
    PAGE_BYTES,
    RECORD_MAGIC,
    UNIT_BYTES,
    FooterEntries,
    RecordKind,
    align,
    payload_offset,
    read_descriptor,
    record_bytes,
)

#: Bytes of a segment from an offset on, uint8; fewer than asked for where the file ends or can't be read.
Fetch: TypeAlias = Callable[[int, int], NDArray[np.uint8]]

#: A search begins with little, since what is left of older segments is full of descriptors, and then takes more.
_SEARCH_BYTES_MIN: Final = 4 << 10
_SEARCH_BYTES_MAX: Final = 1 << 20
_HASH_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """What a scan found.

    entries: as in a footer; LOST where a payload that was durable once does not verify. used_bytes: the end of the last
    record, in whole pages. torn: records of the last group that a crash cut off. suspect_sequence: below it records are
    missing that were durable once, and nobody knows which keys they removed or replaced; 0 if none are.
    next_sequence: above all that were seen, torn ones too.
    """

    entries: FooterEntries
    used_bytes: int
    torn: int
    suspect_sequence: int
    next_sequence: int


def scan_segment(fetch: Fetch, size_bytes: int, seed: int, *, newest: bool, first_sequence: int | None) -> Scan:
    """Finds and verifies all records.

    Args:
        size_bytes: of the segment.
        newest: no later segment exists; only then can the last group be cut off.
        first_sequence: from the segment's header, None if that is damaged.
    """
    rows: list[tuple[np.void, int, bool]] = []
    position = PAGE_BYTES
    while (at := _next_record(fetch, position, size_bytes, seed)) is not None:
        position, descriptor = at
        good = _stored_payload_verifies(fetch, position, size_bytes, descriptor)
        rows.append((descriptor, position, good))
        position += record_bytes(int(descriptor["size"]), int(descriptor["name_bytes"]))
    sequences = [int(descriptor["sequence"]) for descriptor, _, _ in rows]
    after = max(sequences, default=0) + 1
    groups = [int(descriptor["group_sequence"]) for descriptor, _, _ in rows]
    durable = max(groups, default=0) if newest else after
    entries = np.zeros(len(rows), FOOTER_ENTRY)
    kept = np.ones(len(rows), np.bool_)
    for row, (descriptor, place, good) in enumerate(rows):
        entries[row] = footer_entry(descriptor, place)
        if not good:
            entries[row]["kind"] = RecordKind.LOST
            kept[row] = sequences[row] < durable
    used = [place + record_bytes(int(d["size"]), int(d["name_bytes"])) for d, place, _ in rows]
    return Scan(
        entries=entries[kept],
        used_bytes=min(align(max(used, default=PAGE_BYTES)), size_bytes),
        torn=int(np.count_nonzero(~kept)),
        suspect_sequence=_suspect(
            sequences, durable, min(groups, default=0) if first_sequence is None else first_sequence
        ),
        next_sequence=after,
    )


def footer_entry(descriptor: np.void, position: int) -> np.void:
    """A record's entry in its segment's footer."""
    entry = np.zeros(1, FOOTER_ENTRY)[0]
    for name in ("key", "namespace", "sequence", "size", "name_bytes", "kind", "fidelity", "section_count"):
        entry[name] = descriptor[name]
    entry["position"] = position
    return entry


def _suspect(sequences: list[int], durable: int, first: int) -> int:
    """One more than the highest sequence from `first` to before `durable` that was not found; 0 if all were."""
    seen = sorted(sequence for sequence in sequences if first <= sequence < durable)
    expected, suspect = first, 0
    for sequence in seen:
        if sequence != expected:
            suspect = sequence
        expected = sequence + 1
    return durable if expected < durable and sequences else suspect


def _next_record(fetch: Fetch, position: int, end: int, seed: int) -> tuple[int, np.void] | None:
    """The first descriptor at or after a place that verifies."""
    while position + DESCRIPTOR_BYTES <= end:
        found = read_descriptor(fetch(position, DESCRIPTOR_BYTES + NAME_BYTES_MAX), position, seed)
        if found is not None:
            return position, found
        next_position = _next_magic(fetch, position + UNIT_BYTES, end)
        if next_position is None:
            return None
        position = next_position
    return None


def _next_magic(fetch: Fetch, position: int, end: int) -> int | None:
    size = _SEARCH_BYTES_MIN
    while position < end:
        data = fetch(position, min(size, end - position))
        units = len(data) // UNIT_BYTES
        if units == 0:
            return None
        words = data[: units * UNIT_BYTES].view(np.uint64).reshape(units, -1)[:, 0]
        hits = np.flatnonzero(words == RECORD_MAGIC)
        if len(hits):
            return position + int(hits[0]) * UNIT_BYTES
        position += units * UNIT_BYTES
        size = min(2 * size, _SEARCH_BYTES_MAX)
    return None


def _stored_payload_verifies(fetch: Fetch, position: int, end: int, descriptor: np.void) -> bool:
    """Whether a payload has its digests, piece by piece: it may be larger than what `fetch` has at hand."""
    size, parts = int(descriptor["size"]), int(descriptor["section_count"])
    if descriptor["kind"] == RecordKind.TOMBSTONE:
        return size == 0
    start = position + payload_offset(size, int(descriptor["name_bytes"]))
    if size == 0 or size % parts or start + size > end:
        return False
    key, step = descriptor["key"].tobytes(), size // parts
    for section in range(parts):
        hasher = xxhash.xxh3_64(seed=section_seed(key, section))
        at, left = start + section * step, step
        while left:
            data = fetch(at, min(left, _HASH_BYTES))
            if not len(data):
                return False
            hasher.update(data.data)
            at, left = at + len(data), left - len(data)
        if hasher.intdigest() != int(descriptor["digests"][section]):
            return False
    return True
