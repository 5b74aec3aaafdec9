"""A request on its way through a simulation, and the gateway's life line. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.core.events import Event, GatewayClosed, GatewayOpened, RequestTimes
from scheduler.simulator.batch import Record
from scheduler.simulator.columns import TraceRequest
from scheduler.simulator.engine import Engine
from scheduler.simulator.jobs import Job, Leg
from scheduler.simulator.lines import LifeLine

GATEWAY_ID = "gateway"


@dataclass(slots=True, eq=False)
class Live:
    """One request on its way."""

    number: int
    request_id: str
    trace: TraceRequest
    arrival_us: int
    attempt: int = 0
    placing: bool = True
    refusals: int = 0
    refusals_running: int = 0
    excluded: tuple[str, ...] = ()
    legs: dict[Leg, tuple[Engine, Job]] = field(default_factory=dict)
    tokens: int = 0
    records: list[Record] = field(default_factory=list)
    first_token_us: int | None = None
    last_token_us: int = 0
    got_first: bool = False  # in this attempt
    split: bool = False
    cached_tokens: int = 0
    pulled_tokens: int = 0
    predicted_ttft_us: int | None = None
    times: dict[Leg, RequestTimes] = field(default_factory=dict)
    ended: bool = False


class GatewayLine(LifeLine):
    def introduce(self) -> None:
        self.send(GatewayOpened(self.stream, GATEWAY_ID))

    def farewell(self) -> Event:
        return GatewayClosed(self.stream)


def request_times(job: Job) -> RequestTimes:
    """What an engine says of a job's times."""
    return RequestTimes(
        queue_us=max(job.admitted_us - job.submitted_us, 0),
        pull_us=max(job.ready_us - job.admitted_us, 0),
        prefill_us=max(job.prefilled_us - job.ready_us, 0),
        cached_tokens_hbm=job.own_blocks * job.block_tokens,
        cached_tokens_pool=job.pulled_blocks * job.block_tokens,
        bytes_pulled=job.bytes_pulled,
        computed_tokens=job.computed_tokens,
        pull_failures=job.pull_failures,
    )
