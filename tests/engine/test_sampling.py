"""Tokens from logits: a function of the row, the seed and the position, whatever else is in the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engines.torch.request import Sampling
from engines.torch.sampling import Draw, sample, uniform

RECORDED = [0.8720734548204873, 0.0828426870273763, 0.3541260359311518]


def draws(count: int, **sampling: object) -> list[Draw]:
    return [Draw(Sampling(1, **sampling), position) for position in range(count)]  # type: ignore[arg-type]


def test_the_stream_of_random_numbers_never_changes() -> None:
    # Recorded values: another stream would break continuations across releases.
    assert [uniform(7, p) for p in (0, 1, 4095)] == RECORDED
    assert uniform(8, 0) != uniform(7, 0)
    assert uniform(2**64 - 1, 2**32) == uniform(-1, 2**32)


def test_random_numbers_are_uniform() -> None:
    values = np.array([uniform(seed, position) for seed in range(40) for position in range(50)])
    assert values.min() >= 0.0 and values.max() < 1.0
    assert abs(values.mean() - 0.5) < 0.03 and abs(values.var() - 1 / 12) < 0.01


def test_greedy_is_the_first_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert [d.token for d in sample(logits, draws(2))] == [1, 0]


def test_a_row_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 300)
    all_draws = [
        Draw(Sampling(1, temperature=t, top_p=p, seed=s), 5 + i)
        for i, (t, p, s) in enumerate([(1.0, 1.0, 1), (0.7, 0.9, 2), (0.0, 1.0, 3)] * 3)
    ]
    together = [d.token for d in sample(logits, all_draws)]
    alone = [sample(logits[i : i + 1], [draw])[0].token for i, draw in enumerate(all_draws)]
    assert together == alone


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0), -100.0]]).expand(4000, 4)
    tokens = np.array([d.token for d in sample(logits, draws(4000, temperature=1.0, seed=11))])
    assert np.allclose(np.bincount(tokens, minlength=4) / 4000, [1 / 8, 2 / 8, 5 / 8, 0], atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([[math.log(5.0), math.log(3.0), math.log(2.0)]]).expand(500, 3)
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2})):
        assert {d.token for d in sample(logits, draws(500, temperature=1.0, top_p=top_p))} == kept


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(20, 50) * 30
    cold = [d.token for d in sample(logits, draws(20, temperature=temperature))]
    assert cold == logits.argmax(dim=-1).tolist()


def test_log_probabilities_and_gaps() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5]])
    (drawn,) = sample(logits, draws(1, logprobs=True))
    assert drawn.logprob == pytest.approx(float(torch.log_softmax(logits.double(), -1)[0, 1]))
    assert drawn.top2_gap == pytest.approx(1.5)
    (silent,) = sample(logits, draws(1))
    assert math.isnan(silent.logprob) and math.isnan(silent.top2_gap)
