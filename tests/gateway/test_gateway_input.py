"""Bad input: each kind gets an OpenAI-shaped error that names what is wrong, and nobody else is bothered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvpool.core.errors import BadArgument, Reason
from scheduler.gateway.credentials import Credentials
from scheduler.gateway.errors import from_failure
from scheduler.gateway.events import Failure, FailureKind
from tests.gateway.cluster_made import MODEL, ClusterMade, cluster, http_client, refused, run

COMPLETION = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}

#: Change to a good completion, status, param.
COMPLETIONS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "nope"}, 404, "model"),
    ({"model": None}, 400, "model"),
    ({"model": 7}, 400, "model"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": ["hello", ""]}, 400, "prompt"),
    ({"prompt": ["hello", 7]}, 400, "prompt"),
    ({"prompt": [7, "hello"]}, 400, "prompt"),
    ({"prompt": [7, True]}, 400, "prompt"),
    ({"prompt": [7.0]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [10**6]}, 400, "prompt"),
    ({"prompt": [10**30]}, 400, "prompt"),
    ({"prompt": {"text": "hello"}}, 400, "prompt"),
    ({"prompt": ["w"] * 65}, 400, "prompt"),
    ({"prompt": "x" * 600}, 400, "prompt"),
    ({"prompt": "x" * 100_000}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 600}, 400, "prompt"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"max_tokens": "4"}, 400, "max_tokens"),
    ({"max_tokens": 4.5}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": 1e9}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1.5}, 400, "top_p"),
    ({"n": 2}, 400, "n"),
    ({"n": 0}, 400, "n"),
    ({"best_of": 2}, 400, "best_of"),
    ({"echo": True}, 400, "echo"),
    ({"logprobs": 5}, 400, "logprobs"),
    ({"seed": 2**70}, 400, "seed"),
    ({"seed": "x"}, 400, "seed"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["a"] * 5}, 400, "stop"),
    ({"stop": [1]}, 400, "stop.0"),
    ({"stop": {"a": 1}}, 400, "stop"),
    ({"stop": "\ud800"}, 400, "stop"),
    ({"stop_token_ids": [10**6]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids.0"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"top_k": 5}, 400, "top_k"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"cache_salt": 5}, 400, "cache_salt"),
    ({"cache_salt": "\ud800"}, 400, "cache_salt"),
    ({"kvpool": []}, 400, "kvpool"),
    ({"kvpool": {"polcy": "x"}}, 400, "kvpool.polcy"),
    ({"kvpool": {"policy": "../x"}}, 400, "kvpool.policy"),
    ({"kvpool": {"use_pool": 1}}, 400, "kvpool.use_pool"),
    ({"kvpool": {"session": "s" * 300}}, 400, "kvpool.session"),
]

CHATS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"messages": []}, 400, "messages"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": [{"role": "pirate", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0"),
    ({"messages": [{"role": "user", "content": "\udfff"}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, None),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages"),
    ({"max_completion_tokens": -5}, 400, "max_completion_tokens"),
    ({"max_completion_tokens": 600}, 400, "messages"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"chat_template_kwargs": {"tokenize": True}}, 400, "messages"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, 400, "messages"),
]

#: Raw bodies, status, code.
BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b'{"model": "made", "prompt": "\xff\xfe"}', 400, "invalid_json"),
    (b'{"model": "made", "prompt": "x", "temperature": NaN}', 400, "invalid_json"),
    (b'{"model": "made", "prompt": "x", "temperature": 1e999}', 400, "invalid_value"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    (b"[" * 100_000, 400, "invalid_json"),
    (b"x" * 70_000, 413, "body_too_large"),
]


def check_error(response: httpx.Response, status: int, wrong: Any) -> dict[str, Any]:
    assert response.status_code == status, (wrong, response.text)
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    assert error["code"], "programs are told what it is"
    return error


def nothing_was_asked(c: ClusterMade) -> None:
    assert not c.scheduler.places and not any(e.submits for e in c.engines) and not c.gateway.active


def test_bad_completions(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, http_client(c.url) as http:
            for change, status, param in COMPLETIONS:
                body = json.dumps({**COMPLETION, **change}).encode()
                error = check_error(await http.post("/completions", content=body), status, change)
                assert error["param"] == param, (change, error)
                assert len(error["message"]) < 500
            nothing_was_asked(c)
            assert (await http.post("/completions", json=COMPLETION)).status_code == 200

    run(test())


def test_bad_chats(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, http_client(c.url) as http:
            for change, status, param in CHATS:
                body = json.dumps({**CHAT, **change}).encode()
                error = check_error(await http.post("/chat/completions", content=body), status, change)
                assert param is None or error["param"] == param, (change, error)
            nothing_was_asked(c)
            assert (await http.post("/chat/completions", json=CHAT)).status_code == 200

    run(test())


def test_bad_bodies(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, body_bytes_max=120_000) as c, http_client(c.url) as http:
            for body, status, code in BODIES[:-1]:
                error = check_error(await http.post("/completions", content=body), status, body[:40])
                assert error["code"] == code
            nothing_was_asked(c)

    run(test())


@pytest.mark.parametrize("chunked", [False, True])
def test_body_that_is_too_large(tokenizer: str, chunked: bool) -> None:
    async def pieces() -> Any:
        for _ in range(64):
            yield b"x" * 4096

    async def test() -> None:
        async with cluster(tokenizer, body_bytes_max=65_536) as c, http_client(c.url) as http:
            content = pieces() if chunked else b"x" * 70_000
            error = check_error(await http.post("/completions", content=content), 413, "size")
            assert error["code"] == "body_too_large"

    run(test())


def test_wrong_paths_and_methods(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, http_client(c.url) as http:
            check_error(await http.post("/embeddings", json={}), 404, "path")
            check_error(await http.get("/completions"), 405, "method")

    run(test())


@pytest.mark.parametrize(
    ("reason", "status", "again"),
    [
        (Reason.NO_CAPACITY, 429, True),
        (Reason.OVERLOADED, 429, True),
        (Reason.SLO_UNREACHABLE, 429, True),
        (Reason.NO_INSTANCE, 503, True),
        (Reason.CONTEXT_TOO_LONG, 400, False),
        (Reason.BAD_ARGUMENT, 400, False),
    ],
)
def test_refusals_have_their_status(tokenizer: str, reason: Reason, status: int, again: bool) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, http_client(c.url) as http:
            c.scheduler.decide = lambda _: refused(int(reason), "not now", 2500)
            for stream in (False, True):
                response = await http.post("/completions", json={**COMPLETION, "stream": stream})
                assert check_error(response, status, reason)["message"] == "not now"
                assert response.headers.get("retry-after") == ("3" if again else None)
            assert not c.gateway.active

    run(test())


def test_every_failure_has_an_answer() -> None:
    for kind in FailureKind:
        for reason in (None, *Reason):
            error = from_failure(Failure(kind, "why", reason))
            assert 400 <= error.status < 600
            assert (error.status == 429) <= bool(error.retry_after_ms)


@pytest.mark.parametrize("text", ["", "just-a-name", ":secret", "a:", "a:x\nb:x", "# nobody"])
def test_credentials_file_that_makes_no_sense(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(BadArgument):
        Credentials.load(str(path))
    with pytest.raises(BadArgument):
        Credentials.load(str(tmp_path / "missing"))
