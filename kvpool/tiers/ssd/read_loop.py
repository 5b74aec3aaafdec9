"""Reading and verifying records in one compiled loop without the GIL: what a thread of the SSD store runs for a batch.

Several threads run the loop over the same arrays, each with memory of its own; a shared counter hands out the runs.
Whatever is not read in full at the first try (an error, a signal, the end of a file) is left as it is, for the plain
way in `reading` to find out what is wrong; that is also the oracle of what verifies here.

All numbers are uint64, and an array's rows are records in the order in which they are read. Addresses are of this
process: the caller makes sure that targets stay where they are, and are as large as their records' payloads.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kvpool.core.kernels.atomics import array_address, fence_stores
from kvpool.core.kernels.stripes import load_8, load_64, move_bytes
from kvpool.core.kernels.xxh3_64 import HASH_ONLY, SCRATCH_WORDS, STORE, STREAM, move_and_hash
from kvpool.core.namespace import SECTIONS_MAX
from kvpool.core.ssd.format import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    FORMAT_VERSION,
    PACKED_BYTES_MAX,
    PAGE_BYTES,
    RECORD_MAGIC,
    RecordKind,
)

U64: TypeAlias = NDArray[np.uint64]
I64: TypeAlias = NDArray[np.int64]
U8: TypeAlias = NDArray[np.uint8]
Bools: TypeAlias = NDArray[np.bool_]

#: Records of one run: three buffers each, and IOV_MAX is 1024.
RUN_RECORDS: Final = 128

#: What became of a record: not read in full; read and verified; read, and not what was asked for.
LEFT, GOOD, BAD = 0, 1, 2

_SEED_SECTION: Final = np.uint64(0x9E3779B97F4A7C15)
_PAGE: Final = np.uint64(PAGE_BYTES)
_DESCRIPTOR: Final = np.uint64(DESCRIPTOR_BYTES)
_MAGIC: Final = np.uint64(RECORD_MAGIC)
_PACKED_BYTES_MAX: Final = np.uint64(PACKED_BYTES_MAX)
_VERSION_LOW, _VERSION_HIGH = np.uint64(FORMAT_VERSION & 0xFF), np.uint64(FORMAT_VERSION >> 8)
_DATA: Final = np.uint64(RecordKind.DATA)
_SECTIONS_MAX: Final = np.uint64(SECTIONS_MAX)


def _place(field: str) -> np.uint64:
    assert DESCRIPTOR.fields is not None
    return np.uint64(DESCRIPTOR.fields[field][1])


_CHECKSUM_AT, _VERSION_AT, _KIND_AT = _place("checksum"), _place("version"), _place("kind")
_SECTIONS_AT, _NAME_BYTES_AT, _SEQUENCE_AT = _place("section_count"), _place("name_bytes"), _place("sequence")
_SIZE_AT, _KEY_AT, _DIGESTS_AT = _place("size"), _place("key"), _place("digests")

_NONE, _EIGHT, _ONE, _LOW_BYTE = np.uint64(0), np.uint64(8), np.uint64(1), np.uint64(0xFF)
_LINE: Final = np.uint64(64)

_preadv = types.ExternalFunction("preadv", types.intp(types.int32, types.uint64, types.int32, types.int64))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def take_next(typing_context: Any, address: Any) -> Any:
    """The uint64 at an address, which becomes one more; each caller gets another number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(word, 1), "monotonic")

    return types.uint64(types.uint64), generate


@njit(cache=True)
def cut_runs(
    files: I64, offsets: U64, ends: U64, straight: Bools, packed: Bools, run_bytes: int, gap_bytes: int
) -> I64:
    """Records that one system call reads: neighbours in a file, packed ones with small gaps, others without any.

    Args: files, offsets: in order of (file, offset); ends: one behind each record's last byte.
    Returns: int64 (runs + 1): run i is the rows from [i] to before [i + 1].
    """
    cuts = np.empty(len(files) + 1, dtype=np.int64)
    count = first = 0
    for row in range(len(files)):
        last = row - 1
        joins = (
            row > 0
            and files[row] == files[last]
            and straight[row] == straight[last]
            and packed[row] == packed[last]
            and row - first < RUN_RECORDS
            and ends[row] - offsets[first] <= np.uint64(run_bytes)
            and offsets[row] - ends[last] <= np.uint64(gap_bytes if packed[row] else 0)
        )
        if not joins:
            cuts[count] = first = row
            count += 1
    cuts[count] = len(files)
    return cuts[: count + 1]


