"""Whose pages an engine can share: read from SGLang's own configuration and from its host pools.

Pages are opaque to the pool: whole pages are moved, nobody looks inside. So whatever changes the bytes of a page or
their order is part of the namespace, and another engine finds nothing rather than something wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.runtime_context import get_server_args, get_serving

from engines.attached.fingerprint import folder_digest
from engines.sglang.pages import Pages
from engines.sglang.settings import BackendSettings
from kvpool.core.errors import Unsupported
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec

#: Part of every namespace: changed when this package's idea of a page's bytes, or of its key, changes.
LAYOUT_VERSION = 1
#: What of SGLang's arguments, besides the model's files, changes the KV that it computes or how it is laid out.
COMPUTING = (
    "load_format", "model_loader_extra_config", "context_length", "model_impl", "json_model_override_args", "dtype",
    "quantization", "quantization_param_path", "kv_cache_dtype", "modelopt_quant", "modelopt_checkpoint_restore_path",
    "quantize_and_serve", "rl_quant_profile", "attention_backend", "prefill_attention_backend",
    "decode_attention_backend", "mamba_ssm_dtype", "prefill_kv_cache_dequant_dtype", "qsa_indexer_dtype",
    "speculative_algorithm", "speculative_draft_model_path", "speculative_draft_model_revision",
    "speculative_draft_kv_cache_dtype", "speculative_draft_model_quantization", "custom_weight_loader",
    "decrypted_config_file", "dllm_algorithm", "dllm_algorithm_config", "kt_weight_path", "kt_method",
    "kt_max_deferred_experts_per_token",
)  # fmt: skip

#: Ways of loading that take weights from somewhere else than the model's path: it says nothing of them.
FROM_ELSEWHERE = ("remote", "remote_instance", "rdma", "ipc_cache", "private")


@dataclass(frozen=True, slots=True)
class Placing:
    """What part of the model this process has, as shards of a namespace.

    first_shard, shards: those of this process, of `shard_count`.
    """

    first_shard: int
    shards: int
    shard_count: int


def placing(config: HiCacheStorageConfig, pool_name: str, pool: object) -> Placing:
    """Ranks that hold the same bytes share one shard; else each has its own, or several of another's size.

    Raises: Unsupported for ways of sharing a model out that are not known here.
    """
    if config.dcp_size > 1:
        raise Unsupported("decode context parallelism is not supported by the kvpool backend yet")
    if is_replicated(config, pool_name, pool):
        return Placing(0, 1, 1)
    if pool_name == PoolName.KV and config.should_split_heads and config.tp_lcm_size:
        parts = config.tp_lcm_size // config.tp_size
        return Placing(config.tp_rank * parts, parts, config.tp_lcm_size)
    return Placing(config.tp_rank, 1, config.tp_size)


def is_replicated(config: HiCacheStorageConfig, pool_name: str, pool: object) -> bool:
    """Whether all ranks hold the same bytes. The KV of MLA is; its state and MHA drafts beside it are not."""
    if not config.is_mla_model or pool_name == PoolName.MAMBA:
        return False
    if pool_name in (PoolName.DRAFT, PoolName.DRAFT_SWA):
        names = {cls.__name__ for cls in type(pool).__mro__}
        return bool(names & {"MLATokenToKVPoolHost", "DeepSeekV4PagedHostPool"})
    return True


def namespace_of(
    config: HiCacheStorageConfig, pool_name: str, pool: Any, pages: Pages, place: Placing, settings: BackendSettings
) -> NamespaceSpec:
    """Raises: Unsupported if nothing tells which weights the model has."""
    arguments = server_arguments()
    first = int(getattr(pool, "start_layer", 0) or 0)
    layers = range(first, max(int(getattr(pool, "end_layer", 0) or 0), first + 1))
    count = getattr(pool, "layer_num", len(layers))
    tag = (config.extra_config or {}).get("extra_backend_tag")
    heads = int(getattr(pool, "head_num", 1)) // place.shards
    form = getattr(pool, "storage_format_tag", None)
    told = (
        f"sglang/{LAYOUT_VERSION} {pool_name} {type(pool).__name__} {form} {pool.layout}",
        f"page{pool.page_size} heads{heads} layers{layers.start}-{layers.stop}",
        f"of{count}/{getattr(pool, 'target_layer_num', count)}",
        f"runs{','.join(str(plane.run_bytes) for plane in pages.shards[0])}",
        f"shards{place.shard_count} pp{config.pp_rank}/{config.pp_size} cp{config.attn_cp_rank}/{config.attn_cp_size}",
        f"mla{int(config.is_mla_model)} tag{tag} {computing(arguments)}",
    )
    spec = NamespaceSpec(
        model=model_identity(config, arguments, settings),
        revision="",
        dtype=str(pool.dtype).removeprefix("torch."),
        backend=f"sglang {sglang_version()}",
        layout=" ".join(told),
        hash="sha256/1",
        groups=tuple(
            GroupSpec(
                id=number,
                kind=_kind(config, pool_name),
                layers=tuple(layers),
                block_tokens=max(int(pool.page_size), 1),
                shard_count=place.shard_count,
                section_count=1,
                block_bytes=size,
            )
            for number, size in enumerate(pages.group_bytes)
        ),
    )
    spec.validate()
    return spec


def _kind(config: HiCacheStorageConfig, pool_name: str) -> GroupKind:
    if pool_name == PoolName.MAMBA:
        return GroupKind.STATE
    return GroupKind.MLA if config.is_mla_model else GroupKind.FULL


def server_arguments() -> object | None:
    """SGLang's arguments in this process, if it has any."""
    try:
        return get_server_args()
    except ValueError:
        return None


