"""Batches of records read by `read_loop` in several threads: arrays out of what is wanted, answers out of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvpool.core.index import key_words
from kvpool.core.kernels.copying import STREAM_BYTES_MIN
from kvpool.core.ssd.format import DESCRIPTOR, DESCRIPTOR_BYTES, PACKED_BYTES_MAX, PAGE_BYTES, place_seeds
from kvpool.core.ssd.records import SsdRead
from kvpool.tiers.ssd.files import DiskFile, File
from kvpool.tiers.ssd.lanes import Lanes, addresses_of
from kvpool.tiers.ssd.read_loop import BAD, GOOD, LEFT, RUN_RECORDS, cut_runs, read_runs

if TYPE_CHECKING:
    from kvpool.tiers.ssd.open_log import SegmentFile
    from kvpool.tiers.ssd.reading import Wanted

#: One system call reads about this much: neighbours in the log are read together. As `group_writing.WRITE_BYTES`.
RUN_BYTES: Final = 960 << 10
#: Packed records this near to each other are read together with what lies between.
GAP_BYTES: Final = 2 * PAGE_BYTES
#: Larger records are left to others, which read parts of them at once.
RECORD_BYTES_MAX: Final = (2 << 20) + PAGE_BYTES
#: Payloads up to here are read into the thread's memory, and moved to their targets while they are verified; larger
#: ones at once into their target, if it lies on whole pages. A disk whose data is copied by software (virtual ones are)
#: fills memory that stays in the caches faster, by more than the move costs; at 2 MiB the difference is gone.
STAGED_BYTES_MAX: Final = 1 << 20
#: A thread's memory: a run that is read through it, and the pages where it begins and ends.
_MEMORY_BYTES: Final = RECORD_BYTES_MAX + 2 * PAGE_BYTES
_NO_FILE: Final = -1

assert max(RUN_BYTES, 2 * RUN_RECORDS * PAGE_BYTES) + 2 * PAGE_BYTES <= _MEMORY_BYTES

I64: TypeAlias = NDArray[np.int64]
U8: TypeAlias = NDArray[np.uint8]
U64: TypeAlias = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class DirectlyRead:
    """What a batch gave. bad: rows read that did not verify; left: rows that were not read in full, or not tried."""

    bad: list[int]
    left: list[int]
    reads: int = 0
    read_bytes: int = 0


def read_directly(lanes: Lanes, wanted: Wanted, answer: SsdRead, *, direct: bool) -> DirectlyRead:
    """Fills targets and the answers of rows that verify. The segments are acquired.

    Args: direct: whether the files take only whole pages of memory.
    """
    numbers, descriptors, seeds = _files_of(wanted.segments)
    order, left = _suitable(wanted, numbers, descriptors)
    if not len(order):
        return DirectlyRead([], left)
    rows = order.tolist()
    offsets, ends = np.array(wanted.offsets, np.uint64)[order], np.array(wanted.ends, np.uint64)[order]
    sizes, name_bytes = np.array(wanted.sizes, np.uint64)[order], np.array(wanted.name_bytes, np.uint64)[order]
    targets = addresses_of([target for row in rows if (target := wanted.targets[row]) is not None])
    packed = sizes <= PACKED_BYTES_MAX
    straight = ~packed
    if direct:
        straight &= (targets % PAGE_BYTES == 0) & (sizes > STAGED_BYTES_MAX)
    runs = cut_runs(numbers[order], offsets, ends, straight, packed, RUN_BYTES, GAP_BYTES)
    raw = np.empty((len(rows), DESCRIPTOR_BYTES + int(name_bytes.max())), np.uint8)
    outcomes = np.full(len(rows), LEFT, np.uint8)
    arguments = (
        np.zeros(1, np.uint64), runs, descriptors[order], straight, offsets, ends, sizes, name_bytes,
        wanted.sequences[order], key_words(wanted.keys[order]), place_seeds(seeds[order], offsets.astype(np.int64)),
        targets, bool(sizes.sum() >= STREAM_BYTES_MIN),
    )  # fmt: skip
    lanes.run([partial(_work, lanes, arguments, raw, outcomes)] * min(lanes.depth, len(runs) - 1))
    _answer(answer, order, outcomes, raw, name_bytes)
    done = outcomes[runs[:-1]] != LEFT
    return DirectlyRead(
        order[outcomes == BAD].tolist(), left + order[outcomes == LEFT].tolist(),
        int(done.sum()), int((ends[runs[1:] - 1] - offsets[runs[:-1]])[done].sum()),
    )  # fmt: skip


def _files_of(segments: Sequence[SegmentFile]) -> tuple[I64, I64, U64]:
    """Of each row the number of its segment, the descriptor of its file, and its seed; looked up once a segment."""
    numbers = np.array([segment.number for segment in segments], np.int64)
    known = dict(zip(numbers.tolist(), segments, strict=True))
    distinct, at = np.unique(numbers, return_inverse=True)
    files = [known[number] for number in distinct.tolist()]
    descriptors = np.array([_descriptor(segment.file) for segment in files], np.int64)
    return numbers, descriptors[at], np.array([segment.seed for segment in files], np.uint64)[at]


def _suitable(wanted: Wanted, numbers: I64, descriptors: I64) -> tuple[I64, list[int]]:
    """Rows for the loop, as they lie in the log, which is the quickest for the disk too; and the others.

    Those are without a target, large, or in a file that is not the system's.
    """
    suits = np.array([target is not None for target in wanted.targets], np.bool_)
    suits &= descriptors != _NO_FILE
    offsets = np.array(wanted.offsets, np.int64)
    suits &= np.array(wanted.ends, np.int64) - offsets <= RECORD_BYTES_MAX
    order = np.lexsort((offsets, numbers))
    chosen: I64 = order[suits[order]]
    return chosen, np.flatnonzero(~suits).tolist()


def _work(lanes: Lanes, arguments: tuple[NDArray[np.generic] | bool, ...], raw: U8, outcomes: U8) -> None:
    arena = lanes.borrow_arena()
    try:
        read_runs(*arguments, arena.take(_MEMORY_BYTES), raw, outcomes)
    finally:
        lanes.return_arena(arena)


def _answer(answer: SsdRead, order: I64, outcomes: U8, raw: U8, name_bytes: NDArray[np.uint64]) -> None:
    good = np.flatnonzero(outcomes == GOOD)
    at = order[good]
    found = np.ascontiguousarray(raw[good, :DESCRIPTOR_BYTES]).view(DESCRIPTOR).reshape(-1)
    answer.digests[at], answer.section_counts[at] = found["digests"], found["section_count"]
    answer.fidelities[at] = found["fidelity"]
    for i in good[name_bytes[good] > 0].tolist():
        answer.names[int(order[i])] = raw[i, DESCRIPTOR_BYTES : DESCRIPTOR_BYTES + int(name_bytes[i])].tobytes()
    answer.good[at] = True


def _descriptor(file: File) -> int:
    """Of the system's file; _NO_FILE if there is another layer, whose own `read` must be called."""
    return file.descriptor if isinstance(file, DiskFile) else _NO_FILE


def warm_up() -> None:
    """Compiles the loop, or loads it from the cache, without reading anything."""
    none, words = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    runs = cut_runs(none, words, words, np.zeros(0, np.bool_), np.zeros(0, np.bool_), RUN_BYTES, GAP_BYTES)
    read_runs(
        np.zeros(1, np.uint64), runs, none, np.zeros(0, np.bool_), words, words, words, words, words,
        np.zeros((0, 2), np.uint64), words, words, False, np.zeros(1, np.uint8),
        np.zeros((0, DESCRIPTOR_BYTES), np.uint8), np.zeros(0, np.uint8),
    )  # fmt: skip
