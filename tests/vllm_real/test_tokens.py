"""Two vLLM servers that share KV through the pool alone answer what one server without a connector answers."""

from __future__ import annotations

import time

from tests.vllm_real.prompts import prompts
from tests.vllm_real.serving import BLOCK_TOKENS, REPLY_S, Engine, Servers


def idle(engine: Engine) -> bool:
    return engine.metric("vllm:num_requests_running") + engine.metric("vllm:num_requests_waiting") == 0


def test_prefill_on_one_decode_on_another(servers: Servers) -> None:
    asked = prompts(1)
    assert len(asked) >= 40
    for number, (tokens, fields) in enumerate(asked):
        expected = servers.plain.complete(tokens, **fields).tokens
        first = servers.prefill.complete(tokens, 1, kv_transfer_params={"kvpool_handoff": True}, **fields)
        assert first.tokens == expected[:1], f"prompt {number}"
        assert first.kv_transfer_params is not None
        assert len(first.kv_transfer_params["kvpool_namespace"]) == 32
        if number % 7 == 3:  # a client that leaves in the middle
            servers.decode.leave(tokens, 3, kv_transfer_params=first.kv_transfer_params, **fields)
        answer = servers.decode.complete(tokens, kv_transfer_params=first.kv_transfer_params, **fields)
        assert answer.tokens == expected, f"prompt {number}"
        whole_blocks = (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert answer.cached_tokens == whole_blocks, f"prompt {number} of {len(tokens)} tokens"
    assert servers.decode.metric("vllm:kvpool_blocks_loaded_total") > 0
    assert servers.decode.metric("vllm:kvpool_blocks_failed_total") == 0
    deadline_s = time.monotonic() + REPLY_S
    while not idle(servers.decode):  # nothing goes on for those who left
        assert time.monotonic() < deadline_s
        servers.decode.process.wait_a_little()


def test_a_conversation_goes_back_and_forth(servers: Servers) -> None:
    """Each turn is answered by the other server, which finds the whole conversation, answers included, in the pool."""
    both = (servers.prefill, servers.decode)
    talk = list(range(100, 170))
    for turn in range(6):
        engine = both[turn % 2]
        expected = servers.plain.complete(talk, 40).tokens
        answer = engine.complete(talk, 40)
        assert answer.tokens == expected, f"turn {turn}"
        if turn:
            assert answer.cached_tokens >= len(talk) - 30 - 2 * BLOCK_TOKENS, f"turn {turn}"
        talk += [*expected, *range(200 + 30 * turn, 230 + 30 * turn)]
        engine.stored(talk[:-30])


def test_weights_that_change(servers: Servers) -> None:
    """Who resets the external cache too, shares nothing with what was stored before."""
    talk = list(range(300, 400))
    before = servers.prefill.complete(talk)
    servers.prefill.stored(talk)
    servers.prefill.forget()
    assert servers.prefill.post("/reset_prefix_cache?reset_external=true", {})["success"]
    after = servers.prefill.complete(talk, kv_transfer_params={"kvpool_handoff": True})
    assert after.cached_tokens == 0 and after.tokens == before.tokens
    assert after.kv_transfer_params is not None
    assert after.kv_transfer_params["kvpool_key_mask"] != after.kv_transfer_params["kvpool_namespace"]
    servers.prefill.stored(talk)  # with itself it does share
