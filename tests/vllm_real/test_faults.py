"""What a lost node, a full pool, a restart or a wrong setting costs: recomputing, and never a token."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.vllm_real.prompts import prompts
from tests.vllm_real.serving import REPLY_S, Engine, Node, Servers, connector, running

TALKS = [tokens for tokens, fields in prompts(2) if not fields][:16]
SHORT = TALKS[0]
#: Smaller than the blocks of all talks together.
NODE_MEMORY = "8MiB"


def until(holds: Callable[[], bool], engine: Engine) -> None:
    deadline_s = time.monotonic() + REPLY_S
    while not holds():
        engine.process.must_run()
        assert time.monotonic() < deadline_s, engine.process.text[-4000:]
        engine.process.wait_a_little()


def test_a_life_of_faults(tmp_path: Path, servers: Servers) -> None:
    node = Node(tmp_path, NODE_MEMORY)
    node.process.stop()
    engine = Engine(tmp_path, "engine", connector(node))
    wrong = Engine(tmp_path, "wrong", connector(node, nod="127.0.0.1:1"))
    with running(engine, node):
        expected = {tuple(talk): servers.plain.complete(talk).tokens for talk in TALKS}

        def right(talk: list[int]) -> None:
            assert engine.complete(talk).tokens == expected[tuple(talk)], f"{len(talk)} tokens"

        # Started without a node: vLLM says so and goes on.
        assert f"kvpool node {node.address} can't be used, vLLM computes by itself meanwhile" in engine.process.text
        right(SHORT)

        # It comes, and is used.
        node.start()
        until(lambda: "is used, namespace" in engine.process.text, engine)
        engine.stored(SHORT)
        assert engine.metric("vllm:kvpool_blocks_loaded_total") > 0

        # It is full: what is oldest goes.
        for talk in TALKS:
            right(talk)
        engine.stored(TALKS[-1])
        assert engine.metric("vllm:kvpool_bytes_saved_total") > 8 << 20

        # It is killed while requests load.
        with ThreadPoolExecutor(4) as pool:
            engine.forget()
            answers = [pool.submit(right, talk) for talk in 2 * TALKS]
            answers[2].result(REPLY_S)
            node.process.stop(signal.SIGKILL)
            for answer in answers:
                answer.result(REPLY_S)
        engine.process.must_run()
        until(lambda: "is away" in engine.process.text, engine)
        engine.forget()
        right(SHORT)

        # It comes back, and so do the hits.
        node.start()
        until(lambda: engine.process.text.count("is used, namespace") > 2, engine)
        engine.stored(SHORT)

        # The engine is killed; the next one finds what it has stored.
        engine.process.stop(signal.SIGKILL)
        second = Engine(tmp_path, "second", connector(node))
        with running(second):
            answer = second.complete(SHORT)
            assert answer.tokens == expected[tuple(SHORT)] and answer.cached_tokens > 0
    assert wrong.process.popen.wait(REPLY_S) != 0
    assert "unknown settings: nod" in wrong.process.text
