"""The backend's line to the pool: one client that SGLang never has to wait for while the node is away, or slow.

A node that is not there, at the start or later, costs hits and nothing else: calls answer "not found" at once until a
background thread has reached it again. One that does not answer in time is left alone for a while. Each kind of
trouble is logged now and then, not with every call.
"""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
from numpy.typing import NDArray

from engines.sglang.hits import Bools, Keys
from engines.sglang.settings import BackendSettings
from kvpool.channels.base import ChannelError, Memory
from kvpool.channels.tls import TlsConfig
from kvpool.client import COMMITTED, PoolClient
from kvpool.core.errors import DeadlineExceeded, KvpoolError, Unavailable
from kvpool.core.ids import NamespaceId
from kvpool.core.namespace import NamespaceSpec

log = logging.getLogger("sglang.kvpool")

RETRY_S_MIN, RETRY_S_MAX = 0.5, 10.0
#: For calls off SGLang's path: connecting, registering, clearing.
CALL_TIMEOUT_S = 5.0
#: After a call that took too long: how long nothing of its kind is tried.
REST_S = 1.0
#: How long a page that another engine is storing right now is waited for.
WRITER_WAIT_S = 1.0
#: Least time between two log lines about one kind of trouble.
LOG_INTERVAL_S = 10.0


