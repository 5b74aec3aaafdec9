"""Changes of roles, carried out: what may be ordered, the order, and how it ends. Pure.

An instance says by itself that its role may be changed. It is told its new role on its life line, takes it at once and
says so in its next report; from then on it is given only what the role allows, and finishes what it had. One change of
a model at a time, an instance rests after one, and the last that prefills or decodes for others keeps doing so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvpool.core.ids import Role
from scheduler.core.cluster import Instance, State
from scheduler.core.commands import ChangeRole, Command, RoleChanged, RoleChangeEnded, RoleRefused
from scheduler.core.events import RoleOrdered

if TYPE_CHECKING:
    from scheduler.core.core import SchedulerCore

#: An instance that has not taken a role within this time has refused it.
ANSWER_US_MAX = 10_000_000
#: What a new role forbids is waited for so long, and no other change of the model is begun before.
DRAIN_US_MAX = 300_000_000
#: After a change, or an attempt, a plan leaves the instance alone for this long.
COOLDOWN_US = 300_000_000
#: Instances that are left alone at a time; beyond it the one that was changed first may be changed again.
RESTING_MAX = 1024
#: After a proposal, and after a change, nothing is proposed for a model for this long.
REST_US = 60_000_000


@dataclass(slots=True)
class RoleChange:
    """One change under way. Fields: why: it was ordered; taken_us: when the instance said so; None = not yet."""

    instance_id: str
    model: str
    role: Role
    was: Role
    why: str
    ordered_us: int
    taken_us: int | None = None

    def expires_us(self) -> int:
        return self.ordered_us + ANSWER_US_MAX if self.taken_us is None else self.taken_us + DRAIN_US_MAX


# ---------------------------------------------------------------- what may be ordered


def blocked(core: SchedulerCore, instance_id: str, role: Role) -> str:
    """Why an instance can't be given a role now; empty if it can."""
    instance = core.cluster.instances.get(instance_id)
    if instance is None:
        return f"there is no instance {instance_id!r}"
    if instance.info.role == role:
        return "it has that role"
    if not instance.info.role_changeable:
        return "it does not say that its role may be changed"
    if instance.peer:
        return f"its life line is at scheduler {instance.peer}"
    if instance.state is not State.ALIVE or instance.draining:
        return f"it is {'draining' if instance.draining else instance.state.value}"
    under_way = core.roles.changes.get(instance.info.model)
    if under_way is not None:
        return f"{under_way.instance_id} of the same model is being changed"
    return _phase_left_alone(core, instance, role)


def _phase_left_alone(core: SchedulerCore, instance: Instance, role: Role) -> str:
    """Which phase nobody would do any more, of those who can hand KV to each other."""
    info = instance.info
    others = [core.cluster.instances[i] for i in core.cluster.by_model[info.model] if i != instance.id]
    able = [o for o in others if o.state is State.ALIVE and not o.draining and o.info.namespace_id == info.namespace_id]
    if role is Role.DECODE and not any(o.prefills() for o in able):
        return "no other instance prefills"
    if role is Role.PREFILL and not any(o.decodes() for o in able):
        return "no other instance decodes"
    return ""


def blocked_for_plan(core: SchedulerCore, instance_id: str, role: Role) -> str:
    """Why a plan may not give an instance a role now; empty if it may."""
    if not core.config.execute_roles:
        return "the scheduler does not execute its plans"
    why = blocked(core, instance_id, role)
    if why:
        return why
    if core.roles.resting.get(instance_id, 0) > core.now_us:
        return "its role was changed a short while ago"
    # Of several schedulers one carries out plans for a model, or two would each take an instance from the same phase.
    instances = core.cluster.instances
    leader = instances[core.cluster.by_model[instances[instance_id].info.model][0]].peer
    return f"scheduler {leader} carries out plans for this model" if leader else ""


def drains(core: SchedulerCore, instance: Instance) -> int:
    """Requests under way on an instance that its role would not allow: one that decodes may have whole ones too."""
    held = core.book.on(instance.id)
    if not instance.decodes():
        return len(held.decoding)
    return 0 if instance.prefills() else sum(core.book.placements[owner].split for owner in held.queue)


# ---------------------------------------------------------------- orders


