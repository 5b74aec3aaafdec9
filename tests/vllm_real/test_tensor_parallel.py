"""Prefill on two ranks, decode on two ranks of another server: each rank takes its own shard of a block."""

from __future__ import annotations

from pathlib import Path

from tests.vllm_real.clusters import Servers
from tests.vllm_real.prompts import prompts
from tests.vllm_real.serving import PATIENT, Engine, Node, connector, full_block_tokens, running

TWO_RANKS = ["--tensor-parallel-size", "2"]


def test_prefill_on_one_decode_on_another(servers: Servers, tmp_path: Path) -> None:
    node = Node(tmp_path)
    both = [Engine(tmp_path, name, connector(node, **PATIENT), TWO_RANKS) for name in ("first", "second")]
    prefill, decode = both
    with running(node, *both):
        for number, (tokens, fields) in enumerate(prompts(5)[::4]):
            expected = servers.plain.complete(tokens, **fields).tokens
            first = prefill.complete(tokens, 1, kv_transfer_params={"kvpool_handoff": True}, **fields)
            assert first.tokens == expected[:1], f"prompt {number}"
            answer = decode.complete(tokens, kv_transfer_params=first.kv_transfer_params, **fields)
            assert answer.tokens == expected, f"prompt {number}"
            if answer.cached_tokens < full_block_tokens(tokens):  # late, and so computed
                prefill.loads(tokens, **fields)
                assert decode.loads(tokens, 16, **fields).tokens == expected, f"prompt {number}"
        assert decode.metric("vllm:kvpool_blocks_loaded_total") > 0
