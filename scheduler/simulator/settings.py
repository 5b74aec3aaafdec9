"""What is simulated. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpool.core.errors import BadArgument
from scheduler.core.config import SECOND_US, SchedulerConfig
from scheduler.core.policies import REFUSES_EARLY
from scheduler.simulator.faults import Fault
from scheduler.simulator.hardware import PROFILES, Hardware

NODES_MAX = 4096


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """One simulation but for its trace."""

    hardware: Hardware = PROFILES["a800x8-llama3-70b"]
    nodes: int = 16
    #: Instances that only prefill, and that only decode; the others do both. None = all do both.
    split: tuple[int, int] | None = None
    policy: str = "kvpool"
    seed: int = 0
    #: Requests come this much faster than in the trace.
    speed: float = 1.0
    ttft_slo_us: int = 30 * SECOND_US
    tbt_slo_us: int = SECOND_US // 5
    #: Whether the scheduler is told the limits, and so may refuse; None = if its policy refuses early.
    refuses: bool | None = None
    #: The decode instance judges its load once more when the prefill is over: a request that it turns away then was
    #: computed in vain.
    late_rejection: bool = False
    #: What clients ask for; one who gets more asks for what it gets.
    max_tokens: int = 2048
    #: Longest wait for a place that the gateway allows: 0.8 of its `place_timeout_s`, as in production.
    wait_us_max: int = 12 * SECOND_US
    #: How often a client comes back after a refusal, each time after its Retry-After.
    retries_max: int = 0
    #: Share of the Retry-After that they wait: below 1 are impatient ones.
    retry_patience: float = 1.0
    #: A request that has not ended by then ends as "deadline".
    request_timeout_us: int = 600 * SECOND_US
    #: Times of steps vary by up to this share either way.
    noise_ratio: float = 0.03
    #: One way, between any two processes.
    rpc_us: int = 500
    #: How long sources collect changes before they tell the directory.
    announce_us: int = 20_000
    #: A decode leg computes what has not come this long after the first token.
    handoff_wait_us: int = SECOND_US
    #: Jobs that wait on an engine; it refuses one more.
    waiting_max: int = 256
    #: Others can pull from an instance's HBM.
    hbm_readable: bool = False
    #: The scheduler may give instances other roles. What an engine computes a step stays as it was started.
    role_changeable: bool = False
    faults: tuple[Fault, ...] = ()
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    @property
    def instances(self) -> int:
        return self.nodes * self.hardware.instances_per_node

    @property
    def tells_slo(self) -> bool:
        return self.policy in REFUSES_EARLY if self.refuses is None else self.refuses

    @property
    def queues_outside(self) -> bool:
        """Whether requests that find no room wait at the gateway: where the scheduler has no line for them."""
        return self.policy not in self.scheduler.late_binding

    def check(self) -> None:
        """Raises: BadArgument with what can't be simulated."""
        self.hardware.check()
        if not 1 <= self.nodes <= NODES_MAX:
            raise BadArgument(f"nodes must be 1 to {NODES_MAX}, not {self.nodes}")
        if not 0 < self.speed < 1e6:
            raise BadArgument(f"speed must be above 0, not {self.speed:g}")
        for name in ("ttft_slo_us", "tbt_slo_us", "max_tokens", "wait_us_max", "request_timeout_us", "waiting_max"):
            if getattr(self, name) < 1:
                raise BadArgument(f"{name} must be at least 1")
        if not 0 <= self.noise_ratio < 1:
            raise BadArgument("noise_ratio must be 0 to below 1")
        if self.split is None:
            return
        prefills, decodes = self.split
        if min(prefills, decodes) < 0 or prefills + decodes > self.instances:
            raise BadArgument(
                f"a split of {prefills}:{decodes} does not fit {self.instances} instances",
                hint="raise --nodes; instances beyond the split do both",
            )
        if prefills == self.instances:
            raise BadArgument("with prefill instances only nothing decodes", hint="leave one for decoding")
