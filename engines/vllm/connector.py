"""`KVPoolConnector`: vLLM's interface to a KV store, over a kvpool node of the same host.

    --kv-transfer-config '{"kv_connector": "KVPoolConnector", "kv_connector_module_path": "engines.vllm.connector",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"node": "127.0.0.1:7701"}}'

vLLM makes one object in its scheduler and one in each worker. The scheduler's says how much of a prompt the pool has
and plans what each step loads and stores; the workers' carry the plans out.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from engines.vllm import handoffs
from engines.vllm.layout import engine_layout, extra_config
from engines.vllm.plans import StepPlan
from engines.vllm.prefixes import KEY_BYTES
from engines.vllm.saving import SavePipeline
from engines.vllm.settings import ConnectorSettings
from engines.vllm.stats import PoolPromMetrics, PoolStats
from engines.vllm.tracking import RequestTracker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from engines.vllm.worker_side import WorkerSide

#: Below vLLM's own logger, whose settings it shares.
log = logging.getLogger("vllm.kvpool")

#: Share of the engine's blocks that may be held for stores under way; beyond it a step's blocks are not stored.
HELD_SHARE = 0.25
#: For stores that wait when the engine is shut down.
CLOSE_S = 5.0


def _recovers(config: VllmConfig, cache: KVCacheConfig) -> bool:
    """Whether vLLM computes a block that a step's load could not get, instead of ending or of going on without it."""
    return len(cache.kv_cache_groups) == 1 and not getattr(config, "use_v2_model_runner", False)


@dataclass
class PoolMetadata(KVConnectorMetadata):
    """A step's plan, on its way to the workers."""

    plan: StepPlan


@dataclass
class PoolWorkerMetadata(KVConnectorWorkerMetadata):
    """The step this came from, and the saves whose blocks a worker no longer reads: number -> workers."""

    step: int
    saved: Counter[int]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, PoolWorkerMetadata)
        return PoolWorkerMetadata(self.step, self.saved + other.saved)


class KVPoolConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module's text. A cache: whatever the pool can't do costs computing, and nothing else."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = ConnectorSettings.of(extra_config(vllm_config))
        self._layout = engine_layout(vllm_config, kv_cache_config, self._settings)
        transfer = self._kv_transfer_config
        name = f"vllm-{transfer.engine_id}-{role.name.lower()}-{self._layout.shard}"
        # Not before: vLLM's CPU worker looks through all modules when it starts, and trips over one that numba loads.
        from engines.vllm.pool_link import PoolLink

        self._link = PoolLink(self._settings, self._layout.spec, name)
        self._worker: WorkerSide | None = None
        self._tracker: RequestTracker | None = None
        self._saving: SavePipeline | None = None
        self._steps = 0
        #: Request -> tokens that vLLM had itself when it was matched last.
        self._matched: dict[str, int] = {}
        self._requests: dict[str, Request] = {}
        #: Of the step under way, if it loads anything: request -> its blocks. Others may share those that are loaded.
        self._loading: dict[str, list[int]] = {}
        self._handoffs = handoffs.HandoffWaits(self._settings.handoff_wait_s)
        if transfer.kv_load_failure_policy != "recompute":
            log.warning(
                'kvpool: kv_load_failure_policy is %r: a block lost on the way fails its request; set "recompute"',
                transfer.kv_load_failure_policy,
            )
        if role is KVConnectorRole.SCHEDULER:
            reusable = bool(vllm_config.cache_config.enable_prefix_caching)
            if not reusable:
                log.warning("kvpool: vLLM caches no prefixes of this model or by its settings: the pool is not used")
            save = reusable and self._settings.save and transfer.is_kv_producer
            self._tracker = RequestTracker(self._layout.shapes, self._layout.hash_tokens, self._lookup, save=save)
            self._loads = reusable and self._settings.load and transfer.is_kv_consumer
            if self._loads and not _recovers(vllm_config, kv_cache_config):
                log.warning("kvpool: vLLM can't recover from a lost block with this cache or runner: nothing is loaded")
                self._loads = False

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # ------------------------------------------------------------ workers

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from engines.vllm.cache_memory import group_memory
        from engines.vllm.worker_side import WorkerSide

        blocks = self._kv_cache_config.num_blocks
        memories = [
            group_memory([kv_caches[layer] for layer in layers], blocks, group.block_bytes)
            for layers, group in zip(self._layout.layers, self._layout.spec.groups, strict=True)
        ]
        self._worker = WorkerSide(self._link, self._layout.shard, memories)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.load(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are through when the forward begins."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Whole blocks are stored, when all layers are computed."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.save(self._plan())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._worker is None else self._worker.take_failed_blocks()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._worker is None:
            return None
        stats = PoolStats.of(self._worker.take_counts())
        return None if stats.is_empty() else stats

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        if self._worker is None:
            return None
        return PoolWorkerMetadata(self._plan().number, Counter(self._worker.take_saved()))

    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, PoolMetadata)
        return metadata.plan

    # ------------------------------------------------------------ scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        blocks = gpu_block_pool.blocks
        self._block_pool = gpu_block_pool
        self._saving = SavePipeline(
            blocks_max=int(HELD_SHARE * len(blocks)),
            workers=self._vllm_config.parallel_config.world_size,
            hold=lambda ids: gpu_block_pool.touch([blocks[i] for i in ids]),
            free=lambda ids: gpu_block_pool.free_blocks([blocks[i] for i in ids]),
        )

    def on_new_request(self, request: Request) -> None:
        # vLLM's hashes name an adapter by its name and path: which weights are there, nobody can tell.
        if request.lora_request is None:
            self._requests[request.request_id] = request

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._tracker is not None
        self._matched[request.request_id] = num_computed_tokens
        if not self._loads or request.skip_reading_prefix_cache or request.request_id not in self._requests:
            return 0, False
        expected = min(handoffs.tokens_of(request.kv_transfer_params), self._tracker.reach(request.num_tokens))
        now_s = time.monotonic()
        if expected > num_computed_tokens and not self._handoffs.looks(request.request_id, now_s):
            return None, False
        tokens = self._tracker.match(request.block_hashes, request.num_tokens, num_computed_tokens)
        if num_computed_tokens + tokens < expected and self._link.is_up:
            if self._handoffs.lacks(request.request_id, now_s):
                return None, False
            if self._handoffs.gives_up(request.request_id):
                log.warning("kvpool: the blocks of request %s did not come in time", request.request_id)
        return tokens, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        assert self._tracker is not None
        computed = self._matched.get(request.request_id, 0)
        block_ids = self._own_groups(blocks.get_block_ids())
        self._tracker.allocated(request.request_id, request.block_hashes, computed, num_external_tokens, block_ids)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self._tracker is not None and self._saving is not None
        self._steps += 1
        saves = []
        state = scheduler_output.kv_connector_block_state
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            request = self._requests.get(request_id)
            block_ids = None if state is None else state.get_block_ids(request_id)
            if request is None or block_ids is None:
                continue
            before = request.num_computed_tokens
            transfer = self._tracker.scheduled(
                request_id, request.block_hashes, before, before + count, self._own_groups(block_ids)
            )
            if transfer is not None:
                saves.append(transfer)
        self._saving.computes(self._steps, saves)
        loads = self._tracker.take_loads()
        self._loading = {}
        if loads and state is not None:
            steps_requests = scheduler_output.num_scheduled_tokens
            self._loading = {r: list((state.get_block_ids(r) or ((),))[0]) for r in steps_requests}
        return PoolMetadata(
            StepPlan(
                number=self._steps,
                idle=not scheduler_output.total_num_scheduled_tokens,
                loads=loads,
                saves=self._saving.take_confirmed(),
            )
        )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self._saving is None:
            return
        metadata = connector_output.kv_connector_worker_meta
        if connector_output.invalid_block_ids:
            self._saving.failed()
            self._distrust(connector_output.invalid_block_ids)
        self._loading = {}
        if metadata is not None:
            assert isinstance(metadata, PoolWorkerMetadata)
            self._saving.computed(metadata.step)
            self._saving.stored(metadata.saved)

    def _distrust(self, bad: set[int]) -> None:
        """Takes their hashes off blocks that stand on one that was not loaded, and has whoever shares them compute.

        vLLM gives blocks their hashes before they are loaded and leaves them, and it does not look at requests that
        were aborted meanwhile: others would find what is spoiled.
        """
        spoiled = set(bad)
        block_tokens = self._layout.shapes[0].block_tokens
        for request_id, block_ids in self._loading.items():
            first = next((n for n, block in enumerate(block_ids) if block in bad), None)
            if first is None:
                continue
            spoiled.update(block for block in block_ids[first:] if block)
            request = self._requests.get(request_id)
            if request is not None:  # else it has ended
                request.num_computed_tokens = min(request.num_computed_tokens, first * block_tokens)
        self._block_pool.evict_blocks(spoiled)

    def reset_cache(self) -> bool | None:
        """The weights may be others now: nothing is shared any more with what was stored before, by whomever."""
        if self._tracker is None or self._saving is None:
            return None
        self._saving.failed()
        self._saving.drop_confirmed()
        self._tracker.rename(os.urandom(KEY_BYTES))
        return True

    def has_pending_push_work(self) -> bool:
        return self._saving is not None and self._saving.has_work

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._tracker is not None
        stored = self._tracker.forget(request.request_id)
        self._handoffs.forget(request.request_id)
        self._matched.pop(request.request_id, None)
        self._requests.pop(request.request_id, None)
        if stored and handoffs.asks(request.kv_transfer_params):
            return False, {handoffs.TOKENS: stored}
        return False, None

    def _lookup(self, group: int, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return self._link.lookup(group, range(self._layout.shard_count), keys)

    def _own_groups(self, block_ids: tuple[list[int], ...]) -> list[list[int]]:
        return [block_ids[group] for group in self._layout.vllm_groups]

    # ------------------------------------------------------------ both

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close(CLOSE_S)
        self._link.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return PoolStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> KVConnectorPromMetrics:
        return PoolPromMetrics(*args, **kwargs)
