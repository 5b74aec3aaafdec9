"""From a request to its place: weighed, then placed, put off or refused. Pure; `looking` weighs those who wait again.

A request ends in one of two ways, exactly once: placed, or refused with a reason. Between, it may wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvpool.core.errors import Reason
from kvpool.core.ids import KEY_BYTES
from scheduler.core import admission, objectives
from scheduler.core.arrivals import ArrivalRate
from scheduler.core.cluster import Instance
from scheduler.core.commands import Command, Placed, Refused, Target
from scheduler.core.events import PlaceCancelled, PlaceRequested
from scheduler.core.ledger import Candidate, LedgerEntry
from scheduler.core.options import Appraiser, Option, Standing
from scheduler.core.outputs import OutputLengths
from scheduler.core.pending import PendingPrompt
from scheduler.core.placements import Owner, Placement
from scheduler.core.prefix import Prefix
from scheduler.core.waiting import Order, Plan, Waiting, charged_us

if TYPE_CHECKING:
    from scheduler.core.core import SchedulerCore

LOOK_AGAIN_US = 1_000  # nothing is looked at again before: bounded work in bounded time
#: What was weighed in vain is not weighed again before, and the later the longer it has waited: news come as events.
IN_VAIN_US, IN_VAIN_SHARE = 10_000, 16


@dataclass(slots=True)
class Request:
    """A request that is being weighed, and where it stands in the order."""

    event: PlaceRequested
    start_us: int  # virtual
    order: Order
    arrived_us: int
    final: bool = False  # it can't wait any longer
    behind_us: int = 0  # virtual: by how much it is put off for what its tenant was promised

    @property
    def owner(self) -> Owner:
        return self.event.gateway_id, self.event.request_id


@dataclass(slots=True)
class Verdict:
    """One of `option` (placed now), `plan` (waits) and `refused` is set."""

    options: list[Option] = field(default_factory=list)  # what was looked at, best first
    appraiser: Appraiser | None = None
    option: Option | None = None
    plan: Plan | None = None
    look_again_us: int = 0  # where it waits
    deadline_us: int = 0
    refused: Refused | None = None
    chance: admission.Chance | None = None  # of one that is refused
    request: Request | None = None


# ---------------------------------------------------------------- events


def place(core: SchedulerCore, event: PlaceRequested, commands: list[Command]) -> None:
    owner = (event.gateway_id, event.request_id)
    wrong = admission.bad_request(event, tuple(core.policies))
    if wrong:
        core.room.remove(owner)
        _refused(
            core, event, Verdict(refused=admission.refuse(event, Reason.BAD_ARGUMENT, wrong)), core.now_us, commands
        )
        return
    # A request placed again has lost its first placement, whatever comes of the second.
    core.end_placement(owner, "replaced", commands)
    before = core.room.remove(owner)
    mark = admission.mark_of(event)
    kept = core.promises.came(owner, event.model, event.tenant, mark, core.now_us) if before is None else None
    instances = len(core.cluster.by_model.get(event.model, ()))
    if instances:
        core.arrivals.setdefault(event.model, ArrivalRate()).arrived(core.now_us)
    if before is not None and before.request.model == event.model:
        # Its caller came again: it keeps its place in the order.
        request = Request(event, before.start_us, before.order, before.arrived_us)
    else:
        start_us, order = core.room.place_in_order(event, instances)
        behind_us = core.promises.start_us(event.model, event.tenant, start_us, core.now_us) - start_us
        order = order[0] + behind_us, order[1]
        if kept is not None:
            order = min(order, kept.order)
        request = Request(event, start_us, order, core.now_us, behind_us=behind_us)
    settle(core, request, weigh(core, request), commands)


def cancelled(core: SchedulerCore, event: PlaceCancelled, commands: list[Command]) -> None:
    give_up(core, (event.gateway_id, event.request_id), Reason.DEADLINE, "nobody waits for it any more", commands)


def give_up(core: SchedulerCore, owner: Owner, reason: Reason, why: str, commands: list[Command]) -> None:
    """Ends the wait of a request whose caller is gone."""
    waiting = core.room.remove(owner)
    if waiting is not None:
        verdict = Verdict(refused=admission.refuse(waiting.request, reason, why))
        _refused(core, waiting.request, verdict, waiting.arrived_us, commands)
        core.room.left(waiting.request.model, waiting.plan, core.now_us + LOOK_AGAIN_US)


# ---------------------------------------------------------------- deciding


def weigh(core: SchedulerCore, request: Request) -> Verdict:
    """What is to become of a request as things are. Changes nothing."""
    event, config = request.event, core.config
    verdict = Verdict(request=request)
    instances, none = _instances(core, event)
    if none is None and len(core.book.placements) >= config.placements_max:
        message = f"{config.placements_max} requests are under way"
        none = admission.refuse(event, Reason.OVERLOADED, message, admission.RETRY_DEFAULT_US)
    if none is not None:
        verdict.refused = none
        return verdict
    name = event.policy or config.policy
    late = name in config.late_binding
    appraiser = appraiser_of(core, event, instances[0].block_tokens, standing_of(core, request) if late else None)
    verdict.appraiser = appraiser
    best: Option | None = None
    ranked = core.policies[name].rank(appraiser, instances)
    for option in ranked:
        verdict.options.append(option)
        if option.feasible:
            best = option
            break
    if isinstance(ranked, list):
        verdict.options.extend(ranked[len(verdict.options) :])
    if best is not None:
        verdict.options.remove(best)
        verdict.options.insert(0, best)
        verdict.option = best
        if late:
            _bind_late(core, request, best, verdict)
            if verdict.option is not None and best.awaits is not None:
                # Its time is up before those blocks are there: now what counts is what is there already.
                return weigh(core, replace(request, final=True))
    else:
        _find_wait(core, request, late, verdict)
    return verdict


def _instances(core: SchedulerCore, event: PlaceRequested) -> tuple[list[Instance], Refused | None]:
    """Instances that may serve a request, or why none can: the whole fleet wherever it is asked for nothing special."""
    if event.model in core.cluster.by_model:
        fleet = core.fleet_now(event.model)
        named = not event.namespace_id or list(fleet.namespaces) == [event.namespace_id]
        named = named and not any(i in fleet.rows for i in event.exclude_instances)
        if fleet.instances and named and event.prompt_tokens + event.max_tokens <= fleet.tokens_max:
            return fleet.instances, None
    instances, none = admission.usable_instances(event, core.cluster, core.config)
    return instances, none or admission.too_long(event, instances)


def _bind_late(core: SchedulerCore, request: Request, best: Option, verdict: Verdict) -> None:
    """Makes the request wait where its instance has enough to do, or where its blocks are still being computed."""
    config = core.config
    horizon_us = max(config.horizon_us_min, int(config.horizon_prefills * best.service_us))
    horizon_us = max(horizon_us, int(config.horizon_slo_share * request.event.ttft_slo_us))
    excess_us = best.queue_us - horizon_us
    if best.awaits is not None:
        excess_us = best.queue_us
    elif excess_us <= 0:
        return
    deadline_us = admission.deadline_us(request.event, request.arrived_us, best, core.config)
    if request.final or deadline_us <= core.now_us:
        return
    verdict.option = None
    verdict.plan = _plan(core, best, verdict.appraiser)
    verdict.deadline_us = deadline_us
    verdict.look_again_us = core.now_us + max(min(excess_us, deadline_us - core.now_us), _in_vain_us(core, request))


def _in_vain_us(core: SchedulerCore, request: Request) -> int:
    """When a request is looked at again though nothing has happened."""
    return max(IN_VAIN_US, (core.now_us - request.arrived_us) // IN_VAIN_SHARE)


def _find_wait(core: SchedulerCore, request: Request, late: bool, verdict: Verdict) -> None:
    """Nothing is feasible now: waits for what will be, or refuses with the time at which it would be taken."""
    assert verdict.appraiser is not None
    may_wait = late and not request.final
    chance = admission.chance(verdict.options, verdict.appraiser, core.config) if may_wait else None
    if chance is not None:
        deadline_us = admission.deadline_us(request.event, request.arrived_us, chance.option, core.config)
        if chance.servable and core.now_us + chance.wait_us <= deadline_us and deadline_us > core.now_us:
            verdict.plan = _plan(core, chance.option, verdict.appraiser)
            verdict.deadline_us = deadline_us
            verdict.look_again_us = core.now_us + max(chance.wait_us, _in_vain_us(core, request))
            return
    chance = admission.chance(verdict.options, verdict.appraiser, core.config, core.promises)
    verdict.chance = chance
    verdict.refused = admission.refusal(
        request.event, verdict.options, None if chance is None else chance.retry_us, core.config
    )


def _plan(core: SchedulerCore, option: Option, appraiser: Appraiser | None) -> Plan:
    """What those behind reckon with. KV tokens are kept free for a request only when it has waited for a while.

    So what fits goes past what does not, but not for ever.
    """
    assert appraiser is not None
    reserves = option.waited_us >= core.config.reserve_after_us
    kv_tokens = appraiser.kv_tokens_needed(option.decode) if reserves else 0
    return Plan(option.prefill.id, option.prefill_us, option.decode.id, kv_tokens, option.awaits)


def standing_of(core: SchedulerCore, request: Request) -> Standing:
    event, model = request.event, request.event.model
    rate, instances = core.arrivals.get(model), len(core.cluster.by_model[model])
    counts_on_others = event.keys and not request.final
    return Standing(
        arrived_us=request.arrived_us,
        order=request.order,
        line=core.room.lines.get(model),
        pending=core.pending.find(event.keys[0].keys, core.now_us) if counts_on_others else (),
        arrivals_per_s=rate.at(core.now_us) / instances if rate is not None else 0.0,
        promised=core.promises.ahead(model, request.order, core.now_us) if event.ttft_slo_us else None,
    )


def appraiser_of(
    core: SchedulerCore, event: PlaceRequested, block_tokens: int, standing: Standing | None = None
) -> Appraiser:
    """Predictions for a request as of now. Changes nothing."""
    outputs = core.outputs.get(event.model) or OutputLengths(core.config.output_share)
    prefix = Prefix(event, block_tokens, core.sources_now(), core.config.pull_sources_max, core.book)
    return Appraiser(
        event, prefix, core.cluster, core.book, core.costs, core.config, outputs, core.now_us, standing,
        core.calibrations, core.fleet_now(event.model),
    )  # fmt: skip


# ---------------------------------------------------------------- doing


def settle(core: SchedulerCore, request: Request, verdict: Verdict, commands: list[Command]) -> None:
    """Does what the verdict says. A request that waits already stays where it is, with another plan."""
    event, room = request.event, core.room
    if verdict.refused is not None:
        _refused(core, event, verdict, request.arrived_us, commands)
    elif verdict.plan is not None:
        _wait(core, request, verdict, verdict.plan, commands)
    else:
        option = verdict.option
        assert option is not None and verdict.appraiser is not None
        if (event.policy or core.config.policy) in core.config.late_binding:
            if request.arrived_us == core.now_us:
                room.charge(event, request.start_us, option.prefill_us)
            room.served(event.model, request.start_us)
        core.policies[event.policy or core.config.policy].chosen(event, option)
        placed = _open(core, event, option, verdict.appraiser)
        commands.append(placed)
        _note(core, event, verdict, placed, request.arrived_us)


def _wait(core: SchedulerCore, request: Request, verdict: Verdict, plan: Plan, commands: list[Command]) -> None:
    room, event = core.room, request.event
    known = room.entries.get(request.owner)
    if known is not None:
        room.replan(known, plan)
    else:
        if request.arrived_us == core.now_us:
            room.charge(event, request.start_us, plan.prefill_us)
        if room.full and not _make_room(core, request, commands):
            message = f"{core.config.waiting_max} requests wait for a place"
            # Not all of a crowd at the same time.
            later_us = (
                verdict.look_again_us - core.now_us + core.config.retry_after_us_min * (1 + request.order[1] % 16)
            )
            none = admission.refuse(event, Reason.OVERLOADED, message, later_us)
            _refused(core, event, Verdict(verdict.options, refused=none), request.arrived_us, commands)
            return
        room.add(Waiting(event, request.start_us, request.order, request.arrived_us, verdict.deadline_us, plan))
        core.count("waits")
    room.look_again(event.model, plan.prefill_id, verdict.look_again_us)


def _make_room(core: SchedulerCore, request: Request, commands: list[Command]) -> bool:
    """Refuses the last of the line if the newcomer goes before it."""
    last = core.room.last(request.event.model)
    if last is None or last.order <= request.order:
        return False
    give_up(core, last.owner, Reason.OVERLOADED, "requests that go before it need its place in the queue", commands)
    return True


def _open(core: SchedulerCore, event: PlaceRequested, option: Option, appraiser: Appraiser) -> Placed:
    """Reserves what an option needs and says so."""
    config, decode, prefill, now_us = core.config, option.decode, option.prefill, core.now_us
    begins_us = option.queue_us + option.service_us + option.handoff_us
    ttl_us = config.ttl_factor * (begins_us + option.step_us * event.max_tokens)
    ttl_us = min(max(ttl_us, config.placement_ttl_us_min), config.placement_ttl_us_max)
    runs = appraiser.prefix.runs(option.pull)
    placement = Placement(
        owner=(event.gateway_id, event.request_id),
        model=event.model,
        max_tokens=event.max_tokens,
        prefill_id=prefill.id,
        decode_id=decode.id,
        split=option.split,
        kv_tokens=appraiser.kv_tokens_needed(decode),
        prefill_kv_tokens=appraiser.prefill_kv_tokens(prefill) if option.split else 0,
        prefill_holds=prefill.decodes(),
        prefill_us=option.prefill_us,
        context_tokens=appraiser.context_tokens,
        expected_tokens=appraiser.expected_tokens,
        placed_us=now_us,
        decode_ends_us=now_us + begins_us + option.step_us * appraiser.expected_tokens,
        expires_us=now_us + ttl_us,
        prefill_ends_us=now_us + option.queue_us + option.service_us,
        stall_us_max=objectives.stall_us_max(appraiser, option),
        tpot_slo_us=event.tpot_slo_us,
        interval_us=option.interval_us,
        stall_us=objectives.stall_us(appraiser, option, now_us + option.ttft_us),
        pulls=tuple(dict.fromkeys(run.source_id for run in runs)),
        pull_ends_us=now_us + option.queue_us + option.pull_us,
        pull_us=option.pull_us,
        prompt_tokens=event.prompt_tokens,
        cached_tokens=option.cached_tokens,
        waited_us=option.waited_us,
        queue_us=option.queue_us,
        announced_us=option.announced_us,
        handoff_guessed=option.handoff_guessed,
    )
    core.book.open(placement)
    core.expiries.set(("placement", *placement.owner), placement.expires_us)
    core.count("placements")
    core.count("splits", option.split)
    _expect_blocks(core, event, option, appraiser, placement)
    info = prefill.info
    return Placed(
        request_id=event.request_id,
        gateway_id=event.gateway_id,
        prefill=Target(prefill.id, info.address, info.epoch),
        decode=Target(decode.id, decode.info.address, decode.info.epoch),
        split=option.split,
        pull=runs,
        cached_tokens=option.cached_tokens,
        predicted_ttft_us=option.announced_us,
        handoff_source_id=info.node_source_id if option.split else "",
        handoff_address=core.cluster.sources[info.node_source_id].attached.address if option.split else "",
        ttl_ms=ttl_us // 1000,
        waited_us=option.waited_us,
    )


def _expect_blocks(
    core: SchedulerCore, event: PlaceRequested, option: Option, appraiser: Appraiser, placement: Placement
) -> None:
    """Notes the blocks that this request is going to compute, for others that share its prefix."""
    block_tokens = appraiser.prefix.block_tokens
    full = event.prompt_tokens // block_tokens
    if event.keys and full * block_tokens > option.cached_tokens:
        keys = event.keys[0].keys[: full * KEY_BYTES]
        prompt = PendingPrompt(placement.owner, option.prefill.id, keys, core.now_us, placement.prefill_ends_us)
        core.pending.open(prompt, core.now_us)


def _refused(
    core: SchedulerCore, event: PlaceRequested, verdict: Verdict, arrived_us: int, commands: list[Command]
) -> None:
    refused = verdict.refused
    assert refused is not None
    core.count("refusals")
    core.count(f"refused_{refused.reason.name.lower()}")
    commands.append(refused)
    if verdict.chance is not None and verdict.appraiser is not None and refused.retry_after_ms:
        promise = admission.promise_of(verdict.chance, verdict.appraiser, refused.retry_after_ms)
        request = verdict.request
        assert request is not None
        # It will stand where it would if it had waited, and the next one of its tenant behind it.
        next_us = request.start_us + request.behind_us + charged_us(event, promise.service_us)
        core.promises.note(replace(promise, order=request.order, start_us=next_us))
    if refused.reason is not Reason.BAD_ARGUMENT:
        _note(core, event, verdict, refused, arrived_us)


def _note(
    core: SchedulerCore, event: PlaceRequested, verdict: Verdict, choice: Placed | Refused, arrived_us: int
) -> None:
    """Keeps what was decided, and from what, in the ledger."""
    kept = verdict.options[: core.config.ledger_candidates_max]
    core.ledger.decided(
        LedgerEntry(
            request_id=event.request_id,
            gateway_id=event.gateway_id,
            policy=event.policy or core.config.policy,
            prompt_tokens=event.prompt_tokens,
            max_tokens=event.max_tokens,
            candidates=tuple(Candidate.of(option) for option in kept),
            candidates_total=len(verdict.options),
            choice=choice,
            placed_us=core.now_us,
            attempts=1,
            waited_us=core.now_us - arrived_us,
            priority=event.priority,
            tenant=event.tenant,
        )
    )
