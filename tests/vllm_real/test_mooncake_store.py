"""vLLM's MooncakeStoreConnector, as it is, on kvpool's `mooncake.store`: the tokens are those of plain vLLM.

One server stores, a second one loads all of it, and goes on without the pool when the node is killed.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from engines.mooncake.shadowing import SHIM
from kvpool.client import PoolClient
from tests.vllm_real.clusters import Servers
from tests.vllm_real.prompts import prompts
from tests.vllm_real.serving import BLOCK_TOKENS, REPLY_S, Engine, Node, full_block_tokens, running

CONNECTOR = {
    "kv_connector": "MooncakeStoreConnector",
    "kv_connector_module_path": "tests.vllm_real.mooncake_on_cpu",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


def with_mooncake(folder: Path, name: str, node: Node) -> Engine:
    """A vLLM whose configuration is that of a Mooncake user, with the node's address as the master's."""
    config = folder / "mooncake.json"
    config.write_text(
        json.dumps(
            {
                "metadata_server": "P2PHANDSHAKE", "master_server_address": node.address, "protocol": "tcp",
                "device_name": "", "global_segment_size": "1GB", "local_buffer_size": "64MB",
            }
        )
    )  # fmt: skip
    root = str(Path(__file__).parents[2])
    environment = {
        "MOONCAKE_CONFIG_PATH": str(config),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SHIM), root, os.environ.get("PYTHONPATH")])),
    }
    return Engine(folder, name, CONNECTOR, environment=environment)


def full_blocks(asked: list[tuple[list[int], dict[str, Any]]]) -> int:
    """How many different blocks the prompts fill."""
    return len(
        {
            (tuple(tokens[:end]), fields.get("cache_salt"))
            for tokens, fields in asked
            for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)
        }
    )


def wait_for_objects(pool: PoolClient, count: int, engine: Engine) -> None:
    """Until the connector's saves, which nobody waits for, have come to the node."""
    deadline_s = time.monotonic() + REPLY_S
    while (blocks := int(pool.stats().blocks)) < count:
        engine.process.must_run()
        assert time.monotonic() < deadline_s, f"{blocks} of {count} objects: {engine.process.text[-3000:]}"
        engine.process.wait_a_little()


def test_tokens_are_those_of_plain_vllm(tmp_path: Path, servers: Servers) -> None:
    node, plain = Node(tmp_path), servers.plain
    first = with_mooncake(tmp_path, "first", node)
    asked, late = prompts(3), prompts(4)[-4:]
    assert len(asked) >= 20
    with running(node, first), PoolClient(node.address) as pool:
        expected = [plain.complete(tokens, **fields).tokens for tokens, fields in asked]
        expected_late = [plain.complete(tokens, **fields).tokens for tokens, fields in late]
        for number, (tokens, fields) in enumerate(asked):
            assert first.complete(tokens, **fields).tokens == expected[number], f"prompt {number}, stored"
        wait_for_objects(pool, full_blocks(asked), first)
        first.stop()
        second = with_mooncake(tmp_path, "second", node)
        with running(second):
            loaded = 0
            for number, (tokens, fields) in enumerate(asked):
                answer = second.complete(tokens, **fields)
                assert answer.tokens == expected[number], f"prompt {number}, loaded"
                loaded += 0 < full_block_tokens(tokens) <= answer.cached_tokens
                if answer.cached_tokens < full_block_tokens(tokens):  # a slow machine: its time was over
                    assert second.loads(tokens, 16, **fields).tokens == expected[number], f"prompt {number}, later"
            assert loaded
            assert second.metric("vllm:external_prefix_cache_hits_total") > 0, second.process.text[-3000:]
            node.process.stop(signal.SIGKILL)
            answers = [second.complete(tokens, **fields).tokens for tokens, fields in late]
            assert answers == expected_late, "without a node"
            second.process.must_run()
