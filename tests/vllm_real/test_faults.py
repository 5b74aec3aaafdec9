"""What a lost node, a full pool, a restart or a wrong setting costs: recomputing, and never a token."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.vllm_real.clusters import Servers
from tests.vllm_real.prompts import prompts
from tests.vllm_real.serving import PATIENT, REPLY_S, START_S, Engine, Node, connector, running

TALKS = [tokens for tokens, fields in prompts(2) if not fields][:16]
SHORT = TALKS[0]
#: Smaller than the blocks of all talks together.
NODE_MEMORY = "8MiB"


def until(holds: Callable[[], bool], engine: Engine, meanwhile: Callable[[], None] = lambda: None) -> None:
    deadline_s = time.monotonic() + REPLY_S
    while not holds():
        engine.process.must_run()
        assert time.monotonic() < deadline_s, engine.process.text[-4000:]
        meanwhile()
        engine.process.wait_a_little()


def test_a_life_of_faults(tmp_path: Path, servers: Servers) -> None:
    node = Node(tmp_path, NODE_MEMORY)
    node.process.stop()
    engine = Engine(tmp_path, "engine", connector(node))
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
        engine.loads(SHORT)
        assert engine.metric("vllm:kvpool_blocks_loaded_total") > 0

        # It is full: what is oldest goes.
        def all_right() -> None:
            for talk in TALKS:
                right(talk)
            engine.forget()

        all_right()
        until(lambda: engine.metric("vllm:kvpool_bytes_saved_total") > 8 << 20, engine, all_right)
        engine.loads(TALKS[-1])

        # It is killed while requests load.
        with ThreadPoolExecutor(4) as pool:
            engine.forget()
            answers = [pool.submit(right, talk) for talk in 2 * TALKS]
            answers[2].result(REPLY_S)
            node.process.stop(signal.SIGKILL)
            for answer in answers:
                answer.result(REPLY_S)
        engine.process.must_run()

        def short_is_right() -> None:
            engine.forget()
            right(SHORT)

        until(lambda: "is away" in engine.process.text, engine, short_is_right)
        short_is_right()

        # It comes back, and so do the hits.
        node.start()
        until(lambda: engine.process.text.count("is used, namespace") > 2, engine)
        engine.loads(SHORT)

        # The engine is killed; the next one finds what it has stored.
        engine.process.stop(signal.SIGKILL)
        second = Engine(tmp_path, "second", connector(node, **PATIENT))
        with running(second):
            until(lambda: second.process.text.count("is used, namespace") > 1, second)  # both halves of the connector
            answer = second.complete(SHORT)
            assert answer.tokens == expected[tuple(SHORT)] and answer.cached_tokens > 0


def test_a_wrong_setting_ends_the_start(tmp_path: Path, servers: Servers) -> None:
    wrong = Engine(tmp_path, "wrong", connector(servers.node, nod="127.0.0.1:1")).process
    try:
        assert wrong.popen.wait(START_S) != 0
    finally:
        wrong.stop()
    assert "unknown settings: nod" in wrong.text
