"""The connector's line to the pool, in the one namespace of this engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np

from engines.attached.line import Int64s, NodeLine
from engines.vllm.cores import leave_kernel_cores
from engines.vllm.prefixes import Bools, Keys
from engines.vllm.settings import ConnectorSettings
from kvpool.channels.base import Memory
from kvpool.core.ids import NamespaceId
from kvpool.core.namespace import NamespaceSpec
from kvpool.service.client_writes import Lot

#: Below vLLM's own logger, whose settings it shares.
log = logging.getLogger("vllm.kvpool")

#: For the blocks of a request in a step; nobody waits for it but the thread that stores.
STORE_TIMEOUT_S = 30.0


class PoolLink:
    """Lookups, loads and stores of this engine's blocks. Calls may come from several threads, and never raise."""

    def __init__(self, settings: ConnectorSettings, spec: NamespaceSpec, client_name: str) -> None:
        self._settings = settings
        self._sees = False  # something in the node's index
        # The client's own threads are begun by the line's, and so are kept off the cores of vLLM's kernels as well.
        self._line = NodeLine(settings, client_name, engine="vLLM", log=log, begin_thread=leave_kernel_cores)
        self._namespace = self._line.use(spec)

    @property
    def namespace(self) -> NamespaceId:
        return self._namespace

    @property
    def is_up(self) -> bool:
        return self._line.is_up

    def close(self) -> None:
        self._line.close()

    def lookup(self, group: int, shards: Iterable[int], keys: Keys) -> Bools:
        """Which keys are there in all shards; none while the node is away. vLLM's scheduler waits for this."""
        return self._line.lookup(self._namespace, group, shards, keys, self._settings.lookup_timeout_ms / 1e3)

    def shows(self, group: int, shard: int, keys: Keys) -> Bools:
        """Which keys the node's index shows on this host; never asks, never waits."""
        return self._line.shows(self._namespace, group, shard, keys)

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
        # The end of a step's time says nothing about the node, unless the node had most of it.
        fair_s = self._settings.load_timeout_s / 2
        return self._line.get(self._namespace, group, shard, keys, out, timeout_s, fair_s=fair_s)

    def put(self, group: int, shard: int, keys: Keys, lots: Callable[[Int64s], Iterable[Lot]]) -> int:
        """Stores blocks that `lots` brings together (see `PoolClient.put_lots`); returns how many are there now.

        None while the node is away.
        """
        there = self._line.put_lots(self._namespace, group, shard, keys, lots, STORE_TIMEOUT_S)
        return int(np.count_nonzero(there))
