"""Whether a request can be taken at all, and if not why and when to try again. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpool.core.errors import Reason
from kvpool.core.ids import KEY_BYTES
from scheduler.core import objectives
from scheduler.core.cluster import Cluster, Instance, State
from scheduler.core.commands import Refused
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import NO_CAPACITY, NO_HANDOFF, SLOW, TOO_LONG, Appraiser, Option
from scheduler.core.promises import Promise, PromiseBook
from scheduler.core.waiting import TENANT_WEIGHT_MAX

#: Retry-After where nothing tells when it would help.
RETRY_DEFAULT_US = 1_000_000
PROMPT_TOKENS_MAX = 1 << 26
#: Options of each kind that are asked when they become feasible, for one that waits and for one that is sent away.
CHANCES_MAX, PRECISE_MAX = 2, 4
#: Times after which those who wait are worth another look.
ROUGHLY_US = (0, 100_000, 500_000, 2_000_000, 8_000_000, 30_000_000)
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
    if not 0 <= request.tenant_weight <= TENANT_WEIGHT_MAX:
        return f"tenant_weight must be 0 to {TENANT_WEIGHT_MAX:g}"
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
    limit = max(i.tokens_max for i in instances)
    if tokens <= limit:
        return None
    message = f"{request.prompt_tokens} prompt and {request.max_tokens} new tokens, the model's limit here is {limit}"
    return refuse(request, Reason.CONTEXT_TOO_LONG, message)


def deadline_us(request: PlaceRequested, arrived_us: int, option: Option, config: SchedulerConfig) -> int:
    """Until when a request may wait for a place: as long as its TTFT objective allows, or as long as it says."""
    limit_us = request.wait_us_max
    if request.ttft_slo_us:
        latest_us = max(request.ttft_slo_us - option.service_us, 0)
        return arrived_us + (latest_us if limit_us is None else min(latest_us, limit_us))
    return arrived_us + (config.wait_us_max if limit_us is None else limit_us)


@dataclass(frozen=True, slots=True)
class Chance:
    """The best that a request which can't be placed now may hope for.

    Fields:
        wait_us: from now until the option's instances have what it needs.
        servable: whether a request that waits so long is still served within its objectives.
        retry_us: from now until a request like this one would be taken in, were it to come then.
        begin_us: from now until its prefill could begin.
    """

    option: Option
    wait_us: int
    servable: bool
    retry_us: int
    begin_us: int = 0


def chance(
    options: Sequence[Option], appraiser: Appraiser, config: SchedulerConfig, promises: PromiseBook | None = None
) -> Chance | None:
    """The option that becomes feasible first, by the predictions that made it infeasible. None if none ever does.

    Work queued drains, decodes end as predicted, and nobody else comes but those who were told to.

    Args:
        promises: for somebody who is told to come back: times are to a millisecond, and behind what was promised to
            others. None: for somebody who waits; one of `ROUGHLY_US` will do.
    """
    best: Chance | None = None
    for option in _most_promising(options, CHANCES_MAX if promises is None else PRECISE_MAX):
        found = _chance_of(option, appraiser, config, promises)
        if found is None:
            continue
        if best is None or (not found.servable, found.retry_us, found.wait_us) < (
            not best.servable, best.retry_us, best.wait_us,
        ):  # fmt: skip
            best = found
    return best


def _most_promising(options: Sequence[Option], count: int) -> list[Option]:
    """A few that are cheapest, and a few with most room: one of these becomes feasible first, or nearly."""
    able = [o for o in options if not o.reason.startswith((TOO_LONG, NO_HANDOFF))]
    cheapest = sorted(able, key=lambda o: o.order)[:count]
    roomiest = sorted(able, key=lambda o: (-o.kv_tokens_left, *o.order))[:count]
    return list({id(o): o for o in (*cheapest, *roomiest)}.values())


def _chance_of(
    option: Option, appraiser: Appraiser, config: SchedulerConfig, promises: PromiseBook | None
) -> Chance | None:
    request, horizon_us, now_us = appraiser.request, config.retry_after_us_max, appraiser.now_us
    promised = promises.decodes_on(option.decode.id, now_us) if promises is not None else []

    def has_room(delay_us: int) -> bool:
        return _has_room(option, appraiser, delay_us, promised)

    if not has_room(horizon_us):
        # What nobody placed here ends some time, as does what waits before this one: nothing tells when.
        others = option.decode.kv_tokens_foreign + appraiser.kv_tokens_ahead(option.decode) + len(promised) > 0
        unknown = others and option.kv_tokens_left - sum(kv_tokens for _, _, kv_tokens in promised) < 0
        return Chance(option, RETRY_DEFAULT_US, True, RETRY_DEFAULT_US) if unknown else None
    if promises is None:
        busy_us = option.queue_us + appraiser.promised_us(option.queue_us)
        free_us, kept, last_us = _first_of(has_room, horizon_us), 1.0, 0
    else:
        # Behind the last who was told to come: until then who is told what changes, after it there is room for good.
        last_here_us = max((due_us - now_us for due_us, _, _ in promised), default=0)
        free_us = _first_time(has_room, horizon_us, max(last_here_us, 0))
        work_us, last_us = promises.ahead_of(request.model, now_us)
        busy_us = option.queue_us + work_us // max(appraiser.prefill_count(), 1)
        kept = 1.0 - config.retry_slack
    begin_us = max(busy_us, free_us)
    if request.ttft_slo_us:
        # What is left of the wait when it comes back counts; what it has waited so far would not.
        def in_time(delay_us: int, kept: float) -> bool:
            ttft_us = appraiser.corrected_us(option.prefill.id, max(begin_us - delay_us, 0), option.service_us)
            return ttft_us <= kept * request.ttft_slo_us

        if not in_time(begin_us, 1.0):
            return None
        retry_us = _first_time(lambda delay_us: in_time(delay_us, kept), begin_us)
        retry_us = max(retry_us, last_us - now_us)
        ttft_us = option.waited_us + appraiser.corrected_us(option.prefill.id, begin_us, option.service_us)
        return Chance(option, free_us, ttft_us <= request.ttft_slo_us, retry_us, begin_us)
    patience_us = config.wait_us_max if request.wait_us_max is None else request.wait_us_max
    retry_us = max(begin_us - int(kept * patience_us), free_us - patience_us, 0) if promised else free_us - patience_us
    return Chance(option, free_us, free_us + option.waited_us <= patience_us, max(retry_us, 0), begin_us)


def promise_of(chance: Chance, appraiser: Appraiser, retry_after_ms: int) -> Promise:
    """What a request that was told to come back is going to take then."""
    request, option, now_us = appraiser.request, chance.option, appraiser.now_us
    due_us = now_us + retry_after_ms * 1000
    first_token_us = max(now_us + chance.begin_us, due_us) + option.service_us
    return Promise(
        owner=(request.gateway_id, request.request_id),
        model=request.model,
        tenant=request.tenant,
        decode_id=option.decode.id,
        due_us=due_us,
        service_us=option.service_us,
        ends_us=first_token_us + option.handoff_us + option.step_us * appraiser.expected_tokens,
        kv_tokens=appraiser.kv_tokens_needed(option.decode),
        mark=mark_of(request),
    )


def mark_of(request: PlaceRequested) -> bytes:
    """What a request has in common with itself when it comes again under another id: its prompt's last key, and sizes.

    Keys are chained: one equal key is an equal prompt, but for a part of a block.
    """
    last = request.keys[0].keys[-KEY_BYTES:] if request.keys else b""
    return last + f"{request.prompt_tokens} {request.max_tokens}".encode()


def _has_room(option: Option, appraiser: Appraiser, delay_us: int, promised: Sequence[tuple[int, int, int]]) -> bool:
    """Whether KV and, where there is an objective, decode steps allow the option after a delay.

    Args:
        promised: who is to decode there by then, until when, and with how many KV tokens.
    """
    at_us, taken = appraiser.now_us + delay_us, 0
    for due_us, ends_us, kv_tokens in promised:
        taken += kv_tokens if due_us <= at_us < ends_us else 0
    if option.kv_tokens_left - taken + appraiser.kv_tokens_freed(option.decode, delay_us) < 0:
        return False
    if option.split:
        room = appraiser.prefill_room(option)
        if room < 0 and room + appraiser.kv_tokens_freed(option.prefill, delay_us) < 0:
            return False
    if objectives.broken(appraiser, option, delay_us) > appraiser.config.broken_max:
        return False
    objective_us = appraiser.request.tpot_slo_us
    if not objective_us:
        return True
    begin_us = appraiser.now_us + max(option.queue_us, delay_us) + option.service_us
    return objectives.peak_step_us(appraiser, option, begin_us) <= objective_us


def _first_of(holds: Callable[[int], bool], last_us: int) -> int:
    for delay_us in ROUGHLY_US:
        if delay_us < last_us and holds(delay_us):
            return delay_us
    return last_us


def _first_time(holds: Callable[[int], bool], last_us: int, first_us: int = 0) -> int:
    """The earliest delay from `first_us` on at which something holds that then goes on to, and does at `last_us`.

    To a millisecond.
    """
    if first_us >= last_us or holds(first_us):
        return first_us
    low_us, high_us = first_us, last_us
    while high_us - low_us > 1000:
        middle_us = (low_us + high_us) // 2
        if holds(middle_us):
            high_us = middle_us
        else:
            low_us = middle_us
    return high_us


def refusal(
    request: PlaceRequested, options: Sequence[Option], retry_us: int | None, config: SchedulerConfig
) -> Refused:
    """Why none of the options can be taken; the obstacle that comes closest to none is named.

    Args:
        retry_us: after which time it would be taken; None = as things are, never: no time to come back is given.
    """
    assert not any(option.feasible for option in options)
    wait_us = 0 if retry_us is None else _clamp(retry_us, config)
    slow = [o for o in options if o.reason.startswith(SLOW)]
    if slow:
        nearest = min(slow, key=lambda o: (o.announced_us, o.order))
        return refuse(request, Reason.SLO_UNREACHABLE, nearest.reason, wait_us)
    full = [o for o in options if o.reason.startswith(NO_CAPACITY)]
    if full:
        nearest = max(full, key=lambda o: (o.kv_tokens_left, o.order))
        return refuse(request, Reason.NO_CAPACITY, nearest.reason, wait_us)
    for option in options:
        if option.reason.startswith(TOO_LONG):
            return refuse(request, Reason.CONTEXT_TOO_LONG, option.reason)
    assert all(option.reason.startswith(NO_HANDOFF) for option in options)
    message = options[0].reason if options else f"no instance of model {request.model!r} decodes"
    return refuse(request, Reason.NO_INSTANCE, message, RETRY_DEFAULT_US)


def _clamp(wait_us: int, config: SchedulerConfig) -> int:
    return min(max(wait_us, config.retry_after_us_min), config.retry_after_us_max)
