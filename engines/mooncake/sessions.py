"""Objects that a caller writes or reads range by range, between a start and an end. Pure: bytes come and go as arrays.

An object that is being put lies in memory of the caller's process until its session ends; one that is being read is
read and checked as a whole when its session starts. So a range is never of an object that is not complete, nor of two.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engines.mooncake.codes import Code
from engines.mooncake.configuration import DEFAULT_CONFIG, ReplicateConfig
from engines.mooncake.memory import Bytes

#: Bytes of all sessions of a store together; beyond it, a start is told NO_AVAILABLE_HANDLE.
SESSION_BYTES_MAX = 1 << 30
#: A session that nobody has used for so long may be dropped for another.
SESSION_IDLE_S = 600.0


@dataclass(slots=True)
class Session:
    """One object: its bytes, which of them have been written, and how it is to be kept."""

    data: Bytes
    used_s: float
    config: ReplicateConfig = DEFAULT_CONFIG
    written: list[tuple[int, int]] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every byte has been written."""
        reached = 0
        for begin, end in sorted(self.written):
            if begin > reached:
                return False
            reached = max(reached, end)
        return reached >= len(self.data)

    def within(self, offsets: Iterable[int], sizes: Iterable[int]) -> bool:
        return all(offset + size <= len(self.data) for offset, size in zip(offsets, sizes, strict=True))


class Sessions:
    """Sessions of one kind, by key. For any thread."""

    def __init__(self, bytes_max: int = SESSION_BYTES_MAX, idle_s: float = SESSION_IDLE_S) -> None:
        self._bytes_max, self._idle_s = bytes_max, idle_s
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._bytes = 0

    def open(self, name: str, size_bytes: int, now_s: float, data: Bytes | None = None) -> Session | int:
        """A new session with room for so many bytes, or with `data`, which others may read from now on.

        Of a name that has one already: that one ends, unfinished.
        """
        with self._lock:
            self._drop(name)
            if self._bytes + size_bytes > self._bytes_max:
                for idle in [n for n, s in self._sessions.items() if now_s - s.used_s > self._idle_s]:
                    self._drop(idle)
            if self._bytes + size_bytes > self._bytes_max:
                return Code.NO_AVAILABLE_HANDLE
            session = Session(np.empty(size_bytes, dtype=np.uint8) if data is None else data, now_s)
            self._sessions[name] = session
            self._bytes += size_bytes
            return session

    def room(self, names: Sequence[str], now_s: float) -> int:
        """Bytes that sessions of these names may have, if nobody else opens any meanwhile."""
        with self._lock:
            replaced = set(names)
            kept = sum(
                len(session.data)
                for name, session in self._sessions.items()
                if name not in replaced and now_s - session.used_s <= self._idle_s
            )
            return self._bytes_max - kept

    def find(self, name: str, now_s: float) -> Session | None:
        with self._lock:
            session = self._sessions.get(name)
            if session is not None:
                session.used_s = now_s
            return session

    def close(self, name: str) -> Session | None:
        """Ends a session; what it held, or None where there was none."""
        with self._lock:
            return self._drop(name)

    def clear(self) -> None:
        with self._lock:
            self._sessions.clear()
            self._bytes = 0

    def check_invariants(self) -> None:
        with self._lock:
            assert self._bytes == sum(len(session.data) for session in self._sessions.values())
            assert self._bytes <= self._bytes_max

    def _drop(self, name: str) -> Session | None:
        session = self._sessions.pop(name, None)
        if session is not None:
            self._bytes -= len(session.data)
        return session
