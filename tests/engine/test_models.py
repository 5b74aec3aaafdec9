"""Greedy tokens are those of Hugging Face's own generate, for each kind of model, in both modes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from engines.torch.engine import Engine
from engines.torch.generate import generate
from engines.torch.limits import EngineConfig
from engines.torch.model import LoadedModel, load_model, model_from_config
from engines.torch.request import Finish, Sampling
from kvpool.core.errors import BadArgument, Unsupported

from .conftest import EXACT, SMALL
from .driving import prompt

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 200)


def expected(model: LoadedModel, prompts: list[list[int]], count: int) -> list[tuple[int, ...]]:
    reference = copy.deepcopy(model.module)
    reference.set_attn_implementation("sdpa")
    reference.generation_config.eos_token_id = None
    return [
        tuple(
            reference.generate(torch.tensor([p]), max_new_tokens=count, do_sample=False, pad_token_id=0)[
                0, len(p) :
            ].tolist()
        )
        for p in prompts
    ]


@pytest.mark.parametrize("config", [SMALL, EXACT], ids=["fast", "exact"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window"])
def test_greedy_equals_generate(models: dict[str, LoadedModel], name: str, config: EngineConfig) -> None:
    prompts = [prompt(i, n).tolist() for i, n in enumerate(LENGTHS)]
    engine = Engine(models[name], config)
    outputs = generate(engine, prompts, Sampling(20, ignore_eos=True))
    assert [o.tokens for o in outputs] == expected(models[name], prompts, 20)
    assert all(o.finish is Finish.LENGTH for o in outputs)


@pytest.mark.parametrize("config", [SMALL, EXACT], ids=["fast", "exact"])
def test_a_trained_model_equals_generate(config: EngineConfig) -> None:
    folder = Path(__file__).parents[1] / "models" / "tiny-llama"
    model = load_model(folder)
    prompts = [prompt(i, n).tolist() for i, n in enumerate((40, 130))]
    engine = Engine(model, config)
    outputs = generate(engine, prompts, Sampling(16, ignore_eos=True))
    assert [o.tokens for o in outputs] == expected(model, prompts, 16)


def test_a_saved_model_loads_and_keeps_its_namespace(llama: LoadedModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        llama.module.save_pretrained(tmp_path / name)
    a, b = load_model(tmp_path / "a"), load_model(tmp_path / "b", name="other")
    assert a.namespace(16, exact=True) == b.namespace(16, exact=True)
    assert a.namespace(16, exact=True).id() != a.namespace(16, exact=False).id()
    assert a.namespace(16, exact=True).id() != a.namespace(32, exact=True).id()
    group = a.namespace(16, exact=True).groups[0]
    assert group.block_bytes == 4 * 2 * 16 * 2 * 16 * 4 and group.section_count == 4


def test_other_weights_are_another_namespace() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    ids = {model_from_config(config, seed=seed).namespace(16, exact=False).id() for seed in (1, 1, 2)}
    assert len(ids) == 2


def test_what_can_not_be_served_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="not a folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(BadArgument, match="can't load"):
        load_model(tmp_path)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    with pytest.raises(Unsupported, match="rope"):
        model_from_config(config)
