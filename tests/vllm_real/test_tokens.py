"""Two vLLM servers that share KV through the pool alone answer what one server without a connector answers."""

from __future__ import annotations

import time

from tests.vllm_real.clusters import Servers
from tests.vllm_real.prompts import prompts
from tests.vllm_real.serving import BLOCK_TOKENS, REPLY_S, Engine, full_block_tokens


def idle(engine: Engine) -> bool:
    return engine.metric("vllm:num_requests_running") + engine.metric("vllm:num_requests_waiting") == 0


def test_prefill_on_one_decode_on_another(servers: Servers) -> None:
    asked, in_time = prompts(1), 0
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
        full = full_block_tokens(tokens)
        assert answer.cached_tokens <= full, f"prompt {number} of {len(tokens)} tokens"
        if answer.cached_tokens == full:
            in_time += full > 0
        else:  # whatever is late is computed; once it is in the pool it is found
            assert servers.prefill.loads(tokens, **fields).tokens == expected[:1], f"prompt {number}"
            assert servers.decode.loads(tokens, 16, **fields).tokens == expected, f"prompt {number}"
    assert in_time
    assert servers.decode.metric("vllm:kvpool_blocks_loaded_total") > 0
    deadline_s = time.monotonic() + REPLY_S
    while not idle(servers.decode):  # nothing goes on for those who left
        assert time.monotonic() < deadline_s
        servers.decode.process.wait_a_little()


def test_a_conversation_goes_back_and_forth(servers: Servers) -> None:
    """Each turn is answered by the other server, which finds the whole conversation, answers included, in the pool."""
    both = (servers.prefill, servers.decode)
    talk, found = list(range(100, 170)), 0
    for turn in range(6):
        engine = both[turn % 2]
        expected = servers.plain.complete(talk, 40).tokens
        answer = engine.complete(talk, 40)
        assert answer.tokens == expected, f"turn {turn}"
        found += answer.cached_tokens >= len(talk) - 30 - 2 * BLOCK_TOKENS if turn else 0
        talk += [*expected, *range(200 + 30 * turn, 230 + 30 * turn)]
        engine.loads(talk[:-30])
    assert found
