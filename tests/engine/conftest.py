"""Small random models and engines on them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from engines.torch.engine import Engine
from engines.torch.limits import EngineConfig
from engines.torch.model import LoadedModel, model_from_config

# Threads of several test processes on few cores spend their time waiting for each other.
torch.set_num_threads(1)

_SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES),
    "mistral_window": MistralConfig(**_SIZES, sliding_window=48),
}
SMALL = EngineConfig(block_tokens=16, kv_tokens=4096, chunk_tokens=64, batch_max=8, waiting_max=32)
EXACT = EngineConfig(block_tokens=16, kv_tokens=4096, chunk_tokens=64, batch_max=8, waiting_max=32, deterministic=True)


@pytest.fixture(scope="session")
def models() -> dict[str, LoadedModel]:
    return {name: model_from_config(config, seed=3, name=name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def llama(models: dict[str, LoadedModel]) -> LoadedModel:
    return models["llama"]


@pytest.fixture
def engine(llama: LoadedModel) -> Engine:
    return Engine(llama, SMALL)
