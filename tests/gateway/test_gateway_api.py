"""The OpenAI API as its own client sees it, in front of engines that speak the real protocol."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from kvpool.core import hashing
from kvpool.v1 import engine_pb2
from scheduler.gateway.credentials import Tenant
from scheduler.gateway.text import load_tokenizer
from tests.gateway.cluster_made import (
    BLOCK_TOKENS,
    MODEL,
    ClusterMade,
    cluster,
    expected_tokens,
    http_client,
    run,
    saying,
    split,
)
from tests.gateway.made_tokenizer import EOS

PROMPT = "hello world, this is a prompt"


def client_of(c: ClusterMade, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=c.url, api_key=key, max_retries=0)


def test_completion_and_its_stream_say_the_same(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, client_of(c) as client:
            text = load_tokenizer(tokenizer)
            expected = expected_tokens(text.encode(PROMPT).tolist(), 9)
            c.engines[0].cached_tokens = 4
            ask: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
            whole = await client.completions.create(**ask)
            assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
            assert whole.choices[0].text == text.decode(expected)
            assert whole.choices[0].finish_reason == "length"
            assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
            assert whole.usage.completion_tokens == 9
            assert whole.usage.prompt_tokens == len(text.encode(PROMPT))
            assert whole.usage.prompt_tokens_details.cached_tokens == 5
            stream = await client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
            chunks = [chunk async for chunk in stream]
            assert "".join(k.choices[0].text for k in chunks if k.choices) == whole.choices[0].text
            assert [k.choices[0].finish_reason for k in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
            assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
            await c.until(c.nothing_left)

    run(test())


def test_chat_and_its_stream_say_the_same(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, client_of(c) as client:
            messages: Any = [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]},
            ]
            ask: dict[str, Any] = {"model": MODEL, "messages": messages, "max_completion_tokens": 5}
            whole = await client.chat.completions.create(**ask)
            assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
            assert whole.choices[0].message.role == "assistant"
            text = load_tokenizer(tokenizer)
            plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello\nworld"}]
            expected = text.decode(expected_tokens(text.encode_chat(plain).tolist(), 5))
            assert whole.choices[0].message.content == expected
            chunks = [k async for k in await client.chat.completions.create(**ask, stream=True)]
            assert chunks[0].choices[0].delta.role == "assistant"
            assert "".join(k.choices[0].delta.content or "" for k in chunks) == expected
            assert chunks[-1].choices[0].finish_reason == "length"
            assert {k.id for k in chunks} == {chunks[0].id}

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cross_tokens_and_characters_stay_whole(tokenizer: str, stream: bool) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, client_of(c) as client:
            text = load_tokenizer(tokenizer)
            c.engines[0].next_token = saying(text.encode("größe 😀 → STOPPED and more").tolist())
            ask: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60, "stop": ["STOP", "never"]}
            if stream:
                chunks = [k async for k in await client.completions.create(**ask, stream=True)]
                pieces = [k.choices[0].text for k in chunks]
                assert not any("\ufffd" in piece for piece in pieces)
                said, finish = "".join(pieces), chunks[-1].choices[0].finish_reason
            else:
                whole = await client.completions.create(**ask)
                said, finish = whole.choices[0].text, whole.choices[0].finish_reason
            assert (said, finish) == ("größe 😀 → ", "stop")
            await c.until(lambda: c.engines[0].aborts)
            await c.until(lambda: [o.finish_reason for o in c.scheduler.ends()] == ["stop"])

    run(test())


def test_end_of_sequence_is_no_text(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, http_client(c.url) as http:
            hello = load_tokenizer(tokenizer).encode("hello").tolist()
            c.engines[0].next_token = saying(hello)
            ask = {"model": MODEL, "prompt": "w", "max_tokens": 9, "return_token_ids": True}
            answer = (await http.post("/completions", json=ask)).json()
            choice = answer["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == ("hello", "stop")
            assert choice["token_ids"] == [*hello, EOS]
            assert answer["usage"]["completion_tokens"] == len(hello) + 1
            c.engines[0].next_token = saying(hello)
            answer = (await http.post("/completions", json={**ask, "ignore_eos": True})).json()
            assert answer["choices"][0]["finish_reason"] == "length"
            assert len(answer["choices"][0]["token_ids"]) == 9
            c.engines[0].next_token = saying(hello)
            answer = (await http.post("/completions", json={**ask, "stop_token_ids": hello[:1]})).json()
            assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "stop")

    run(test())


def test_prompts_in_every_form(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, http_client(c.url) as http:
            text = load_tokenizer(tokenizer)
            ids = [text.encode(t).tolist() for t in ("hello", "world")]
            expected = [text.decode(expected_tokens(i, 6)) for i in ids]
            for prompt, answers in (
                ("hello", expected[:1]),
                (ids[0], expected[:1]),
                (["hello", "world"], expected),
                (ids, expected),
            ):
                ask = {"model": MODEL, "prompt": prompt, "max_tokens": 6}
                whole = (await http.post("/completions", json=ask)).json()
                assert [k["text"] for k in whole["choices"]] == answers
                assert [k["index"] for k in whole["choices"]] == list(range(len(answers)))
                assert whole["usage"]["completion_tokens"] == 6 * len(answers)
                said = [""] * len(answers)
                for chunk in await read_stream(http, "/completions", {**ask, "stream": True}):
                    said[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
                assert said == answers
            await c.until(c.nothing_left)

    run(test())


async def read_stream(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Chunks of a stream, which must end with [DONE]."""
    async with http.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_split_request(tokenizer: str) -> None:
    """Both legs get the same request; the first token goes to the client and to the decode worker."""

    async def test() -> None:
        async with cluster(tokenizer) as c, http_client(c.url) as http:
            prefill, decode = c.engines
            c.scheduler.decide = lambda _: split(prefill, decode)
            prompt = list(range(20, 33))
            ask = {
                "model": MODEL, "prompt": prompt, "max_tokens": 5, "seed": 7, "temperature": 0.5, "top_p": 0.9,
                "stream": True, "kvpool": {"return_token_ids": True, "session": "s", "policy": "sticky"},
            }  # fmt: skip
            chunks = await read_stream(http, "/completions", ask)
            got = [t for k in chunks for t in k["choices"][0]["token_ids"]]
            assert got == expected_tokens(prompt, 5)
            assert chunks[0]["choices"][0]["prompt_token_ids"] == prompt
            request_id = chunks[0]["id"]
            first, second = prefill.submits[0], decode.submits[0]
            assert (first.phase, second.phase) == (engine_pb2.PHASE_PREFILL, engine_pb2.PHASE_DECODE)
            assert first.request_id == second.request_id == request_id
            assert first.handoff.request_id == second.handoff.request_id == request_id
            assert (first.publish_to, second.handoff_source) == ("node-0", "127.0.0.1:1")
            assert [r.source_id for r in first.pull] == ["node-0"] and not second.pull
            for submit in (first, second):
                assert submit.sampling.seed == 7 and submit.sampling.max_tokens == 5
                assert abs(submit.sampling.temperature - 0.5) < 1e-6 and abs(submit.sampling.top_p - 0.9) < 1e-6
            assert decode.first_tokens == {request_id: got[0]}
            place = c.scheduler.places[0]
            assert (place.policy, place.sticky_key, place.prompt_tokens) == ("sticky", "s", 13)
            keys = hashing.block_keys(first.root_key, _array(prompt), BLOCK_TOKENS)
            assert place.keys[0].keys == keys.tobytes() and len(keys) == 3
            placement = {"request_id": request_id, "prefill": "engine-0", "decode": "engine-1", "split": True}
            assert chunks[-1]["kvpool"] == {"placements": [[placement]]}
            await c.until(lambda: len(c.scheduler.ends()) == 1)
            outcome = c.scheduler.ends()[0]
            assert (outcome.finish_reason, outcome.tokens) == ("length", 5)
            assert outcome.ttft_us > 0 and outcome.prefill.prefill_us == 2 and outcome.decode.prefill_us == 2
            assert [o.request_id for o in c.scheduler.outcomes if o.first_token] == [request_id]

    run(test())


