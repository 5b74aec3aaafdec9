"""Writes groups of records: lays them out, keeps several writes in flight, syncs, and only then tells the index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvpool.core.ids import KEY_BYTES
from kvpool.core.index import split_keys
from kvpool.core.ssd.format import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    FOOTER_ENTRY,
    PACKED_BYTES_MAX,
    PAGE_BYTES,
    FooterEntries,
    RecordKind,
    align,
    footer_bytes,
    is_packed,
    pack_footer,
    pack_segment_header,
    record_bytes,
    record_bytes_of,
    segment_name,
    sign_descriptors,
)
from kvpool.core.ssd.log import Placement
from kvpool.core.ssd.records import RecordBatch, SsdState
from kvpool.core.ssd.rows import NO_ROW
from kvpool.tiers.ssd.files import FULL_ERRORS, Files
from kvpool.tiers.ssd.group_writing import write_group
from kvpool.tiers.ssd.lanes import Arena, Bytes, Lanes, addresses_of
from kvpool.tiers.ssd.open_log import OpenLog, SegmentFile

#: Payload of a group: what one fdatasync covers, if as much is waiting.
GROUP_BYTES = 64 << 20
GROUP_RECORDS = 4096
#: Memory for descriptors, packed records, and payloads that O_DIRECT does not take.
ARENA_BYTES = 16 << 20
#: Pages of descriptors that are laid out together: the first writes need not wait for all of a group's.
HEADS_MAX = 64
#: After so many failed groups in a row nothing is written any more.
FAILURES_MAX = 3


class LogAppender:
    """Appends to the log. One thread at a time."""

    def __init__(self, log: OpenLog, lanes: Lanes) -> None:
        self._log, self._lanes = log, lanes
        self._arena = Arena(ARENA_BYTES)
        self._failures = 0

    def append(self, batch: RecordBatch, rows: NDArray[np.int64], kind: RecordKind, *, announce: bool) -> int | None:
        """Writes the first of the records named by `rows` (distinct keys) into the active segment, as one group.

        Args:
            announce: whether keys come or go by this; a copy of what is there already is no news.
        Returns: how many are durable now, and in the index; 0 if the segment has no room for even one; None if they
            can't be written.
        """
        picked = rows[:GROUP_RECORDS].tolist()
        sizes, name_bytes = sizes_of(batch, picked)
        in_place = _taken_in_place([batch.payloads[row] for row in picked], sizes, direct=self._log.files.direct)
        picked = picked[: _group_length(sizes, name_bytes, in_place)]
        names = [batch.names[row] if batch.names else b"" for row in picked]
        core = self._log.core
        with self._log.lock:
            if self._log.state is SsdState.FAILED:
                return None
            namespaces = core.name_namespaces(batch.namespace_ids[picked])
            if namespaces is None:
                return None
            placed = core.place(sizes[: len(picked)], name_bytes[: len(picked)])
            segment = None if placed is None else self._log.segments[placed.segment]
        if placed is None or segment is None:
            return 0
        picked, names = picked[: len(placed)], names[: len(placed)]
        descriptors = _describe(batch, picked, sizes[: len(placed)], names, kind, placed, segment.seed)
        try:
            self._write(segment, placed, descriptors, names, [batch.payloads[row] for row in picked], in_place)
        except OSError as error:
            self._abandon(segment, placed, error)
            return None
        self._failures = 0
        entries = _entries(descriptors, placed)
        with self._log.lock:
            was_live = core.rows.live(entries["key"]) != NO_ROW
            core.commit(placed, entries, namespaces[: len(placed)])
            if announce and kind is RecordKind.DATA:
                self._log.changes.stored(entries["key"], entries["fidelity"])
            elif announce:
                self._log.changes.removed(entries["key"][was_live])
        return len(placed)

    def open_segment(self) -> bool:
        """Ends the active segment, if there is one, and makes the next; false if the disk refuses it.

        The core has room for one more. `state` is FULL after a refusal for want of space, and OK again after a success.
        """
        self.seal()
        log, core = self._log, self._log.core
        name = segment_name(core.next_segment)
        try:
            file = log.files.create(name, core.config.segment_bytes)
        except OSError as error:
            if error.errno in FULL_ERRORS:
                log.set_state(SsdState.FULL, f"the disk has no room for a segment: {error.strerror}")
            else:
                self._failed(error)
            return False
        header = pack_segment_header(log.uuid, core.next_segment, core.config.segment_bytes, core.next_sequence)
        page = Arena(PAGE_BYTES).take(PAGE_BYTES)
        page[:] = np.frombuffer(header, np.uint8)
        try:
            file.write([page.data], 0)
            # At the same time: they share what the file system writes for them. Whichever is durable first, the file
            # has no records until both are.
            self._lanes.run([file.sync, log.files.sync_names])
        except OSError as error:
            file.close()
            _remove_quietly(log.files, name)
            self._failed(error)
            return False
        log.count(writes=1, write_bytes=PAGE_BYTES, syncs=1)
        log.add(core.next_segment, file)
        with log.lock:
            core.open_segment()
        log.set_state(SsdState.OK)
        return True

    def seal(self) -> None:
        """Ends the active segment with a footer. Without one, if that can't be written, recovery takes longer."""
        log = self._log
        with log.lock:
            number = log.core.active
            if number is None:
                return
            entries = log.core.seal()
            used_bytes, segment = log.core.segments[number].used_bytes, log.segments[number]
        write_footer(log, segment, used_bytes, entries)

    def _write(
        self, segment: SegmentFile, placed: Placement, descriptors: NDArray[np.void], names: list[bytes],
        payloads: list[Bytes], in_place: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        self._arena.reset()
        buffers = _lay_out(self._arena, placed, descriptors, names, payloads, in_place)
        end, writes = write_group(
            self._lanes, segment.file, buffers, placed.start, direct=self._log.files.direct
        )  # fmt: skip
        assert end == placed.end
        segment.file.sync()
        self._log.count(writes=writes, write_bytes=placed.end - placed.start, syncs=1)

    def _abandon(self, segment: SegmentFile, placed: Placement, error: OSError) -> None:
        """Cuts a failed group off, so that none of it comes back at the next start, and ends the segment."""
        self._failed(error)
        used_bytes = placed.start
        try:
            segment.file.truncate(placed.start)
            segment.file.sync()
        except OSError as second:
            used_bytes = placed.end
            self._log.count(io_errors=1)
            self._log.give_up(f"a failed write could not be undone: {second.strerror}")
        with self._log.lock:
            self._log.core.abandon(used_bytes)

    def _failed(self, error: OSError) -> None:
        self._log.count(io_errors=1)
        self._failures += 1
        if self._failures >= FAILURES_MAX:
            self._log.set_state(SsdState.FAILED, f"writing failed {self._failures} times in a row: {error.strerror}")


def write_footer(log: OpenLog, segment: SegmentFile, used_bytes: int, entries: FooterEntries) -> bool:
    """Seals a segment on disk. What it lists is durable."""
    size = log.core.config.segment_bytes
    packed = pack_footer(log.uuid, segment.number, size, used_bytes, entries)
    assert used_bytes + len(packed) <= size
    data = Arena(len(packed)).take(len(packed))
    data[:] = np.frombuffer(packed, np.uint8)
    try:
        segment.file.write([data.data], size - len(packed))
        segment.file.sync()
    except OSError:
        log.count(io_errors=1)
        return False
    log.count(writes=1, write_bytes=len(packed), syncs=1)
    return True


def fit(segment_bytes: int, sizes: NDArray[np.uint64], name_bytes: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Which records can be in a segment at all; bool (n)."""
    left_bytes = segment_bytes - PAGE_BYTES - footer_bytes(1)
    fitting: NDArray[np.bool_] = record_bytes_of(sizes, name_bytes) <= left_bytes // PAGE_BYTES * PAGE_BYTES
    return fitting


def sizes_of(batch: RecordBatch, rows: Sequence[int]) -> tuple[NDArray[np.uint64], NDArray[np.uint16]]:
    """Of some records: bytes of payload, uint64 (n); bytes of name, uint16 (n)."""
    sizes = np.array([batch.payloads[row].size for row in rows], np.uint64)
    names = [len(batch.names[row]) for row in rows] if batch.names else [0] * len(rows)
    return sizes, np.array(names, np.uint16)


def _taken_in_place(payloads: Sequence[Bytes], sizes: NDArray[np.uint64], *, direct: bool) -> NDArray[np.bool_]:
    """Which payloads can be written from where they lie; bool (n)."""
    if not direct:
        return np.ones(len(payloads), np.bool_)
    aligned: NDArray[np.bool_] = addresses_of(payloads) % np.uint64(PAGE_BYTES) == 0
    return aligned & (sizes > PACKED_BYTES_MAX)


def _group_length(sizes: NDArray[np.uint64], name_bytes: NDArray[np.uint16], in_place: NDArray[np.bool_]) -> int:
    """How many of the first records go into one group: at least one."""
    copied = np.where(in_place, 2 * PAGE_BYTES, 2 * PAGE_BYTES + sizes.astype(np.int64))
    staged = np.where(sizes <= PACKED_BYTES_MAX, record_bytes_of(sizes, name_bytes), copied)
    too_much = (np.cumsum(sizes) > GROUP_BYTES) | (np.cumsum(staged) > ARENA_BYTES - PAGE_BYTES)
    return max(1, int(np.argmax(too_much))) if too_much.any() else len(sizes)


def _describe(
    batch: RecordBatch, picked: list[int], sizes: NDArray[np.uint64], names: list[bytes], kind: RecordKind,
    placed: Placement, seed: int,
) -> NDArray[np.void]:  # fmt: skip
    descriptors = np.zeros(len(picked), DESCRIPTOR)
    descriptors["kind"] = kind
    descriptors["fidelity"] = batch.fidelities[picked]
    descriptors["section_count"] = batch.section_counts[picked]
    descriptors["name_bytes"] = [len(name) for name in names]
    descriptors["sequence"] = placed.sequences
    descriptors["size"] = sizes
    descriptors["group_sequence"] = placed.sequences[0]
    descriptors["key"] = batch.keys[picked]
    descriptors["namespace"] = batch.namespace_ids[picked]
    descriptors["digests"][:, : batch.digests.shape[1]] = batch.digests[picked]
    sign_descriptors(descriptors, names, placed.offsets, seed)
    return descriptors


def _entries(descriptors: NDArray[np.void], placed: Placement) -> FooterEntries:
    entries = np.zeros(len(descriptors), FOOTER_ENTRY)
    for name in ("key", "namespace", "sequence", "size", "name_bytes", "kind", "fidelity", "section_count"):
        entries[name] = descriptors[name]
    entries["position"] = placed.offsets
    return entries


def _lay_out(
    arena: Arena, placed: Placement, descriptors: NDArray[np.void], names: list[bytes], payloads: list[Bytes],
    in_place: NDArray[np.bool_],
) -> Iterator[memoryview]:  # fmt: skip
    """The group as contiguous buffers of whole pages; padding is zero."""
    raw = descriptors.view(np.uint8).reshape(-1, DESCRIPTOR_BYTES)
    offsets = placed.offsets.tolist()
    row = 0
    while row < len(offsets):
        first, packed = row, is_packed(payloads[row].size)
        while row < len(offsets) and is_packed(payloads[row].size) == packed:
            row += 1
        if not packed:
            for start in range(first, row, HEADS_MAX):
                stop = min(start + HEADS_MAX, row)
                heads = _lay_heads(arena, raw[start:stop], names[start:stop])
                for head, payload, stays in zip(
                    heads, payloads[start:stop], in_place[start:stop].tolist(), strict=True
                ):
                    yield head.data
                    yield from _lay_payload(arena, payload, in_place=stays)
            continue
        end = offsets[row - 1] + record_bytes(payloads[row - 1].size, len(names[row - 1]))
        area = arena.take(align(end - offsets[first]))
        for i in range(first, row):
            start = offsets[i] - offsets[first]
            stop = start + record_bytes(payloads[i].size, len(names[i]))
            _fill(area[start:stop], [raw[i], np.frombuffer(names[i], np.uint8), payloads[i]])
        area[end - offsets[first] :] = 0
        yield area.data


def _lay_heads(arena: Arena, descriptors: Bytes, names: Sequence[bytes]) -> Bytes:
    """Descriptors, uint8 (n, 256), and names on a page each; uint8 (n, 4096)."""
    pages = arena.take(len(descriptors) * PAGE_BYTES).reshape(-1, PAGE_BYTES)
    pages[:, :DESCRIPTOR_BYTES] = descriptors
    pages[:, DESCRIPTOR_BYTES:] = 0
    for page, name in zip(pages, names, strict=True):
        if name:
            page[DESCRIPTOR_BYTES : DESCRIPTOR_BYTES + len(name)] = np.frombuffer(name, np.uint8)
    return pages


def _lay_payload(arena: Arena, payload: Bytes, *, in_place: bool) -> list[memoryview]:
    size = payload.size
    full = size // PAGE_BYTES * PAGE_BYTES
    if not in_place:
        staged = arena.take(align(size))
        _fill(staged, [payload])
        return [staged.data]
    if full == size:
        return [payload.data]
    tail = arena.take(PAGE_BYTES)
    _fill(tail, [payload[full:]])
    return [payload[:full].data, tail.data] if full else [tail.data]


def _fill(area: Bytes, pieces: Sequence[Bytes]) -> None:
    at = 0
    for piece in pieces:
        area[at : at + len(piece)] = piece
        at += len(piece)
    area[at:] = 0


def _remove_quietly(files: Files, name: str) -> None:
    """A segment that has no records is no loss, nor a gain: recovery removes it too."""
    try:
        files.remove(name)
    except OSError:
        return


def tombstones(keys: Bytes, namespace_ids: Bytes) -> RecordBatch:
    """A batch for `append` of kind TOMBSTONE; keys and namespace_ids uint8 (n, 16)."""
    count = len(keys)
    empty = np.zeros(0, np.uint8)
    ones = np.ones(count, np.uint8)
    return RecordBatch(keys, namespace_ids, ones, ones, np.zeros((count, 1), np.uint64), [empty] * count)


def distinct_prefix(keys: Bytes) -> int:
    """How many of the first keys, uint8 (n, 16), are distinct."""
    seen: set[bytes] = set()
    for count, key in enumerate(split_keys(np.ascontiguousarray(keys).reshape(-1, KEY_BYTES))):
        if key in seen:
            return count
        seen.add(key)
    return len(keys)
