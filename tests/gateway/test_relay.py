"""Requests to servers of their own: what they get, what the client gets, and who may disappear when."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from kvpool.v1.scheduler_pb2 import Placement, PlaceReply
from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.credentials import Tenant
from scheduler.gateway.lifecycle import LifecycleLimits
from scheduler.gateway.relay.asks import Ask
from scheduler.gateway.relay.reading import _with_calls, read_ask
from scheduler.gateway.relay.relaying import Relay, patience_of
from scheduler.gateway.relay.upstream import Patience
from tests.gateway.cluster_made import (
    BLOCK_TOKENS,
    MODEL,
    TEST_DEADLINE_S,
    ClusterMade,
    colocated,
    expected_tokens,
    http_client,
    run,
    saying,
    split,
)
from tests.gateway.server_made import NAMING, ServerMade, served

PROMPT = list(range(20, 31))
ASK: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
CHAT: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 8, "temperature": 0,
}  # fmt: skip


def servers_of(c: ClusterMade) -> list[ServerMade]:
    return c.engines  # type: ignore[return-value]


async def post(c: ClusterMade, body: dict[str, Any], path: str = "completions", **headers: str) -> httpx.Response:
    async with http_client() as http:
        return await http.post(f"{c.url}/{path}", content=json.dumps(body).encode(), headers=headers)


class Stream:
    """A client that reads a stream event by event."""

    def __init__(self, c: ClusterMade, body: dict[str, Any], path: str = "completions") -> None:
        self._url, self._body = f"{c.url}/{path}", {"stream": True, **body}
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.status = 0
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with http_client() as http, http.stream("POST", self._url, json=self._body) as response:
            self.status = response.status_code
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self.events.append(json.loads(line[6:]))
                self._changed.set()

    async def until(self, count: int) -> None:
        """Until so many pieces of text came."""
        while sum(bool(self._text_of(event)) for event in self.events) < count:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), TEST_DEADLINE_S)

    async def whole(self) -> Stream:
        await asyncio.wait_for(self.task, TEST_DEADLINE_S)
        return self

    @staticmethod
    def _text_of(event: dict[str, Any]) -> str:
        choice = (event.get("choices") or [{}])[0]
        return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")

    @property
    def text(self) -> str:
        return "".join(self._text_of(event) for event in self.events)

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [choice for event in self.events for choice in event.get("choices") or ()]

    @property
    def tokens(self) -> list[int]:
        return [token for choice in self.choices for token in choice.get("token_ids") or ()]

    @property
    def finish(self) -> list[str]:
        return [choice["finish_reason"] for choice in self.choices if choice["finish_reason"]]

    @property
    def usage(self) -> dict[str, Any]:
        return next(event["usage"] for event in self.events if event.get("usage"))


def unhurried(server: ServerMade) -> PlaceReply:
    """Placed on one server, which is predicted to take 15 s: four times as long is waited for its first token."""
    placed = colocated(server)  # type: ignore[arg-type]
    placed.placement.predicted_ttft_us = 15_000_000
    return placed


def text_of(c: ClusterMade, count: int, prompt: list[int] = PROMPT) -> str:
    return servers_of(c)[0].tokenizer.decode(expected_tokens(prompt, count))


def test_a_whole_answer_is_passed_on(tokenizer: str) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            body = {**ASK, "guided_regex": "a+", "unheard_of": {"x": [1]}, "kvpool": {"priority": 3}}
            response = await post(c, body)
            reply, (call,) = response.json(), servers_of(c)[0].calls
            assert response.status_code == 200 and reply["id"] == response.headers["x-request-id"]
            assert reply["choices"][0]["text"] == text_of(c, 8)
            assert call.body == {name: value for name, value in body.items() if name != "kvpool"}
            assert call.headers["x-request-id"] == reply["id"]
            assert reply["kvpool"]["placements"][0][0]["decode"] == "server-0"
            place = c.scheduler.places[0]
            assert (place.prompt_tokens, place.max_tokens, place.priority) == (len(PROMPT), 8, 3)
            keys = NAMING.keys(b"", np.asarray(PROMPT, dtype=np.uint32), BLOCK_TOKENS)
            assert place.keys[0].keys == keys.tobytes() and len(keys) == 2
            await c.until(lambda: c.scheduler.ends() and c.nothing_left())
            assert c.scheduler.ends()[0].finish_reason == "length" and c.scheduler.ends()[0].tokens == 8

    run(test())


@pytest.mark.parametrize("ids", [False, True])
def test_a_stream_is_passed_on(tokenizer: str, ids: bool) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            stream = await Stream(c, {**ASK, "return_token_ids": ids}).whole()
            assert stream.text == text_of(c, 8) and stream.finish == ["length"] and stream.done
            assert stream.tokens == (expected_tokens(PROMPT, 8) if ids else [])
            assert {event["id"] for event in stream.events} == {c.scheduler.places[0].request_id}
            assert not any(event.get("usage") for event in stream.events)
            chat = await Stream(c, {**CHAT, "stream_options": {"include_usage": True}}, "chat/completions").whole()
            assert chat.usage["completion_tokens"] == 8 and chat.choices[0]["delta"]["role"] == "assistant"
            # An end is told behind its first token.
            await c.until(lambda: len(c.scheduler.ends()) == 2 and c.nothing_left())
            firsts = [o for o in c.scheduler.outcomes if o.first_token]
            assert len(firsts) == 2 and all(o.ttft_us for o in firsts)

    run(test())


def test_two_servers_share_an_answer(tokenizer: str) -> None:
    """The first one's token is there before the second one has said anything; it is computed once."""

    async def test() -> None:
        async with served(tokenizer) as c:
            prefill, decode = servers_of(c)
            c.scheduler.decide = lambda request: split(prefill, decode)  # type: ignore[arg-type]
            decode.stop_after = 0
            ask = {**ASK, "return_token_ids": True, "stream_options": {"include_usage": True}, "cache_salt": "s"}
            stream = Stream(c, ask)
            await stream.until(1)
            await c.until(lambda: decode.calls)
            assert stream.tokens == expected_tokens(PROMPT, 1)
            decode.go_on()
            await stream.whole()
            assert stream.tokens == expected_tokens(PROMPT, 8) and stream.text == text_of(c, 8)
            assert stream.finish == ["length"] and stream.usage["completion_tokens"] == 8
            assert stream.usage["prompt_tokens"] == len(PROMPT)
            first, second = prefill.calls[0].body, decode.calls[0].body
            assert (first["max_tokens"], first["stream"], first["cache_salt"]) == (1, False, "s")
            assert first["kv_transfer_params"] == {"kvpool_handoff": True}
            assert second["prompt"] == PROMPT + expected_tokens(PROMPT, 1) and second["max_tokens"] == 7
            assert second["kv_transfer_params"] == {"kvpool_tokens": len(PROMPT)} and second["cache_salt"] == "s"
            await c.until(lambda: c.scheduler.ends() and c.nothing_left())
            assert [o.tokens for o in c.scheduler.ends()] == [8]

    run(test())


