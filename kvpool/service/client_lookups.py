"""What a source has: told by its own index where it is on this host, else asked. Nothing is held by it: a hint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError
from kvpool.core.hashing import object_keys
from kvpool.core.ids import NamespaceId, qualify
from kvpool.service.client_session import Session
from kvpool.service.client_types import Bools
from kvpool.service.source_calls import Keys, SourceCalls, check_keys, left_s
from kvpool.v1 import block_source_pb2 as pb

#: Objects whose sizes are asked for in one call.
SIZES_PER_CALL = 1000

Sizes = NDArray[np.uint64]


class LookingCalls(SourceCalls):
    """The lookups of `PoolClient`."""

    def lookup(
        self, namespace: NamespaceId, keys: Keys, *, group: int = 0, shard: int = 0, timeout_s: float | None = None,
        exact: bool = False, ask: bool = True,
    ) -> Bools:  # fmt: skip
        """Which keys are readable, in any tier; holds nothing.

        What the source's own index shows on this host takes no call; the rest is asked of the source.

        Args:
            timeout_s: for the whole of it, instead of the client's own time.
            exact: for those who read exact copies only: others may count as absent. Then a definite miss of the index
                of a source without a lower tier takes no call either.
            ask: False: never calls and never waits. What the index does not show counts as absent, and all does where
                there is none on this host, or no session is open.
        Raises: Unavailable, DeadlineExceeded; neither without `ask`.
        """
        check_keys(keys)
        begin_s = time.monotonic()
        session = self._session(timeout_s) if ask else self._keeper.current
        found, unsettled = self._look(session, namespace, keys, group, shard, exact)
        if ask and unsettled.any():
            rest = np.flatnonzero(unsettled)
            time_s = None if timeout_s is None else left_s(begin_s + timeout_s)
            found[rest] = super().lookup(namespace, keys[rest], group=group, shard=shard, timeout_s=time_s)
        return found

    @staticmethod
    def _look(
        session: Session | None, namespace: NamespaceId, keys: Keys, group: int, shard: int, exact: bool
    ) -> tuple[Bools, Bools]:
        """What the source's own index says of keys: which are readable, and which only the source can settle."""
        if session is not None and session.shared is not None and namespace in session.numbers:
            with contextlib.suppress(ChannelError):  # the session has just ended
                hit, miss = session.shared.lookup(session.numbers[namespace], qualify(keys, group, shard))
                # Asked after the look: what had gone to a tier below by then, is seen to be there.
                settled = hit | miss if exact and not session.shared.has_lower_tier else hit
                return hit, ~settled
        return np.zeros(len(keys), dtype=np.bool_), np.ones(len(keys), dtype=np.bool_)

    # ------------------------------------------------------------ objects

    def lookup_objects(
        self, namespace: NamespaceId, names: Sequence[str], *, timeout_s: float | None = None, ask: bool = True
    ) -> Bools:
        """Which names are there, in any tier; bool (names,). Holds nothing. Args, Raises: as `lookup`, always exact."""
        begin_s = time.monotonic()
        keys = object_keys(namespace, names)
        session = self._session(timeout_s) if ask else self._keeper.current
        sizes, unsettled = self._look_at_objects(session, namespace, keys, names)
        found: Bools = sizes > 0
        if ask and unsettled.any():
            rest = np.flatnonzero(unsettled)
            time_s = None if timeout_s is None else left_s(begin_s + timeout_s)
            found[rest] = super().lookup(namespace, keys[rest], timeout_s=time_s)
        return found

    def object_sizes(self, namespace: NamespaceId, names: Sequence[str], *, ask: bool = True) -> Sizes:
        """Bytes of each object, in any tier; uint64 (names,), 0 = it is not there. Holds nothing.

        One that moves from one tier to the other just now may count as absent. Args, Raises: as `lookup_objects`.
        """
        keys = object_keys(namespace, names)
        session = self._session() if ask else self._keeper.current
        sizes, unsettled = self._look_at_objects(session, namespace, keys, names)
        for below in (False, True) if ask else ():
            rest = np.flatnonzero(unsettled & (sizes == 0))
            for first in range(0, len(rest), SIZES_PER_CALL):
                some = rest[first : first + SIZES_PER_CALL]
                sizes[some] = self._sizes_of(namespace, keys[some], [names[row] for row in some.tolist()], below)
        return sizes

    def _sizes_of(self, namespace: NamespaceId, keys: Keys, names: Sequence[str], below: bool) -> Sizes:
        """As the source lists them: what is in memory, or what is in the tier below it alone."""
        request = pb.ListBlocksRequest(namespace_id=namespace, keys=keys.tobytes(), below=below)
        reply = self._call(lambda s, t: s.stub.ListBlocks(request, timeout=t))
        listed = {
            (block.key, block.name): block.size
            for block in reply.blocks
            if block.state == "readable" and block.namespace_id == namespace
        }
        packed = (key.tobytes() for key in keys)
        pairs = zip(packed, names, strict=True)
        return np.fromiter((listed.get(pair, 0) for pair in pairs), dtype=np.uint64, count=len(keys))

    @staticmethod
    def _look_at_objects(
        session: Session | None, namespace: NamespaceId, keys: Keys, names: Sequence[str]
    ) -> tuple[Sizes, Bools]:
        """What the source's own index says of objects: sizes (0 = not shown), and what only the source can settle."""
        sizes, unsettled = np.zeros(len(keys), dtype=np.uint64), np.ones(len(keys), dtype=np.bool_)
        if session is not None and session.shared is not None and namespace in session.numbers:
            with contextlib.suppress(ChannelError):  # the session has just ended
                packed = [name.encode() for name in names]
                found = session.shared.find(session.numbers[namespace], qualify(keys, 0, 0), packed)
                below = session.shared.has_lower_tier
                sizes[found.hit] = found.sizes[found.hit]
                unsettled = ~found.hit if below else ~(found.hit | found.definite_miss)
        return sizes, unsettled
