"""The log's state: segments, their space, where the next records go, and the index of all of them.

The shell asks where (`place`), writes and syncs, and only then reports (`commit`): what the index knows is on disk.
Segments: at most one is active, the others are sealed; the last free one is kept for what reclaiming writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import BadArgument
from kvpool.core.ids import KEY_BYTES, KeyArray
from kvpool.core.ssd.format import (
    FOOTER_ENTRY,
    PAGE_BYTES,
    UNIT_BYTES,
    FooterEntries,
    RecordKind,
    align,
    footer_bytes,
    footer_bytes_of,
    place_records,
    record_bytes_of,
)
from kvpool.core.ssd.records import Space, SsdFacts
from kvpool.core.ssd.rows import NO_ROW, LogRows, Rows, RowState

SEGMENTS_MIN: Final = 4
NAMESPACES_MAX: Final = 65_535
#: A segment takes at most this part of the rows, so that one can be reclaimed when they are used up.
_ROWS_SHARE: Final = 8
#: Rows that are looked at together for a page of a listing.
_PAGE_ROWS: Final = 65_536
_COUNTED: Final = (RowState.LIVE, RowState.TOMBSTONE)


@dataclass(frozen=True, slots=True)
class LogConfig:
    """`segment_bytes` of each file, whole pages; at most `segments_max` files and `rows_max` records, dead ones too:
    beyond either, segments are reclaimed. Reclaiming copies what lives in a segment if that is at most
    `compact_live_max` of it; otherwise the oldest segment is evicted.
    """

    segment_bytes: int
    segments_max: int
    rows_max: int
    compact_live_max: float = 0.5

    def __post_init__(self) -> None:
        if self.segment_bytes % PAGE_BYTES or not 8 * PAGE_BYTES <= self.segment_bytes <= UNIT_BYTES << 32:
            raise BadArgument(f"segments of {self.segment_bytes} bytes are no whole pages, or too small or large")
        if self.segments_max < SEGMENTS_MIN:
            raise BadArgument(
                f"the SSD store needs room for {SEGMENTS_MIN} segments of {self.segment_bytes} bytes",
                hint="give it more bytes",
            )
        if not 4 * _ROWS_SHARE <= self.rows_max < 1 << 31:
            raise BadArgument("the SSD store's records_max is too small or too large")


@dataclass(slots=True)
class SegmentSpace:
    """One file. `used_bytes`: end of its records; `live_bytes`: of them, readable or needed; `records`: all of them."""

    number: int
    used_bytes: int = PAGE_BYTES
    live_bytes: int = 0
    records: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where the first records of a request go: one after another in [start, end) of the active segment.

    offsets int64 (n), from the segment's start; sequences uint64 (n).
    """

    segment: int
    start: int
    end: int
    offsets: NDArray[np.int64]
    sequences: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.offsets)


