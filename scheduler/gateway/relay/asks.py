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

#: Fields that say how a token is drawn from its logits and nothing else: an answer may be cut anywhere under them.
_SAMPLING = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos", "logit_bias", "allowed_token_ids",
        "skip_special_tokens", "spaces_between_special_tokens", "priority", "user",
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
#: Others may be there with these values, which ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "echo": (None, False), "suffix": (None, ""), "stop": (None, "", []),
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "repetition_penalty": (None, 1),
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
        object.__setattr__(self, "plain", self.streamed and self.tokens is not None and is_plain(self.body))

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
        return answer_tokens(self.chat, self.body, self.prompt_tokens, self.context_tokens)

    @property
    def may_split(self) -> bool:
        """Whether two servers can share it: one prompt with one answer of more than one token."""
        single = all(self.body.get(name) in (None, 1) for name in ("n", "best_of"))
        return self.tokens is not None and single and self.answer_tokens > 1

    def attempt_id(self, attempt: int) -> str:
        return self.request_id if attempt == 0 else f"{self.request_id}~{attempt}"

    # ------------------------------------------------------------ bodies

    def whole_body(self, transfer: Mapping[str, Any] | None) -> dict[str, Any]:
        """As the client wrote it. `transfer`: what the server that has the prompt's KV answered."""
        body = {name: value for name, value in self.body.items() if name != "kvpool"}
        if self.salt:
            body["cache_salt"] = self.salt
        if transfer:
            body["kv_transfer_params"] = dict(transfer)
        if self.streamed:
            options = body.get("stream_options")
            body["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
        if self.plain:
            # To be able to go on elsewhere.
            body["return_token_ids"] = True
        return body

    def tokens_body(self, tokens: Sequence[int], left: int, transfer: Mapping[str, Any] | None) -> dict[str, Any]:
        """The rest of a plain answer behind `tokens`, by POST /v1/completions, `left` tokens at most."""
        assert self.plain
        body: dict[str, Any] = {name: value for name, value in self.body.items() if name in _SAMPLING}
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
            path, body = self.path, {name: value for name, value in self.body.items() if name != "kvpool"}
            if self.salt:
                body["cache_salt"] = self.salt
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
    options = body.get("stream_options")
    if options is not None and (not isinstance(options, Mapping) or set(options) - {"include_usage"}):
        return False
    # The draw of a seeded request depends on where in the answer it is.
    return body.get("seed") is None or body.get("temperature") in (0, 0.0)


def _is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    """Equal and of one kind: True is not 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)


def answer_tokens(chat: bool, body: Mapping[str, Any], prompt_tokens: int, context_tokens: int) -> int:
    """How many tokens the answer may have, as far as a body tells; the server has the last word."""
    asked = body.get("max_completion_tokens") if chat else None
    asked = body.get("max_tokens") if asked is None else asked
    left = max(1, context_tokens - prompt_tokens)
    if type(asked) is int and asked > 0:
        return min(asked, left)
    return left if chat else min(COMPLETION_TOKENS_DEFAULT, left)
