"""The gateway process: startup, main loop, shutdown; SIGTERM lets running requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from kvpool.core.errors import BadArgument, Unavailable
from scheduler.gateway.app import Gateway, build_app
from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.credentials import Credentials
from scheduler.gateway.engines import EngineLinks
from scheduler.gateway.generation import Backends
from scheduler.gateway.metrics import Metrics
from scheduler.gateway.models import Models
from scheduler.gateway.placement import SchedulerClient
from scheduler.gateway.relay.asks import HANDOFFS
from scheduler.gateway.relay.relaying import RelayBackends
from scheduler.gateway.relay.upstream import Upstream

log = logging.getLogger(__name__)

__all__ = ["GatewayConfig", "GatewayServer", "run_gateway"]

_SWEEP_S = 5.0
_FIRST_CONTACT_S = 2.0
_BACKLOG = 2048
#: For the errors that end requests at the drain limit to reach their clients.
_LAST_WORDS_S = 0.5


class _HttpServer(uvicorn.Server):
    """Uvicorn that says when it serves, and without its signal handlers: the gateway has its own."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serves = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.serves.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class GatewayServer:
    """One gateway on the running event loop."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.port = 0
        self.metrics = Metrics()
        self._host = ""
        self._stopping, self._hurry = asyncio.Event(), asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def address(self) -> str:
        """host:port of the HTTP API."""
        return f"{self._host}:{self.port}"

    @property
    def active(self) -> int:
        return self._gateway.active

    async def startup(self) -> None:
        """Connects to the scheduler in the background and serves HTTP; being without a scheduler is no error.

        Raises: BadArgument (credentials, address), Unavailable (port taken).
        """
        config = self.config
        credentials = Credentials.load(config.api_keys)
        if config.handoff not in HANDOFFS:
            raise BadArgument(f"handoff {config.handoff!r} is not one of {', '.join(HANDOFFS)}")
        listener = self._listen()
        self._scheduler = SchedulerClient(
            config.scheduler, config.gateway_id, self.metrics,
            credential=config.credential, outcomes_max=config.outcomes_max, tls=config.tls,
        )  # fmt: skip
        self._scheduler.start()
        self.links = EngineLinks(
            config.gateway_id, self.metrics, credential=config.credential, tls=config.tls,
            links_max=config.links_max, commands_max=config.link_commands_max, idle_s=config.link_idle_s,
        )  # fmt: skip
        self._models = Models(self._scheduler.list_models)
        backends = Backends(config, self._scheduler, self.links, self.metrics)
        self._upstream = Upstream(config.engine_api_key)
        relays = RelayBackends(config, self._scheduler, self._upstream, self.metrics)
        self._gateway = Gateway(config, backends, self._models, credentials, relays)
        self._http = _HttpServer(
            uvicorn.Config(
                build_app(self._gateway), loop="none", http="httptools", ws="none", lifespan="off", access_log=False,
                log_config=None, server_header=False,
            )
        )  # fmt: skip
        self._tasks = [asyncio.create_task(self._refresh_models()), asyncio.create_task(self._close_idle_links())]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._models.refresh(), _FIRST_CONTACT_S)
        self._serving = asyncio.create_task(self._http.serve(sockets=[listener]))
        serves = asyncio.create_task(self._http.serves.wait())
        await asyncio.wait({serves, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        serves.cancel()
        if self._serving.done():
            self._serving.result()

    async def main_loop(self) -> None:
        """Until `stop`, or until the HTTP server ends by itself."""
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({stopping, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    def stop(self) -> None:
        """Ends the main loop. Called again, it ends the wait for running requests too."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def shutdown(self) -> None:
        """Takes no new requests, lets running ones finish until the drain limit, then lets go of everything."""
        self._http.should_exit = True
        limit = asyncio.create_task(self._limit_drain())
        await asyncio.gather(self._serving, return_exceptions=True)
        limit.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.links.close()
        await self._upstream.close()
        await self._scheduler.close()

    async def _limit_drain(self) -> None:
        """Ends what still runs at the limit, or when told to hurry; clients that read hear why."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self.config.drain_timeout_s)
        self._gateway.stop_requests()
        await asyncio.sleep(_LAST_WORDS_S)
        self._http.force_exit = True

    def _listen(self) -> socket.socket:
        host, _, port = self.config.listen.rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            raise BadArgument(f"{self.config.listen!r} is no address", hint="write host:port")
        try:
            listener = socket.create_server((host.strip("[]"), int(port)), backlog=_BACKLOG, family=_family(host))
        except OSError as error:
            raise Unavailable(
                f"can't listen on {self.config.listen}: {error}", hint="is the port taken? choose another one"
            ) from error
        listener.setblocking(False)
        self._host, self.port = host, listener.getsockname()[1]
        return listener

    async def _refresh_models(self) -> None:
        while True:
            await asyncio.sleep(self.config.models_refresh_s)
            await self._models.refresh()

    async def _close_idle_links(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            await self.links.close_idle()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


async def _run(config: GatewayConfig, on_ready: Callable[[dict[str, Any]], None]) -> None:
    server = GatewayServer(config)
    loop = asyncio.get_running_loop()
    # Before anything is begun, which would end in the middle.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    await server.startup()
    on_ready({"address": server.address, "gateway": config.gateway_id, "url": f"http://{server.address}/v1"})
    try:
        await server.main_loop()
    finally:
        await server.shutdown()


def run_gateway(config: GatewayConfig, *, on_ready: Callable[[dict[str, Any]], None] = lambda facts: None) -> None:
    """Runs a gateway in this process until SIGTERM or SIGINT; `on_ready` learns where it listens.

    Raises: BadArgument, Unavailable, as `GatewayServer.startup`.
    """
    # The tokenizer's library imports torch where it finds it: a quarter of a gigabyte that a gateway never uses.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    # It says so, too.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        import uvloop
    except ImportError:
        asyncio.run(_run(config, on_ready))
    else:
        uvloop.run(_run(config, on_ready))
