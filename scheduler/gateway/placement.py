"""The gateway's side of the schedulers: placements, outcomes, and which models there are.

A gateway has a life line to each scheduler that it knows, and places with one of them for as long as that answers.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import grpc

from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import DeadlineExceeded, KvpoolError, Reason, Unavailable
from kvpool.service import rpc
from kvpool.service.scheduler_list import split
from kvpool.v1 import scheduler_pb2
from scheduler.gateway.metrics import Metrics
from scheduler.gateway.scheduler_line import BACKOFF_S_MAX, BACKOFF_S_MIN, SchedulerLine

_CALL_TIMEOUT_S = 5.0
#: What one scheduler does not know another one may: schedulers that can't hear each other know different instances.
_ASK_OTHERS = (int(Reason.NO_INSTANCE), int(Reason.UNKNOWN_MODEL))


class SchedulerClient:
    """The schedulers of a cluster. Connects again by itself until it is closed.

    Args:
        addresses: host:port, several with commas; the first that is connected is asked.
        outcomes_max: that wait while no scheduler is there; beyond it the oldest are dropped and counted.
    """

    def __init__(
        self,
        addresses: str,
        gateway_id: str,
        metrics: Metrics,
        *,
        credential: str = "",
        outcomes_max: int = 10_000,
        tls: TlsConfig | None = None,
    ) -> None:
        self._addresses = split(addresses)
        self._gateway_id, self._metrics, self._credential, self._tls = gateway_id, metrics, credential, tls
        self._outcomes_max = outcomes_max
        #: Outcomes for which there is no scheduler at the moment.
        self._orphans: deque[scheduler_pb2.Outcome] = deque()
        #: Request -> who placed it, the one placed longest ago first; for outcomes. At the bound the oldest is dropped:
        #: its outcome goes to whoever is asked now, which tells the others.
        self._placed_by: dict[str, SchedulerLine] = {}
        self._lines: list[SchedulerLine] = []
        self._current: SchedulerLine | None = None
        self._connected = asyncio.Event()
        self._active = 0

    @property
    def connected(self) -> bool:
        """Whether a scheduler is there."""
        return self._connected.is_set()

    def start(self) -> None:
        self._lines = [
            SchedulerLine(
                address, self._gateway_id, credential=self._credential, tls=self._tls, changed=self._line_changed,
                active=lambda: self._active,
            )
            for address in self._addresses
        ]  # fmt: skip
        for line in self._lines:
            line.start()

    async def close(self) -> None:
        """Ends the life lines: the schedulers free what this gateway's requests hold."""
        await asyncio.gather(*(line.close() for line in self._lines))

    def _line_changed(self, line: SchedulerLine) -> None:
        if any(line.connected for line in self._lines):
            self._connected.set()
        else:
            self._connected.clear()
        self._metrics.scheduler_connected.set(1 if self.connected else 0)
        if not line.connected:
            # Another one can take them: it tells those that are still there. Else they wait until one is there.
            for outcome in line.take_unsure():
                self.report(outcome)
        elif self._orphans:
            orphans, self._orphans = self._orphans, deque()
            for outcome in orphans:
                self.report(outcome)

    def _pick(self, passed_over: Sequence[SchedulerLine] = ()) -> SchedulerLine | None:
        """Who is asked: the one that was asked last, as long as it is there; else the first of the list that is."""
        usable = [line for line in self._lines if line.connected and line not in passed_over]
        if self._current not in usable:
            if not usable:
                return None
            if passed_over:
                return usable[0]
            self._current = usable[0]
        return self._current

    # ------------------------------------------------------------ calls

    async def place(self, request: scheduler_pb2.PlaceRequest, timeout_s: float) -> scheduler_pb2.PlaceReply:
        """Asks for a placement, of one scheduler after the other, again and again while none answers.

        Placing the same request id again replaces the earlier placement, so a lost answer holds nothing.

        Raises: Unavailable when `timeout_s` is over; KvpoolError if a scheduler answers with an error.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        backoff_s = BACKOFF_S_MIN
        why = "it is not connected"
        refused: dict[SchedulerLine, scheduler_pb2.PlaceReply] = {}
        wait_ms_max, wait_share = request.wait_ms_max, request.wait_ms_max / (timeout_s * 1000)
        while (left_s := deadline - clock()) > 0:
            if request.HasField("wait_ms_max"):
                # A refusal must come before this gateway gives up, also from the second that is asked.
                request.wait_ms_max = min(wait_ms_max, int(left_s * 1000 * wait_share))
            line = self._pick(tuple(refused))
            if line is None and refused:
                break
            if line is None:
                # Without the life line the scheduler would not know whose placement this is.
                try:
                    await asyncio.wait_for(self._connected.wait(), left_s)
                except TimeoutError:
                    break
                continue
            try:
                reply = await self._place_with(line, request, left_s)
            except (Unavailable, DeadlineExceeded) as error:
                why = str(error)
                # The line is about to notice too. With others there, there is no reason to wait for that.
                others = [other for other in self._lines if other.connected and other is not line]
                if others:
                    self._current = others[0]
                backoff_s = await _back_off(backoff_s, deadline - clock())
                continue
            if reply.HasField("refusal") and reply.refusal.reason == int(Reason.UNREACHABLE):
                # For that scheduler this gateway was gone for a moment.
                why = reply.refusal.message
                backoff_s = await _back_off(backoff_s, deadline - clock())
                continue
            if not (reply.HasField("refusal") and reply.refusal.reason in _ASK_OTHERS):
                self._note_placed(request.request_id, line)
                return reply
            refused[line] = reply
        if refused:
            return next(iter(refused.values()))
        raise Unavailable(f"The scheduler could not be reached for {timeout_s:.0f} s: {why}")

    async def _place_with(
        self, line: SchedulerLine, request: scheduler_pb2.PlaceRequest, timeout_s: float
    ) -> scheduler_pb2.PlaceReply:
        """Raises: Unavailable also when the life line is lost meanwhile; KvpoolError."""
        call = line.stub.Place(request, timeout=timeout_s)
        answer = asyncio.ensure_future(_answer_of(call))
        lost = line.lost
        try:
            waiting: list[asyncio.Future[Any]] = [answer, lost]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Unavailable(f"scheduler at {line.address} was lost while it was asked")
            return answer.result()
        except grpc.RpcError as error:
            raise rpc.from_rpc_error(error, line.address) from error
        finally:
            # Also where nobody waits for the answer any more: the scheduler then forgets the request.
            call.cancel()
            answer.cancel()

    def _note_placed(self, request_id: str, line: SchedulerLine) -> None:
        self._placed_by.pop(request_id, None)
        if len(self._lines) > 1:
            self._placed_by[request_id] = line
            if len(self._placed_by) > self._outcomes_max:
                del self._placed_by[next(iter(self._placed_by))]

    async def list_models(self) -> Sequence[scheduler_pb2.ModelInfo]:
        """Raises: KvpoolError."""
        line = self._pick() or self._lines[0]
        try:
            reply = await line.stub.ListModels(scheduler_pb2.ListModelsRequest(), timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise rpc.from_rpc_error(error, line.address) from error
        return list(reply.models)

    # ------------------------------------------------------------ outcomes

    def report(self, outcome: scheduler_pb2.Outcome) -> None:
        """Sends an outcome to whoever placed the request, or to another one, now or when one is there."""
        line = self._placed_by.get(outcome.request_id)
        if not outcome.first_token:
            self._placed_by.pop(outcome.request_id, None)
        if line is None or not line.connected:
            line = self._pick()
        if line is not None:
            if len(line.outcomes) >= self._outcomes_max:
                line.outcomes.popleft()
                self._metrics.outcomes_dropped.inc()
            line.report(outcome)
            return
        if len(self._orphans) >= self._outcomes_max:
            self._orphans.popleft()
            self._metrics.outcomes_dropped.inc()
        self._orphans.append(outcome)

    def set_active(self, count: int) -> None:
        """How many requests the next heartbeat says are under way."""
        self._active = count


async def _back_off(backoff_s: float, left_s: float) -> float:
    """Sleeps, all gateways for different times: they lose a scheduler at the same moment. Returns the next time."""
    await asyncio.sleep(min(backoff_s * random.uniform(0.5, 1.5), max(0.0, left_s)))
    return min(2 * backoff_s, BACKOFF_S_MAX)


async def _answer_of(call: grpc.aio.UnaryUnaryCall) -> scheduler_pb2.PlaceReply:
    reply: scheduler_pb2.PlaceReply = await call
    return reply


def refusal_or_error(error: KvpoolError) -> scheduler_pb2.Refusal:
    """An error that the scheduler answered a placement with, in the form of a refusal."""
    return scheduler_pb2.Refusal(reason=int(error.reason), message=str(error))  # type: ignore[arg-type]
