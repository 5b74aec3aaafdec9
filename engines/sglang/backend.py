"""The storage backend that SGLang's HiCache loads: pages of the host pool, kept in kvpool.

SGLang calls from three threads of its own (query, prefetch, backup) and takes a page that is not there for a miss.
Nothing here raises once the backend has started, and each call ends within its time: trouble is a miss and a line in
the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from engines.attached.line import NodeLine, told
from engines.sglang import hits, host_pools, identity
from engines.sglang.page_store import PageStore
from engines.sglang.settings import settings_of
from engines.sglang.stats import TransferStats
from kvpool.core.errors import BadArgument, KvpoolError, Unsupported

log = logging.getLogger("sglang.kvpool")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Attached:
    """A host pool and its pages. `memory` keeps the pool's tensors, so that addresses stay valid."""

    pool: Any
    store: PageStore
    memory: Sequence[torch.Tensor]
    flat: bool  # whether flat pages have the bytes of stored ones, in their order


class KVPoolHiCacheStorage(HiCacheStorage):
    """HiCache's third tier. One object a rank."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        """Raises: BadArgument for settings that are none."""
        self._config = storage_config
        self._settings = settings_of(storage_config.extra_config)
        rank = f"tp{storage_config.tp_rank}pp{storage_config.pp_rank}dp{storage_config.dp_rank}"
        self._line = NodeLine(self._settings, f"sglang-{rank}", engine="SGLang", log=log)
        self._attached: dict[str, _Attached] = {}
        self._weights = identity.weights_version()
        self._stats = TransferStats()

    # ------------------------------------------------------------ host pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Raises: Unsupported, BadArgument if the pages of this pool can't be shared."""
        super().register_mem_pool_host(mem_pool_host)
        if host_pools.has_bytes(mem_pool_host):
            self._attach(str(PoolName.KV), mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """Raises: as `register_mem_pool_host`."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if str(host_pool_name) not in self._attached and host_pools.has_bytes(host_pool):
            self._attach(str(host_pool_name), host_pool)

    def _attach(self, name: str, pool: Any) -> None:
        place = identity.placing(self._config, name, pool)
        pages = host_pools.pool_pages(pool, place.shards)
        spec = identity.namespace_of(self._config, name, pool, pages, place, self._settings)
        log.info("kvpool keeps pages of %s as %s", name, dict(identity.describe(spec)))
        memory = host_pools.buffers(pool)
        store = PageStore(self._line, self._settings, self._line.use(spec), pages, place.first_shard)
        self._attached[name] = _Attached(pool, store, memory, len(memory) == 1 and place.shards == 1)

    def _of(self, name: str) -> _Attached:
        """Raises: Unsupported once the weights are others: pages of both are under way then, alike in name."""
        if identity.weights_version() != self._weights:
            raise Unsupported(
                "the weights were updated in place: nothing is stored or found any more",
                hint="detach and attach the storage backend (/hicache/storage-backend)",
            )
        try:
            return self._attached[str(name)]
        except KeyError:
            raise BadArgument(f"host pool {name!r} was not registered") from None

    # ------------------------------------------------------------ what is there

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many pages are there before the first that is not."""
        return self._or(0, lambda: self._kv_pages(keys))

    def _kv_pages(self, keys: Sequence[str]) -> int:
        store = self._of(PoolName.KV).store
        return hits.leading(store.there(keys, prefix_only=True))

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """How much of a prompt can be had with all its pools.

        The pages of a pool of block groups never shorten the prefix; nothing is said about it.
        """

        def ask() -> PoolTransferResult:
            # A pool without bytes of its own is there wherever the others are.
            kv_pages = self._kv_pages(keys) if host_pools.has_bytes(self.mem_pool_host) else len(keys)
            ends: dict[str, hits.Bools] = {}
            for transfer in pool_transfers or ():
                if transfer.hit_policy is PoolHitPolicy.BLOCK_GROUPS:
                    continue
                there = self._of(transfer.name).store.there(keys[:kv_pages])
                if transfer.hit_policy is PoolHitPolicy.ALL_PAGES:
                    ends[transfer.name] = hits.ends_all(there)
                else:
                    ends[transfer.name] = hits.ends_trailing(there, max(len(transfer.keys or ()), 1))
            lengths, longest = hits.restorable(kv_pages, ends)
            found = {PoolName.KV: kv_pages} if kv_pages else {}
            return PoolTransferResult(lengths[-1] if lengths else 0, {**found, **longest}, lengths)

        return self._or(PoolTransferResult(0, {}, []), ask)

    # ------------------------------------------------------------ pages of the host pool

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Reads pages into the host pool; what follows the first that is not there is not read."""
        return self._load(PoolName.KV, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Stores pages of the host pool; True for what is in the pool now, whoever stored it."""
        before = extra_info.prefix_keys if extra_info is not None else None
        return self._store(PoolName.KV, keys, host_indices, before[-1] if before else "")

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {t.name: self._load(t.name, t.keys or [], t.host_indices) for t in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {t.name: self._store(t.name, t.keys or [], t.host_indices, "") for t in transfers}

    def _load(self, name: str, keys: Sequence[str], host_indices: torch.Tensor | None) -> list[bool]:
        def load(at: _Attached, numbers: host_pools.Int64s) -> hits.Bools:
            begin_s = time.monotonic()
            done = at.store.load(keys, numbers, self._settings.load_timeout_s)
            pages = int(np.count_nonzero(done))
            self._stats.loaded(pages, pages * at.store.page_bytes, time.monotonic() - begin_s)
            return done

        return self._move(name, keys, host_indices, load)

    def _store(self, name: str, keys: Sequence[str], host_indices: torch.Tensor | None, parent: str) -> list[bool]:
        def store(at: _Attached, numbers: host_pools.Int64s) -> hits.Bools:
            begin_s = time.monotonic()
            done = at.store.store(keys, numbers, self._settings.store_timeout_s, parent)
            pages = int(np.count_nonzero(done))
            self._stats.stored(pages, pages * at.store.page_bytes, time.monotonic() - begin_s)
            return done

        return self._move(name, keys, host_indices, store)

    def _move(
        self, name: str, keys: Sequence[str], host_indices: torch.Tensor | None,
        move: Callable[[_Attached, host_pools.Int64s], hits.Bools],
    ) -> list[bool]:  # fmt: skip
        def run() -> list[bool]:
            if str(name) == PoolName.KV and not host_pools.has_bytes(self.mem_pool_host):
                return [True] * len(keys)  # its bytes are in other pools
            at = self._of(name)
            if host_indices is None:
                raise BadArgument(f"pages of {name} without places in the host pool")
            return [bool(done) for done in move(at, host_pools.page_numbers(at.pool, host_indices, len(keys)))]

        return self._or([False] * len(keys), run)

    # ------------------------------------------------------------ flat pages

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """The page, in `target_location` or in new memory; None if it is not there."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: list[torch.Tensor] | None = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        def read() -> list[torch.Tensor | None]:
            at = self._with_flat_pages()
            targets = target_locations or [at.pool.get_dummy_flat_data_page() for _ in keys]
            if len(targets) != len(keys):
                raise BadArgument(f"{len(targets)} pages for {len(keys)} keys")
            rows = [host_pools.flat_page(at.store.pages, target, to_write=True) for target in targets]
            found = at.store.load_flat(keys, rows, self._settings.load_timeout_s)
            return [target if there else None for target, there in zip(targets, found, strict=True)]

        return self._or([None] * len(keys), read)

    def set(
        self, key: str, value: torch.Tensor | None = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        return self.batch_set([key], None if value is None else [value])

    def batch_set(
        self, keys: list[str], values: list[torch.Tensor] | None = None, target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:  # fmt: skip
        """Stores flat pages; whether all are in the pool now."""

        def write() -> bool:
            at = self._with_flat_pages()
            if values is None or len(values) != len(keys):
                raise BadArgument("flat pages are stored by value, one a key")
            rows = [host_pools.flat_page(at.store.pages, value, to_write=False) for value in values]
            return bool(at.store.store_flat(keys, rows, self._settings.store_timeout_s).all())

        return self._or(False, write)

    def _with_flat_pages(self) -> _Attached:
        at = self._of(PoolName.KV)
        if not at.flat:
            raise Unsupported(
                f"{type(at.pool).__name__} has no flat pages", hint='set "interface_v1": 1 in the extra config'
            )
        return at

    # ------------------------------------------------------------ life

    def clear(self) -> bool:
        """Removes this model's pages from the node, those that other engines of the same kind stored among them."""
        removed = [self._line.clear(at.store.namespace) for at in self._attached.values()]
        return all(count is not None for count in removed)

    def get_stats(self) -> Any:
        return self._stats.take() if self._config.enable_storage_metrics else None

    def close(self) -> None:
        self._line.close()

    def _or(self, default: Result, call: Callable[[], Result]) -> Result:
        """What `call` returns, or `default` and a line in the log: SGLang's threads do not expect exceptions."""
        try:
            return call()
        except Exception as error:
            trace = None if isinstance(error, KvpoolError) else error
            self._line.quiet.warning(type(error).__name__, "kvpool: taken for a miss: %s", told(error), trace=trace)
        return default
