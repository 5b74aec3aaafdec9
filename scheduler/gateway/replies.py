"""Answers in OpenAI's shapes: whole, or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from scheduler.gateway.generation import Generation, Piece
from scheduler.gateway.openai_types import ChatRequest, CompletionRequest

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    return f"data: {_encode(body)}\n\n".encode()


class Reply:
    """What both kinds of answers share. One object for one HTTP request, fed with pieces in the order they come."""

    object_whole = ""
    object_chunk = ""

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        request_id: str,
        created: int,
        generations: Sequence[Generation],
    ) -> None:
        self._request = request
        self._head = {"id": request_id, "object": self.object_chunk, "created": created, "model": request.model}
        self._generations = generations
        self._begun = [False] * len(generations)
        self._text_chars = [0] * len(generations)
        # Only id, choices and so on change from chunk to chunk: the rest is written once.
        tail = ',"usage":null}' if request.wants_usage_chunk else "}"
        self._before, self._after = f'data: {_encode(self._head)[:-1]},"choices":[', f"]{tail}\n\n"

    def chunk(self, index: int, piece: Piece) -> bytes:
        """The events for the next piece of one answer; empty where it has nothing to show."""
        opening = b"" if self._begun[index] else self._opening(index)
        self._begun[index] = True
        if not piece.text and not piece.finish and not (piece.token_ids and self._request.wants_token_ids):
            return opening
        choice = {"index": index, **self._delta(piece.text), "finish_reason": piece.finish or None}
        choice.update(self._extras(index, piece))
        if piece.finish and self._request.kvpool is not None:
            return opening + event({**self._head, "choices": [choice], "kvpool": self._details()})
        return opening + f"{self._before}{_encode(choice)}{self._after}".encode()

    def usage_chunk(self) -> bytes:
        return event({**self._head, "choices": [], "usage": self._usage()})

    def whole(self, pieces: Sequence[Piece]) -> bytes:
        """The answer in one, from one whole piece for each prompt."""
        choices = []
        for index, piece in enumerate(pieces):
            choice = {"index": index, **self._answer(piece.text), "finish_reason": piece.finish}
            choices.append({**choice, **self._extras(index, piece)})
        body = {**self._head, "object": self.object_whole, "choices": choices, "usage": self._usage()}
        if self._request.kvpool is not None:
            body["kvpool"] = self._details()
        self._add_prompt_ids(body)
        return _encode(body).encode()

    # ------------------------------------------------------------ parts

    def _opening(self, index: int) -> bytes:
        """What comes before the first piece."""
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _answer(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _add_prompt_ids(self, body: dict[str, Any]) -> None:
        raise NotImplementedError

    def _prompt_ids(self, index: int) -> list[int]:
        return list(map(int, self._generations[index].spec.prompt))

    def _extras(self, index: int, piece: Piece) -> dict[str, Any]:
        extras: dict[str, Any] = {"logprobs": self._logprobs(index, piece) if self._request.wants_logprobs else None}
        if self._request.wants_token_ids:
            extras["token_ids"] = piece.token_ids
        if self._request.options.top2_gaps:
            extras["top2_gaps"] = piece.gaps
        return extras

    def _token_texts(self, index: int, piece: Piece) -> list[str]:
        tokenizer = self._generations[index].spec.model.tokenizer
        return [tokenizer.token_text(token) for token in piece.token_ids]

    def _details(self) -> dict[str, Any]:
        return {"placements": [g.describe() for g in self._generations]}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(g.spec.prompt) for g in self._generations)
        answer = sum(g.tokens for g in self._generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": sum(g.cached_tokens for g in self._generations)},
        }


class CompletionReply(Reply):
    object_whole = object_chunk = "text_completion"

    def _opening(self, index: int) -> bytes:
        if not self._request.wants_token_ids:
            return b""
        choice = {"index": index, "text": "", "logprobs": None, "finish_reason": None, "token_ids": []}
        return event({**self._head, "choices": [{**choice, "prompt_token_ids": self._prompt_ids(index)}]})

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _answer(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any]:
        texts = self._token_texts(index, piece)
        offsets = []
        for text in texts:
            offsets.append(self._text_chars[index])
            self._text_chars[index] += len(text)
        chosen = [{text: value} for text, value in zip(texts, piece.logprobs, strict=False)]
        asked = getattr(self._request, "logprobs", 0)
        return {
            "tokens": texts,
            "token_logprobs": piece.logprobs,
            "top_logprobs": chosen if asked else None,
            "text_offset": offsets,
        }

    def _add_prompt_ids(self, body: dict[str, Any]) -> None:
        if self._request.wants_token_ids:
            for index, choice in enumerate(body["choices"]):
                choice["prompt_token_ids"] = self._prompt_ids(index)


class ChatReply(Reply):
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def _opening(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        body: dict[str, Any] = {**self._head, "choices": [choice]}
        self._add_prompt_ids(body)
        return event(body)

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _answer(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any]:
        texts = self._token_texts(index, piece)
        content = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in zip(texts, piece.logprobs, strict=False)
        ]
        return {"content": content, "refusal": None}

    def _add_prompt_ids(self, body: dict[str, Any]) -> None:
        if self._request.wants_token_ids:
            body["prompt_token_ids"] = self._prompt_ids(0)
