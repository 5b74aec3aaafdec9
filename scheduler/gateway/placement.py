"""The gateway's side of the scheduler: placements, the life line with outcomes, and which models there are."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence

import grpc

from kvpool.core.errors import DeadlineExceeded, KvpoolError, Unavailable
from kvpool.service import rpc
from kvpool.v1 import scheduler_pb2, scheduler_pb2_grpc
from scheduler.gateway.metrics import Metrics

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 5.0
_BACKOFF_S_MIN = 0.05
_BACKOFF_S_MAX = 1.0


class SchedulerClient:
    """One scheduler, reached over one channel. Reconnects by itself until it is closed."""

    def __init__(
        self, address: str, gateway_id: str, metrics: Metrics, *, credential: str = "", outcomes_max: int = 10_000
    ) -> None:
        self._address = address
        self._gateway_id = gateway_id
        self._metrics = metrics
        self._credential = credential
        self._outcomes: deque[scheduler_pb2.Outcome] = deque()
        self._outcomes_max = outcomes_max
        self._outcome_added = asyncio.Event()
        self._connected = asyncio.Event()
        self._interval_s = 0.5
        self._active = 0
        self._stream_count = 0
        self._channel: grpc.aio.Channel | None = None
        self._life_line: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    def start(self) -> None:
        self._channel = rpc.make_aio_channel(self._address, credential=self._credential)
        self._stub = scheduler_pb2_grpc.SchedulerStub(self._channel)
        self._life_line = asyncio.create_task(self._keep_connected())

    async def close(self) -> None:
        """Ends the life line: the scheduler frees what this gateway's requests hold."""
        assert self._life_line is not None and self._channel is not None
        self._life_line.cancel()
        await asyncio.gather(self._life_line, return_exceptions=True)
        await self._channel.close()

    # ------------------------------------------------------------ calls

    async def place(self, request: scheduler_pb2.PlaceRequest, timeout_s: float) -> scheduler_pb2.PlaceReply:
        """Asks for a placement, again and again while the scheduler is away.

        Placing the same request id again replaces the earlier placement, so a lost answer holds nothing.

        Raises: Unavailable when `timeout_s` is over; KvpoolError if the scheduler answers with an error.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        backoff_s = _BACKOFF_S_MIN
        why = "it is not connected"
        while (left_s := deadline - clock()) > 0:
            try:
                # Without the life line the scheduler would not know whose placement this is.
                if not self.connected:
                    await asyncio.wait_for(self._connected.wait(), left_s)
                timeout = max(0.05, min(_CALL_TIMEOUT_S, deadline - clock()))
                reply: scheduler_pb2.PlaceReply = await self._stub.Place(request, timeout=timeout)
                return reply
            except TimeoutError:
                break
            except grpc.RpcError as error:
                translated = rpc.from_rpc_error(error, self._address)
                if not isinstance(translated, (Unavailable, DeadlineExceeded)):
                    raise translated from error
                why = str(translated)
            await asyncio.sleep(min(backoff_s, max(0.0, deadline - clock())))
            backoff_s = min(2 * backoff_s, _BACKOFF_S_MAX)
        raise Unavailable(f"The scheduler could not be reached for {timeout_s:.0f} s: {why}")

    async def list_models(self) -> Sequence[scheduler_pb2.ModelInfo]:
        """Raises: KvpoolError."""
        try:
            reply = await self._stub.ListModels(scheduler_pb2.ListModelsRequest(), timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise rpc.from_rpc_error(error, self._address) from error
        return list(reply.models)

    # ------------------------------------------------------------ life line

    def report(self, outcome: scheduler_pb2.Outcome) -> None:
        """Sends an outcome now, or when the scheduler is back."""
        if len(self._outcomes) >= self._outcomes_max:
            self._outcomes.popleft()
            self._metrics.outcomes_dropped.inc()
        self._outcomes.append(outcome)
        self._outcome_added.set()

    def set_active(self, count: int) -> None:
        """How many requests the next heartbeat says are under way."""
        self._active = count

    async def _keep_connected(self) -> None:
        backoff_s = _BACKOFF_S_MIN
        while True:
            try:
                self._stream_count += 1
                call = self._stub.OpenGateway(self._messages(self._stream_count))
                async for message in call:
                    self._interval_s = max(0.05, message.report_interval_ms / 1000 or self._interval_s)
                    if not self.connected:
                        log.info("connected to scheduler %s at %s", message.scheduler_id, self._address)
                    self._connected.set()
                    self._metrics.scheduler_connected.set(1)
                    backoff_s = _BACKOFF_S_MIN
                why = "the scheduler ended the stream"
            except grpc.RpcError as error:
                why = str(rpc.from_rpc_error(error, self._address))
            except Exception as error:
                # Without its life line a gateway never places again: a bug of ours costs a reconnection.
                log.exception("the life line to the scheduler failed")
                why = f"{type(error).__name__}: {error}"
            if self.connected:
                log.warning("scheduler lost: %s", why)
            self._stream_count += 1
            self._connected.clear()
            self._metrics.scheduler_connected.set(0)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _BACKOFF_S_MAX)

    async def _messages(self, stream: int) -> AsyncIterator[scheduler_pb2.GatewayMessage]:
        hello = scheduler_pb2.GatewayHello(gateway_id=self._gateway_id)
        yield scheduler_pb2.GatewayMessage(hello=hello)
        # An outcome must not overtake the hello's effect: the scheduler answers it first.
        await self._connected.wait()
        # gRPC may keep a dead call's messages going: they must not take the outcomes of the next one.
        while stream == self._stream_count:
            while self._outcomes:
                yield scheduler_pb2.GatewayMessage(outcome=self._outcomes.popleft())
            yield scheduler_pb2.GatewayMessage(heartbeat=scheduler_pb2.GatewayHeartbeat(active_requests=self._active))
            self._outcome_added.clear()
            await self._wait_for_outcome()

    async def _wait_for_outcome(self) -> None:
        try:
            await asyncio.wait_for(self._outcome_added.wait(), self._interval_s)
        except TimeoutError:
            return


def refusal_or_error(error: KvpoolError) -> scheduler_pb2.Refusal:
    """An error that the scheduler answered a placement with, in the form of a refusal."""
    return scheduler_pb2.Refusal(reason=int(error.reason), message=str(error))  # type: ignore[arg-type]