def test_two_servers_share_a_chat(tokenizer: str) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            prefill, decode = servers_of(c)
            alone = await Stream(c, CHAT, "chat/completions").whole()
            c.scheduler.decide = lambda request: split(prefill, decode)  # type: ignore[arg-type]
            shared = await Stream(c, CHAT, "chat/completions").whole()
            assert shared.text == alone.text and shared.finish == alone.finish
            assert [choice["delta"].get("role") for choice in shared.choices] == ["assistant"] + [None] * 8
            assert {event["object"] for event in shared.events} == {"chat.completion.chunk"}
            assert [call.path for call in prefill.calls] == ["/v1/chat/completions"] * 2
            assert [call.path for call in decode.calls] == ["/v1/completions"]

    run(test())


def test_an_answer_that_ends_with_its_first_token(tokenizer: str) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            prefill, decode = servers_of(c)
            c.scheduler.decide = lambda request: split(prefill, decode)  # type: ignore[arg-type]
            prefill.next_token = saying([])
            decode.next_token = saying([])
            stream = await Stream(c, CHAT, "chat/completions").whole()
            assert stream.text == "" and stream.finish == ["stop"] and stream.done
            stream = await Stream(c, {**ASK, "max_tokens": 1}).whole()  # not worth two servers
            assert stream.finish == ["stop"]
            await c.until(c.nothing_left)

    run(test())