def _array(tokens: list[int]) -> Any:
    import numpy as np

    return np.asarray(tokens, dtype=np.uint32)


def test_logprobs_and_gaps(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, client_of(c) as client:
            whole = await client.completions.create(model=MODEL, prompt="w", max_tokens=3, logprobs=1)
            logprobs = whole.choices[0].logprobs
            assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
            assert logprobs.token_logprobs == [-0.5] * 3 and len(logprobs.tokens) == 3
            assert logprobs.text_offset[0] == 0 and len(logprobs.text_offset) == 3
            chat = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "w"}], max_tokens=3, logprobs=True,
                extra_body={"kvpool": {"top2_gaps": True}},
            )  # fmt: skip
            content = chat.choices[0].logprobs
            assert content is not None and content.content is not None
            assert [k.logprob for k in content.content] == [-0.5] * 3
            assert chat.choices[0].model_extra == {"top2_gaps": [0.25] * 3}

    run(test())


def test_models_health_and_metrics(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, client_of(c) as client, http_client() as http:
            assert [m.id async for m in client.models.list()] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("no/such")
            base = c.url.removesuffix("/v1")
            health = await http.get(f"{base}/health")
            assert health.status_code == 200 and health.json()["models"] == [MODEL]
            await client.completions.create(model=MODEL, prompt="hello", max_tokens=3)
            metrics = (await http.get(f"{base}/metrics")).text
            for line in (
                'kvpool_gateway_requests_total{model="made",outcome="length"} 1.0',
                'kvpool_gateway_ttft_seconds_count{model="made"} 1.0',
                'kvpool_gateway_itl_seconds_count{model="made"} 2.0',
                'kvpool_gateway_generated_tokens_total{model="made"} 3.0',
                'kvpool_gateway_placements_total{kind="co-located"} 1.0',
                "kvpool_gateway_active_requests 0.0",
                "kvpool_gateway_scheduler_connected 1.0",
            ):
                assert line in metrics

    run(test())


def test_defaults_of_answer_length(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, client_of(c) as client:
            c.engines[0].next_token = saying([])
            await client.completions.create(model=MODEL, prompt=[9] * 10)
            await client.completions.create(model=MODEL, prompt=[9] * 500)
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "w"}])
            assert [p.max_tokens for p in c.scheduler.places] == [16, 12, 512 - c.scheduler.places[2].prompt_tokens]

    run(test())


