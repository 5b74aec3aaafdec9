"""Checks an open log against its files, read again: an account of its own, in plain dictionaries."""

from __future__ import annotations

from collections import Counter

import numpy as np

from kvpool.core.ssd.format import RecordKind, record_bytes, segment_number, segment_seed
from kvpool.core.ssd.records import Space
from kvpool.core.ssd.rows import RowState
from kvpool.core.ssd.scan import scan_segment
from kvpool.tiers.ssd.lanes import Arena
from kvpool.tiers.ssd.open_log import OpenLog
from kvpool.tiers.ssd.recovery import WindowReader, read_sealed

_WINDOW_BYTES = 8 << 20

#: Where the newest record of a key is: segment, place, size, name's bytes, kind.
_Newest = dict[bytes, tuple[int, int, int, int, int]]


def audit_log(log: OpenLog) -> list[str]:
    """What differs between the index and a scan of all records; on the writer's thread. The log is untouched.

    Payloads are verified; records that the index has lost are not missed.
    """
    faults: list[str] = []
    numbers = sorted(number for name in log.files.names() if (number := segment_number(name)) is not None)
    if numbers != sorted(log.core.segments):
        faults.append(f"segment files {numbers} are not those of the index, {sorted(log.core.segments)}")
    newest: _Newest = {}
    order: dict[bytes, int] = {}
    older: Counter[bytes] = Counter()
    arena = Arena(_WINDOW_BYTES)
    for number in sorted(log.core.segments):
        for entry in _entries(log, number, arena):
            key, kind = entry["key"].tobytes(), int(entry["kind"])
            at = (number, int(entry["position"]), int(entry["size"]), int(entry["name_bytes"]), kind)
            if key in newest:
                before = max if int(entry["sequence"]) > order[key] else min
                stale_kind = newest[key][4] if before is max else kind
                older[key] += stale_kind != RecordKind.TOMBSTONE
                if before is min:
                    continue
            newest[key], order[key] = at, int(entry["sequence"])
    with log.lock:
        faults += _compare(log, newest, older)
    return faults


def _entries(log: OpenLog, number: int, arena: Arena) -> list[np.void]:
    """Records of a segment by a scan; where there is a footer, those that it names."""
    fetch = WindowReader(log.segments[number].file, arena)
    size, used = log.core.config.segment_bytes, log.core.segments[number].used_bytes
    scan = scan_segment(fetch, size, segment_seed(log.uuid, number), newest=False, first_sequence=None)
    sealed = read_sealed(log, number, fetch)
    named = None if sealed is None else set(sealed[0]["position"].tolist())
    return [
        entry
        for entry in scan.entries
        if (int(entry["position"]) < used if named is None else int(entry["position"]) in named)
    ]


def _compare(log: OpenLog, newest: _Newest, older: Counter[bytes]) -> list[str]:
    index, faults = log.core.rows, []
    lost = index.states == RowState.LOST
    lost_keys = {key.tobytes() for key in index.key_bytes(np.flatnonzero(lost).astype(np.int32))}
    live_rows = np.flatnonzero(index.states == RowState.LIVE).astype(np.int32)
    held = {key.tobytes(): row for key, row in zip(index.key_bytes(live_rows), live_rows.tolist(), strict=True)}
    live_bytes: Counter[int] = Counter()
    records = tombstones = payload_bytes = 0
    for key, (number, position, size, name_bytes, kind) in newest.items():
        if key in lost_keys or kind == RecordKind.LOST:
            if key in held:
                faults.append(f"{key.hex()} does not verify on disk")
            continue
        if kind == RecordKind.TOMBSTONE:
            if key in held:
                faults.append(f"{key.hex()} is removed on disk but readable in the index")
            if older[key]:
                tombstones += 1
                live_bytes[number] += record_bytes(size, name_bytes)
            continue
        records, payload_bytes = records + 1, payload_bytes + size
        live_bytes[number] += record_bytes(size, name_bytes)
        row = held.pop(key, None)
        if row is None:
            faults.append(f"{key.hex()} is on disk but not in the index")
        elif (int(index.segments[row]), int(index.offsets(live_rows[live_rows == row])[0])) != (number, position):
            faults.append(f"{key.hex()} is elsewhere than the index says")
    faults += [f"{key.hex()} is in the index but not on disk" for key in held]
    return faults + _compare_space(log, live_bytes, (records, tombstones, payload_bytes))


def _compare_space(log: OpenLog, live_bytes: Counter[int], counts: tuple[int, int, int]) -> list[str]:
    config, faults = log.core.config, []
    for number, segment in log.core.segments.items():
        if segment.live_bytes != live_bytes[number]:
            faults.append(f"segment {number} has {live_bytes[number]} live bytes, not {segment.live_bytes}")
        if log.segments[number].file.size() > config.segment_bytes:
            faults.append(f"the file of segment {number} is too long")
    total = max(config.segments_max, len(log.core.segments)) * config.segment_bytes
    free = total - len(log.core.segments) * config.segment_bytes
    if log.core.active is not None:
        free += config.segment_bytes - log.core.segments[log.core.active].used_bytes
    live = sum(live_bytes.values())
    expected = Space(total, live, total - live - free, free, counts[2], counts[0], counts[1], len(log.core.segments))
    if log.core.space() != expected:
        faults.append(f"accounts {log.core.space()} are not {expected}")
    return faults
