"""Writing to a source, call by call: reserve, write, commit, or abort."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError, Memory, Rows
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import KvpoolError, ReservationExpired, Unavailable, UnknownReservation
from kvpool.core.ids import Fidelity, NamespaceId, qualify
from kvpool.service import wire
from kvpool.service.client_session import Session
from kvpool.service.client_types import RESERVED, Hold, Reservation
from kvpool.service.source_calls import Keys, SourceCalls, key_list, ms
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import common_pb2

#: What is written in one piece: which keys of a reservation, their memory, and the row of each in it (None = row i).
Lot = tuple[NDArray[np.int64], Memory, NDArray[np.int64] | None]


class WritingCalls(SourceCalls):
    """What writers call."""

    def reserve(
        self,
        namespace: NamespaceId,
        keys: Keys,
        *,
        group: int = 0,
        shard: int = 0,
        ttl_s: float = 30.0,
        hold: Hold | None = None,
        parent: bytes = b"",
        tenant: str = "",
        sizes: NDArray[np.uint64] | None = None,
        names: Sequence[str] = (),
        fidelity: Fidelity = Fidelity.EXACT,
    ) -> Reservation:
        """Slots for keys that are neither there nor being written.

        Args:
            parent: key of the block before the first of `keys`, where there is one.
            tenant: whose quota the blocks count against.
            sizes: uint64 (keys,), bytes of each; None = the group's blocks.
            names: of objects, one a key.
        Raises: NoSpace or QuotaExceeded if not one slot could be had; Draining.
        """
        section_count = self._group(namespace, group).section_count
        wire_hold = common_pb2.HandoffHold(request_id=hold.request_id, ttl_ms=ms(hold.ttl_s)) if hold else None

        def call(session: Session, timeout_s: float) -> Reservation:
            request = pb.ReserveRequest(
                session_id=session.id, namespace_id=namespace, keys=key_list(keys, group, shard, parent),
                ttl_ms=ms(ttl_s), hold=wire_hold, tenant=tenant, names=names, fidelity=int(fidelity),
                sizes=[] if sizes is None else sizes.tolist(),
            )  # fmt: skip
            # Before the source hears of it, so that it is over here when it is over there.
            expires_s = time.monotonic() + request.ttl_ms / 1000
            reply = session.stub.Reserve(request, timeout=timeout_s)
            slots = wire.descriptors_from_proto(reply.slots, qualify(keys, group, shard), section_count)
            return Reservation(reply.reservation_id, wire.array(reply.status, np.uint8), slots, session, expires_s)

        return self._call(call)

    def write(
        self,
        reservation: Reservation,
        indices: NDArray[np.int64],
        blocks: Memory,
        rows: NDArray[np.int64] | None = None,
        *,
        deadline_s: float | None = None,
    ) -> NDArray[np.uint64]:
        """Moves bytes into reserved slots; nothing is readable before `commit`.

        Args:
            indices: which keys of the reservation.
            rows: row of `blocks` for each of `indices`; None = row i.
        Returns: digests uint64 (len(indices), sections) for `commit`.
        Raises: ChannelError, Unavailable; ReservationExpired if its time is over already.
        """
        slots = reservation.slots.take(np.asarray(indices, dtype=np.int64))
        return self._write(reservation, slots, blocks, rows, deadline_s)

    def _write(
        self, reservation: Reservation, slots: Descriptors, memory: Memory, rows: Rows | None, deadline_s: float | None
    ) -> NDArray[np.uint64]:
        session = reservation.session
        # The lock tells the source that this process may still be writing, also when the session is lost meanwhile.
        if session.lost or (session.lock is not None and not session.lock.enter()):
            raise Unavailable("the session of this reservation has ended")
        try:
            with session.writes.during(reservation.id, reservation.expires_s):
                digests = session.channel.write(
                    reservation.id, slots, memory, rows, deadline_s=deadline_s or self._timeout_s
                )
        except ChannelError:
            self._count(channel_errors=1)
            raise
        finally:
            if session.lock is not None:
                session.lock.leave()
        self._count(bytes_written=int(slots.sizes.sum(dtype=np.uint64)))
        return digests

    def fill(
        self, reservation: Reservation, lots: Iterable[Lot], *, deadline_s: float | None = None
    ) -> NDArray[np.int64]:
        """Writes lot after lot and commits them together; what is reserved and in no lot is given back.

        Args:
            lots: each is taken when the one before is written, so that all may use the same memory.
            deadline_s: for each lot.
        Returns: which keys of the reservation were written, and are readable; int64.
        Raises: as `write` and `commit`, and what `lots` raises; all is given back then.
        """
        written, digests = [np.empty(0, dtype=np.int64)], []
        try:
            for indices, blocks, rows in lots:
                digests.append(self.write(reservation, indices, blocks, rows, deadline_s=deadline_s))
                written.append(indices)
            if digests:
                self.commit(reservation, np.concatenate(written), np.concatenate(digests))
        except BaseException:
            with contextlib.suppress(KvpoolError):
                self.abort(reservation)
            raise
        done = np.concatenate(written)
        if len(done) < np.count_nonzero(reservation.status == RESERVED):
            with contextlib.suppress(KvpoolError):
                self.abort(reservation)
        return done

    def commit(self, reservation: Reservation, indices: NDArray[np.int64], digests: NDArray[np.uint64]) -> int:
        """Commits whole blocks; digests as `write` returned them. Returns how many became readable."""
        count, sections = digests.shape
        return self.commit_sections(
            reservation, np.repeat(indices, sections), np.tile(np.arange(sections), count), digests.ravel()
        )

    def commit_sections(
        self,
        reservation: Reservation,
        indices: NDArray[np.int64],
        sections: NDArray[np.int64],
        digests: NDArray[np.uint64],
    ) -> int:
        """Commits single sections; all arrays have one element a section."""
        request = pb.CommitRequest(
            session_id=reservation.session.id, reservation_id=reservation.id, indices=indices.tolist(),
            sections=sections.tolist(), digests=digests.tolist(),
        )  # fmt: skip
        try:
            return self._call(
                lambda s, t: s.stub.Commit(request, timeout=t).blocks_complete, session=reservation.session
            )
        except UnknownReservation as error:
            if not _is_over(reservation):
                raise
            raise ReservationExpired(f"reservation {reservation.id} has expired", hint="reserve again") from error

    def abort(self, reservation: Reservation) -> int:
        """Gives a reservation back; says to the source that nothing writes into it any more."""
        request = pb.AbortRequest(session_id=reservation.session.id, reservation_id=reservation.id)
        try:
            return self._call(lambda s, t: s.stub.Abort(request, timeout=t).blocks_dropped, session=reservation.session)
        except UnknownReservation:
            # Expired, and freed since a ping has told that nothing writes into it.
            if not _is_over(reservation):
                raise
            return 0


def _is_over(reservation: Reservation) -> bool:
    return time.monotonic() >= reservation.expires_s
