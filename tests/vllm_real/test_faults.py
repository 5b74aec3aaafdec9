"""What a lost node, a restart, or an engine of another kind costs: recomputing, and never a token."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.vllm_real.prompts import prompts
from tests.vllm_real.serving import BLOCK_TOKENS, REPLY_S, Engine, Node, connector, running

TALKS = [tokens for tokens, fields in prompts(2) if not fields][:16]
LONG = TALKS[3] + TALKS[7] + TALKS[11]


def saved(engine: Engine, blocks: int) -> None:
    """Waits until an engine has stored that many blocks; it says so with its next step."""
    deadline_s = time.monotonic() + REPLY_S
    while engine.metric("vllm:kvpool_blocks_saved_total") < blocks:
        assert time.monotonic() < deadline_s, engine.process.text[-2000:]
        engine.complete([7], 1)


def test_the_cache_outlives_the_engine_and_the_engine_its_node(tmp_path: Path) -> None:
    node = Node(tmp_path)
    plain = Engine(tmp_path, "plain")
    first = Engine(tmp_path, "first", connector(node))
    with running(node, plain, first):
        expected = [plain.complete(talk).tokens for talk in TALKS]
        expected_long = plain.complete(LONG).tokens
        blocks = {
            tuple(talk[: end * BLOCK_TOKENS]) for talk in TALKS for end in range(1, len(talk) // BLOCK_TOKENS + 1)
        }
        assert [first.complete(talk).tokens for talk in TALKS] == expected
        saved(first, len(blocks))
        first.process.stop(signal.SIGKILL)

        second = Engine(tmp_path, "second", connector(node))
        with running(second):
            answers = [second.complete(talk) for talk in TALKS]
            assert [answer.tokens for answer in answers] == expected
            assert answers[3].cached_tokens >= (len(TALKS[3]) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            assert second.metric("vllm:kvpool_blocks_loaded_total") > 0

            node.process.stop(signal.SIGKILL)
            second.post("/reset_prefix_cache", {})
            assert [second.complete(talk).tokens for talk in TALKS[:4]] == expected[:4]
            second.process.must_run()
            assert "is away" in second.process.text

            node.start()  # empty, at the same address
            assert second.complete(LONG).tokens == expected_long


def test_engines_that_must_not_share(tmp_path: Path) -> None:
    node = Node(tmp_path)
    first = Engine(tmp_path, "first", connector(node))
    blocks_of_64 = Engine(tmp_path, "blocks", connector(node), ["--block-size", "64"])
    other_model = Engine(tmp_path, "model", connector(node, model_id="another"))
    with running(node, first, blocks_of_64, other_model):
        expected = first.complete(LONG).tokens
        saved(first, len(LONG) // BLOCK_TOKENS)
        for engine in (blocks_of_64, other_model):
            answer = engine.complete(LONG)
            assert answer.tokens == expected, engine.name
            assert answer.cached_tokens == 0, engine.name


def test_starting_without_a_node(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.process.stop()
    plain = Engine(tmp_path, "plain")
    alone = Engine(tmp_path, "alone", connector(node))
    wrong = Engine(tmp_path, "wrong", connector(node, nod="127.0.0.1:1"))
    with running(plain, alone):
        assert "can't be used, vLLM computes by itself meanwhile" in alone.process.text
        assert alone.complete(LONG).tokens == plain.complete(LONG).tokens
        assert wrong.process.popen.wait(REPLY_S) != 0
        assert "unknown settings: nod" in wrong.process.text
