"""Memory that callers name by address: what they registered, and what is lent to them. Nothing here touches the pool.

Whatever lies outside registered memory is refused before a byte moves: a wrong address must be a return code, and not
the end of the process.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from engines.mooncake.codes import Code

U64 = NDArray[np.uint64]
Bytes = NDArray[np.uint8]

#: How long `unregister` waits for calls that use memory; none of them takes longer.
UNREGISTER_S = 35.0


class BufferHandle(bytearray):
    """An object's bytes, as `get_buffer` gives them: a buffer of its own, for as long as somebody has it."""

    def ptr(self) -> int:
        """Address of the first byte; valid as long as this object."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self))

    def size(self) -> int:
        return len(self)


@dataclass(frozen=True, slots=True)
class _Runs:
    """Disjoint runs of memory in the order of their addresses; uint64 (runs)."""

    begins: U64
    sizes: U64
    views: tuple[Bytes, ...]

    def which(self, pointers: U64, sizes: U64) -> NDArray[np.int64]:
        """The run that each piece lies in wholly, or -1."""
        if not len(self.begins):
            return np.full(len(pointers), -1, dtype=np.int64)
        index = np.searchsorted(self.begins, pointers, side="right").astype(np.int64) - 1
        run = np.maximum(index, 0)
        offsets = pointers - self.begins[run]
        room = self.sizes[run]
        # In this order, since a sum may overflow.
        inside = (index >= 0) & (sizes <= room) & (offsets <= room - np.minimum(sizes, room))
        return np.where(inside, index, -1)

    def with_one(self, pointer: int, size_bytes: int, view: Bytes) -> _Runs | None:
        """These and one more; None if that overlaps another."""
        place = int(np.searchsorted(self.begins, np.uint64(pointer), side="right"))
        if place and int(self.begins[place - 1]) + int(self.sizes[place - 1]) > pointer:
            return None
        if place < len(self.begins) and int(self.begins[place]) < pointer + size_bytes:
            return None
        return _Runs(
            np.insert(self.begins, place, np.uint64(pointer)),
            np.insert(self.sizes, place, np.uint64(size_bytes)),
            (*self.views[:place], view, *self.views[place:]),
        )

    def without(self, pointer: int) -> tuple[_Runs, Bytes] | None:
        """These but the one that begins there, and that one; None if there is none."""
        place = int(np.searchsorted(self.begins, np.uint64(max(pointer, 0))))
        if place == len(self.begins) or int(self.begins[place]) != pointer:
            return None
        others = (*self.views[:place], *self.views[place + 1 :])
        return _Runs(np.delete(self.begins, place), np.delete(self.sizes, place), others), self.views[place]


class RegisteredMemory:
    """Memory that the caller has registered. For any thread; a look takes no lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = _Runs(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64), ())
        self._ended = threading.Condition()
        self._calls: set[int] = set()
        self._calls_begun = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around a call that looks up memory here and touches it: `unregister` waits for it."""
        with self._ended:
            self._calls_begun += 1
            call = self._calls_begun
            self._calls.add(call)
        try:
            yield
        finally:
            with self._ended:
                self._calls.discard(call)
                self._ended.notify_all()

    def register(self, pointer: int, size_bytes: int) -> int:
        """Overlaps, nothing, and what this process can't read (a GPU's memory) are INVALID_PARAMS."""
        if pointer <= 0 or size_bytes <= 0 or pointer + size_bytes >= 1 << 64:
            return Code.INVALID_PARAMS
        access = host_access(pointer, pointer + size_bytes, Path("/proc/self/maps").read_text())
        if "r" not in access:
            return Code.INVALID_PARAMS
        view = memory_at(pointer, size_bytes, writable="w" in access)
        with self._lock:
            more = self._runs.with_one(pointer, size_bytes, view)
            if more is None:
                return Code.INVALID_PARAMS
            self._runs = more
        return Code.OK

    def unregister(self, pointer: int, timeout_s: float = UNREGISTER_S) -> int:
        """OK once no call touches it any more; RPC_TIMEOUT, and registered as before, if one still does by then.

        Others may register and unregister meanwhile. What they register in its place stays instead of it.
        """
        with self._lock:
            fewer = self._runs.without(pointer)
            if fewer is None:
                return Code.INVALID_PARAMS
            self._runs, view = fewer
        with self._ended:
            before = self._calls_begun
            if self._ended.wait_for(lambda: all(call > before for call in self._calls), timeout_s):
                return Code.OK
        with self._lock:
            self._runs = self._runs.with_one(pointer, len(view), view) or self._runs
        return Code.RPC_TIMEOUT

    def contains(self, pointers: U64, sizes: U64, *, to_write: bool = False) -> NDArray[np.bool_]:
        """Which pieces lie in registered memory wholly; with `to_write`, in memory that may be written."""
        runs = self._runs
        which = runs.which(pointers, sizes)
        inside: NDArray[np.bool_] = which >= 0
        if to_write and not all(view.flags.writeable for view in runs.views):
            writable = np.array([view.flags.writeable for view in runs.views], dtype=np.bool_)
            inside &= writable[np.maximum(which, 0)]
        return inside

    def views(self, pointers: U64, sizes: U64, *, to_write: bool = False) -> list[Bytes | None]:
        """Each piece as uint8 (size), or None where it is not in registered memory."""
        runs = self._runs
        found: list[Bytes | None] = []
        places = runs.which(pointers, sizes).tolist()
        for place, pointer, size in zip(places, pointers.tolist(), sizes.tolist(), strict=True):
            view = runs.views[place] if place >= 0 else None
            if view is None or (to_write and not view.flags.writeable):
                found.append(None)
                continue
            offset = pointer - int(runs.begins[place])
            found.append(view[offset : offset + size])
        return found


class _At:
    """What numpy asks an object for that is memory at an address."""

    def __init__(self, pointer: int, size_bytes: int, writable: bool) -> None:
        self.__array_interface__: dict[str, Any] = {
            "data": (pointer, not writable), "shape": (size_bytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def memory_at(pointer: int, size_bytes: int, *, writable: bool = True) -> Bytes:
    """Memory at an address as uint8 (size_bytes). Whoever asks makes sure that it stays there."""
    return np.asarray(_At(pointer, size_bytes, writable))


def host_access(begin: int, end: int, maps: str) -> str:
    """What this process may do in all of [begin, end): of "rw", by the text of /proc/self/maps; "" where not mapped.

    A GPU's memory has addresses of its own, which are not mapped here or may not be read.
    """
    access, reached = "rw", begin
    for line in maps.splitlines():
        addresses, permissions, *_ = line.split(maxsplit=2)
        first, last = (int(text, 16) for text in addresses.split("-"))
        if last <= reached:
            continue
        if first > reached:
            return ""
        access = "".join(letter for letter in access if letter in permissions)
        reached = last
        if reached >= end or not access:
            return access
    return ""


class HostMemory:
    """Page-aligned memory lent by address, as `MooncakeHostMemAllocator` does.

    It stays until it is freed, whatever becomes of this object: whoever uses the address keeps no reference.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _lent: ClassVar[dict[int, mmap.mmap]] = {}

    def alloc(self, size_bytes: int) -> int:
        """Address of so many zeroed bytes; 0 if there are none."""
        try:
            memory = mmap.mmap(-1, size_bytes)
        except (OSError, ValueError, OverflowError):
            return 0
        with_huge_pages(memory)
        pointer = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with self._lock:
            self._lent[pointer] = memory
        return pointer

    def free(self, pointer: int) -> int:
        """0, or -1 for an address that was not lent. Nothing may use the memory any more."""
        with self._lock:
            memory = self._lent.pop(pointer, None)
        if memory is None:
            return -1
        memory.close()
        return 0


def with_huge_pages(memory: mmap.mmap) -> None:
    """First touch of small pages costs more than the copy into them."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            return


def addresses(values: Sequence[int] | NDArray[np.generic]) -> U64:
    """Addresses or sizes as uint64 (n). Raises: TypeError for what are no such numbers, as Mooncake's binding does."""
    if isinstance(values, str | bytes):
        raise TypeError("expected a sequence of addresses or sizes")
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        try:
            array = np.array([value.__index__() for value in values], dtype=np.uint64)
        except (AttributeError, OverflowError, ValueError) as error:
            raise TypeError("addresses and sizes are integers that are not negative") from error
    if array.dtype.kind == "i" and len(array) and int(array.min()) < 0:
        raise TypeError("addresses and sizes are not negative")
    return array.astype(np.uint64)
