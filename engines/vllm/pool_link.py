"""The connector's line to the pool: one client that vLLM never has to wait for while the node is away.

A node that is not there, at the start or later, costs hits and nothing else: calls answer "not found" at once until a
background thread has reached it again. Each change is logged once.
"""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
from numpy.typing import NDArray

from engines.vllm.settings import ConnectorSettings
from kvpool.channels.base import Memory
from kvpool.channels.tls import TlsConfig
from kvpool.client import PoolClient
from kvpool.core.errors import DeadlineExceeded, KvpoolError, Unavailable
from kvpool.core.ids import NamespaceId
from kvpool.core.namespace import NamespaceSpec

#: Below vLLM's own logger, whose settings it shares.
log = logging.getLogger("vllm.kvpool")

RETRY_S_MIN, RETRY_S_MAX = 0.5, 10.0
#: For calls off the critical path: connecting, registering, storing.
CALL_TIMEOUT_S = 5.0

Bools = NDArray[np.bool_]
Keys = NDArray[np.uint8]


class PoolLink:
    """Lookups, loads and stores in one namespace. Calls may come from several threads."""

    def __init__(self, settings: ConnectorSettings, spec: NamespaceSpec, client_name: str) -> None:
        self._settings, self._spec = settings, spec
        tls = TlsConfig.of_files(settings.tls_cert, settings.tls_key, settings.tls_ca)
        self._client = PoolClient(
            settings.node, client=client_name, credential=settings.credential, timeout_s=CALL_TIMEOUT_S, tls=tls
        )
        self._up = threading.Event()
        self._closing = threading.Event()
        self._down_since_s = time.monotonic()
        self._reported = False
        self.failures = 0
        self._thread = threading.Thread(target=self._keep, name="kvpool-link", daemon=True)
        self._try_once()
        self._thread.start()

    @property
    def namespace(self) -> NamespaceId:
        return self._spec.id()

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    def close(self) -> None:
        self._closing.set()
        self._up.clear()
        self._thread.join(CALL_TIMEOUT_S)
        self._client.close()

    # ------------------------------------------------------------ calls

    def lookup(self, group: int, shards: range, keys: Keys) -> Bools:
        """Which keys are there in all shards; none while the node is away. vLLM's scheduler waits for this."""
        found = np.ones(len(keys), dtype=np.bool_)
        if not self.is_up:
            return np.zeros(len(keys), dtype=np.bool_)
        timeout_s = self._settings.lookup_timeout_ms / 1e3
        try:
            if not self._client.is_connected:
                raise Unavailable("its session has ended")
            for shard in shards:
                found &= self._client.lookup(self.namespace, keys, group=group, shard=shard, timeout_s=timeout_s)
        except KvpoolError as error:
            self._failed(error)
            found[:] = False
        return found

    def get(self, group: int, shard: int, keys: Keys, out: Memory) -> Bools:
        """Reads blocks into rows of `out`; which are there, verified. None while the node is away."""
        missed = np.zeros(len(keys), dtype=np.bool_)
        if not self.is_up:
            return missed
        try:
            return self._client.get(
                self.namespace, keys, out, group=group, shard=shard, ttl_s=self._settings.load_timeout_s
            ).found
        except KvpoolError as error:
            self._failed(error)
            return missed

    def put(self, group: int, shard: int, keys: Keys, blocks: Memory) -> int:
        """Stores blocks; returns how many are there now. None while the node is away."""
        if not self.is_up:
            return 0
        try:
            result = self._client.put(self.namespace, keys, blocks, group=group, shard=shard)
        except KvpoolError as error:
            self._failed(error)
            return 0
        return int(np.count_nonzero(result.stored | result.existed))

    # ------------------------------------------------------------ up and down

    def _failed(self, error: KvpoolError) -> None:
        self.failures += 1
        if isinstance(error, Unavailable | DeadlineExceeded):
            if self._up.is_set():
                log.warning("kvpool node %s is away, vLLM computes by itself meanwhile: %s", self._settings.node, error)
            self._up.clear()
        else:
            log.warning("kvpool: %s", error)

    def _try_once(self) -> bool:
        try:
            self._client.register(self._spec)
        except KvpoolError as error:
            if not self._reported:
                log.warning(
                    "kvpool node %s can't be used, vLLM computes by itself meanwhile: %s%s",
                    self._settings.node, error, f" ({error.hint})" if error.hint else "",
                )  # fmt: skip
                self._reported = True
            return False
        self._reported = False
        self._up.set()
        log.info("kvpool node %s is used, namespace %s", self._settings.node, self.namespace.hex())
        return True

    def _keep(self) -> None:
        pause_s = RETRY_S_MIN
        while not self._closing.wait(pause_s):
            if self.is_up:
                pause_s = RETRY_S_MIN
            else:
                pause_s = RETRY_S_MIN if self._try_once() else min(2 * pause_s, RETRY_S_MAX)
