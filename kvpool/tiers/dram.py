"""DRAM tier: a segment of shared memory that holds the index arrays and the bytes of a node's blocks.

Opened as a plain file and mapped: `multiprocessing.shared_memory` is never used, since its tracker unlinks a segment
when one of its readers exits. The file's flock names the owner. A segment never changes its size.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import threading
import uuid as uuids
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import BadArgument, NoSpace, Unavailable

MAGIC = b"KVPOOLSG"
VERSION = 1
PAGE_BYTES = 4096
#: Data begins on a huge page, so that the same layout serves tmpfs and hugetlbfs.
DATA_ALIGNMENT_BYTES = 2 << 20
PREFAULT_CHUNK_BYTES = 16 << 20
_PREFIX, _SUFFIX = "kvpool-", ".segment"

# magic, version, header bytes, uuid, index offset, index bytes, data offset, data bytes
_HEADER = struct.Struct("<8sII16sQQQQ")

_MADV_POPULATE_READ = 22  # Linux 5.14
_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a segment lie, in bytes from its start."""

    index_offset: int
    index_bytes: int
    data_offset: int
    data_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.data_offset + self.data_bytes

    @classmethod
    def plan(cls, data_bytes: int, index_bytes: int) -> Layout:
        """Header page, index, data; index and data page-aligned."""
        return cls(PAGE_BYTES, index_bytes, _align(PAGE_BYTES + index_bytes, DATA_ALIGNMENT_BYTES), data_bytes)


class Segment:
    """A mapped segment. `index` and `data` are views of the mapping; neither may be used after `close`."""

    def __init__(self, path: Path, fd: int, layout: Layout, uuid: bytes, *, writable: bool, owner: bool) -> None:
        self.path, self.layout, self.uuid = path, layout, uuid
        self.writable, self._owner, self._fd = writable, owner, fd
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, layout.total_bytes, flags=mmap.MAP_SHARED, prot=protection)
        whole = np.frombuffer(self._map, dtype=np.uint8)
        self.index: NDArray[np.uint8] = whole[layout.index_offset : layout.index_offset + layout.index_bytes]
        self.data: NDArray[np.uint8] = whole[layout.data_offset : layout.total_bytes]
        self._stop = threading.Event()
        self._prefault: threading.Thread | None = None

    # ------------------------------------------------------------ make, open

    @classmethod
    def create(cls, folder: Path, name: str, *, data_bytes: int, index_bytes: int) -> Segment:
        """A new segment, all of its memory allocated, its flock held by this process until `close`.

        Files that earlier owners of that name left behind are removed; a live one is an error.

        Raises: NoSpace if the folder's file system can't hold it; BadArgument if the folder or the name is bad;
            Unavailable if a live process owns a segment of that name.
        """
        if not name or "/" in name or not folder.is_dir():
            raise BadArgument(
                f"no segment {name!r} can be made in {folder}", hint="--segment-dir must be a folder, e.g. /dev/shm"
            )
        _remove_orphans(folder, name)
        layout = Layout.plan(_align(data_bytes, PAGE_BYTES), index_bytes)
        uuid = uuids.uuid4().bytes
        path = folder / f"{_PREFIX}{name}-{uuid.hex()}{_SUFFIX}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _allocate(fd, folder, layout.total_bytes)
            segment = cls(path, fd, layout, uuid, writable=True, owner=True)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        header = _HEADER.pack(
            MAGIC, VERSION, _HEADER.size, uuid, layout.index_offset, layout.index_bytes, layout.data_offset,
            layout.data_bytes,
        )  # fmt: skip
        segment._map[: len(header)] = header
        return segment

    @classmethod
    def attach(cls, path: Path, *, uuid: bytes, mode: Literal["reader", "device"] = "reader") -> Segment:
        """Maps the segment of another process: read-only, or as a `device` that writes its reserved slots.

        Raises: Unavailable if it is not there, is another one, or its owner has ended.
        """
        writable = mode == "device"
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise Unavailable(f"segment {path} can't be opened: {error.strerror}") from error
        try:
            layout = _read_header(fd, path, uuid)
            if not _is_locked(fd):
                raise Unavailable(f"the owner of segment {path} has ended")
            return cls(path, fd, layout, uuid, writable=writable, owner=False)
        except BaseException:
            os.close(fd)
            raise

    # ------------------------------------------------------------ use

    def prefault(self) -> None:
        """Starts touching each page in the background, so that first copies need not wait for the kernel."""
        assert self._prefault is None
        address, size = self.data.ctypes.data, self.layout.data_bytes
        advice = _MADV_POPULATE_WRITE if self.writable else _MADV_POPULATE_READ

        def touch() -> None:
            for start in range(0, size, PREFAULT_CHUNK_BYTES):
                if self._stop.is_set():
                    return
                # An older kernel refuses the advice; pages then come with their first use.
                if _libc.madvise(address + start, min(PREFAULT_CHUNK_BYTES, size - start), advice) != 0:
                    return

        self._prefault = threading.Thread(target=touch, name="segment-prefault", daemon=True)
        self._prefault.start()

    def wait_prefaulted(self, timeout_s: float) -> bool:
        """Whether the background touching is over. For benchmarks."""
        if self._prefault is not None:
            self._prefault.join(timeout_s)
        return self._prefault is None or not self._prefault.is_alive()

    def close(self) -> None:
        """Ends this mapping; the owner also removes the file. Memory goes when the last process has unmapped it."""
        self._stop.set()
        if self._prefault is not None:
            self._prefault.join()
        if self._owner:
            self.path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.index = self.data = np.empty(0, np.uint8)
        # Views that others still hold keep the mapping alive: it goes with the last of them.
        with contextlib.suppress(BufferError):
            self._map.close()


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _allocate(fd: int, folder: Path, size: int) -> None:
    """All memory now: a tmpfs that is full later on would answer a write with SIGBUS."""
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    hint = "give --memory fewer bytes, or --segment-dir another folder"
    if size > free:
        raise NoSpace(f"{folder} has {free >> 20} MiB free, the segment needs {size >> 20} MiB", hint=hint)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise NoSpace(f"{folder} could not hold a segment of {size >> 20} MiB", hint=hint) from error
        raise NoSpace(f"{folder} can't hold a segment: {error.strerror}", hint=hint) from error


def _read_header(fd: int, path: Path, uuid: bytes) -> Layout:
    raw = os.pread(fd, _HEADER.size, 0)
    if len(raw) < _HEADER.size:
        raise Unavailable(f"{path} is no segment")
    magic, version, header_bytes, found, index_offset, index_bytes, data_offset, data_bytes = _HEADER.unpack(raw)
    if magic != MAGIC or version != VERSION or header_bytes != _HEADER.size:
        raise Unavailable(f"{path} is no segment of this version ({VERSION})")
    if found != uuid:
        raise Unavailable(f"{path} is the segment of another process")
    layout = Layout(index_offset, index_bytes, data_offset, data_bytes)
    if os.fstat(fd).st_size < layout.total_bytes:
        raise Unavailable(f"{path} is shorter than its header says")
    return layout


def _is_locked(fd: int) -> bool:
    """Whether another open file holds the flock; takes nothing that outlives the call."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _remove_orphans(folder: Path, name: str) -> None:
    for path in sorted(folder.glob(f"{_PREFIX}{name}-{'[0-9a-f]' * 32}{_SUFFIX}")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if _is_locked(fd):
                raise Unavailable(
                    f"a live process owns {path}", hint="is a node of this name running? choose another --id"
                )
            path.unlink(missing_ok=True)
        finally:
            os.close(fd)
