"""From logits to tokens. The draw for a token depends on its row of logits, the seed and its position alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engines.torch.request import Sampling

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """One row: how to sample, and the position of the token to be drawn."""

    sampling: Sampling
    position: int


@dataclass(frozen=True, slots=True)
class Drawn:
    token: int
    logprob: float  # of the token under the unscaled distribution; nan unless asked for
    top2_gap: float  # first minus second logit; nan unless asked for


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one position: Philox with the seed as key and the position as counter."""
    generator = np.random.Philox(
        key=np.array([seed & _MASK64, 0], dtype=np.uint64),
        counter=np.array([position & _MASK64, 0, 0, 0], dtype=np.uint64),
    )
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """One token a row.

    Args:
        logits: float (rows, vocabulary); rows beyond `draws` are ignored.
    """
    logits = logits[: len(draws)].float()
    tokens = logits.argmax(dim=-1).tolist()
    drawn_rows = [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0.0]
    if drawn_rows:
        for i, token in zip(drawn_rows, _nucleus(logits[drawn_rows], [draws[i] for i in drawn_rows]), strict=True):
            tokens[i] = token
    logprobs, gaps = [float("nan")] * len(draws), [float("nan")] * len(draws)
    asked = [i for i, draw in enumerate(draws) if draw.sampling.logprobs]
    if asked:
        rows = logits[asked]
        chosen = torch.tensor([tokens[i] for i in asked], device=rows.device)
        picked = rows.double().log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0].tolist()
        first, second = rows.topk(2, dim=-1).values.double().unbind(dim=-1)
        for i, logprob, gap in zip(asked, picked, (first - second).tolist(), strict=True):
            logprobs[i], gaps[i] = logprob, gap
    return [Drawn(*row) for row in zip(tokens, logprobs, gaps, strict=True)]


def _nucleus(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draws from the smallest set of most likely tokens whose probability reaches top_p.

    Ties are ordered by token id, so equal logits always give equal tokens.
    """
    temperatures = torch.tensor([d.sampling.temperature for d in draws], dtype=torch.float64, device=logits.device)
    scaled = logits.double()
    # The largest logit is taken off first: dividing by a tiny temperature must not overflow to inf - inf.
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    mass = ordered.exp().cumsum(dim=-1).cpu()
    tokens: list[int] = []
    for row, draw in enumerate(draws):
        cumulative = mass[row].numpy()
        kept = cumulative.size - 1
        if draw.sampling.top_p < 1.0:
            kept = min(kept, int(np.searchsorted(cumulative, draw.sampling.top_p * cumulative[-1])))
        target = uniform(draw.sampling.seed, draw.position) * cumulative[kept]
        tokens.append(int(order[row, min(kept, int(np.searchsorted(cumulative, target, side="right")))]))
    return tokens