@pytest.mark.parametrize(
    "extra",
    [
        {"stop": ["zz"]}, {"seed": 5, "temperature": 1}, {"response_format": {"type": "json_object"}}, {"logprobs": 0},
        {"frequency_penalty": 1}, {"something_new": 1}, {"stream": False}, {"min_tokens": 2},
    ],
)  # fmt: skip
def test_answers_that_can_not_be_cut_are_made_by_one(tokenizer: str, extra: dict[str, Any]) -> None:
    """The first server computes the prompt; all of the answer comes from the second, from the client's own body."""

    async def test() -> None:
        async with served(tokenizer) as c:
            prefill, decode = servers_of(c)
            c.scheduler.decide = lambda request: split(prefill, decode)  # type: ignore[arg-type]
            body = {**ASK, "stream": True, **extra}
            if body["stream"]:
                assert (await Stream(c, body).whole()).text == text_of(c, 8)
            else:
                assert (await post(c, body)).json()["choices"][0]["text"] == text_of(c, 8)
            (first,), (second,) = prefill.calls, decode.calls
            assert first.is_prefill and first.body["max_tokens"] == 1 and "min_tokens" not in first.body
            assert {**second.body, "stream_options": 0} == {
                **body, "kv_transfer_params": {"kvpool_tokens": len(PROMPT)}, "stream_options": 0,
            }  # fmt: skip

    run(test())


def test_thoughts_of_a_first_server_are_not_taken_for_an_answer(tokenizer: str) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            prefill, decode = servers_of(c)
            prefill.reasoning = decode.reasoning = True
            c.scheduler.decide = lambda request: split(prefill, decode)  # type: ignore[arg-type]
            stream = await Stream(c, CHAT, "chat/completions").whole()
            assert [call.path for call in decode.calls] == ["/v1/chat/completions"] and stream.text == ""
            # A parser that has not seen enough yet calls a thought an answer; but it counts thoughts.
            prefill.reasoning, prefill.counts_thoughts = False, True
            decode.calls.clear()
            assert sum(bool(choice["delta"].get("reasoning")) for choice in stream.choices) == 8
            await Stream(c, CHAT, "chat/completions").whole()
            assert [call.path for call in decode.calls] == ["/v1/chat/completions"]

    run(test())


