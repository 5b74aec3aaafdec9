"""Arrays that describe a source's blocks, laid over memory that the caller supplies: private, or shared with readers.

One process writes, many read. An entry's generation is odd while it changes; readers load it before and after and
believe nothing they saw if it moved. Entries never move. The table of keys does change in place: its version (a word of
the header) is odd while it does, so that a reader can tell a miss from a key on the move.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import BadArgument
from kvpool.core.ids import KeyArray

MAGIC: Final = 0x6B76706F6F6C3031  # "kvpool01"
LAYOUT_VERSION: Final = 2
_HEADER_WORDS: Final = 16
_ALIGN: Final = 64

#: Words of the header after magic, layout version, entries and sections.
TABLE_VERSION: Final = 4  # odd while `buckets` change
FLAGS: Final = 5

#: Reads of an entry that are counted between two looks of the source; as many as any policy tells apart at once.
TOUCHES_MAX: Final = 3

#: Flag: what is not here may be in a lower tier of the same source; only the source can tell.
FLAG_LOWER_TIER: Final = 1


class EntryState(IntEnum):
    """What an entry is; 0 = free."""

    FREE = 0
    WRITING = 1
    READABLE = 2
    DOOMED = 3  # removed, but still held by a lease or a pin
    QUARANTINED = 4  # never completed; its slot is kept from others until its writer is proven gone


@dataclass(frozen=True, slots=True, eq=False)
class Descriptors:
    """Where blocks lie in a source, one row a key.

    keys uint8 (n, 16); offsets uint64 (n), bytes from the start of the segment's data; sizes uint64 (n), bytes;
    generations uint32 (n); digests uint64 (n, sections).
    """

    keys: KeyArray
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    generations: NDArray[np.uint32]
    digests: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Descriptors:
        """The rows named by an index or a mask."""
        return Descriptors(
            self.keys[rows], self.offsets[rows], self.sizes[rows], self.generations[rows], self.digests[rows]
        )


def _bucket_count(entries: int) -> int:
    return max(16, 1 << (2 * entries - 1).bit_length())


def _fields(entries: int, sections: int) -> list[tuple[str, np.dtype[np.generic], tuple[int, ...]]]:
    return [
        ("header", np.dtype(np.uint64), (_HEADER_WORDS,)),
        ("buckets", np.dtype(np.uint32), (_bucket_count(entries),)),
        ("keys", np.dtype(np.uint64), (entries, 2)),
        ("generations", np.dtype(np.uint32), (entries,)),
        ("states", np.dtype(np.uint8), (entries,)),
        ("fidelities", np.dtype(np.uint8), (entries,)),
        ("section_counts", np.dtype(np.uint8), (entries,)),
        ("namespaces", np.dtype(np.uint16), (entries,)),
        ("tenants", np.dtype(np.uint16), (entries,)),
        ("name_bytes", np.dtype(np.uint16), (entries,)),
        ("sizes", np.dtype(np.uint64), (entries,)),
        ("offsets", np.dtype(np.uint64), (entries,)),
        ("digests", np.dtype(np.uint64), (entries, sections)),
    ]


@dataclass(frozen=True, slots=True, eq=False)
class SourceArrays:
    """The arrays; see the module's head. `header` = magic, layout version, entries, sections, table version, flags.

    `namespaces` and `tenants` are numbers that the source gave out. `name_bytes` is the length of an object's name,
    which lies in the slot behind its `sizes` bytes; 0 for blocks. `touches` lies in memory that readers may write, one
    byte an entry: readers count their reads there up to TOUCHES_MAX, the source clears it when it has taken note.
    """

    entries: int
    sections: int
    header: NDArray[np.uint64]
    buckets: NDArray[np.uint32]
    keys: NDArray[np.uint64]
    generations: NDArray[np.uint32]
    states: NDArray[np.uint8]
    fidelities: NDArray[np.uint8]
    section_counts: NDArray[np.uint8]
    namespaces: NDArray[np.uint16]
    tenants: NDArray[np.uint16]
    name_bytes: NDArray[np.uint16]
    sizes: NDArray[np.uint64]
    offsets: NDArray[np.uint64]
    digests: NDArray[np.uint64]
    touches: NDArray[np.uint8]

    @staticmethod
    def bytes_needed(entries: int, sections: int = 8) -> int:
        """Bytes of the buffer for `over`."""
        total = 0
        for _, dtype, shape in _fields(entries, sections):
            total += -(-dtype.itemsize * int(np.prod(shape)) // _ALIGN) * _ALIGN
        return total

    @classmethod
    def over(
        cls,
        buffer: NDArray[np.uint8],
        entries: int,
        sections: int = 8,
        *,
        fresh: bool,
        touches: NDArray[np.uint8] | None = None,
    ) -> SourceArrays:
        """Lays the arrays over `buffer`; `fresh` clears it, otherwise its header is checked.

        Args: touches: uint8 (>= entries), shared with readers; None = private.
        Raises: BadArgument if the buffer is too small, or was laid out by another version or with other sizes.
        """
        if len(buffer) < cls.bytes_needed(entries, sections):
            raise BadArgument(f"an index of {entries} entries needs {cls.bytes_needed(entries, sections)} bytes")
        views: dict[str, NDArray[np.generic]] = {}
        at = 0
        for name, dtype, shape in _fields(entries, sections):
            size = dtype.itemsize * int(np.prod(shape))
            views[name] = buffer[at : at + size].view(dtype).reshape(shape)
            at += -(-size // _ALIGN) * _ALIGN
        marks = np.zeros(entries, dtype=np.uint8) if touches is None else touches[:entries]
        if len(marks) < entries:
            raise BadArgument(f"{len(marks)} touch marks are too few for {entries} entries")
        arrays = cls(entries, sections, **views, touches=marks)  # type: ignore[arg-type]
        expected = (MAGIC, LAYOUT_VERSION, entries, sections)
        if fresh:
            buffer[:at] = 0
            arrays.header[: len(expected)] = expected
        elif tuple(int(word) for word in arrays.header[: len(expected)]) != expected:
            raise BadArgument(
                "the segment's index has another layout", hint="it belongs to another kvpool version; remove the file"
            )
        return arrays

    @classmethod
    def attach(cls, buffer: NDArray[np.uint8], touches: NDArray[np.uint8] | None = None) -> SourceArrays:
        """Lays the arrays over a buffer that holds some, with the sizes that its header names.

        Raises: BadArgument if it holds none, or those of another version.
        """
        words = buffer[: _HEADER_WORDS * 8].view(np.uint64)
        if int(words[0]) != MAGIC or int(words[1]) != LAYOUT_VERSION or not 0 < int(words[3]) <= 64:
            raise BadArgument(
                "the segment's index has another layout", hint="it belongs to another kvpool version; remove the file"
            )
        return cls.over(buffer, int(words[2]), int(words[3]), fresh=False, touches=touches)

    @classmethod
    def allocate(cls, entries: int, sections: int = 8) -> SourceArrays:
        """Arrays in private memory."""
        return cls.over(np.zeros(cls.bytes_needed(entries, sections), dtype=np.uint8), entries, sections, fresh=True)
