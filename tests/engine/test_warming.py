"""Warming up measures, and leaves no trace."""

from __future__ import annotations

import numpy as np

from engines.torch.engine import Engine
from engines.torch.generate import generate
from engines.torch.limits import EngineConfig
from engines.torch.model import LoadedModel
from engines.torch.request import Sampling
from engines.torch.warming import warm_up


def test_warm_up_measures_and_leaves_the_engine_as_it_was(llama: LoadedModel) -> None:
    model = llama
    config = EngineConfig(kv_tokens=1024, chunk_tokens=128, deterministic=True)
    prompt = np.random.default_rng(3).integers(0, model.vocabulary_size, 150).tolist()
    expected = generate(Engine(model, config), [prompt], Sampling(max_tokens=8))
    engine = Engine(model, config)
    samples = warm_up(engine)
    assert {s.new_tokens for s in samples.prefill} >= {31, 124, 249}
    assert any(s.batch > 1 for s in samples.decode) and any(s.batch == 1 for s in samples.decode)
    assert not samples.finished_prefills
    load = engine.load()
    assert (load.running, load.waiting, load.kv_tokens_free) == (0, 0, load.kv_tokens_total)
    assert engine.take_changes() == [] and len(engine.cached_keys()) == 0
    assert generate(engine, [prompt], Sampling(max_tokens=8)) == expected
    engine.check_invariants()


def test_the_smallest_engine_can_be_warmed_up(llama: LoadedModel) -> None:
    model = llama
    engine = Engine(model, EngineConfig(kv_tokens=64, chunk_tokens=64, batch_max=1))
    assert warm_up(engine).prefill
