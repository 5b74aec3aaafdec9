"""The connector's line to the pool: one client that vLLM never has to wait for while the node is away, or slow.

A node that is not there, at the start or later, costs hits and nothing else: calls answer "not found" at once until a
background thread has reached it again. One that does not answer in time is left alone for a while. Nothing that goes
wrong here gets out: vLLM would end of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

import numpy as np

from engines.vllm.cores import leave_kernel_cores
from engines.vllm.prefixes import Bools, Keys
from engines.vllm.quiet_log import QuietLog
from engines.vllm.settings import ConnectorSettings
from kvpool.channels.base import ChannelError, Memory
from kvpool.channels.tls import TlsConfig
from kvpool.client import PoolClient
from kvpool.core.errors import DeadlineExceeded, KvpoolError, Unavailable
from kvpool.core.ids import NamespaceId
from kvpool.core.kernels import copying, probing
from kvpool.core.namespace import NamespaceSpec

#: Below vLLM's own logger, whose settings it shares.
log = logging.getLogger("vllm.kvpool")

RETRY_S_MIN, RETRY_S_MAX = 0.5, 10.0
#: For calls off the critical path: connecting, registering, storing.
CALL_TIMEOUT_S = 5.0
#: After a call that took too long: how long the node is not asked about prompts, or for blocks, or given any.
ASK_REST_S, MOVE_REST_S = 1.0, 5.0


def told(spec: NamespaceSpec) -> str:
    """What two engines have to agree on to share blocks, for people who wonder why theirs don't."""
    groups = ", ".join(
        f"{group.kind.name.lower()} {group.block_tokens} tokens {group.block_bytes} bytes x{group.shard_count}"
        for group in spec.groups
    )
    return f"{spec.model} {spec.dtype}, blocks of {groups}; {spec.backend}; {spec.layout}"


class _Rest:
    """A while in which something is not tried. Any thread: whoever is late tries once too often."""

    def __init__(self, rest_s: float) -> None:
        self._rest_s, self._until_s = rest_s, 0.0

    def begin(self) -> None:
        self._until_s = time.monotonic() + self._rest_s

    @property
    def now(self) -> bool:
        return time.monotonic() < self._until_s


