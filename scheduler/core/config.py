"""What the scheduler core may hold and how long it waits. Plain data; each bound says what happens at it."""

from __future__ import annotations

from dataclasses import dataclass

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
    report_interval_us: int = SECOND_US // 2
    heartbeat_interval_us: int = SECOND_US

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
    harm_weight: float = 0.5
    #: Tokens a request is expected to generate, as a share of max_tokens, before any has ended.
    output_share: float = 0.5
    #: Longest match : own match above which Mooncake's Algorithm 1 pulls.
    mooncake_threshold: float = 1.5
    retry_after_us_min: int = SECOND_US // 10
    retry_after_us_max: int = 30 * SECOND_US
    #: A link that failed is left out of plans this long, doubled with each failure in a row.
    link_down_us_min: int = 2 * SECOND_US
    link_down_us_max: int = 32 * SECOND_US
