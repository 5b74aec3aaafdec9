"""The gRPC Engine service: streams of gateways, on an event loop and a thread of their own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import grpc
import grpc.aio

from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import Overloaded, Unavailable
from kvpool.service import rpc
from kvpool.v1 import engine_pb2, engine_pb2_grpc

log = logging.getLogger(__name__)

#: Batches of events that wait for a gateway to read; one more ends its stream, which aborts its requests.
EVENTS_MAX = 4096
STOP_GRACE_S = 0.5
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class Stream:
    """The way back to one gateway. `send` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[engine_pb2.EngineEvents | None] = asyncio.Queue(EVENTS_MAX)
        self.gateway = ""
        self.overflown = False
        self.closed = False

    def send(self, events: Sequence[engine_pb2.RequestEvent]) -> None:
        """Queues events as one batch. Never blocks; what is sent after the stream's end is lost."""
        batch = engine_pb2.EngineEvents(events=events)
        try:
            self._loop.call_soon_threadsafe(self._put, batch)
        except RuntimeError:
            log.debug("the service has stopped: %d events are lost", len(events))

    def end(self) -> None:
        """No more batches come. On the loop only."""
        self._put(None)

    async def batches(self) -> AsyncIterator[engine_pb2.EngineEvents]:
        while (batch := await self._queue.get()) is not None:
            yield batch
        if self.overflown:
            raise Overloaded("the gateway does not read its events", hint="is it overloaded?")

    def _put(self, batch: engine_pb2.EngineEvents | None) -> None:
        try:
            self._queue.put_nowait(batch)
        except asyncio.QueueFull:
            self.overflown = True
            while not self._queue.empty():
                self._queue.get_nowait()
            self._queue.put_nowait(None)


class Commands(Protocol):
    """What the service asks of the worker; each call returns at once and may come from the service's thread."""

    def submit(self, stream: Stream, submit: engine_pb2.Submit) -> None: ...

    def first_token(self, stream: Stream, first: engine_pb2.FirstToken) -> None: ...

    def abort(self, stream: Stream, request_id: str) -> None: ...

    def stream_ended(self, stream: Stream) -> None: ...

    def info(self) -> engine_pb2.EngineInfo: ...


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """Turns streams into commands and events."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._streams: dict[Stream, None] = {}
        self._draining = False

    def end_streams(self) -> None:
        """Ends all streams, and each that is still opened. On the loop only."""
        self._draining = True
        for stream in self._streams:
            stream.end()

    async def GetEngineInfo(
        self, request: engine_pb2.GetEngineInfoRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.EngineInfo:
        return self._commands.info()

    async def Connect(
        self, requests: AsyncIterator[engine_pb2.EngineCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.EngineEvents]:
        stream = Stream(asyncio.get_running_loop())
        self._streams[stream] = None
        if self._draining:
            stream.end()
        # Called however the stream ends, also where this generator is not resumed any more.
        context.add_done_callback(lambda _: self._ended(stream))
        reader = asyncio.create_task(self._read(requests, stream))
        try:
            async for batch in stream.batches():
                yield batch
        finally:
            self._ended(stream)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def _ended(self, stream: Stream) -> None:
        if not stream.closed:
            stream.closed = True
            self._streams.pop(stream, None)
            self._commands.stream_ended(stream)

    async def _read(self, requests: AsyncIterator[engine_pb2.EngineCommand], stream: Stream) -> None:
        """Takes commands until the gateway ends its side; the other side then ends too."""
        try:
            async for command in requests:
                kind = command.WhichOneof("command")
                if kind == "submit":
                    self._commands.submit(stream, command.submit)
                elif kind == "first_token":
                    self._commands.first_token(stream, command.first_token)
                elif kind == "abort":
                    self._commands.abort(stream, command.abort.request_id)
                elif kind == "hello":
                    stream.gateway = command.hello
        finally:
            stream.end()


class Companion(Protocol):
    """Another service on the same server: a second event loop with gRPC in one process is asking for trouble."""

    async def start(self) -> None:
        """Before the server listens. What fails here must be dealt with here."""
        ...

    def register(self, server: grpc.aio.Server) -> Sequence[str]: ...

    async def close(self) -> None: ...


class EngineServer:
    """Runs the service in a thread. `start` returns once it listens."""

    def __init__(
        self, commands: Commands, listen: str, *, credential: str = "", companion: Companion | None = None,
        tls: TlsConfig | None = None,
    ) -> None:  # fmt: skip
        self._servicer, self._companion = EngineServicer(commands), companion
        self._listen, self._credential, self._tls = listen, credential, tls
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="engine-service", daemon=True)
        self.port = 0

    def start(self) -> None:
        """Raises: Unavailable if the address can't be bound."""
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S):
            raise Unavailable(f"the service did not start on {self._listen}")
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Ends all streams; their requests are aborted."""
        if self._loop is not None and self._stopping is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(STOP_GRACE_S + STOP_TIMEOUT_S)

    async def _main(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        if self._companion is None:
            await self._serve()
            return
        await self._companion.start()
        try:
            await self._serve()
        finally:
            await self._companion.close()

    async def _serve(self) -> None:
        assert self._stopping is not None
        try:
            server, self.port = await rpc.serve(
                self._listen, self._register, credential=self._credential, tls=self._tls
            )
        except Exception as error:  # handed to the thread that waits in `start`
            self._failure = error
            self._ready.set()
            return
        self._ready.set()
        await self._stopping.wait()
        # Streams that are cut off by the server's end are logged as errors by gRPC, on both sides.
        self._servicer.end_streams()
        if self._companion is not None:
            await self._companion.close()
        await server.stop(STOP_GRACE_S)

    def _register(self, server: grpc.aio.Server) -> Sequence[str]:
        engine_pb2_grpc.add_EngineServicer_to_server(self._servicer, server)
        return ["kvpool.v1.Engine", *(self._companion.register(server) if self._companion is not None else ())]
