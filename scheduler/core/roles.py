"""Which changes of roles and numbers would serve the load of late better: proposals, with hysteresis. Pure.

Each phase has a utilisation over a window, and a prediction of it with one instance more or less: work stays, instances
change. A phase that is too busy gets an instance, from the other phase if that can spare one. Nothing is proposed that
would have to be taken back soon: a removal must leave the phase below the limit by a margin, a proposal must have held
for several windows, and after one there is a rest.
Source: the 0.8 rule of Dynamo's planner: remove where the prediction with N - 1 stays below 0.8 of the limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpool.core.ids import Role
from scheduler.core.cluster import Instance, State
from scheduler.core.commands import Command, RoleProposed

if TYPE_CHECKING:
    from scheduler.core.core import SchedulerCore

#: Load is looked at this often, and averaged over about this many looks.
LOOK_US = 5_000_000
WINDOW_LOOKS = 6
#: A phase above this is too busy; one that would be below `SPARE` of it with one instance less can spare one.
BUSY, SPARE = 0.85, 0.8
#: A proposal is made when this many looks in a row asked for the same, and not again for so long.
LOOKS_BEFORE = 3
REST_US = 60_000_000


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
    model: str
    kind: str  # "flip", "add", "remove"
    role: Role
    instance_id: str
    why: str
    since_us: int


@dataclass(slots=True)
class RoleBook:
    """Load of each model's phases, and the proposal that stands for it, if one does."""

    loads: dict[str, PhaseLoad] = field(default_factory=dict)
    proposals: dict[str, Proposal] = field(default_factory=dict)
    looked_us: int = 0

    def forget(self, model: str) -> None:
        self.loads.pop(model, None)
        self.proposals.pop(model, None)


def look(core: SchedulerCore, commands: list[Command]) -> None:
    """Takes one look at all models, if it is time. Called with each event: costs nothing between looks."""
    book = core.roles
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


def _measure(core: SchedulerCore, load: PhaseLoad, instances: list[Instance], model: str) -> None:
    """Prefill: outstanding work, waiting requests included, against one look. Decode: batch and KV that are taken."""
    work_us, decode = 0, 0.0
    prefills = [i for i in instances if i.prefills()]
    decodes = [i for i in instances if i.decodes()]
    for instance in prefills:
        work_us += min(core.book.on(instance.id).queue_left_us(core.now_us), LOOK_US)
    line = core.room.lines.get(model)
    if line is not None:
        for lane in line.prefill_us.values():
            work_us += lane.total
    for instance in decodes:
        held = core.book.on(instance.id)
        by_batch = len(held.decoding) / instance.info.batch_max
        by_kv = 1 - instance.kv_tokens_available(held.kv_tokens) / instance.info.kv_tokens_total
        decode += max(by_batch, by_kv)
    load.looks += 1
    share = max(1 / WINDOW_LOOKS, 1 / load.looks)
    prefill_now = work_us / (LOOK_US * len(prefills)) if prefills else 0.0
    decode_now = decode / len(decodes) if decodes else 0.0
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
    if standing is not None and (standing.kind, int(standing.role)) != wish:
        del core.roles.proposals[model]
        standing = None
    if not kind or standing is not None or load.streak < LOOKS_BEFORE or core.now_us < load.rests_until_us:
        return
    role = Role(role_number)
    instance_id = "" if kind == "add" else _whom(core, instances, kind, role)
    if kind != "add" and not instance_id:
        return
    why = f"utilisation of {load.prefill_count} that prefill: {load.prefill:.2f}; "
    why += f"of {load.decode_count} that decode: {load.decode:.2f}"
    core.roles.proposals[model] = Proposal(model, kind, role, instance_id, why, core.now_us)
    load.rests_until_us = core.now_us + REST_US
    commands.append(RoleProposed(model, kind, instance_id, role, why))


def wish_of(load: PhaseLoad) -> tuple[str, int]:
    """What a load asks for: (kind, role), kind empty for nothing."""
    prefill_spares = load.prefill_count > 1 and _without_one(load.prefill, load.prefill_count) < SPARE * BUSY
    decode_spares = load.decode_count > 1 and _without_one(load.decode, load.decode_count) < SPARE * BUSY
    if load.prefill > BUSY:
        return ("flip" if decode_spares else "add", int(Role.PREFILL))
    if load.decode > BUSY:
        return ("flip" if prefill_spares else "add", int(Role.DECODE))
    if prefill_spares and decode_spares:
        # The one that is less busy can go; of instances with both roles both have one less then.
        return ("remove", int(Role.PREFILL if load.prefill <= load.decode else Role.DECODE))
    return "", 0


def _without_one(utilisation: float, count: int) -> float:
    """The same work on one instance less."""
    return utilisation * count / (count - 1)


def _whom(core: SchedulerCore, instances: list[Instance], kind: str, role: Role) -> str:
    """The instance with least to lose, the dearest first: of the other role for a flip, of this one for a removal."""
    wanted = role if kind == "remove" else (Role.DECODE if role is Role.PREFILL else Role.PREFILL)
    able = [i for i in instances if i.info.role == wanted and i.state is State.ALIVE and not i.draining]

    def loses(instance: Instance) -> tuple[int, float, str]:
        held = core.book.on(instance.id)
        return len(held.decoding) + len(held.queue), -instance.info.price_per_hour, instance.id

    return min(able, key=loses).id if able else ""
