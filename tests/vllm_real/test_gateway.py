"""The gateway in front of real vLLM servers: one plain server beside them says what is right."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.vllm_real.clusters import Cluster
from tests.vllm_real.prompts import prompts, words
from tests.vllm_real.serving import BLOCK_TOKENS

TWO = {"n": 2, "temperature": 0.8, "seed": 7}
SPLIT = {"policy": "always_split"}


@pytest.mark.parametrize("options", [{}, SPLIT])
def test_tokens_are_those_of_one_plain_server(served: Cluster, options: dict[str, Any]) -> None:
    splits = 0
    for number, (tokens, fields) in enumerate(prompts(len(options) + 2)):
        if number % 2:
            continue
        expected = served.plain.complete(tokens, **fields).tokens
        answer = served.streamed(tokens, kvpool=options, **fields)
        assert answer.tokens == expected and answer.finish == "length", f"prompt {number}"
        splits += any(placement["split"] for placement in answer.placements)
    assert splits or not options
    loaded = sum(server.engine.metric("vllm:kvpool_blocks_loaded_total") for server in served.servers)
    assert loaded > 0 or not options
    served.until(served.nothing_left, "something is left")


def test_answers_in_one_and_chats(served: Cluster) -> None:
    messages = [{"role": "user", "content": "def add(a, b): what does this return? " * 4}]
    chat = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 20}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    for extra in ({}, {"logprobs": True, "top_logprobs": 3}, {"tools": tools, "tool_choice": "none"}, TWO):
        expected = served.plain.post("/v1/chat/completions", {**chat, **extra})
        for options in ({}, SPLIT):
            status, answer = served.post("/v1/chat/completions", {**chat, **extra, "kvpool": options})
            assert status == 200, answer
            assert [c["message"] for c in answer["choices"]] == [c["message"] for c in expected["choices"]]
            assert answer["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"]
    text = served.plain.post("/v1/chat/completions", chat)["choices"][0]["message"]["content"]
    for options in ({}, SPLIT):
        events = list(served.stream({**chat, "kvpool": options}, "/v1/chat/completions"))
        told = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
        assert told == text and events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "prompts_read_differently_total{" not in served.gateway_metrics()


def test_errors_are_vllms_own(served: Cluster) -> None:
    status, answer = served.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": -1})
    assert status == 400 and answer["error"]["type"] == "BadRequestError" and "max_tokens" in answer["error"]["message"]
    status, answer = served.post("/v1/completions", {"model": "tiny", "prompt": [5, 10**9], "max_tokens": 1})
    assert status == 400 and "vocabulary" in answer["error"]["message"]
    status, answer = served.post("/v1/completions", {"model": "nothing", "prompt": "x"})
    assert status == 404


def test_what_lies_in_a_servers_own_cache_is_known(served: Cluster) -> None:
    """The scheduler says beforehand how much of a conversation is where.

    Its blocks lie in the server's own cache and, stored by the connector, on the node, under one name.
    """
    talk = words(11, 400)
    first = served.streamed(talk, 64, kvpool={}, stream_options={"include_usage": True})
    home = first.placements[0]["decode"]
    held = (len(talk) + 63) // BLOCK_TOKENS
    whole = [*talk, *first.tokens]
    sources = {f"{home}/hbm": held, f"node-{served.node.port}": held}
    served.until(lambda: sources.items() <= served.holders(whole).items(), "blocks are not where they should be")
    talk += [*first.tokens, *words(12, 50)]
    second = served.streamed(talk, 16, kvpool={}, stream_options={"include_usage": True})
    assert second.tokens == served.plain.complete(talk).tokens
    told = served.explain(second.placements[0]["request_id"])
    stays = [c.cached_tokens for c in told.candidates if c.decode_instance == home and not c.split]
    assert stays == [held * BLOCK_TOKENS], told
    # Where it goes depends on what servers have cost so far; where it stays, it is cached as foreseen.
    if [placement["decode"] for placement in second.placements] == [home]:
        assert second.cached_tokens == told.choice.placement.cached_tokens == held * BLOCK_TOKENS


def test_a_client_that_leaves_frees_everything(served: Cluster) -> None:
    for options in ({}, SPLIT):
        stream = served.stream(served.body(words(21, 100), 1500, kvpool=options))
        for _ in range(5):
            next(stream)
        assert not served.nothing_left()
        stream.close()
        served.until(served.nothing_left, "an answer goes on for nobody")


def test_a_small_load_without_errors(served: Cluster) -> None:
    """Conversations side by side, under both ways; each answer is the right one."""

    def conversation(seed: int) -> list[tuple[list[int], tuple[int, ...]]]:
        talk, said = words(31, 3 * BLOCK_TOKENS) + words(100 + seed, 40), []
        for turn in range(3):
            answer = served.streamed(talk, 24, kvpool=SPLIT if seed % 2 else {})
            assert answer.finish == "length" and len(answer.tokens) == 24
            said.append((list(talk), answer.tokens))
            talk += [*answer.tokens, *words(1000 * seed + turn, 30)]
        return said

    with ThreadPoolExecutor(4) as pool:
        turns = [turn for said in pool.map(conversation, range(6)) for turn in said]
    for talk, tokens in turns:
        assert tokens == served.plain.complete(talk, 24).tokens
    served.until(served.nothing_left, "something is left")
    assert served.status().placements >= len(turns)
