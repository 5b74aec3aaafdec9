"""Loads a Hugging Face causal LM for paged steps and says who may share its KV."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from engines.torch.attention import ATTENTION, ROWS_MULTIPLE, Chunk, PagedBatch
from kvpool.core.errors import BadArgument, Unsupported
from kvpool.core.namespace import HASHES, SECTIONS_MAX, GroupKind, GroupSpec, NamespaceSpec

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONTEXT_DEFAULT = 4096
#: Rotary embeddings that depend on the longest sequence of a batch: their keys can't be reused.
_ROPE_UNSUPPORTED = ("dynamic", "longrope")
#: Fields of a configuration that say nothing about what is computed.
_CONFIG_IGNORED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True)
class KvShape:
    """KV of one token: layers × 2 × kv_heads × head_dim elements of `dtype`."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for paged steps."""

    module: PreTrainedModel
    name: str  # that clients use
    path: str  # local folder of weights and tokenizer; empty if made in memory
    digest: str  # of weights and configuration
    kv: KvShape
    context_tokens_max: int
    vocabulary_size: int
    eos_token_ids: tuple[int, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def namespace(self, block_tokens: int, *, exact: bool, hash_name: str = HASHES[0]) -> NamespaceSpec:
        """The specification under which this model's blocks are stored.

        Exact and fast steps give other bits, so they share nothing.
        """
        layers = self.kv.layers
        sections = max(n for n in range(1, SECTIONS_MAX + 1) if layers % n == 0)
        group = GroupSpec(
            id=0,
            kind=GroupKind.FULL,
            layers=tuple(range(layers)),
            block_tokens=block_tokens,
            shard_count=1,
            section_count=sections,
            block_bytes=block_tokens * self.kv.token_bytes,
            kv_heads=self.kv.kv_heads,
            head_dim=self.kv.head_dim,
        )
        spec = NamespaceSpec(
            model=self.digest,
            revision="",
            dtype=self.kv.dtype,
            backend=f"kvpool-torch/{self.device.type}/{'exact' if exact else 'fast'}",
            layout="lkthd",
            hash=hash_name,
            groups=(group,),
        )
        spec.validate()
        return spec

    def new_cache(self, block_count: int, block_tokens: int) -> torch.Tensor:
        """Zeroed (block_count + 1, layers, 2, block_tokens, kv_heads, head_dim); the last block is scratch."""
        # Stale content is read under a mask, and 0 * nan is nan: it has to be finite from the start.
        return torch.zeros(
            (block_count + 1, self.kv.layers, 2, block_tokens, self.kv.kv_heads, self.kv.head_dim),
            dtype=DTYPES[self.kv.dtype],
            device=self.device,
        )

    def forward(
        self,
        cache: torch.Tensor,
        chunks: Sequence[Chunk],
        token_ids: Sequence[int],
        rows: Sequence[int],
        *,
        exact: bool,
    ) -> torch.Tensor:
        """Computes one step and writes its KV to `cache`.

        Args:
            token_ids: of all chunks, one after another.
            rows: whose logits are wanted; at least one row is computed in any case.
        Returns: float (>= len(rows), vocabulary); rows beyond are padding.
        """
        if self.module.config._attn_implementation != ATTENTION:
            # Somebody used the module by itself: with other attention a step would silently see no cache.
            self.module.set_attn_implementation(ATTENTION)
        with torch.inference_mode():
            batch = PagedBatch(cache, chunks, exact=exact)
            ids = torch.tensor([*token_ids, *([0] * batch.padding)], device=self.device)
            # The output layer is a linear layer too: it needs the same padding as the step.
            wanted = list(rows) or [0]
            if exact:
                wanted += [wanted[0]] * (-len(wanted) % ROWS_MULTIPLE)
            return self.module(
                input_ids=ids[None],
                position_ids=batch.positions[None],
                attention_mask=None,
                use_cache=False,
                logits_to_keep=torch.tensor(wanted, device=self.device),
                paged=batch,
            ).logits[0]


def load_model(
    source: str | Path, *, name: str = "", dtype: str = "float32", device: str = "cpu", context_tokens_max: int = 0
) -> LoadedModel:
    """Loads a local folder or a hub id.

    Args:
        name: that clients use; empty = the last part of `source`.
        context_tokens_max: empty = the model's own limit.
    Raises: BadArgument if there is no such model, Unsupported if its attention is not.
    """
    folder = _folder(str(source))
    if dtype not in DTYPES:
        raise BadArgument(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation=ATTENTION)
    except (OSError, ValueError) as error:
        raise BadArgument(f"can't load a causal language model from {folder}: {error}") from error
    return _loaded(
        module.to(device).eval(),
        name=name or Path(source).name,
        path=str(folder),
        digest=_folder_digest(folder, module.config),
        dtype=dtype,
        context_tokens_max=context_tokens_max,
    )


def model_from_config(
    config: PretrainedConfig, *, seed: int = 0, dtype: str = "float32", name: str = "random"
) -> LoadedModel:
    """A model with random weights, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation=ATTENTION)
    digest = hashlib.sha256(_canonical_config(config) + f"random:{seed}".encode()).hexdigest()[:32]
    return _loaded(module.eval(), name=name, path="", digest=digest, dtype=dtype, context_tokens_max=0)


def _loaded(
    module: PreTrainedModel, *, name: str, path: str, digest: str, dtype: str, context_tokens_max: int
) -> LoadedModel:
    config = module.config.get_text_config()
    _refuse_unsupported(config)
    heads = config.num_attention_heads
    kv = KvShape(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
    )
    limit = getattr(config, "max_position_embeddings", None) or _CONTEXT_DEFAULT
    return LoadedModel(
        module=module,
        name=name,
        path=path,
        digest=digest,
        kv=kv,
        context_tokens_max=min(limit, context_tokens_max or limit),
        vocabulary_size=config.vocab_size,
        eos_token_ids=_eos_token_ids(module),
        device=next(module.parameters()).device,
    )


def _refuse_unsupported(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind in _ROPE_UNSUPPORTED:
        raise Unsupported(f"rope type {kind!r} gives a token other keys in longer sequences: its KV can't be reused")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if other:
        raise Unsupported(f"layers of type {', '.join(other)} are not supported by the torch engine")


def _eos_token_ids(module: PreTrainedModel) -> tuple[int, ...]:
    for holder in (module.generation_config, module.config):
        eos = getattr(holder, "eos_token_id", None)
        if eos is not None:
            return tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)
    return ()


def _folder(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith("."):
        raise BadArgument(
            f"{source} is not a folder", hint="give a folder with config.json and *.safetensors, or a hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadArgument(f"{source!r} is neither a folder nor a hub id that can be fetched: {error}") from error


def _canonical_config(config: PretrainedConfig) -> bytes:
    fields = {k: v for k, v in config.to_dict().items() if k not in _CONFIG_IGNORED}
    return json.dumps(fields, sort_keys=True, default=str).encode()


def _folder_digest(folder: Path, config: PretrainedConfig) -> str:
    """Content of the weight files and the configuration, not their names, so that copies of a model share."""
    digest = hashlib.sha256(_canonical_config(config))
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for path in weights:
        content = xxhash.xxh3_128()
        with path.open("rb") as file:
            while part := file.read(1 << 22):
                content.update(part)
        digest.update(content.digest())
    return digest.hexdigest()[:32]