@njit
def _is_wanted(
    head: np.uint64, size: np.uint64, name_bytes: np.uint64, sequence: np.uint64, low: np.uint64, high: np.uint64,
    seed: np.uint64, scratch: U64,
) -> bool:  # fmt: skip
    """Whether a descriptor and its name, of `name_bytes` that were read, verify and are those of the record wanted."""
    sections = load_8(head + _SECTIONS_AT)
    if (
        load_64(head) != _MAGIC
        or load_8(head + _VERSION_AT) != _VERSION_LOW
        or load_8(head + _VERSION_AT + _ONE) != _VERSION_HIGH
        or load_8(head + _KIND_AT) != _DATA
        or sections < _ONE
        or sections > _SECTIONS_MAX
        or load_8(head + _NAME_BYTES_AT) != name_bytes & _LOW_BYTE
        or load_8(head + _NAME_BYTES_AT + _ONE) != name_bytes >> _EIGHT
        or load_64(head + _SEQUENCE_AT) != sequence
        or load_64(head + _SIZE_AT) != size
        or load_64(head + _KEY_AT) != low
        or load_64(head + _KEY_AT + _EIGHT) != high
        or size % sections != np.uint64(0)
    ):
        return False
    body, body_bytes = head + _VERSION_AT, _DESCRIPTOR - _VERSION_AT + name_bytes
    return bool(move_and_hash(body, body, body_bytes, seed, HASH_ONLY, scratch) == load_64(head + _CHECKSUM_AT))


@njit
def _payload_verifies(
    head: np.uint64, source: np.uint64, target: np.uint64, size: np.uint64, seed: np.uint64, streams: bool, scratch: U64
) -> bool:  # fmt: skip
    """Whether a payload has the digests that its descriptor says; moved to its target on the way, if not there yet."""
    sections = load_8(head + _SECTIONS_AT)
    step = size // sections
    store = HASH_ONLY
    if source != target:
        store = STREAM if streams and target % _LINE == _NONE and step % _LINE == _NONE else STORE
    for section in range(np.int64(sections)):
        at = np.uint64(section) * step
        digest = move_and_hash(
            source + at, target + at, step, seed ^ (np.uint64(section) * _SEED_SECTION), store, scratch
        )
        if digest != load_64(head + _DIGESTS_AT + _EIGHT * np.uint64(section)):
            return False
    return True


@njit
def _add_buffer(buffers: U64, count: int, address: np.uint64, size: np.uint64) -> int:
    buffers[2 * count], buffers[2 * count + 1] = address, size
    return count + 1


@njit
def _lay_straight(buffers: U64, first: int, last: int, sizes: U64, targets: U64, memory: np.uint64) -> int:
    """Of each record its descriptor's page, its payload's whole pages in the target, and a page for the rest."""
    count, at = 0, memory
    for row in range(first, last):
        whole = sizes[row] // _PAGE * _PAGE
        count = _add_buffer(buffers, count, at, _PAGE)
        count = _add_buffer(buffers, count, targets[row], whole)
        at += _PAGE
        if whole < sizes[row]:
            count = _add_buffer(buffers, count, at, _PAGE)
            at += _PAGE
    return count


