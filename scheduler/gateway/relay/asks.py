"""What a client asked for, and the bodies that servers get for it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
#: vLLM's answer length where a completions request names none.
COMPLETION_TOKENS_DEFAULT = 16

#: How a prompt's KV gets to the server that goes on: what the first one is asked with.
HANDOFFS: dict[str, dict[str, Any]] = {
    "pool": {"kvpool_handoff": True},
    # vLLM's NixlConnector; its answer holds the addresses of the blocks.
    "nixl": {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    },
}

#: Fields between gateway and servers, never taken from a client, and never told to one: with them a request could name
#: the blocks of others, or a host that the server is to connect to.
INTERNAL = ("kv_transfer_params", "ec_transfer_params")

#: Fields that say how a token is drawn from its logits and nothing else: an answer may be cut anywhere under them.
_SAMPLING = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos", "logit_bias", "allowed_token_ids",
        "skip_special_tokens", "spaces_between_special_tokens", "priority", "user",
        "repetition_penalty",  # of tokens of prompt and answer alike
    }
)  # fmt: skip
#: Fields that are over with the prompt's tokens, and those that are said anew to each server.
_PROMPT = frozenset(
    {
        "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options",
        "return_token_ids", "cache_salt", "add_special_tokens", "add_generation_prompt", "chat_template",
        "chat_template_kwargs", "documents", "kvpool", "store", "metadata", "seed",
    }
)  # fmt: skip
#: Given with a neutral value, which is not the default of every server: said to each.
_SAID_AGAIN = _SAMPLING | {"presence_penalty", "frequency_penalty"}
_LIMITS = ("max_tokens", "max_completion_tokens")
#: Others may be there with these values, which ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "echo": (None, False), "suffix": (None, ""), "stop": (None, "", []),
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "min_tokens": (None, 0), "tools": (None, []), "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}), "structured_outputs": (None,), "bad_words": (None, []),
    "parallel_tool_calls": (None, True, False), "service_tier": (None, "auto"),
}  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """One client's request.

    tokens: the prompt as far as the gateway knows it; None where it does not (images, several prompts).
    prompt_tokens: known or guessed.
    context_tokens: what prompt and answer may have together.
    salt: the server's cache_salt.
    """

    request_id: str
    chat: bool
    body: Mapping[str, Any]
    tokens: NDArray[np.uint32] | None
    prompt_tokens: int
    context_tokens: int
    salt: str = ""
    #: Of a chat that names no max_tokens, by the model's own configuration; 0 = what the context has left.
    chat_tokens_max: int = 0
    #: Options of `"kvpool": {...}` in the body.
    policy: str = ""
    use_pool: bool = True
    sticky_key: str = ""
    tenant: str = ""
    priority: int = 0
    ttft_slo_ms: int | None = None
    tpot_slo_ms: int | None = None
    details: bool = False
    wants_token_ids: bool = field(init=False)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "wants_token_ids", bool(self.body.get("return_token_ids")))
        asked = asked_tokens(self.chat, self.body)
        fits = asked is None or asked <= self.context_tokens - self.prompt_tokens  # else the server says what it thinks
        plain = self.streamed and self.tokens is not None and fits and is_plain(self.body)
        object.__setattr__(self, "plain", plain)

    @property
    def path(self) -> str:
        return CHAT if self.chat else COMPLETIONS

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        options = self.body.get("stream_options")
        return isinstance(options, Mapping) and bool(options.get("include_usage"))

    @property
    def answer_tokens(self) -> int:
        """How many tokens the answer may have."""
        return self.answer_tokens_behind(self.prompt_tokens)

    def answer_tokens_behind(self, prompt_tokens: int) -> int:
        """As `answer_tokens`, for a prompt of so many tokens."""
        left = max(1, self.context_tokens - prompt_tokens)
        asked = asked_tokens(self.chat, self.body)
        if asked is not None:
            return min(asked, left)
        default = (self.chat_tokens_max or left) if self.chat else COMPLETION_TOKENS_DEFAULT
        return min(default, left)

    @property
    def may_split(self) -> bool:
        """Whether two servers can share it: one prompt with one answer of more than one token."""
        return self.tokens is not None and self.single and self.answer_tokens > 1

    @property
    def single(self) -> bool:
        """Whether there is one answer, to one prompt."""
        prompt = None if self.chat else self.body.get("prompt")
        several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
        return not several and all(self.body.get(name) in (None, 1) for name in ("n", "best_of"))

    def attempt_id(self, attempt: int) -> str:
        return self.request_id if attempt == 0 else f"{self.request_id}~{attempt}"

    # ------------------------------------------------------------ bodies

    def whole_body(self, transfer: Mapping[str, Any] | None) -> dict[str, Any]:
        """As the client wrote it. `transfer`: what the server that has the prompt's KV answered."""
        body = self._own_body()
        if transfer:
            body["kv_transfer_params"] = dict(transfer)
        if self.streamed:
            options = body.get("stream_options")
            body["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
        if self.plain:
            # To be able to go on elsewhere.
            body["return_token_ids"] = True
        return body

    def _own_body(self) -> dict[str, Any]:
        """The client's body, less what is not the server's business."""
        body = {name: value for name, value in self.body.items() if name != "kvpool" and name not in INTERNAL}
        if self.salt:
            body["cache_salt"] = self.salt
        return body

    def tokens_body(self, tokens: Sequence[int], left: int, transfer: Mapping[str, Any] | None) -> dict[str, Any]:
        """The rest of a plain answer behind `tokens`, by POST /v1/completions, `left` tokens at most."""
        assert self.plain
        body: dict[str, Any] = {name: value for name, value in self.body.items() if name in _SAID_AGAIN}
        body |= {
            "model": self.body["model"], "prompt": list(tokens), "max_tokens": left, "stream": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True,
        }  # fmt: skip
        if self.salt:
            body["cache_salt"] = self.salt
        if transfer:
            body["kv_transfer_params"] = dict(transfer)
        return body

    def prefill_body(self, tokens: Sequence[int], handoff: str) -> tuple[str, dict[str, Any]]:
        """Path and body for the server that computes the prompt and one token. `tokens`: prompt and answer so far, or
        empty while there is no answer yet."""
        if tokens:
            path, body = COMPLETIONS, self.tokens_body(tokens, 1, None)
        else:
            path, body = self.path, self._own_body()
        for name in ("stream_options", "min_tokens", "max_completion_tokens"):
            body.pop(name, None)
        body |= {"max_tokens": 1, "stream": False, "return_token_ids": True}
        body["kv_transfer_params"] = dict(HANDOFFS[handoff])
        return path, body


def is_plain(body: Mapping[str, Any]) -> bool:
    """Whether an answer to this is a run of text that may be cut anywhere, and gone on with from its tokens.

    A list of what is known to be so: anything else asks for something that depends on the answer as a whole (grammars,
    tools, penalties, stop texts), or is not known here.
    """
    for name, value in body.items():
        if name in _SAMPLING or name in _PROMPT:
            continue
        if name in ("logprobs", "top_logprobs", "prompt_logprobs"):
            # 0 asks for the log probability of the chosen token.
            if value is not None and value is not False:
                return False
        elif name not in _NEUTRAL or not _is_one_of(value, _NEUTRAL[name]):
            return False
    if any(body.get(name) is not None and _number(body[name]) is None for name in _LIMITS):
        return False  # vLLM takes "3" and 3.0 for 3: it has to see the body itself
    options = body.get("stream_options")
    if options is not None and (not isinstance(options, Mapping) or set(options) - {"include_usage"}):
        return False
    # The draw of a seeded request depends on where in the answer it is.
    return body.get("seed") is None or body.get("temperature") in (0, 0.0)


def _is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    """Equal and of one kind: True is not 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)


def asked_tokens(chat: bool, body: Mapping[str, Any]) -> int | None:
    """The answer length that a body names; None where it names none, or none that is understood here."""
    asked = _number(body.get("max_completion_tokens")) if chat else None
    return _number(body.get("max_tokens")) if asked is None else asked


def _number(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
