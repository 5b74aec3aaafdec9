"""Connections to the workers: one multiplexed `Engine.Connect` stream each, events handed to their requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc

from kvpool.channels.tls import TlsConfig
from kvpool.service import rpc
from kvpool.v1 import engine_pb2, engine_pb2_grpc
from scheduler.gateway.metrics import Metrics

log = logging.getLogger(__name__)


class Route(Protocol):
    """Where the events of one request on one worker go. Called on the event loop; must neither block nor raise."""

    def on_event(self, event: engine_pb2.RequestEvent) -> None: ...

    def on_lost(self, message: str) -> None: ...


class EngineLink:
    """The stream to one process of a worker. When it breaks, each request on it learns that its instance is lost."""

    def __init__(
        self,
        address: str,
        gateway_id: str,
        *,
        credential: str,
        tls: TlsConfig | None = None,
        commands_max: int,
        on_closed: Callable[[EngineLink], None],
    ) -> None:
        self.address = address
        self._gateway_id = gateway_id
        self._credential, self._tls = credential, tls
        self._routes: dict[str, Route] = {}
        self._commands: asyncio.Queue[engine_pb2.EngineCommand] = asyncio.Queue(commands_max)
        self._on_closed = on_closed
        self._why = ""
        self.closed = False
        self.idle_since = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._run())
        # A task that is cancelled before it began has no `finally`.
        self._task.add_done_callback(lambda _: self._end())

    @property
    def requests(self) -> int:
        return len(self._routes)

    def submit(self, submit: engine_pb2.Submit, route: Route) -> None:
        """Sends a request; its events go to `route` until it ends, is lost or aborted."""
        if self.closed:
            route.on_lost(self._why)
            return
        self._routes[submit.request_id] = route
        self._send(engine_pb2.EngineCommand(submit=submit))

    def forward_first_token(self, request_id: str, token: int) -> None:
        first = engine_pb2.FirstToken(request_id=request_id, token_id=token)
        self._send(engine_pb2.EngineCommand(first_token=first))

    def abort(self, request_id: str) -> None:
        """Ends a request here. No more of its events come."""
        self._forget(request_id)
        self._send(engine_pb2.EngineCommand(abort=engine_pb2.Abort(request_id=request_id)))

    def release(self, request_id: str) -> None:
        """Leaves a request to itself: it goes on, and nobody listens any more."""
        self._forget(request_id)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _forget(self, request_id: str) -> None:
        self._routes.pop(request_id, None)
        if not self._routes:
            self.idle_since = asyncio.get_running_loop().time()

    def _send(self, command: engine_pb2.EngineCommand) -> None:
        if self.closed:
            return
        try:
            self._commands.put_nowait(command)
        except asyncio.QueueFull:
            # A worker that does not take its commands can't be told to abort either: the stream's end does that.
            self._why = f"the worker at {self.address} does not read its commands"
            self._task.cancel()

    async def _run(self) -> None:
        channel = rpc.make_aio_channel(self.address, credential=self._credential, tls=self._tls)
        try:
            call = engine_pb2_grpc.EngineStub(channel).Connect(self._outgoing())
            try:
                async for batch in call:
                    self._dispatch(batch)
                self._why = self._why or f"the worker at {self.address} ended the stream"
            finally:
                call.cancel()
        except grpc.RpcError as error:
            self._why = self._why or str(rpc.from_rpc_error(error, self.address))
        except asyncio.CancelledError:
            self._why = self._why or "the gateway closed the connection"
        finally:
            self._end()
            await channel.close()

    async def _outgoing(self) -> AsyncIterator[engine_pb2.EngineCommand]:
        yield engine_pb2.EngineCommand(hello=self._gateway_id)
        while True:
            yield await self._commands.get()

    def _dispatch(self, batch: engine_pb2.EngineEvents) -> None:
        for event in batch.events:
            route = self._routes.get(event.request_id)
            if route is None:
                continue
            if event.finish_reason:
                self._forget(event.request_id)
            try:
                route.on_event(event)
            except Exception:
                # A bug that one request ran into must not end all others of this worker.
                log.exception("%s: its event failed", event.request_id)
                self.abort(event.request_id)
                self._lose(route, "the gateway failed on an event of this request")

    def _end(self) -> None:
        """Tells everybody, once."""
        if self.closed:
            return
        self.closed = True
        routes, self._routes = self._routes, {}
        if routes:
            log.warning("%s: %d requests are affected", self._why, len(routes))
        self._on_closed(self)
        for route in routes.values():
            self._lose(route, self._why)

    @staticmethod
    def _lose(route: Route, why: str) -> None:
        try:
            route.on_lost(why)
        except Exception:
            log.exception("a request was not told that its worker is lost")


class EngineLinks:
    """Links by worker address and epoch: a restarted worker gets a link of its own."""

    def __init__(
        self, gateway_id: str, metrics: Metrics, *, credential: str, links_max: int, commands_max: int, idle_s: float,
        tls: TlsConfig | None = None,
    ) -> None:  # fmt: skip
        self._gateway_id = gateway_id
        self._metrics = metrics
        self._credential, self._tls = credential, tls
        self._links_max = links_max
        self._commands_max = commands_max
        self._idle_s = idle_s
        self._links: dict[tuple[str, int], EngineLink] = {}

    @property
    def count(self) -> int:
        """Open links."""
        return len(self._links)

    def link(self, address: str, epoch: int) -> EngineLink | None:
        """The link to a worker, opened where needed; None where all links are in use."""
        key = (address, epoch)
        if key not in self._links:
            if len(self._links) >= self._links_max:
                return None
            self._links[key] = EngineLink(
                address,
                self._gateway_id,
                credential=self._credential,
                tls=self._tls,
                commands_max=self._commands_max,
                on_closed=lambda link: self._drop(key, link),
            )
            self._metrics.links.set(len(self._links))
        return self._links[key]

    async def close_idle(self) -> None:
        """Closes links without a request for longer than the limit."""
        oldest = asyncio.get_running_loop().time() - self._idle_s
        idle = {key: link for key, link in self._links.items() if not link.requests and link.idle_since < oldest}
        # Nobody finds one that is on its way out: a request that comes meanwhile opens another.
        for key, link in idle.items():
            self._drop(key, link)
        await asyncio.gather(*(link.close() for link in idle.values()))

    async def close(self) -> None:
        """Closes all; the workers abort what came over them."""
        await asyncio.gather(*(link.close() for link in list(self._links.values())))

    def _drop(self, key: tuple[str, int], link: EngineLink) -> None:
        if self._links.get(key) is link:
            del self._links[key]
        self._metrics.links.set(len(self._links))
