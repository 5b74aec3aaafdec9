"""Whose blocks an engine can share, and where a block's bytes lie in its cache: read from vLLM's own configuration.

vLLM's blocks are opaque to the pool: whole blocks are moved, nobody looks inside. So whatever changes the bytes or
their order within a block is part of the namespace, and another engine finds nothing rather than something wrong.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from engines.attached.fingerprint import folder_digest
from engines.vllm.prefixes import GroupShape
from engines.vllm.settings import ConnectorSettings
from kvpool.core.errors import Unsupported
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec

#: Part of every namespace: changed when this module's idea of a block's bytes changes.
LAYOUT_VERSION = 3
#: vLLM's names of dtypes of a cache that are one.
DTYPE_ALIASES = {"fp8": "fp8_e4m3"}
#: Ways to load weights that take them from the model's folder.
FILE_FORMATS = ("auto", "hf", "safetensors", "pt")
#: Of vLLM's ways to hash, those without known collisions.
SAFE_HASHES = ("sha256", "sha256_cbor")


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """An engine's groups as the pool knows them."""

    spec: NamespaceSpec
    shapes: tuple[GroupShape, ...]
    #: vLLM's number of each group, and the layers that have bytes of their own, in the order of a block's bytes.
    vllm_groups: tuple[int, ...]
    layers: tuple[tuple[str, ...], ...]
    hash_tokens: int
    shard: int  # of this rank
    shard_count: int
    #: Whether this rank stores its shard: of ranks that hold the same bytes, one does.
    stores: bool


def engine_layout(config: VllmConfig, cache: KVCacheConfig, settings: ConnectorSettings) -> EngineLayout:
    """Raises: Unsupported for caches whose blocks can't be named by hashes, or of kinds not known here."""
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise Unsupported("pipeline parallelism is not supported by the kvpool connector yet")
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise Unsupported("context parallelism is not supported by the kvpool connector yet")
    degree, replicas = parallel.tensor_parallel_size, cache.kv_tp_replicas
    shared = {layer for group in cache.kv_cache_groups for layer in group.layer_names}
    own = [layer for tensor in cache.kv_cache_tensors for layer in tensor.layers if layer in shared]
    # Not from the groups' specs: of several kinds of layers in one, vLLM's scheduler is told the first alone.
    pages = {layer: min(t.layer_stride, t.block_stride) for t in cache.kv_cache_tensors for layer in t.layers}
    specs: list[GroupSpec] = []
    shapes: list[GroupShape] = []
    layers: list[tuple[str, ...]] = []
    kinds: list[str] = []
    hash_tokens = cache.hash_block_size or config.cache_config.block_size
    for number in cache.prefix_cacheable_group_ids:
        group = cache.kv_cache_groups[number]
        names = tuple(layer for layer in own if layer in group.layer_names)
        pool_group = len(specs)
        first = _first(group.kv_cache_spec)
        kind, window = _kind(first)
        if group.kv_cache_spec.block_size % hash_tokens:
            raise Unsupported(f"blocks of {group.kv_cache_spec.block_size} tokens, hashed by {hash_tokens}")
        specs.append(
            GroupSpec(
                id=pool_group,
                kind=kind,
                layers=tuple(range(len(names))),
                block_tokens=group.kv_cache_spec.block_size,
                shard_count=degree // replicas,
                section_count=1,
                block_bytes=sum(pages[layer] for layer in names),
                window_tokens=window,
            )
        )
        shapes.append(GroupShape(pool_group, group.kv_cache_spec.block_size, window))
        layers.append(names)
        kinds.append(repr((repr(first), [(layer, pages[layer]) for layer in names])))
    if not specs:
        raise Unsupported("no group of this model's cache can be named by block hashes")
    spec = NamespaceSpec(
        model=model_identity(config, settings),
        revision="",
        dtype=str(config.model_config.dtype),
        backend=f"vllm {vllm.__version__} {torch.device(config.device_config.device_type).type} {machine()}",
        layout=" ".join(
            (
                f"vllm/{LAYOUT_VERSION} {cache.kv_cache_layout} tp{degree}",
                _hashing(config, hash_tokens),
                _computing(config),
                ";".join(kinds),
            )
        ),
        hash="sha256/1",
        groups=tuple(specs),
    )
    spec.validate()
    return EngineLayout(
        spec=spec,
        shapes=tuple(shapes),
        vllm_groups=tuple(cache.prefix_cacheable_group_ids),
        layers=tuple(layers),
        hash_tokens=hash_tokens,
        shard=parallel.rank % degree // replicas,
        shard_count=degree // replicas,
        stores=parallel.rank % degree % replicas == 0,
    )


