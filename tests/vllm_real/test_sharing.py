"""Who shares blocks and who must not: other models, block sizes, kinds of attention."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.vllm_real.clusters import Servers
from tests.vllm_real.prompts import prompts
from tests.vllm_real.serving import MODEL, Node, Offline, running

TALKS = [tokens for tokens, fields in prompts(3) if not fields][1:16:4]


def other_weights(folder: Path) -> Path:
    """The same model but for one number in the middle of its weights."""
    shutil.copytree(MODEL, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek((folder / "model.safetensors").stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return folder


def gemma(folder: Path) -> Path:
    """A tiny model with layers that see all and layers with a window, with random weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.Gemma3TextConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=64, max_position_embeddings=2048, query_pre_attn_scalar=32,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
    )  # fmt: skip
    transformers.Gemma3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def test_engines_that_must_not_share(servers: Servers, tmp_path: Path) -> None:
    expected = [servers.prefill.complete(talk).tokens for talk in TALKS]
    for talk in TALKS:
        servers.prefill.loads(talk)
    twice = [TALKS, TALKS]
    blocks = Offline.start(tmp_path, "blocks", servers.node, twice, {"block_size": 64})
    model = Offline.start(tmp_path, "model", servers.node, twice, {"model": str(other_weights(tmp_path / "model"))})
    with running(blocks, model):
        cold, warm = blocks.rounds()
        assert cold.tokens == warm.tokens == expected
        assert not any(cold.cached) and warm.all_cached(64)
        cold, warm = model.rounds()
        assert cold.tokens == warm.tokens
        assert not any(cold.cached) and warm.all_cached()
    # People who wonder can tell why, from the lines of both.
    theirs = [name for one in (blocks, model) for name in namespaces(one.process.text)]
    assert len(set(theirs)) == 2 and not set(theirs) & namespaces(servers.prefill.process.text)
    assert "blocks of full 64 tokens" in blocks.process.text


def namespaces(text: str) -> set[str]:
    return {line.partition("is used, namespace ")[2].split(":")[0] for line in text.splitlines() if "is used" in line}


def test_layers_with_windows(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with running(node):
        model = str(gemma(tmp_path / "gemma"))
        cold, warm = Offline.start(tmp_path, "windows", node, [TALKS, TALKS], {"model": model}).rounds()
    assert cold.tokens == warm.tokens
    assert not any(cold.cached) and warm.all_cached()
