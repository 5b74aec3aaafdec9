"""What spoils the shared servers, and so runs last: one of them is killed, and the weights of the other one change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.vllm_real.clusters import Cluster, Member, kill
from tests.vllm_real.prompts import words
from tests.vllm_real.serving import Engine

ANSWER_TOKENS = 400


def alive(served: Cluster) -> list[Member]:
    return [member for member in served.servers if member.engine.process.popen.poll() is None]


def token_ids(event: dict[str, Any]) -> list[int]:
    return [token for choice in event.get("choices") or () for token in choice.get("token_ids") or ()]


def begun(served: Cluster, talk: list[int]) -> tuple[Iterator[dict[str, Any]], list[dict[str, Any]], Engine]:
    """An answer of which 20 tokens have come: its stream, the events so far, and the server that makes it.

    Where all of it was there before anybody could look, it is asked for again.
    """
    body = served.body(talk, ANSWER_TOKENS, kvpool={}, stream_options={"include_usage": True})
    for _ in range(20):
        stream, events = served.stream(body), []
        while sum(len(token_ids(event)) for event in events) < 20:
            events.append(next(stream))
        for member in served.servers:
            if member.engine.metric("vllm:num_requests_running"):
                return stream, events, member.engine
        stream.close()
        served.until(served.nothing_left, "something is left")
    raise AssertionError("answers were over before anything could be killed")


def test_another_server_goes_on_when_one_is_killed(served: Cluster) -> None:
    talk = words(41, 200)
    expected = served.plain.complete(talk, ANSWER_TOKENS)
    stream, events, running = begun(served, talk)
    kill(running.process)
    events += stream
    assert tuple(token for event in events for token in token_ids(event)) == expected.tokens
    placements = next(event["kvpool"]["placements"][0] for event in events if event.get("kvpool"))
    assert placements[0]["decode"] == running.name != placements[-1]["decode"]
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
