"""Files of an SSD store: the few calls that it needs, on a real folder.

`Files` and `File` are the interface; tests put layers with faults and with losses of unsynced writes behind it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvpool.core.errors import NoSsd
from kvpool.core.ssd.format import PAGE_BYTES

#: Errors of a file system that has no more room, for this user or at all.
FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: Name of a file that was set aside. What a process before has left is discarded: see `Files.set_aside`.
SPARE = "spare"

Buffers = Sequence[memoryview]


class File(Protocol):
    """An open file. Offsets, sizes and buffers are whole pages where `Files.direct`; every call may raise OSError."""

    def read(self, buffers: Buffers, offset: int) -> int:
        """Fills buffers from a place; returns bytes read, fewer at the end of the file."""
        ...

    def write(self, buffers: Buffers, offset: int) -> None:
        """Writes all buffers one behind the other from a place on."""
        ...

    def sync(self) -> None:
        """Returns when everything written, and the file's size, are durable."""
        ...

    def truncate(self, size_bytes: int) -> None: ...

    def size(self) -> int: ...

    def close(self) -> None: ...


class Files(Protocol):
    """One folder. `direct`: whether data bypasses the page cache."""

    direct: bool

    def names(self) -> list[str]: ...

    def create(self, name: str, size_bytes: int) -> File:
        """A new file, all of its space allocated, holding anything. A file of this name is replaced."""
        ...

    def open(self, name: str) -> File: ...

    def remove(self, name: str) -> None: ...

    def set_aside(self, name: str) -> None:
        """Removes a name. Its space may serve the next `create`, once `sync_names` has made that durable.

        Space that was written before is written faster: the file system has nothing left to note about it. Nobody may
        read the file any more. Only what this process has set aside is used again: whoever gives each file a higher
        number than all that he found or made before never finds in one what was written under its number.
        """
        ...

    def sync_names(self) -> None:
        """Returns when created and removed names are durable."""
        ...

    def close(self) -> None: ...


class DiskFile:
    """A file of the operating system, through O_DIRECT where the folder allows it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def descriptor(self) -> int:
        """The system's, for calls that are made without Python."""
        return self._fd

    def read(self, buffers: Buffers, offset: int) -> int:
        total = sum(len(buffer) for buffer in buffers)
        done = os.preadv(self._fd, buffers, offset)
        while 0 < done < total:
            # A partial read that is not the end: goes on behind what there is.
            more = os.preadv(self._fd, _behind(buffers, done), offset + done) if done % PAGE_BYTES == 0 else 0
            if more == 0:
                break
            done += more
        return done

    def write(self, buffers: Buffers, offset: int) -> None:
        total, done = sum(len(buffer) for buffer in buffers), 0
        while done < total:
            # After a partial write the rest is tried again: the answer then says what is wrong.
            done += os.pwritev(self._fd, _behind(buffers, done) if done else buffers, offset + done)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def truncate(self, size_bytes: int) -> None:
        os.ftruncate(self._fd, size_bytes)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Idempotent."""
        # Its number may be another file's afterwards.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _behind(buffers: Buffers, done: int) -> list[memoryview]:
    left = []
    for buffer in buffers:
        if done < len(buffer):
            left.append(buffer[done:])
        done = max(0, done - len(buffer))
    return left


class DiskFiles:
    """A folder of the operating system, owned by one process: its flock is held until `close`."""

    def __init__(self, folder: Path, *, direct: bool = True) -> None:
        """Makes the folder if it is not there. Where O_DIRECT is refused, reads and writes are buffered.

        Raises: NoSsd if the folder can't be used, or another process owns it.
        """
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise NoSsd(f"{folder} can't be used: {error.strerror}", hint="--ssd-dir must be writable") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._names = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            os.close(self._lock)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise NoSsd(
                    f"a live process owns {folder}", hint="is a node of this name running? choose another --id"
                ) from error
            raise NoSsd(f"{folder} can't be used: {error.strerror}") from error
        self.direct = direct and self._takes_direct()
        # Size of the spare: of one whose name is not durable yet, and of one that may be used; 0: there is none.
        self._set_aside_bytes = self._spare_bytes = 0
        self._discard_spare()

    def names(self) -> list[str]:
        return sorted(os.listdir(self._folder))  # noqa: PTH208 - names, not paths

    def create(self, name: str, size_bytes: int) -> DiskFile:
        path = self._folder / name
        if size_bytes == self._spare_bytes:
            self._spare_bytes = 0
            (self._folder / SPARE).rename(path)
            fd = os.open(path, self._flags())
        else:
            path.unlink(missing_ok=True)
            fd = os.open(path, self._flags() | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Also of a spare: one that was cut off once, and got a footer later, has a hole.
            os.posix_fallocate(fd, 0, size_bytes)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return DiskFile(fd)

    def open(self, name: str) -> DiskFile:
        return DiskFile(os.open(self._folder / name, self._flags()))

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        path = self._folder / name
        with contextlib.suppress(FileNotFoundError):
            size_bytes = path.stat().st_size
            self._spare_bytes = 0
            path.rename(self._folder / SPARE)
            self._set_aside_bytes = size_bytes

    def sync_names(self) -> None:
        set_aside_bytes = self._set_aside_bytes
        os.fsync(self._names)
        if set_aside_bytes:
            self._spare_bytes, self._set_aside_bytes = set_aside_bytes, 0

    def close(self) -> None:
        self._discard_spare()
        os.close(self._names)
        os.close(self._lock)

    def _discard_spare(self) -> None:
        self._set_aside_bytes = self._spare_bytes = 0
        with contextlib.suppress(OSError):
            (self._folder / SPARE).unlink(missing_ok=True)

    def _flags(self) -> int:
        return os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_DIRECT if self.direct else 0)

    def _takes_direct(self) -> bool:
        """Tries, since a file system may take the flag and refuse the write."""
        path = self._folder / "probe"
        page = mmap.mmap(-1, PAGE_BYTES)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT, 0o600)
        except OSError:
            path.unlink(missing_ok=True)
            return False
        try:
            return os.pwritev(fd, [page], 0) == PAGE_BYTES
        except OSError:
            return False
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)