class PoolLink:
    """Lookups, loads and stores in one namespace. Calls may come from several threads."""

    def __init__(self, settings: ConnectorSettings, spec: NamespaceSpec, client_name: str) -> None:
        self._settings, self._spec, self._namespace = settings, spec, spec.id()
        tls = TlsConfig.of_files(settings.tls_cert, settings.tls_key, settings.tls_ca)
        self._client = PoolClient(
            settings.node, client=client_name, credential=settings.credential, timeout_s=CALL_TIMEOUT_S, tls=tls
        )
        self._up = threading.Event()
        self._closing = threading.Event()
        self._reported = ""
        self._quiet = QuietLog(log)
        self._sees = False  # something in the node's index
        self._asks, self._loads, self._stores = _Rest(ASK_REST_S), _Rest(MOVE_REST_S), _Rest(MOVE_REST_S)
        tried = threading.Event()
        # The client's own threads are begun by this one, and so are kept off the cores of vLLM's kernels as well.
        self._thread = threading.Thread(target=self._keep, args=(tried,), name="kvpool-link", daemon=True)
        self._thread.start()
        tried.wait(2 * CALL_TIMEOUT_S)

    @property
    def namespace(self) -> NamespaceId:
        return self._namespace

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    def close(self) -> None:
        self._closing.set()
        self._up.clear()
        self._thread.join(CALL_TIMEOUT_S)
        self._client.close()

    # ------------------------------------------------------------ calls

    def lookup(self, group: int, shards: Iterable[int], keys: Keys) -> Bools:
        """Which keys are there in all shards; none while the node is away. vLLM's scheduler waits for this."""
        nothing = np.zeros(len(keys), dtype=np.bool_)
        if not self.is_up or self._loads.now:
            return nothing
        try:
            if not self._client.is_connected:
                raise Unavailable("its session has ended")
            if not self._asks.now:
                try:
                    return self._look(group, shards, keys, ask=True)
                except DeadlineExceeded:
                    self._asks.begin()
                    self._quiet.warning(
                        "slow", "kvpool node %s takes more than %d ms to say what it has: asked again in %.0f s",
                        self._settings.node, self._settings.lookup_timeout_ms, ASK_REST_S,
                    )  # fmt: skip
            return self._look(group, shards, keys, ask=False)
        except Exception as error:
            self._failed(error)
            return nothing

    def _look(self, group: int, shards: Iterable[int], keys: Keys, *, ask: bool) -> Bools:
        found = np.ones(len(keys), dtype=np.bool_)
        end_s = time.monotonic() + self._settings.lookup_timeout_ms / 1e3
        for shard in shards:
            left_s = max(end_s - time.monotonic(), 1e-3)
            found &= self._client.lookup(
                self._namespace, keys, group=group, shard=shard, timeout_s=left_s, exact=True, ask=ask
            )
        return found

    def shows(self, group: int, shard: int, keys: Keys) -> Bools:
        """Which keys the node's index shows on this host; never asks, never waits."""
        try:
            return self._client.lookup(self._namespace, keys, group=group, shard=shard, exact=True, ask=False)
        except Exception as error:
            self._failed(error)
            return np.zeros(len(keys), dtype=np.bool_)

    def keeps(self, group: int, shards: Iterable[int], keys: Keys) -> Bools:
        """Which keys the node's index still shows in all shards; all, as long as it has never shown any.

        It may be on another host, where it shows nothing; then it can't be known without a call.
        """
        there = np.ones(len(keys), dtype=np.bool_)
        if not self.is_up:
            return there
        for shard in shards:
            there &= self.shows(group, shard, keys)
        self._sees = self._sees or bool(there.any())
        return there if self._sees else np.ones(len(keys), dtype=np.bool_)

    def get(self, group: int, shard: int, keys: Keys, out: Memory, timeout_s: float) -> Bools:
        """Reads blocks into rows of `out`; which are there, verified. None while the node is away."""
        missed = np.zeros(len(keys), dtype=np.bool_)
        if not self.is_up or self._loads.now:
            return missed
        try:
            return self._client.get(self._namespace, keys, out, group=group, shard=shard, ttl_s=timeout_s).found
        except (DeadlineExceeded, ChannelError) as error:
            # The end of a step's time says nothing about the node, unless the node had most of it.
            if timeout_s >= self._settings.load_timeout_s / 2:
                self._loads.begin()
            self._failed(error)
        except Exception as error:
            self._failed(error)
        return missed

    def put(self, group: int, shard: int, keys: Keys, blocks: Memory) -> int:
        """Stores blocks; returns how many are there now. None while the node is away."""
        if not self.is_up or self._stores.now:
            return 0
        try:
            result = self._client.put(self._namespace, keys, blocks, group=group, shard=shard)
        except (DeadlineExceeded, ChannelError) as error:
            self._stores.begin()
            self._failed(error)
            return 0
        except Exception as error:
            self._failed(error)
            return 0
        return int(np.count_nonzero(result.stored | result.existed))

    # ------------------------------------------------------------ up and down

    def _failed(self, error: Exception) -> None:
        # A channel that was too slow, or whose lease ended, is no node that is away.
        if isinstance(error, Unavailable) and not isinstance(error, ChannelError):
            if self._up.is_set():
                log.warning("kvpool node %s is away, vLLM computes by itself meanwhile: %s", self._settings.node, error)
            self._up.clear()
        elif isinstance(error, KvpoolError):
            self._quiet.warning(type(error).__name__, "kvpool: %s", error)
        else:
            self._quiet.warning(type(error).__name__, "kvpool: %r, which is not meant to happen", error)

    def _try_once(self) -> bool:
        try:
            self._client.register(self._spec)
        except Exception as error:
            hint = f" ({error.hint})" if isinstance(error, KvpoolError) and error.hint else ""
            text = f"{error}{hint}" if isinstance(error, KvpoolError) else repr(error)
            if text != self._reported:
                log.warning(
                    "kvpool node %s can't be used, vLLM computes by itself meanwhile: %s", self._settings.node, text
                )
                self._reported = text
            return False
        self._reported = ""
        self._up.set()
        log.info(
            "kvpool node %s is used, namespace %s: %s", self._settings.node, self.namespace.hex(), told(self._spec)
        )
        return True

    def _keep(self, tried: threading.Event) -> None:
        leave_kernel_cores()
        copying.warm_up()  # else the first request waits for them
        probing.warm_up()
        self._try_once()
        tried.set()
        pause_s = RETRY_S_MIN
        while not self._closing.wait(pause_s):
            if self.is_up:
                pause_s = RETRY_S_MIN
            else:
                pause_s = RETRY_S_MIN if self._try_once() else min(2 * pause_s, RETRY_S_MAX)
