"""DRAM tier: a segment of shared memory that holds the index arrays and the bytes of a node's blocks.

Opened as a plain file and mapped: `multiprocessing.shared_memory` is never used, since its tracker unlinks a segment
when one of its readers exits. The file's flock names the owner. A segment never changes its size. When its owner ends
without removing it, the next owner of the same name takes it over with all that is in it.

Parts: header, catalog (what the index's numbers stand for), writers (the lock files of those who may be writing),
index, touch marks (the one part that readers may write), data.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import struct
import threading
import time
import uuid as uuids
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import BadArgument, NoSpace, Overloaded, Unavailable

log = logging.getLogger(__name__)

MAGIC = b"KVPOOLSG"
VERSION = 2
PAGE_BYTES = 4096
#: Data begins on a huge page, so that the same layout serves tmpfs and hugetlbfs.
DATA_ALIGNMENT_BYTES = 2 << 20
PREFAULT_CHUNK_BYTES = 16 << 20
CATALOG_BYTES = 1 << 20
WRITERS_MAX, WRITER_BYTES = 1024, 256
LOCK_ATTEMPTS, LOCK_REST_S = 3, 0.02
_PREFIX, _SUFFIX = "kvpool-", ".segment"

# magic, version, header bytes, uuid, index bytes, touch bytes, data bytes
_HEADER = struct.Struct("<8sII16sQQQ")

# bytes, crc32
_CATALOG_HEAD = struct.Struct("<QI")
_CATALOG_TEXT_MAX = CATALOG_BYTES // 2 - _CATALOG_HEAD.size

_MADV_POPULATE_READ = 22  # Linux 5.14
_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class Layout:
    """How many bytes the parts have whose size is not fixed, and where all of them begin."""

    index_bytes: int
    touch_bytes: int
    data_bytes: int

    @property
    def catalog_offset(self) -> int:
        return PAGE_BYTES

    @property
    def writers_offset(self) -> int:
        return self.catalog_offset + CATALOG_BYTES

    @property
    def index_offset(self) -> int:
        return self.writers_offset + WRITERS_MAX * WRITER_BYTES

    @property
    def touch_offset(self) -> int:
        return _align(self.index_offset + self.index_bytes, PAGE_BYTES)

    @property
    def data_offset(self) -> int:
        return _align(self.touch_offset + self.touch_bytes, DATA_ALIGNMENT_BYTES)

    @property
    def total_bytes(self) -> int:
        return self.data_offset + self.data_bytes


class Segment:
    """A mapped segment. Its arrays are views of the mapping; none may be used after `close`.

    index, touches, data: uint8; a reader may write `touches` alone. `adopted`: taken over from an owner that has ended.
    """

    def __init__(
        self, path: Path, fd: int, layout: Layout, uuid: bytes, *, writable: bool, owner: bool, adopted: bool = False
    ) -> None:
        self.path, self.layout, self.uuid = path, layout, uuid
        self.writable, self.adopted, self._owner, self._fd = writable, adopted, owner, fd
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, layout.total_bytes, flags=mmap.MAP_SHARED, prot=protection)
        self._touch_map = self._map if writable else _map_touches(path, layout)
        whole = np.frombuffer(self._map, dtype=np.uint8)
        self.index: NDArray[np.uint8] = whole[layout.index_offset : layout.index_offset + layout.index_bytes]
        self.data: NDArray[np.uint8] = whole[layout.data_offset : layout.total_bytes]
        touches = whole[layout.touch_offset :] if writable else np.frombuffer(self._touch_map, dtype=np.uint8)
        self.touches: NDArray[np.uint8] = touches[: layout.touch_bytes]
        self._stop = threading.Event()
        self._prefault: threading.Thread | None = None

    # ------------------------------------------------------------ make, open

    @classmethod
    def create(
        cls, folder: Path, name: str, *, data_bytes: int, index_bytes: int, touch_bytes: int = 0, adopt: bool = False
    ) -> Segment:
        """A segment, all of its memory allocated, its flock held by this process until `close`.

        With `adopt`, one of that name and layout whose owner has ended is taken over; see `adopted`. Other files that
        earlier owners of the name left behind are removed; a live owner is an error.

        Raises: NoSpace if the folder's file system can't hold it; BadArgument if the folder or the name is bad;
            Unavailable if a live process owns a segment of that name.
        """
        if not name or "/" in name or not folder.is_dir():
            raise BadArgument(
                f"no segment {name!r} can be made in {folder}", hint="--segment-dir must be a folder, e.g. /dev/shm"
            )
        layout = Layout(index_bytes, touch_bytes, _align(data_bytes, PAGE_BYTES))
        orphan = _take_orphans(folder, name, layout if adopt else None)
        if orphan is not None:
            path, fd, uuid = orphan
            return cls(path, fd, layout, uuid, writable=True, owner=True, adopted=True)
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
            MAGIC, VERSION, _HEADER.size, uuid, layout.index_bytes, layout.touch_bytes, layout.data_bytes
        )
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
            layout, found = _read_header(fd, path)
            if found != uuid:
                raise Unavailable(f"{path} is the segment of another process")
            if not _is_locked(fd):
                raise Unavailable(f"the owner of segment {path} has ended")
            return cls(path, fd, layout, uuid, writable=writable, owner=False)
        except BaseException:
            os.close(fd)
            raise

    # ------------------------------------------------------------ what the owner writes down for the next one

    def read_catalog(self) -> bytes:
        """The catalog as it was last written; empty if never."""
        for at in self._catalog_places():
            size, check = _CATALOG_HEAD.unpack_from(self._map, at)
            if 0 < size <= _CATALOG_TEXT_MAX:
                text = bytes(self._map[at + _CATALOG_HEAD.size : at + _CATALOG_HEAD.size + size])
                if zlib.crc32(text) == check:
                    return text
        return b""

    def write_catalog(self, text: bytes) -> None:
        """Replaces the catalog; whenever this process ends, either the old or the new one is found.

        Raises: Overloaded if it is too long.
        """
        if len(text) > _CATALOG_TEXT_MAX:
            raise Overloaded("the segment's catalog is full", hint="fewer namespaces, tenants or quotas fit one node")
        copy = _CATALOG_HEAD.pack(len(text), zlib.crc32(text)) + text
        # One after the other: a process that ends while it writes one leaves the other.
        for at in reversed(self._catalog_places()):
            self._map[at : at + len(copy)] = copy

    def _catalog_places(self) -> tuple[int, int]:
        """Where the two copies of the catalog lie; the first one is read if it is whole."""
        return self.layout.catalog_offset, self.layout.catalog_offset + CATALOG_BYTES // 2

    def writers(self) -> dict[int, str]:
        """Lock files of those who could write this memory, by place."""
        found: dict[int, str] = {}
        for place in range(WRITERS_MAX):
            at = self.layout.writers_offset + place * WRITER_BYTES
            raw = bytes(self._map[at : at + WRITER_BYTES]).rstrip(b"\0")
            if raw:
                found[place] = raw.decode(errors="replace")
        return found

    def note_writer(self, place: int, path: str) -> None:
        """Writes down (or, with an empty path, strikes out) a lock file. Raises: BadArgument if it is too long."""
        raw = path.encode()
        if len(raw) >= WRITER_BYTES:
            raise BadArgument(f"a writer lock's path may have {WRITER_BYTES - 1} bytes")
        at = self.layout.writers_offset + place * WRITER_BYTES
        self._map[at : at + WRITER_BYTES] = raw.ljust(WRITER_BYTES, b"\0")

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

    def close(self, *, keep: bool = False) -> None:
        """Ends this mapping; the owner also removes the file, unless it is to `keep` it for its successor.

        Memory goes when the file is gone and the last process has unmapped it.
        """
        self._stop.set()
        if self._prefault is not None:
            self._prefault.join()
        if self._owner and not keep:
            self.path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.index = self.data = self.touches = np.empty(0, np.uint8)
        # Views that others still hold keep the mapping alive: it goes with the last of them.
        for mapping in (self._map, self._touch_map):
            with contextlib.suppress(BufferError):
                mapping.close()


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


def _read_header(fd: int, path: Path) -> tuple[Layout, bytes]:
    raw = os.pread(fd, _HEADER.size, 0)
    if len(raw) < _HEADER.size:
        raise Unavailable(f"{path} is no segment")
    magic, version, header_bytes, uuid, index_bytes, touch_bytes, data_bytes = _HEADER.unpack(raw)
    if magic != MAGIC or version != VERSION or header_bytes != _HEADER.size:
        raise Unavailable(
            f"{path} is no segment of this version ({VERSION})", hint="run one kvpool version on a host, or remove it"
        )
    layout = Layout(index_bytes, touch_bytes, data_bytes)
    if os.fstat(fd).st_size < layout.total_bytes:
        raise Unavailable(f"{path} is shorter than its header says")
    return layout, uuid


def _map_touches(path: Path, layout: Layout) -> mmap.mmap:
    """Touch marks, writable, while everything else stays out of a reader's reach."""
    size = max(layout.touch_bytes, 1)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        # A reader that may not write at all: its reads then do not count as use.
        return mmap.mmap(-1, size)
    try:
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, offset=layout.touch_offset)
    finally:
        os.close(fd)


