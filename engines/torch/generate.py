"""Runs prompts to their end on an engine that nobody else uses: references, tests, notebooks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.torch.engine import Engine
from engines.torch.request import Finish, Request, Sampling, StepEvent


@dataclass(frozen=True, slots=True)
class Generated:
    """A finished output."""

    tokens: tuple[int, ...]
    finish: Finish
    logprobs: tuple[float, ...] = ()
    top2_gaps: tuple[float, ...] = ()


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling, root: bytes = b""
) -> list[Generated]:
    """Runs prompts to their end on an engine that nobody else uses; for references and tests.

    Args:
        root: parent key of first blocks; empty = the namespace's own.
    """
    root = root or engine.namespace.id()
    ids = [f"generate-{i}" for i in range(len(prompts))]
    tokens: dict[str, list[StepEvent]] = {name: [] for name in ids}
    pending = deque(
        Request(n, np.asarray(p, dtype=np.uint32), sampling, root) for n, p in zip(ids, prompts, strict=True)
    )
    while pending or engine.has_work():
        while pending and engine.load().waiting < engine.config.waiting_max:
            engine.submit(pending.popleft())
        for event in engine.step():
            tokens[event.request_id].append(event)
    return [_joined(tokens[name]) for name in ids]


def _joined(events: Sequence[StepEvent]) -> Generated:
    return Generated(
        tuple(t for e in events for t in e.tokens),
        events[-1].finish,
        tuple(x for e in events for x in e.logprobs),
        tuple(x for e in events for x in e.top2_gaps),
    )
