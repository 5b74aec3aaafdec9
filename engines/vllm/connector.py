"""`KVPoolConnector`: vLLM's interface to a KV store, over a kvpool node of the same host.

    --kv-transfer-config '{"kv_connector": "KVPoolConnector", "kv_connector_module_path": "engines.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"node": "127.0.0.1:7701"}}'

vLLM makes one object in its scheduler and one in each worker. The scheduler's says how much of a prompt the pool has
and plans what each step loads and stores; the workers' carry the plans out.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from engines.vllm.layout import engine_layout, extra_config
from engines.vllm.plans import LoadMode, StepPlan
from engines.vllm.scheduler_side import SchedulerSide
from engines.vllm.settings import ConnectorSettings
from engines.vllm.stats import PoolPromMetrics, PoolStats
from kvpool.core.errors import Unsupported

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

#: For stores that wait when the engine is shut down.
CLOSE_S = 5.0


def load_mode(config: VllmConfig, cache: KVCacheConfig) -> LoadMode:
    """Within the step, where vLLM computes a block that a step's load could not get: not with several groups, where it
    ends, nor with the runner that keeps its own count of computed tokens, where it goes on without."""
    recovers = len(cache.kv_cache_groups) == 1 and not getattr(config, "use_v2_model_runner", False)
    return LoadMode.IN_STEP if recovers else LoadMode.AHEAD


@dataclass
class PoolMetadata(KVConnectorMetadata):
    """A step's plan, on its way to the workers."""

    plan: StepPlan


@dataclass
class PoolHandshake(KVConnectorHandshakeMetadata):
    """Where a worker stores: the scheduler's side has to look there."""

    namespace: bytes


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
        if vllm_config.max_concurrent_batches > 1 and load_mode(vllm_config, kv_cache_config) is LoadMode.IN_STEP:
            raise Unsupported(
                "several steps at a time are not supported by the kvpool connector yet",
                hint="give vLLM --no-async-scheduling",
            )
        name = f"vllm-{self._kv_transfer_config.engine_id}-{role.name.lower()}-{self._layout.shard}"
        # Not before: vLLM's CPU worker looks through all modules when it starts, and trips over one that numba loads.
        from engines.vllm.pool_link import PoolLink

        self._link = PoolLink(self._settings, self._layout.spec, name)
        self._worker: WorkerSide | None = None
        self._scheduler: SchedulerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            # Read by vLLM once this has returned. Its default fails a request for each block that was evicted.
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
            self._scheduler = self._make_scheduler_side()

    def _make_scheduler_side(self) -> SchedulerSide:
        transfer, cache = self._kv_transfer_config, self._kv_cache_config
        reusable = bool(self._vllm_config.cache_config.enable_prefix_caching)
        if not reusable:
            log.warning("kvpool: vLLM caches no prefixes of this model or by its settings: the pool is not used")
        loads = reusable and self._settings.load and transfer.is_kv_consumer
        return SchedulerSide(
            self._link,
            self._layout.shapes,
            self._layout.vllm_groups,
            self._layout.hash_tokens,
            self._layout.shard_count,
            workers=self._vllm_config.parallel_config.world_size,
            loads=load_mode(self._vllm_config, cache) if loads else LoadMode.OFF,
            save=reusable and self._settings.save and transfer.is_kv_producer,
            handoff_wait_s=self._settings.handoff_wait_s,
        )

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
        self._worker = WorkerSide(
            self._link,
            self._layout.shard,
            memories,
            load_timeout_s=self._settings.load_timeout_s,
            stores=self._layout.stores,
        )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return PoolHandshake(bytes(self._link.namespace))

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

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        received, failed = (set(), set()) if self._worker is None else self._worker.take_received()
        return KVConnectorTransferResults(finished_recving=received, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._worker is None else self._worker.take_failed_blocks()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        side = self._worker or self._scheduler
        if side is None:
            return None
        stats = PoolStats.of(side.take_counts())
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

    @property
    def _side(self) -> SchedulerSide:
        assert self._scheduler is not None, "a worker's connector was asked what only the scheduler's knows"
        return self._scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        for rank, told in metadata.items():
            assert isinstance(told, PoolHandshake)
            if told.namespace != self._link.namespace:
                log.error(
                    "kvpool: worker %d stores in namespace %s, vLLM's scheduler would look in %s: the pool is not used "
                    "(please report this, with vLLM's command line)",
                    rank, told.namespace.hex(), self._link.namespace.hex(),
                )  # fmt: skip
                self._side.switch_off()

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._side.bind(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        self._side.began(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._side.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._side.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return PoolMetadata(self._side.plan(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        metadata = connector_output.kv_connector_worker_meta
        assert metadata is None or isinstance(metadata, PoolWorkerMetadata)
        self._side.output(
            metadata.step if metadata else None,
            metadata.saved if metadata else {},
            connector_output.invalid_block_ids or set(),
            connector_output.failed_recving or set(),
        )

    def reset_cache(self) -> bool | None:
        self._side.reset()
        return True

    def has_pending_push_work(self) -> bool:
        return self._side.has_work

    def has_pending_block_frees(self) -> bool:
        return self._side.gives_back_soon()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self._side.finished(request)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._side.finished(request)

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