@njit
def _lay_run(
    buffers: U64, first: int, last: int, straight: Bools, offsets: U64, ends: U64, sizes: U64, targets: U64,
    memory: np.uint64,
) -> tuple[int, np.uint64, np.uint64]:  # fmt: skip
    """Where a run's bytes go. Returns: buffers; the run's place in its file; its bytes."""
    start, end = offsets[first], ends[last - 1]
    if straight[first]:
        return _lay_straight(buffers, first, last, sizes, targets, memory), start, end - start
    start, end = start // _PAGE * _PAGE, (end + _PAGE - _ONE) // _PAGE * _PAGE
    return _add_buffer(buffers, 0, memory, end - start), start, end - start


@njit
def _judge_run(
    first: int, last: int, straight: Bools, offsets: U64, sizes: U64, name_bytes: U64, sequences: U64, keys: U64,
    seeds: U64, targets: U64, streams: bool, memory: np.uint64, raw_at: np.uint64, raw_step: np.uint64, scratch: U64,
    outcomes: U8,
) -> None:  # fmt: skip
    """Verifies a run that was read as `_lay_run` said, and moves to targets what is not there yet."""
    next_page, start = memory, offsets[first] // _PAGE * _PAGE
    for row in range(first, last):
        head, target, size = next_page, targets[row], sizes[row]
        source = target
        if straight[first]:
            next_page += _PAGE
            whole = size // _PAGE * _PAGE
            if whole < size:
                move_bytes(next_page, target + whole, size - whole)
                next_page += _PAGE
        else:
            head = memory + offsets[row] - start
            source = head + (_DESCRIPTOR + name_bytes[row] if size <= _PACKED_BYTES_MAX else _PAGE)
        move_bytes(head, raw_at + np.uint64(row) * raw_step, _DESCRIPTOR + name_bytes[row])
        good = _is_wanted(
            head, size, name_bytes[row], sequences[row], keys[row, 0], keys[row, 1], seeds[row], scratch
        ) and _payload_verifies(head, source, target, size, keys[row, 0] ^ keys[row, 1], streams, scratch)
        outcomes[row] = GOOD if good else BAD


@njit(nogil=True, cache=True)
def read_runs(
    counter: U64, runs: I64, fds: I64, straight: Bools, offsets: U64, ends: U64, sizes: U64, name_bytes: U64,
    sequences: U64, keys: U64, seeds: U64, targets: U64, streams: bool, memory: U8, raw: U8, outcomes: U8,
) -> None:  # fmt: skip
    """Reads and verifies runs until there are none left.

    Args:
        counter: uint64 (1,), shared by all threads of the batch: the next run, 0 at first.
        runs: as of `cut_runs`.
        fds: of the file of each record; straight: whether its payload's whole pages go into the target at once (its
            target lies where the file's system calls take it), or all of it through `memory`.
        sizes, name_bytes, sequences, keys (n, 2): what the records must be; seeds: of their descriptors' checksums.
        streams: whether what goes through `memory` is stored to its target past the caches.
        memory: uint8, page-aligned, the thread's own: two pages a record of a straight run, whole pages of others.
        raw: uint8 (n, 256 + most name bytes), gets descriptors and names of records that are GOOD or BAD.
        outcomes: uint8 (n), all LEFT; what becomes of each record.
    """
    buffers = np.empty(2 * 3 * RUN_RECORDS, dtype=np.uint64)
    scratch = np.empty(SCRATCH_WORDS, dtype=np.uint64)
    stage, raw_at, raw_step = array_address(memory), array_address(raw), np.uint64(raw.shape[1])
    counter_at, buffers_at = array_address(counter), array_address(buffers)
    while True:
        run = np.int64(take_next(counter_at))
        if run >= len(runs) - 1:
            break
        first, last = runs[run], runs[run + 1]
        count, start, size = _lay_run(buffers, first, last, straight, offsets, ends, sizes, targets, stage)
        done = _preadv(np.int32(fds[first]), buffers_at, np.int32(count), np.int64(start))
        if done != np.int64(size):
            continue
        _judge_run(
            first, last, straight, offsets, sizes, name_bytes, sequences, keys, seeds, targets, streams, stage, raw_at,
            raw_step, scratch, outcomes,
        )  # fmt: skip
    fence_stores()
