"""The deterministic mode: bits depend on the request alone, not on batching, chunking, reuse or who computed them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.torch.attention import ROWS_MULTIPLE
from engines.torch.engine import Engine
from engines.torch.generate import generate
from engines.torch.model import LoadedModel
from engines.torch.request import Sampling

from .conftest import EXACT
from .driving import cached_contents, prompt, request, run

PROMPTS = [prompt(i, n).tolist() for i, n in enumerate((3, 16, 40, 64, 100, 129, 250))]
DRAWN = Sampling(40, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True, logprobs=True)


def alone(model: LoadedModel) -> tuple[list[object], dict[bytes, bytes]]:
    outputs: list[object] = []
    stored: dict[bytes, bytes] = {}
    for tokens in PROMPTS:
        engine = Engine(model, EXACT)
        outputs += generate(engine, [tokens], DRAWN)
        stored |= cached_contents(engine)
    return outputs, stored


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window"])
def test_batching_and_chunking_change_no_bit(models: dict[str, LoadedModel], name: str) -> None:
    outputs, stored = alone(models[name])
    for config in (EXACT, replace(EXACT, chunk_tokens=256), replace(EXACT, chunk_tokens=16, batch_max=3)):
        engine = Engine(models[name], config)
        together = generate(engine, PROMPTS, DRAWN)
        # Log probabilities are compared bit by bit, too.
        assert together == outputs
        assert cached_contents(engine) == stored


def test_generated_and_recomputed_kv_are_the_same_bits(llama: LoadedModel) -> None:
    first = Engine(llama, EXACT)
    output = generate(first, [PROMPTS[4]], Sampling(60, ignore_eos=True))[0]
    again = Engine(llama, EXACT)
    generate(again, [PROMPTS[4] + list(output.tokens)], Sampling(1))
    decoded, recomputed = cached_contents(first), cached_contents(again)
    shared = set(decoded) & set(recomputed)
    assert len(shared) == (100 + 59) // 16
    assert all(decoded[key] == recomputed[key] for key in shared)


def test_reuse_changes_no_bit(llama: LoadedModel) -> None:
    turns = Engine(llama, EXACT)
    tokens = list(PROMPTS[2])
    for turn in range(4):
        output = generate(turns, [tokens], DRAWN)[0]
        assert output == generate(Engine(llama, EXACT), [tokens], DRAWN)[0]
        tokens += [*output.tokens, *prompt(50 + turn, 21).tolist()]
    log = run_turn(turns, tokens)
    assert log > 100, "the last turn had nothing to reuse: the test tests nothing"


def run_turn(engine: Engine, tokens: list[int]) -> int:
    engine.submit(request(engine, np.array(tokens), max_tokens=1))
    return run(engine).times["r"].cached_tokens_hbm  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_continuation_is_the_same_after_a_restart(models: dict[str, LoadedModel], name: str) -> None:
    whole = generate(Engine(models[name], EXACT), [PROMPTS[4]], DRAWN)[0]
    for cut in (1, 13, 39):
        rest = replace(DRAWN, max_tokens=40 - cut)
        resumed = generate(Engine(models[name], EXACT), [PROMPTS[4] + list(whole.tokens[:cut])], rest)[0]
        assert whole.tokens[cut:] == resumed.tokens


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=6))
def test_arrival_order_changes_no_bit(llama: LoadedModel, arrivals: list[tuple[int, int]]) -> None:
    """Requests arrive between any two steps; each answers as if it were alone."""
    engine = Engine(llama, EXACT)
    pending = {f"{i}": (prompt_index, gap) for i, (prompt_index, gap) in enumerate(arrivals)}
    tokens: dict[str, list[int]] = {name: [] for name in pending}
    gaps = 0
    for name, (prompt_index, gap) in pending.items():
        engine.submit(request(engine, np.array(PROMPTS[prompt_index]), name, max_tokens=12, temperature=1.0, seed=9))
        gaps += gap
        for _ in range(gap):
            for event in engine.step():
                tokens[event.request_id].extend(event.tokens)
    for name, rest in run(engine).tokens.items():
        tokens[name].extend(rest)
    for name, (prompt_index, _) in pending.items():
        single = Sampling(12, temperature=1.0, seed=9, ignore_eos=True)
        assert tuple(tokens[name]) == generate(Engine(llama, EXACT), [PROMPTS[prompt_index]], single)[0].tokens


def test_this_machine_multiplies_rows_alike_in_any_batch() -> None:
    """What exact mode is built on: if this fails, the math library here needs another ROWS_MULTIPLE."""
    torch.manual_seed(0)
    for wide, deep in ((640, 256), (256, 640), (2048, 256), (96, 64)):
        weight, rows = torch.randn(wide, deep), torch.randn(400, deep)
        everything = rows @ weight.T
        for count in range(ROWS_MULTIPLE, 400, ROWS_MULTIPLE):
            assert torch.equal(torch.nn.functional.linear(rows[:count], weight), everything[:count])