class PoolLink:
    """Lookups, loads and stores in any number of namespaces. For any thread."""

    def __init__(self, settings: BackendSettings, client_name: str) -> None:
        self._settings = settings
        tls = TlsConfig.of_files(settings.tls_cert, settings.tls_key, settings.tls_ca)
        self._client = PoolClient(
            settings.node, client=client_name, credential=settings.credential, timeout_s=CALL_TIMEOUT_S, tls=tls
        )
        self._lock = threading.Lock()  # guards what follows
        self._specs: dict[NamespaceId, NamespaceSpec] = {}
        self._said_s: dict[str, float] = {}
        self._rest_until_s = dict.fromkeys(("ask", "load", "store"), 0.0)
        self._reported = ""
        self._up = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="kvpool-link", daemon=True)
        self._thread.start()

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    def use(self, spec: NamespaceSpec) -> NamespaceId:
        """Makes a namespace known, now if the node is there, else as soon as it is. Raises: BadArgument."""
        spec.validate()
        with self._lock:
            self._specs[spec.id()] = spec
        if self._register():
            log.info("kvpool node %s is used, namespace %s of %s", self._settings.node, spec.id().hex(), spec.model)
        return spec.id()

    def close(self) -> None:
        """Calls that come later find nothing."""
        self._closing.set()
        self._up.clear()
        self._thread.join(2 * CALL_TIMEOUT_S)
        self._client.close()

    # ------------------------------------------------------------ calls

    def lookup(self, namespace: NamespaceId, group: int, shard: int, keys: Keys) -> Bools:
        """Which keys are there, in any tier; none while the node is away."""
        nothing = np.zeros(len(keys), dtype=np.bool_)
        if not len(keys) or not self._may("ask") or not self._may("load"):
            return nothing
        timeout_s = self._settings.lookup_timeout_ms / 1e3
        try:
            # Only exact pages are stored, so that what the index on this host shows is final.
            return self._client.lookup(namespace, keys, group=group, shard=shard, timeout_s=timeout_s, exact=True)
        except Exception as error:
            self._failed(error, "ask")
            return nothing

    def get(
        self, namespace: NamespaceId, group: int, shard: int, keys: Keys, out: Memory, rows: NDArray[np.int64] | None,
        end_s: float,
    ) -> Bools:  # fmt: skip
        """Reads blocks into rows of `out` until monotonic time `end_s`; which are there, verified."""
        nothing = np.zeros(len(keys), dtype=np.bool_)
        left_s = end_s - time.monotonic()
        if not len(keys) or not self._may("load") or left_s <= 0:
            return nothing
        try:
            return self._client.get(namespace, keys, out, rows=rows, group=group, shard=shard, ttl_s=left_s).found
        except Exception as error:
            self._failed(error, "load")
            return nothing

    def put(
        self, namespace: NamespaceId, group: int, shard: int, keys: Keys, blocks: Memory,
        rows: NDArray[np.int64] | None, parent: bytes, end_s: float,
    ) -> Bools:  # fmt: skip
        """Stores blocks until monotonic time `end_s`; which are there now, whoever stored them."""
        there = np.zeros(len(keys), dtype=np.bool_)
        left_s = end_s - time.monotonic()
        if not len(keys) or not self._may("store") or left_s <= 0:
            return there
        try:
            result = self._client.put(
                namespace, keys, blocks, rows=rows, group=group, shard=shard, parent=parent, ttl_s=left_s,
                tenant=self._settings.tenant,
            )  # fmt: skip
            there = result.stored | result.existed
            if not there.all():
                self._await_others(namespace, group, shard, keys, there)
        except Exception as error:
            self._failed(error, "store")
        return there

    def clear(self, namespace: NamespaceId) -> int | None:
        """Removes all blocks of a namespace; how many there were, or None if the node could not be told."""
        try:
            return self._client.remove_all(namespace)
        except Exception as error:
            self._failed(error, "ask")
            return None

    def _await_others(self, namespace: NamespaceId, group: int, shard: int, keys: Keys, there: Bools) -> None:
        """What was neither stored nor there is being stored by another engine, or had no room: says which, in time."""
        open_ = np.flatnonzero(~there)
        for news in self._client.wait(
            namespace, keys[open_], group=group, shard=shard, deadline_s=WRITER_WAIT_S, absent_is_abandoned=True
        ):
            there[open_[news.indices[news.states == COMMITTED]]] = True
        if not there.all():
            self.say(
                "left out", "kvpool: %d of %d blocks not stored: no room, or another is still storing them",
                len(there) - int(there.sum()), len(there),
            )  # fmt: skip

    # ------------------------------------------------------------ up and down

    def _may(self, what: str) -> bool:
        return self.is_up and time.monotonic() >= self._rest_until_s[what]

    def _failed(self, error: Exception, what: str) -> None:
        """Args: what: was tried, and rests for a while if it took too long; the rest goes on."""
        if isinstance(error, DeadlineExceeded | ChannelError):
            # A channel that is too slow, or whose lease was over, says nothing of the node.
            self._rest_until_s[what] = time.monotonic() + REST_S
            self.say(f"slow {what}", "kvpool node %s took too long to %s: %s", self._settings.node, what, error)
        elif isinstance(error, Unavailable):
            if self._up.is_set():
                log.warning(
                    "kvpool node %s is away, SGLang computes by itself meanwhile: %s", self._settings.node, error
                )
            self._up.clear()
        else:
            self.say(type(error).__name__, "kvpool: %s", _told(error))

    def say(self, kind: str, text: str, *arguments: object, trace: bool = False) -> None:
        """Logs a warning unless one of this kind was logged just before.

        Args: trace: with the exception that is being handled.
        """
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._said_s.get(kind, -LOG_INTERVAL_S) < LOG_INTERVAL_S:
                return
            self._said_s[kind] = now_s
        log.warning(text, *arguments, exc_info=trace)

    def _register(self) -> bool:
        """Registers all namespaces; whether the node is there."""
        with self._lock:
            specs = list(self._specs.values())
        try:
            for spec in specs:
                self._client.register(spec)
        except Exception as error:  # whatever it is, this thread must go on, and SGLang must start
            told = _told(error)
            if told != self._reported:
                log.warning("kvpool node %s can't be used, SGLang computes by itself meanwhile: %s",
                            self._settings.node, told)  # fmt: skip
            self._reported = told
            return False
        self._reported = ""
        if not self._closing.is_set():
            self._up.set()
        return True

    def _keep(self) -> None:
        """Looks for a node that is away; the client comes back to one that was restarted by itself."""
        pause_s = RETRY_S_MIN
        while not self._closing.wait(pause_s):
            if self.is_up or not self._specs:
                pause_s = RETRY_S_MIN
            elif self._register():
                pause_s = RETRY_S_MIN
                log.info("kvpool node %s is used again", self._settings.node)
            else:
                pause_s = min(2 * pause_s, RETRY_S_MAX)


def _told(error: Exception) -> str:
    if not isinstance(error, KvpoolError):
        return f"{error!r}, which is not meant to happen"
    return f"{error} ({error.hint})" if error.hint else str(error)
