"""One answer being made: carries out what its lifecycle decides, and hands its text to whoever reads it.

The only place where the lifecycle meets scheduler, workers, clock and text. Everything but waiting for the scheduler
and for the reader happens in the callback of the event that caused it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import KvpoolError, Reason, Unavailable
from kvpool.v1 import engine_pb2, scheduler_pb2
from scheduler.gateway import events as ev
from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.engines import EngineLink, EngineLinks
from scheduler.gateway.errors import from_failure
from scheduler.gateway.events import Finish, Leg
from scheduler.gateway.lifecycle import Lifecycle
from scheduler.gateway.metrics import Metrics
from scheduler.gateway.placement import SchedulerClient, refusal_or_error
from scheduler.gateway.submission import GenerationSpec, place_request, submission
from scheduler.gateway.text import TextStream

log = logging.getLogger(__name__)

_FINISH = {
    engine_pb2.FINISH_REASON_STOP: Finish.STOP,
    engine_pb2.FINISH_REASON_LENGTH: Finish.LENGTH,
    engine_pb2.FINISH_REASON_ABORT: Finish.ABORT,
    engine_pb2.FINISH_REASON_ERROR: Finish.ERROR,
    engine_pb2.FINISH_REASON_HANDED_OFF: Finish.HANDED_OFF,
}

_REASONS: dict[int, Reason] = {int(reason): reason for reason in Reason}


@dataclass
class Piece:
    """The next part of an answer. `finish` is set in the last one: "stop" or "length", or "abort"."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    finish: str = ""


@dataclass(frozen=True)
class Backends:
    """What a generation works with."""

    config: GatewayConfig
    scheduler: SchedulerClient
    links: EngineLinks
    metrics: Metrics
    #: Placements under way; they outlive a request that was cancelled meanwhile.
    tasks: dict[asyncio.Task[None], None] = field(default_factory=dict)


@dataclass
class _Attempt:
    """What is known of one attempt."""

    begun_at: float
    root_key: bytes = b""
    placement: scheduler_pb2.Placement | None = None
    links: dict[Leg, EngineLink] = field(default_factory=dict)
    times: dict[Leg, engine_pb2.RequestTimes] = field(default_factory=dict)
    tokens: int = 0
    first_at: float = 0.0


class _LegRoute:
    """Turns a worker's events for one leg into lifecycle events."""

    def __init__(self, generation: Generation, attempt: int, leg: Leg) -> None:
        self._generation = generation
        self._attempt = attempt
        self._leg = leg

    def on_event(self, event: engine_pb2.RequestEvent) -> None:
        if event.HasField("times"):
            self._generation.note_times(self._attempt, self._leg, event.times)
        prefill = self._leg is Leg.PREFILL
        tokens, logprobs, gaps = tuple(event.token_ids), tuple(event.logprobs), tuple(event.top2_gaps)
        finish = _FINISH.get(event.finish_reason)
        if tokens and prefill:
            self._generation.feed(ev.PrefillTokens(self._attempt, tokens, logprobs, gaps))
        elif tokens:
            self._generation.feed(ev.DecodeTokens(self._attempt, tokens, logprobs, gaps, finish is not None))
        if finish is not None:
            ended = ev.PrefillEnded if prefill else ev.DecodeEnded
            self._generation.feed(ended(self._attempt, finish, event.error))

    def on_lost(self, message: str) -> None:
        lost = ev.PrefillLost if self._leg is Leg.PREFILL else ev.DecodeLost
        self._generation.feed(lost(self._attempt, message))


