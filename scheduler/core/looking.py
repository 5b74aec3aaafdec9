"""Those who wait, weighed again: when their time is up, and whenever their turn may have come. Pure.

Work is bounded: at most `waiting_scan_max` requests are weighed for one event; what is left over has its turn soon.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from scheduler.core.commands import Command
from scheduler.core.placements import Owner
from scheduler.core.placing import LOOK_AGAIN_US, Request, settle, weigh
from scheduler.core.waiting import Plan

if TYPE_CHECKING:
    from scheduler.core.core import SchedulerCore

#: Those who wait for one instance that are looked at when it gets free, and those first of all lines.
FIRST_HERE, FIRST_OF_ALL = 2, 1


def run_deadlines(core: SchedulerCore, commands: list[Command]) -> None:
    """Those whose wait is over are placed or refused now; others have another look at their instance.

    A bounded number: what is left over is due still, and the next event or tick goes on with it.
    """
    seen: dict[Owner, None] = {}
    while len(seen) < core.config.waiting_scan_max:
        key = core.room.deadlines.pop_due(core.now_us)
        if key is None:
            return
        if key[0] == "waiting":
            waiting = core.room.remove((key[1], key[2]))
            assert waiting is not None
            seen[waiting.owner] = None
            request = Request(waiting.request, waiting.start_us, waiting.order, waiting.arrived_us, final=True)
            settle(core, request, weigh(core, request), commands)
            core.room.left(waiting.request.model, waiting.plan, core.now_us + LOOK_AGAIN_US)
        else:
            _, model, instance_id = key
            owners = [*core.room.whose_turn(model, instance_id, FIRST_HERE), *core.room.first(model, FIRST_OF_ALL)]
            fresh = [owner for owner in dict.fromkeys(owners) if owner not in seen]
            seen.update(dict.fromkeys(fresh))
            _look(core, fresh, commands)
            if instance_id not in core.cluster.instances and core.room.planned_on(model, instance_id):
                core.room.look_again(model, instance_id, core.now_us + LOOK_AGAIN_US)


def news(core: SchedulerCore, freed: list[str], finished: list[Owner], commands: list[Command]) -> None:
    """Something has got free, or blocks may be there that somebody waits for."""
    if not core.room.entries:
        return
    owners: dict[Owner, None] = {}
    for owner in finished:
        owners.update(dict.fromkeys(core.room.awaiting.get(owner, ())))
    for instance_id in freed:
        instance = core.cluster.instances.get(instance_id)
        for model in core.room.lines:
            owners.update(dict.fromkeys(core.room.whose_turn(model, instance_id, FIRST_HERE)))
            if instance is None and core.room.planned_on(model, instance_id) > FIRST_HERE:
                core.room.look_again(model, instance_id, core.now_us + LOOK_AGAIN_US)
        if instance is not None:
            owners.update(dict.fromkeys(core.room.first(instance.info.model, FIRST_OF_ALL)))
    _look(core, owners, commands)


def blocks_came(core: SchedulerCore, source_id: str, commands: list[Command]) -> None:
    """The directory has learned of a source's blocks: perhaps of those that somebody waits for."""
    done = []
    for owner in core.room.awaiting:
        if owner in core.pending.done:
            info = core.cluster.instances[core.pending.prompts[owner].instance_id].info
            if source_id in (info.node_source_id, info.hbm_source_id):
                done.append(owner)
    if done:
        news(core, [], done, commands)


def _look(core: SchedulerCore, owners: Iterable[Owner], commands: list[Command]) -> None:
    """Weighs some who wait again, in their order. Where one has got an answer, the next have their turn soon."""
    known = dict.fromkeys(owner for owner in owners if owner in core.room.entries)
    ordered = sorted((core.room.entries[owner] for owner in known), key=lambda w: w.order)
    for waiting in ordered[: core.config.waiting_scan_max]:
        before = waiting.plan
        request = Request(waiting.request, waiting.start_us, waiting.order, waiting.arrived_us)
        verdict = weigh(core, request)
        if verdict.plan is None:
            core.room.remove(waiting.owner)
        settle(core, request, verdict, commands)
        if verdict.plan is None or _elsewhere(before, verdict.plan):
            core.room.left(waiting.request.model, before, core.now_us + LOOK_AGAIN_US)
    for waiting in ordered[core.config.waiting_scan_max :]:
        core.room.look_again(waiting.request.model, waiting.plan.prefill_id, core.now_us + LOOK_AGAIN_US)


def _elsewhere(before: Plan, plan: Plan) -> bool:
    """Whether something that was kept for a request is free for those behind it."""
    return plan.prefill_id != before.prefill_id or (before.kv_tokens > 0 and plan.decode_id != before.decode_id)
