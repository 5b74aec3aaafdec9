"""The calls of a source, one method each: requests and replies translated, sessions found, errors typed.

Synchronous, for any thread. `kvpool.client.PoolClient` builds the whole operations on it.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError, Memory, Opener
from kvpool.channels.collective import CollectiveChannel
from kvpool.channels.collective import available as collective_available
from kvpool.channels.links import Links
from kvpool.channels.nixl import NixlChannel
from kvpool.channels.nixl import available as nixl_available
from kvpool.channels.shm import ShmChannel
from kvpool.channels.tcp import TcpChannel
from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import (
    BadArgument,
    KvpoolError,
    Unavailable,
    UnknownNamespace,
    UnknownSession,
    Unsupported,
)
from kvpool.core.ids import KEY_BYTES, Fidelity, KeyArray, NamespaceId, qualify
from kvpool.core.namespace import OBJECTS_GROUP, GroupSpec, NamespaceSpec
from kvpool.service import wire
from kvpool.service.client_session import Session, SessionKeeper
from kvpool.service.client_types import Bools, Counters, Hold, Reservation, Waited
from kvpool.service.rpc import from_rpc_error
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import common_pb2

log = logging.getLogger(__name__)

OPENERS: dict[str, Opener] = {
    "shm": ShmChannel.open,
    "tcp": TcpChannel.open,
    "nixl": NixlChannel.open,
    "collective": CollectiveChannel.open,
}
EXTRAS = {"nixl": "pip install 'kvpool[nixl]'", "collective": "it needs torch: pip install 'kvpool[torch]'"}
AVAILABLE = {"nixl": nixl_available, "collective": collective_available}
#: What a client uses if it is not told otherwise: what needs nothing installed besides.
DEFAULT_CHANNELS = ("shm", "tcp")

Reply = TypeVar("Reply")
Keys = KeyArray


class SourceCalls:
    """A connection to one source.

    Args:
        address: host:port of its BlockSource service.
        client: name for its logs.
        channels: kinds of data channel to use, of OPENERS; which of them carries what is decided by measuring them.
        tls: certificates for the tcp channel, where the source asks for TLS.
        timeout_s: deadline of each call that takes none of its own.
        links: what is measured of the ways to sources; share one among the clients of a process.
    """

    def __init__(
        self,
        address: str,
        *,
        client: str = "client",
        credential: str = "",
        channels: Sequence[str] = DEFAULT_CHANNELS,
        timeout_s: float = 5.0,
        links: Links | None = None,
        tls: TlsConfig | None = None,
    ) -> None:
        unknown = [kind for kind in channels if kind not in OPENERS]
        if unknown or not channels:
            raise BadArgument(f"unknown channels {unknown}", hint=f"known are {', '.join(OPENERS)}")
        self.address, self._timeout_s = address, timeout_s
        self._specs: dict[NamespaceId, NamespaceSpec] = {}
        missing = [kind for kind in channels if not AVAILABLE.get(kind, lambda: True)()]
        if missing:
            raise Unsupported(f"channel {missing[0]} is not installed here", hint=EXTRAS[missing[0]])
        openers = {kind: OPENERS[kind] for kind in channels}
        if tls is not None and "tcp" in openers:
            openers["tcp"] = functools.partial(TcpChannel.open, tls_config=tls)
        self._links = links or Links()
        self._keeper = SessionKeeper(address, client, credential, openers, self._register_again, timeout_s, self._links)
        self._lock = threading.Lock()
        self._counters = Counters()

    # ------------------------------------------------------------ the connection

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session, and with it all that it holds."""
        self._keeper.close()

    @property
    def connected(self) -> bool:
        return self._keeper.current is not None

    @property
    def source_id(self) -> str:
        """Raises: Unavailable."""
        return self._session().source_id

    @property
    def epoch(self) -> int:
        """Of the source's process. Raises: Unavailable."""
        return self._session().epoch

    @property
    def channel(self) -> str:
        """Kind of the data channel that was used last. Raises: Unavailable."""
        return self._session().channel.kind

    @property
    def counters(self) -> Counters:
        with self._lock:
            return Counters(**{**self._counters.__dict__, "sessions": self._keeper.sessions_opened})

    def info(self) -> pb.SourceInfo:
        return self._call(lambda s, t: s.stub.GetSourceInfo(pb.GetSourceInfoRequest(), timeout=t))

    def stats(self) -> pb.SourceStats:
        return self._call(lambda s, t: s.stub.GetSourceStats(pb.GetSourceStatsRequest(), timeout=t))

    def register(self, spec: NamespaceSpec) -> NamespaceId:
        """Makes a namespace known to the source, and again to a source that was restarted."""
        spec.validate()
        request = pb.RegisterNamespaceRequest(namespace=wire.namespace_to_proto(spec))
        namespace = spec.id()
        with self._lock:
            self._specs[namespace] = spec

        def call(session: Session, timeout_s: float) -> bytes:
            reply = session.stub.RegisterNamespace(request, timeout=timeout_s)
            session.numbers[namespace] = reply.number
            return bytes(reply.namespace_id)

        if self._call(call) != namespace:
            raise BadArgument("the source computes another id for this namespace", hint="run one release on both sides")
        return namespace

    # ------------------------------------------------------------ writing

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
        session = reservation.session
        # The lock tells the source that this process may still be writing, also when the session is lost meanwhile.
        if session.lost or (session.lock is not None and not session.lock.enter()):
            raise Unavailable("the session of this reservation has ended")
        try:
            slots = reservation.slots.take(np.asarray(indices, dtype=np.int64))
            with session.writes.during(reservation.id, reservation.expires_s):
                digests = session.channel.write(
                    reservation.id, slots, blocks, rows, deadline_s=deadline_s or self._timeout_s
                )
        except ChannelError:
            self._count(channel_errors=1)
            raise
        finally:
            if session.lock is not None:
                session.lock.leave()
        self._count(bytes_written=int(slots.sizes.sum(dtype=np.uint64)))
        return digests

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
        return self._call(lambda s, t: s.stub.Commit(request, timeout=t).blocks_complete, session=reservation.session)

    def abort(self, reservation: Reservation) -> int:
        """Gives a reservation back; says to the source that nothing writes into it any more."""
        request = pb.AbortRequest(session_id=reservation.session.id, reservation_id=reservation.id)
        return self._call(lambda s, t: s.stub.Abort(request, timeout=t).blocks_dropped, session=reservation.session)

    # ------------------------------------------------------------ looking, waiting

    def lookup(self, namespace: NamespaceId, keys: Keys, *, group: int = 0, shard: int = 0) -> Bools:
        """Which keys are readable; holds nothing."""
        request = pb.LookupRequest(namespace_id=namespace, keys=key_list(keys, group, shard))
        reply = self._call(lambda s, t: s.stub.Lookup(request, timeout=t))
        return np.fromiter(reply.found, dtype=np.bool_, count=len(keys))

    def remove(self, namespace: NamespaceId, keys: Keys, *, group: int = 0, shard: int = 0) -> int:
        """Drops blocks; those under lease when their last lease ends. Returns how many were there."""
        return self._remove(pb.RemoveRequest(namespace_id=namespace, keys=key_list(keys, group, shard)))

    def remove_all(self, namespace: NamespaceId) -> int:
        """Drops all of a namespace, as `remove` does."""
        return self._remove(pb.RemoveRequest(namespace_id=namespace, all=True))

    def _remove(self, request: pb.RemoveRequest) -> int:
        return self._call(lambda s, t: int(s.stub.Remove(request, timeout=t).blocks_removed))

    def pin(
        self, namespace: NamespaceId, keys: Keys, *, ttl_s: float = 0.0, group: int = 0, shard: int = 0, owner: str = ""
    ) -> tuple[int, Bools]:
        """Holds blocks against eviction, for `ttl_s` or until `unpin`. Returns the pin (or 0) and which it holds.

        The pin ends with this session, unless it names an `owner`.
        """

        def call(session: Session, timeout_s: float) -> tuple[int, Bools]:
            request = pb.PinRequest(
                session_id=session.id, namespace_id=namespace, keys=key_list(keys, group, shard),
                ttl_ms=ms(ttl_s) if ttl_s else 0, owner=owner,
            )  # fmt: skip
            reply = session.stub.Pin(request, timeout=timeout_s)
            return reply.pin_id, np.fromiter(reply.found, dtype=np.bool_, count=len(keys))

        return self._call(call)

    def unpin(self, pin: int = 0, *, owner: str = "") -> int:
        """Ends a pin of this session or of `owner`; without a number, all of the owner's. Returns how many ended."""

        def call(session: Session, timeout_s: float) -> int:
            request = pb.UnpinRequest(session_id=0 if owner else session.id, pin_id=pin, owner=owner)
            return int(session.stub.Unpin(request, timeout=timeout_s).pins_released)

        return self._call(call)

    def list_blocks(
        self, *, namespace: bytes = b"", name_prefix: str = "", keys: Keys | None = None, limit: int = 1000
    ) -> Iterator[pb.BlockInfo]:
        """What the source holds, page by page: all, of one namespace, or just these keys as they are stored."""
        cursor = 0
        while True:
            request = pb.ListBlocksRequest(
                cursor=cursor, limit=limit, namespace_id=namespace, name_prefix=name_prefix,
                keys=b"" if keys is None else keys.tobytes(),
            )  # fmt: skip
            reply = self._call(lambda s, t, r=request: s.stub.ListBlocks(r, timeout=t))
            yield from reply.blocks
            cursor = reply.next_cursor
            if cursor == 0:
                return

    def wait(
        self,
        namespace: NamespaceId,
        keys: Keys,
        *,
        deadline_s: float,
        absent_is_abandoned: bool = False,
        group: int = 0,
        shard: int = 0,
    ) -> Iterator[Waited]:
        """News of keys until each has ended in COMMITTED, ABANDONED or DEADLINE. The wait has begun on return.

        Raises: Unavailable, here or from the iterator, when the source is lost: treat what has not ended as abandoned.
        """

        def call(session: Session, _: float) -> Any:
            request = pb.AwaitRequest(
                session_id=session.id, namespace_id=namespace, keys=key_list(keys, group, shard),
                deadline_ms=ms(deadline_s), absent_is_abandoned=absent_is_abandoned,
            )  # fmt: skip
            # The source ends the wait by itself; the extra time is for its last answer.
            stream = session.stub.Await(request, timeout=deadline_s + self._timeout_s)
            # Comes as soon as the wait is known there, long before the first news.
            stream.initial_metadata()
            return stream

        session = self._session()
        return self._news(session, self._call(call, session=session))

    def _news(self, session: Session, stream: Any) -> Iterator[Waited]:
        try:
            for reply in stream:
                yield Waited(
                    wire.array(reply.indices, np.int64),
                    wire.array(reply.states, np.uint8),
                    wire.array(reply.sections, np.int64),
                )
        except grpc.RpcError as error:
            raise self._translated(session, error) from error
        finally:
            stream.cancel()

    # ------------------------------------------------------------ calls

    def _group(self, namespace: NamespaceId, group: int) -> GroupSpec:
        spec = self._specs.get(namespace)
        if spec is None:
            raise UnknownNamespace("this client does not know the namespace", hint="call register first")
        if spec.is_objects:
            return OBJECTS_GROUP
        if not 0 <= group < len(spec.groups):
            raise BadArgument(f"group {group} is not one of the namespace's {len(spec.groups)}")
        return spec.groups[group]

    def _session(self) -> Session:
        return self._keeper.session(self._timeout_s)

    def _call(self, call: Callable[[Session, float], Reply], *, session: Session | None = None) -> Reply:
        """Runs one call in the live session, or in the one it belongs to, with its errors translated."""
        live = session or self._session()
        if live.lost:
            raise Unavailable(f"the session with {self.address} has ended")
        try:
            return call(live, self._timeout_s)
        except grpc.RpcError as error:
            raise self._translated(live, error) from error
        except ValueError as error:  # how gRPC says that its channel was closed meanwhile
            if live.lost:
                raise Unavailable(f"the session with {self.address} has ended") from error
            raise

    def _translated(self, session: Session, rpc_error: grpc.RpcError) -> KvpoolError:
        """What a failed call of a session stands for; a session that is gone is Unavailable, however gRPC says it."""
        error = from_rpc_error(rpc_error, self.address)
        if isinstance(error, UnknownSession):
            self._keeper.forget(session)
        if session.lost or isinstance(error, UnknownSession):
            return Unavailable(f"{self.address} has ended the session", hint="the next call opens another")
        return error

    def _register_again(self, stub: Any) -> dict[NamespaceId, int]:
        """A new session may be with a restarted source, which may know no namespaces, or by other numbers."""
        numbers: dict[NamespaceId, int] = {}
        for namespace, spec in list(self._specs.items()):
            request = pb.RegisterNamespaceRequest(namespace=wire.namespace_to_proto(spec))
            numbers[namespace] = stub.RegisterNamespace(request, timeout=self._timeout_s).number
        return numbers

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._counters, name, getattr(self._counters, name) + amount)


def check_keys(keys: Keys) -> None:
    """Raises: BadArgument."""
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise BadArgument("keys must be uint8 (keys, 16)", hint="kvpool.core.hashing.block_keys makes them")


def key_list(keys: Keys, group: int, shard: int, parent: bytes = b"") -> common_pb2.KeyList:
    check_keys(keys)
    return common_pb2.KeyList(group=group, shard=shard, keys=keys.tobytes(), parent=parent)


def ms(seconds: float) -> int:
    """Milliseconds on the wire; nothing rounds to zero, which often means something else."""
    return max(1, round(seconds * 1000))
