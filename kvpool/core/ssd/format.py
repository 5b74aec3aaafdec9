"""How the log lies on disk: pages, record descriptors, segment headers and footers. Bytes in, facts out; no files here.

A segment is a header page, records, and when sealed a footer: one entry a record, then a trailer in the last page.
A record is a descriptor of 256 bytes, its name, its payload. Large records begin on a page, their payload on the next
one, so that payloads move between disk and shared memory without a copy; small ones are packed side by side. A group
of records begins on a new page, since a page that holds acknowledged records is never written again.

Every checksum is seeded with the store's uuid, the segment's number and, for descriptors, the place: bytes of another
store, segment or place do not verify. All numbers are little-endian.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvpool.core.errors import NoSsd
from kvpool.core.kernels.copying import digest_blocks
from kvpool.core.namespace import SECTIONS_MAX

FORMAT_VERSION: Final = 1
PAGE_BYTES: Final = 4096
#: Records begin at multiples of this.
UNIT_BYTES: Final = 64
DESCRIPTOR_BYTES: Final = 256
FOOTER_ENTRY_BYTES: Final = 64
NAME_BYTES_MAX: Final = 1024
#: Payloads up to here are packed; beyond, a page for the descriptor costs less than copying.
PACKED_BYTES_MAX: Final = 16 * 1024
#: Bytes of a segment that no record can have: its header, and the least footer.
SEGMENT_OVERHEAD_BYTES: Final = 3 * PAGE_BYTES

RECORD_MAGIC: Final = int.from_bytes(b"KVPRECRD", "little")
SEGMENT_MAGIC: Final = int.from_bytes(b"KVPSEGMT", "little")
TRAILER_MAGIC: Final = int.from_bytes(b"KVPTRAIL", "little")
STORE_MAGIC: Final = int.from_bytes(b"KVPSTORE", "little")

#: What a descriptor's checksum covers begins here.
_BODY_AT: Final = 16
_RECORD_MAGIC_BYTES: Final = b"KVPRECRD"
_FORMAT_VERSION_BYTES: Final = FORMAT_VERSION.to_bytes(2, "little")
_MASK64: Final = (1 << 64) - 1
_MIX_SEGMENT, _MIX_PLACE = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


class RecordKind(IntEnum):
    """What a record says; 0 is never written."""

    DATA = 1
    TOMBSTONE = 2  # the key was removed: older records of it are void
    LOST = 3  # only in footers: the payload did not verify, and older records of the key are void


DESCRIPTOR: Final = np.dtype(
    [
        ("magic", "<u8"), ("checksum", "<u8"), ("version", "<u2"), ("kind", "u1"), ("fidelity", "u1"),
        ("section_count", "u1"), ("reserved0", "u1"), ("name_bytes", "<u2"), ("sequence", "<u8"), ("size", "<u8"),
        ("group_sequence", "<u8"), ("key", "u1", (16,)), ("namespace", "u1", (16,)),
        ("digests", "<u8", (SECTIONS_MAX,)), ("parent", "u1", (16,)), ("tenant", "<u4"), ("reserved", "u1", (92,)),
    ]
)  # fmt: skip

FOOTER_ENTRY: Final = np.dtype(
    [
        ("key", "u1", (16,)), ("namespace", "u1", (16,)), ("sequence", "<u8"), ("position", "<u8"), ("size", "<u8"),
        ("name_bytes", "<u2"), ("kind", "u1"), ("fidelity", "u1"), ("section_count", "u1"), ("reserved", "u1", (3,)),
    ]
)  # fmt: skip

#: One page each. `used_bytes` counts from the segment's start to the end of its records.
SEGMENT_HEADER: Final = np.dtype(
    [
        ("magic", "<u8"), ("checksum", "<u8"), ("version", "<u4"), ("reserved", "<u4"), ("uuid", "u1", (16,)),
        ("number", "<u8"), ("segment_bytes", "<u8"), ("first_sequence", "<u8"),
    ]
)  # fmt: skip
TRAILER: Final = np.dtype(
    [
        ("magic", "<u8"), ("checksum", "<u8"), ("version", "<u4"), ("reserved", "<u4"), ("uuid", "u1", (16,)),
        ("number", "<u8"), ("used_bytes", "<u8"), ("footer_offset", "<u8"), ("entry_count", "<u8"),
        ("footer_digest", "<u8"),
    ]
)  # fmt: skip
STORE_HEADER: Final = np.dtype(
    [
        ("magic", "<u8"), ("checksum", "<u8"), ("version", "<u4"), ("reserved", "<u4"), ("uuid", "u1", (16,)),
        ("segment_bytes", "<u8"),
    ]
)  # fmt: skip

assert DESCRIPTOR.itemsize == DESCRIPTOR_BYTES
assert FOOTER_ENTRY.itemsize == FOOTER_ENTRY_BYTES

#: Structured arrays of the types above.
Descriptors: TypeAlias = NDArray[np.void]
FooterEntries: TypeAlias = NDArray[np.void]


def align(value: int, alignment: int = PAGE_BYTES) -> int:
    """The next multiple."""
    return -(-value // alignment) * alignment


def is_packed(size_bytes: int) -> bool:
    """Whether a payload of this size lies behind its descriptor instead of on a page of its own."""
    return size_bytes <= PACKED_BYTES_MAX


def record_bytes(size_bytes: int, name_bytes: int) -> int:
    """What a record takes, without the padding behind the last packed one of a group."""
    if is_packed(size_bytes):
        return align(DESCRIPTOR_BYTES + name_bytes + size_bytes, UNIT_BYTES)
    return PAGE_BYTES + align(size_bytes)


def record_bytes_of(sizes: NDArray[np.uint64], name_bytes: NDArray[np.uint16]) -> NDArray[np.int64]:
    """`record_bytes` of each row."""
    signed = sizes.astype(np.int64)
    packed = -(-(DESCRIPTOR_BYTES + name_bytes.astype(np.int64) + signed) // UNIT_BYTES) * UNIT_BYTES
    large = PAGE_BYTES + -(-signed // PAGE_BYTES) * PAGE_BYTES
    return np.where(signed <= PACKED_BYTES_MAX, packed, large)


def place_records(start: int, sizes: NDArray[np.uint64], name_bytes: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Where records begin that lie one behind the other from a page on; int64 (n)."""
    weights = record_bytes_of(sizes, name_bytes)
    packed = sizes <= PACKED_BYTES_MAX
    if packed.all() or not packed.any():
        return start + np.cumsum(weights) - weights
    offsets = np.empty(len(sizes), np.int64)
    at = start
    for row, (weight, is_small) in enumerate(zip(weights.tolist(), packed.tolist(), strict=True)):
        at = at if is_small else align(at)
        offsets[row] = at
        at += weight
    return offsets


