"""An answer on its way from one or more servers to a client: what is passed on, and what is put together. Pure.

While one server answers, its chunks are passed on with nothing but another id. Where two share a plain answer, the
second one's chunks come from /v1/completions, whatever the client asked for, and are given the client's form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scheduler.gateway.relay.asks import INTERNAL, Ask

DONE = b"data: [DONE]\n\n"
_REPLACEMENT = "\ufffd"
#: Tokens that are looked at to see whether a character is whole.
_WINDOW = 16
_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

Chunk = dict[str, Any]


def event(body: Mapping[str, Any]) -> bytes:
    return f"data: {_dump(body)}\n\n".encode()


class StreamedAnswer:
    """What the client of a streamed request has got, and gets.

    Args:
        decode: the model's tokens as text.
        reasons: the servers tell a chat's thoughts from its answer, which needs all of the text.
    """

    def __init__(
        self, ask: Ask, created: int, decode: Callable[[Sequence[int]], str], *, reasons: bool = False
    ) -> None:
        self._ask, self._decode = ask, decode
        self.reasons = reasons
        self._head: Chunk = {
            "id": ask.request_id,
            "object": "chat.completion.chunk" if ask.chat else "text_completion",
            "created": created,
            "model": ask.body.get("model"),
        }
        self._opened = False
        #: Whether the client has got anything of the answer.
        self.begun = False
        #: As the first server tokenized the prompt; None while that is not known.
        self.prompt_ids: list[int] | None = None
        #: Tokens of the answer whose text the client has.
        self.shown: list[int] = []
        #: Tokens behind them, whose text is not whole yet.
        self._unshown: list[int] = []
        self.finish = ""
        self._plain = ask.plain
        self._opened_choices: dict[Any, None] = {}
        self._usage: dict[str, Any] | None = None
        self._usage_chunk: Chunk | None = None
        self._parts = 0
        self.tokens = 0
        self.cached_tokens = 0

    # ------------------------------------------------------------ going on elsewhere

    @property
    def continues(self) -> bool:
        """Whether another server can go on where this one is.

        Not where the client was told tokens without their text: they would be computed, and told, again.
        """
        told = self._ask.wants_token_ids and bool(self._unshown)
        return self._cuttable and self.prompt_ids is not None and not told

    @property
    def _cuttable(self) -> bool:
        return self._plain and not (self._ask.chat and self.reasons)

    @property
    def repeats(self) -> bool:
        """Whether another server can begin again without the client noticing."""
        return not self.begun

    @property
    def complete(self) -> bool:
        """Whether the client has all of the answer but what is told behind its end."""
        return self._ask.streamed and self._ask.single and bool(self.finish)

    def context(self) -> list[int]:
        """Prompt and answer as far as the client has it: what another server goes on from. Empty at the beginning."""
        return [*self.prompt_ids, *self.shown] if self.prompt_ids is not None and self.shown else []

    def tokens_left(self) -> int:
        prompt_tokens = self._ask.prompt_tokens if self.prompt_ids is None else len(self.prompt_ids)
        return self._ask.answer_tokens_behind(prompt_tokens) - len(self.shown)

    def server_changes(self) -> None:
        """What has no text yet is computed again."""
        self.tokens -= len(self._unshown)
        self._unshown = []
        self._parts += 1

    # ------------------------------------------------------------ chunks

    def chunk(self, chunk: Chunk, *, from_tokens: bool) -> bytes:
        """What the client gets for a server's chunk; empty for nothing.

        Args: from_tokens: it answers a body of tokens, by /v1/completions.
        """
        choices = chunk.get("choices")
        if not choices:
            self._note_usage(chunk)
            return b""
        self._note_prompt(chunk)
        chat = self._ask.chat and not from_tokens
        if chat and all(_opens(choice) for choice in choices):
            # Servers that take over open the answer once more.
            indices = [choice.get("index") for choice in choices]
            again = all(index in self._opened_choices for index in indices)
            self._opened, self._opened_choices = True, self._opened_choices | dict.fromkeys(indices)
            return b"" if again else event(self._cleaned({**chunk, "id": self._ask.request_id}))
        for choice in choices:
            self._note(choice, chat=chat)
        shown = b"" if self._opened or not from_tokens else self._opening()
        if from_tokens:
            body = {**self._head, "choices": [self._converted(choice) for choice in choices]}
        else:
            body = self._cleaned({**chunk, "id": self._ask.request_id})
        self._opened = self.begun = True
        return shown + event(body)

    def first_token(self, reply: Mapping[str, Any], *, from_tokens: bool) -> bytes | None:
        """What the client gets for the answer of the server that computed the prompt: its one token.

        Returns: None where the answer can't be gone on with; nothing is changed then.
        """
        self._note_reasons(reply)
        choice = _only(reply.get("choices"))
        ids = choice.get("token_ids") if choice else None
        prompt_ids = (choice or {}).get("prompt_token_ids") or reply.get("prompt_token_ids")
        text = _plain_text(choice or {}, chat=self._ask.chat and not from_tokens)
        if choice is None or text is None or not isinstance(ids, list) or len(ids) != 1 or not prompt_ids:
            return None
        if not self._cuttable or not text or _REPLACEMENT in text:
            return None  # half a character, or nothing to show
        if self.prompt_ids is None:
            self.prompt_ids = list(prompt_ids)
        stopped = choice.get("finish_reason") not in (None, "length")
        self.shown += ids
        self.tokens += 1
        self._parts += 1
        finish = choice.get("finish_reason") if stopped or self.tokens_left() < 1 else None
        self.finish = str(finish or "")
        self._note_usage(reply)
        shown = b"" if self._opened else self._opening()
        converted = self._converted({**choice, "text": text, "finish_reason": finish})
        self._opened = self.begun = True
        return shown + event({**self._head, "choices": [converted]})

    def end(self, details: Mapping[str, Any] | None) -> bytes:
        """Behind the last chunk."""
        tail = b""
        if details is not None:
            tail += event({**self._head, "choices": [], "kvpool": dict(details)})
        if self._ask.wants_usage and (self._usage is not None or self._ask.plain):
            tail += event({**(self._usage_chunk or self._head), "choices": [], "usage": self._usage_told()})
        return tail + DONE

    # ------------------------------------------------------------ parts

    def _opening(self) -> bytes:
        """What a server sends before the first text, where the client's form has such a thing."""
        if not self._ask.chat:
            return b""
        choice = {
            "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None,
        }  # fmt: skip
        ids = self.prompt_ids if self._ask.wants_token_ids else None
        return event({**self._head, "choices": [choice], "prompt_token_ids": ids})

    def _note_prompt(self, chunk: Chunk) -> None:
        if self.prompt_ids is None:
            choice = _only(chunk.get("choices")) or {}
            ids = choice.get("prompt_token_ids") or chunk.get("prompt_token_ids")
            self.prompt_ids = list(ids) if ids else None

    def _note(self, choice: Chunk, *, chat: bool) -> None:
        """Takes over a choice's tokens."""
        ids = choice.get("token_ids") or []
        self._unshown += ids
        self.tokens += len(ids)
        self.finish = str(choice.get("finish_reason") or self.finish)
        text = _plain_text(choice, chat=chat)
        if text is None:
            self._plain = False
        elif text:
            self.shown += self._unshown
            self._unshown = []
            if len(ids) > 1 and not text.endswith(_REPLACEMENT):
                self._end_with_a_character()

    def _end_with_a_character(self) -> None:
        """Several tokens at once may end within a character. vLLM is not to go on from there: the text that it then
        gives for the next token begins with the whole prompt's.
        """
        while self.shown and len(self._unshown) < 3 and self._decode(self.shown[-_WINDOW:]).endswith(_REPLACEMENT):
            self._unshown.insert(0, self.shown.pop())

    def _converted(self, choice: Mapping[str, Any]) -> Chunk:
        """A choice of /v1/completions in the client's form."""
        told = {"index": 0, "logprobs": None, "finish_reason": choice.get("finish_reason")}
        ids = choice.get("token_ids") if self._ask.wants_token_ids else None
        if self._ask.chat:
            if choice.get("finish_reason"):
                told["stop_reason"] = choice.get("stop_reason")
            return {**told, "delta": {"content": choice["text"]}, "token_ids": ids}
        prompt_ids = None
        if self._ask.wants_token_ids and not self.begun:
            prompt_ids = self.prompt_ids
        told["stop_reason"] = choice.get("stop_reason")
        return {**told, "text": choice["text"], "token_ids": ids, "prompt_token_ids": prompt_ids}

    def _cleaned(self, chunk: Chunk) -> Chunk:
        """Without what the client did not ask for."""
        hidden = INTERNAL if self._ask.wants_token_ids else (*INTERNAL, "token_ids", "prompt_token_ids")
        for holder in (chunk, *chunk["choices"]):
            holder.update({name: None for name in hidden if name in holder})
        return chunk

    def _note_reasons(self, reply: Mapping[str, Any]) -> None:
        """vLLM counts a chat's thoughts if, and only if, it tells them from the answer."""
        usage = reply.get("usage")
        if isinstance(usage, Mapping) and usage.get("completion_tokens_details") is not None:
            self.reasons = True

    def _note_usage(self, chunk: Mapping[str, Any]) -> None:
        usage = chunk.get("usage")
        if not isinstance(usage, Mapping):
            return
        self._note_reasons(chunk)
        if "choices" in chunk and not chunk["choices"] and not self._parts:
            told = {name: value for name, value in chunk.items() if name not in INTERNAL}
            self._usage_chunk = {**told, "id": self._ask.request_id}
        if self._usage is None:
            details = usage.get("prompt_tokens_details") or {}
            self.cached_tokens = int(details.get("cached_tokens") or 0)
            self._usage = dict(usage)
        if not self._ask.plain:
            self.tokens = int(usage.get("completion_tokens") or self.tokens)

    def _usage_told(self) -> dict[str, Any]:
        """The server's own, or the sum where several took part."""
        if self._usage is not None and not self._parts:
            return self._usage
        usage = self._usage or {}
        prompt = len(self.prompt_ids) if self.prompt_ids is not None else self._ask.prompt_tokens
        numbers = {
            "prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens,
        }  # fmt: skip
        return {**usage, **numbers}