def test_nixl_gets_its_parameters_word_for_word(tokenizer: str) -> None:
    """And nothing is added to the prompt: the connector takes all of it for computed elsewhere."""

    async def test() -> None:
        async with served(tokenizer, handoff="nixl") as c:
            prefill, decode = servers_of(c)
            prefill.transfer = {"remote_block_ids": [[1, 2]], "remote_host": "h", "remote_port": 5, "x": None}
            c.scheduler.decide = lambda request: split(prefill, decode)  # type: ignore[arg-type]
            stream = await Stream(c, ASK).whole()
            assert stream.text == text_of(c, 8)
            asked = prefill.calls[0].body["kv_transfer_params"]
            assert asked["do_remote_decode"] is True and asked["do_remote_prefill"] is False
            assert decode.calls[0].body["kv_transfer_params"] == prefill.transfer
            assert decode.calls[0].body["prompt"] == PROMPT

    run(test())


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("how", ["dies", "says an error", "gives up"])
def test_another_server_goes_on(tokenizer: str, chat: bool, how: str) -> None:
    """The client has each token once, and the answer of a server that was never lost."""

    async def test() -> None:
        async with served(tokenizer, servers=3) as c:
            first, second, _ = servers_of(c)
            path, body = ("chat/completions", CHAT) if chat else ("completions", ASK)
            calm = (await Stream(c, body, path).whole()).text
            match how:
                case "dies":
                    first.die_after = 3
                case "says an error":
                    first.error_after = 3
                case _:
                    first.finish_as, first.next_token = "abort", saying(expected_tokens(PROMPT, 3))
                    c.scheduler.places.clear()
                    if chat:
                        return
            stream = await Stream(c, {**body, "kvpool": {}}, path).whole()
            assert stream.text == calm and stream.finish == ["length"] and stream.done
            request = c.scheduler.places[-1]
            assert list(request.exclude_instances) == ["server-0"] and request.request_id.endswith("~1")
            (call,) = second.calls
            assert call.path == "/v1/completions" and call.body["max_tokens"] == 5
            assert request.prompt_tokens == len(call.body["prompt"])
            if not chat:
                assert call.body["prompt"] == PROMPT + expected_tokens(PROMPT, 3)
            await c.until(lambda: len(c.scheduler.ends()) == 3)
            assert [o.finish_reason for o in c.scheduler.ends()] == ["length", "instance_lost", "length"]
            assert [o.tokens for o in c.scheduler.ends()][1:] == [3, 5]

    run(test())


@pytest.mark.parametrize("said", [0, 3])
def test_a_server_that_falls_silent_is_left(tokenizer: str, said: int) -> None:
    """Its HTTP side lives, its engine does not: nothing more would come until the request's own deadline."""

    # Whoever is not silent has the time that a slow machine needs.
    times = {"first_token_timeout_s": 60.0 if said else 1.0, "next_token_timeout_s": 5.0 if said else 60.0}

    async def test() -> None:
        async with served(tokenizer, servers=3, **times) as c:
            first, second, _ = servers_of(c)
            c.scheduler.decide = lambda request: (
                unhurried(second) if request.exclude_instances else colocated(first)  # type: ignore[arg-type]
            )
            first.stop_after = said
            stream = await Stream(c, ASK).whole()
            assert stream.text == text_of(c, 8) and stream.finish == ["length"] and stream.done
            assert list(c.scheduler.places[-1].exclude_instances) == ["server-0"]
            assert second.calls[0].body["prompt"] == PROMPT + expected_tokens(PROMPT, said)
            await c.until(lambda: len(c.scheduler.ends()) == 2)
            assert [o.finish_reason for o in c.scheduler.ends()] == ["instance_lost", "length"]
            assert "has sent nothing for" in c.scheduler.ends()[0].error
            await c.until(c.nothing_left)
            assert all(call.aborted for call in first.calls)  # its engine, should it live, is not kept busy

    run(test())


def test_a_prefill_that_never_comes_is_asked_elsewhere(tokenizer: str) -> None:
    async def test() -> None:
        async with served(tokenizer, servers=3, first_token_timeout_s=1.0) as c:
            prefill, decode, other = servers_of(c)
            c.scheduler.decide = lambda request: (
                unhurried(other) if request.exclude_instances else split(prefill, decode)  # type: ignore[arg-type]
            )
            prefill.stop_after = 0
            assert (await Stream(c, ASK).whole()).text == text_of(c, 8)
            assert list(c.scheduler.places[-1].exclude_instances) == ["server-0"] and not decode.calls
            await c.until(c.nothing_left)

    run(test())


def test_a_server_has_the_time_that_was_predicted_for_it() -> None:
    config = GatewayConfig(first_token_timeout_s=10.0, next_token_timeout_s=7.0)
    for predicted_s, waited_s, first_s in ((0, 0, 10.0), (2, 0, 10.0), (30, 0, 120.0), (30, 20, 40.0), (1, 3, 10.0)):
        placement = Placement(predicted_ttft_us=predicted_s * 10**6, waited_us=waited_s * 10**6)
        assert patience_of(config, placement) == Patience(first_s, 7.0)