def payload_offset(size_bytes: int, name_bytes: int) -> int:
    """Where a payload begins, from its record's start."""
    return DESCRIPTOR_BYTES + name_bytes if is_packed(size_bytes) else PAGE_BYTES


def footer_bytes(entry_count: int) -> int:
    """What a sealed segment's end takes: entries in whole pages, and the trailer's page."""
    return align(entry_count * FOOTER_ENTRY_BYTES) + PAGE_BYTES


def footer_bytes_of(entry_counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """`footer_bytes` of each."""
    return (-(-entry_counts * FOOTER_ENTRY_BYTES // PAGE_BYTES) + 1) * PAGE_BYTES


def payload_bytes_max(segment_bytes: int) -> int:
    """The largest payload that a segment can hold."""
    return segment_bytes - PAGE_BYTES - footer_bytes(1) - PAGE_BYTES


def segment_name(number: int) -> str:
    return f"seg-{number:016x}"


def segment_number(name: str) -> int | None:
    """Number in a segment file's name; None for other files."""
    digits = name.removeprefix("seg-")
    if len(digits) != 16 or digits == name or not all(c in "0123456789abcdef" for c in digits):
        return None
    return int(digits, 16)


# ---------------------------------------------------------------- checksums


def segment_seed(uuid: bytes, number: int) -> int:
    """Seed of a segment's checksums."""
    low, high = int.from_bytes(uuid[:8], "little"), int.from_bytes(uuid[8:], "little")
    return (low ^ (high * _MIX_PLACE) ^ ((number + 1) * _MIX_SEGMENT)) & _MASK64


def place_seed(seed: int, offset: int) -> int:
    """Seed of the checksum of the descriptor at a place of the segment with this seed."""
    return (seed ^ ((offset + 1) * _MIX_PLACE)) & _MASK64


def place_seeds(seeds: NDArray[np.uint64], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """`place_seed` of many places: seeds of the segment of each, uint64 (n), and offsets int64 (n)."""
    return seeds ^ ((offsets.astype(np.uint64) + np.uint64(1)) * np.uint64(_MIX_PLACE))


def sign_descriptors(descriptors: Descriptors, names: list[bytes], offsets: NDArray[np.int64], seed: int) -> None:
    """Fills in magic, version and checksum; everything else must stand.

    Args:
        offsets: int64 (n), from the segment's start.
        seed: `segment_seed` of their segment.
    """
    descriptors["magic"] = RECORD_MAGIC
    descriptors["version"] = FORMAT_VERSION
    seeds = place_seeds(np.full(len(offsets), seed, np.uint64), offsets)
    descriptors["checksum"] = _body_digests(descriptors, seeds)
    packed = descriptors.view(np.uint8).data
    for row, name in enumerate(names):
        if name:
            body = packed[row * DESCRIPTOR_BYTES + _BODY_AT : (row + 1) * DESCRIPTOR_BYTES]
            descriptors["checksum"][row] = xxhash.xxh3_64_intdigest(bytes(body) + name, int(seeds[row]))


def _body_digests(descriptors: Descriptors, seeds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """XXH3-64 of what follows each checksum, with a seed each, in one call; uint64 (n)."""
    count = len(descriptors)
    first = descriptors.__array_interface__["data"][0] + _BODY_AT
    # The kernel's seed of a block's first section is its key's words, xored.
    words = np.zeros((count, 2), np.uint64)
    words[:, 0] = seeds
    digests = np.zeros((count, 1), np.uint64)
    digest_blocks(
        np.arange(count, dtype=np.uint64) * np.uint64(DESCRIPTOR_BYTES) + np.uint64(first),
        np.full(count, DESCRIPTOR_BYTES - _BODY_AT, np.uint64), words, np.ones(count, np.uint64), digests,
    )  # fmt: skip
    return digests[:, 0]


def descriptor_verifies(data: NDArray[np.uint8], offset: int, seed: int) -> bool:
    """Whether `data`, uint8 (>= 256), begins with a descriptor that was written at this place, its name behind it."""
    head = data[:24].tobytes()
    if head[:8] != _RECORD_MAGIC_BYTES or head[16:18] != _FORMAT_VERSION_BYTES:
        return False
    kind, sections, name_bytes = head[18], head[20], int.from_bytes(head[22:24], "little")
    end = DESCRIPTOR_BYTES + name_bytes
    if name_bytes > NAME_BYTES_MAX or end > len(data) or not 1 <= sections <= SECTIONS_MAX:
        return False
    checksum = xxhash.xxh3_64_intdigest(data[16:end].data, place_seed(seed, offset))
    return checksum == int.from_bytes(head[8:16], "little") and kind in (RecordKind.DATA, RecordKind.TOMBSTONE)


def read_descriptor(data: NDArray[np.uint8], offset: int, seed: int) -> np.void | None:
    """The descriptor at the start of `data`, uint8 (>= 256 + name) read from `offset`; None if it does not verify."""
    if len(data) < DESCRIPTOR_BYTES or not descriptor_verifies(data, offset, seed):
        return None
    # A copy: what was read lies in a buffer that is used again.
    found: np.void = data[:DESCRIPTOR_BYTES].copy().view(DESCRIPTOR)[0]
    return found


# ---------------------------------------------------------------- headers and footers


def _signed_page(fields: NDArray[np.void], seed: int) -> bytes:
    raw = fields.view(np.uint8).reshape(-1)
    fields["checksum"] = xxhash.xxh3_64_intdigest(raw[16:].data, seed)
    return bytes(raw).ljust(PAGE_BYTES, b"\0")


def _checked(raw: bytes, dtype: np.dtype[np.void], magic: int, seed: int) -> np.void | None:
    if len(raw) < dtype.itemsize:
        return None
    page = np.frombuffer(raw, dtype=np.uint8, count=dtype.itemsize)
    fields: np.void = page.view(dtype)[0]
    good = fields["magic"] == magic and int(fields["checksum"]) == xxhash.xxh3_64_intdigest(page[16:].data, seed)
    return fields if good else None


def check_version(raw: bytes, magic: int, what: str) -> None:
    """Refuses a header of another format version, even though its checksum may be made otherwise.

    Raises: NoSsd.
    """
    if len(raw) >= 20 and int.from_bytes(raw[:8], "little") == magic:
        version = int.from_bytes(raw[16:20], "little")
        if version != FORMAT_VERSION:
            raise NoSsd(
                f"{what} has format version {version}, this program reads version {FORMAT_VERSION}",
                hint="point --ssd-dir elsewhere, or delete the folder: it is a cache",
            )


def pack_store_header(uuid: bytes, segment_bytes: int) -> bytes:
    fields = np.zeros(1, STORE_HEADER)
    fields["magic"], fields["version"], fields["segment_bytes"] = STORE_MAGIC, FORMAT_VERSION, segment_bytes
    fields["uuid"] = np.frombuffer(uuid, np.uint8)
    return _signed_page(fields, 0)


def read_store_header(raw: bytes) -> tuple[bytes, int] | None:
    """(uuid, segment_bytes), or None if it does not verify. Raises: NoSsd for another version."""
    check_version(raw, STORE_MAGIC, "the SSD store")
    fields = _checked(raw, STORE_HEADER, STORE_MAGIC, 0)
    return None if fields is None else (fields["uuid"].tobytes(), int(fields["segment_bytes"]))


def pack_segment_header(uuid: bytes, number: int, segment_bytes: int, first_sequence: int) -> bytes:
    fields = np.zeros(1, SEGMENT_HEADER)
    fields["magic"], fields["version"], fields["number"] = SEGMENT_MAGIC, FORMAT_VERSION, number
    fields["segment_bytes"], fields["first_sequence"] = segment_bytes, first_sequence
    fields["uuid"] = np.frombuffer(uuid, np.uint8)
    return _signed_page(fields, segment_seed(uuid, number))


def read_segment_header(raw: bytes, uuid: bytes, number: int) -> int | None:
    """The sequence of the first record that may be in the segment; None if the header does not verify.

    Raises: NoSsd for another version.
    """
    check_version(raw, SEGMENT_MAGIC, f"segment {segment_name(number)}")
    fields = _checked(raw, SEGMENT_HEADER, SEGMENT_MAGIC, segment_seed(uuid, number))
    return None if fields is None else int(fields["first_sequence"])


def pack_footer(uuid: bytes, number: int, segment_bytes: int, used_bytes: int, entries: FooterEntries) -> bytes:
    """Entries and trailer, to be written so that they end where the segment ends."""
    body = entries.tobytes().ljust(align(len(entries) * FOOTER_ENTRY_BYTES), b"\0")
    fields = np.zeros(1, TRAILER)
    fields["magic"], fields["version"], fields["number"] = TRAILER_MAGIC, FORMAT_VERSION, number
    fields["used_bytes"], fields["entry_count"] = used_bytes, len(entries)
    fields["footer_offset"] = segment_bytes - PAGE_BYTES - len(body)
    seed = segment_seed(uuid, number)
    fields["footer_digest"] = xxhash.xxh3_64_intdigest(body, seed)
    fields["uuid"] = np.frombuffer(uuid, np.uint8)
    return body + _signed_page(fields, seed)


def read_trailer(raw: bytes, uuid: bytes, number: int) -> np.void | None:
    """The trailer in a segment's last page; None if it does not verify."""
    return _checked(raw, TRAILER, TRAILER_MAGIC, segment_seed(uuid, number))


def read_footer(body: bytes, trailer: np.void, uuid: bytes, number: int) -> FooterEntries | None:
    """Entries of a footer, uint8 pages read from `footer_offset`; None if they do not verify."""
    if xxhash.xxh3_64_intdigest(body, segment_seed(uuid, number)) != int(trailer["footer_digest"]):
        return None
    return np.frombuffer(body, dtype=FOOTER_ENTRY, count=int(trailer["entry_count"]))