def model_identity(config: VllmConfig, settings: ConnectorSettings) -> str:
    """What tells this model's blocks from those of any other: a setting, or a digest of its files."""
    model = config.model_config
    if settings.model_id:
        return settings.model_id
    folder = Path(model.model)
    digest = folder_digest(folder)
    if digest:
        return f"{folder.resolve().name}@{digest[:32]}"
    return f"{model.model}@{getattr(model.hf_config, '_commit_hash', None) or model.revision or 'main'}"


def machine() -> str:
    """With AMX, vLLM's CPU kernels pack a block's bytes in another order."""
    return platform.machine() + ("-amx" if torch.cpu._is_amx_tile_supported() else "")


def _computing(config: VllmConfig) -> str:
    """What changes a model's KV besides its files, as a digest: overrides of its configuration, quantization."""
    model, cache = config.model_config, config.cache_config
    skipped = ("_name_or_path", "transformers_version", "_commit_hash")
    told = {name: value for name, value in model.hf_config.to_dict().items() if name not in skipped}
    long_rope = "longrope" in json.dumps(told, default=str)
    loaded = str(config.load_config.load_format)
    made_up = loaded == "dummy"
    text = json.dumps(
        [
            told,
            str(model.quantization),
            # Of two kinds of 8-bit floats vLLM's specs say the same.
            DTYPE_ALIASES.get(str(cache.cache_dtype), str(cache.cache_dtype)),
            sorted(map(str, cache.kv_cache_dtype_skip_layers or ())),
            model.max_model_len if long_rope else 0,
            model.seed if made_up else 0,
            # Weights that come from elsewhere than the model's folder.
            "" if loaded in FILE_FORMATS else loaded,
            config.load_config.model_loader_extra_config,
            getattr(model.multimodal_config, "mm_processor_kwargs", None),
        ],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _hashing(config: VllmConfig, hash_tokens: int) -> str:
    """How vLLM names blocks. Where its hashes begin with a seed of each process, nothing is shared.

    Raises: Unsupported for hashes for which two prompts with one name can be made on purpose.
    """
    algorithm = config.cache_config.prefix_caching_hash_algo
    if algorithm not in SAFE_HASHES:
        raise Unsupported(
            f"prefix caching by {algorithm} lets a client make another's prompt look like its own",
            hint=f"give vLLM --prefix-caching-hash-algo {' or '.join(SAFE_HASHES)}",
        )
    text = f"{algorithm}:{hash_tokens}:{kv_cache_utils.get_none_hash_seed()}"
    if algorithm == "sha256":  # of a pickle, whose form is that of one Python
        text += f":py{sys.version_info.major}.{sys.version_info.minor}"
    return text


def _first(spec: KVCacheSpec) -> KVCacheSpec:
    """What vLLM's scheduler takes for the spec of a group whose layers differ in size only."""
    return spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def _kind(spec: KVCacheSpec) -> tuple[GroupKind, int]:
    """Kind of a group, and its window in tokens (0 = none). Raises: Unsupported.

    Not for subclasses: what they add may make the same tokens have other bytes.
    """
    if type(spec) is SlidingWindowSpec:
        return GroupKind.WINDOW, spec.sliding_window + spec.extra_retained_tokens
    if type(spec) is MLAAttentionSpec:
        return GroupKind.MLA, 0
    if type(spec) is FullAttentionSpec:
        return GroupKind.FULL, 0
    raise Unsupported(f"caches of kind {type(spec).__name__} are not supported by the kvpool connector yet")


def extra_config(config: VllmConfig) -> Mapping[str, Any]:
    transfer = config.kv_transfer_config
    return {} if transfer is None else transfer.kv_connector_extra_config
