"""vLLM's own scheduler with the connector, while loads fail, clients leave and blocks run out: every token is right."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-engines")

from tests.vllm_real.stepping import BLOCK_TOKENS, FlakyPool, SteppedEngine

SEEDS = int(os.environ.get("KVPOOL_VLLM_SEEDS", "12"))
#: What the seeds have brought about, so that nobody takes their word for it.
SEEN: Counter[str] = Counter()
Make = Callable[..., SteppedEngine]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[SteppedEngine] = []

    def engine(pool: FlakyPool, **settings: object) -> SteppedEngine:
        monkeypatch.setattr("engines.vllm.pool_link.PoolLink", pool.link)
        made.append(SteppedEngine(pool, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield engine
    for one in made:
        one.close()


def run(engine: SteppedEngine) -> None:
    for _ in range(2000):
        if engine.is_idle:
            return
        engine.step()
    raise AssertionError("requests do not end")


def prompt(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(6, 50) for _ in range(count)]


@pytest.mark.parametrize("hybrid", [False, True])
def test_what_one_engine_stored_another_loads(make: Make, hybrid: bool) -> None:
    pool = FlakyPool()
    first = make(pool, block_count=100, hybrid=hybrid)
    first.begin(prompt(1, 41), 6)
    run(first)
    first.settle()
    assert first.check_pool() == len(pool.blocks) == (2 if hybrid else 1) * (46 // BLOCK_TOKENS)
    second = make(pool, block_count=100, hybrid=hybrid)
    request = second.begin(prompt(1, 41), 6)
    run(second)
    assert second.loaded_blocks == (10 + 3 if hybrid else 10) and second.failed_blocks == 0
    assert request.num_output_tokens == 6
    second.settle()
    second.check_references()


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_client_leaves_while_its_load_fails(make: Make, hybrid: bool) -> None:
    """What the load has left unfilled has names already; nobody may find it."""
    pool = FlakyPool()
    first = make(pool, block_count=60, hybrid=hybrid)
    first.begin(prompt(1, 41), 2)
    run(first)
    first.settle()
    second = make(pool, block_count=60, hybrid=hybrid)
    pool.fails = 1.0
    second.step(aborts=[second.begin(prompt(1, 41), 2)])
    assert second.failed_blocks > 0
    pool.fails, pool.blocks = 0.0, {}
    second.begin(prompt(1, 41), 4)
    run(second)
    second.settle()
    assert second.check_pool() == len(pool.blocks) > 0
    second.check_references()


def test_another_shares_what_was_not_loaded(make: Make) -> None:
    pool = FlakyPool()
    first = make(pool, block_count=60, hybrid=False)
    first.begin(prompt(1, 41), 2)
    run(first)
    first.settle()
    second = make(pool, block_count=60, hybrid=False, step_tokens=48, long_prefill_tokens=12)
    pool.fails = 1.0
    leaver = second.begin(prompt(1, 41), 2)
    sharer = second.begin(prompt(1, 45), 3)
    second.step(aborts=[leaver])
    assert second.failed_blocks > 0
    run(second)
    assert sharer.num_output_tokens == 3
    second.settle()
    assert second.check_pool() == len(pool.blocks)


def test_new_weights(make: Make) -> None:
    pool = FlakyPool()
    engine = make(pool, block_count=60, hybrid=False)
    engine.begin(prompt(1, 41), 2)
    run(engine)
    engine.settle()
    stored = len(pool.blocks)
    engine.new_weights()
    engine.begin(prompt(1, 41), 2)
    run(engine)
    engine.settle()
    assert engine.loaded_blocks == 0 and len(pool.blocks) == 2 * stored and engine.check_pool() == stored


def test_a_prompt_larger_than_what_may_be_held_is_stored_bit_by_bit(make: Make) -> None:
    pool = FlakyPool()
    engine = make(pool, block_count=24, hybrid=False, step_tokens=64)  # 6 blocks may be held
    engine.begin(prompt(1, 60), 20)
    run(engine)
    engine.settle()
    assert engine.check_pool() == len(pool.blocks) == 79 // BLOCK_TOKENS


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_anything_may_happen(make: Make, seed: int, hybrid: bool) -> None:
    draw = random.Random(seed)
    pool = FlakyPool(draw=draw)
    bases = [prompt(number, 90) for number in range(3)]
    for life in range(2):  # the second engine begins with a full pool
        engine = make(
            pool,
            block_count=draw.choice([40, 48, 90] if hybrid else [26, 34, 60]),
            hybrid=hybrid,
            step_tokens=draw.choice([16, 32, 64]),
            long_prefill_tokens=draw.choice([0, 8, 13]),
        )
        pool.fails = draw.choice([0.0, 0.3, 0.8])
        live = []
        for _ in range(120):
            if draw.random() < 0.35 and len(live) < 8:
                base = draw.choice(bases)[: draw.randrange(1, 70)]
                own = [draw.randrange(6, 50) for _ in range(draw.randrange(0, 12))]
                live.append(engine.begin(base + own, draw.randrange(1, 9), draw.choice([None, None, "a"])))
            live = [request for request in live if not request.is_finished()]
            leaving = [request for request in live if draw.random() < 0.08]
            if draw.random() < 0.3:
                for request in leaving:
                    engine.abort(request)
                leaving = []
            if draw.random() < 0.1:
                pool.gate.clear() if pool.gate.is_set() else pool.gate.set()
            if draw.random() < 0.05 and pool.blocks and pool.gate.is_set():
                for name in draw.sample(sorted(pool.blocks), len(pool.blocks) // 3):
                    del pool.blocks[name]
            if draw.random() < 0.01:
                pool.gate.set()
                engine.new_weights()
            engine.step(aborts=[request for request in leaving if not request.is_finished()])
            SEEN["preempted"] += sum(request.num_preemptions for request in live if request.is_finished())
        pool.gate.set()
        run(engine)
        engine.settle()
        engine.check_references()
        SEEN["compared"] += engine.check_pool()
        SEEN["loaded"] += engine.loaded_blocks
        SEEN["failed"] += engine.failed_blocks
        SEEN["reset"] += engine.weights - 1
        print(f"seed {seed} life {life}: {engine.loaded_blocks} blocks loaded, {engine.failed_blocks} failed")


def test_what_may_happen_did() -> None:
    print(dict(SEEN))
    assert min(SEEN[name] for name in ("compared", "loaded", "failed", "preempted", "reset")) > 0