def test_a_server_whose_keys_are_others_is_told_of_once(tokenizer: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            prefill, decode = servers_of(c)
            c.scheduler.decide = lambda request: split(prefill, decode)  # type: ignore[arg-type]
            counted = f'kvpool_gateway_handoffs_other_mask_total{{model="{MODEL}"}}'
            for mask, times in ((NAMING.mask.hex(), 0), ("aa" * 16, 1), ("aa" * 16, 2), ("bb" * 16, 3)):
                prefill.transfer = {"kvpool_tokens": 8, "kvpool_key_mask": mask}
                assert (await Stream(c, ASK).whole()).text == text_of(c, 8)
                assert decode.calls[-1].body["kv_transfer_params"] == prefill.transfer
                text = c.gateway.metrics.render().decode()
                assert (f"{counted} {times}.0" in text) if times else (counted not in text)
            said = [r.getMessage() for r in caplog.records if "under other keys" in r.getMessage()]
            assert len(said) == 2 and all(text.startswith("server-0 ") for text in said)

    run(test())


def test_letters_of_several_tokens_survive_a_loss(tokenizer: str) -> None:
    """A server that is lost within a character: its tokens are computed again, and the character comes once."""

    async def test() -> None:
        async with served(tokenizer) as c:
            first, second = servers_of(c)
            said = first.tokenizer.encode("aß☃b").tolist()
            for count in range(1, len(said) + 1):
                first.next_token = second.next_token = _after(PROMPT, said)
                first.die_after = count
                stream = await Stream(c, {**ASK, "max_tokens": 20}).whole()
                assert stream.text == "aß☃b" and stream.finish == ["stop"], f"lost after {count}"

    run(test())


def _after(prompt: list[int], said: list[int]) -> Any:
    """An answer with these tokens, from any place in it on."""
    answer = [*said, 2]

    def say(context: list[int]) -> int:
        assert context[: len(prompt)] == prompt and answer[: len(context) - len(prompt)] == context[len(prompt) :]
        return answer[len(context) - len(prompt)]

    return say


def test_losses_on_the_way_to_two_servers(tokenizer: str) -> None:
    async def test() -> None:
        async with served(tokenizer, servers=3) as c:
            prefill, decode, other = servers_of(c)
            c.scheduler.decide = lambda request: (
                colocated(other) if request.exclude_instances else split(prefill, decode)  # type: ignore[arg-type]
            )
            prefill.die_after = 0
            assert (await Stream(c, ASK).whole()).text == text_of(c, 8)
            assert list(c.scheduler.places[-1].exclude_instances) == ["server-0"] and not decode.calls
            prefill.die_after, decode.die_after = None, 2
            stream = await Stream(c, ASK).whole()
            assert stream.text == text_of(c, 8) and stream.finish == ["length"]
            assert list(c.scheduler.places[-1].exclude_instances) == ["server-1"]
            assert other.calls[-1].body["prompt"] == PROMPT + expected_tokens(PROMPT, 3)
            decode.die_after = 0
            assert (await post(c, ASK)).json()["choices"][0]["text"] == text_of(c, 8)
            await c.until(c.nothing_left)

    run(test())


def test_what_can_not_be_gone_on_with_ends_with_an_error(tokenizer: str) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            first, second = servers_of(c)
            first.die_after = 3
            stream = await Stream(c, {**ASK, "stop": "zz"}).whole()
            assert stream.text == text_of(c, 3) and stream.done and not second.calls
            assert stream.events[-1]["error"]["code"] == "engine_error"
            first.die_after = 0  # the client has nothing yet: begun again
            stream = await Stream(c, {**ASK, "stop": "zz"}).whole()
            assert stream.text == text_of(c, 8) and second.calls[0].body["stop"] == "zz"
            await c.until(c.nothing_left)

    run(test())


def test_replacements_end(tokenizer: str) -> None:
    async def test() -> None:
        limits = LifecycleLimits(replacements_max=2, refusals_max=1, refusal_wait_ms_min=1, refusal_wait_ms_max=1)
        async with served(tokenizer, servers=4, lifecycle=limits) as c:
            for server in servers_of(c):
                server.die_after = 1
            stream = await Stream(c, ASK).whole()
            assert stream.events[-1]["error"]["code"] == "engine_error" and stream.text == text_of(c, 3)
            response = await post(c, ASK)
            assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
            await c.until(c.nothing_left)

    run(test())


def test_errors_are_the_servers_own(tokenizer: str) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            first, second = servers_of(c)
            said = {"error": {"message": "max_tokens must be at least 1", "type": "BadRequestError", "code": 400}}
            first.refuse = (400, said)
            for stream in (False, True):
                response = await post(c, {**ASK, "stream": stream})
                assert (response.status_code, response.json()) == (400, said) and not second.calls
            first.refuse = (503, {"error": {"message": "full"}})
            assert (await post(c, ASK)).status_code == 200 and len(second.calls) == 1
            second.refuse = first.refuse
            c.scheduler.decide = lambda request: colocated(first)  # type: ignore[arg-type]
            response = await post(c, ASK)
            assert (response.status_code, response.json()["error"]["message"]) == (503, "full")
            first.refuse = (401, {"error": {"message": "who are you"}})  # the gateway's key is wrong, not the client's
            response = await post(c, ASK)
            assert response.status_code == 500 and "who are you" not in response.text
            first.refuse, calls = (413, "a page of some proxy"), len(first.calls)  # type: ignore[assignment]
            response = await post(c, ASK)
            assert response.status_code == 413 and response.json()["error"]["code"] == 413
            assert len(first.calls) == calls + 1
            await c.until(c.nothing_left)

    run(test())


@pytest.mark.parametrize("shared", [False, True])
def test_a_client_that_goes_ends_its_request(tokenizer: str, shared: bool) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            first, second = servers_of(c)
            working = second if shared else first
            if shared:
                c.scheduler.decide = lambda request: split(first, second)  # type: ignore[arg-type]
            working.stop_after = 2
            stream = Stream(c, ASK)
            await stream.until(2)
            stream.task.cancel()
            await c.until(lambda: working.calls and working.calls[-1].aborted and c.nothing_left())
            await c.until(lambda: [o.finish_reason for o in c.scheduler.ends()] == ["abort"])
            waiting = asyncio.create_task(post(c, ASK))
            await c.until(lambda: working.running)
            waiting.cancel()
            await c.until(lambda: working.calls[-1].aborted and c.nothing_left())

    run(test())


def test_deadlines_and_the_end_of_the_gateway(tokenizer: str) -> None:
    async def test() -> None:
        async with served(tokenizer, request_timeout_s=5.0) as c:  # time enough for two tokens
            servers_of(c)[0].stop_after = 2
            stream = await Stream(c, ASK).whole()
            assert stream.text == text_of(c, 2) and stream.events[-1]["error"]["code"] == "deadline"
            await c.until(c.nothing_left)
        async with served(tokenizer, request_timeout_s=0.3) as c:
            servers_of(c)[0].stop_after = 0
            assert (await post(c, ASK)).status_code == 504
            await c.until(c.nothing_left)
        async with served(tokenizer, drain_timeout_s=0.1) as c:
            servers_of(c)[0].stop_after = 2
            stream = Stream(c, ASK)
            await stream.until(2)
            await c.gateway.shutdown()
            assert (await stream.whole()).events[-1]["error"]["code"] == "stopping"

    run(test())


def test_tenants_are_kept_apart_at_the_server(tokenizer: str, tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "keys").write_text("a:secret-a\nb:secret-b\n")
        async with served(tokenizer, api_keys=str(tmp_path / "keys")) as c:
            assert (await post(c, ASK)).status_code == 401
            salts = {}
            for name in ("secret-a", "secret-b"):
                body = {**ASK, "cache_salt": "mine"}
                assert (await post(c, body, authorization=f"Bearer {name}")).status_code == 200
                salts[name] = servers_of(c)[0].calls[-1].body["cache_salt"]
            assert salts["secret-a"] == Tenant("a", "secret-a").salt("mine").hex() != salts["secret-b"]
            assert servers_of(c)[0].calls[-1].headers.get("authorization") is None
            keys = {place.keys[0].keys for place in c.scheduler.places}
            assert len(keys) == 2 and c.scheduler.places[0].tenant == "a"

    run(test())


def test_prompts_that_are_not_known_here(tokenizer: str) -> None:
    """Several prompts, several answers, or a form of the server's own: placed by load alone, on one server."""

    async def test() -> None:
        async with served(tokenizer) as c:
            for extra in ({"prompt": ["a", "b"]}, {"n": 2}, {"prompt": {"embeds": 1}}):
                servers_of(c)[0].refuse = (400, {"error": {"message": "only one", "code": 400}})
                assert (await post(c, {**ASK, **extra})).status_code == 400
                place = c.scheduler.places[-1]
                assert place.policy == "always_colocate" and (extra.get("n") or not place.keys[0].keys)
            bad = {
                "kvpool.polcy": {"kvpool": {"polcy": "x"}},
                "stream": {"stream": "no"},
                "cache_salt": {"cache_salt": "\ud800"},
            }
            for param, extra in bad.items():
                response = await post(c, {**ASK, **extra})
                assert response.status_code == 400 and response.json()["error"]["param"] == param

    run(test())


def test_tools_are_part_of_a_prompts_keys(tokenizer: str) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
            assert (await post(c, {**CHAT, "tools": tools}, "chat/completions")).status_code == 200
            called = {"function": {"name": "f", "arguments": '{"a": 1}'}, "id": "1", "type": "function"}
            talk = [*CHAT["messages"], {"role": "assistant", "content": "", "tool_calls": [called]}]
            read = await read_ask(
                {**CHAT, "messages": talk}, chat=True, request_id="id", tenant=Tenant(), context_tokens=500,
                model=await c.gateway._gateway._models.get(MODEL),
            )  # fmt: skip
            assert read.tokens is not None and _with_calls(talk[1])["tool_calls"][0]["function"]["arguments"] == {
                "a": 1
            }
            parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "x"}]}]
            servers_of(c)[0].refuse = (400, {"error": {}})
            await post(c, {**CHAT, "messages": parts}, "chat/completions")
            loaded = servers_of(c)[0].tokenizer
            for place, messages in zip(c.scheduler.places, ([("hello world")], ["hello\nx"]), strict=True):
                tokens = loaded.encode_chat([{"role": "user", "content": text} for text in messages])
                assert place.keys[0].keys == NAMING.keys(b"", tokens, BLOCK_TOKENS).tobytes()

    run(test())


