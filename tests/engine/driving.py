"""Drives an engine by hand in tests."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from engines.torch.engine import Engine
from engines.torch.hbm import block_memory
from engines.torch.request import BlockSet, Finish, Phase, Request, Sampling

TOKENS_MAX = 160


def prompt(seed: int, count: int) -> np.ndarray:
    """Random token ids without the special ones."""
    return np.random.default_rng(seed).integers(3, TOKENS_MAX, count).astype(np.uint32)


def request(
    engine: Engine,
    tokens: np.ndarray,
    name: str = "r",
    *,
    max_tokens: int = 8,
    phase: Phase = Phase.BOTH,
    pull_tokens: int = 0,
    publish: bool = False,
    deadline_us: int = 0,
    **sampling: object,
) -> Request:
    return Request(
        name,
        np.asarray(tokens, dtype=np.uint32),
        Sampling(max_tokens, **{"ignore_eos": True, **sampling}),  # type: ignore[arg-type]
        engine.namespace.id(),
        phase=phase,
        pull_tokens=pull_tokens,
        publish=publish,
        deadline_us=deadline_us,
    )


@dataclass
class Log:
    """What came out of an engine."""

    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    finish: dict[str, Finish] = field(default_factory=dict)
    error: dict[str, str] = field(default_factory=dict)
    times: dict[str, object] = field(default_factory=dict)


def run(engine: Engine, log: Log | None = None, steps: int = 10_000) -> Log:
    """Steps until nothing is left to do, checking invariants after each step."""
    log = log or Log()
    while engine.has_work() and steps:
        steps -= 1
        for event in engine.step():
            assert event.request_id not in log.finish, "an event after the end"
            log.tokens[event.request_id].extend(event.tokens)
            if event.times is not None:
                log.times[event.request_id] = event.times
            if event.finish is not Finish.NONE:
                log.finish[event.request_id] = event.finish
                log.error[event.request_id] = event.error
        engine.check_invariants()
    return log


def contents(engine: Engine, blocks: np.ndarray) -> np.ndarray:
    """Bytes of blocks; uint8 (blocks, block_bytes)."""
    staging = block_memory(engine.cache).gather(blocks)
    assert staging.event.wait(5.0)
    copied = staging.data[staging.rows].copy()
    staging.release()
    return copied


def cached_contents(engine: Engine) -> dict[bytes, bytes]:
    """Bytes of every cached block by key."""
    keys = [key.tobytes() for key in engine.cached_keys()]
    blocks = np.array([engine.pool.match([key])[0] for key in keys], dtype=np.int64)
    return {key: row.tobytes() for key, row in zip(keys, contents(engine, blocks), strict=True)}


def fill(engine: Engine, pull: BlockSet, stored: dict[bytes, bytes], count: int | None = None) -> int:
    """Fills a pull from `stored` as far as it goes, at most `count` blocks. Returns: blocks filled."""
    memory = block_memory(engine.cache)
    staging = memory.receive(pull.blocks)
    assert staging.event.wait(5.0)
    filled = 0
    for i, key in enumerate(pull.keys):
        content = stored.get(key.tobytes())
        if content is None or (count is not None and filled == count):
            break
        staging.data[staging.rows[i]] = np.frombuffer(content, dtype=np.uint8)
        filled += 1
    assert memory.scatter(staging, pull.blocks, np.arange(filled)).wait(5.0)
    staging.release()
    return filled


def exported(engine: Engine, stored: dict[bytes, bytes]) -> list[BlockSet]:
    """Copies all exports into `stored` and gives them back."""
    exports = engine.take_exports()
    for export in exports:
        for key, content in zip(export.keys, contents(engine, export.blocks), strict=True):
            stored[key.tobytes()] = content.tobytes()
        engine.export_ended(export)
    return exports
