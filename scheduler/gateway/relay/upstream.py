"""HTTP to the servers: one answer whole, or its chunks as they come. What goes wrong has two names here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from kvpool.core.errors import Overloaded
from scheduler.gateway.errors import ApiError
from scheduler.gateway.relay.sse import SseReader

Awaited = TypeVar("Awaited")

_CONNECT_S = 3.0
_CONNECTIONS_MAX = 4096
#: vLLM closes connections that were idle for 5 s: one must not be taken just then.
_IDLE_S = 2.0
#: For the rest of an answer behind its end, so that the connection can be used again.
_REST_S = 0.1
#: A host that is gone without a word is noticed after about so long.
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000),
]
#: Answers of a server that another one may give differently.
_ELSEWHERE = (429, 502, 503, 504)
#: Reasons for which vLLM ends an answer that is none of the client's.
_BROKEN_OFF = ("abort", "error")


class ServerLost(Exception):
    """The server is gone, or has failed on the request: another one may do better."""

    def __init__(self, message: str, answer: ApiError | None = None) -> None:
        super().__init__(message)
        #: What the server said, if it said anything: for the client, where there is no other server.
        self.answer = answer


class ServerAnswer(ApiError):
    """A server's own error, passed on to the client as it is."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        error = body.get("error")
        told = error if isinstance(error, dict) else {}
        super().__init__(status, str(told.get("message", body)), code=str(told.get("code", status)))
        self._body = body

    def body(self) -> dict[str, Any]:
        return self._body


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server may send nothing: before the first chunk of an answer, and after each."""

    first_s: float
    next_s: float


class Upstream:
    """Connections to all servers. Ending a call ends the request at its server."""

    def __init__(self, api_key: str = "") -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        transport = httpx.AsyncHTTPTransport(
            limits=httpx.Limits(
                max_connections=_CONNECTIONS_MAX, max_keepalive_connections=256, keepalive_expiry=_IDLE_S
            ),
            socket_options=_KEEPALIVE,
        )
        # How long an answer may take is said with each call.
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, transport=transport, trust_env=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def whole(
        self, url: str, body: Mapping[str, Any], request_id: str, time_s: float | None = None
    ) -> dict[str, Any]:
        """The answer to a request that is not streamed.

        Args: time_s: all the time that it may take; default: the caller's.
        Raises: ServerLost, ServerAnswer.
        """
        try:
            sent = self._client.post(url, content=_encoded(body), headers=_headers(request_id))
            response = await _within(time_s, url, sent)
        except httpx.HTTPError as error:
            raise _lost(url, error) from error
        reply = _decoded(response.content)
        if response.status_code != 200 or reply is None or "choices" not in reply:
            raise _failed(url, response.status_code, reply)
        for choice in reply["choices"]:
            _check_end(url, choice)
        return reply

    async def chunks(
        self, url: str, body: Mapping[str, Any], request_id: str, patience: Patience
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed answer.

        Raises: ServerLost, also for an answer that breaks off, or does not come in time; ServerAnswer.
        """
        clock = asyncio.get_running_loop().time
        begun_at = clock()
        request = self._client.build_request("POST", url, content=_encoded(body), headers=_headers(request_id))
        try:
            response = await _within(patience.first_s, url, self._client.send(request, stream=True))
            async with aclosing(response):
                wait_s = patience.first_s - (clock() - begun_at)
                if response.status_code != 200:
                    raise _failed(url, response.status_code, _decoded(await _within(wait_s, url, response.aread())))
                async with aclosing(_events(url, response)) as events:
                    while (chunk := await _within(wait_s, url, anext(events, None))) is not None:
                        yield chunk
                        wait_s = patience.next_s
        except httpx.HTTPError as error:
            raise _lost(url, error) from error


async def _within(time_s: float | None, url: str, awaited: Awaitable[Awaited]) -> Awaited:
    """What is awaited. Raises: ServerLost if that takes longer."""
    try:
        async with asyncio.timeout(time_s):
            return await awaited
    except TimeoutError as error:
        raise ServerLost(f"{url} has sent nothing for {time_s or 0:.0f} s") from error


async def _events(url: str, response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    reader, pieces = SseReader(), response.aiter_raw()
    async for piece in pieces:
        try:
            events = reader.feed(piece)
        except Overloaded as error:
            raise ServerLost(f"{url}: {error}") from error
        for data in events:
            if data == b"[DONE]":
                with contextlib.suppress(TimeoutError, httpx.HTTPError):
                    async with asyncio.timeout(_REST_S):
                        async for _ in pieces:
                            pass
                return
            chunk = _decoded(data)
            if chunk is None:
                raise ServerLost(f"{url} sent an event that is no JSON")
            if "error" in chunk:
                told = chunk["error"]
                status = told.get("code") if isinstance(told, dict) else None
                raise _failed(url, status if isinstance(status, int) else 500, chunk)
            for choice in chunk.get("choices") or ():
                _check_end(url, choice)
            yield chunk
    raise ServerLost(f"{url} broke off")


def _check_end(url: str, choice: Mapping[str, Any]) -> None:
    """Raises: ServerLost where a server gave an answer up."""
    if choice.get("finish_reason") in _BROKEN_OFF:
        raise ServerLost(f"{url} gave the request up ({choice['finish_reason']})")


def _encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _headers(request_id: str) -> dict[str, str]:
    # Not compressed: a stream has to come as it is made.
    return {"content-type": "application/json", "x-request-id": request_id, "accept-encoding": "identity"}


def _decoded(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _lost(url: str, error: httpx.HTTPError) -> ServerLost:
    return ServerLost(f"{url}: {type(error).__name__} {error}".rstrip())


def _failed(url: str, status: int, reply: dict[str, Any] | None) -> ServerLost | ServerAnswer:
    """What an error of a server is: its word on this request, or on itself."""
    if status in (401, 403):
        return ServerLost(f"{url} answers {status}: check --engine-api-key")
    if reply is None and 400 <= status < 500:
        reply = {"error": {"message": f"The server answers {status}.", "type": "server_error", "code": status}}
    answer = None if reply is None else ServerAnswer(status, reply)
    if answer is None or status >= 500 or status in _ELSEWHERE or status < 400:
        return ServerLost(f"{url} answers {status}", answer)
    return answer