def test_credentials_and_salts_keep_tenants_apart(tokenizer: str, tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# who: key\nann: secret-a\nbob:secret-b\n")

    async def test() -> None:
        async with cluster(tokenizer, api_keys=str(keys)) as c:
            for key in ("none", "secret-", "ann"):
                async with client_of(c, key) as client:
                    with pytest.raises(openai.AuthenticationError) as caught:
                        await client.completions.create(model=MODEL, prompt="hello", max_tokens=1)
                    assert caught.value.code == "invalid_api_key"
            async with http_client(c.url) as http:
                response = await http.get("/models")
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            for key, salt in (("secret-a", ""), ("secret-b", ""), ("secret-a", "x"), ("secret-a", "")):
                async with client_of(c, key) as client:
                    await client.completions.create(
                        model=MODEL, prompt="hello world", max_tokens=1, extra_body={"cache_salt": salt}
                    )
            roots = [s.root_key for s in c.engines[0].submits]
            assert roots[0] == roots[3] and len(set(roots)) == 3
            assert len({p.keys[0].keys for p in c.scheduler.places}) == 3
            namespace_id = c.engines[0].submits[0].namespace_id
            salted = hashing.Extras(salt=Tenant("ann", "secret-a").salt("x"))
            assert roots[2] == hashing.root_key(namespace_id, salted)
            assert namespace_id not in roots

    run(test())


def test_without_credentials_only_a_salt_separates(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, client_of(c) as client:
            for extra in ({}, {"cache_salt": ""}, {"cache_salt": "x"}):
                await client.completions.create(model=MODEL, prompt="hello", max_tokens=1, extra_body=extra)
            roots = [s.root_key for s in c.engines[0].submits]
            assert roots[0] == roots[1] == c.engines[0].submits[0].namespace_id != roots[2]

    run(test())
