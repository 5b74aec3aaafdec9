"""What vLLM's /metrics page says of an engine: how large its cache is, how loaded it is, what computing took. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from engines.openai_server.exposition import MetricsPage
from kvpool.core.errors import Unsupported

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
USAGE = "vllm:kv_cache_usage_perc"
CACHE = "vllm:cache_config_info"
STARTED = "process_start_time_seconds"
PREFILL_S, PREFILL_COUNT = "vllm:request_prefill_time_seconds_sum", "vllm:request_prefill_time_seconds_count"
PROMPT_TOKENS, COMPUTED_TOKENS = "vllm:request_prompt_tokens_sum", "vllm:request_prefill_kv_computed_tokens_sum"
STEP_S, STEP_COUNT = "vllm:inter_token_latency_seconds_sum", "vllm:inter_token_latency_seconds_count"

NAMES = frozenset(
    {
        RUNNING, WAITING, USAGE, CACHE, STARTED, PREFILL_S, PREFILL_COUNT, PROMPT_TOKENS, COMPUTED_TOKENS, STEP_S,
        STEP_COUNT,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """An engine's cache. `hash_tokens`: tokens that one of its block hashes covers."""

    block_tokens: int
    hash_tokens: int
    kv_tokens: int
    algorithm: str
    dtype: str
    reuses_prefixes: bool


def cache_facts(page: MetricsPage) -> CacheFacts:
    """Raises: Unsupported if the page is not one of a vLLM engine that has started."""
    told = page.labels.get(CACHE, {})
    block_tokens, blocks = _whole(told.get("block_size")), _whole(told.get("num_gpu_blocks"))
    if not block_tokens or not blocks:
        raise Unsupported(
            "its /metrics page tells nothing of a KV cache", hint="is this vLLM, and does it serve /metrics?"
        )
    return CacheFacts(
        block_tokens=block_tokens,
        hash_tokens=_whole(told.get("hash_block_size")) or block_tokens,
        kv_tokens=_whole(told.get("kv_cache_size_tokens")) or blocks * block_tokens,
        algorithm=told.get("prefix_caching_hash_algo", ""),
        dtype=told.get("cache_dtype", ""),
        reuses_prefixes=told.get("enable_prefix_caching", "True") == "True",
    )


def _whole(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class PrefillSample:
    """Mean of the requests that ended between two looks at the page."""

    new_tokens: int
    cached_tokens: int
    duration_us: int


@dataclass(frozen=True, slots=True)
class StepSample:
    """Mean decode step between two looks."""

    batch: int
    kv_tokens: int
    duration_us: int


@dataclass(frozen=True, slots=True)
class Load:
    """An engine's load at one look, and what was measured since the one before."""

    running: int = 0
    waiting: int = 0
    kv_tokens_free: int = 0
    prefill: tuple[PrefillSample, ...] = ()
    steps: tuple[StepSample, ...] = ()


class LoadTracker:
    """Feed it pages of one engine's process, in order."""

    def __init__(self, kv_tokens: int) -> None:
        self._kv_tokens = kv_tokens
        self._before: MetricsPage | None = None
        self._batch_before = 0

    def look(self, page: MetricsPage) -> Load:
        running = int(page.value(RUNNING))
        used = min(1.0, max(0.0, page.value(USAGE)))
        before, self._before = self._before, page
        batch, self._batch_before = self._batch_before or running, running
        kv_used = int(self._kv_tokens * used)
        return Load(
            running=running,
            waiting=int(page.value(WAITING)),
            kv_tokens_free=self._kv_tokens - kv_used,
            prefill=() if before is None else _prefills(before, page),
            steps=() if before is None else _steps(before, page, batch, kv_used),
        )


def _since(before: MetricsPage, page: MetricsPage, name: str) -> float:
    return page.value(name) - before.value(name)


def _prefills(before: MetricsPage, page: MetricsPage) -> tuple[PrefillSample, ...]:
    """One sample for all requests that ended: of several the page tells only sums."""
    count = int(_since(before, page, PREFILL_COUNT))
    new = _since(before, page, COMPUTED_TOKENS)
    if count < 1 or new < 1:
        return ()
    cached = max(0.0, _since(before, page, PROMPT_TOKENS) - new)
    duration_us = int(_since(before, page, PREFILL_S) * 1e6 / count)
    if duration_us < 1:
        return ()
    return (PrefillSample(max(1, int(new / count)), int(cached / count), duration_us),)


def _steps(before: MetricsPage, page: MetricsPage, batch: int, kv_tokens: int) -> tuple[StepSample, ...]:
    count = _since(before, page, STEP_COUNT)
    duration_us = int(_since(before, page, STEP_S) * 1e6 / count) if count >= 1 else 0
    if not batch or duration_us < 1 or not kv_tokens:
        return ()
    return (StepSample(batch, kv_tokens, duration_us),)