def _only(choices: Any) -> Chunk | None:
    return choices[0] if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict) else None


def _opens(choice: Mapping[str, Any]) -> bool:
    """Whether a chat choice only says that an answer begins."""
    delta = choice.get("delta")
    if not isinstance(delta, Mapping) or choice.get("finish_reason"):
        return False
    return bool(delta.get("role")) and not any(value for name, value in delta.items() if name != "role")


def _plain_text(choice: Mapping[str, Any], *, chat: bool) -> str | None:
    """A choice's text; None where it holds more than that (thoughts, calls of tools)."""
    if not chat:
        text = choice.get("text")
        return text if isinstance(text, str) else None
    message = choice.get("delta", choice.get("message"))
    if not isinstance(message, Mapping):
        return None
    if any(value for name, value in message.items() if name not in ("role", "content")):
        return None
    content = message.get("content")
    return content if isinstance(content, str) else "" if content is None else None


def whole_answer(reply: Chunk, ask: Ask, details: Mapping[str, Any] | None) -> bytes:
    """The answer to a request that is not streamed: the server's, with another id."""
    body = {**reply, "id": ask.request_id}
    body.update({name: None for name in INTERNAL if name in body})
    if details is not None:
        body["kvpool"] = dict(details)
    return _dump(body).encode()
