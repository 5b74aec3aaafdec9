"""From what a client sent to token ids, each within the model's vocabulary and context."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.credentials import Tenant
from scheduler.gateway.errors import bad_request, context_exceeded
from scheduler.gateway.models import Model
from scheduler.gateway.openai_types import ChatRequest, CompletionRequest
from scheduler.gateway.submission import GenerationSpec
from scheduler.gateway.text import TemplateFailed

#: OpenAI's default.
_COMPLETION_TOKENS_DEFAULT = 16
#: Longer texts are tokenized beside the event loop.
_INLINE_CHARS_MAX = 4096

Tokens = NDArray[np.uint32]


async def completion_specs(
    request: CompletionRequest, request_id: str, model: Model, tenant: Tenant, config: GatewayConfig
) -> list[GenerationSpec]:
    """One for each prompt. Raises: ApiError (400)."""
    prompts = await _completion_prompts(request.prompt, model, config.prompts_max)
    asked = request.max_tokens
    return [
        _spec(
            request,
            request_id if len(prompts) == 1 else f"{request_id}-{index}",
            model,
            tokens,
            _answer_tokens(len(tokens), asked, _COMPLETION_TOKENS_DEFAULT, model, "prompt"),
            tenant,
        )
        for index, tokens in enumerate(prompts)
    ]


async def chat_spec(
    request: ChatRequest, request_id: str, model: Model, tenant: Tenant, config: GatewayConfig
) -> GenerationSpec:
    """Raises: ApiError (400)."""
    messages = [message.plain() for message in request.messages]
    size = sum(len(m["content"]) for m in messages)
    arguments = (messages, request.chat_template_kwargs or {})
    try:
        if size <= _INLINE_CHARS_MAX:
            tokens = model.tokenizer.encode_chat(*arguments)
        else:
            tokens = await asyncio.to_thread(model.tokenizer.encode_chat, *arguments)
    except TemplateFailed as error:
        raise bad_request(str(error), "messages", "chat_template") from error
    if not len(tokens):
        raise bad_request("The messages make an empty prompt.", "messages")
    answer = _answer_tokens(len(tokens), request.tokens_asked, config.chat_tokens_default, model, "messages")
    return _spec(request, request_id, model, tokens, answer, tenant)


async def _completion_prompts(prompt: Any, model: Model, prompts_max: int) -> list[Tokens]:
    """Prompts in any of the API's forms: text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [await _encode(prompt, model)]
    if not isinstance(prompt, list) or not prompt:
        raise bad_request("'prompt' must be text, token ids, or a list of either, and not empty.", "prompt")
    if isinstance(prompt[0], int):
        return [_check_ids(prompt, model)]
    if len(prompt) > prompts_max:
        raise bad_request(f"At most {prompts_max} prompts in one request.", "prompt")
    if all(isinstance(item, str) for item in prompt):
        return [await _encode(item, model) for item in prompt]
    if all(isinstance(item, list) for item in prompt):
        return [_check_ids(item, model) for item in prompt]
    raise bad_request("'prompt' must be text, token ids, or a list of either.", "prompt")


async def _encode(text: str, model: Model) -> Tokens:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_request("'prompt' is not valid Unicode text.", "prompt") from None
    if len(text) <= _INLINE_CHARS_MAX:
        tokens = model.tokenizer.encode(text)
    else:
        tokens = await asyncio.to_thread(model.tokenizer.encode, text)
    if not text or not len(tokens):
        raise bad_request("'prompt' must not be empty.", "prompt")
    return tokens


def _check_ids(ids: list[Any], model: Model) -> Tokens:
    if not ids:
        raise bad_request("'prompt' must not be empty.", "prompt")
    # The type itself: True is an int, and no token.
    if any(type(token) is not int for token in ids):
        raise bad_request("Token ids must be integers.", "prompt")
    if min(ids) < 0 or max(ids) >= model.tokenizer.vocabulary_size:
        raise bad_request(
            f"Token ids must be 0 to {model.tokenizer.vocabulary_size - 1}.", "prompt", "token_out_of_vocabulary"
        )
    return np.asarray(ids, dtype=np.uint32)


def _answer_tokens(prompt_tokens: int, asked: int | None, default: int, model: Model, param: str) -> int:
    """How many tokens may be generated: what was asked for, or what the context leaves of the default."""
    left = model.context_tokens_max - prompt_tokens
    if left < 1 or (asked or 1) > left:
        raise context_exceeded(prompt_tokens, asked or 1, model.context_tokens_max, param)
    return asked or min(default or left, left)


def _spec(
    request: CompletionRequest | ChatRequest,
    request_id: str,
    model: Model,
    tokens: Tokens,
    max_tokens: int,
    tenant: Tenant,
) -> GenerationSpec:
    options = request.options
    out_of_vocabulary = [t for t in request.stop_token_ids or () if t >= model.tokenizer.vocabulary_size]
    if out_of_vocabulary:
        raise bad_request("Stop token ids must be in the vocabulary.", "stop_token_ids", "token_out_of_vocabulary")
    seed = secrets.randbits(63) if request.seed is None else request.seed
    return GenerationSpec(
        request_id=request_id,
        model=model,
        prompt=tokens,
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=seed % 2**64,
        stop=request.stops,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=request.wants_logprobs or options.top2_gaps,
        policy=options.policy,
        use_pool=options.use_pool,
        sticky_key=options.session,
        salt=tenant.salt(request.cache_salt or ""),
        tenant=tenant.name,
        priority=options.priority,
        ttft_slo_ms=options.ttft_slo_ms,
        tpot_slo_ms=options.tpot_slo_ms,
    )