def test_fields_between_gateway_and_servers_are_no_clients_business(tokenizer: str) -> None:
    """With them a client could have its prompt answered from blocks of others."""

    async def test() -> None:
        async with served(tokenizer) as c:
            first, second = servers_of(c)
            first.transfer = second.transfer = {"remote_block_ids": [[1]], "kvpool_key_mask": "00"}
            asked = {"kv_transfer_params": {"do_remote_decode": True}, "ec_transfer_params": {"x": 1}}
            reply = (await post(c, {**ASK, **asked})).json()
            assert reply["kv_transfer_params"] is None
            assert not {"kv_transfer_params", "ec_transfer_params"} & first.calls[0].body.keys()
            c.scheduler.decide = lambda request: split(first, second)  # type: ignore[arg-type]
            await Stream(c, {**ASK, **asked}).whole()
            assert first.calls[1].body["kv_transfer_params"] == {"kvpool_handoff": True}
            assert second.calls[0].body["kv_transfer_params"] == first.transfer
            assert "ec_transfer_params" not in first.calls[1].body | second.calls[0].body

    run(test())


@pytest.mark.parametrize("extra", [{}, {"return_token_ids": True, "max_tokens": 20}, {"stop": "zz"}])
def test_an_answer_whose_server_is_lost_behind_its_end(tokenizer: str, extra: dict[str, Any]) -> None:
    async def test() -> None:
        async with served(tokenizer) as c:
            first, second = servers_of(c)
            first.ends_abruptly = True
            first.next_token = second.next_token = _after(PROMPT, expected_tokens(PROMPT, 8))
            stream = await Stream(c, {**ASK, **extra, "stream_options": {"include_usage": True}}).whole()
            assert stream.text == text_of(c, 8) and len(stream.finish) == 1 and stream.done
            assert not second.calls and not any("error" in event for event in stream.events)
            if "stop" not in extra:
                assert stream.usage["completion_tokens"] == (9 if extra else 8)
            await c.until(lambda: c.scheduler.ends() and c.nothing_left())

    run(test())


