"""Roles that are changed: by plans and by operators, with what goes on meanwhile and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import scheduler_events as made
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.ids import Role
from scheduler.core import checkpoint, events, role_changes
from scheduler.core.commands import (
    ChangeRole,
    Command,
    Placed,
    RoleChanged,
    RoleChangeEnded,
    RoleProposed,
    RoleRefused,
)
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.core.role_changes import ANSWER_US_MAX, COOLDOWN_US, DRAIN_US_MAX, REST_US, blocked_for_plan
from scheduler.core.roles import LOOK_US, LOOKS_BEFORE, SHARES, PhaseLoad, wish_of
from scheduler.service import codec

SECOND_US = 1_000_000
P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


class Cluster:
    """A core with instances w0, w1, ... of given roles, all on one node, that speak every second.

    Fields: obey: whether they take the roles that they are told to; roles: that each of them has.
    """

    def __init__(self, roles: Sequence[Role], *, changeable: Iterable[int] | None = None, kv_tokens_total: int = 8192,
                 **config: Any) -> None:  # fmt: skip
        self.core = SchedulerCore(replace(SchedulerConfig(), **config))
        self.now_us, self.kv_tokens_total = 0, kv_tokens_total
        self.streams: dict[str, int] = {}
        self.roles: dict[str, Role] = {}
        self.said: list[Command] = []
        self.obey = True
        self._stream = 9
        self.handle(made.attached(1, "node-0"))
        self.handle(made.snapshot(1, 0, ""))
        self.handle(events.GatewayOpened(2, "gw"))
        able = range(len(roles)) if changeable is None else changeable
        for number, role in enumerate(roles):
            self.join(f"w{number}", role, role_changeable=number in able)

    def handle(self, event: events.Event) -> list[Command]:
        commands = self.core.handle(event, self.now_us)
        self.core.check_invariants()
        self.said += commands
        if self.obey:
            self.roles |= {c.instance_id: c.role for c in of(ChangeRole, commands)}
        return commands

    def join(self, name: str, role: Role, **over: Any) -> int:
        self._stream += 1
        self.streams[name], self.roles[name] = self._stream, role
        fields = {"kv_tokens_total": self.kv_tokens_total, "role_changeable": True, **over}
        peer = str(fields.pop("peer", ""))
        self.handle(replace(made.joined(self._stream, name, role=role, **fields), peer=peer))
        return self._stream

    def report(self, name: str, **over: Any) -> list[Command]:
        fields = {"role": self.roles[name], "kv_tokens_free": self.kv_tokens_total, **over}
        return self.handle(made.reported(self.streams[name], **fields))

    def wait(self, duration_us: int) -> list[Command]:
        """Lets time pass by seconds, in which all speak. Returns what the core said."""
        begin = len(self.said)
        until_us = self.now_us + duration_us
        while self.now_us < until_us:
            self.now_us += SECOND_US
            self.handle(events.SourceHeartbeat(1, 0, 0))
            self.handle(events.GatewayHeartbeat(2, 0))
            for name in list(self.streams):
                self.report(name)
        return self.said[begin:]

    def order(self, name: str, role: Role) -> list[Command]:
        return self.handle(events.RoleOrdered(name, role))

    def fill_decode(self, count: int) -> None:
        """Long answers, split, with their prefills done."""
        for number in range(count):
            (placed,) = [
                c
                for c in self.handle(made.place(f"r{number}", max_tokens=900, policy="always_split"))
                if isinstance(c, Placed)
            ]
            assert placed.split
            self.handle(made.outcome(2, f"r{number}", first_token=True))

    def role(self, name: str) -> Role:
        return self.core.cluster.instances[name].info.role


def of(kind: type, commands: Iterable[Command]) -> list[Any]:
    return [command for command in commands if isinstance(command, kind)]


def test_a_standing_load_changes_a_role_once() -> None:
    """Three that prefill have nothing to do, the one that decodes is full: one of them decodes instead, and no more."""
    c = Cluster([P, P, P, D])
    c.fill_decode(4)
    said = c.wait(60 * SECOND_US)
    assert [(p.kind, p.instance_id, p.role) for p in of(RoleProposed, said)] == [("flip", "w0", D)]
    assert [(o.stream, o.instance_id, o.role) for o in of(ChangeRole, said)] == [(c.streams["w0"], "w0", D)]
    assert of(RoleChanged, said) == [RoleChanged("w0", D, P)] and of(RoleChangeEnded, said)[0].how == "done"
    assert c.role("w0") is D and not c.core.roles.changes and not c.core.roles.proposals
    placed = of(Placed, c.handle(made.place("later", max_tokens=900, policy="always_split")))[0]
    assert placed.prefill.instance_id in ("w1", "w2") and placed.decode.instance_id == "w0"


@pytest.mark.parametrize("config", [{"execute_roles": False}, {}])
def test_what_may_not_be_changed_is_only_proposed(config: dict[str, Any]) -> None:
    c = Cluster([P, P, P, D], changeable=() if not config else None, **config)
    c.fill_decode(4)
    said = c.wait(60 * SECOND_US)
    assert len(of(RoleProposed, said)) == 1 and not of(ChangeRole, said)
    why = blocked_for_plan(c.core, "w0", D)
    assert why == (
        "the scheduler does not execute its plans" if config else "it does not say that its role may be changed"
    )


def test_the_instance_that_may_be_changed_is_taken() -> None:
    c = Cluster([P, P, P, D], changeable=[1])
    c.fill_decode(4)
    assert [o.instance_id for o in of(ChangeRole, c.wait(30 * SECOND_US))] == ["w1"]


def test_one_that_decodes_for_all_shares_itself_when_prompts_pile_up() -> None:
    c = Cluster([P, D], kv_tokens_total=1 << 20)
    for number in range(40):
        c.handle(made.place(f"r{number}", prompt_tokens=4000, max_tokens=1, wait_us_max=600 * SECOND_US))
    said = c.wait(30 * SECOND_US)
    assert [(o.instance_id, o.role) for o in of(ChangeRole, said)] == [("w1", B)], c.core.roles.loads
    assert c.role("w1") is B


def test_who_waits_for_room_to_decode_does_not_make_prefill_look_busy() -> None:
    """One that decodes is full and many long prompts wait for it: those that prefill have nothing to do."""
    c = Cluster([P, P, P, D])
    c.fill_decode(4)
    for number in range(40):
        c.handle(made.place(f"w{number}", prompt_tokens=3000, max_tokens=900, wait_us_max=600 * SECOND_US))
    assert len(c.core.room.entries) == 40
    c.wait(12 * SECOND_US)
    load = c.core.roles.loads["tiny"]
    assert load.prefill < 0.2 < 0.8 < load.decode, load
    c.wait(8 * SECOND_US)
    assert c.role("w0") is D


def test_what_was_placed_before_is_finished() -> None:
    """A decode instance that is told to prefill keeps its requests; the change is over when they have ended."""
    c = Cluster([P, D, D])
    c.fill_decode(3)
    mine = [o[1] for o in c.core.book.decoding_on("w1")]
    assert mine and of(ChangeRole, c.order("w1", P))
    c.wait(2 * SECOND_US)
    change, instance = c.core.roles.changes["tiny"], c.core.cluster.instances["w1"]
    assert change.taken_us is not None and role_changes.drains(c.core, instance) == len(mine)
    placed = of(Placed, c.handle(made.place("later", policy="always_split")))[0]
    assert placed.decode.instance_id == "w2"
    for request in mine:
        assert not of(RoleChangeEnded, c.said)
        c.handle(made.outcome(2, request))
    assert of(RoleChangeEnded, c.said) == [RoleChangeEnded("w1", P, "done")]


def test_prefills_for_others_are_finished_too() -> None:
    c = Cluster([P, P, D])
    placed = of(Placed, c.handle(made.place("r", max_tokens=100, policy="always_split")))[0]
    name = placed.prefill.instance_id
    c.order(name, D)
    c.report(name)
    instance = c.core.cluster.instances[name]
    assert instance.info.role is D and role_changes.drains(c.core, instance) == 1 and c.core.roles.changes
    c.handle(made.outcome(2, "r", first_token=True))
    assert of(RoleChangeEnded, c.said) == [RoleChangeEnded(name, D, "done")]


def test_waiting_for_what_is_finished_has_an_end() -> None:
    c = Cluster([P, D, D])
    c.fill_decode(3)
    c.order("w1", P)
    said = c.wait(DRAIN_US_MAX + 5 * SECOND_US)
    ended = of(RoleChangeEnded, said)
    # Either the requests' own reservations ran out before, or the change stopped waiting for them.
    assert len(ended) == 1 and ended[0].how in ("done", "undrained") and c.role("w1") is P


@pytest.mark.parametrize(("roles", "name", "role", "why"), [
    ([P, D], "w1", P, "no other instance decodes"),
    ([P, D], "w0", D, "no other instance prefills"),
    ([P, D, D], "w9", P, "there is no instance 'w9'"),
    ([P, D, D], "w1", D, "it has that role"),
])  # fmt: skip
def test_an_order_that_would_hurt_is_refused(roles: list[Role], name: str, role: Role, why: str) -> None:
    c = Cluster(roles)
    assert c.order(name, role) == [RoleRefused(name, role, why)]
    assert not c.core.roles.changes


def test_one_change_at_a_time() -> None:
    c = Cluster([P, P, D, D])
    assert of(ChangeRole, c.order("w0", D))
    assert c.order("w2", P) == [RoleRefused("w2", P, "w0 of the same model is being changed")]
    c.wait(2 * SECOND_US)
    assert of(ChangeRole, c.order("w2", P)), "an operator need not wait for a rest"


def test_instances_that_can_not_hand_over_to_each_other_do_not_stand_in() -> None:
    c = Cluster([P, D])
    c.join("x", D, namespace_id=b"another")
    assert of(RoleRefused, c.order("w1", P))[0].why == "no other instance decodes"


def test_an_order_that_is_not_answered_is_given_up() -> None:
    c = Cluster([P, P, P, D])
    c.fill_decode(4)
    c.obey = False
    said = c.wait(60 * SECOND_US)
    assert len(of(ChangeRole, said)) == 1 and of(RoleChangeEnded, said) == [RoleChangeEnded("w0", D, "unanswered")]
    said = c.wait(REST_US + 30 * SECOND_US)
    assert all(o.instance_id != "w0" for o in of(ChangeRole, said)), "it is left alone for a while"


def test_an_instance_that_dies_in_the_middle() -> None:
    c = Cluster([P, P, D])
    c.order("w0", D)
    c.handle(events.InstanceLeft(c.streams.pop("w0")))
    assert of(RoleChangeEnded, c.said) == [RoleChangeEnded("w0", D, "gone")] and not c.core.roles.changes
    c.join("w0", P, epoch=2)
    assert c.role("w0") is P and not of(ChangeRole, c.wait(5 * SECOND_US))


def test_a_life_line_that_breaks_in_the_middle_does_not_lose_the_order() -> None:
    c = Cluster([P, D, D])
    c.fill_decode(3)
    live = dict(c.core.book.placements)
    c.order("w1", P)
    stream = c.join("w1", D)
    assert of(ChangeRole, c.said)[-1] == ChangeRole(stream, "w1", P)
    # It may as well have taken the role already when it comes back.
    c.join("w1", P)
    assert c.role("w1") is P and c.core.book.placements == live, "what is placed there goes on"


def test_a_role_that_a_peer_has_ordered_is_believed() -> None:
    c = Cluster([P, P, D])
    c.join("v", D, peer="other")
    assert c.order("v", P) == [RoleRefused("v", P, "its life line is at scheduler other")]
    c.roles["v"] = P
    c.report("v")
    assert c.role("v") is P and c.core.roles.resting["v"] == c.now_us + COOLDOWN_US


def test_of_several_schedulers_one_carries_out_plans() -> None:
    c = Cluster([P, P, P, D])
    c.join("a", P, peer="other")
    c.fill_decode(4)
    said = c.wait(60 * SECOND_US)
    assert len(of(RoleProposed, said)) == 1 and not of(ChangeRole, said)
    assert blocked_for_plan(c.core, "w0", D) == "scheduler other carries out plans for this model"


def test_a_share_is_asked_for_where_a_whole_one_can_not_be_spared() -> None:
    assert wish_of(PhaseLoad(0.95, SHARES - 0.01, 1, 1)) == ("flip", B)
    assert wish_of(PhaseLoad(0.95, SHARES + 0.01, 1, 1)) == ("add", P)
    assert wish_of(PhaseLoad(0.3, 0.95, 1, 1)) == ("flip", B)
    assert wish_of(PhaseLoad(0.95, 0.1, 3, 3)) == ("flip", P)


def test_a_load_is_measured_anew_by_those_that_are_there() -> None:
    """Work stays, instances change: half of the instances are twice as busy at the next look."""
    c = Cluster([P, P, P, P, D])
    load = PhaseLoad(0.4, 0.2, 4, 1, looks=20)
    c.core.roles.loads["tiny"] = load
    for name in ("w2", "w3"):
        c.handle(events.InstanceLeft(c.streams.pop(name)))
    c.wait(LOOK_US + SECOND_US)
    assert load.prefill == pytest.approx(0.8 * 5 / 6) and load.prefill_count == 2


def test_a_change_under_way_survives_a_checkpoint() -> None:
    c = Cluster([P, P, D])
    c.order("w0", D)
    state = codec.dumps(checkpoint.state_of(c.core))
    twin = checkpoint.core_of(codec.loads(state))
    assert twin.roles == c.core.roles
    event = made.reported(c.streams["w0"], role=D)
    assert twin.handle(event, c.now_us) == c.core.handle(event, c.now_us)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["load", "load", "wait", "wait", "wait", "order", "leave", "join", "own"]),
        st.integers(0, 4),
        st.sampled_from(Role),
        st.floats(0, 1.5),
        st.floats(0, 1.0),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(roles=st.lists(st.sampled_from(Role), min_size=2, max_size=5), steps=STEPS, obey=st.booleans())
def test_whatever_happens_no_phase_is_emptied_and_nothing_flaps(
    roles: list[Role], steps: list[tuple[str, int, Role, float, float]], obey: bool
) -> None:
    """Orders are checked against a plain account of who is there with which role, not against the core's."""
    c = Cluster(roles)
    c.obey = obey
    ordered_us: dict[str, int] = {}
    plans_us: list[int] = []

    def check(said: list[Command], by_plan: bool) -> None:
        for order in of(ChangeRole, said):
            others = [role for name, role in c.roles.items() if name in c.streams and name != order.instance_id]
            assert order.role is not D or any(role is not D for role in others)
            assert order.role is not P or any(role is not P for role in others)
            if by_plan:
                last_us = ordered_us.get(order.instance_id)
                assert last_us is None or c.now_us - last_us >= COOLDOWN_US
                plans_us.append(c.now_us)
            ordered_us[order.instance_id] = c.now_us

    for kind, number, role, prefill, decode in steps:
        name = f"w{number}"
        if kind == "wait":
            for _ in range(20):
                check(c.wait(SECOND_US), True)
        elif kind == "load" and "tiny" in c.core.roles.loads:
            load = c.core.roles.loads["tiny"]
            load.prefill, load.decode = prefill, decode
            load.asked, load.streak = wish_of(load), LOOKS_BEFORE
        elif kind == "order":
            check(c.order(name, role), False)
        elif kind == "leave" and name in c.streams and len(c.streams) > 1:
            c.handle(events.InstanceLeft(c.streams.pop(name)))
            del c.roles[name]
        elif kind == "join" and name not in c.streams:
            c.join(name, role, epoch=c.now_us + 2)
        elif kind == "own" and name in c.streams:
            c.roles[name] = role  # by its own decision
    assert all(later - sooner >= REST_US for sooner, later in pairwise(plans_us)), plans_us
    assert ANSWER_US_MAX < REST_US
