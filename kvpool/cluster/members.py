"""The nodes of a cluster as a client knows them: learned from the directory, each with a connection of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from kvpool.channels.base import Memory
from kvpool.channels.links import Links
from kvpool.client import PoolClient
from kvpool.cluster.placement import Place
from kvpool.core.errors import DeadlineExceeded, KvpoolError, Unavailable
from kvpool.core.ids import NamespaceId
from kvpool.core.namespace import NamespaceSpec
from kvpool.service.client_reads import Outcome, Provider, ReadRequest
from kvpool.service.client_session import Session
from kvpool.service.client_types import RESERVED, Reservation
from kvpool.service.host import host_id
from kvpool.service.rpc import from_rpc_error, make_channel
from kvpool.service.scheduler_list import Rotation
from kvpool.v1 import common_pb2, directory_pb2, directory_pb2_grpc

log = logging.getLogger(__name__)

#: A node that failed is left alone for so long, doubled each time.
REST_S_MIN, REST_S_MAX = 0.5, 8.0
#: A node that the directory names no more is tried for so long still.
FORGET_S = 30.0
#: Predictions of how long a read takes are compared at this size.
REFERENCE_BYTES = 8 << 20


class GivenUp(Unavailable):
    """The call that this was for has ended."""


class Claim:
    """Whether work in other threads may still touch the memory of a caller who may have gone on.

    A thread touches it inside `touching` only. `give_up` lets none begin any more and waits for those that have: they
    end by the deadline that they were given.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._touching = 0
        self._given_up = False

    @property
    def given_up(self) -> bool:
        return self._given_up

    @contextmanager
    def touching(self) -> Iterator[None]:
        """Raises: GivenUp."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        with self._changed:
            if self._given_up:
                raise GivenUp("the call has ended")
            self._touching += 1

    def end(self) -> None:
        with self._changed:
            self._touching -= 1
            self._changed.notify_all()

    def give_up(self) -> None:
        with self._changed:
            self._given_up = True
            self._changed.wait_for(lambda: self._touching == 0)


@dataclass(frozen=True)
class ClaimedRequest(ReadRequest):
    """A read into memory that its caller may take back."""

    claim: Claim = field(default_factory=Claim)


class Member(PoolClient):
    """A node: its connection, and what the directory last said of it."""

    def __init__(self, place: Place, address: str, tier: int, **options: Any) -> None:
        super().__init__(address, **options)
        self.place, self.tier = place, tier
        self.local = place.host_id == host_id()
        self.draining_until_s = 0.0
        self.listed_s = time.monotonic()  # when the directory last named it
        self._rest_s, self._resting_until_s = REST_S_MIN, 0.0
        self._known: set[NamespaceId] = set()
        self._knowing = threading.Lock()

    @property
    def resting(self) -> bool:
        """Whether it failed a moment ago."""
        return time.monotonic() < self._resting_until_s

    def failed(self, error: KvpoolError) -> None:
        if not self.resting:
            log.warning(
                "%s at %s is left alone for %.1f s: %s", self.place.source_id, self.address, self._rest_s, error
            )
            self._resting_until_s = time.monotonic() + self._rest_s
            self._rest_s = min(2 * self._rest_s, REST_S_MAX)

    def worked(self) -> None:
        self._rest_s = REST_S_MIN

    def know(self, namespace: NamespaceId, spec: NamespaceSpec) -> None:
        """Registers a namespace here, unless that was done; the node knows it on return. Raises: Unavailable."""
        if namespace in self._known:
            return
        # One thread at a time: others need its answer, and would get it no sooner by asking themselves.
        if not self._knowing.acquire(timeout=self._timeout_s):
            raise Unavailable(f"{self.address} does not answer")
        try:
            if namespace not in self._known:
                self.register(spec)
                self._known.add(namespace)
        except KvpoolError:
            with self._lock:
                self._specs.pop(namespace, None)
            raise
        finally:
            self._knowing.release()

    def cost_us(self) -> int:
        """What reading something of moderate size should take, as measured; 0 where that is not known yet."""
        times = [
            link.latency_us + REFERENCE_BYTES * 1e6 / link.bandwidth_bytes_s
            for link in self._links.snapshot(self.place.source_id)
            if link.bandwidth_bytes_s and link.latency_us is not None
        ]
        return int(min(times, default=0.0))

    def read_claimed(self, request: ClaimedRequest, provide: Provider) -> Outcome:
        """Reads as `get` does, and touches the caller's memory under the request's claim alone."""
        return self._read(request, provide)

    def _read_shared(
        self, session: Session, request: ReadRequest, provide: Provider, outcome: Outcome, end_s: float
    ) -> Any:
        assert isinstance(request, ClaimedRequest)
        with request.claim.touching():
            return super()._read_shared(session, request, provide, outcome, end_s)

    def _read_leased(self, request: ReadRequest, provide: Provider, outcome: Outcome, rows: Any, end_s: float) -> None:
        assert isinstance(request, ClaimedRequest)
        claim, begun = request.claim, False

        def claimed(chosen: Any, sizes: Any) -> Any:
            # From here on bytes move; before, the source had not answered yet.
            nonlocal begun
            claim.begin()
            begun = True
            return provide(chosen, sizes)

        try:
            super()._read_leased(request, claimed, outcome, rows, end_s)
        finally:
            if begun:
                claim.end()

    def fill_claimed(self, reservation: Reservation, memory: Memory, rows: Any, left_s: float, claim: Claim) -> Any:
        """Writes and commits a reservation; reads the caller's memory under `claim` alone.

        Returns: indices of the keys that became readable.
        """
        indices = np.flatnonzero(reservation.status == RESERVED)
        if not len(indices):
            return indices
        try:
            with claim.touching():
                digests = self.write(reservation, indices, memory, rows[indices], deadline_s=left_s)
            self.commit(reservation, indices, digests)
        except BaseException:
            try:
                self.abort(reservation)
            except KvpoolError as error:
                log.debug("a reservation on %s was not given back: %s", self.address, error)
            raise
        return indices


class Members:
    """All nodes of a cluster. Asks the directory again every `refresh_s`, aside; goes on with what it knows meanwhile.

    Args:
        scheduler: address of one, or of several that know the same, with commas: when one is lost, the next is asked.
        timeout_s: of a look at the directory, all schedulers together.
        options: of each node's `PoolClient`.
    """

    def __init__(self, scheduler: str, *, credential: str, refresh_s: float, timeout_s: float, **options: Any) -> None:
        self._schedulers, self._refresh_s, self._timeout_s = Rotation(scheduler), refresh_s, timeout_s
        self._credential, self._tls = credential, options.get("tls")
        self._options = {**options, "credential": credential, "timeout_s": timeout_s, "links": Links()}
        self._channel = self._connect()
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._asked_s: float | None = None
        self._asking = False
        self._closed = False

    def current(self) -> list[Member]:
        """Nodes by id, those that have just failed left out. Waits for the directory the first time only.

        Raises: Unavailable if the directory never answered.
        """
        with self._lock:
            if self._closed:
                raise Unavailable("this client is closed")
            known = self._asked_s is not None
            due = not known or time.monotonic() - (self._asked_s or 0.0) > self._refresh_s
            background = known and due and not self._asking
            self._asking |= background
        if not known:
            self.refresh()
        elif background:
            threading.Thread(target=self._ask_again, name="cluster-nodes", daemon=True).start()
        with self._lock:
            return [member for member in self._members.values() if not member.resting]

    def all(self) -> list[Member]:
        with self._lock:
            return list(self._members.values())

    def refresh(self) -> None:
        """Asks the directory now. Raises: Unavailable, DeadlineExceeded: no scheduler answered."""
        for left in reversed(range(len(self._schedulers))):
            with self._lock:
                channel, address = self._channel, self._schedulers.address
            try:
                reply = self._list_sources(channel, address)
                break
            except (Unavailable, DeadlineExceeded):
                self._move_on(channel)
                if not left:
                    raise
        with self._lock:
            self._asked_s = time.monotonic()
            if not self._closed:
                self._learn(reply.sources)

    def _list_sources(self, channel: grpc.Channel, address: str) -> Any:
        stub: Any = directory_pb2_grpc.DirectoryStub(channel)  # type: ignore[no-untyped-call]
        try:
            return stub.ListSources(directory_pb2.ListSourcesRequest(), timeout=self._timeout_s / len(self._schedulers))
        except grpc.RpcError as error:
            raise from_rpc_error(error, address) from error
        except ValueError as error:  # how gRPC says that its channel was closed meanwhile
            raise Unavailable("this client is closed, or asks the next scheduler already") from error

    def _connect(self) -> grpc.Channel:
        """To one scheduler by its own name, which is what a certificate is checked against."""
        return make_channel(self._schedulers.address, credential=self._credential, tls=self._tls)

    def _move_on(self, failed: grpc.Channel) -> None:
        """To the next scheduler, unless another thread has done it."""
        with self._lock:
            if self._closed or self._channel is not failed or len(self._schedulers) == 1:
                return
            self._schedulers.next()
            self._channel = self._connect()
        failed.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            members, self._members = list(self._members.values()), {}
            channel = self._channel
        channel.close()
        for member in members:
            member.close()

    def _ask_again(self) -> None:
        try:
            self.refresh()
        except KvpoolError as error:
            log.warning("the directory: %s; nodes are as they were", error)
        finally:
            with self._lock:
                self._asking, self._asked_s = False, time.monotonic()

    def _learn(self, sources: Sequence[directory_pb2.SourceStatus]) -> None:
        known: dict[str, Member] = {}
        for status in sorted(sources, key=lambda s: s.source.source_id):
            source = status.source
            # An SSD is a source of its own, at the address of its node, which brings its blocks up by itself.
            if not source.address or source.tier == common_pb2.TIER_SSD:
                continue
            place = Place(source.source_id, source.host_id, source.bytes_total, status.bytes_used)
            member = self._members.get(source.source_id)
            if member is None or member.address != source.address:
                member = Member(place, source.address, source.tier, **self._options)
            member.place, member.listed_s = place, time.monotonic()
            known[source.source_id] = member
        # A directory that has just begun knows nobody yet: those who are known to be there are not forgotten for it.
        for name, member in self._members.items():
            if name not in known and time.monotonic() - member.listed_s < FORGET_S:
                known[name] = member
        known = dict(sorted(known.items()))
        gone = [member for name, member in self._members.items() if known.get(name) is not member]
        self._members = known
        for member in gone:
            # Closing waits for its threads.
            threading.Thread(target=member.close, name="member-close", daemon=True).start()