def test_a_client_that_is_gone_before_anything_begins(tokenizer: str) -> None:
    """Its request is over at once: nothing waits for a task that never ran."""

    async def test() -> None:
        async with served(tokenizer) as c:
            gateway = c.gateway._gateway
            model = await gateway._models.get(MODEL)
            for cancel_first in (True, False):
                asked = Ask("id", False, {**ASK, "stream": True}, np.asarray(PROMPT), len(PROMPT), 100)
                relay = Relay(asked, model, gateway._relays, 0.0)
                if cancel_first:
                    relay.cancel()
                else:
                    asyncio.get_running_loop().call_soon(relay.cancel)
                async with asyncio.timeout(60):
                    assert [block async for block in relay.blocks()] == []
            assert not servers_of(c)[0].calls

    run(test())


def test_the_scheduler_hears_of_a_prefill_whose_end_nobody_sees(tokenizer: str) -> None:
    """An answer in one has no first token: after the predicted time its prefill counts as over, and teaches nothing."""

    async def test() -> None:
        async with served(tokenizer) as c:
            (first, _) = servers_of(c)
            placed = colocated(first)  # type: ignore[arg-type]
            placed.placement.predicted_ttft_us = 1000
            c.scheduler.decide = lambda request: placed
            first.stop_after = 3
            waiting = asyncio.create_task(post(c, ASK))
            await c.until(lambda: c.scheduler.outcomes)
            (told,) = c.scheduler.outcomes
            assert told.first_token and not told.ttft_us and not c.scheduler.ends()
            first.go_on()
            assert (await waiting).status_code == 200
            await c.until(lambda: c.scheduler.ends() and c.nothing_left())
            text = c.gateway.metrics.render().decode()
            assert f'kvpool_gateway_prompt_tokens_total{{model="{MODEL}"}} {len(PROMPT)}.0' in text
            assert f'kvpool_gateway_tpot_seconds_count{{model="{MODEL}"}}' not in text

    run(test())


def test_a_placement_counts_what_is_likely(tokenizer: str) -> None:
    """A chat that names no length may use all of the context; its server takes pages as they are needed."""

    async def test() -> None:
        async with served(tokenizer, relay_tokens_max=20) as c:
            open_chat = {name: value for name, value in CHAT.items() if name != "max_tokens"}
            servers_of(c)[0].next_token = servers_of(c)[1].next_token = saying([40, 41])
            await Stream(c, open_chat, "chat/completions").whole()
            await post(c, {**ASK, "max_tokens": 5})
            assert [place.max_tokens for place in c.scheduler.places] == [20, 5]
            assert "max_tokens" not in servers_of(c)[0].calls[0].body

    run(test())