def _is_locked(fd: int) -> bool:
    """Whether another open file holds the flock; takes nothing that outlives the call."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _take_orphans(folder: Path, name: str, wanted: Layout | None) -> tuple[Path, int, bytes] | None:
    """Locks and returns the youngest segment of that name and layout that has no owner; removes the others."""
    taken: tuple[Path, int, bytes] | None = None
    paths = folder.glob(f"{_PREFIX}{name}-{'[0-9a-f]' * 32}{_SUFFIX}")
    for path in sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        if not _lock(fd):
            os.close(fd)
            if taken is not None:
                os.close(taken[1])
            raise Unavailable(f"a live process owns {path}", hint="is a node of this name running? choose another --id")
        uuid = _adoptable(fd, path, wanted) if taken is None else None
        if uuid is not None:
            taken = (path, fd, uuid)
        else:
            path.unlink(missing_ok=True)
            os.close(fd)
    return taken


def _lock(fd: int) -> bool:
    """Takes the flock, unless a live process has it. Readers that look for an owner have it for a moment only."""
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < LOCK_ATTEMPTS:
                time.sleep(LOCK_REST_S)
    return False


def _adoptable(fd: int, path: Path, wanted: Layout | None) -> bytes | None:
    """The uuid of a segment that has just the layout that is wanted."""
    if wanted is None:
        return None
    try:
        layout, uuid = _read_header(fd, path)
    except Unavailable as error:
        log.warning("not taken over: %s", error)
        return None
    if layout != wanted or not path.name.endswith(f"-{uuid.hex()}{_SUFFIX}"):
        log.warning("%s is not taken over: it was made for another size; this node starts empty", path)
        return None
    return uuid
