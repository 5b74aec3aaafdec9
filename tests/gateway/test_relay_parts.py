"""The pure parts of a relay: which answers may be cut, bodies, events out of bytes, answers put together."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from kvpool.core.errors import Overloaded
from scheduler.gateway.relay.answers import StreamedAnswer
from scheduler.gateway.relay.asks import Ask, is_plain
from scheduler.gateway.relay.sse import EVENT_BYTES_MAX, SseReader
from scheduler.gateway.text import Tokenizer

PLAIN: dict[str, Any] = {"model": "m", "prompt": "x", "stream": True, "temperature": 0, "max_tokens": 5}


@pytest.mark.parametrize(
    "extra",
    [
        {}, {"top_p": 0.5, "top_k": 3, "min_p": 0.1}, {"stop_token_ids": [1]}, {"n": 1}, {"stop": None}, {"stop": []},
        {"tools": [], "tool_choice": "auto"}, {"response_format": {"type": "text"}}, {"logprobs": None},
        {"logprobs": False}, {"seed": 3}, {"stream_options": {"include_usage": True}}, {"min_tokens": 0},
        {"presence_penalty": 0.0}, {"repetition_penalty": 1.1}, {"temperature": 0.7}, {"cache_salt": "s"},
        {"return_token_ids": True},
    ],
)  # fmt: skip
def test_bodies_whose_answers_may_be_cut(extra: dict[str, Any]) -> None:
    assert is_plain({**PLAIN, **extra})


@pytest.mark.parametrize(
    "extra",
    [
        {"logprobs": 0}, {"logprobs": True}, {"top_logprobs": 2}, {"prompt_logprobs": 0}, {"n": 2}, {"n": True},
        {"stop": "a"}, {"tools": [{}]}, {"tool_choice": "required"}, {"response_format": {"type": "json_object"}},
        {"structured_outputs": {}}, {"seed": 3, "temperature": 1}, {"frequency_penalty": 0.1}, {"min_tokens": 1},
        {"presence_penalty": -1}, {"echo": True}, {"best_of": 2}, {"new": None}, {"include_stop_str_in_output": 1},
        {"max_tokens": "3"}, {"max_tokens": 3.0}, {"max_tokens": 0}, {"max_completion_tokens": True},
        {"stream_options": {"continuous_usage_stats": True}}, {"stream_options": 5}, {"kv_transfer_params": {"a": 1}},
    ],
)  # fmt: skip
def test_bodies_whose_answers_are_whole(extra: dict[str, Any]) -> None:
    body = {**PLAIN, **extra}
    if "seed" in extra:
        assert not is_plain(body)
        del body["temperature"]
    assert not is_plain(body)


def ask(chat: bool = False, **extra: Any) -> Ask:
    tokens = np.arange(10, dtype=np.uint32)
    return Ask("id", chat, {**PLAIN, **extra}, tokens, 10, 100, salt="salted")


def test_bodies_for_servers() -> None:
    asked = ask(top_k=4, kvpool={}, max_tokens=9, seed=2, user="u", repetition_penalty=1, frequency_penalty=0)
    assert asked.plain and asked.may_split and asked.answer_tokens == 9
    whole = asked.whole_body({"t": 1})
    assert whole["kv_transfer_params"] == {"t": 1} and "kvpool" not in whole and whole["cache_salt"] == "salted"
    rest = asked.tokens_body([1, 2, 3], 7, None)
    assert rest == {
        "temperature": 0, "top_k": 4, "user": "u", "repetition_penalty": 1, "frequency_penalty": 0,
        "model": "m", "prompt": [1, 2, 3], "max_tokens": 7, "stream": True,
        "stream_options": {"include_usage": True}, "return_token_ids": True, "cache_salt": "salted",
    }  # fmt: skip
    path, first = asked.prefill_body([], "pool")
    assert path == "/v1/completions" and first["prompt"] == "x" and first["max_tokens"] == 1 and not first["stream"]
    assert asked.body["kvpool"] == {} and asked.body["seed"] == 2 and asked.body["max_tokens"] == 9  # left as it was
    assert not ask(max_tokens=500).plain  # the server is to say what it thinks of that
    assert not ask(stream=False).plain and not ask(max_tokens=1).may_split and not ask(n=3).may_split


@pytest.mark.parametrize(
    ("chat", "body", "expected"),
    [
        (False, {}, 16), (True, {}, 90), (True, {"max_tokens": 5}, 5),
        (True, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (False, {"max_tokens": 500}, 90), (False, {"max_tokens": "many"}, 16), (False, {"max_tokens": True}, 16),
    ],
)  # fmt: skip
def test_how_long_an_answer_may_be(chat: bool, body: dict[str, Any], expected: int) -> None:
    asked = Ask("id", chat, body, None, 10, 100)
    assert asked.answer_tokens == expected
    limited = Ask("id", chat, body, None, 10, 100, chat_tokens_max=30)
    assert limited.answer_tokens == (30 if chat and not body else expected)


@given(
    st.lists(st.text(alphabet="ab: {}ä", max_size=12).map(str.encode), max_size=8),
    st.sampled_from([b"\n", b"\r\n"]),
    st.data(),
)
def test_events_however_the_bytes_are_cut(datas: list[bytes], end: bytes, data: st.DataObject) -> None:
    stream = b": a comment" + end + end + b"".join(b"data: " + d + end + b"id: 7" + end + end for d in datas)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    reader, found = SseReader(), []
    for begin, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[begin:stop])
    assert found == datas


def test_an_event_without_end() -> None:
    reader = SseReader()
    with pytest.raises(Overloaded):
        for _ in range(EVENT_BYTES_MAX // (1 << 20) + 1):
            reader.feed(b"x" * (1 << 20))


class Server:
    """Chunks of an answer as vLLM makes them: text is held back within a character; several tokens may be in one."""

    def __init__(self, tokenizer: Tokenizer, answer: list[int], prompt: list[int]) -> None:
        self.tokenizer, self.answer, self.prompt = tokenizer, answer, prompt

    def chunks(self, context: list[int], sizes: list[int]) -> list[dict[str, Any]]:
        """From `context` on, the tokens cut into runs of `sizes`."""
        done = len(context) - len(self.prompt)
        assert context == self.prompt + self.answer[:done]
        # The real one gives the prompt's text again when it has to go on within a character.
        assert not self.tokenizer.decode(context[-16:]).endswith("\ufffd")
        # As vLLM begins: with all that stands before.
        decoding, fast = DecodeStream(ids=list(context), skip_special_tokens=True), self.tokenizer._fast
        chunks, rest = [], self.answer[done:]
        while rest:
            size = sizes[len(chunks) % len(sizes)]
            run, rest = rest[:size], rest[size:]
            text = "".join(decoding.step(fast, token) or "" for token in run)
            choice = {"index": 0, "text": text, "token_ids": run, "finish_reason": None if rest else "length"}
            prompt = context if not chunks else None
            chunks.append({"choices": [{**choice, "prompt_token_ids": prompt, "logprobs": None}]})
        return chunks


@settings(deadline=None)
@given(
    text=st.text(alphabet="abß☃😀 ", min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    losses=st.lists(st.integers(0, 6), max_size=5),
    ids=st.booleans(),
    chat=st.booleans(),
)
def test_an_answer_that_several_servers_make(
    tokenizer: str, text: str, sizes: list[int], losses: list[int], ids: bool, chat: bool
) -> None:
    """Whatever is lost, however tokens are cut into chunks: the text of an answer that nobody lost, each token once."""
    loaded = _loaded(tokenizer)
    answer = loaded.encode(text).tolist()
    prompt = loaded.encode("hello").tolist()
    server = Server(loaded, answer, prompt)
    body = {"messages": []} if chat else {"prompt": prompt}
    asked = Ask(
        "id",
        chat,
        {**PLAIN, **body, "max_tokens": len(answer), "return_token_ids": ids},
        np.asarray(prompt),
        len(prompt),
        999,
    )
    got, sent = StreamedAnswer(asked, 0, loaded.decode), b""
    got.prompt_ids = list(prompt)
    for loss in [*losses, 10**6]:
        context = got.context()
        assert got.tokens_left() == len(answer) - len(got.shown)
        from_tokens = chat or bool(context)
        for chunk in server.chunks(context or prompt, sizes)[:loss]:
            sent += got.chunk(chunk, from_tokens=from_tokens)
        if got.finish:
            break
        if not got.continues:
            assert ids  # they were told, their text was not
            return
        got.server_changes()
    events = [json.loads(line[6:]) for line in sent.decode().splitlines() if line.startswith("data: ")]
    choices = [choice for event in events for choice in event["choices"]]
    told = "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in choices)
    assert got.finish == "length" and got.tokens == len(answer)
    if ids:
        assert [token for choice in choices for token in choice.get("token_ids") or ()] == answer
    else:
        assert told == text and not any(choice.get("token_ids") for choice in choices)
    if chat:
        assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)


_LOADED: dict[str, Tokenizer] = {}


def _loaded(source: str) -> Tokenizer:
    if source not in _LOADED:
        _LOADED[source] = Tokenizer(source)
    return _LOADED[source]
