"""Two vLLM servers that share KV through the pool alone answer what one server without a connector answers."""

from __future__ import annotations

import contextlib
import urllib.error
from pathlib import Path

from tests.vllm_real.prompts import prompts
from tests.vllm_real.serving import BLOCK_TOKENS, Engine, Node, connector, running


def test_prefill_on_one_decode_on_another(tmp_path: Path) -> None:
    node = Node(tmp_path)
    plain = Engine(tmp_path, "plain")
    prefill = Engine(tmp_path, "prefill", connector(node))
    decode = Engine(tmp_path, "decode", connector(node, handoff_wait_s=30.0))
    asked = prompts(1)
    assert len(asked) >= 40
    with running(node, plain, prefill, decode):
        hits = 0
        for number, (tokens, fields) in enumerate(asked):
            expected = plain.complete(tokens, **fields).tokens
            first = prefill.complete(tokens, 1, kv_transfer_params={"kvpool_handoff": True}, **fields)
            assert first.tokens == expected[:1], f"prompt {number}"
            if number % 7 == 3:  # a client that leaves in the middle
                with contextlib.suppress(TimeoutError, urllib.error.URLError):
                    decode.post(
                        "/v1/completions",
                        {"model": "tiny", "prompt": tokens, "max_tokens": 400, "ignore_eos": True},
                        timeout_s=0.05,
                    )
            answer = decode.complete(tokens, kv_transfer_params=first.kv_transfer_params, **fields)
            assert answer.tokens == expected, f"prompt {number}"
            whole_blocks = (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            assert answer.cached_tokens == whole_blocks, f"prompt {number} of {len(tokens)} tokens"
            hits += answer.cached_tokens
        assert hits > 0 and decode.metric("vllm:kvpool_blocks_loaded_total") > 0
        assert decode.metric("vllm:kvpool_blocks_failed_total") == 0
