"""What the connector did, in vLLM's own log lines and /metrics."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

from engines.vllm.plans import Counts

_HELP = {
    "blocks_loaded": "Blocks read from the pool.",
    "blocks_failed": "Blocks that were to be read from the pool and were computed instead.",
    "blocks_saved": "Blocks stored in the pool, those that were there already among them.",
    "blocks_unsaved": "Blocks that could not be stored in the pool.",
    "bytes_loaded": "Bytes read from the pool.",
    "bytes_saved": "Bytes stored in the pool.",
    "load_us": "Microseconds for which steps waited for blocks from the pool.",
    "save_us": "Microseconds spent storing blocks, beside the engine's steps.",
    "lookups": "Looks into the pool for a prompt's blocks, by vLLM's scheduler.",
    "lookup_us": "Microseconds for which vLLM's scheduler waited for them.",
}


class PoolStats(KVConnectorStats):
    """Sums over an interval and over workers; `data` has the fields of `Counts`."""

    @classmethod
    def of(cls, counts: Counts) -> PoolStats:
        return cls(data=asdict(counts))

    def reset(self) -> None:
        self.data = asdict(Counts())

    def aggregate(self, other: KVConnectorStats) -> PoolStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"kvpool {name}": value for name, value in self.data.items() if value}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class PoolPromMetrics(KVConnectorPromMetrics):
    """Counters `vllm:kvpool_*_total`."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in _HELP.items():
            counter = self._counter_cls(name=f"vllm:kvpool_{name}", documentation=text, labelnames=labelnames)
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if value and name in self._counters:
                self._counters[name][engine_idx].inc(value)
