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

from kvpool.channels.base import Opener
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
from kvpool.core.ids import KEY_BYTES, KeyArray, NamespaceId
from kvpool.core.namespace import OBJECTS_GROUP, GroupSpec, NamespaceSpec
from kvpool.service import wire
from kvpool.service.client_session import Session, SessionKeeper
from kvpool.service.client_types import Bools, Counters, News, Waited
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
        tls: where the source speaks TLS: for its calls and for the tcp channel.
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
        self._keeper = SessionKeeper(
            address, client, credential, openers, self._register_again, timeout_s, self._links, tls
        )
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
        """Whether a session is open, so that a call need not wait for one."""
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

    # ------------------------------------------------------------ looking, waiting

    def lookup(
        self, namespace: NamespaceId, keys: Keys, *, group: int = 0, shard: int = 0, timeout_s: float | None = None
    ) -> Bools:
        """Which keys are readable; holds nothing. `timeout_s`: for this call, instead of the client's own."""
        request = pb.LookupRequest(namespace_id=namespace, keys=key_list(keys, group, shard))
        reply = self._call(lambda s, t: s.stub.Lookup(request, timeout=t), timeout_s=timeout_s)
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
        if keys is not None:
            check_keys(keys)
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
    ) -> News:
        """News of keys until each has ended in COMMITTED, ABANDONED or DEADLINE. The wait has begun on return.

        It ends early with `close` of what is returned, or when nobody has that any more.

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
        stream = self._call(call, session=session)
        return News(self._waited(session, stream), stream.cancel)

    def _waited(self, session: Session, stream: Any) -> Iterator[Waited]:
        try:
            for reply in stream:
                yield Waited(
                    wire.array(reply.indices, np.int64),
                    wire.array(reply.states, np.uint8),
                    wire.array(reply.sections, np.int64),
                )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED and not session.lost:
                raise Unavailable("this wait was ended") from error
            raise self._translated(session, error) from error

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

    def _session(self, timeout_s: float | None = None) -> Session:
        """The live session, waited for at most `timeout_s` and the client's own time. Raises: Unavailable."""
        return self._keeper.session(self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s))

    def _call(
        self,
        call: Callable[[Session, float], Reply],
        *,
        session: Session | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        """Runs one call in the live session, or in the one it belongs to, with its errors translated.

        Args:
            call: given the session and how long it may take.
            timeout_s: for waiting for a session and for the call together; None = the client's own time for each.
        """
        begin_s = time.monotonic()
        live = session or self._session(timeout_s)
        if live.lost:
            raise Unavailable(f"the session with {self.address} has ended")
        try:
            return call(live, self._timeout_s if timeout_s is None else left_s(begin_s + timeout_s))
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


def left_s(end_s: float) -> float:
    """What is left until `end_s`, monotonic seconds; once it is over, just enough to be told so."""
    return max(end_s - time.monotonic(), 0.001)


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
