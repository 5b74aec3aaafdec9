"""The gateway in front of real vLLM servers: one plain server beside them says what is right."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.vllm_real.clusters import Cluster, cluster, kill
from tests.vllm_real.prompts import VOCABULARY, prompts
from tests.vllm_real.serving import BLOCK_TOKENS

#: Three servers start at once, on few cores.
pytestmark = pytest.mark.timeout(600)

TWO = {"n": 2, "temperature": 0.8, "seed": 7}
SPLIT = {"policy": "always_split"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("gateway")) as made:
        yield made


def words(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(6, VOCABULARY) for _ in range(count)]


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
    assert splits >= 20 if options else True
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
    """A conversation stays where it is; the scheduler says beforehand how much of it is there.

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
    assert [placement["decode"] for placement in second.placements] == [home]
    assert second.cached_tokens == held * BLOCK_TOKENS
    told = served.explain(second.placements[0]["request_id"])
    assert told.choice.placement.cached_tokens == held * BLOCK_TOKENS
    assert second.tokens == served.plain.complete(talk).tokens


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
    status = served.status()
    assert status.placements >= len(turns) and not status.refusals


def test_another_server_goes_on_when_one_is_killed(served: Cluster) -> None:
    """The last test here: one server is gone after it."""
    talk = words(41, 200)
    expected = served.plain.complete(talk, 300)
    events, tokens = served.stream(served.body(talk, 300, kvpool={}, stream_options={"include_usage": True})), []
    collected = []
    for event in events:
        collected.append(event)
        tokens += [token for choice in event.get("choices") or () for token in choice.get("token_ids") or ()]
        if len(tokens) >= 20 and len(collected) < 10_000:
            break
    running = [s for s in served.servers if s.engine.metric("vllm:num_requests_running")]
    assert len(running) == 1, "the answer was over before anything could be killed"
    kill(running[0].engine.process)
    for event in events:
        collected.append(event)
        tokens += [token for choice in event.get("choices") or () for token in choice.get("token_ids") or ()]
    assert tuple(tokens) == expected.tokens
    placements = next(event["kvpool"]["placements"][0] for event in collected if event.get("kvpool"))
    lost = running[0].engine.name
    assert placements[0]["decode"] == lost != placements[-1]["decode"]
    usage = next(event["usage"] for event in collected if event.get("usage"))
    assert usage["completion_tokens"] == 300 and usage["prompt_tokens"] == len(talk)
    served.until(lambda: list(served.instances()) == [placements[-1]["decode"]], "the lost server is still listed")
    assert served.streamed(talk, 8).tokens == expected.tokens[:8]
    served.until(served.nothing_left, "something is left")
