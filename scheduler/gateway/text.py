"""Text and tokens: the model's tokenizer, text as it grows token by token, and stop strings in it."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOADING = threading.Lock()
_REPLACEMENT = "\ufffd"
#: A character is at most four bytes, so at most so many replacement characters may still become one.
_OPEN_CHARS_MAX = 4
#: Tokens decoded again with each new one, at most.
_WINDOW_TOKENS_MAX = 64
_WINDOW_TOKENS_KEPT = 16


class TemplateFailed(ValueError):
    """The chat template refused the messages, or there is none."""


class Tokenizer:
    """A model's tokenizer. Needs no torch. Thread-safe."""

    def __init__(self, source: str) -> None:
        from transformers import AutoTokenizer

        self._hf = AutoTokenizer.from_pretrained(source)
        # The library's own wrapper changes truncation settings in each call, which two threads must not do.
        self._fast = self._hf.backend_tokenizer if self._hf.is_fast else None
        self.vocabulary_size = len(self._hf)
        #: Length of a chat's answer by the model's own configuration; 0 = not limited there.
        self.answer_tokens_max = _answer_tokens_max(source)
        self._template_reserved = frozenset(inspect.signature(self._hf.apply_chat_template).parameters) | {"messages"}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.uint32]:
        if self._fast is not None:
            ids = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        else:
            ids = self._hf.encode(text, add_special_tokens=add_special_tokens)
        return np.asarray(ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        if self._fast is not None:
            return self._fast.decode(ids, skip_special_tokens=True)
        return str(self._hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_text(self, token: int) -> str:
        """One token by itself, special tokens included, for log probabilities."""
        if self._fast is not None:
            return self._fast.decode([token], skip_special_tokens=False)
        return str(self._hf.decode([token], skip_special_tokens=False))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> NDArray[np.uint32]:
        """Ids of a conversation under the model's chat template, up to where the answer begins.

        Raises: TemplateFailed with what the template says.
        """
        options = dict(options or {})
        reserved = sorted(set(options) & self._template_reserved)
        if reserved:
            raise TemplateFailed(f"{reserved[0]!r} can't be set")
        if not self._hf.chat_template:
            raise TemplateFailed("this model has no chat template; use /v1/completions")
        try:
            text = self._hf.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=True,
                **options,
            )
        except Exception as error:
            # Templates are programs that come with the model, and may fail in any way.
            raise TemplateFailed(f"the chat template failed: {error}") from error
        # The template writes special tokens itself.
        return self.encode(str(text), add_special_tokens=False)


def _answer_tokens_max(source: str) -> int:
    """`max_new_tokens` of a model's generation_config.json, which vLLM takes for chats that name no length."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False)
        told = json.loads(Path(path).read_text()).get("max_new_tokens") if path else None
    except (OSError, ValueError):
        return 0
    return told if type(told) is int and told > 0 else 0


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a model, from a local folder or a hub id.

    Raises: OSError, ValueError if there is none.
    """
    # The library's parts are imported when first asked for, which two threads must not do at the same time.
    with _LOADING:
        return Tokenizer(source)


class Detokenizer:
    """Text of a growing token sequence; what it returned is never taken back, and never ends within a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        # Where the window begins to be new: earlier tokens are there because neighbours change how a token reads.
        self._context_count = 0
        self._sent_chars = 0

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        self._window.append(token)
        text = self._decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        whole = text[: max(len(whole), len(text) - _OPEN_CHARS_MAX)] if len(whole) < len(text) else text
        new = whole[self._sent_chars :]
        self._sent_chars = max(self._sent_chars, len(whole))
        if len(whole) == len(text):
            self._restart(self._context_count, 0)
        elif len(self._window) > _WINDOW_TOKENS_MAX:
            self._restart(len(self._window) - _WINDOW_TOKENS_KEPT, len(text) - self._sent_chars)
        return new

    def flush(self) -> str:
        """What is left when no more tokens come; half characters read as replacement characters."""
        rest = self._decode(self._window)[self._sent_chars :]
        self._sent_chars += len(rest)
        return rest

    def _restart(self, drop: int, unsent_chars: int) -> None:
        self._window = self._window[drop:]
        self._context_count = len(self._window)
        self._sent_chars = len(self._decode(self._window)) - unsent_chars


class StopScanner:
    """Finds the stop string that ends first in a growing text, and holds back what may be the beginning of one.

    The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, piece: str) -> str:
        """Text that is safe to show: it ends before a stop string, once there is one."""
        if self.matched:
            return ""
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.matched = True
            self._held = ""
            return text[: min(ends)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, shorter than `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """What the client reads of one answer: tokens in, text without stop strings out."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._scanner = StopScanner(stops)

    @property
    def stopped(self) -> bool:
        return self._scanner.matched

    def push(self, token: int) -> str:
        return self._scanner.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """The rest, at the end of the answer; empty after a stop string."""
        text = self._scanner.push(self._detokenizer.flush())
        return text if self.stopped else text + self._scanner.flush()
