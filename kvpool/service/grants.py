"""What the tcp data server may touch: a thread-safe image of the live leases and reservations of a source.

The core decides, in the event loop; this table tells its decisions to the data threads. A right ends here before it
ends in the core, never after: whoever takes slots away revokes first, waits until no thread is writing, then acts.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.tcp_server import Connection
from kvpool.channels.tcp_wire import TOKEN_BYTES
from kvpool.core.arrays import Descriptors


def now_us() -> int:
    """Monotonic microseconds: the time of every core of this process."""
    return time.monotonic_ns() // 1000


@dataclass
class _Right:
    """Descriptors that one lease or reservation covers, sorted by offset."""

    session: int
    expires_us: int
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    generations: NDArray[np.uint32]
    position: NDArray[np.int64]  # of the i-th key of the request in the sorted arrays; -1 = not covered
    sections: NDArray[np.uint8]  # committed, as bits
    section_count: int
    to_write: bool

    @classmethod
    def of(
        cls, session: int, expires_us: int, blocks: Descriptors, covered: NDArray[np.bool_], section_count: int,
        sections: NDArray[np.uint8], *, to_write: bool,
    ) -> _Right:  # fmt: skip
        indices = np.flatnonzero(covered)
        order = indices[np.argsort(blocks.offsets[indices], kind="stable")]
        position = np.full(len(covered), -1, dtype=np.int64)
        position[order] = np.arange(len(order))
        return cls(
            session, expires_us, blocks.offsets[order], blocks.sizes[order], blocks.generations[order],
            position, sections[order], section_count, to_write,
        )  # fmt: skip

    def ended(self, now_us: int) -> bool:
        return self.expires_us <= now_us or not len(self.offsets)

    def covers(
        self, offsets: NDArray[np.uint64], sizes: NDArray[np.uint64], generations: NDArray[np.uint32]
    ) -> NDArray[np.bool_]:
        """Which extents are just a block or one of its sections; read are those that are committed, written others."""
        at, whole, part, section = self._locate(offsets, sizes, generations)
        committed = self.sections[at]
        done: NDArray[np.bool_] = committed >> section & 1 == 1
        wanted = 0 if self.to_write else (1 << self.section_count) - 1
        covered: NDArray[np.bool_] = (whole & (committed == wanted)) | (part & (done != self.to_write))
        return covered

    def _locate(
        self, offsets: NDArray[np.uint64], sizes: NDArray[np.uint64], generations: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.uint8]]:
        """For each extent the block that it may be of, whether it is just that, or just one of its sections: which."""
        at = np.maximum(np.searchsorted(self.offsets, offsets, side="right") - 1, 0)
        known = (self.offsets[at] <= offsets) & (self.generations[at] == generations)
        skips, steps = offsets - self.offsets[at], self.sizes[at] // np.uint64(self.section_count)
        numbers = skips // np.maximum(steps, np.uint64(1))
        part = known & (sizes == steps) & (numbers * steps == skips) & (numbers < self.section_count)
        whole = known & (skips == 0) & (self.sizes[at] == sizes)
        return at, whole, part, np.where(part, numbers, 0).astype(np.uint8)


class Grants:
    """Implements the data server's `Gate`."""

    def __init__(self, clock: Callable[[], int] = now_us) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._sessions: dict[bytes, int] = {}
        self._tokens: dict[int, bytes] = {}
        self._reads: dict[int, _Right] = {}
        self._writes: dict[int, _Right] = {}
        self._writing: dict[int, list[Connection]] = {}
        self.bytes_read = 0
        self.bytes_written = 0

    # ------------------------------------------------------------ told by the loop

    def open_session(self, session: int) -> bytes:
        """The token with which connections of the session introduce themselves."""
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._sessions[token] = session
            self._tokens[session] = token
        return token

    def token(self, session: int) -> bytes | None:
        return self._tokens.get(session)

    def close_session(self, session: int) -> list[int]:
        """Ends all rights of a session. Returns the reservations whose writers are to be waited for."""
        with self._lock:
            token = self._tokens.pop(session, None)
            if token is not None:
                del self._sessions[token]
            for lease in [lease for lease, right in self._reads.items() if right.session == session]:
                del self._reads[lease]
            reservations = {r for r, right in self._writes.items() if right.session == session}
            # Also those whose right ended already: their last write may still be under way.
            reservations |= {r for r, users in self._writing.items() if any(c.session == session for c in users)}
            self._revoke(reservations)
            return sorted(reservations)

    def grant_read(
        self, session: int, lease: int, blocks: Descriptors, found: NDArray[np.bool_], expires_us: int,
        section_count: int = 1, sections: NDArray[np.uint8] | None = None,
    ) -> None:  # fmt: skip
        """Args: sections: uint8 (blocks), those that are committed, as bits; None = whole blocks only may be read."""
        if sections is None:
            section_count, sections = 1, np.ones(len(blocks), dtype=np.uint8)
        right = _Right.of(session, expires_us, blocks, found, section_count, sections, to_write=False)
        with self._lock:
            self._reads[lease] = right

    def revoke_read(self, session: int, leases: Iterable[int]) -> None:
        with self._lock:
            for lease in leases:
                right = self._reads.get(lease)
                if right is not None and right.session == session:
                    del self._reads[lease]

    def grant_write(
        self,
        session: int,
        reservation: int,
        slots: Descriptors,
        reserved: NDArray[np.bool_],
        section_count: int,
        expires_us: int,
    ) -> None:
        none = np.zeros(len(slots), dtype=np.uint8)
        right = _Right.of(session, expires_us, slots, reserved, section_count, none, to_write=True)
        with self._lock:
            self._writes[reservation] = right

    def committed(self, reservation: int, indices: Sequence[int], sections: Sequence[int]) -> None:
        """What is committed is not written again."""
        with self._lock:
            right = self._writes.get(reservation)
            if right is None:
                return
            whole = (1 << right.section_count) - 1
            for index, section in zip(indices, sections, strict=True):
                at = right.position[index]
                right.sections[at] |= np.uint8(1 << section)
            if (right.sections == whole).all():
                del self._writes[reservation]

    def revoke_write(self, session: int, reservation: int) -> None:
        """No write of the session into it begins any more, and those under way are interrupted; see `wait_idle`."""
        with self._lock:
            right = self._writes.get(reservation)
            if right is not None and right.session == session:
                del self._writes[reservation]
            for connection in self._writing.get(reservation, ()):
                if connection.session == session:
                    connection.interrupt()

    def wait_idle(self, reservations: Sequence[int], timeout_s: float) -> bool:
        """Whether no thread writes into these any more. Blocks: never call it in the loop."""
        with self._lock:
            return self._idle.wait_for(lambda: not any(r in self._writing for r in reservations), timeout_s)

    def busy(self, reservations: Sequence[int]) -> bool:
        """Whether a thread still writes into one of these."""
        with self._lock:
            return any(r in self._writing for r in reservations)

    def expire(self, now_us: int) -> None:
        """Forgets what has expired, and interrupts whoever still writes into it."""
        with self._lock:
            for lease in [n for n, right in self._reads.items() if right.expires_us <= now_us]:
                del self._reads[lease]
            self._revoke([n for n, right in self._writes.items() if right.expires_us <= now_us])

    def _revoke(self, reservations: Iterable[int]) -> None:
        for reservation in reservations:
            self._writes.pop(reservation, None)
            for connection in self._writing.get(reservation, ()):
                connection.interrupt()

    # ------------------------------------------------------------ asked by data threads

    def admit(self, token: bytes) -> int | None:
        return self._sessions.get(token)

    def readable(
        self,
        session: int,
        lease: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        generations: NDArray[np.uint32],
    ) -> NDArray[np.bool_]:
        with self._lock:
            right = self._reads.get(lease)
            if right is None or right.session != session or right.ended(self._clock()):
                return np.zeros(len(offsets), dtype=np.bool_)
            return right.covers(offsets, sizes, generations)

    def begin_write(
        self,
        session: int,
        reservation: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        generations: NDArray[np.uint32],
        connection: Connection,
    ) -> NDArray[np.bool_]:
        with self._lock:
            self._writing.setdefault(reservation, []).append(connection)
            right = self._writes.get(reservation)
            if right is None or right.session != session or right.ended(self._clock()):
                return np.zeros(len(offsets), dtype=np.bool_)
            return right.covers(offsets, sizes, generations)

    def end_write(self, reservation: int, connection: Connection) -> None:
        with self._lock:
            connections = self._writing[reservation]
            connections.remove(connection)
            if not connections:
                del self._writing[reservation]
            self._idle.notify_all()

    def count(self, *, bytes_read: int = 0, bytes_written: int = 0) -> None:
        with self._lock:
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written

    def check_invariants(self) -> None:
        with self._lock:
            assert {v: k for k, v in self._sessions.items()} == self._tokens
            for right in [*self._reads.values(), *self._writes.values()]:
                assert right.session in self._tokens, "a right of a closed session"
                assert np.all(right.offsets[:-1] <= right.offsets[1:]), "descriptors out of order"
            assert all(self._writing.values())
