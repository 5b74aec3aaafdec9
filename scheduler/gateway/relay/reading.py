"""From what a client sent to an `Ask`: the prompt's tokens, as far as they can be known here.

The server reads the same body and has the last word on it. What is not understood here is no error: such a request is
placed by load alone, and the server answers it, or refuses it in its own words.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from scheduler.gateway.credentials import Tenant
from scheduler.gateway.errors import bad_request
from scheduler.gateway.models import Model
from scheduler.gateway.openai_types import KvpoolOptions
from scheduler.gateway.relay.asks import Ask

log = logging.getLogger(__name__)

#: Longer texts are tokenized beside the event loop.
_INLINE_CHARS_MAX = 4096
#: For prompts that are not tokenized here.
_CHARS_A_TOKEN = 4
_UINT32_MAX = 2**32 - 1

Tokens = NDArray[np.uint32]


async def read_ask(
    body: Mapping[str, Any], *, chat: bool, request_id: str, model: Model, tenant: Tenant, context_tokens: int
) -> Ask:
    """Raises: ApiError (400) for options of kvpool's own that make no sense, and for what can't be passed on."""
    options = _options(body)
    if body.get("stream") not in (None, True, False):
        raise bad_request("'stream' must be true or false.", "stream")
    tokens = await _tokens(body, chat, model)
    if tokens is not None:
        prompt_tokens = len(tokens)
    else:
        prompt_tokens = _guess(body.get("messages") if chat else body.get("prompt"))
    salt = body.get("cache_salt")
    salt = salt if isinstance(salt, str) else ""
    try:
        salt.encode()
    except UnicodeEncodeError:
        raise bad_request("'cache_salt' is not valid Unicode text.", "cache_salt") from None
    return Ask(
        request_id=request_id,
        chat=chat,
        body=body,
        tokens=tokens,
        # A guess must not have a request refused.
        prompt_tokens=min(prompt_tokens, context_tokens - 1) if tokens is None else prompt_tokens,
        context_tokens=context_tokens,
        # The server sees a text that says nothing of the credential.
        salt=tenant.salt(salt).hex() if tenant.secret else salt,
        chat_tokens_max=model.tokenizer.answer_tokens_max,
        policy=options.policy,
        use_pool=options.use_pool,
        sticky_key=options.session,
        tenant=tenant.name,
        priority=options.priority,
        ttft_slo_ms=options.ttft_slo_ms,
        tpot_slo_ms=options.tpot_slo_ms,
        details=body.get("kvpool") is not None,
    )


def _options(body: Mapping[str, Any]) -> KvpoolOptions:
    given = body.get("kvpool")
    if given is None:
        return KvpoolOptions()
    try:
        return KvpoolOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(["kvpool", *map(str, first["loc"])])
        raise bad_request(f"{param}: {first['msg']}", param) from None


async def _tokens(body: Mapping[str, Any], chat: bool, model: Model) -> Tokens | None:
    """The prompt as the server is going to read it; None where there are several, or it can't be told."""
    try:
        return await (_chat_tokens(body, model) if chat else _completion_tokens(body, model))
    except Exception as error:
        # Templates and tokenizers come with the model, bodies from anywhere: the server says what is wrong.
        log.debug("a prompt is not tokenized here: %s: %s", type(error).__name__, error)
        return None


async def _completion_tokens(body: Mapping[str, Any], model: Model) -> Tokens | None:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(t) is int and 0 <= t <= _UINT32_MAX for t in prompt):
        return np.asarray(prompt, dtype=np.uint32)
    if not isinstance(prompt, str) or not prompt or body.get("truncate_prompt_tokens") is not None:
        return None
    special = body.get("add_special_tokens") is not False
    if len(prompt) <= _INLINE_CHARS_MAX:
        return model.tokenizer.encode(prompt, add_special_tokens=special)
    return await asyncio.to_thread(model.tokenizer.encode, prompt, add_special_tokens=special)


async def _chat_tokens(body: Mapping[str, Any], model: Model) -> Tokens | None:
    if any(
        body.get(name) for name in ("chat_template", "documents", "continue_final_message", "truncate_prompt_tokens")
    ):
        return None
    if body.get("add_generation_prompt") is False:
        return None
    messages = [_flat(message) for message in body["messages"]]
    tools = body.get("tools") or None
    size = sum(len(str(message.get("content"))) for message in messages)
    arguments = (messages, body.get("chat_template_kwargs") or {}, tools)
    if size <= _INLINE_CHARS_MAX and tools is None:
        return model.tokenizer.encode_chat(*arguments)
    return await asyncio.to_thread(model.tokenizer.encode_chat, *arguments)


def _flat(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose text parts are one text, as vLLM gives it to templates that know no parts.

    Raises: ValueError for parts that are no text.
    """
    content, message = message.get("content"), _with_calls(message)
    if not isinstance(content, list):
        return message
    if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in content):
        raise ValueError("a part of the message is no text")
    return {**message, "content": "\n".join(str(part["text"]) for part in content)}


def _with_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls of tools as objects, which is how vLLM gives them to templates."""
    calls = message.get("tool_calls")
    if message.get("role") != "assistant" or not isinstance(calls, list):
        return dict(message)
    plain = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**plain, "tool_calls": [_with_object(call) for call in calls]} if calls else plain


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    """Raises: ValueError for arguments that are no JSON."""
    function = dict(call["function"])
    told = function.get("arguments")
    value = json.loads(told) if isinstance(told, str) and told else told
    return {**call, "function": {**function, "arguments": value if isinstance(value, Mapping) else {}}}


def _guess(prompt: Any) -> int:
    return max(1, len(json.dumps(prompt, ensure_ascii=False)) // _CHARS_A_TOKEN)