def computing(arguments: object | None) -> str:
    """A digest of the arguments that change KV."""
    told: dict[str, Any] = {name: getattr(arguments, name, None) for name in COMPUTING}
    told["adapters"] = adapters(getattr(arguments, "lora_paths", None))
    told["weights"] = weights_version()
    if str(told["load_format"]) == "dummy":  # weights made up from a seed
        told["random_seed"] = getattr(arguments, "random_seed", None)
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def weights_version() -> str:
    """What SGLang calls the weights that it computes with now; another one after an update in place that names it."""
    try:
        return str(get_serving().weight_version)
    except ValueError:  # nothing is published in this process
        return ""


def adapters(lora_paths: object) -> dict[str, str]:
    """Which weights the LoRA adapters have that SGLang was started with: it names pages by an adapter's path alone.

    Those that are loaded later get a random name in each process, and share nothing anyhow.
    """
    entries = list(lora_paths.items()) if isinstance(lora_paths, Mapping) else list(_listed(lora_paths))
    return {name: _files(path, None) for name, path in entries}


def _listed(lora_paths: Any) -> Iterator[tuple[str, str]]:
    """Name and path of each: given as NAME=PATH, PATH, a mapping or SGLang's own reference."""
    for entry in lora_paths or ():
        if isinstance(entry, str):
            name, _, path = entry.partition("=")
            yield name, path or name
        elif isinstance(entry, Mapping):
            yield str(entry["lora_name"]), str(entry["lora_path"])
        else:
            yield str(entry.lora_name), str(entry.lora_path)


def model_identity(config: HiCacheStorageConfig, arguments: object | None, settings: BackendSettings) -> str:
    """What tells this model's pages from those of any other: a setting, or a digest of its files.

    The name that SGLang gives to storage backends is the one it is served under, which says nothing of its weights.
    Raises: Unsupported if there is neither a setting nor a model path that the weights come from, or came from at the
    start: the version of an update is a name that two runs of training may give to different weights.
    """
    if settings.model_id:
        return settings.model_id
    path = str(getattr(arguments, "model_path", "") or "")
    elsewhere = str(getattr(arguments, "load_format", "")) in FROM_ELSEWHERE
    if not path or elsewhere or getattr(arguments, "checkpoint_engine_wait_weights_before_ready", False):
        raise Unsupported(
            f"nothing tells which weights {config.model_name!r} has", hint="set model_id in the extra config"
        )
    started = getattr(arguments, "weight_version", None)
    if started is not None and weights_version() not in ("", str(started)):
        raise Unsupported(
            f"the weights were updated in place since the start, to {weights_version()!r}",
            hint="attach with a model_id in the extra config that names these weights",
        )
    return _files(path, getattr(arguments, "revision", None))


def _files(path: str, revision: str | None) -> str:
    """What identifies the weights at a path or under a hub's name."""
    digest = folder_digest(Path(path))
    if digest:
        return f"{Path(path).resolve().name}@{digest[:32]}"
    return f"{path}@{_commit(path, revision) or revision or 'main'}"


def _commit(repository: str, revision: str | None) -> str:
    """Of a model that the hub's client has downloaded; empty if it has not."""
    try:
        found = try_to_load_from_cache(repository, "config.json", revision=revision)
    except ValueError:  # not the name of a repository
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""


def sglang_version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return "unknown"


def describe(spec: NamespaceSpec) -> Mapping[str, str]:
    """What to say in the log, so that two engines that do not find each other's pages can be compared."""
    return {"model": spec.model, "dtype": spec.dtype, "backend": spec.backend, "layout": spec.layout}
