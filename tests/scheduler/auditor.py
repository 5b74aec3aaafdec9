"""An independent account of what a scheduler core promises, kept from its events and commands alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kvpool.core.ids import Role
from scheduler.core import events
from scheduler.core.commands import (
    ENDINGS,
    AcknowledgeSource,
    ChangeRole,
    CloseStream,
    Command,
    Placed,
    PlacementEnded,
    Refused,
)
from scheduler.core.config import SchedulerConfig

Owner = tuple[str, str]
#: Policies that ignore roles and never split.
UNAWARE = ("round_robin", "sticky", "random", "least_loaded")


@dataclass
class Member:
    began: events.InstanceJoined | events.SourceAttached | events.GatewayOpened
    seen_us: int
    draining: bool = False


def name_of(event: events.InstanceJoined | events.SourceAttached | events.GatewayOpened) -> str:
    if isinstance(event, events.InstanceJoined):
        return event.info.instance_id
    return event.source_id if isinstance(event, events.SourceAttached) else event.gateway_id


@dataclass
class Auditor:
    """Raises AssertionError as soon as a promise is broken."""

    config: SchedulerConfig
    streams: dict[int, Member] = field(default_factory=dict)
    live: dict[Owner, Placed] = field(default_factory=dict)
    #: Asked for and not answered: since when, and what.
    waiting: dict[Owner, tuple[int, events.PlaceRequested]] = field(default_factory=dict)
    kv_tokens: dict[Owner, int] = field(default_factory=dict)
    placed: int = 0
    ended: int = 0

    def _member(self, kind: type, name: str) -> Member | None:
        found = [m for m in self.streams.values() if isinstance(m.began, kind) and name_of(m.began) == name]
        assert len(found) <= 1, f"two life lines speak for {name}"
        return found[0] if found else None

    def _alive(self, member: Member | None, now_us: int) -> bool:
        return member is not None and now_us - member.seen_us < self.config.suspect_us

    def see(self, event: events.Event, now_us: int, commands: list[Command]) -> None:
        if isinstance(event, events.InstanceJoined | events.SourceAttached | events.GatewayOpened):
            self.streams[event.stream] = Member(event, now_us)
        stream = getattr(event, "stream", 0)
        if isinstance(event, events.SourceDetached | events.InstanceLeft | events.GatewayClosed):
            self.streams.pop(stream, None)
        elif stream in self.streams:
            self.streams[stream].seen_us = now_us
            if isinstance(event, events.InstanceReported):
                self.streams[stream].draining = event.draining
                self._role(stream, event.role)
        if isinstance(event, events.PlaceRequested):
            owner = (event.gateway_id, event.request_id)
            since_us = self.waiting.get(owner, (now_us, event))[0]
            self.waiting[owner] = since_us, event
        for command in commands:
            match command:
                case CloseStream():
                    self.streams.pop(command.stream, None)
                case AcknowledgeSource():
                    assert command.stream in self.streams, "an answer to somebody who is gone"
                case PlacementEnded():
                    self._end(command)
                case ChangeRole():
                    self._order(command)
                case Placed():
                    _, request = self.waiting.pop((command.gateway_id, command.request_id))
                    self._place(request, command, now_us)
                case Refused():
                    self.waiting.pop((command.gateway_id, command.request_id))
                    assert command.message, "a refusal without a reason"
        if isinstance(event, events.PlaceCancelled):
            assert (event.gateway_id, event.request_id) not in self.waiting
        for owner, placed in self.live.items():
            assert self._member(events.InstanceJoined, placed.decode.instance_id), f"{owner} outlived its instance"

    def _role(self, stream: int, role: Role | None) -> None:
        """From its report on an instance is given only what that role allows."""
        began = self.streams[stream].began
        if role is not None and isinstance(began, events.InstanceJoined):
            self.streams[stream].began = replace(began, info=replace(began.info, role=role))

    def check_waiting(self, now_us: int) -> None:
        """Only under policies that bind late does anybody wait, and nobody too long. Asked when nothing is due."""
        assert len(self.waiting) <= self.config.waiting_max
        for owner, (since_us, request) in self.waiting.items():
            assert (request.policy or self.config.policy) in self.config.late_binding, f"{owner} was not answered"
            patience_us = self.config.wait_us_max if request.wait_us_max is None else request.wait_us_max
            limit_us = request.ttft_slo_us or patience_us
            assert now_us < since_us + max(limit_us, 1), f"{owner} waits too long"

    def _order(self, command: ChangeRole) -> None:
        """Somebody else does what the role leaves to others."""
        told = self.streams[command.stream].began
        assert isinstance(told, events.InstanceJoined) and told.info.instance_id == command.instance_id
        assert told.info.role_changeable and told.info.role != command.role
        began = [m.began for m in self.streams.values() if isinstance(m.began, events.InstanceJoined)]
        others = [b.info for b in began if b is not told and b.info.model == told.info.model]
        assert command.role is Role.BOTH or any(other.role != command.role for other in others)

    def _end(self, command: PlacementEnded) -> None:
        owner = (command.gateway_id, command.request_id)
        assert owner in self.live, "a placement ended twice"
        assert command.why in ENDINGS
        del self.live[owner]
        del self.kv_tokens[owner]
        self.ended += 1

    def _place(self, request: events.PlaceRequested, placed: Placed, now_us: int) -> None:
        owner = (request.gateway_id, request.request_id)
        assert (placed.gateway_id, placed.request_id) == owner
        assert owner not in self.live, "placed twice"
        for target in (placed.prefill, placed.decode):
            member = self._member(events.InstanceJoined, target.instance_id)
            assert self._alive(member, now_us), f"placed on {target.instance_id}, which is not alive"
            assert member is not None and isinstance(member.began, events.InstanceJoined)
            assert not member.draining and member.began.info.model == request.model
            assert (member.began.info.epoch, member.began.info.address) == (target.epoch, target.address)
        self._check_split(request, placed, now_us)
        self._check_reuse(request, placed, now_us)
        self.live[owner] = placed
        tokens = request.prompt_tokens + request.max_tokens
        member = self._member(events.InstanceJoined, placed.decode.instance_id)
        assert member is not None and isinstance(member.began, events.InstanceJoined)
        block = member.began.info.namespace.groups[0].block_tokens
        self.kv_tokens[owner] = -(-tokens // block) * block
        held = sum(self.kv_tokens[o] for o, p in self.live.items() if p.decode.instance_id == placed.decode.instance_id)
        assert held <= member.began.info.kv_tokens_total, "overbooked"
        self.placed += 1

    def _check_split(self, request: events.PlaceRequested, placed: Placed, now_us: int) -> None:
        assert placed.split == (placed.prefill != placed.decode)
        assert bool(placed.handoff_source_id) == bool(placed.handoff_address) == placed.split
        policy = request.policy or self.config.policy
        if placed.split:
            assert request.use_pool
            node = self._member(events.SourceAttached, placed.handoff_source_id)
            assert self._alive(node, now_us), "handed over through a source that is not alive"
            assert node is not None and isinstance(node.began, events.SourceAttached)
            assert node.began.address == placed.handoff_address
            assert policy not in UNAWARE
        if policy not in UNAWARE:
            decode = self._member(events.InstanceJoined, placed.decode.instance_id)
            assert decode is not None and isinstance(decode.began, events.InstanceJoined)
            assert decode.began.info.role != Role.PREFILL

    def _check_reuse(self, request: events.PlaceRequested, placed: Placed, now_us: int) -> None:
        assert 0 <= placed.cached_tokens < request.prompt_tokens, "nothing is left to compute"
        assert request.use_pool or not placed.pull
        for run in placed.pull:
            assert run.count > 0 and run.address
            source = self._member(events.SourceAttached, run.source_id)
            assert self._alive(source, now_us), "pulled from a source that is not alive"
            assert source is not None and isinstance(source.began, events.SourceAttached)
            assert source.began.address == run.address
