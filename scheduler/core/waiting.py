"""Requests that wait in the scheduler for a place: in which order, for what, and how long at most. Pure.

A request is bound to an instance late: not when it comes, but when an instance can soon begin with it. Until then it
holds nothing but a plan, which those behind it in the order reckon with.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import TypeAlias

from scheduler.core.config import SchedulerConfig
from scheduler.core.deadlines import Deadlines
from scheduler.core.events import PlaceRequested
from scheduler.core.placements import Owner

#: Place in a line: virtual start less what priority is worth, and a number that breaks ties. The least is first.
Order: TypeAlias = tuple[int, int]

TENANT_WEIGHT_MIN = 1e-3
TENANT_WEIGHT_MAX = 1e6
PRIORITY_MAX = 100


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a waiting request goes as things are, and what it takes there."""

    prefill_id: str
    prefill_us: int
    decode_id: str
    kv_tokens: int
    #: The placement whose blocks it waits for, if it does.
    awaits: Owner | None = None

    def instances(self) -> tuple[str, ...]:
        """Where it takes something."""
        return (self.prefill_id,) if self.prefill_id == self.decode_id else (self.prefill_id, self.decode_id)


@dataclass(slots=True)
class Waiting:
    """One request in the room. It is answered at `deadline_us` at the latest."""

    request: PlaceRequested
    start_us: int  # virtual
    order: Order
    arrived_us: int
    deadline_us: int
    plan: Plan

    @property
    def owner(self) -> Owner:
        return self.request.gateway_id, self.request.request_id


@dataclass(slots=True)
class Lane:
    """What waiting requests are going to take of one instance, in their order."""

    entries: list[tuple[int, int, int]] = field(default_factory=list)  # (order, order, amount), sorted
    total: int = 0

    def add(self, order: Order, amount: int) -> None:
        insort(self.entries, (*order, amount))
        self.total += amount

    def remove(self, order: Order, amount: int) -> None:
        index = bisect_left(self.entries, (*order, amount))
        assert self.entries[index] == (*order, amount)
        del self.entries[index]
        self.total -= amount

    def ahead(self, order: Order) -> int:
        """Amounts of those before a place in the order. Cost: O(1) behind all of them, else O(those before)."""
        if not self.entries or self.entries[-1][:2] < order:
            return self.total
        amount = 0
        for first, second, taken in self.entries:
            if (first, second) >= order:
                break
            amount += taken
        return amount


@dataclass(slots=True)
class Line:
    """The waiting requests of one model, by virtual start: start-time fair queueing over tenants.

    A request starts, virtually, when its tenant's last one is done or now, whichever is later; it is done after its
    predicted service over the tenant's weight. Priority moves the start ahead by a fixed amount a step. So each tenant
    gets its share of service while others wait, priorities overtake, and nobody starves: virtual time moves on with
    each request served, and those that come later start later.
    Source: Goyal, Vin, Cheng, Start-time Fair Queueing, SIGCOMM'96.
    """

    virtual_us: int = 0
    #: Tenant -> when its last request is done, virtually; those whose time has passed need no entry.
    done_us: dict[str, int] = field(default_factory=dict)
    order: list[tuple[int, int, Owner]] = field(default_factory=list)
    #: Instance -> prefill microseconds, and KV tokens, that waiting requests are going to take.
    prefill_us: dict[str, Lane] = field(default_factory=dict)
    kv_tokens: dict[str, Lane] = field(default_factory=dict)
    #: Instance -> who plans to prefill or to decode there, in order.
    planned: dict[str, list[tuple[int, int, Owner]]] = field(default_factory=dict)
    #: Instance -> whose turn it is among those behind the first.
    turns: dict[str, int] = field(default_factory=dict)

    def start_us(self, tenant: str) -> int:
        return max(self.virtual_us, self.done_us.get(tenant, 0))

    def prefill_us_ahead(self, instance_id: str, order: Order) -> int:
        lane = self.prefill_us.get(instance_id)
        return lane.ahead(order) if lane is not None else 0

    def kv_tokens_ahead(self, instance_id: str, order: Order) -> int:
        lane = self.kv_tokens.get(instance_id)
        return lane.ahead(order) if lane is not None else 0


