"""One request on its way: placed, sent to one server or two, and to others when one is lost.

The only place where placements, servers, clock and answers meet. What is sent and what the client gets is decided in
`asks` and `answers`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvpool.core.errors import KvpoolError, Reason, Unavailable
from kvpool.v1 import common_pb2, engine_pb2, scheduler_pb2
from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.errors import ApiError, from_failure, unavailable
from scheduler.gateway.events import Failure, FailureKind, Finish
from scheduler.gateway.metrics import Metrics
from scheduler.gateway.models import Model
from scheduler.gateway.placement import SchedulerClient, refusal_or_error
from scheduler.gateway.relay.answers import StreamedAnswer, whole_answer
from scheduler.gateway.relay.asks import COMPLETIONS, HANDOFFS, Ask
from scheduler.gateway.relay.masks import KeyMasks
from scheduler.gateway.relay.upstream import Patience, ServerLost, Upstream
from scheduler.gateway.submission import WAIT_SHARE

log = logging.getLogger(__name__)

#: Blocks for a client that does not read; beyond it the server is not read either.
_UNREAD_BLOCKS_MAX = 256
#: Longer prompts are hashed beside the event loop.
_INLINE_TOKENS_MAX = 4096
#: A first token that takes so many times as long as predicted does not come.
PREDICTED_TIMES = 4.0
_REASONS: dict[int, Reason] = {int(reason): reason for reason in Reason}


@dataclass(frozen=True)
class RelayBackends:
    """What a relay works with."""

    config: GatewayConfig
    scheduler: SchedulerClient
    upstream: Upstream
    metrics: Metrics
    #: Models whose servers tell a chat's thoughts from its answer, as seen so far.
    reasoning: dict[str, None] = field(default_factory=dict)
    masks: KeyMasks = field(default_factory=KeyMasks)


@dataclass
class _Attempt:
    """One placement and what became of it."""

    number: int
    begun_at: float
    placement: scheduler_pb2.Placement
    first_at: float = 0.0
    tokens_before: int = 0
    reported: bool = False
    #: Instance that was asked last.
    asked: str = ""


class Relay:
    """Runs one request. `blocks()` is read once; `cancel()` and `stop()` may come at any time."""

    def __init__(self, ask: Ask, model: Model, backends: RelayBackends, arrived_at: float) -> None:
        self.ask = ask
        self._model, self._backends, self._arrived_at = model, backends, arrived_at
        self._clock = asyncio.get_running_loop().time
        self._answer = StreamedAnswer(
            ask, int(time.time()), model.tokenizer.decode, reasons=model.name in backends.reasoning
        )
        self._attempts: list[_Attempt] = []
        self._excluded: list[str] = []
        self._blocks: asyncio.Queue[bytes | None] = asyncio.Queue(_UNREAD_BLOCKS_MAX)
        self._task: asyncio.Task[None] | None = None
        self._stopping = self._cancelled = False
        self._first_at = self._last_at = 0.0
        self._tokens_noted = 0

    # ------------------------------------------------------------ for the reader

    async def blocks(self) -> AsyncGenerator[bytes, None]:
        """What the client gets, as it comes. Raises: ApiError; what came before it is valid."""
        task = self._task = asyncio.create_task(self._pump())
        # A task that is cancelled before its first step runs no line of its own.
        task.add_done_callback(lambda ended: self._hang_up() if ended.cancelled() else None)
        if self._cancelled:
            task.cancel()
        try:
            while (block := await self._blocks.get()) is not None:
                yield block
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()
            if self._stopping:
                raise from_failure(Failure(FailureKind.STOPPING, "The gateway is stopping."))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def cancel(self) -> None:
        """The client is gone: ends the request at its servers at once."""
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    def stop(self) -> None:
        """As `cancel`, and its reader is told that the gateway stops."""
        self._stopping = True
        self.cancel()

    # ------------------------------------------------------------ the request

    async def _pump(self) -> None:
        outcome = "abort"
        try:
            async with asyncio.timeout_at(self._arrived_at + self._backends.config.request_timeout_s):
                async with aclosing(self._run()) as blocks:
                    async for block in blocks:
                        await self._blocks.put(block)
            outcome = self._answer.finish or "stop"
            await self._blocks.put(None)
        except TimeoutError:
            outcome = FailureKind.DEADLINE.value
            self._hang_up()
            raise from_failure(Failure(FailureKind.DEADLINE, "the request's deadline passed")) from None
        except ApiError as error:
            outcome = "refused" if error.status in (429, 503) else "engine"
            await self._blocks.put(None)
            raise
        except BaseException:
            self._hang_up()
            raise
        finally:
            self._count_end(outcome)

    def _hang_up(self) -> None:
        """The reader gets no more. All that waits for it goes: nothing is missing within what it has."""
        while not self._blocks.empty():
            self._blocks.get_nowait()
        self._blocks.put_nowait(None)

    async def _run(self) -> AsyncGenerator[bytes, None]:
        """Attempts until one succeeds. Raises: ApiError."""
        limits = self._backends.config.lifecycle
        for number in range(limits.replacements_max + 1):
            attempt = await self._placed(number)
            finish, error = Finish.ABORT, ""
            try:
                run = self._streamed(attempt) if self.ask.streamed else self._whole(attempt)
                async with aclosing(run) as blocks:
                    async for block in blocks:
                        yield block
                finish = Finish.STOP if self._answer.finish == "stop" else Finish.LENGTH
                return
            except ServerLost as lost:
                finish, error = Finish.INSTANCE_LOST, str(lost)
                log.warning("%s: %s", self.ask.attempt_id(number), lost)
                if self._answer.complete:
                    finish = Finish.STOP if self._answer.finish == "stop" else Finish.LENGTH
                    yield self._answer.end(self._details())
                    return
                if number == limits.replacements_max or not (self._answer.continues or self._answer.repeats):
                    message = f"The server of this request failed: {lost}"
                    raise lost.answer or from_failure(Failure(FailureKind.ENGINE, message)) from lost
                self._backends.metrics.replacements.labels("lost").inc()
                self._answer.server_changes()
                if attempt.asked not in self._excluded:
                    self._excluded.append(attempt.asked)
            except ApiError as refused:
                finish, error = Finish.ERROR, refused.message
                raise
            finally:
                self._report(attempt, finish, error)

    async def _whole(self, attempt: _Attempt) -> AsyncGenerator[bytes, None]:
        """An answer in one, passed on as the server gives it. Raises: ServerLost, ApiError."""
        placement, transfer = attempt.placement, None
        if placement.split and self.ask.may_split:
            transfer = (await self._prefill(attempt)).get("kv_transfer_params")
            self._note_first(attempt)
        attempt.asked = placement.decode.instance_id
        # Nobody says when such an answer begins. The scheduler would take its prefill for work to come until the end.
        begun = asyncio.get_running_loop().call_later(_predicted_s(placement), self._note_expected, attempt)
        try:
            reply = await self._backends.upstream.whole(
                placement.decode.address + self.ask.path,
                self.ask.whole_body(transfer),
                self.ask.attempt_id(attempt.number),
            )
        finally:
            begun.cancel()
        self._last_at = self._clock()
        usage = reply.get("usage") or {}
        self._answer.tokens = int(usage.get("completion_tokens") or 0)
        self._answer.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        self._answer.finish = str(reply["choices"][0].get("finish_reason") or "")
        yield whole_answer(reply, self.ask, self._details())

    async def _streamed(self, attempt: _Attempt) -> AsyncGenerator[bytes, None]:
        """Chunks as they come. Raises: ServerLost, ApiError."""
        answer, transfer = self._answer, None
        if attempt.placement.split and self.ask.may_split:
            from_tokens = bool(answer.context())
            reply = await self._prefill(attempt)
            transfer = reply.get("kv_transfer_params")
            # NixlConnector takes it that all of a prompt lies at the other server: nothing may be added to it.
            block = None
            if self._backends.config.handoff == "pool":
                block = answer.first_token(reply, from_tokens=from_tokens)
            if block is not None:
                self._note_first(attempt)
                yield block
                if answer.finish:
                    yield answer.end(self._details())
                    return
        async with aclosing(self._decoded(attempt, transfer)) as blocks:
            async for block in blocks:
                yield block
        yield answer.end(self._details())

    async def _decoded(self, attempt: _Attempt, transfer: Mapping[str, Any] | None) -> AsyncGenerator[bytes, None]:
        """What the client gets of the server that decodes."""
        answer, ask = self._answer, self.ask
        context = answer.context()
        path = COMPLETIONS if context else ask.path
        body = ask.tokens_body(context, answer.tokens_left(), transfer) if context else ask.whole_body(transfer)
        attempt.asked = attempt.placement.decode.instance_id
        url = attempt.placement.decode.address + path
        patience = patience_of(self._backends.config, attempt.placement)
        chunks = self._backends.upstream.chunks(url, body, ask.attempt_id(attempt.number), patience)
        async with aclosing(chunks):
            async for chunk in chunks:
                block = answer.chunk(chunk, from_tokens=bool(context))
                if block and answer.begun:
                    self._note_first(attempt)
                if block:
                    yield block

    async def _prefill(self, attempt: _Attempt) -> dict[str, Any]:
        """Has the prompt and one token computed. Raises: ServerLost, ApiError."""
        path, body = self.ask.prefill_body(self._answer.context(), self._backends.config.handoff)
        attempt.asked = attempt.placement.prefill.instance_id
        url = attempt.placement.prefill.address + path
        request_id = f"{self.ask.attempt_id(attempt.number)}-prefill"
        time_s = patience_of(self._backends.config, attempt.placement).first_s
        reply = await self._backends.upstream.whole(url, body, request_id, time_s)
        naming, told = self._model.naming, reply.get("kv_transfer_params")
        if naming is not None and self._backends.masks.differs(attempt.asked, told, naming.mask):
            self._backends.metrics.other_masks.labels(self._model.name).inc()
        return reply

    # ------------------------------------------------------------ placement

    async def _placed(self, number: int) -> _Attempt:
        """Raises: ApiError if there is no place."""
        limits = self._backends.config.lifecycle
        begun_at = self._clock()
        for refusals in range(limits.refusals_max + 1):
            try:
                reply = await self._ask_for_place(number)
            except Unavailable as error:
                raise unavailable(str(error), "scheduler_unreachable") from error
            except KvpoolError as error:
                reply = scheduler_pb2.PlaceReply(refusal=refusal_or_error(error))
            if reply.HasField("placement"):
                attempt = _Attempt(number, begun_at, reply.placement, tokens_before=self._answer.tokens)
                self._attempts.append(attempt)
                kind = "split" if reply.placement.split else "co-located"
                self._backends.metrics.placements.labels(kind).inc()
                return attempt
            refusal = reply.refusal
            reason = _REASONS.get(refusal.reason, Reason.OVERLOADED)
            self._backends.metrics.refusals.labels(reason.name.lower()).inc()
            if number == 0 or refusals == limits.refusals_max:
                break
            # Whoever was lost may be back, and may be the only one.
            self._excluded.clear()
            wait_ms = min(max(refusal.retry_after_ms, limits.refusal_wait_ms_min), limits.refusal_wait_ms_max)
            await asyncio.sleep(wait_ms / 1000)
        raise from_failure(Failure(FailureKind.REFUSED, refusal.message, reason, refusal.retry_after_ms))

    async def _ask_for_place(self, number: int) -> scheduler_pb2.PlaceReply:
        """Raises: KvpoolError."""
        scheduler, timeout_s = self._backends.scheduler, self._backends.config.place_timeout_s
        request = await self._place_request(number)
        policy = request.policy
        if not self.ask.may_split:
            request.policy = "always_colocate"
        reply = await scheduler.place(request, timeout_s)
        if reply.refusal.reason == int(Reason.NO_INSTANCE) and request.policy != policy:
            # Only servers for one of both: any server can do all by itself.
            request.policy = policy
            reply = await scheduler.place(request, timeout_s)
        return reply

    async def _place_request(self, number: int) -> scheduler_pb2.PlaceRequest:
        ask, config = self.ask, self._backends.config
        context = self._answer.context()
        keys = await self._keys(context)
        return scheduler_pb2.PlaceRequest(
            request_id=ask.attempt_id(number),
            gateway_id=config.gateway_id,
            model=self._model.name,
            keys=[common_pb2.KeyList(keys=keys)],
            prompt_tokens=max(1, len(context) or ask.prompt_tokens),
            max_tokens=min(
                max(1, self._answer.tokens_left() if context else ask.answer_tokens), config.relay_tokens_max
            ),
            ttft_slo_ms=config.ttft_slo_ms if ask.ttft_slo_ms is None else ask.ttft_slo_ms,
            tpot_slo_ms=config.tpot_slo_ms if ask.tpot_slo_ms is None else ask.tpot_slo_ms,
            tenant=ask.tenant,
            priority=ask.priority,
            wait_ms_max=int(config.place_timeout_s * 1000 * WAIT_SHARE),
            policy=ask.policy or config.policy,
            use_pool=ask.use_pool,
            sticky_key=ask.sticky_key,
            exclude_instances=self._excluded,
        )

    async def _keys(self, context: Sequence[int]) -> bytes:
        """Packed keys of what is computed already somewhere, perhaps."""
        tokens = np.asarray(context, dtype=np.uint32) if context else self.ask.tokens
        if tokens is None:
            return b""
        if len(tokens) <= _INLINE_TOKENS_MAX:
            return self._model.served_keys(tokens, self.ask.salt).tobytes()
        return (await asyncio.to_thread(self._model.served_keys, tokens, self.ask.salt)).tobytes()

    # ------------------------------------------------------------ what is told of it

    def _note_first(self, attempt: _Attempt) -> None:
        """The first token of an attempt is there."""
        now, metrics, model = self._clock(), self._backends.metrics, self._model.name
        if self._last_at and self.ask.streamed:
            metrics.itl.labels(model).observe((now - self._last_at) / max(1, self._answer.tokens - self._tokens_noted))
        self._last_at, self._tokens_noted = now, self._answer.tokens
        if attempt.first_at:
            return
        attempt.first_at = now
        if not self._first_at:
            self._first_at = now
            metrics.ttft.labels(model).observe(now - self._arrived_at)
        self._report(attempt, None)

    def _note_expected(self, attempt: _Attempt) -> None:
        """The first token should be there by now."""
        if not attempt.first_at:
            self._report(attempt, None)

    def _report(self, attempt: _Attempt, finish: Finish | None, error: str = "") -> None:
        """Tells the scheduler of an attempt's first token (`finish` None), or its end, once."""
        if finish is not None and attempt.reported:
            return
        attempt.reported = finish is not None
        now = self._clock()
        outcome = scheduler_pb2.Outcome(
            request_id=self.ask.attempt_id(attempt.number),
            ttft_us=int((attempt.first_at - attempt.begun_at) * 1e6) if attempt.first_at else 0,
            duration_us=int((now - attempt.begun_at) * 1e6),
            tokens=max(0, self._answer.tokens - attempt.tokens_before),
            finish_reason=finish.value if finish else "",
            error=error,
            first_token=finish is None,
        )
        if finish in (Finish.STOP, Finish.LENGTH):
            cached = min(self._answer.cached_tokens, self.ask.prompt_tokens)
            computed = self.ask.prompt_tokens - cached
            outcome.prefill.CopyFrom(engine_pb2.RequestTimes(cached_tokens_hbm=cached, computed_tokens=computed))
        self._backends.scheduler.report(outcome)

    def _details(self) -> dict[str, Any] | None:
        if not self.ask.details:
            return None
        placements = [
            {
                "request_id": self.ask.attempt_id(a.number),
                "prefill": a.placement.prefill.instance_id,
                "decode": a.placement.decode.instance_id,
                "split": a.placement.split,
            }
            for a in self._attempts
        ]
        return {"placements": [placements]}

    def _count_end(self, outcome: str) -> None:
        metrics, model = self._backends.metrics, self._model.name
        if self._answer.reasons:
            self._backends.reasoning[model] = None
        told, known = self._answer.prompt_ids, self.ask.tokens
        if told is not None and known is not None and told != known.tolist():
            metrics.read_differently.labels(model).inc()
        metrics.requests.labels(model, outcome).inc()
        metrics.tokens.labels(model).inc(self._answer.tokens)
        if not self._last_at:
            return
        metrics.e2e.labels(model).observe(self._last_at - self._arrived_at)
        metrics.prompt_tokens.labels(model).inc(self.ask.prompt_tokens)
        metrics.cached_tokens.labels(model).inc(self._answer.cached_tokens)
        if self._answer.tokens > 1 and self._first_at and self.ask.streamed:
            share_s = (self._last_at - self._first_at) / (self._answer.tokens - 1)
            metrics.tpot.labels(model).observe(share_s)


def patience_of(config: GatewayConfig, placement: scheduler_pb2.Placement) -> Patience:
    """How long the servers of a placement may be silent."""
    first_s = max(config.first_token_timeout_s, PREDICTED_TIMES * _predicted_s(placement))
    return Patience(first_s, config.next_token_timeout_s)


def _predicted_s(placement: scheduler_pb2.Placement) -> float:
    """From its placement to a request's first token."""
    return max(0, placement.predicted_ttft_us - placement.waited_us) / 1e6


__all__ = ["HANDOFFS", "Relay", "RelayBackends"]