def carry_out_plans(core: SchedulerCore, commands: list[Command]) -> None:
    """Orders what is proposed, where that is allowed."""
    for model in sorted(core.roles.proposals):
        proposal = core.roles.proposals[model]
        if proposal.kind == "flip" and not blocked_for_plan(core, proposal.instance_id, proposal.role):
            _order(core, core.cluster.instances[proposal.instance_id], proposal.role, proposal.why, commands)


def ordered(core: SchedulerCore, event: RoleOrdered, commands: list[Command]) -> None:
    """An operator's word. It goes before plans, and needs no rest."""
    why_not = blocked(core, event.instance_id, event.role)
    if why_not:
        commands.append(RoleRefused(event.instance_id, event.role, why_not))
    else:
        _order(core, core.cluster.instances[event.instance_id], event.role, "ordered by an operator", commands)


def _order(core: SchedulerCore, instance: Instance, role: Role, why: str, commands: list[Command]) -> None:
    model = instance.info.model
    core.roles.changes[model] = RoleChange(instance.id, model, role, instance.info.role, why, core.now_us)
    core.count("roles_ordered")
    _rest(core, instance)
    commands.append(ChangeRole(instance.stream, instance.id, role))


def _rest(core: SchedulerCore, instance: Instance) -> None:
    book, model = core.roles, instance.info.model
    book.resting.pop(instance.id, None)
    book.resting[instance.id] = core.now_us + COOLDOWN_US
    if len(book.resting) > RESTING_MAX:
        del book.resting[next(iter(book.resting))]
    book.proposals.pop(model, None)
    if model in book.loads:
        load = book.loads[model]
        load.streak, load.rests_until_us = 0, core.now_us + REST_US


# ---------------------------------------------------------------- what comes of them


def took(core: SchedulerCore, instance: Instance, role: Role, commands: list[Command]) -> None:
    """An instance says which role it has. One that nobody ordered here counts as well: a peer may have ordered it."""
    was = instance.info.role
    if role == was:
        return
    instance.info = replace(instance.info, role=role)
    core.cluster.version += 1
    core.book.freed[instance.id] = None  # those who planned to go there, or somewhere else, have another look
    core.count("roles_changed")
    _rest(core, instance)
    commands.append(RoleChanged(instance.id, role, was))
    change = core.roles.changes.get(instance.info.model)
    if change is not None and (change.instance_id, change.role) == (instance.id, role):
        change.taken_us = core.now_us


def rejoined(core: SchedulerCore, instance: Instance, commands: list[Command]) -> None:
    """An instance speaks by another life line: an order may have been lost with the old one."""
    change = core.roles.changes.get(instance.info.model)
    if change is None or change.instance_id != instance.id or change.taken_us is not None:
        return
    if instance.peer:
        _end(core, change, "moved", commands)
    else:
        commands.append(ChangeRole(instance.stream, instance.id, change.role))


def gone(core: SchedulerCore, instance_id: str, commands: list[Command]) -> None:
    """An instance is gone, and with it what it was told. A new process begins with the role of its own settings."""
    for change in list(core.roles.changes.values()):
        if change.instance_id == instance_id:
            _end(core, change, "gone", commands)


def run(core: SchedulerCore, commands: list[Command]) -> None:
    """Ends changes that are over, and those that take too long."""
    for change in list(core.roles.changes.values()):
        instance = core.cluster.instances[change.instance_id]
        if change.taken_us is not None and not drains(core, instance):
            _end(core, change, "done", commands)
        elif core.now_us >= change.expires_us():
            _end(core, change, "unanswered" if change.taken_us is None else "undrained", commands)


def _end(core: SchedulerCore, change: RoleChange, how: str, commands: list[Command]) -> None:
    del core.roles.changes[change.model]
    core.count(f"role_change_{how}")
    commands.append(RoleChangeEnded(change.instance_id, change.role, how))


def check_invariants(core: SchedulerCore) -> None:
    assert len(core.roles.resting) <= RESTING_MAX
    for model, change in core.roles.changes.items():
        instance = core.cluster.instances[change.instance_id]
        assert model == change.model == instance.info.model and not instance.peer
        assert change.taken_us is None or instance.info.role == change.role
