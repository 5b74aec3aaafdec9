"""What spoils the shared servers, and so runs last: one of them is killed, and the weights of the other one change."""

from __future__ import annotations

from typing import Any

from tests.vllm_real.clusters import Cluster, Member, kill
from tests.vllm_real.prompts import words

ANSWER_TOKENS = 400


def alive(served: Cluster) -> list[Member]:
    return [member for member in served.servers if member.engine.process.popen.poll() is None]


def token_ids(event: dict[str, Any]) -> list[int]:
    return [token for choice in event.get("choices") or () for token in choice.get("token_ids") or ()]


def test_another_server_goes_on_when_one_is_killed(served: Cluster) -> None:
    talk = words(41, 200)
    expected = served.plain.complete(talk, ANSWER_TOKENS)
    body = served.body(talk, ANSWER_TOKENS, kvpool={}, stream_options={"include_usage": True})
    stream, events, tokens = served.stream(body), [], []
    while len(tokens) < 20:
        events.append(next(stream))
        tokens += token_ids(events[-1])
    running = [member.engine for member in served.servers if member.engine.metric("vllm:num_requests_running")]
    assert len(running) == 1, "the answer was over before anything could be killed"
    kill(running[0].process)
    for event in stream:
        events.append(event)
        tokens += token_ids(event)
    assert tuple(tokens) == expected.tokens
    placements = next(event["kvpool"]["placements"][0] for event in events if event.get("kvpool"))
    assert placements[0]["decode"] == running[0].name != placements[-1]["decode"]
    usage = next(event["usage"] for event in events if event.get("usage"))
    assert usage["completion_tokens"] == ANSWER_TOKENS and usage["prompt_tokens"] == len(talk)
    served.until(lambda: list(served.instances()) == [placements[-1]["decode"]], "the lost server is still listed")
    assert served.streamed(talk, 8).tokens == expected.tokens[:8]
    served.until(served.nothing_left, "something is left")


def test_weights_that_change(served: Cluster) -> None:
    """Who resets the external cache too, shares nothing with what was stored before."""
    engine, talk = alive(served)[0].engine, list(range(300, 400))
    before = engine.complete(talk)
    engine.loads(talk)
    served.until(
        lambda: engine.post("/reset_prefix_cache?reset_external=true", {})["success"], "the caches can't be reset"
    )
    after = engine.complete(talk, kv_transfer_params={"kvpool_handoff": True})
    assert after.cached_tokens == 0 and after.tokens == before.tokens
    assert after.kv_transfer_params is not None
    assert after.kv_transfer_params["kvpool_key_mask"] != after.kv_transfer_params["kvpool_namespace"]
    assert engine.loads(talk, 16).tokens == before.tokens  # with itself it does share
