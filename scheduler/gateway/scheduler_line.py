"""A gateway's life line to one scheduler: whether it is there, and the outcomes on their way to it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from kvpool.channels.tls import TlsConfig
from kvpool.service import rpc
from kvpool.v1 import scheduler_pb2, scheduler_pb2_grpc

log = logging.getLogger(__name__)

BACKOFF_S_MIN, BACKOFF_S_MAX = 0.05, 1.0
#: A scheduler that speaks regularly and is silent for this long is taken for lost.
SILENT_S = 5.0
#: What was said this long before a loss may have been lost with it, or not been passed on; so many outcomes at most.
UNSURE_S = SILENT_S + 3.0
UNSURE_MAX = 4096


class SchedulerLine:
    """Connects again by itself until it is closed.

    Args:
        changed: called after each connection and each loss.
        active: how many requests a heartbeat says are under way.
    """

    def __init__(
        self,
        address: str,
        gateway_id: str,
        *,
        credential: str,
        tls: TlsConfig | None,
        changed: Callable[[SchedulerLine], None],
        active: Callable[[], int],
    ) -> None:
        self.address = address
        self.connected = False
        #: Done when this connection is lost; a new one for each connection.
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.outcomes: deque[scheduler_pb2.Outcome] = deque()
        #: Ends that were said of late, with the time: nothing says whether they were heard.
        self._said: deque[tuple[float, scheduler_pb2.Outcome]] = deque(maxlen=UNSURE_MAX)
        self._gateway_id, self._changed, self._active = gateway_id, changed, active
        self._outcome_added = asyncio.Event()
        self._greeted = asyncio.Event()
        self._interval_s = 0.5
        self._stream_count = 0
        self._heard_at = 0.0
        self._speaks = False
        self._channel = rpc.make_aio_channel(address, credential=credential, tls=tls)
        self.stub: Any = scheduler_pb2_grpc.SchedulerStub(self._channel)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._keep_connected())]

    async def close(self) -> None:
        """Ends the life line: the scheduler frees what this gateway's requests hold."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    def report(self, outcome: scheduler_pb2.Outcome) -> None:
        self.outcomes.append(outcome)
        self._outcome_added.set()

    def take_unsure(self) -> list[scheduler_pb2.Outcome]:
        """After a loss: outcomes that somebody else should be told. Being told twice changes nothing."""
        since = asyncio.get_running_loop().time() - UNSURE_S
        unsure = [outcome for said_at, outcome in self._said if said_at >= since]
        unsure += self.outcomes
        self._said.clear()
        self.outcomes.clear()
        return unsure

    # ------------------------------------------------------------ the line

    async def _keep_connected(self) -> None:
        backoff_s = BACKOFF_S_MIN
        while True:
            try:
                await self._stay_connected()
                why = "the scheduler ended the stream"
            except TimeoutError:
                why = f"it was silent for {SILENT_S:.0f} s"
            except grpc.RpcError as error:
                why = str(rpc.from_rpc_error(error, self.address))
            except Exception as error:
                # Without its life line a gateway never places again: a bug of ours costs a reconnection.
                log.exception("the life line to the scheduler failed")
                why = f"{type(error).__name__}: {error}"
            self._stream_count += 1
            if self.connected:
                log.warning("scheduler at %s lost: %s", self.address, why)
                backoff_s = BACKOFF_S_MIN
                self._set_connected(False)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)

    async def _stay_connected(self) -> None:
        self._stream_count += 1
        self._speaks = False
        self._greeted.clear()
        call = self.stub.OpenGateway(self._messages(self._stream_count))
        try:
            async with asyncio.timeout(None) as patience:
                async for message in call:
                    self._hear(message)
                    # One that says more than its greeting says something every second.
                    if self._speaks:
                        patience.reschedule(asyncio.get_running_loop().time() + SILENT_S)
        finally:
            call.cancel()

    def _hear(self, message: scheduler_pb2.SchedulerMessage) -> None:
        self._interval_s = max(0.05, message.report_interval_ms / 1000 or self._interval_s)
        self._speaks = self._greeted.is_set()
        self._greeted.set()
        if not self.connected:
            log.info("connected to scheduler %s at %s", message.scheduler_id, self.address)
            self._set_connected(True)

    def _set_connected(self, connected: bool) -> None:
        self.connected = connected
        if connected:
            self.lost = asyncio.get_running_loop().create_future()
        elif not self.lost.done():
            self.lost.set_result(None)
        self._changed(self)

    async def _messages(self, stream: int) -> AsyncIterator[scheduler_pb2.GatewayMessage]:
        yield scheduler_pb2.GatewayMessage(hello=scheduler_pb2.GatewayHello(gateway_id=self._gateway_id))
        # An outcome must not overtake the hello's effect: the scheduler answers it first.
        await self._greeted.wait()
        # gRPC may keep a dead call's messages going: they must not take the outcomes of the next one.
        while stream == self._stream_count:
            self._outcome_added.clear()
            while self.outcomes and stream == self._stream_count:
                outcome = self.outcomes.popleft()
                if not outcome.first_token:
                    self._said.append((asyncio.get_running_loop().time(), outcome))
                yield scheduler_pb2.GatewayMessage(outcome=outcome)
            yield scheduler_pb2.GatewayMessage(heartbeat=scheduler_pb2.GatewayHeartbeat(active_requests=self._active()))
            await self._wait_for_outcome()

    async def _wait_for_outcome(self) -> None:
        try:
            await asyncio.wait_for(self._outcome_added.wait(), self._interval_s)
        except TimeoutError:
            return
