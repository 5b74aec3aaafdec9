"""The HTTP routes: checks what comes in, starts generations, and answers in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from scheduler.gateway import replies
from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.credentials import Credentials, Tenant
from scheduler.gateway.errors import ApiError, bad_request, model_not_found, overloaded
from scheduler.gateway.generation import Backends, Generation
from scheduler.gateway.models import Model, Models
from scheduler.gateway.openai_types import ChatRequest, CompletionRequest, parse
from scheduler.gateway.prompts import chat_spec, completion_specs
from scheduler.gateway.relay.reading import read_ask
from scheduler.gateway.relay.relaying import Relay, RelayBackends
from scheduler.gateway.streaming import WatchedResponse, collected, merged
from scheduler.gateway.submission import GenerationSpec

log = logging.getLogger(__name__)

_BODY_TIMEOUT_S = 30.0

Handler = Callable[[Request], Awaitable[Response]]


class Gateway:
    """State behind the routes: who may come in, which models there are, and how many requests are under way."""

    def __init__(
        self,
        config: GatewayConfig,
        backends: Backends,
        models: Models,
        credentials: Credentials,
        relays: RelayBackends,
    ) -> None:
        self._config = config
        self._backends = backends
        self._relays = relays
        self._models = models
        self._credentials = credentials
        self._live: dict[Generation | Relay, None] = {}

    @property
    def active(self) -> int:
        return len(self._live)

    def stop_requests(self) -> None:
        """Ends all that are under way, each with an error for its client."""
        for generation in list(self._live):
            generation.stop()

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self._guarded(self._list_models), methods=["GET"]),
            Route("/v1/models/{model:path}", self._guarded(self._get_model), methods=["GET"]),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]

    # ------------------------------------------------------------ routes

    async def _list_models(self, request: Request) -> Response:
        self._check_credential(request)
        await self._models.refresh()
        return JSONResponse({"object": "list", "data": [_describe(m) for m in self._models.served()]})

    async def _get_model(self, request: Request) -> Response:
        self._check_credential(request)
        name = request.path_params["model"]
        await self._models.refresh()
        for model in self._models.served():
            if model.name == name:
                return JSONResponse(_describe(model))
        raise model_not_found(name)

    async def _completions(self, request: Request) -> Response:
        arrived_at, tenant = self._now(), self._check_credential(request)
        data, request_id = await self._read_json(request), f"cmpl-{uuid.uuid4().hex}"
        if (served := await self._served_elsewhere(data)) is not None:
            return await self._relayed(data, served, tenant, request_id, arrived_at, chat=False)
        body = parse(CompletionRequest, data)
        model = await self._models.get(body.model)
        specs = await completion_specs(body, request_id, model, tenant, self._config)
        return self._answer(body, request_id, specs, replies.CompletionReply, arrived_at)

    async def _chat(self, request: Request) -> Response:
        arrived_at, tenant = self._now(), self._check_credential(request)
        data, request_id = await self._read_json(request), f"chatcmpl-{uuid.uuid4().hex}"
        if (served := await self._served_elsewhere(data)) is not None:
            return await self._relayed(data, served, tenant, request_id, arrived_at, chat=True)
        body = parse(ChatRequest, data)
        model = await self._models.get(body.model)
        spec = await chat_spec(body, request_id, model, tenant, self._config)
        return self._answer(body, request_id, [spec], replies.ChatReply, arrived_at)

    async def _health(self, request: Request) -> Response:
        connected = self._backends.scheduler.connected
        body = {
            "status": "ok" if connected else "scheduler_unreachable",
            "gateway": self._config.gateway_id,
            "models": [m.name for m in self._models.served()],
            "active_requests": self.active,
        }
        return JSONResponse(body, 200 if connected else 503)

    async def _metrics(self, request: Request) -> Response:
        metrics = self._backends.metrics
        return Response(metrics.render(), headers={"content-type": metrics.content_type})

    # ------------------------------------------------------------ answers

    def _answer(
        self,
        body: CompletionRequest | ChatRequest,
        request_id: str,
        specs: list[GenerationSpec],
        kind: type[replies.Reply],
        arrived_at: float,
    ) -> Response:
        generations = [Generation(spec, self._backends, arrived_at) for spec in specs]
        reply = kind(body, request_id, int(time.time()), generations)

        def cancel() -> None:
            for generation in generations:
                generation.cancel()

        make = self._streamed if body.stream else self._whole
        return WatchedResponse(
            make(reply, generations, body.wants_usage_chunk),
            stream=bool(body.stream),
            request_id=request_id,
            on_disconnect=cancel,
            on_error=self._count_error,
        )

    async def _served_elsewhere(self, data: Any) -> Model | None:
        """The model of a body, if servers of its own serve it; None for all else, errors included."""
        name = data.get("model") if isinstance(data, dict) else None
        if not isinstance(name, str):
            return None
        try:
            model = await self._models.get(name)
        except ApiError:
            return None
        return model if model.naming is not None else None

    async def _relayed(
        self, data: dict[str, Any], model: Model, tenant: Tenant, request_id: str, arrived_at: float, *, chat: bool
    ) -> Response:
        ask = await read_ask(
            data, chat=chat, request_id=request_id, model=model, tenant=tenant, context_tokens=model.context_tokens_max
        )
        relay = Relay(ask, model, self._relays, arrived_at)

        async def blocks() -> AsyncGenerator[bytes, None]:
            with self._admitted([relay]):
                async with aclosing(relay.blocks()) as made:
                    async for block in made:
                        yield block

        return WatchedResponse(
            blocks(), stream=ask.streamed, request_id=request_id, on_disconnect=relay.cancel, on_error=self._count_error
        )

    async def _streamed(
        self, reply: replies.Reply, generations: list[Generation], usage: bool
    ) -> AsyncGenerator[bytes, None]:
        with self._admitted(generations):
            async with aclosing(merged(generations)) as pieces:
                async for index, piece in pieces:
                    if block := reply.chunk(index, piece):
                        yield block
            yield (reply.usage_chunk() if usage else b"") + replies.DONE

    async def _whole(
        self, reply: replies.Reply, generations: list[Generation], usage: bool
    ) -> AsyncGenerator[bytes, None]:
        with self._admitted(generations):
            yield reply.whole(await collected(generations))

    @contextmanager
    def _admitted(self, generations: Sequence[Generation | Relay]) -> Iterator[None]:
        """Counts requests as under way. Raises: ApiError (429) if there are too many."""
        if self.active + len(generations) > self._config.active_requests_max:
            raise overloaded("This gateway has too many requests under way.")
        self._live.update(dict.fromkeys(generations))
        self._tell_active()
        try:
            yield
        finally:
            for generation in generations:
                del self._live[generation]
            self._tell_active()

    def _tell_active(self) -> None:
        self._backends.metrics.active.set(self.active)
        self._backends.scheduler.set_active(self.active)

    # ------------------------------------------------------------ what comes in

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except ApiError as error:
                self._count_error(error)
                return error.response()
            except ClientDisconnect:
                return Response(status_code=499)

        return guarded

    def _check_credential(self, request: Request) -> Tenant:
        return self._credentials.check(request.headers.get("authorization", ""))

    def _count_error(self, error: ApiError) -> None:
        self._backends.metrics.rejected.labels(str(error.status), error.code or "").inc()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _read_json(self, request: Request) -> Any:
        """The body as JSON. Raises: ApiError (400, 408, 413)."""
        too_large = ApiError(
            413, f"The body may have {self._config.body_bytes_max} bytes at most.", code="body_too_large"
        )
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._config.body_bytes_max:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self._config.body_bytes_max:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "The body did not come in time.", code="body_timeout") from None
        try:
            return json.loads(body.decode(), parse_constant=_refuse_constant)
        except UnicodeDecodeError:
            raise bad_request("The body is not UTF-8.", code="invalid_json") from None
        except (ValueError, RecursionError) as error:
            raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _describe(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "kvpool",
        "max_model_len": model.context_tokens_max,
    }


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{error.detail} ({request.method} {request.url.path})"
    response = ApiError(error.status_code, message, code=code).response()
    response.headers.update(error.headers or {})
    return response


async def _server_error(request: Request, error: Exception) -> Response:
    log.error("request failed", exc_info=error)
    return ApiError(500, "The gateway failed on this request.", kind="server_error", code="internal").response()


def build_app(gateway: Gateway) -> Starlette:
    return Starlette(routes=gateway.routes(), exception_handlers={HTTPException: _http_error, Exception: _server_error})
