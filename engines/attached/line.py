"""A connector's line to its node: one client that the engine never waits for while the node is away, or slow.

A node that is not there, at the start or later, costs hits and nothing else: calls answer "not found" at once until a
background thread has reached it again. What took too long is left alone for a while. Nothing that goes wrong here gets
out, since an engine would end of it; each kind of trouble is logged now and then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from engines.attached.options import NodeOptions
from engines.attached.quiet_log import QuietLog
from engines.attached.rest import Rest
from kvpool.channels.base import ChannelError, Memory
from kvpool.client import COMMITTED, PoolClient
from kvpool.core.errors import DeadlineExceeded, KvpoolError, Unavailable
from kvpool.core.ids import NamespaceId
from kvpool.core.kernels import copying, probing
from kvpool.core.namespace import NamespaceSpec
from kvpool.service.client_writes import Lot

Bools = NDArray[np.bool_]
#: uint8 (blocks, 16).
Keys = NDArray[np.uint8]
Int64s = NDArray[np.int64]

RETRY_S_MIN, RETRY_S_MAX = 0.5, 10.0
#: For calls off the engine's path: connecting, registering, clearing, and by default storing.
CALL_TIMEOUT_S = 5.0
#: After a call that took too long: how long the node is not asked what it has, or for blocks, or given any.
ASK_REST_S, MOVE_REST_S = 1.0, 5.0


class NodeLine:
    """Lookups, loads and stores in any number of namespaces. For any thread."""

    def __init__(
        self, options: NodeOptions, client_name: str, *, engine: str, log: logging.Logger,
        begin_thread: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            engine: what computes by itself while the node is away, for the log.
            begin_thread: called in the line's own thread before it begins any others (the client's).
        """
        self._node, self._engine, self._log = options.node, engine, log
        self._client = PoolClient(
            options.node, client=client_name, credential=options.credential, timeout_s=CALL_TIMEOUT_S,
            tls=options.tls(),
        )  # fmt: skip
        self.quiet = QuietLog(log)
        self._reported = ""
        self._said: frozenset[NamespaceId] = frozenset()  # namespaces that the log knows to be in use
        self._asks, self._loads, self._stores = Rest(ASK_REST_S), Rest(MOVE_REST_S), Rest(MOVE_REST_S)
        self._up = threading.Event()
        self._turn = threading.Condition()  # guards what follows
        self._specs: dict[NamespaceId, NamespaceSpec] = {}
        self._wanted = self._tried = 0  # how often `use` was called, and how many of these were tried
        self._closing = False
        self._thread = threading.Thread(target=self._keep, args=(begin_thread,), name="kvpool-link", daemon=True)
        self._thread.start()

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    def use(self, spec: NamespaceSpec) -> NamespaceId:
        """Makes a namespace known, now if the node is there, else as soon as it is. Raises: BadArgument."""
        spec.validate()
        with self._turn:
            self._specs[spec.id()] = spec
            self._wanted += 1
            mine = self._wanted
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._tried >= mine or self._closing, 2 * CALL_TIMEOUT_S)
        return spec.id()

    def close(self) -> None:
        """Calls that come later find nothing."""
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        self._up.clear()
        self._thread.join(2 * CALL_TIMEOUT_S)
        self._up.clear()  # it may have reached the node meanwhile
        self._client.close()

    # ------------------------------------------------------------ calls

    def lookup(self, namespace: NamespaceId, group: int, shards: Iterable[int], keys: Keys, timeout_s: float) -> Bools:
        """Which keys are there in all shards, in any tier; none while the node is away.

        A node that does not answer in time is not asked for a while: what its index shows on this host counts alone.
        """
        missed = np.zeros(len(keys), dtype=np.bool_)
        if not len(keys) or not self.is_up or self._loads.now:
            return missed
        try:
            if not self._client.connected:
                raise Unavailable("its session has ended")
            if not self._asks.now:
                try:
                    return self._look(namespace, group, shards, keys, timeout_s, ask=True)
                except DeadlineExceeded:
                    self._asks.begin()
                    self.quiet.warning(
                        "slow", "kvpool node %s takes more than %d ms to say what it has: asked again in %.0f s",
                        self._node, 1e3 * timeout_s, ASK_REST_S,
                    )  # fmt: skip
            return self._look(namespace, group, shards, keys, timeout_s, ask=False)
        except Exception as error:
            self._failed(error)
            return missed

    def _look(
        self, namespace: NamespaceId, group: int, shards: Iterable[int], keys: Keys, timeout_s: float, *, ask: bool
    ) -> Bools:
        found = np.ones(len(keys), dtype=np.bool_)
        end_s = time.monotonic() + timeout_s
        for shard in shards:
            left_s = max(end_s - time.monotonic(), 1e-3)
            # Only exact blocks are stored, so that what the index on this host shows is final.
            found &= self._client.lookup(
                namespace, keys, group=group, shard=shard, timeout_s=left_s, exact=True, ask=ask
            )
        return found

    def shows(self, namespace: NamespaceId, group: int, shard: int, keys: Keys) -> Bools:
        """Which keys the node's index shows on this host; never asks, never waits."""
        try:
            return self._client.lookup(namespace, keys, group=group, shard=shard, exact=True, ask=False)
        except Exception as error:
            self._failed(error)
            return np.zeros(len(keys), dtype=np.bool_)

    def get(
        self, namespace: NamespaceId, group: int, shard: int, keys: Keys, out: Memory, timeout_s: float,
        *, rows: Int64s | None = None, fair_s: float = 0.0,
    ) -> Bools:  # fmt: skip
        """Reads blocks into rows of `out`; which are there, verified. None while the node is away.

        Args:
            rows: of `out` for each key, int64 (blocks,); default: in order.
            fair_s: time that a node may be expected to need: the end of less says nothing about it.
        """
        missed = np.zeros(len(keys), dtype=np.bool_)
        if not len(keys) or not self.is_up or self._loads.now or timeout_s <= 0:
            return missed
        try:
            return self._client.get(namespace, keys, out, rows=rows, group=group, shard=shard, ttl_s=timeout_s).found
        except Exception as error:
            self._failed(error, self._loads if timeout_s >= fair_s else None)
        return missed

    def put(
        self, namespace: NamespaceId, group: int, shard: int, keys: Keys, blocks: Memory, timeout_s: float,
        *, rows: Int64s | None = None, parent: bytes = b"", tenant: str = "", others_s: float = 0.0,
    ) -> Bools:  # fmt: skip
        """Stores blocks; which are there now, whoever stored them. None while the node is away.

        Args: others_s: how long a block that another engine is storing right now is waited for.
        """

        def store() -> Bools:
            result = self._client.put(
                namespace, keys, blocks, rows=rows, group=group, shard=shard, parent=parent, ttl_s=timeout_s,
                tenant=tenant,
            )  # fmt: skip
            there = result.stored | result.existed
            if others_s and not there.all():
                self._await_others(namespace, group, shard, keys, there, others_s)
            return there

        return self._stored(store, len(keys), timeout_s)

    def put_lots(
        self, namespace: NamespaceId, group: int, shard: int, keys: Keys, lots: Callable[[Int64s], Iterable[Lot]],
        timeout_s: float,
    ) -> Bools:  # fmt: skip
        """As `put`, of blocks that `lots` brings together: see `PoolClient.put_lots`."""

        def store() -> Bools:
            result = self._client.put_lots(namespace, keys, lots, group=group, shard=shard, ttl_s=timeout_s)
            return result.stored | result.existed

        return self._stored(store, len(keys), timeout_s)

    def _stored(self, store: Callable[[], Bools], count: int, timeout_s: float) -> Bools:
        if count and self.is_up and not self._stores.now and timeout_s > 0:
            try:
                return store()
            except Exception as error:
                self._failed(error, self._stores)
        return np.zeros(count, dtype=np.bool_)

    def _await_others(
        self, namespace: NamespaceId, group: int, shard: int, keys: Keys, there: Bools, wait_s: float
    ) -> None:
        """What was neither stored nor there is being stored by another engine, or had no room: says which, in time."""
        open_ = np.flatnonzero(~there)
        for news in self._client.wait(
            namespace, keys[open_], group=group, shard=shard, deadline_s=wait_s, absent_is_abandoned=True
        ):
            there[open_[news.indices[news.states == COMMITTED]]] = True
        if not there.all():
            self.quiet.warning(
                "left out", "kvpool: %d of %d blocks not stored: no room, or another is still storing them",
                len(there) - int(there.sum()), len(there),
            )  # fmt: skip

    def clear(self, namespace: NamespaceId) -> int | None:
        """Removes all blocks of a namespace; how many there were, or None if the node could not be told."""
        try:
            return self._client.remove_all(namespace)
        except Exception as error:
            self._failed(error)
            return None

    # ------------------------------------------------------------ up and down

    def _failed(self, error: Exception, rest: Rest | None = None) -> None:
        """Args: rest: of what was tried, begun if it took too long; everything else goes on."""
        if isinstance(error, DeadlineExceeded | ChannelError):
            # A channel that was too slow, or whose lease ended, is no node that is away.
            if rest is not None:
                rest.begin()
        elif isinstance(error, Unavailable):
            if self._up.is_set():
                self._log.warning(
                    "kvpool node %s is away, %s computes by itself meanwhile: %s", self._node, self._engine, error
                )
            self._said = frozenset()
            self._up.clear()
            return
        self.quiet.warning(type(error).__name__, "kvpool: %s", told(error))

    def _register(self) -> bool:
        """Registers all namespaces; whether the node is there."""
        with self._turn:
            specs = list(self._specs.values())
        try:
            for spec in specs:
                self._client.register(spec)
        except Exception as error:  # whatever it is, this thread must go on, and the engine must start
            text = told(error)
            if text != self._reported:
                self._log.warning(
                    "kvpool node %s can't be used, %s computes by itself meanwhile: %s", self._node, self._engine, text
                )
            self._reported = text
            return False
        self._reported = ""
        self._up.set()
        said, self._said = self._said, frozenset(spec.id() for spec in specs)
        for spec in (spec for spec in specs if spec.id() not in said):
            self._log.info("kvpool node %s is used, namespace %s: %s", self._node, spec.id().hex(), contents(spec))
        return True

    def _keep(self, begin_thread: Callable[[], None] | None) -> None:
        """Looks for a node that is away; the client comes back to one that was restarted by itself."""
        if begin_thread is not None:
            begin_thread()
        copying.warm_up()  # else the first request waits for them
        probing.warm_up()
        pause_s = RETRY_S_MIN
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._closing or self._tried < self._wanted, pause_s)
                if self._closing:
                    return
                wanted, fresh = self._wanted, self._tried < self._wanted
            if fresh or (wanted and not self.is_up):
                pause_s = RETRY_S_MIN if self._register() or fresh else min(2 * pause_s, RETRY_S_MAX)
            else:
                pause_s = RETRY_S_MIN
            with self._turn:
                self._tried = wanted
                self._turn.notify_all()


def told(error: Exception) -> str:
    """An error for people, with what they can do about it."""
    if not isinstance(error, KvpoolError):
        return f"{error!r}, which is not meant to happen"
    return f"{error} ({error.hint})" if error.hint else str(error)


def contents(spec: NamespaceSpec) -> str:
    """What two engines have to agree on to share blocks, for people who wonder why theirs don't."""
    groups = ", ".join(
        f"{group.kind.name.lower()} {group.block_tokens} tokens {group.block_bytes} bytes x{group.shard_count}"
        for group in spec.groups
    )
    return f"{spec.model} {spec.dtype}, blocks of {groups}; {spec.backend}; {spec.layout}"
