"""The engine's cache as block memory: on the CPU without a copy, on CUDA through pinned staging on a stream of its own.

The CUDA path was never run: no GPU was at hand. It is written to the same contract that tests check on the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvpool.core.errors import DeadlineExceeded
from kvpool.tiers.hbm import BlockMemory, CopyEvent, Done, Staging

#: Pinned areas of a CUDA cache; a copy waits for a free one.
_STAGING_COUNT = 4
_STAGING_WAIT_S = 30.0
_STAGING_BYTES = 32 << 20
_POLL_S = 0.0002


class CpuBlocks:
    """A cache in host memory: its own rows are the staging rows, nothing is copied."""

    def __init__(self, cache: torch.Tensor) -> None:
        """Args: cache: (blocks + 1, ...), contiguous; the last block is scratch and not shown."""
        self.block_count = cache.shape[0] - 1
        # Bytes first: numpy has no bfloat16.
        self._rows: NDArray[np.uint8] = cache.view(torch.uint8).view(cache.shape[0], -1).numpy()
        self.block_bytes = self._rows.shape[1]
        self.batch_blocks_max = self.block_count

    def gather(self, blocks: NDArray[np.int64]) -> Staging:
        return Staging(self._rows, np.asarray(blocks, dtype=np.int64), Done())

    def receive(self, blocks: NDArray[np.int64]) -> Staging:
        return Staging(self._rows, np.asarray(blocks, dtype=np.int64), Done())

    def scatter(self, staging: Staging, blocks: NDArray[np.int64], indices: NDArray[np.int64]) -> CopyEvent:
        return Done()


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self, timeout_s: float) -> bool:
        # torch has no wait with a deadline.
        end = time.monotonic() + timeout_s
        while not self._event.query():
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_S)
        return True


class StagingAreas:
    """A bounded number of host areas. One that is given back is somebody else's only after the last copy from or to it:
    callers that close, or fail, do not wait for theirs."""

    def __init__(self, areas: Sequence[torch.Tensor]) -> None:
        self._free: list[tuple[torch.Tensor, CopyEvent]] = [(area, Done()) for area in areas]
        self._changed = threading.Condition()

    def take(self, timeout_s: float = _STAGING_WAIT_S) -> torch.Tensor:
        """An area that no copy touches any more. Raises: DeadlineExceeded."""
        end_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for place, (area, last) in enumerate(self._free):
                    if last.wait(0.0):
                        del self._free[place]
                        return area
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    raise DeadlineExceeded(
                        "no staging area became free", hint="is the device stuck? see its driver's log"
                    )
                # Copies end without a word, areas that are given back are announced.
                self._changed.wait(min(left_s, _POLL_S) if self._free else left_s)

    def give(self, area: torch.Tensor, last: CopyEvent) -> None:
        """Args: last: the end of the last copy that was begun with it."""
        with self._changed:
            self._free.append((area, last))
            self._changed.notify()


class CudaBlocks:
    """A cache on a CUDA device. Copies run beside computing, after what was launched before them."""

    def __init__(self, cache: torch.Tensor) -> None:
        """Args: cache: (blocks + 1, ...), contiguous; the last block is scratch and not shown."""
        self.block_count = cache.shape[0] - 1
        flat = cache.view(cache.shape[0], -1)
        self.block_bytes = flat.shape[1] * cache.element_size()
        self._flat, self._device = flat, cache.device
        self.batch_blocks_max = max(1, min(self.block_count, _STAGING_BYTES // self.block_bytes))
        self._stream = torch.cuda.Stream(device=cache.device)
        self._compute = torch.cuda.current_stream(cache.device)
        shape = (self.batch_blocks_max, flat.shape[1])
        areas = [torch.empty(shape, dtype=cache.dtype, pin_memory=True) for _ in range(_STAGING_COUNT)]
        self._by_address = {area.data_ptr(): area for area in areas}
        self._last: dict[int, CopyEvent] = {}  # of the areas in use, by address
        self._areas = StagingAreas(areas)

    def gather(self, blocks: NDArray[np.int64]) -> Staging:
        area = self._areas.take()
        try:
            self._stream.wait_stream(self._compute)
            with torch.cuda.stream(self._stream):
                index = torch.from_numpy(np.ascontiguousarray(blocks)).to(self._device)
                area[: len(blocks)].copy_(self._flat.index_select(0, index), non_blocking=True)
            event = self._record()
        except BaseException:
            # No memory on the device, mostly: without this, each time would cost an area.
            self._areas.give(area, self._record())
            raise
        return self._staging(area, len(blocks), event)

    def receive(self, blocks: NDArray[np.int64]) -> Staging:
        return self._staging(self._areas.take(), len(blocks), Done())

    def scatter(self, staging: Staging, blocks: NDArray[np.int64], indices: NDArray[np.int64]) -> CopyEvent:
        address = staging.data.ctypes.data
        area = self._by_address[address]
        self._stream.wait_stream(self._compute)
        with torch.cuda.stream(self._stream):
            rows = torch.from_numpy(np.ascontiguousarray(staging.rows[indices]))
            target = torch.from_numpy(np.ascontiguousarray(blocks[indices])).to(self._device)
            self._flat.index_copy_(0, target, area[rows].to(self._device))
        self._last[address] = event = self._record()
        return event

    def _record(self) -> _CudaEvent:
        event = torch.cuda.Event()
        event.record(self._stream)
        return _CudaEvent(event)

    def _staging(self, area: torch.Tensor, count: int, event: CopyEvent) -> Staging:
        address = area.data_ptr()
        self._last[address] = event
        data = area.view(torch.uint8).numpy()
        rows = np.arange(count, dtype=np.int64)
        return Staging(data, rows, event, lambda: self._areas.give(area, self._last.pop(address)))


def block_memory(cache: torch.Tensor) -> BlockMemory:
    """The block memory for the device that `cache` lies on."""
    return CudaBlocks(cache) if cache.device.type == "cuda" else CpuBlocks(cache)
