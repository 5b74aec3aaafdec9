"""The client side of a simulation: each request from its arrival to its one end. Pure.

As `scheduler.gateway.lifecycle` has it: a request whose instance is lost is placed again, with its prompt and what it
has got so far; after the first token nothing depends on the prefill instance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvpool.core.errors import Reason
from kvpool.core.ids import Fidelity
from scheduler.core.commands import Placed, Refused
from scheduler.core.events import (
    GatewayHeartbeat,
    KeyBatch,
    OutcomeReported,
    PlaceCancelled,
    PlaceRequested,
    RequestTimes,
)
from scheduler.simulator.batch import Record, longest_tenth_us
from scheduler.simulator.clock import EventLog, EventQueue
from scheduler.simulator.columns import TraceRequest
from scheduler.simulator.control import Control
from scheduler.simulator.engine import Engine
from scheduler.simulator.hosts import MODEL, Hosts, Seat
from scheduler.simulator.jobs import Job, Leg
from scheduler.simulator.live import GATEWAY_ID, GatewayLine, Live, request_times
from scheduler.simulator.metrics import RequestRecord
from scheduler.simulator.settings import SimulationConfig

ATTEMPTS_MAX = 4
#: Refusals of a request that was running already; each is followed by a wait and another try.
REFUSALS_RUNNING_MAX = 20
REFUSAL_WAIT_US_MIN, REFUSAL_WAIT_US_MAX = 50_000, 2_000_000
#: A host that can't be reached is given up after this time.
UNREACHABLE_US = 5_000_000


class Gateway:
    """All requests of a trace."""

    def __init__(
        self,
        config: SimulationConfig,
        requests: Sequence[TraceRequest],
        queue: EventQueue,
        log: EventLog,
        control: Control,
        hosts: Hosts,
    ) -> None:
        self.config, self.requests = config, requests
        self.records: list[RequestRecord] = []
        self.live: dict[str, Live] = {}
        self._queue, self._log, self._control, self._hosts = queue, log, control, hosts
        self._held: list[tuple[str, Callable[[], None]]] = []  # said by hosts that are cut off
        self._line = GatewayLine(control, queue, config.rpc_us)
        self._pack: dict[int, bytes] = {}

    @property
    def done(self) -> bool:
        return len(self.records) == len(self.requests)

    def start(self) -> None:
        self._line.connect()
        self._heartbeat()
        self._next_arrival(0)

    def _heartbeat(self) -> None:
        self._line.send(GatewayHeartbeat(self._line.stream, len(self.live)))
        self._queue.after(self.config.scheduler.heartbeat_interval_us, self._heartbeat)

    # ------------------------------------------------------------ arrival and placement

    def _next_arrival(self, number: int) -> None:
        if number < len(self.requests):
            trace = self.requests[number]
            # A moment for the members to introduce themselves.
            at_us = WARM_UP_US + int(trace.arrival_us / self.config.speed)
            self._queue.at(max(at_us, self._queue.now_us), self._arrive, number, trace)

    def _arrive(self, number: int, trace: TraceRequest) -> None:
        live = Live(number, f"r{number}", trace, self._queue.now_us)
        self.live[live.request_id] = live
        self._log.add("arrived", request=live.request_id, prompt=trace.prompt_tokens, output=trace.output_tokens)
        self._queue.after(self.config.request_timeout_us, self._deadline, live)
        self._ask(live)
        self._next_arrival(number + 1)

    def _ask(self, live: Live) -> None:
        if live.ended:
            return
        config, trace = self.config, live.trace
        live.placing = True
        full = trace.hash_ids[: trace.prompt_tokens // trace.block_tokens]
        keys = b"".join(map(self._hosts.keys.of, full))
        left = trace.output_tokens - live.tokens
        event = PlaceRequested(
            request_id=live.request_id,
            gateway_id=GATEWAY_ID,
            model=MODEL,
            keys=(KeyBatch(0, 0, keys),),
            prompt_tokens=trace.prompt_tokens + live.tokens,
            max_tokens=max(config.max_tokens - live.tokens, left),
            ttft_slo_us=config.ttft_slo_us if config.tells_slo and not live.tokens else 0,
            tpot_slo_us=config.tbt_slo_us if config.tells_slo and not live.tokens else 0,
            policy="",
            use_pool=True,
            sticky_key=trace.session,
            exclude_instances=live.excluded,
            fidelity_min=Fidelity.EXACT,
            namespace_id=self._hosts.namespace_id,
            priority=trace.priority,
            tenant=trace.tenant,
            wait_us_max=config.wait_us_max,
        )
        self._queue.after(config.rpc_us, self._control.deliver, event)

    def refused(self, refused: Refused) -> None:
        live = self.live.get(refused.request_id)
        if live is None or not live.placing:
            return
        wait_us = refused.retry_after_ms * 1000
        if live.attempt and live.refusals_running < REFUSALS_RUNNING_MAX:
            live.refusals_running += 1
            live.excluded = ()
            self._queue.after(min(max(wait_us, REFUSAL_WAIT_US_MIN), REFUSAL_WAIT_US_MAX), self._ask, live)
        elif self.config.queues_outside and refused.reason in NO_ROOM:
            self._queue.after(min(max(wait_us, REFUSAL_WAIT_US_MIN), REFUSAL_WAIT_US_MAX), self._ask, live)
        elif not live.attempt and live.refusals < self.config.retries_max and refused.reason in WORTH_RETRYING:
            live.refusals += 1
            self._queue.after(max(int(wait_us * self.config.retry_patience), REFUSAL_WAIT_US_MIN), self._ask, live)
        else:
            live.refusals += 1
            self._end(live, "error" if live.attempt else "refused", refused.reason.name.lower())

    def placed(self, placed: Placed) -> None:
        live = self.live.get(placed.request_id)
        if live is None or not live.placing:
            self._report(placed.request_id, self._queue.now_us, 0, "abort", {})
            return
        live.placing, live.got_first, live.split, live.legs, live.times = False, False, placed.split, {}, {}
        if live.predicted_ttft_us is None:
            live.predicted_ttft_us = placed.predicted_ttft_us
        seats = self._hosts.seats
        if not placed.split:
            job = self._job(live, Leg.WHOLE, placed)
            self._submit(live, seats[placed.decode.instance_id], placed.decode.epoch, job)
            return
        prefill, decode = self._job(live, Leg.PREFILL, placed), self._job(live, Leg.DECODE, placed)
        source = seats[placed.prefill.instance_id]
        self._hosts.handoffs.open(decode, source.host)
        self._submit(live, source, placed.prefill.epoch, prefill)
        self._submit(live, seats[placed.decode.instance_id], placed.decode.epoch, decode)

    def _job(self, live: Live, leg: Leg, placed: Placed) -> Job:
        trace = live.trace
        left = trace.output_tokens - live.tokens
        return Job(
            request_id=live.request_id,
            attempt=live.attempt,
            leg=leg,
            prompt_tokens=trace.prompt_tokens + live.tokens,
            block_ids=trace.hash_ids[: trace.prompt_tokens // trace.block_tokens],
            block_tokens=trace.block_tokens,
            output_tokens=left,
            max_tokens=max(self.config.max_tokens - live.tokens, left),
            use_pool=True,
            pull=placed.pull if leg is not Leg.DECODE else (),
            submitted_us=self._queue.now_us,
        )

    def _submit(self, live: Live, seat: Seat, epoch: int, job: Job) -> None:
        live.legs[job.leg] = (seat.engine, job)
        self._queue.after(self.config.rpc_us, self._arrived, live, seat, epoch, job)

    def _arrived(self, live: Live, seat: Seat, epoch: int, job: Job) -> None:
        """A job reaches its engine, or nobody."""
        if self._stale(live, job):
            self._hosts.released(seat.engine, job)
            return
        if seat.host in self._hosts.cut:
            self._held.append((seat.host, lambda: self._arrived(live, seat, epoch, job)))
            self._queue.after(UNREACHABLE_US, self._cut_off, live, seat.engine, job)
            return
        live.legs[job.leg] = (seat.engine, job)
        if seat.epoch != epoch or not seat.engine.submit(job):
            self._queue.after(self.config.rpc_us, self._lost, live, job, seat.instance_id)

    def _stale(self, live: Live, job: Job) -> bool:
        return live.ended or live.attempt != job.attempt

    # ------------------------------------------------------------ what engines say

    def first_token(self, engine: Engine, job: Job) -> None:
        self._say(engine, lambda: self._first(job, engine))

    def job_done(self, engine: Engine, job: Job, tokens: int, records: list[Record]) -> None:
        self._say(engine, lambda: self._done(job, tokens, records))

    def _say(self, engine: Engine, message: Callable[[], None]) -> None:
        """A message of an engine; of a host that is cut off it comes when it is not any more."""
        if engine.host in self._hosts.cut:
            self._held.append((engine.host, message))
        else:
            self._queue.after(self.config.rpc_us, message)

    def _first(self, job: Job, engine: Engine) -> None:
        live = self.live.get(job.request_id)
        if live is None or self._stale(live, job):
            return
        now_us = self._queue.now_us
        if self.config.late_rejection and job.leg is Leg.PREFILL and self._decode_is_full(live):
            self._report(live.request_id, live.arrival_us, 0, "abort", {})
            self._abort_legs(live)
            self._end(live, "refused", "decode_load")
            return
        live.got_first = True
        live.tokens += 1
        live.times[job.leg] = request_times(job)
        if live.first_token_us is None:
            live.first_token_us = now_us
            live.cached_tokens = max(job.prompt_tokens - job.computed_tokens, 0)
            live.pulled_tokens = job.pulled_blocks * job.block_tokens
        else:
            live.records.append((1, float(now_us - live.last_token_us), 0.0))
        live.last_token_us = now_us
        self._log.add("first-token", request=live.request_id, ttft_us=now_us - live.arrival_us)
        self._report(live.request_id, live.arrival_us, live.tokens, "", live.times, live.first_token_us)
        decode = live.legs.get(Leg.DECODE)
        if decode is not None and live.tokens < live.trace.output_tokens:
            made_us = now_us if job.first_token_us is None else job.first_token_us
            self._queue.after(self.config.rpc_us, decode[0].first_token_known, decode[1], made_us)
            self._hosts.handoffs.first_token(decode[1])

    def _decode_is_full(self, live: Live) -> bool:
        """Whether one more sequence makes the steps of its decode instance longer than the limit."""
        engine, job = live.legs.get(Leg.DECODE, (None, None))
        if engine is None or job is None:
            return False
        batch = engine.batch
        step_us = self.config.hardware.decode_step_us(len(batch) + 1, batch.kv_tokens + job.prompt_tokens)
        return step_us > self.config.tbt_slo_us

    def _done(self, job: Job, tokens: int, records: list[Record]) -> None:
        live = self.live.get(job.request_id)
        if live is None or self._stale(live, job):
            return
        live.legs.pop(job.leg, None)
        live.tokens += tokens
        live.records += records
        live.last_token_us = self._queue.now_us
        live.times[job.leg] = request_times(job)
        if live.tokens < live.trace.output_tokens:
            return
        self._abort_legs(live)
        self._report(live.request_id, live.arrival_us, live.tokens, "length", live.times, live.first_token_us)
        self._end(live, "done", "")

    # ------------------------------------------------------------ losses

    def engine_lost(self, engine: Engine) -> None:
        for live in list(self.live.values()):
            for job in [job for held, job in live.legs.values() if held is engine]:
                self._take_decoded(live, engine, job)
                self._queue.after(self.config.rpc_us, self._lost, live, job, engine.instance_id)

    def host_cut(self, host: str, cut: bool) -> None:
        if cut:
            for live in list(self.live.values()):
                for engine, job in list(live.legs.values()):
                    if engine.host == host:
                        self._queue.after(UNREACHABLE_US, self._cut_off, live, engine, job)
            return
        held, self._held = self._held, []
        for where, message in held:
            if where == host:
                self._queue.after(self.config.rpc_us, message)
            else:
                self._held.append((where, message))

    def _cut_off(self, live: Live, engine: Engine, job: Job) -> None:
        """A host has been out of reach for a while: what runs there is given up, also by the engine."""
        if engine.host in self._hosts.cut and live.legs.get(job.leg, (None, None))[1] is job:
            engine.abort(job)
            self._lost(live, job, engine.instance_id)

    def _lost(self, live: Live, job: Job, instance_id: str) -> None:
        """A leg will not end. Before the first token, or if it decodes, the request is placed again."""
        if self._stale(live, job) or live.legs.get(job.leg, (None, None))[1] is not job:
            return
        del live.legs[job.leg]
        if job.leg is Leg.PREFILL and live.got_first:
            return
        self._abort_legs(live)
        self._log.add("lost", request=live.request_id, leg=job.leg.value, instance=instance_id, tokens=live.tokens)
        self._report(live.request_id, live.arrival_us, live.tokens, "error", live.times, live.first_token_us)
        live.attempt += 1
        if live.attempt >= ATTEMPTS_MAX:
            self._end(live, "error", "lost too often")
            return
        if instance_id not in live.excluded:
            live.excluded = (*live.excluded, instance_id)
        self._ask(live)

    def _abort_legs(self, live: Live) -> None:
        legs, live.legs = live.legs, {}
        for leg, (engine, job) in legs.items():
            # What a prefill leg still publishes after the first token serves the next request.
            if leg is Leg.PREFILL and live.got_first:
                continue
            if engine.dead:
                self._hosts.released(engine, job)
            else:
                self._queue.after(self.config.rpc_us, engine.abort, job)

    def _take_decoded(self, live: Live, engine: Engine, job: Job) -> None:
        """Tokens that a crashed engine had sent."""
        tokens, records = engine.decoded(job)
        if not tokens or self._stale(live, job):
            return
        live.tokens += tokens
        live.records += records
        live.last_token_us = self._queue.now_us

    def _deadline(self, live: Live) -> None:
        if live.ended:
            return
        if live.placing:
            cancel = PlaceCancelled(live.request_id, GATEWAY_ID)
            self._queue.after(self.config.rpc_us, self._control.deliver, cancel)
        else:
            self._report(live.request_id, live.arrival_us, live.tokens, "error", live.times, live.first_token_us)
        live.got_first = False
        self._abort_legs(live)
        self._end(live, "deadline", "")

    # ------------------------------------------------------------ ends

    def _end(self, live: Live, end: str, why: str) -> None:
        assert not live.ended
        live.ended = True
        del self.live[live.request_id]
        ttft_us = None if live.first_token_us is None else live.first_token_us - live.arrival_us
        trace = live.trace
        record = RequestRecord(
            number=live.number,
            arrival_us=live.arrival_us - WARM_UP_US,
            ended_us=self._queue.now_us - WARM_UP_US,
            end=end,
            why=why,
            prompt_tokens=trace.prompt_tokens,
            output_tokens=trace.output_tokens,
            tokens=live.tokens,
            ttft_us=ttft_us,
            tbt_us=longest_tenth_us(live.records),
            cached_tokens=live.cached_tokens,
            pulled_tokens=live.pulled_tokens,
            split=live.split,
            attempts=live.attempt + 1,
            refusals=live.refusals,
            predicted_ttft_us=live.predicted_ttft_us,
        )
        self.records.append(record)
        self._log.add("ended", request=live.request_id, end=end, why=why, tokens=live.tokens, tbt_us=record.tbt_us)

    def _report(
        self,
        request_id: str,
        arrival_us: int,
        tokens: int,
        finish: str,
        times: dict[Leg, RequestTimes],
        first_token_us: int | None = None,
    ) -> None:
        """To the scheduler; with no `finish` it is the first token's time."""
        prefill = times.get(Leg.PREFILL) or times.get(Leg.WHOLE) or RequestTimes()
        self._line.send(
            OutcomeReported(
                stream=self._line.stream,
                request_id=request_id,
                first_token=not finish,
                ttft_us=0 if first_token_us is None else first_token_us - arrival_us,
                duration_us=self._queue.now_us - arrival_us,
                tokens=tokens,
                finish_reason=finish,
                error="lost" if finish == "error" else "",
                prefill=prefill,
                decode=times.get(Leg.DECODE) or prefill,
            )
        )


#: Between the members' introduction and the first arrival.
WARM_UP_US = 1_000_000
#: What a front end without late binding waits out.
NO_ROOM = (Reason.NO_CAPACITY, Reason.OVERLOADED)
WORTH_RETRYING = (Reason.SLO_UNREACHABLE, Reason.NO_CAPACITY, Reason.OVERLOADED, Reason.NO_INSTANCE, Reason.DEADLINE)
