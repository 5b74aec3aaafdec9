"""Settings of a gateway; each bound says what happens at it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from kvpool.channels.tls import TlsConfig
from scheduler.gateway.lifecycle import LifecycleLimits


@dataclass(frozen=True)
class GatewayConfig:
    """Settings of one gateway process."""

    scheduler: str = "127.0.0.1:7700"
    #: host:port of the HTTP API; port 0 picks a free one.
    listen: str = "127.0.0.1:8000"
    gateway_id: str = field(default_factory=lambda: f"gateway-{uuid.uuid4().hex[:8]}")
    #: Presented to the scheduler and the engines.
    credential: str = ""
    #: With which the scheduler and the engines are called; None = without TLS.
    tls: TlsConfig | None = None
    #: File of lines `name:secret`; clients present a secret as bearer token. Empty = no credential is asked for.
    api_keys: str = ""
    #: Placement policy of requests that name none; empty = the scheduler's own.
    policy: str = ""
    #: Larger bodies get 413.
    body_bytes_max: int = 8 << 20
    #: Prompts of one completions call; more get 400.
    prompts_max: int = 64
    #: Requests under way; further ones get 429.
    active_requests_max: int = 4096
    #: Tokens that wait for a client that does not read; beyond it the request is aborted.
    unread_tokens_max: int = 8192
    #: A request that takes longer gets 504, at every stage.
    request_timeout_s: float = 600.0
    #: How long the scheduler may be away before a request that needs a place gets 503.
    place_timeout_s: float = 15.0
    lifecycle: LifecycleLimits = field(default_factory=LifecycleLimits)
    #: Latency objectives that each placement asks for; 0 = none.
    ttft_slo_ms: int = 0
    tpot_slo_ms: int = 0
    #: How long published blocks of a split request stay held for its decode instance.
    handoff_ttl_ms: int = 60_000
    #: Answer length of a chat request that names none; 0 = what the context has left.
    chat_tokens_default: int = 0
    models_refresh_s: float = 2.0
    #: Outcomes that wait for the scheduler's return; beyond it the oldest are dropped and counted.
    outcomes_max: int = 10_000
    #: Workers connected at a time; a placement on a further one counts as a lost instance.
    links_max: int = 1024
    #: Commands that wait for one worker; beyond it the worker counts as lost.
    link_commands_max: int = 4096
    link_idle_s: float = 60.0
    #: How a prompt's KV gets from one OpenAI server to another: "pool" (kvpool's connector) or "nixl" (vLLM's own).
    handoff: str = "pool"
    #: Answer tokens that a placement on an OpenAI server counts at most: such a server takes its pages as they are
    #: needed, so what is likely counts there, not what is possible.
    relay_tokens_max: int = 1024
    #: An OpenAI server that has sent nothing for so long, of a stream or of a prefill, is lost: before its first token
    #: (or for four times the predicted TTFT, if that is longer), and after it.
    first_token_timeout_s: float = 120.0
    next_token_timeout_s: float = 120.0
    #: Presented to the OpenAI servers.
    engine_api_key: str = ""
    #: After SIGTERM: how long running requests may go on before they are aborted.
    drain_timeout_s: float = 30.0
