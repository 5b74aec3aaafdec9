"""Whether a request can be taken at all, and if not why and when to try again. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kvpool.core.errors import Reason
from kvpool.core.ids import KEY_BYTES
from scheduler.core.cluster import Cluster, Instance, State
from scheduler.core.commands import Refused
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import NO_CAPACITY, NO_HANDOFF, SLOW, TOO_LONG, Appraiser, Option, token_limit

#: Retry-After where nothing tells when it would help.
RETRY_DEFAULT_US = 1_000_000
PROMPT_TOKENS_MAX = 1 << 26
KEY_LISTS_MAX = 256


def refuse(request: PlaceRequested, reason: Reason, message: str, retry_after_us: int = 0) -> Refused:
    retry_after_ms = -(-retry_after_us // 1000)
    return Refused(request.request_id, request.gateway_id, reason, message, retry_after_ms)


def bad_request(request: PlaceRequested, policies: Sequence[str]) -> str:
    """What is wrong with a request as such; empty if nothing is."""
    if not request.request_id:
        return "request_id must not be empty"
    if not 1 <= request.prompt_tokens <= PROMPT_TOKENS_MAX:
        return f"prompt_tokens must be 1 to {PROMPT_TOKENS_MAX}"
    if not 1 <= request.max_tokens <= PROMPT_TOKENS_MAX:
        return f"max_tokens must be 1 to {PROMPT_TOKENS_MAX}"
    if request.policy and request.policy not in policies:
        return f"policy {request.policy!r} is not one of {', '.join(policies)}"
    if len(request.keys) > KEY_LISTS_MAX:
        return f"at most {KEY_LISTS_MAX} key lists"
    if any(len(batch.keys) % KEY_BYTES for batch in request.keys):
        return f"keys must be a whole number of {KEY_BYTES}-byte keys"
    return ""


def usable_instances(
    request: PlaceRequested, cluster: Cluster, config: SchedulerConfig
) -> tuple[list[Instance], Refused | None]:
    """Instances that may be placed on, sorted by id, or why there are none.

    Those the gateway has just seen failing are left out as long as others remain.
    """
    ids = cluster.by_model.get(request.model)
    if ids is None:
        if request.model in cluster.models_seen:
            message = f"all instances of model {request.model!r} are gone"
            return [], refuse(request, Reason.NO_INSTANCE, message, RETRY_DEFAULT_US)
        return [], refuse(request, Reason.UNKNOWN_MODEL, f"no instance serves model {request.model!r}")
    named = [cluster.instances[i] for i in ids]
    # Other bits under the same name: such an instance would find none of the keys, and refuse the request.
    alive = [i for i in named if not request.namespace_id or i.info.namespace_id == request.namespace_id]
    if not alive:
        message = f"no instance of model {request.model!r} has the namespace {request.namespace_id.hex()}"
        return [], refuse(request, Reason.NAMESPACE_MISMATCH, message, RETRY_DEFAULT_US)
    usable = [i for i in alive if i.state is State.ALIVE and not i.draining]
    if not usable:
        states = ", ".join(f"{i.id} {'draining' if i.draining else i.state.value}" for i in alive[:8])
        message = f"no instance of model {request.model!r} takes requests: {states}"
        return [], refuse(request, Reason.NO_INSTANCE, message, RETRY_DEFAULT_US)
    preferred = [i for i in usable if i.id not in request.exclude_instances]
    return preferred or usable, None


def too_long(request: PlaceRequested, instances: Sequence[Instance]) -> Refused | None:
    """A refusal if no instance could ever take the request."""
    tokens = request.prompt_tokens + request.max_tokens
    limit = max(token_limit(i) for i in instances)
    if tokens <= limit:
        return None
    message = f"{request.prompt_tokens} prompt and {request.max_tokens} new tokens, the model's limit here is {limit}"
    return refuse(request, Reason.CONTEXT_TOO_LONG, message)


def refusal(
    request: PlaceRequested, options: Sequence[Option], appraiser: Appraiser, config: SchedulerConfig
) -> Refused:
    """Why none of the options can be taken; the obstacle that comes closest to none is named."""
    assert not any(option.feasible for option in options)
    slow = [o for o in options if o.reason.startswith(SLOW)]
    if slow:
        nearest = min(slow, key=lambda o: (o.ttft_us, o.order))
        excess_us = nearest.ttft_us - request.ttft_slo_us if request.ttft_slo_us else 0
        wait_us = excess_us if excess_us > 0 else RETRY_DEFAULT_US
        return refuse(request, Reason.SLO_UNREACHABLE, nearest.reason, _clamp(wait_us, config))
    full = [o for o in options if o.reason.startswith(NO_CAPACITY)]
    if full:
        nearest = max(full, key=lambda o: (o.kv_tokens_left, o.order))
        wait_us = min(_next_end_us(o, appraiser) for o in full)
        return refuse(request, Reason.NO_CAPACITY, nearest.reason, _clamp(wait_us, config))
    for option in options:
        if option.reason.startswith(TOO_LONG):
            return refuse(request, Reason.CONTEXT_TOO_LONG, option.reason)
    assert all(option.reason.startswith(NO_HANDOFF) for option in options)
    message = options[0].reason if options else f"no instance of model {request.model!r} decodes"
    return refuse(request, Reason.NO_INSTANCE, message, RETRY_DEFAULT_US)


def _next_end_us(option: Option, appraiser: Appraiser) -> int:
    """Until the next request on the decode instance ends, if they end one after another at an even pace."""
    load = appraiser.load(option.decode)
    if not load.batch:
        return RETRY_DEFAULT_US
    return load.step_us * load.expected_tokens // load.batch


def _clamp(wait_us: int, config: SchedulerConfig) -> int:
    return min(max(wait_us, config.retry_after_us_min), config.retry_after_us_max)