class Generation:
    """Runs one request. `pieces()` is read once; `cancel()` may come at any time."""

    def __init__(self, spec: GenerationSpec, backends: Backends, arrived_at: float) -> None:
        self.spec = spec
        self.tokens = 0
        self._backends = backends
        self._clock = asyncio.get_running_loop().time
        self._machine = Lifecycle(spec.max_tokens, spec.stop_tokens, backends.config.lifecycle)
        self._text = TextStream(spec.model.tokenizer.decode, spec.stop)
        self._attempts: list[_Attempt] = [_Attempt(arrived_at)]
        self._events: deque[ev.Event] = deque()
        self._feeding = False
        self._unread = Piece()
        self._wake = asyncio.Event()
        self._failure: ev.Failure | None = None
        self._arrived_at = arrived_at
        self._last_token_at = 0.0
        self._first_token_at = 0.0

    # ------------------------------------------------------------ for the reader

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer as it comes, the last piece with `finish`.

        Raises: ApiError if it ends without one; what came before it is valid.
        """
        deadline = self._arrived_at + self._backends.config.request_timeout_s
        timer = asyncio.get_running_loop().call_at(deadline, self.feed, ev.DeadlinePassed())
        try:
            if not self._machine.done:
                self._execute_all(self._machine.start())
            while True:
                await self._wake.wait()
                self._wake.clear()
                # Asked before the reader has its turn: what comes while it is busy is one more piece.
                over = self._machine.done
                piece, self._unread = self._unread, Piece()
                if self._failure is None or piece.token_ids:
                    yield piece
                if over:
                    break
            if self._failure is not None:
                raise from_failure(self._failure)
        finally:
            timer.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Ends the request at every worker at once; without effect when it is over."""
        self.feed(ev.Cancelled())

    def stop(self) -> None:
        """As `cancel`, and its reader is told that the gateway stops."""
        self.feed(ev.Broken("The gateway is stopping.", ev.FailureKind.STOPPING))

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed, as the worker that made the first token says."""
        for attempt in self._attempts:
            if attempt.first_at:
                times = attempt.times.get(Leg.PREFILL) or attempt.times.get(Leg.DECODE)
                if times is not None:
                    return min(times.cached_tokens_hbm + times.cached_tokens_pool, len(self.spec.prompt))
                break
        return 0

    def describe(self) -> list[dict[str, object]]:
        """Where it went, attempt by attempt."""
        return [
            {
                "request_id": self.spec.attempt_id(i),
                "prefill": a.placement.prefill.instance_id,
                "decode": a.placement.decode.instance_id,
                "split": a.placement.split,
            }
            for i, a in enumerate(self._attempts)
            if a.placement is not None
        ]

    # ------------------------------------------------------------ events

    def feed(self, event: ev.Event) -> None:
        """Lets the lifecycle decide, and does it. Events that come up meanwhile wait their turn. Raises nothing."""
        self._events.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events:
                self._execute_all(self._machine.handle(self._events.popleft()))
        except Exception:
            log.exception("%s: the gateway failed on this request", self.spec.request_id)
            self._events.clear()
            self._end_broken()
        finally:
            self._feeding = False

    def _end_broken(self) -> None:
        """After a bug of ours: frees what the request holds as far as that goes, and lets its reader know."""
        failure = ev.Failure(ev.FailureKind.GATEWAY, "The gateway failed on this request.")
        for command in self._machine.handle(ev.Broken(failure.message)):
            try:
                self._execute_all([command])
            except Exception:
                log.exception("%s: %s failed too", self.spec.request_id, type(command).__name__)
        if self._failure is None and not self._unread.finish:
            self._failure = failure
        self._wake.set()

    def note_times(self, attempt: int, leg: Leg, times: engine_pb2.RequestTimes) -> None:
        self._attempts[attempt].times[leg] = times

    # ------------------------------------------------------------ commands

    def _execute_all(self, commands: list[ev.Command]) -> None:
        for command in commands:
            match command:
                case ev.Emit():
                    self._emit(command)
                case ev.Place():
                    self._start_placing(command)
                case ev.Submit():
                    self._submit(command)
                case ev.ForwardFirstToken(attempt, token):
                    # No link: the loss of that leg is among the events that wait.
                    if link := self._attempts[attempt].links.get(Leg.DECODE):
                        link.forward_first_token(self.spec.attempt_id(attempt), token)
                case ev.Abort(attempt, leg):
                    if link := self._attempts[attempt].links.get(leg):
                        link.abort(self.spec.attempt_id(attempt))
                case ev.ReportFirst(attempt):
                    self._report(attempt, None, "")
                case ev.ReportEnd(attempt, finish, error):
                    self._report(attempt, finish, error)
                case ev.End(finish, failure):
                    self._end(finish, failure)

    def _start_placing(self, command: ev.Place) -> None:
        if command.attempt == len(self._attempts):
            self._attempts.append(_Attempt(self._clock()))
            self._backends.metrics.replacements.labels("lost" if command.exclude else "failed").inc()
        task = asyncio.create_task(self._place(command))
        self._backends.tasks[task] = None
        task.add_done_callback(lambda t: self._backends.tasks.pop(t, None))

    async def _place(self, command: ev.Place) -> None:
        config, attempt = self._backends.config, self._attempts[command.attempt]
        if command.delay_ms:
            await asyncio.sleep(command.delay_ms / 1000)
        if self._machine.done:
            return
        try:
            attempt.root_key = self.spec.model.root_key(self.spec.salt)
            request = place_request(
                self.spec, config, command, self._tokens_so_far(), attempt.root_key, self._machine.tokens_left
            )
            reply = await self._backends.scheduler.place(request, config.place_timeout_s)
        except Unavailable as error:
            self.feed(ev.PlaceFailed(command.attempt, str(error)))
            return
        except KvpoolError as error:
            if type(error) is KvpoolError and error.reason is KvpoolError.reason:
                # Not an answer: it failed on this request, which is not the client's fault.
                self.feed(ev.PlaceFailed(command.attempt, str(error)))
                return
            reply = scheduler_pb2.PlaceReply(refusal=refusal_or_error(error))
        except Exception as error:
            # Nobody awaits this task: without a word the request would wait until its deadline.
            log.exception("%s: placing failed", self.spec.request_id)
            self.feed(ev.PlaceFailed(command.attempt, f"the gateway failed: {type(error).__name__}"))
            return
        if reply.HasField("placement"):
            placement = reply.placement
            attempt.placement = placement
            self._backends.metrics.placements.labels("split" if placement.split else "co-located").inc()
            self.feed(
                ev.Placed(command.attempt, placement.prefill.instance_id, placement.decode.instance_id, placement.split)
            )
            return
        refusal = reply.refusal
        reason = _REASONS.get(refusal.reason, Reason.OVERLOADED)
        self._backends.metrics.refusals.labels(reason.name.lower()).inc()
        self.feed(ev.Refused(command.attempt, reason, refusal.message, refusal.retry_after_ms))

    def _submit(self, command: ev.Submit) -> None:
        attempt = self._attempts[command.attempt]
        assert attempt.placement is not None
        target = attempt.placement.prefill if command.leg is Leg.PREFILL else attempt.placement.decode
        route = _LegRoute(self, command.attempt, command.leg)
        link = self._backends.links.link(target.address, target.epoch)
        if link is None:
            route.on_lost("the gateway is connected to too many workers")
            return
        attempt.links[command.leg] = link
        link.submit(
            submission(
                self.spec,
                self._backends.config,
                command,
                attempt.placement,
                self._tokens_so_far(),
                attempt.root_key,
                self._arrived_at + self._backends.config.request_timeout_s - self._clock(),
            ),
            route,
        )

    def _tokens_so_far(self) -> NDArray[np.uint32]:
        if not self._machine.emitted:
            return self.spec.prompt
        return np.concatenate([self.spec.prompt, np.asarray(self._machine.emitted, dtype=np.uint32)])

    def _emit(self, command: ev.Emit) -> None:
        now, unread, spec = self._clock(), self._unread, self.spec
        attempt = self._attempts[self._machine.attempt]
        attempt.first_at = attempt.first_at or now
        metrics, model = self._backends.metrics, spec.model.name
        if self._first_token_at:
            metrics.itl.labels(model).observe((now - self._last_token_at) / len(command.tokens))
        else:
            self._first_token_at = now
            metrics.ttft.labels(model).observe(now - self._arrived_at)
        self._last_token_at = now
        count = 0
        for token in command.tokens:
            count += 1
            # A stop token ends the answer and is no part of its text.
            if token not in self.spec.stop_tokens:
                unread.text += self._text.push(token)
            if self._text.stopped:
                self.feed(ev.StopMatched())
                break
        unread.token_ids += command.tokens[:count]
        unread.logprobs += command.logprobs[:count]
        unread.gaps += command.gaps[:count]
        attempt.tokens += count
        self.tokens += count
        metrics.tokens.labels(model).inc(count)
        if len(unread.token_ids) > self._backends.config.unread_tokens_max:
            log.info("%s: the client does not read", spec.request_id)
            self.feed(ev.Cancelled())
        self._wake.set()

    def _report(self, number: int, finish: Finish | None, error: str) -> None:
        """Tells the scheduler how an attempt went: its first token (`finish` None), or its end."""
        now, attempt = self._clock(), self._attempts[number]
        outcome = scheduler_pb2.Outcome(
            request_id=self.spec.attempt_id(number),
            ttft_us=int((attempt.first_at - attempt.begun_at) * 1e6) if attempt.first_at else 0,
            duration_us=int((now - attempt.begun_at) * 1e6),
            tokens=attempt.tokens,
            finish_reason=finish.value if finish else "",
            error=error,
            first_token=finish is None,
        )
        # A worker that did both has one set of times, which tells of both.
        both = attempt.times.get(Leg.DECODE)
        prefill = attempt.times.get(Leg.PREFILL, both)
        if prefill is not None:
            outcome.prefill.CopyFrom(prefill)
        if both is not None:
            outcome.decode.CopyFrom(both)
        self._backends.scheduler.report(outcome)

    def _end(self, finish: Finish, failure: ev.Failure | None) -> None:
        if not self._text.stopped and finish in (Finish.STOP, Finish.LENGTH):
            self._unread.text += self._text.flush()
        self._failure = failure
        if failure is None:
            self._unread.finish = Finish.STOP.value if self._text.stopped else finish.value
        for number, attempt in enumerate(self._attempts):
            for link in attempt.links.values():
                link.release(self.spec.attempt_id(number))
        self._count_end(failure)
        self._wake.set()

    def _count_end(self, failure: ev.Failure | None) -> None:
        metrics, model = self._backends.metrics, self.spec.model.name
        outcome = failure.kind.value if failure else self._unread.finish
        metrics.requests.labels(model, outcome).inc()
        if failure is not None or not self._first_token_at:
            return
        metrics.e2e.labels(model).observe(self._last_token_at - self._arrived_at)
        metrics.prompt_tokens.labels(model).inc(len(self.spec.prompt))
        metrics.cached_tokens.labels(model).inc(self.cached_tokens)
        share = self._exposed_share()
        if share is not None:
            metrics.exposed.labels(model).observe(share)
        if self.tokens > 1:
            metrics.tpot.labels(model).observe((self._last_token_at - self._first_token_at) / (self.tokens - 1))

    def _exposed_share(self) -> float | None:
        """Of the time that moving this request's KV from prefill to decode took, the share that decode waited for."""
        times = self._attempts[-1].times
        if Leg.PREFILL not in times or Leg.DECODE not in times:
            return None
        whole_us = times[Leg.PREFILL].publish_us + times[Leg.DECODE].read_us
        return min(1.0, times[Leg.DECODE].exposed_us / whole_us) if whole_us else None