class LogCore:
    """See the module's head."""

    def __init__(self, config: LogConfig) -> None:
        self.config = config
        self.rows = LogRows(config.rows_max)
        self.segments: dict[int, SegmentSpace] = {}
        self.active: int | None = None
        self.next_sequence = 1
        self.next_segment = 1
        self._namespace_ids: list[bytes] = []
        self._namespace_numbers: dict[bytes, int] = {}
        self._live_records = self._tombstones = self._payload_bytes = 0
        # A store that was larger once shrinks step by step, and needs a segment to copy into meanwhile.
        self._segments_allowed = config.segments_max

    # ------------------------------------------------------------ questions

    def facts(self, rows: Rows) -> SsdFacts:
        """What is known of rows of `rows.live`."""
        present = rows != NO_ROW
        at = rows[present]
        facts = SsdFacts(
            present, np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint8), np.zeros(len(rows), np.uint8),
            np.zeros((len(rows), 16), np.uint8), np.zeros(len(rows), np.uint16),
        )  # fmt: skip
        facts.sizes[present] = self.rows.sizes[at]
        facts.section_counts[present] = self.rows.section_counts[at]
        facts.fidelities[present] = self.rows.fidelities[at]
        facts.namespace_ids[present] = self.namespace_ids(at)
        facts.name_bytes[present] = self.rows.name_bytes[at]
        return facts

    def namespace_ids(self, rows: Rows) -> NDArray[np.uint8]:
        """uint8 (n, 16)."""
        packed = b"".join(self._namespace_ids[number] for number in self.rows.namespaces[rows].tolist())
        return np.frombuffer(packed, np.uint8).reshape(-1, 16)

    def namespace_number(self, namespace_id: bytes) -> int | None:
        """The number in `rows.namespaces`; None if no record has named it."""
        return self._namespace_numbers.get(namespace_id)

    def name_namespaces(self, namespace_ids: NDArray[np.uint8]) -> NDArray[np.uint16] | None:
        """Numbers of namespaces, new ones for those not seen before; None if there are too many."""
        ids, at = np.unique(np.ascontiguousarray(namespace_ids).view("V16").reshape(-1), return_inverse=True)
        numbers = np.empty(len(ids), np.uint16)
        for i, namespace_id in enumerate(ids):
            packed = namespace_id.tobytes()
            if packed not in self._namespace_numbers:
                if len(self._namespace_ids) == NAMESPACES_MAX:
                    return None
                self._namespace_numbers[packed] = len(self._namespace_ids)
                self._namespace_ids.append(packed)
            numbers[i] = self._namespace_numbers[packed]
        return numbers[at.reshape(-1)]

    def live_page(self, cursor: int, limit: int) -> tuple[Rows, int | None]:
        """Readable rows from `cursor` on, at most `limit`; and where to go on, None at the end."""
        states, parts, missing, at = self.rows.states, [np.zeros(0, np.int64)], limit + 1, cursor
        while at < len(states) and missing > 0:
            # A part at a time: each page looks at its own rows only, not at all behind it.
            part = np.flatnonzero(states[at : at + _PAGE_ROWS] == RowState.LIVE)[:missing] + at
            parts.append(part)
            missing, at = missing - len(part), at + _PAGE_ROWS
        found = np.concatenate(parts)
        return found[:limit].astype(np.int32), int(found[limit]) if len(found) > limit else None

    def lost_objects(self, namespace_id: bytes) -> KeyArray:
        """Objects of a namespace that are `undead`; see `LogRows`. A removal by name can't know which they are."""
        number = self.namespace_number(namespace_id)
        if number is None:
            return np.zeros((0, KEY_BYTES), np.uint8)
        rows = self.rows
        lost = (rows.states == RowState.LOST) & (rows.name_bytes > 0) & (rows.namespaces == number)
        return rows.key_bytes(np.flatnonzero(lost).astype(np.int32))

    def space(self) -> Space:
        size = self.config.segment_bytes
        total = max(self.config.segments_max, len(self.segments)) * size
        live = sum(segment.live_bytes for segment in self.segments.values())
        free = total - len(self.segments) * size
        if self.active is not None:
            free += size - self.segments[self.active].used_bytes
        return Space(
            bytes_total=total, bytes_live=live, bytes_dead=total - live - free, bytes_free=free,
            payload_bytes=self._payload_bytes, records=self._live_records, tombstones=self._tombstones,
            segments=len(self.segments),
        )  # fmt: skip

    # ------------------------------------------------------------ where to write

    def may_open(self, *, reclaiming: bool) -> bool:
        """Whether one more segment may be made; the last one is for reclaiming."""
        if reclaiming:
            return len(self.segments) < self._segments_allowed
        return len(self.segments) + 2 <= self.config.segments_max

    def allow_one_more(self) -> None:
        """Lets reclaiming open a segment beyond `segments_max`, until it has given one back."""
        self._segments_allowed = max(self._segments_allowed, len(self.segments) + 1)

    def rows_short(self) -> bool:
        """Whether the index has no room for another segment's worth of copies."""
        most = max((segment.records for segment in self.segments.values()), default=0)
        return self.rows.free_count <= most + self.config.rows_max // _ROWS_SHARE

    def open_segment(self) -> SegmentSpace:
        """The next segment becomes the active one; its file and header are on disk."""
        assert self.active is None
        segment = SegmentSpace(self.next_segment)
        self.segments[segment.number] = segment
        self.active = segment.number
        self.next_segment += 1
        return segment

    def place(self, sizes: NDArray[np.uint64], name_bytes: NDArray[np.uint16]) -> Placement | None:
        """Places of as many of the first records as the active segment has room for; None: not even one.

        Sequences and space are given out for good: what is not committed is dead space.

        Args: sizes: bytes of payload, uint64 (n); name_bytes: of name, uint16 (n).
        """
        if self.active is None:
            return None
        segment = self.segments[self.active]
        room = max(0, min(self.rows.free_count, self.config.rows_max // _ROWS_SHARE - segment.records))
        sizes, name_bytes = sizes[:room], name_bytes[:room]
        offsets = place_records(segment.used_bytes, sizes, name_bytes)
        ends = offsets + record_bytes_of(sizes, name_bytes)
        footers = footer_bytes_of(segment.records + 1 + np.arange(len(ends)))
        fitting = -(-ends // PAGE_BYTES) * PAGE_BYTES + footers <= self.config.segment_bytes
        count = len(fitting) if fitting.all() else int(np.argmin(fitting))
        if not count:
            return None
        start, segment.used_bytes = segment.used_bytes, align(int(ends[count - 1]))
        first = self.next_sequence
        self.next_sequence += count
        return Placement(
            segment.number, start, segment.used_bytes, offsets[:count],
            np.arange(first, self.next_sequence, dtype=np.uint64),
        )  # fmt: skip

    def commit(self, placed: Placement, entries: FooterEntries, namespaces: NDArray[np.uint16]) -> None:
        """Records at their places are durable, and from now on the newest of their (distinct) keys."""
        segment = self.segments[placed.segment]
        heads, copies, before = self.rows.put(entries, placed.segment, namespaces)
        self._account(copies, before, -1)
        self._account(heads, self.rows.states[heads], 1)
        segment.records += len(heads)

    def seal(self) -> FooterEntries:
        """Ends the active segment. Returns: its footer's entries, by place."""
        assert self.active is not None
        number, self.active = self.active, None
        return self.footer_entries(number)

    def abandon(self, used_bytes: int) -> None:
        """Ends the active segment after a failed write; nothing beyond `used_bytes` is on disk."""
        assert self.active is not None
        self.segments[self.active].used_bytes = used_bytes
        self.active = None

    def footer_entries(self, number: int) -> FooterEntries:
        """Footer entries of all records of a segment, by place."""
        rows = self.rows.in_segment(number)
        rows = rows[np.argsort(self.rows.units[rows], kind="stable")]
        entries = np.zeros(len(rows), FOOTER_ENTRY)
        entries["key"] = self.rows.key_bytes(rows)
        entries["namespace"] = self.namespace_ids(rows)
        entries["sequence"] = self.rows.sequences[rows]
        entries["position"] = self.rows.offsets(rows)
        entries["size"] = self.rows.sizes[rows]
        entries["name_bytes"] = self.rows.name_bytes[rows]
        entries["kind"] = np.where(self.rows.states[rows] == RowState.LOST, RecordKind.LOST, self.rows.kinds[rows])
        entries["fidelity"] = self.rows.fidelities[rows]
        entries["section_count"] = self.rows.section_counts[rows]
        return entries

    # ------------------------------------------------------------ what happened

    def touch(self, rows: Rows) -> None:
        """Readable records were used: they survive the next eviction of their segment."""
        self.rows.touches[rows[rows != NO_ROW]] = 1

    def lose(self, rows: Rows, sequences: NDArray[np.uint64]) -> KeyArray:
        """Records that do not verify are absent from now on. Those that were replaced meanwhile are passed over.

        Returns: keys that were readable until now.
        """
        same = (self.rows.states[rows] == RowState.LIVE) & (self.rows.sequences[rows] == sequences)
        rows = np.unique(rows[same])
        self._account(rows, self.rows.states[rows], -1)
        self.rows.lose(rows)
        return self.rows.key_bytes(rows)

    def drop_segment(self, number: int) -> None:
        """A segment's file is gone for good; `plan_reclaim` has been carried out before."""
        assert number != self.active
        rows = self.rows.in_segment(number)
        self._account(rows, self.rows.states[rows], -1)
        obsolete = self.rows.drop(rows)
        self._account(obsolete, np.full(len(obsolete), RowState.TOMBSTONE, np.uint8), -1)
        del self.segments[number]
        self._segments_allowed = max(self.config.segments_max, min(self._segments_allowed, len(self.segments) + 1))

    def restore(self, segments: Sequence[SegmentSpace], entries: FooterEntries, numbers: NDArray[np.uint32]) -> bool:
        """Fills the empty log with what recovery found: segments, all of them ended, and their records.

        Returns: whether the index had room; if not, nothing changed.
        """
        assert not self.segments
        if len(entries) > self.rows.free_count:
            return False
        namespaces = self.name_namespaces(entries["namespace"])
        if namespaces is None:
            return False
        self.rows.rebuild(entries, numbers, namespaces)
        for segment in sorted(segments, key=lambda segment: segment.number):
            segment.live_bytes = 0
            self.segments[segment.number] = segment
            self.next_segment = max(self.next_segment, segment.number + 1)
        self._segments_allowed = max(self.config.segments_max, len(self.segments) + 1)
        rows = np.flatnonzero(self.rows.states != RowState.FREE).astype(np.int32)
        self._account(rows, self.rows.states[rows], 1)
        if len(entries):
            self.next_sequence = max(self.next_sequence, int(entries["sequence"].max()) + 1)
        return True

    def _account(self, rows: Rows, states: NDArray[np.uint8], sign: int) -> None:
        """Adds or takes away what rows in these states weigh."""
        if not len(rows):
            return
        live, removed = states == RowState.LIVE, states == RowState.TOMBSTONE
        counted = live | removed
        weights = self.rows.record_bytes(rows[counted])
        numbers, at = np.unique(self.rows.segments[rows[counted]], return_inverse=True)
        sums = np.zeros(len(numbers), np.int64)
        np.add.at(sums, at.reshape(-1), weights)
        for number, total in zip(numbers.tolist(), sums.tolist(), strict=True):
            self.segments[number].live_bytes += sign * total
        self._live_records += sign * int(np.count_nonzero(live))
        self._tombstones += sign * int(np.count_nonzero(removed))
        self._payload_bytes += sign * int(self.rows.sizes[rows[live]].sum())

    def check_invariants(self) -> None:
        self.rows.check_invariants()
        live = dict.fromkeys(self.segments, 0)
        records = dict.fromkeys(self.segments, 0)
        rows = np.flatnonzero(self.rows.states != RowState.FREE).astype(np.int32)
        weights = self.rows.record_bytes(rows)
        for row, weight in zip(rows.tolist(), weights.tolist(), strict=True):
            number = int(self.rows.segments[row])
            records[number] += 1
            live[number] += weight if self.rows.states[row] in _COUNTED else 0
        for segment in self.segments.values():
            assert segment.live_bytes == live[segment.number], segment
            assert segment.records == records[segment.number], segment
            assert segment.live_bytes <= segment.used_bytes - PAGE_BYTES
            assert segment.used_bytes % PAGE_BYTES == 0
            assert segment.used_bytes + footer_bytes(segment.records) <= self.config.segment_bytes
        states = self.rows.states
        assert self._live_records == np.count_nonzero(states == RowState.LIVE)
        assert self._tombstones == np.count_nonzero(states == RowState.TOMBSTONE)
        assert self._payload_bytes == int(self.rows.sizes[states == RowState.LIVE].sum())
        space = self.space()
        assert space.bytes_live + space.bytes_dead + space.bytes_free == space.bytes_total
        assert min(space.bytes_live, space.bytes_dead, space.bytes_free) >= 0
