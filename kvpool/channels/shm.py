"""The shm channel: copies between the caller's memory and the segment that a source of this host shares.

No RPC a block and none a batch: whoever holds the lease or the reservation copies by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import Capabilities, ChannelError, Memory, Rows, addresses, check_memory, row_numbers
from kvpool.channels.sections import copy_blocks_in, copy_blocks_out
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument
from kvpool.tiers.dram import Segment


class ReaderMappings:
    """Read-only mappings of this process, one a segment however many use it: each costs page tables and a prefault."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: dict[tuple[Path, bytes], tuple[Segment, int]] = {}

    def acquire(self, path: Path, uuid: bytes) -> Segment:
        """A mapping, to be given back with `release`. Raises: Unavailable, as `Segment.attach`."""
        with self._lock:
            fresh = Segment.attach(path, uuid=uuid)  # always, since the owner may have ended meanwhile
            segment, users = self._shared.get((path, uuid), (fresh, 0))
            if segment is fresh:
                segment.prefault()
            else:
                fresh.close()
            self._shared[path, uuid] = (segment, users + 1)
            return segment

    def release(self, segment: Segment) -> None:
        """Unmaps a segment whose last user has gone."""
        with self._lock:
            key = (segment.path, segment.uuid)
            _, users = self._shared[key]
            if users > 1:
                self._shared[key] = (segment, users - 1)
                return
            del self._shared[key]
        segment.close()


READERS: Final = ReaderMappings()


def offered_segment(parameters: Mapping[str, str]) -> tuple[Path, bytes]:
    """Path and uuid of the segment that an offer names. Raises: BadArgument."""
    try:
        return Path(parameters["path"]), bytes.fromhex(parameters["uuid"])
    except (KeyError, ValueError) as error:
        raise BadArgument(f"an shm offer without {error}") from error


class ShmChannel:
    """Maps a source's segment: read-only for reads, and a second time, writable, once it is written to."""

    kind = "shm"
    capabilities = Capabilities(same_host=True, through_source=False, threads_useful=2)

    def __init__(self, path: Path, uuid: bytes, *, writable: bool) -> None:
        self._path, self._uuid, self._may_write = path, uuid, writable
        self._reader: Segment | None = READERS.acquire(path, uuid)
        self._writer: Segment | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, parameters: Mapping[str, str]) -> ShmChannel:
        """Opens what a source offered. Raises: Unavailable, BadArgument."""
        path, uuid = offered_segment(parameters)
        return cls(path, uuid, writable=parameters.get("writable") == "1")

    def read(
        self,
        lease: int,
        blocks: Descriptors,
        out: Memory,
        rows: Rows | None = None,
        *,
        deadline_s: float,
        verify: bool = True,
    ) -> NDArray[np.bool_]:
        rows = row_numbers(rows, len(blocks.keys), len(out))
        check_memory(out, rows, blocks.sizes, to_write=True)
        data = self._mapped(self._reader)
        sources = _inside(blocks, data)
        return copy_blocks_out(
            sources, addresses(out, rows), blocks, end_s=time.monotonic() + deadline_s, verify=verify
        )

    def write(
        self, reservation: int, slots: Descriptors, data: Memory, rows: Rows | None = None, *, deadline_s: float
    ) -> NDArray[np.uint64]:
        rows = row_numbers(rows, len(slots.keys), len(data))
        check_memory(data, rows, slots.sizes)
        segment = self._mapped(self._writable())
        targets, section_count = _inside(slots, segment), slots.digests.shape[1]
        return copy_blocks_in(
            addresses(data, rows), targets, slots.sizes, slots.keys, section_count, end_s=time.monotonic() + deadline_s
        )

    def close(self) -> None:
        with self._lock:
            reader, writer, self._reader, self._writer = self._reader, self._writer, None, None
            self._may_write = False
        if reader is not None:
            READERS.release(reader)
        if writer is not None:
            writer.close()

    def _writable(self) -> Segment:
        with self._lock:
            if self._writer is None:
                if not self._may_write:
                    raise ChannelError("shm: the source did not grant writing", hint="hold a writer lock, or use tcp")
                self._writer = Segment.attach(self._path, uuid=self._uuid, mode="device")
                self._writer.prefault()
            return self._writer

    @staticmethod
    def _mapped(segment: Segment | None) -> NDArray[np.uint8]:
        if segment is None:
            raise ChannelError("shm: the channel is closed")
        return segment.data


def _inside(blocks: Descriptors, data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Addresses of described blocks. Raises: ChannelError if one is not inside the segment."""
    sizes, room = blocks.sizes.astype(np.uint64), np.uint64(len(data))
    # In this order, since a sum may overflow.
    if (sizes > room).any() or (blocks.offsets > room - sizes).any():
        raise ChannelError("shm: the source described blocks outside its segment")
    return (blocks.offsets + np.uint64(data.ctypes.data)).astype(np.uint64)