def charged_us(request: PlaceRequested, service_us: int) -> int:
    """Virtual time that service takes of a request's tenant."""
    weight = min(max(request.tenant_weight, TENANT_WEIGHT_MIN), TENANT_WEIGHT_MAX)
    return max(int(service_us / weight), 1)


@dataclass(slots=True)
class WaitingRoom:
    """All who wait, by owner, by gateway, and in one line a model; at most `config.waiting_max`."""

    config: SchedulerConfig
    entries: dict[Owner, Waiting] = field(default_factory=dict)
    by_gateway: dict[str, dict[Owner, None]] = field(default_factory=dict)
    lines: dict[str, Line] = field(default_factory=dict)
    #: Placement whose blocks are waited for -> who waits for them.
    awaiting: dict[Owner, dict[Owner, None]] = field(default_factory=dict)
    #: ("waiting", gateway, request): answered at the latest; ("line", model, instance): those who plan to go there are
    #: worth another look.
    deadlines: Deadlines = field(default_factory=Deadlines)
    number: int = 0

    # ------------------------------------------------------------ order

    def place_in_order(self, request: PlaceRequested, instances: int) -> tuple[int, Order]:
        """Virtual start and order of a newcomer. Its line need not exist. Takes a number, nothing else.

        Args:
            instances: how many serve the model: a step of priority is worth the same time however many there are.
        """
        line = self.lines.get(request.model)
        start_us = line.start_us(request.tenant) if line is not None else 0
        priority = min(max(request.priority, -PRIORITY_MAX), PRIORITY_MAX)
        self.number += 1
        return start_us, (start_us - priority * self.config.priority_step_us * max(instances, 1), self.number)

    def charge(self, request: PlaceRequested, start_us: int, service_us: int) -> None:
        """Puts a request that waits, or is placed at once, on its tenant's account."""
        line = self.lines.setdefault(request.model, Line())
        line.done_us.pop(request.tenant, None)
        line.done_us[request.tenant] = start_us + charged_us(request, service_us)
        if len(line.done_us) > self.config.tenants_max:
            line.done_us = {t: us for t, us in line.done_us.items() if us > line.virtual_us}
        while len(line.done_us) > self.config.tenants_max:
            del line.done_us[next(iter(line.done_us))]

    def served(self, model: str, start_us: int) -> None:
        """Moves virtual time on: a request with this start has got its place."""
        line = self.lines[model]
        line.virtual_us = max(line.virtual_us, start_us)

    def last(self, model: str) -> Waiting | None:
        line = self.lines.get(model)
        return self.entries[line.order[-1][2]] if line is not None and line.order else None

    # ------------------------------------------------------------ in and out

    @property
    def full(self) -> bool:
        return len(self.entries) >= self.config.waiting_max

    def add(self, waiting: Waiting) -> None:
        owner = waiting.owner
        assert owner not in self.entries and not self.full
        self.entries[owner] = waiting
        self.by_gateway.setdefault(owner[0], {})[owner] = None
        insort(self.lines[waiting.request.model].order, (*waiting.order, owner))
        self.deadlines.set(("waiting", *owner), waiting.deadline_us)
        self._reckon(waiting)

    def remove(self, owner: Owner) -> Waiting | None:
        """Takes a request out; None if it does not wait."""
        waiting = self.entries.pop(owner, None)
        if waiting is None:
            return None
        of_gateway = self.by_gateway[owner[0]]
        del of_gateway[owner]
        if not of_gateway:
            del self.by_gateway[owner[0]]
        model = waiting.request.model
        order = self.lines[model].order
        del order[bisect_left(order, (*waiting.order, owner))]
        self.deadlines.discard(("waiting", *owner))
        self._unreckon(waiting)
        return waiting

    def replan(self, waiting: Waiting, plan: Plan) -> None:
        if plan != waiting.plan:
            self._unreckon(waiting)
            waiting.plan = plan
            self._reckon(waiting)

    def _reckon(self, waiting: Waiting) -> None:
        line, plan = self.lines[waiting.request.model], waiting.plan
        line.prefill_us.setdefault(plan.prefill_id, Lane()).add(waiting.order, plan.prefill_us)
        line.kv_tokens.setdefault(plan.decode_id, Lane()).add(waiting.order, plan.kv_tokens)
        for instance_id in plan.instances():
            insort(line.planned.setdefault(instance_id, []), (*waiting.order, waiting.owner))
        if plan.awaits is not None:
            self.awaiting.setdefault(plan.awaits, {})[waiting.owner] = None

    def _unreckon(self, waiting: Waiting) -> None:
        line, plan = self.lines[waiting.request.model], waiting.plan
        for lanes, instance_id, amount in (
            (line.prefill_us, plan.prefill_id, plan.prefill_us),
            (line.kv_tokens, plan.decode_id, plan.kv_tokens),
        ):
            lanes[instance_id].remove(waiting.order, amount)
            if not lanes[instance_id].entries:
                del lanes[instance_id]
        for instance_id in plan.instances():
            planned = line.planned[instance_id]
            del planned[bisect_left(planned, (*waiting.order, waiting.owner))]
            if not planned:
                del line.planned[instance_id]
                line.turns.pop(instance_id, None)
        if plan.awaits is not None:
            awaiting = self.awaiting[plan.awaits]
            del awaiting[waiting.owner]
            if not awaiting:
                del self.awaiting[plan.awaits]

    # ------------------------------------------------------------ who is next

    def whose_turn(self, model: str, instance_id: str, count: int) -> list[Owner]:
        """The first of those who plan to go to an instance, and one of the others, each in its turn."""
        line = self.lines.get(model)
        planned = line.planned.get(instance_id, []) if line is not None else []
        chosen = planned[:count]
        if line is not None and len(planned) > count:
            at = line.turns.get(instance_id, 0) % (len(planned) - count)
            line.turns[instance_id] = at + 1
            chosen.append(planned[count + at])
        return [owner for _, _, owner in chosen]

    def first(self, model: str, count: int) -> list[Owner]:
        line = self.lines.get(model)
        return [owner for _, _, owner in line.order[:count]] if line is not None else []

    def planned_on(self, model: str, instance_id: str) -> int:
        line = self.lines.get(model)
        return len(line.planned.get(instance_id, ())) if line is not None else 0

    def named(self, request_id: str) -> Waiting | None:
        """A request that waits, whichever gateway sent it. Cost: O(gateways)."""
        for gateway_id in self.by_gateway:
            if (gateway_id, request_id) in self.entries:
                return self.entries[gateway_id, request_id]
        return None

    def look_again(self, model: str, instance_id: str, at_us: int) -> None:
        """Sets when those who plan to go to an instance are worth another look; an earlier time stays."""
        key = ("line", model, instance_id)
        known_us = self.deadlines.live.get(key)
        if known_us is None or at_us < known_us:
            self.deadlines.set(key, at_us)

    def left(self, model: str, plan: Plan, at_us: int) -> None:
        """Somebody has another plan than this one, or none: those behind may fit where it would have gone."""
        for instance_id in plan.instances():
            if self.planned_on(model, instance_id):
                self.look_again(model, instance_id, at_us)

    def of_gateway(self, gateway_id: str) -> tuple[Owner, ...]:
        return tuple(self.by_gateway.get(gateway_id, ()))

    def forget_model(self, model: str) -> None:
        """Drops a line nobody stands in; tenants' accounts go with it."""
        line = self.lines.get(model)
        if line is not None and not line.order:
            del self.lines[model]

    # ------------------------------------------------------------ checks

    def check_invariants(self) -> None:
        assert len(self.entries) <= self.config.waiting_max
        assert sum(len(owners) for owners in self.by_gateway.values()) == len(self.entries)
        recount = WaitingRoom(self.config)
        for model, line in self.lines.items():
            assert len(line.done_us) <= self.config.tenants_max
            assert line.order == sorted(line.order)
            assert line.turns.keys() <= line.planned.keys()
            recount.lines[model] = Line(line.virtual_us, line.done_us, turns=line.turns)
        for owner, waiting in self.entries.items():
            assert owner == waiting.owner and owner in self.by_gateway[owner[0]]
            assert self.deadlines.live["waiting", *owner] == waiting.deadline_us
            insort(recount.lines[waiting.request.model].order, (*waiting.order, owner))
            recount._reckon(waiting)
        assert recount.lines == self.lines, "plans are off"
        assert recount.awaiting.keys() == self.awaiting.keys()
        for awaited, owners in self.awaiting.items():
            assert owners.keys() == recount.awaiting[awaited].keys()
        for kind, *rest in self.deadlines.live:
            assert kind == "line" or tuple(rest) in self.entries
        self.deadlines.check_invariants()
