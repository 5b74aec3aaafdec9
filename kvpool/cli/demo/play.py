"""Plays conversations over HTTP against a gateway, as a chat program would, and measures what a user feels."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from kvpool.cli.demo.workload import Conversation, WorkloadShape

REQUEST_TIMEOUT_S = 120.0


@dataclass
class Turn:
    """One request and its answer."""

    conversation: str
    turn: int
    request_id: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Mode:
    """One way to serve the workload: which policy, and whether the pool is used."""

    name: str
    policy: str
    use_pool: bool


MODES = (Mode("kvpool", "", True), Mode("round robin", "round_robin", False), Mode("sticky", "sticky", False))


async def play_pass(
    url: str,
    model: str,
    conversations: Sequence[Conversation],
    shape: WorkloadShape,
    mode: Mode,
    salt: str,
    on_turn: Callable[[], None] = lambda: None,
) -> list[Turn]:
    """All conversations at once, each turn after the answer to the one before.

    Args:
        salt: keeps the passes apart: no pass finds blocks of another one.
    Raises: httpx.HTTPError, or RuntimeError with what the gateway answered.
    """
    limits = httpx.Limits(max_connections=len(conversations) + 1)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
        played = await asyncio.gather(*(_converse(client, model, c, shape, mode, salt, on_turn) for c in conversations))
    return [turn for turns in played for turn in turns]


async def _converse(
    client: httpx.AsyncClient,
    model: str,
    conversation: Conversation,
    shape: WorkloadShape,
    mode: Mode,
    salt: str,
    on_turn: Callable[[], None],
) -> list[Turn]:
    messages: list[dict[str, str]] = [{"role": "system", "content": conversation.system}]
    turns = []
    for index, text in enumerate(conversation.turns):
        await asyncio.sleep(conversation.think_s[index])
        messages.append({"role": "user", "content": text})
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": shape.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "cache_salt": salt,
            "kvpool": {"policy": mode.policy, "use_pool": mode.use_pool, "session": f"{salt}/{conversation.name}"},
        }
        turn = await _ask(client, body, Turn(conversation.name, index))
        messages.append({"role": "assistant", "content": turn.text})
        turns.append(turn)
        on_turn()
    return turns


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], turn: Turn) -> Turn:
    begin = time.perf_counter()
    first = last = 0.0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise RuntimeError(f"the gateway answered {response.status_code}: {response.text}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"the gateway ended the stream: {chunk['error']}")
            turn.request_id = chunk["id"]
            turn.prompt_ids = chunk.get("prompt_token_ids") or turn.prompt_ids
            if chunk.get("usage"):
                turn.cached_tokens = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
            for choice in chunk["choices"]:
                turn.prompt_ids = choice.get("prompt_token_ids") or turn.prompt_ids
                turn.text += choice["delta"].get("content") or ""
                new = choice.get("token_ids") or []
                if new:
                    last = time.perf_counter()
                    first = first or last
                    turn.output_ids += new
    turn.ttft_ms = (first - begin) * 1000
    turn.tpot_ms = (last - first) * 1000 / max(1, len(turn.output_ids) - 1)
    return turn
