"""The library face of a whole cluster: blocks and objects on any node, in as many copies as wanted.

Losing nodes costs misses, never an error and never more time than was given; a partial result is a result. Errors are
left for what no node can help: bad arguments, a bad credential, a directory that was never reached.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvpool.channels.base import Memory
from kvpool.channels.tls import TlsConfig
from kvpool.client import Buffer, as_bytes
from kvpool.cluster.members import Claim, ClaimedRequest, GivenUp, Member, Members
from kvpool.cluster.spreading import Found, Holders, Stored, make_runs
from kvpool.cluster.together import Together
from kvpool.core.errors import BadArgument, NoSpace, UnknownNamespace
from kvpool.core.hashing import object_keys
from kvpool.core.ids import KeyArray, NamespaceId, Tier
from kvpool.core.namespace import NamespaceSpec
from kvpool.service.client_objects import ObjectMemory
from kvpool.service.client_reads import Provider, as_rows, rows_of
from kvpool.service.client_types import BEING_WRITTEN, EXISTS, Bools, Reservation
from kvpool.service.cluster_types import (
    ClusterGetResult,
    ClusterObjectsResult,
    ClusterPutResult,
    ClusterRemoveResult,
)
from kvpool.service.source_calls import DEFAULT_CHANNELS, check_keys
from kvpool.v1 import block_source_pb2 as pb

__all__ = [
    "ClusterClient", "ClusterGetResult", "ClusterObjectsResult", "ClusterPutResult", "ClusterRemoveResult",
]  # fmt: skip

#: Consecutive blocks of a call that stay together, so that a prefix is read in a few pieces.
RUN_BLOCKS = 32
#: Asking a node what it has takes no longer: one that is stuck counts as having nothing, and is left alone for a while.
LOOKUP_S_MAX = 2.0


class ClusterClient:
    """All nodes of a cluster. For any thread.

    Args:
        scheduler: address of the process that serves the directory.
        client: name for the logs of the nodes.
        channels: kinds of data channel to use.
        timeout_s: deadline of calls that take none of their own.
        refresh_s: how old what is known of the nodes may be.
        tls: where scheduler and nodes speak TLS.
    """

    def __init__(
        self,
        scheduler: str,
        *,
        client: str = "client",
        credential: str = "",
        channels: Sequence[str] = DEFAULT_CHANNELS,
        timeout_s: float = 5.0,
        refresh_s: float = 2.0,
        tls: TlsConfig | None = None,
    ) -> None:
        self.scheduler, self._timeout_s = scheduler, timeout_s
        self._members = Members(
            scheduler, credential=credential, refresh_s=refresh_s, timeout_s=timeout_s, client=client,
            channels=channels, tls=tls,
        )  # fmt: skip
        self._specs: dict[NamespaceId, NamespaceSpec] = {}
        self._calls = Together()
        self._seed = xxhash.xxh3_64_intdigest(f"{client} {os.getpid()}".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the sessions with all nodes."""
        self._members.close()
        self._calls.close()

    def nodes(self) -> list[str]:
        """Ids of the nodes that answer, as far as is known. Raises: Unavailable if the directory never answered."""
        return [member.place.source_id for member in self._members.current()]

    def refresh(self) -> None:
        """Asks the directory now which nodes there are. Raises: as `nodes`."""
        self._members.refresh()

    def register(self, spec: NamespaceSpec) -> NamespaceId:
        """Makes a namespace known to this client, and to each node when it is first used there. No call is made."""
        spec.validate()
        namespace = spec.id()
        self._specs[namespace] = spec
        return namespace

    def register_objects(self, domain: str) -> NamespaceId:
        """The namespace of objects of a domain."""
        return self.register(NamespaceSpec.objects(domain))

    # ------------------------------------------------------------ writing

    def put(
        self,
        namespace: NamespaceId,
        keys: KeyArray,
        blocks: Memory,
        *,
        replicas: int = 1,
        rows: NDArray[np.int64] | None = None,
        group: int = 0,
        shard: int = 0,
        parent: bytes = b"",
        tenant: str = "",
        ttl_s: float = 30.0,
    ) -> ClusterPutResult:
        """Stores blocks on `replicas` nodes each, on distinct hosts as far as there are any.

        Nodes are chosen by the key and by how much memory they have free. One that fails or is full is passed over.

        Args: blocks, rows, parent, tenant: as `PoolClient.put`. ttl_s: time within which the call ends.
        """
        check_keys(keys)
        own = np.arange(len(keys), dtype=np.int64) if rows is None else as_rows(rows, len(keys))

        def reserve(member: Member, chosen: NDArray[np.int64], left_s: float) -> Reservation:
            first = int(chosen[0])
            before = keys[first - 1].tobytes() if first else parent
            return member.reserve(
                namespace, keys[chosen], group=group, shard=shard, ttl_s=left_s, parent=before, tenant=tenant
            )

        return self._put(namespace, keys, RUN_BLOCKS, blocks, own, replicas, ttl_s, reserve)

    def put_objects(
        self,
        namespace: NamespaceId,
        names: Sequence[str],
        values: Sequence[Buffer],
        *,
        replicas: int = 1,
        tenant: str = "",
        ttl_s: float = 30.0,
    ) -> ClusterPutResult:
        """Stores objects of any size under string names, as `put` does. A name that exists is left alone."""
        if len(names) != len(values):
            raise BadArgument(f"{len(names)} names do not name {len(values)} objects")
        arrays = [as_bytes(name, value) for name, value in zip(names, values, strict=True)]
        sizes = np.fromiter((len(array) for array in arrays), dtype=np.uint64, count=len(arrays))
        keys = object_keys(namespace, names)

        def reserve(member: Member, chosen: NDArray[np.int64], left_s: float) -> Reservation:
            mine = [names[row] for row in chosen.tolist()]
            return member.reserve(namespace, keys[chosen], ttl_s=left_s, tenant=tenant, sizes=sizes[chosen], names=mine)

        return self._put(namespace, keys, 1, arrays, np.arange(len(names)), replicas, ttl_s, reserve)

    def _put(
        self, namespace: NamespaceId, keys: KeyArray, run_blocks: int, memory: Memory, own: NDArray[np.int64],
        replicas: int, ttl_s: float, reserve: Callable[[Member, NDArray[np.int64], float], Reservation],
    ) -> ClusterPutResult:  # fmt: skip
        begin_s, spec, claim = time.monotonic(), self._spec(namespace), Claim()
        end_s = begin_s + ttl_s
        if replicas < 1:
            raise BadArgument("a block is to have at least one copy")
        members = [m for m in self._nodes(self._members.current()) if m.draining_until_s <= begin_s]
        state = Stored(len(keys), [member.place.host_id for member in members])
        runs = make_runs(keys, run_blocks, [member.place for member in members])

        def store(place: int, chosen: NDArray[np.int64]) -> None:
            member = members[place]
            member.know(namespace, spec)
            if claim.given_up:
                raise GivenUp("the call has ended")
            try:
                reservation = reserve(member, chosen, _left_s(end_s))
            except NoSpace:
                return
            state.note(place, chosen[reservation.status == EXISTS], stored=False)
            state.note_written_elsewhere(chosen[reservation.status == BEING_WRITTEN])
            done = member.fill_claimed(reservation, memory, own[chosen], _left_s(end_s), claim)
            size_bytes = int(reservation.slots.sizes[done].sum(dtype=np.uint64))
            state.note(place, chosen[done], stored=True, size_bytes=size_bytes)

        try:
            while time.monotonic() < end_s and (wanted := state.assign(runs, replicas)):
                self._calls.run(
                    [(members[place], lambda p=place, r=rows: store(p, r)) for place, rows in wanted],  # type: ignore[misc]
                    end_s,
                )
        finally:
            claim.give_up()
        return state.result(begin_s)

    # ------------------------------------------------------------ reading

    def get(
        self,
        namespace: NamespaceId,
        keys: KeyArray,
        out: Memory,
        *,
        rows: NDArray[np.int64] | None = None,
        group: int = 0,
        shard: int = 0,
        ttl_s: float = 30.0,
        promote_s: float = 5.0,
    ) -> ClusterGetResult:
        """Copies blocks into rows of `out` from whichever nodes have them: of this host first, then the fastest ones.

        A copy that is gone, bad or on a lost node is looked for on the next one.

        Args: out, rows, promote_s: as `PoolClient.get`. ttl_s: time within which the call ends.
        """
        begin_s = time.monotonic()
        check_keys(keys)
        request = ClaimedRequest(namespace, keys, group, shard, ttl_s=ttl_s, promote_s=min(promote_s, ttl_s))
        found = self._get(request, rows_of(out, rows, len(keys)), begin_s)
        return ClusterGetResult(found.found, found.corrupt, found.sources, found.bytes, time.monotonic() - begin_s)

    def get_objects(
        self,
        namespace: NamespaceId,
        names: Sequence[str],
        out: Sequence[NDArray[np.uint8]] | None = None,
        *,
        ttl_s: float = 30.0,
        promote_s: float = 5.0,
    ) -> ClusterObjectsResult:
        """Reads objects from whichever nodes have them; `out` as in `PoolClient.get_objects`."""
        begin_s = time.monotonic()
        memory = ObjectMemory(names, out)
        keys = object_keys(namespace, names)
        request = ClaimedRequest(namespace, keys, names=names, ttl_s=ttl_s, promote_s=min(promote_s, ttl_s))
        found = self._get(request, memory.provide, begin_s)
        values = memory.values(found.found)
        return ClusterObjectsResult(values, found.corrupt, found.sources, found.bytes, time.monotonic() - begin_s)

    def _get(self, request: ClaimedRequest, provide: Provider, begin_s: float) -> Found:
        """Reads from this host's nodes what they have, and the rest from those that say that they have it."""
        spec, end_s = self._spec(request.namespace), begin_s + request.ttl_s
        known = self._members.current()
        members = known if not request.names else self._nodes(known)
        members = self._nearest_first(members)
        state = Found(len(request.keys))
        for member in [m for m in members if m.local]:
            if len(state.missing):
                self._read([(member, state.missing)], request, provide, state, spec, end_s, others=len(members) > 1)
        remote = [m for m in members if not m.local]
        if not len(state.missing) or not remote:
            return state
        holders = Holders(len(request.keys), len(remote))
        self._ask(remote, request, state.missing, holders, spec, end_s)
        while len(state.missing) and time.monotonic() < end_s and (taken := holders.take(state.missing)):
            parts = [(remote[place], rows) for place, rows, _ in taken]
            others = any(again for _, _, again in taken)
            self._read(parts, request, provide, state, spec, end_s, others=others)
        return state

    def _read(
        self, parts: Sequence[tuple[Member, NDArray[np.int64]]], request: ClaimedRequest, provide: Provider,
        state: Found, spec: NamespaceSpec, end_s: float, *, others: bool,
    ) -> None:  # fmt: skip
        """Reads rows from one node each, all at the same time; with `others` to try, half of the time is left to them.

        No row is touched any more when this returns, so that the next node may fill it.
        """
        claim, left_s = Claim(), _left_s(end_s)
        part_end_s = time.monotonic() + (left_s / 2 if others else left_s)

        def read(member: Member, rows: NDArray[np.int64]) -> None:
            member.know(request.namespace, spec)
            part_s = _left_s(part_end_s)
            part = replace(
                request, keys=request.keys[rows], names=[request.names[row] for row in rows] if request.names else (),
                ttl_s=part_s, promote_s=min(request.promote_s, part_s / 2), claim=claim,
            )  # fmt: skip
            outcome = member.read_claimed(part, lambda chosen, sizes: provide(rows[chosen], sizes))
            # Noted before the rows may be given to the next node, or, by `GivenUp`, not at all.
            with claim.touching():
                state.note(member.place.source_id, rows, outcome)

        try:
            self._calls.run(
                [(member, lambda m=member, r=rows: read(m, r)) for member, rows in parts],  # type: ignore[misc]
                part_end_s,
            )
        finally:
            claim.give_up()

    def _ask(
        self, members: Sequence[Member], request: ClaimedRequest, rows: NDArray[np.int64], holders: Holders,
        spec: NamespaceSpec, end_s: float,
    ) -> None:  # fmt: skip
        keys = request.keys[rows]

        def ask(place: int, member: Member) -> None:
            member.know(request.namespace, spec)
            has = member.lookup(request.namespace, keys, group=request.group, shard=request.shard)
            holders.note(place, rows, has)

        calls = [(member, lambda p=place, m=member: ask(p, m)) for place, member in enumerate(members)]
        self._calls.run(calls, min(end_s, time.monotonic() + LOOKUP_S_MAX))

    # ------------------------------------------------------------ looking, removing

    def lookup(self, namespace: NamespaceId, keys: KeyArray, *, group: int = 0, shard: int = 0) -> Bools:
        """Which keys are readable on some node, or in a worker's HBM; holds nothing."""
        check_keys(keys)
        return self._lookup(namespace, keys, self._members.current(), group, shard)

    def _lookup(
        self, namespace: NamespaceId, keys: KeyArray, members: Sequence[Member], group: int = 0, shard: int = 0
    ) -> Bools:
        holders = Holders(len(keys), len(members))
        rows = np.arange(len(keys), dtype=np.int64)
        request = ClaimedRequest(namespace, keys, group, shard)
        self._ask(members, request, rows, holders, self._spec(namespace), time.monotonic() + self._timeout_s)
        found: Bools = np.zeros(len(keys), dtype=np.bool_)
        for _, some, _ in holders.take(rows):
            found[some] = True
        return found

    def lookup_objects(self, namespace: NamespaceId, names: Sequence[str]) -> Bools:
        """Which names are there, on some node; holds nothing."""
        return self._lookup(namespace, object_keys(namespace, names), self._nodes(self._members.current()))

    def object_sizes(self, namespace: NamespaceId, names: Sequence[str]) -> NDArray[np.uint64]:
        """Bytes of each object, as the node has it that would be read first; uint64 (names,).

        0 = on no node that answers. Reads and holds nothing.
        """
        spec = self._spec(namespace)

        def ask(member: Member) -> NDArray[np.uint64]:
            member.know(namespace, spec)
            return member.object_sizes(namespace, names)

        members = self._nearest_first(self._nodes(self._members.current()))
        answers = self._each(ask, members, LOOKUP_S_MAX)
        sizes = np.zeros(len(names), dtype=np.uint64)
        for member in members:
            if (told := answers.get(member.place.source_id)) is not None:
                sizes = np.where(sizes > 0, sizes, told)
        return sizes

    def remove(self, namespace: NamespaceId, keys: KeyArray, *, group: int = 0, shard: int = 0) -> ClusterRemoveResult:
        """Drops all copies of blocks."""
        return self._remove(namespace, lambda member: member.remove(namespace, keys, group=group, shard=shard))

    def remove_all(self, namespace: NamespaceId) -> ClusterRemoveResult:
        """Drops all of a namespace."""
        return self._remove(namespace, lambda member: member.remove_all(namespace))

    def remove_objects(
        self, namespace: NamespaceId, names: Sequence[str] = (), *, prefix: str = ""
    ) -> ClusterRemoveResult:
        """Drops all copies of objects by name, or of all whose names begin with `prefix`."""
        return self._remove(namespace, lambda member: member.remove_objects(namespace, names, prefix=prefix))

    def _remove(self, namespace: NamespaceId, remove: Callable[[Member], int]) -> ClusterRemoveResult:
        spec = self._spec(namespace)

        def call(member: Member) -> int:
            member.know(namespace, spec)
            return remove(member)

        # What lies in an engine's HBM is the engine's own; it holds no objects, and blocks make room by themselves.
        removed = self._each(call, self._nodes(self._members.current()))
        unreached = [m.place.source_id for m in self._nodes(self._members.all()) if m.place.source_id not in removed]
        return ClusterRemoveResult(sum(removed.values()), unreached)

    def stats(self) -> dict[str, pb.SourceStats]:
        """Statistics by node id; nodes that do not answer are missing."""
        return self._each(lambda member: member.stats(), self._members.current())

    @staticmethod
    def _nodes(members: Sequence[Member]) -> list[Member]:
        """Those that store what they are given, and not an engine's cache."""
        return [member for member in members if member.tier == Tier.DRAM]

    def _each(
        self, call: Callable[[Member], Any], members: Sequence[Member], time_s_max: float = math.inf
    ) -> dict[str, Any]:
        """Answers of those that answer in time."""
        answers: dict[str, Any] = {}
        end_s = time.monotonic() + min(self._timeout_s, time_s_max)

        def ask(member: Member) -> None:
            answers[member.place.source_id] = call(member)

        self._calls.run([(m, lambda m=m: ask(m)) for m in members], end_s)  # type: ignore[misc]
        # A late one may still add its answer: what is returned does not change any more.
        return dict(sorted(answers.copy().items()))

    # ------------------------------------------------------------ parts

    def _spec(self, namespace: NamespaceId) -> NamespaceSpec:
        spec = self._specs.get(namespace)
        if spec is None:
            raise UnknownNamespace("this client does not know the namespace", hint="call register first")
        return spec

    def _nearest_first(self, members: Sequence[Member]) -> list[Member]:
        """In the order in which they are read from."""
        return sorted(members, key=lambda m: (not m.local, m.cost_us(), self._turn(m)))

    def _turn(self, member: Member) -> int:
        """An order of equally good nodes that differs from client to client."""
        return xxhash.xxh3_64_intdigest(member.place.source_id.encode(), seed=self._seed)


def _left_s(end_s: float) -> float:
    return max(end_s - time.monotonic(), 0.001)
