"""Which changes of roles and numbers would serve the load of late better: proposals, with hysteresis. Pure.

Each phase has a utilisation over a window, and a prediction of it with one instance more or less: work stays, instances
change. A phase that is too busy gets an instance, from the other phase if that can spare one. Nothing is proposed that
would have to be taken back soon: a removal must leave the phase below the limit by a margin, a proposal must have held
for several windows, and after one there is a rest. `role_changes` carries proposals of roles out where it may.
Source: the 0.8 rule of Dynamo's planner: remove where the prediction with N - 1 stays below 0.8 of the limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpool.core.ids import Role
from scheduler.core import role_changes
from scheduler.core.cluster import Instance, State
from scheduler.core.commands import Command, RoleProposed
from scheduler.core.role_changes import REST_US, RoleChange

if TYPE_CHECKING:
    from scheduler.core.core import SchedulerCore

#: Load is looked at this often, and averaged over about this many looks.
LOOK_US = 5_000_000
WINDOW_LOOKS = 6
#: A phase above this is too busy; one that would be below `SPARE` of it with one instance less can spare one.
BUSY, SPARE = 0.85, 0.8
#: One that can't spare an instance but is below this can share one: that then does both.
SHARES = 0.5
#: A proposal is made when this many looks in a row asked for the same.
LOOKS_BEFORE = 3


@dataclass(slots=True)
class PhaseLoad:
    """Utilisation of the two phases of a model, 1 = always busy. Instances of both roles count in both."""

    prefill: float = 0.0
    decode: float = 0.0
    prefill_count: int = 0
    decode_count: int = 0
    looks: int = 0
    #: What the last looks asked for, and how often in a row.
    asked: tuple[str, int] = ("", 0)
    streak: int = 0
    rests_until_us: int = 0


@dataclass(frozen=True, slots=True)
class Proposal:
    """Fields: wish: what the load asked for, as `wish_of` says it; the proposal stands as long as it asks for that."""

    model: str
    kind: str  # "flip", "add", "remove"
    role: Role
    instance_id: str
    why: str
    since_us: int
    wish: tuple[str, int] = ("", 0)


@dataclass(slots=True)
class RoleBook:
    """By model: the load of its phases, the proposal that stands for it, and the change of a role that is under way."""

    loads: dict[str, PhaseLoad] = field(default_factory=dict)
    proposals: dict[str, Proposal] = field(default_factory=dict)
    looked_us: int = 0
    changes: dict[str, RoleChange] = field(default_factory=dict)
    #: Instance -> until when plans leave its role alone.
    resting: dict[str, int] = field(default_factory=dict)

    def forget(self, model: str) -> None:
        self.loads.pop(model, None)
        self.proposals.pop(model, None)


def look(core: SchedulerCore, commands: list[Command]) -> None:
    """Takes one look at all models, if it is time. Called with each event: costs nothing between looks."""
    book = core.roles
    if book.changes:
        role_changes.run(core, commands)
    if core.now_us - book.looked_us < LOOK_US:
        return
    book.looked_us = core.now_us
    for model in sorted(book.loads):
        if model not in core.cluster.by_model:
            book.forget(model)
    for model in sorted(core.cluster.by_model):
        alive = [core.cluster.instances[i] for i in core.cluster.by_model[model]]
        load = book.loads.setdefault(model, PhaseLoad())
        _measure(core, load, [i for i in alive if i.state is State.ALIVE and not i.draining], model)
        _propose(core, load, alive, model, commands)
    role_changes.carry_out_plans(core, commands)


def _measure(core: SchedulerCore, load: PhaseLoad, instances: list[Instance], model: str) -> None:
    """Prefill: outstanding work against one look, with that of those who wait for it. Decode: batch and KV taken."""
    work_us, decode = 0, 0.0
    prefills = [i for i in instances if i.prefills()]
    decodes = [i for i in instances if i.decodes()]
    line = core.room.lines.get(model)
    for instance in prefills:
        queue_us = core.book.on(instance.id).queue_left_us(core.now_us)
        work_us += min(queue_us, LOOK_US)
        # Who waits for an instance that has little to prefill waits for room to decode.
        if line is not None and instance.id in line.prefill_us and 2 * queue_us >= core.config.horizon_us_min:
            work_us += line.prefill_us[instance.id].total
    for instance in decodes:
        # What waits for its prefill holds room here, and is no work of this phase: else a queue there looks busy here.
        here = [core.book.placements[owner] for owner in core.book.on(instance.id).decoding]
        running = [placement.kv_tokens for placement in here if placement.prefill_done]
        by_kv = 1 - instance.kv_tokens_available(sum(running)) / instance.info.kv_tokens_total
        decode += max(len(running) / instance.info.batch_max, by_kv)
    load.looks += 1
    share = max(1 / WINDOW_LOOKS, 1 / load.looks)
    prefill_now = work_us / (LOOK_US * len(prefills)) if prefills else 0.0
    decode_now = decode / len(decodes) if decodes else 0.0
    # Work stays, instances change: what was measured with more or fewer of them is measured by those that are there.
    load.prefill *= load.prefill_count / len(prefills) if load.prefill_count and prefills else 1.0
    load.decode *= load.decode_count / len(decodes) if load.decode_count and decodes else 1.0
    load.prefill += share * (prefill_now - load.prefill)
    load.decode += share * (decode_now - load.decode)
    load.prefill_count, load.decode_count = len(prefills), len(decodes)


def _propose(
    core: SchedulerCore, load: PhaseLoad, instances: list[Instance], model: str, commands: list[Command]
) -> None:
    wish = wish_of(load)
    load.streak = load.streak + 1 if wish == load.asked else 1
    load.asked = wish
    standing = core.roles.proposals.get(model)
    kind, role_number = wish
    if standing is not None and standing.wish != wish:
        del core.roles.proposals[model]
        standing = None
    if not kind or standing is not None or load.streak < LOOKS_BEFORE or core.now_us < load.rests_until_us:
        return
    role = Role(role_number)
    busy = Role.PREFILL if load.prefill > BUSY else Role.DECODE
    instance_id = "" if kind == "add" else _whom(core, instances, kind, role, busy)
    if kind == "remove" and not instance_id:
        return
    if kind == "flip" and not instance_id:  # those who do both already have nothing else to give
        kind, role = "add", busy
    why = f"utilisation of {load.prefill_count} that prefill: {load.prefill:.2f}; "
    why += f"of {load.decode_count} that decode: {load.decode:.2f}"
    core.roles.proposals[model] = Proposal(model, kind, role, instance_id, why, core.now_us, wish)
    load.rests_until_us = core.now_us + REST_US
    commands.append(RoleProposed(model, kind, instance_id, role, why))


def wish_of(load: PhaseLoad) -> tuple[str, int]:
    """What a load asks for: (kind, role), kind empty for nothing."""
    prefill_spares = load.prefill_count > 1 and _without_one(load.prefill, load.prefill_count) < SPARE * BUSY
    decode_spares = load.decode_count > 1 and _without_one(load.decode, load.decode_count) < SPARE * BUSY
    if load.prefill > BUSY:
        return _wish(Role.PREFILL, decode_spares, load.decode_count > 0 and load.decode < SHARES)
    if load.decode > BUSY:
        return _wish(Role.DECODE, prefill_spares, load.prefill_count > 0 and load.prefill < SHARES)
    if prefill_spares and decode_spares:
        # The one that is less busy can go; of instances with both roles both have one less then.
        return ("remove", int(Role.PREFILL if load.prefill <= load.decode else Role.DECODE))
    return "", 0


def _wish(busy: Role, spares: bool, shares: bool) -> tuple[str, int]:
    """What a busy phase asks the other one for: an instance, a share of one, or nothing."""
    if spares:
        return "flip", int(busy)
    return ("flip", int(Role.BOTH)) if shares else ("add", int(busy))


def _without_one(utilisation: float, count: int) -> float:
    """The same work on one instance less."""
    return utilisation * count / (count - 1)


def _whom(core: SchedulerCore, instances: list[Instance], kind: str, role: Role, busy: Role) -> str:
    """The instance to change or remove: the one with least to lose, of those whose role may be changed now if any are.

    Args: busy: for a flip, the phase that needs it: it comes from those that only do the other.
    """
    wanted = role if kind == "remove" else (Role.DECODE if busy is Role.PREFILL else Role.PREFILL)
    able = [i for i in instances if i.info.role == wanted and i.state is State.ALIVE and not i.draining]

    def loses(instance: Instance) -> tuple[bool, int, float, str]:
        held = core.book.on(instance.id)
        stays = kind == "flip" and role_changes.blocked_for_plan(core, instance.id, role) != ""
        return stays, len(held.decoding) + len(held.queue), -instance.info.price_per_hour, instance.id

    return min(able, key=loses).id if able else ""
