"""The shm channel: copies between the caller's memory and the segment that a source of this host shares.

No RPC a block and none a batch: whoever holds the lease or the reservation copies by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import Bytes2D, Capabilities, ChannelError, Rows, check_memory, row_numbers
from kvpool.channels.sections import block_keys, copy_in, copy_out
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument
from kvpool.tiers.dram import Segment


class ShmChannel:
    """Maps a source's segment: read-only for reads, and a second time, writable, once it is written to."""

    kind = "shm"
    capabilities = Capabilities(same_host=True, through_source=False, threads_useful=2)

    def __init__(self, path: Path, uuid: bytes, *, writable: bool) -> None:
        self._path, self._uuid, self._may_write = path, uuid, writable
        self._reader: Segment | None = Segment.attach(path, uuid=uuid)
        self._reader.prefault()
        self._writer: Segment | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, parameters: Mapping[str, str]) -> ShmChannel:
        """Opens what a source offered. Raises: Unavailable, BadArgument."""
        try:
            path, uuid = Path(parameters["path"]), bytes.fromhex(parameters["uuid"])
        except (KeyError, ValueError) as error:
            raise BadArgument(f"an shm offer without {error}") from error
        return cls(path, uuid, writable=parameters.get("writable") == "1")

    def read(
        self,
        lease: int,
        blocks: Descriptors,
        out: Bytes2D,
        rows: Rows | None = None,
        *,
        deadline_s: float,
        verify: bool = True,
    ) -> NDArray[np.bool_]:
        check_memory(out, blocks.sizes)
        rows = row_numbers(rows, len(blocks.keys), len(out))
        data = self._mapped(self._reader)
        end_s = time.monotonic() + deadline_s
        good = np.zeros(len(rows), dtype=np.bool_)
        starts, sizes = _inside(blocks, len(data))
        for i, (key, row) in enumerate(zip(block_keys(blocks), rows.tolist(), strict=True)):
            if time.monotonic() > end_s:
                raise ChannelError(f"shm: {i} of {len(rows)} blocks copied by the deadline")
            source = data[starts[i] : starts[i] + sizes[i]]
            target = out[row, : sizes[i]]
            if verify:
                good[i] = copy_out(source, target, key, blocks.digests[i])
            else:
                np.copyto(target, source)
                good[i] = True
        return good

    def write(
        self, reservation: int, slots: Descriptors, data: Bytes2D, rows: Rows | None = None, *, deadline_s: float
    ) -> NDArray[np.uint64]:
        check_memory(data, slots.sizes)
        rows = row_numbers(rows, len(slots.keys), len(data))
        segment = self._mapped(self._writable())
        end_s = time.monotonic() + deadline_s
        digests = np.zeros(slots.digests.shape, dtype=np.uint64)
        starts, sizes = _inside(slots, len(segment))
        for i, (key, row) in enumerate(zip(block_keys(slots), rows.tolist(), strict=True)):
            if time.monotonic() > end_s:
                raise ChannelError(f"shm: {i} of {len(rows)} blocks written by the deadline")
            copy_in(data[row, : sizes[i]], segment[starts[i] : starts[i] + sizes[i]], key, digests[i])
        return digests

    def close(self) -> None:
        with self._lock:
            segments, self._reader, self._writer = (self._reader, self._writer), None, None
            self._may_write = False
        for segment in segments:
            if segment is not None:
                segment.close()

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


def _inside(blocks: Descriptors, data_bytes: int) -> tuple[list[int], list[int]]:
    """Starts and sizes, checked against the segment. Raises: ChannelError."""
    starts, sizes = blocks.offsets.tolist(), blocks.sizes.tolist()
    if any(start + size > data_bytes for start, size in zip(starts, sizes, strict=True)):
        raise ChannelError("shm: the source described blocks outside its segment")
    return starts, sizes
