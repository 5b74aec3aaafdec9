"""How a client reads: from the source's own index where it is on this host, else under a lease over a channel.

On the same host a read takes no call: the index says where a block lies, it is copied, and then believed only if its
entry has not changed and its digests fit. What the index can't settle (a lower tier, an entry on the move, bytes that
do not fit) is asked of the source.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError, Memory, Rows
from kvpool.core.errors import BadArgument
from kvpool.core.ids import Fidelity, NamespaceId, qualify
from kvpool.service import wire
from kvpool.service.client_lookups import LookingCalls
from kvpool.service.client_session import Session
from kvpool.service.client_types import Bools
from kvpool.service.source_calls import Keys, check_keys, key_list, left_s, ms
from kvpool.v1 import block_source_pb2 as pb

log = logging.getLogger(__name__)

#: Releases that no reply has come to yet; beyond it a read waits for its own.
RELEASES_MAX = 64
#: Of the time that a read has left, what a lower tier may take: the rest is for its answer and for moving the bytes.
PROMOTE_SHARE = 0.8

#: Gives the memory for some keys of a request, once their sizes are known: (indices of keys, sizes) -> memory, and its
#: row for each of them (None: in order).
Provider = Callable[[NDArray[np.int64], NDArray[np.uint64]], tuple[Memory, Rows | None]]


@dataclass(frozen=True)
class ReadRequest:
    """What is wanted. `names` are those of objects; `handoff` is the request whose hold on the blocks is to end."""

    namespace: NamespaceId
    keys: Keys
    group: int = 0
    shard: int = 0
    names: Sequence[str] = ()
    handoff: str = ""
    ttl_s: float = 30.0
    promote_s: float = 5.0
    verify: bool = True
    fidelity_min: Fidelity = Fidelity.EXACT


class Outcome:
    """What became of each key, filled in as it is known."""

    def __init__(self, count: int) -> None:
        self.found: Bools = np.zeros(count, dtype=np.bool_)
        self.corrupt: Bools = np.zeros(count, dtype=np.bool_)
        self.sizes: NDArray[np.uint64] = np.zeros(count, dtype=np.uint64)
        self.fidelities: NDArray[np.uint8] = np.zeros(count, dtype=np.uint8)
        self.shared: Bools = np.zeros(count, dtype=np.bool_)  # read without a call
        self.kind = "shm"
        self.bytes = 0  # of what was found, once all is known

    def count(self) -> dict[str, int]:
        """What is counted of a read, once all is known."""
        found = int(np.count_nonzero(self.found))
        self.bytes = int((self.sizes if found == len(self.found) else self.sizes[self.found]).sum())
        return {
            "bytes_read": self.bytes, "digest_errors": int(np.count_nonzero(self.corrupt)), "hits": found,
            "misses": len(self.found) - found, "hits_shared": int(np.count_nonzero(self.shared)),
        }  # fmt: skip


class ReadingCalls(LookingCalls):
    """The reading half of `PoolClient`."""

    _releases: threading.BoundedSemaphore

    def _read(self, request: ReadRequest, provide: Provider) -> Outcome:
        """Reads what is there. Raises: Unavailable, ChannelError: nothing more was read."""
        end_s = time.monotonic() + request.ttl_s
        check_keys(request.keys)
        outcome = Outcome(len(request.keys))
        session = self._session(request.ttl_s)
        left = self._read_shared(session, request, provide, outcome, end_s)
        if len(left):
            self._read_leased(request, provide, outcome, left, end_s)
        if request.handoff and (outcome.shared.any() or not len(left)):
            # A lease ends the hold on its own blocks; these were read without one.
            held = np.flatnonzero(outcome.shared) if len(left) else np.arange(len(request.keys))
            self._free_handoff(session, request, held, end_s)
        counts = outcome.count()
        self._count(**counts)
        if counts["digest_errors"]:
            log.error("%d blocks from %s failed their digest", counts["digest_errors"], self.address)
        return outcome

    # ------------------------------------------------------------ without a call

    def _read_shared(
        self, session: Session, request: ReadRequest, provide: Provider, outcome: Outcome, end_s: float
    ) -> NDArray[np.int64]:
        """Reads what the shared index shows. Returns the rows that only the source can settle."""
        everything = np.arange(len(request.keys))
        number = session.numbers.get(request.namespace)
        if session.shared is None or number is None or request.fidelity_min is not Fidelity.EXACT:
            return everything
        keys = qualify(request.keys, request.group, request.shard)
        names = [name.encode() for name in request.names] if request.names else None
        found = session.shared.find(number, keys, names)
        rows = np.flatnonzero(found.hit)
        if len(rows):
            hits = found if len(rows) == len(found) else found.take(rows)
            memory, places = provide(rows, hits.sizes)
            begin_s = time.monotonic()
            good = session.shared.read(hits, memory, places, verify=request.verify, deadline_s=left_s(end_s))
            self._measured(session, int(hits.sizes.sum()), time.monotonic() - begin_s)
            taken = rows[good]
            outcome.found[taken] = outcome.shared[taken] = True
            outcome.sizes[taken] = hits.sizes[good]
            outcome.fidelities[taken] = int(Fidelity.EXACT)
        settled = outcome.found if session.shared.has_lower_tier else outcome.found | found.definite_miss
        return np.flatnonzero(~settled)

    def _measured(self, session: Session, size_bytes: int, seconds: float) -> None:
        """Reads that no channel took part in are news of the link all the same."""
        with self._links.now() as (meter, now_us):
            meter.transferred(session.source_id, "shm", size_bytes, round(seconds * 1e6), 1, now_us)

    def _free_handoff(self, session: Session, request: ReadRequest, rows: NDArray[np.int64], end_s: float) -> None:
        """Ends the hand-off hold on blocks that were read without a lease; should it be lost, the hold expires."""
        release = pb.ReleaseRequest(
            session_id=session.id, namespace_id=request.namespace, handoff_request_id=request.handoff,
            handed_off=key_list(request.keys[rows], request.group, request.shard),
        )  # fmt: skip
        self._send_release(session, release, wait=False, end_s=end_s)

    # ------------------------------------------------------------ under a lease

    def _read_leased(
        self, request: ReadRequest, provide: Provider, outcome: Outcome, rows: NDArray[np.int64], end_s: float
    ) -> None:
        keys = request.keys[rows]

        def lease(session: Session, time_s: float) -> tuple[Session, pb.LeaseReply]:
            timeout_s, promote_s = lease_times(time_s, self._timeout_s, request.promote_s)
            wanted = pb.LeaseRequest(
                session_id=session.id, namespace_id=request.namespace,
                keys=key_list(keys, request.group, request.shard), ttl_ms=ms(request.ttl_s),
                handoff_request_id=request.handoff, names=[request.names[row] for row in rows] if request.names else [],
                promote_ms=ms(promote_s) if promote_s else 0, fidelity_min=int(request.fidelity_min),
            )  # fmt: skip
            return session, session.stub.Lease(wanted, timeout=timeout_s)

        session, reply = self._call(lease, timeout_s=left_s(end_s))
        leased: Bools = np.fromiter(reply.found, dtype=np.bool_, count=len(keys))
        if not reply.lease_id:
            return
        mine = rows[leased]
        corrupt = np.zeros(len(mine), dtype=np.bool_)
        try:
            section_count = self._group(request.namespace, request.group).section_count
            stored = qualify(keys, request.group, request.shard)
            blocks = wire.descriptors_from_proto(reply.blocks, stored, section_count).take(leased)
            memory, places = provide(mine, blocks.sizes)
            good = session.channel.read(
                reply.lease_id, blocks, memory, places, deadline_s=left_s(end_s), verify=request.verify
            )
            in_time = time.monotonic() < end_s
            # Unchecked bytes are as good as the lease that covered them; a lease that ended proves nothing bad.
            if not request.verify and not in_time:
                good[:] = False
            corrupt = ~good & in_time
            outcome.found[mine], outcome.corrupt[mine] = good, corrupt
            outcome.sizes[mine] = blocks.sizes
            outcome.fidelities[mine] = np.fromiter(reply.fidelity, dtype=np.uint8, count=len(keys))[leased]
            outcome.kind = session.channel.kind
        except ChannelError:
            self._count(channel_errors=1)
            raise
        finally:
            release = pb.ReleaseRequest(session_id=session.id, lease_ids=[reply.lease_id])
            if corrupt.any():
                release.namespace_id = request.namespace
                release.corrupt.CopyFrom(key_list(request.keys[mine[corrupt]], request.group, request.shard))
            self._send_release(session, release, wait=bool(corrupt.any()), end_s=end_s)

    def _send_release(self, session: Session, release: pb.ReleaseRequest, *, wait: bool, end_s: float) -> None:
        """Gives holds back, as a rule without waiting for the answer: should it be lost, they expire.

        Args: wait: for the answer, until `end_s` (monotonic seconds); the call goes on afterwards.
        """
        time_s = min(self._timeout_s, left_s(end_s))
        # ValueError: the session's channel was closed meanwhile.
        with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError, ValueError):
            if not self._releases.acquire(blocking=False):
                session.stub.Release(release, timeout=time_s)
                return
            try:
                future = session.stub.Release.future(release, timeout=self._timeout_s)
            except BaseException:
                self._releases.release()
                raise
            future.add_done_callback(lambda _: self._releases.release())
            if wait:
                future.result(timeout=time_s)


def lease_times(time_s: float, timeout_s: float, promote_s: float) -> tuple[float, float]:
    """How long the call that asks for a lease may take, and how long of this the source may bring blocks up; seconds.

    Args:
        time_s: what is left of the caller's time.
        timeout_s: for a call that brings nothing up.
        promote_s: what the caller allows for bringing up; 0 = not at all.
    """
    promoting_s = min(promote_s, PROMOTE_SHARE * time_s)
    return min(timeout_s + promoting_s, time_s), promoting_s


def rows_of(out: Memory, rows: Rows | None, count: int) -> Provider:
    """A provider over memory that the caller laid out: `rows[i]`, or i, is the row of key i."""
    own = np.arange(count, dtype=np.int64) if rows is None else as_rows(rows, count)
    return lambda chosen, _: (out, own[chosen])


def as_rows(rows: Rows, count: int) -> Rows:
    """Row numbers as numpy has them. Raises: BadArgument unless there is one a key."""
    try:
        numbers = np.asarray(rows, dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise BadArgument(f"rows must be whole numbers: {error}") from error
    if numbers.shape != (count,):
        raise BadArgument(f"{numbers.size} row numbers do not name a row for each of {count} blocks")
    return numbers
