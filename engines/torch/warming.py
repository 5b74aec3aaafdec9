"""Runs an engine before it serves: kernels get compiled and loaded, and the scheduler gets first measurements.

Without it the first requests would wait for compilers, and be placed by a prior that knows nothing of this machine.
"""

from __future__ import annotations

import numpy as np

from engines.torch.engine import Engine
from engines.torch.generate import generate
from engines.torch.request import Samples, Sampling

#: Root of the prompts made here: of no namespace, so that nobody's prefix is found or left.
_ROOT = b"kvpool warming up"[:16]
_DECODE_TOKENS = 6
_BATCH = 4


def warm_up(engine: Engine) -> Samples:
    """Computes made-up prompts of several lengths and returns what they took; the engine is as before.

    Nobody else may use the engine meanwhile. Prompts are at most two chunks, and small enough for cache and context.
    """
    config = engine.config
    longest = min(2 * config.chunk_tokens, config.kv_tokens, engine.model.context_tokens_max) - _DECODE_TOKENS - 1
    lengths = sorted({max(1, longest // 8), max(1, longest // 2), max(1, longest)})
    _run(engine, [lengths[0]])
    engine.take_samples()  # of compiling
    for length in lengths:
        _run(engine, [length])
    _run(engine, [min(lengths[0], longest // _BATCH)] * _BATCH)
    samples = engine.take_samples()
    engine.pool.clear()
    engine.take_changes()
    samples.finished_prefills.clear()  # nobody placed these
    return samples


def _run(engine: Engine, lengths: list[int]) -> None:
    rng = np.random.default_rng(sum(lengths))
    prompts = [rng.integers(0, engine.model.vocabulary_size, max(1, n)).tolist() for n in lengths]
    generate(engine, prompts, Sampling(max_tokens=_DECODE_TOKENS, ignore_eos=True), _ROOT)
    # The next prompt must not find this one.
    engine.pool.clear()
