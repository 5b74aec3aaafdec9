"""The `openai` client works unchanged against a whole cluster."""

from __future__ import annotations

import openai
import pytest

from tests.e2e.conftest import Running, eventually

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]


@pytest.fixture
def client(cluster: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.local.gateway_url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny-llama"]


def test_completion_equals_its_stream(client: openai.OpenAI) -> None:
    ask = {"model": "tiny-llama", "prompt": "import os\n\ndef main():\n", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**ask)
    pieces = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in pieces if c.choices) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage or pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_chat_stream_and_cached_tokens(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What does os.path.join do? " * 40}]
    ask = {"model": "tiny-llama", "messages": messages, "max_tokens": 8, "temperature": 0}
    first = client.chat.completions.create(**ask)

    def cached() -> int:
        again = client.chat.completions.create(**ask)
        assert again.choices[0].message.content == first.choices[0].message.content
        return again.usage.prompt_tokens_details.cached_tokens

    # The directory is told of blocks behind the answer: the next request may go to a worker that does not have them.
    eventually(lambda: cached() >= 64, "the prompt's blocks are found")
    streamed = client.chat.completions.create(**ask, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == first.choices[0].message.content


def test_seeded_sampling_repeats(client: openai.OpenAI) -> None:
    ask = {"model": "tiny-llama", "prompt": "class Queue:\n", "max_tokens": 16, "temperature": 1.0, "top_p": 0.9}
    one, same = (client.completions.create(**ask, seed=7).choices[0].text for _ in range(2))
    assert one == same
    others = {client.completions.create(**ask, seed=s).choices[0].text for s in (1, 2, 3)}
    assert len(others | {one}) > 1


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "nope"}, 404),
        ({"max_tokens": -1}, 400),
        ({"temperature": 1e9}, 400),
        ({"prompt": "x " * 20000}, 400),
        ({"prompt": ""}, 400),
        ({"prompt": [10**9]}, 400),
        ({"n": 3}, 400),
    ],
)
def test_bad_requests_are_openai_errors(client: openai.OpenAI, change: dict, status: int) -> None:
    ask = {"model": "tiny-llama", "prompt": "hello", "max_tokens": 4} | change
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**ask)
    assert caught.value.status_code == status
    assert caught.value.body["message"]
