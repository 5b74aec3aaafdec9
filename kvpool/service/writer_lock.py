"""Proof that a writer of shared memory is gone: a file whose flock the kernel drops with the writer's process.

Client side `WriterLock`, source side `WriterProof`. The source opens the file while the client is known to hold it, so
that later on neither its name nor its folder matters; `WriterTable` writes the names down in the segment, for a source
that takes the segment over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Protocol

from kvpool.core.errors import BadArgument

PREFIX = "kvpool-writer-"


class WriterLock:
    """Held by a client for one session, at least as long as it may be copying into the source's memory."""

    def __init__(self, folder: Path | None = None) -> None:
        name = f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex}.lock"
        self.path = (folder or lock_folder()) / name
        # Locked before it has its name: a file with such a name and no lock is one that a dead client left.
        unnamed = self.path.with_name(f".{name}")
        self._fd = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        unnamed.rename(self.path)
        self._lock = threading.Lock()
        self._users = 0
        self._retired = False

    def enter(self) -> bool:
        """Before a write. False: the lock is retired, nothing may be written any more."""
        with self._lock:
            if self._retired:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        """After a write."""
        with self._lock:
            self._users -= 1
            self._drop_if_unused()

    def retire(self) -> None:
        """No write begins any more; the lock goes when the last one under way has left."""
        with self._lock:
            if not self._retired:
                self._retired = True
                self._drop_if_unused()

    def _drop_if_unused(self) -> None:
        if self._retired and self._users == 0:
            self.path.unlink(missing_ok=True)
            # Not only closed: a forked child has the open file too, and with it the lock.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)


class WriterProof:
    """The source's handle on a client's lock file."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd

    @classmethod
    def open(cls, path: str) -> WriterProof | None:
        """None if the file is not a writer lock, can't be opened here, or is not held: then it could prove nothing."""
        name = Path(path)
        if not name.is_absolute() or not name.name.startswith(PREFIX):
            return None
        try:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, ValueError):  # ValueError: a NUL in the path
            return None
        held = False
        try:
            held = stat.S_ISREG(os.fstat(fd).st_mode) and not _take(fd)
        except OSError:  # a file system without locks, say
            pass
        finally:
            if not held:
                os.close(fd)
        return cls(name, fd) if held else None

    def gone(self) -> bool:
        """Whether the writer can't write any more, as far as can be told. Once true, the handle is used up."""
        if self._fd < 0:
            return True
        try:
            if not _take(self._fd):
                return False
        except OSError:  # asked again; it must not keep others from being asked
            return False
        # Only tidying up: the client chose the folder, and may have chosen one that is not ours to change.
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        self.close()
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Places(Protocol):
    """Where paths are written down so that they outlive this process; see `tiers.dram.Segment`."""

    def writers(self) -> dict[int, str]: ...

    def note_writer(self, place: int, path: str) -> None: ...


class WriterTable:
    """Who may be writing into a segment, as its next owner will find it."""

    def __init__(self, places: Places, places_max: int) -> None:
        self._places = places
        known = places.writers()
        self._free = [place for place in range(places_max)[::-1] if place not in known]
        # Writers of the process before; those that can't be proven gone now may be at work still.
        self._inherited = {place: path for place, path in known.items() if not self._is_gone(place, path)}

    def note(self, path: str) -> int | None:
        """Before a writer may begin. None: no place is left, or the path is too long; it may then not write."""
        if not self._free:
            return None
        place = self._free[-1]
        try:
            self._places.note_writer(place, path)
        except BadArgument:
            return None
        return self._free.pop()

    def strike(self, place: int) -> None:
        """Once the writer is proven gone."""
        self._places.note_writer(place, "")
        self._free.append(place)

    def all_inherited_gone(self) -> bool:
        """Whether no writer of the process before can be at work any more."""
        self._inherited = {place: path for place, path in self._inherited.items() if not self._is_gone(place, path)}
        return not self._inherited

    def _is_gone(self, place: int, path: str) -> bool:
        if writer_may_live(Path(path)):
            return False
        self.strike(place)
        return True


def writer_may_live(path: Path) -> bool:
    """Whether somebody holds this lock, or that can't be told: a writer is only taken for gone where that is proven."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        # Its owner removes it when it lets go. A folder that is not there proves nothing: it may be mounted elsewhere.
        return not path.parent.is_dir()
    except (OSError, ValueError):
        return True
    try:
        return not _take(fd)
    except OSError:
        return True
    finally:
        os.close(fd)


def remove_orphans(folder: Path | None = None) -> None:
    """Removes the locks of clients that died while no source looked after them."""
    for path in sorted((folder or lock_folder()).glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _take(fd):
                    path.unlink(missing_ok=True)
            finally:
                os.close(fd)


def lock_folder() -> Path:
    """A folder that processes which share memory also share."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _take(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
