"""What the scheduler core may hold and how long it waits. Plain data; each bound says what happens at it."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.core.policy_parameters import PolicyParameters

SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Settings of one scheduler. A replay needs the same ones, so the journal carries them."""

    scheduler_id: str = "scheduler"
    #: Policy of requests that name none.
    policy: str = "kvpool"

    #: Without a report or heartbeat for this long: no new placements, blocks are kept.
    suspect_us: int = 3 * SECOND_US
    #: Without one for this long: its stream is closed and what it held is forgotten.
    gone_us: int = 15 * SECOND_US
    #: While other schedulers can't be heard, members that only they hear are kept this long, as suspect.
    log_down_us_max: int = 120 * SECOND_US
    report_interval_us: int = SECOND_US // 2
    heartbeat_interval_us: int = SECOND_US
    #: Whether plans are carried out by changing roles, of instances that say that theirs may be changed.
    execute_roles: bool = True

    #: One instance more is turned away: its stream is closed.
    instances_max: int = 1024
    #: One source more is turned away: its stream is closed.
    sources_max: int = 4096
    #: One gateway more is turned away: its stream is closed.
    gateways_max: int = 256
    #: One placement more is refused as OVERLOADED.
    placements_max: int = 65_536
    #: Above it the entry placed longest ago is forgotten; `explain` then says NOT_FOUND.
    ledger_entries_max: int = 10_000
    #: Candidates kept in a ledger entry, best first; the others are counted only.
    ledger_candidates_max: int = 32
    #: Above it the link measured longest ago is forgotten and predicted like its class again.
    links_max: int = 65_536
    #: Above it the key used longest ago is forgotten and assigned anew.
    sticky_keys_max: int = 65_536
    #: Above it the name seen longest ago is forgotten: requests for it are UNKNOWN_MODEL instead of NO_INSTANCE.
    models_seen_max: int = 1024
    #: Readable sources looked at for pulling in one placement, those with the longest coverage first.
    pull_sources_max: int = 8

    #: A placement ends by itself after `ttl_factor` times its predicted duration, within these limits.
    placement_ttl_us_min: int = 120 * SECOND_US
    placement_ttl_us_max: int = 3600 * SECOND_US
    ttl_factor: int = 10
    #: A placement this old when a report is made is taken to be counted in the report's free KV tokens.
    settle_us: int = SECOND_US
    #: Weight of a microsecond by which somebody else's decode is held up, against one of this request's own.
    harm_weight: float = 0.2
    #: Tokens a request is expected to generate, as a share of max_tokens, before any has ended.
    output_share: float = 0.5
    #: Longest match : own match above which Mooncake's Algorithm 1 pulls.
    mooncake_threshold: float = 1.5
    #: Of the other baselines.
    baselines: PolicyParameters = field(default_factory=PolicyParameters)

    #: Policies under which a request is bound to an instance late; under others it is placed or refused at once.
    late_binding: tuple[str, ...] = ("kvpool",)
    #: An instance is given a request when its outstanding prefill work is below the largest of this, ...
    horizon_us_min: int = 2 * SECOND_US
    #: ... this many times the request's own, ...
    horizon_prefills: float = 2.0
    #: ... and this share of its TTFT objective. Above it the request waits for a place in the scheduler.
    horizon_slo_share: float = 0.33
    #: Longest wait of a request that has no TTFT objective. Then it is placed behind whatever there is, or refused.
    wait_us_max: int = 30 * SECOND_US
    #: Those that fit may go past one that waits for KV tokens for this long; then what gets free is kept for it.
    reserve_after_us: int = 2 * SECOND_US
    #: Requests that wait at a time; one more is refused as OVERLOADED, or the last in the order if it goes before that.
    waiting_max: int = 4096
    #: Waiting requests looked at for one event at most; the others have their turn a millisecond later.
    waiting_scan_max: int = 8
    #: Virtual service by which one step of priority goes ahead, for each instance of the model.
    priority_step_us: int = 10 * SECOND_US
    #: Tenants with an account in a model's line; beyond it the one that was charged longest ago is forgotten.
    tenants_max: int = 4096
    #: Prompts under way that others may wait for; beyond it no more are noted.
    pending_max: int = 4096
    #: A TPOT objective is for the mean of this share of a request's intervals, the longest: a tenth, as in FAST'25.
    tpot_tail: float = 0.1
    #: Share of what that leaves an answer of median length for being held up that is given away.
    stall_margin: float = 1.0
    #: What an objective that is expected to be broken costs, TTFT in microseconds: a request served too late is lost.
    broken_us: int = 80 * SECOND_US
    #: A request that is expected to break more than so many waits or is refused: nothing is gained by serving it.
    broken_max: float = 1.0
    #: Price of the first microsecond of a TTFT that has an objective; it grows to 1 at the objective.
    slack_price: float = 1.0
    #: Weight of a microsecond by which requests that are expected to come meanwhile are held up.
    delay_weight: float = 1.0

    #: Requests that were told when to come back: others are told later times. Beyond it the oldest is forgotten.
    promises_max: int = 4096
    #: Share of a TTFT objective, and of the longest wait, that a time to come back leaves for what can't be predicted.
    retry_slack: float = 0.2
    retry_after_us_min: int = SECOND_US // 10
    retry_after_us_max: int = 600 * SECOND_US
    #: A link that failed is left out of plans this long, doubled with each failure in a row.
    link_down_us_min: int = 2 * SECOND_US
    link_down_us_max: int = 32 * SECOND_US
    #: A link that has become slow is tried again after this time, doubled each time that it is slow still.
    link_trust_us_min: int = 5 * SECOND_US
    link_trust_us_max: int = 60 * SECOND_US
