"""Whose blocks are whose, read from vLLM's own configuration classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-engines")

import torch
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MLAAttentionSpec,
    RSWASpec,
    UniformTypeKVCacheSpecs,
)

from engines.vllm.layout import EngineLayout, engine_layout
from engines.vllm.plans import LoadMode
from engines.vllm.settings import ConnectorSettings
from kvpool.core.errors import Unsupported
from tests.vllm_real.stepping import BLOCK_TOKENS, MODEL, cache_config, vllm_config

BLOCKS = 20


def layout(cache: KVCacheConfig | None = None, settings: dict[str, Any] | None = None, **changes: Any) -> EngineLayout:
    """Of one group of full attention, or of `cache`; `changes` are of vLLM's configuration, as dotted names."""
    config = vllm_config(BLOCKS, 32, 0)
    for name, value in changes.items():
        *path, last = name.split("__")
        at: Any = config
        for step in path:
            at = getattr(at, step)
        setattr(at, last, value)
    return engine_layout(config, cache or cache_config(BLOCKS, False), ConnectorSettings.of(settings or {}, {}))


def full(heads: int = 1, **fields: Any) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=heads, head_size=1, dtype=torch.float32, **fields)


def one_group(specs: dict[str, FullAttentionSpec]) -> KVCacheConfig:
    """Layers of one group with their own sizes, one behind the other in memory."""
    uniform = UniformTypeKVCacheSpecs.from_specs(specs)
    assert uniform is not None
    tensors = [
        KVCacheTensor(spec.page_size_bytes * BLOCKS, [name], spec.page_size_bytes * BLOCKS, spec.page_size_bytes)
        for name, spec in specs.items()
    ]
    return KVCacheConfig(
        num_blocks=BLOCKS, kv_cache_tensors=tensors, kv_cache_groups=[KVCacheGroupSpec(list(specs), uniform)],
        hash_block_size=BLOCK_TOKENS, kv_cache_layout="test",
    )  # fmt: skip


def test_workers_and_scheduler_agree_about_layers_of_several_sizes() -> None:
    """vLLM's scheduler is told the first layer's spec alone."""
    workers = one_group({"layer.0": full(1), "layer.1": full(3)})
    schedulers = generate_scheduler_kv_cache_config([workers])
    assert schedulers.kv_cache_groups[0].kv_cache_spec == full(1)
    assert layout(workers).spec == layout(schedulers).spec
    assert layout(workers).spec.groups[0].block_bytes == 4 * BLOCK_TOKENS * 8
    assert layout(workers).spec.id() != layout(one_group({"layer.0": full(1), "layer.1": full(4)})).spec.id()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config__quantization": "fp8"},
        {"cache_config__cache_dtype": "fp8_e5m2"},
        {"cache_config__kv_cache_dtype_skip_layers": ["1"]},
        {"model_config__hf_config__rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        {"cache_config__prefix_caching_hash_algo": "sha256"},
        {"model_config__dtype": torch.bfloat16},
    ],
)
def test_what_changes_the_bytes_changes_the_namespace(changes: dict[str, Any]) -> None:
    assert layout().spec.id() == layout().spec.id()
    assert layout(**changes).spec.id() != layout().spec.id()


def test_two_kinds_of_8_bit_floats_do_not_share() -> None:
    one, same, other = (layout(cache_config__cache_dtype=name).spec.id() for name in ("fp8", "fp8_e4m3", "fp8_e5m2"))
    assert one == same != other


def test_weights_are_told_by_their_files(tmp_path: Path) -> None:
    copy = tmp_path / MODEL.name
    copy.mkdir()
    for path in MODEL.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    settings = {"model_id": ""}
    assert layout(None, settings, model_config__model=str(copy)).spec.id() == layout(None, settings).spec.id()
    (copy / "modeling.py").write_text("# changes what the model computes")
    assert layout(None, settings, model_config__model=str(copy)).spec.id() != layout(None, settings).spec.id()
    named = {"model_id": "named"}
    assert layout(None, named, model_config__model=str(copy)).spec.id() == layout(None, named).spec.id()


def of_kind(spec: FullAttentionSpec) -> KVCacheConfig:
    tensor = KVCacheTensor(spec.page_size_bytes * BLOCKS, ["a"], spec.page_size_bytes * BLOCKS, spec.page_size_bytes)
    return KVCacheConfig(
        num_blocks=BLOCKS, kv_cache_tensors=[tensor], kv_cache_groups=[KVCacheGroupSpec(["a"], spec)],
        hash_block_size=BLOCK_TOKENS, kv_cache_layout="test",
    )  # fmt: skip


def test_kinds_that_are_not_known_are_refused() -> None:
    fields = {"block_size": BLOCK_TOKENS, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    assert layout(of_kind(MLAAttentionSpec(**fields))).shapes[0].window_tokens == 0
    with pytest.raises(Unsupported, match="RSWASpec"):
        layout(of_kind(RSWASpec(**fields, rswa_window=8)))
    with pytest.raises(Unsupported, match="xxhash") as refused:
        layout(cache_config__prefix_caching_hash_algo="xxhash")
    assert "sha256" in refused.value.hint
    for degree in ("pipeline_parallel_size", "decode_context_parallel_size"):
        with pytest.raises(Unsupported, match="parallelism"):
            layout(**{f"parallel_config__{degree}": 2})


@pytest.mark.parametrize(("rank", "shard", "stores"), [(0, 0, True), (1, 0, False), (2, 1, True), (3, 1, False)])
def test_ranks_with_the_same_bytes_share_a_shard(rank: int, shard: int, stores: bool) -> None:
    cache = dataclasses.replace(cache_config(BLOCKS, False), kv_tp_replicas=2)
    of_rank = layout(cache, parallel_config__tensor_parallel_size=4, parallel_config__rank=rank)
    assert (of_rank.shard, of_rank.shard_count, of_rank.stores) == (shard, 2, stores)
    assert of_rank.spec.groups[0].shard_count == 2


def test_how_blocks_are_loaded() -> None:
    from engines.vllm.connector import load_mode

    config = vllm_config(BLOCKS, 32, 0)
    assert load_mode(config, cache_config(BLOCKS, False)) is LoadMode.IN_STEP
    assert load_mode(config, cache_config(BLOCKS, True)) is LoadMode.AHEAD
