"""A server that speaks vLLM's HTTP API as far as the gateway and the agent use it, and does what a test tells it.

Its "model" is a function of all tokens before, as that of the made engines: a continuation from a wrong context shows.
Plain sockets, so that it can die in the middle of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from kvpool.core.engine_keys import EngineNaming
from kvpool.v1 import scheduler_pb2
from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.server import GatewayServer
from scheduler.gateway.text import Detokenizer, Tokenizer
from tests.gateway.cluster_made import (
    BLOCK_TOKENS,
    CONTEXT_TOKENS,
    MODEL,
    Changes,
    ClusterMade,
    SchedulerMade,
    next_token,
    ready,
)
from tests.gateway.made_tokenizer import EOS

NAMING = EngineNaming("sha256_cbor", BLOCK_TOKENS)

_PATHS = {"/v1/completions": False, "/v1/chat/completions": True}
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 413: "Too Large", 503: "Unavailable"}


@dataclass
class Call:
    """One request that came. `aborted`: the caller was gone before the end."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    aborted: bool = False
    finished: bool = False

    @property
    def is_prefill(self) -> bool:
        asked = self.body.get("kv_transfer_params") or {}
        return "kvpool_handoff" in asked or asked.get("do_remote_decode") is True


@dataclass
class ServerMade:
    """One server. `stop_after` tokens it waits for `go_on`; `die_after` tokens it is gone; `refuse` answers so."""

    name: str
    changes: Changes
    tokenizer: Tokenizer
    next_token: Callable[[list[int]], int] = next_token
    stop_after: int | None = None
    die_after: int | None = None
    refuse: tuple[int, dict[str, Any]] | None = None
    error_after: int | None = None
    finish_as: str = ""
    ends_abruptly: bool = False
    cached_tokens: int = 0
    transfer: dict[str, Any] | None = None
    reasoning: bool = False
    counts_thoughts: bool = False
    epoch: int = 1
    metrics: str = ""
    calls: list[Call] = field(default_factory=list)
    running: dict[int, Call] = field(default_factory=dict)
    address: str = ""

    async def start(self) -> None:
        self._go_on = asyncio.Event()
        self._writers: dict[asyncio.StreamWriter, None] = {}
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """As if the process had been killed: connections are reset, none is taken."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        self._go_on.set()
        await asyncio.sleep(0)

    def go_on(self) -> None:
        self._go_on.set()

    def target(self) -> scheduler_pb2.Target:
        return scheduler_pb2.Target(instance_id=self.name, address=self.address, epoch=self.epoch)

    # ------------------------------------------------------------ HTTP

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers[writer] = None
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
                await writer.drain()
        finally:
            self._writers.pop(writer, None)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        _, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        data = await reader.readexactly(int(headers.get("content-length", "0")))
        if path == "/metrics":
            _send(writer, 200, self.metrics.encode())
        elif path == "/version":
            _send(writer, 200, b'{"version": "0.32.0"}')
        elif path == "/v1/models":
            listed = {"id": MODEL, "root": "/models/made", "max_model_len": CONTEXT_TOKENS, "parent": None}
            _send(writer, 200, json.dumps({"data": [listed]}).encode())
        elif path not in _PATHS:
            _send(writer, 404, b"{}")
        else:
            call = Call(path, json.loads(data), headers)
            self.calls.append(call)
            self.running[id(call)] = call
            self.changes.notify()
            gone = asyncio.create_task(reader.read())
            try:
                await self._complete(call, writer, gone)
            finally:
                gone.cancel()
                call.aborted = not call.finished
                del self.running[id(call)]
                self.changes.notify()

    async def _complete(self, call: Call, writer: asyncio.StreamWriter, gone: asyncio.Task[bytes]) -> None:
        if self.refuse is not None:
            status, body = self.refuse
            call.finished = True
            _send(writer, status, json.dumps(body).encode())
            return
        answer = _Answer(self, call)
        if call.body.get("stream"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
            for chunk in answer.opening():
                _event(writer, chunk)
        while not answer.finish:
            made = len(answer.tokens)
            if made == self.die_after:
                writer.transport.abort()
                return
            if made == self.error_after:
                _event(writer, {"error": {"message": "EngineDeadError", "type": "InternalServerError", "code": 500}})
                return
            if self.stop_after is not None and made >= self.stop_after:
                going = asyncio.create_task(self._go_on.wait())
                await asyncio.wait({gone, going}, return_when=asyncio.FIRST_COMPLETED)
                going.cancel()
            if gone.done() or writer.is_closing():
                return
            chunk = answer.step()
            if call.body.get("stream"):
                _event(writer, chunk)
                await writer.drain()
        call.finished = True
        if self.ends_abruptly:
            writer.transport.abort() if not call.body.get("stream") else writer.close()
            return
        if not call.body.get("stream"):
            _send(writer, 200, json.dumps(answer.whole()).encode())
            return
        if (call.body.get("stream_options") or {}).get("include_usage"):
            _event(writer, {**answer.head, "choices": [], "usage": answer.usage()})
        writer.write(b"data: [DONE]\n\n")


def _send(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


def _event(writer: asyncio.StreamWriter, chunk: dict[str, Any]) -> None:
    writer.write(f"data: {json.dumps(chunk)}\n\n".encode())


class _Answer:
    """One answer in vLLM's shapes, whole or chunk by chunk."""

    def __init__(self, server: ServerMade, call: Call) -> None:
        self._server, self._body, self._chat = server, call.body, _PATHS[call.path]
        self.prompt = self._prompt()
        asked = self._body.get("max_completion_tokens") or self._body.get("max_tokens")
        self._left = asked or (CONTEXT_TOKENS - len(self.prompt) if self._chat else 16)
        self.tokens: list[int] = []
        self.finish = ""
        self._text = ""
        # As the real one: the text of what is generated depends on what stands before.
        self._detokenizer = Detokenizer(server.tokenizer.decode)
        for token in self.prompt[-8:]:
            self._detokenizer.push(token)
        kind = "chat.completion" if self._chat else "text_completion"
        tail = ".chunk" if self._chat and self._body.get("stream") else ""
        self.head = {
            "id": f"made-{call.headers.get('x-request-id')}",
            "object": kind + tail,
            "created": 1,
            "model": MODEL,
        }

    def _prompt(self) -> list[int]:
        if self._chat:
            return self._server.tokenizer.encode_chat(self._body["messages"]).tolist()
        prompt = self._body["prompt"]
        return self._server.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else list(prompt)

    @property
    def _ids(self) -> bool:
        return bool(self._body.get("return_token_ids"))

    def opening(self) -> list[dict[str, Any]]:
        if not self._chat:
            return []
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{**self.head, "choices": [choice], "prompt_token_ids": self.prompt if self._ids else None}]

    def step(self) -> dict[str, Any]:
        token = self._server.next_token(self.prompt + self.tokens)
        self.tokens.append(token)
        self._left -= 1
        ends = token == EOS and not self._body.get("ignore_eos")
        self.finish = "stop" if ends else "length" if not self._left else ""
        if self.finish:
            self.finish = self._server.finish_as or self.finish
        text = "" if token == EOS else self._detokenizer.push(token)
        if self.finish:
            text += self._detokenizer.flush()
        self._text += text
        ids = [token] if self._ids else None
        told = {
            "index": 0,
            "logprobs": None,
            "finish_reason": self.finish or None,
            "stop_reason": None,
            "token_ids": ids,
        }
        if self._chat:
            name = "reasoning" if self._server.reasoning else "content"
            return {**self.head, "choices": [{**told, "delta": {name: text}}]}
        first = self.prompt if self._ids and len(self.tokens) == 1 else None
        return {**self.head, "choices": [{**told, "text": text, "prompt_token_ids": first}]}

    def whole(self) -> dict[str, Any]:
        ids = self.tokens if self._ids else None
        told = {"index": 0, "logprobs": None, "finish_reason": self.finish, "stop_reason": None, "token_ids": ids}
        prompt = self.prompt if self._ids else None
        asked = self._body.get("kv_transfer_params") or {}
        answer = {"kvpool_tokens": len(self.prompt)} if "kvpool_handoff" in asked else None
        body = {**self.head, "usage": self.usage(), "kv_transfer_params": self._server.transfer or answer}
        if self._chat:
            message = {"role": "assistant", "content": self._text, "refusal": None, "tool_calls": []}
            if self._server.reasoning:
                message |= {"content": None, "reasoning": self._text}
            return {**body, "choices": [{**told, "message": message}], "prompt_token_ids": prompt}
        return {**body, "choices": [{**told, "text": self._text, "prompt_token_ids": prompt}]}

    def usage(self) -> dict[str, Any]:
        prompt, answer = len(self.prompt), len(self.tokens)
        return {
            "prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": self._server.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0} if self._server.counts_thoughts else None,
        }  # fmt: skip


@asynccontextmanager
async def served(tokenizer: str, servers: int = 2, **config: Any) -> AsyncIterator[ClusterMade]:
    """A gateway in front of a made scheduler and made servers."""
    changes = Changes()
    loaded = Tokenizer(tokenizer)
    made = [ServerMade(f"server-{i}", changes, loaded) for i in range(servers)]
    for server in made:
        await server.start()
    scheduler = SchedulerMade(made, tokenizer, changes, layout=NAMING.layout, protocol="openai")  # type: ignore[arg-type]
    await scheduler.start()
    settings = {"listen": "127.0.0.1:0", "drain_timeout_s": 1.0, "place_timeout_s": 30.0, **config}
    gateway = GatewayServer(GatewayConfig(scheduler=scheduler.address, **settings))
    await gateway.startup()
    try:
        await ready(gateway)
        yield ClusterMade(scheduler, made, changes, gateway)  # type: ignore[arg-type]
    finally:
        await gateway.shutdown()
        await scheduler.stop()
        for server in made:
            await server.stop()
