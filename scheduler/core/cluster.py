"""Who is there: instances, sources and gateways, each by its life line, with suspicion and incarnation. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from kvpool.core.ids import Role
from scheduler.core.config import SchedulerConfig
from scheduler.core.deadlines import DeadlineKey, Deadlines
from scheduler.core.events import GatewayOpened, InstanceInfo, InstanceJoined, InstanceReported, SourceAttached


class State(StrEnum):
    """Of something with a life line. What is gone is forgotten and has no state."""

    ALIVE = "alive"
    SUSPECT = "suspect"


@dataclass(slots=True)
class Instance:
    info: InstanceInfo
    stream: int
    seen_us: int
    state: State = State.ALIVE
    draining: bool = False
    running: int = 0
    waiting: int = 0
    kv_tokens_free: int = 0  # as reported
    kv_tokens_foreign: int = 0  # used by requests that no placement accounts for; see `fit_foreign`
    peer: str = ""  # scheduler that has its life line; empty = this one
    #: Of `info`, kept since they are asked for a hundred times a placement.
    id: str = field(init=False)
    block_tokens: int = field(init=False)
    block_bytes: int = field(init=False)  # of all groups and shards
    tokens_max: int = field(init=False)  # prompt and generated tokens that one request may have

    def __post_init__(self) -> None:
        self.take_info(self.info)

    def take_info(self, info: InstanceInfo) -> None:
        """What the instance says of itself; its id never changes."""
        self.info, self.id = info, info.instance_id
        self.block_tokens = info.namespace.groups[0].block_tokens
        self.block_bytes = sum(group.block_bytes * group.shard_count for group in info.namespace.groups)
        whole = info.kv_tokens_total // self.block_tokens * self.block_tokens
        self.tokens_max = min(info.context_tokens_max, whole)

    def prefills(self) -> bool:
        return self.info.role != Role.DECODE

    def decodes(self) -> bool:
        return self.info.role != Role.PREFILL

    def fit_foreign(self, held: int, held_settled: int) -> None:
        """Corrects the estimate of foreign KV tokens by a report.

        A report counts some of the placements on the way to the instance and not others. If it counts all, the rest
        of what is used is foreign; if it counts only those old enough to have arrived, a larger rest is. The truth
        lies between, and the last estimate is moved no further than it must. With no foreign load it stays zero,
        and after a restart of the scheduler it begins with all that runs and falls as that ends.

        Args:
            held: KV tokens that all placements on the instance use or will.
            held_settled: of those old enough to be counted in the report.
        """
        used = max(self.info.kv_tokens_total - self.kv_tokens_free, 0)
        lower, upper = max(used - held, 0), max(used - held_settled, 0)
        self.kv_tokens_foreign = min(max(self.kv_tokens_foreign, lower), upper)

    def kv_tokens_available(self, held: int) -> int:
        """What may still be placed: capacity less what placements hold and what others use."""
        return max(self.info.kv_tokens_total - held - self.kv_tokens_foreign, 0)


@dataclass(slots=True)
class Source:
    attached: SourceAttached
    seen_us: int
    state: State = State.ALIVE
    bytes_used: int = 0
    seq: int = 0
    gaps: int = 0
    awaits_snapshot: bool = True
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = self.attached.source_id

    @property
    def readable(self) -> bool:
        """Whether plans may have blocks pulled from it."""
        return self.state is State.ALIVE and self.attached.address != ""


@dataclass(slots=True)
class Gateway:
    opened: GatewayOpened
    seen_us: int
    state: State = State.ALIVE
    active_requests: int = 0


@dataclass(slots=True)
class Cluster:
    """Instances, sources and gateways by id, and the one life line that speaks for each.

    A newer life line of the same id takes over from an older one; messages of a life line that no longer speaks for
    anybody are ignored.
    """

    config: SchedulerConfig
    instances: dict[str, Instance] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    gateways: dict[str, Gateway] = field(default_factory=dict)
    #: Life line -> (kind, id) for which it speaks.
    streams: dict[int, tuple[str, str]] = field(default_factory=dict)
    #: Ids of a model's instances, sorted: the order in which options are looked at.
    by_model: dict[str, list[str]] = field(default_factory=dict)
    models_seen: dict[str, None] = field(default_factory=dict)
    deadlines: Deadlines = field(default_factory=Deadlines)
    #: Grows whenever somebody comes, goes, or changes state: what is derived from the members is made anew then.
    version: int = 0
    #: Whether other schedulers can be heard, and with them the members whose life lines they have.
    log_up: bool = True

    # ------------------------------------------------------------ life lines

    def add_instance(self, event: InstanceJoined, now_us: int) -> bool:
        """False if there is no room. The caller has removed an instance of the same id before."""
        info = event.info
        assert info.instance_id not in self.instances
        if len(self.instances) >= self.config.instances_max:
            return False
        self.instances[info.instance_id] = Instance(
            info, event.stream, now_us, kv_tokens_free=info.kv_tokens_total, peer=event.peer
        )
        of_model = self.by_model.setdefault(info.model, [])
        of_model.append(info.instance_id)
        of_model.sort()
        self.models_seen.pop(info.model, None)
        self.models_seen[info.model] = None
        self._speaks(event.stream, "instance", info.instance_id, now_us)
        return True

    def instance_moved(self, event: InstanceJoined) -> None:
        """The process of a known instance speaks by another life line now."""
        self.version += 1
        instance = self.instances[event.info.instance_id]
        del self.streams[instance.stream]
        assert event.info.instance_id == instance.id
        instance.take_info(event.info)
        instance.stream, instance.peer = event.stream, event.peer
        self.streams[event.stream] = ("instance", instance.id)

    def add_source(self, event: SourceAttached, now_us: int) -> bool:
        """False if there is no room. The caller has removed a source of the same id before."""
        assert event.source_id not in self.sources
        if len(self.sources) >= self.config.sources_max:
            return False
        self.sources[event.source_id] = Source(event, now_us)
        self._speaks(event.stream, "source", event.source_id, now_us)
        return True

    def add_gateway(self, event: GatewayOpened, now_us: int) -> bool:
        """False if there is no room. The caller has removed a gateway of the same id before."""
        assert event.gateway_id not in self.gateways
        if len(self.gateways) >= self.config.gateways_max:
            return False
        self.gateways[event.gateway_id] = Gateway(event, now_us)
        self._speaks(event.stream, "gateway", event.gateway_id, now_us)
        return True

    def _speaks(self, stream: int, kind: str, member_id: str, now_us: int) -> None:
        self.version += 1
        self.streams[stream] = (kind, member_id)
        self.deadlines.set((kind, member_id), now_us + self.config.suspect_us)

    def member(self, kind: str, member_id: str) -> Instance | Source | Gateway | None:
        if kind == "instance":
            return self.instances.get(member_id)
        return self.sources.get(member_id) if kind == "source" else self.gateways.get(member_id)

    def instance_of(self, stream: int) -> Instance | None:
        kind, member_id = self.streams.get(stream, ("", ""))
        return self.instances[member_id] if kind == "instance" else None

    def source_of(self, stream: int) -> Source | None:
        kind, member_id = self.streams.get(stream, ("", ""))
        return self.sources[member_id] if kind == "source" else None

    def gateway_of(self, stream: int) -> Gateway | None:
        kind, member_id = self.streams.get(stream, ("", ""))
        return self.gateways[member_id] if kind == "gateway" else None

    def stream_of(self, kind: str, member_id: str) -> int | None:
        if kind == "instance":
            instance = self.instances.get(member_id)
            return None if instance is None else instance.stream
        if kind == "source":
            source = self.sources.get(member_id)
            return None if source is None else source.attached.stream
        gateway = self.gateways.get(member_id)
        return None if gateway is None else gateway.opened.stream

    def peer_of(self, kind: str, member_id: str) -> str:
        """The scheduler that has the life line of a member; empty for this one."""
        if kind == "instance":
            return self.instances[member_id].peer
        return self.sources[member_id].attached.peer if kind == "source" else ""

    def remove(self, kind: str, member_id: str) -> None:
        """Forgets an instance, source or gateway and its life line."""
        self.version += 1
        stream = self.stream_of(kind, member_id)
        assert stream is not None
        del self.streams[stream]
        self.deadlines.discard((kind, member_id))
        if kind == "instance":
            model = self.instances.pop(member_id).info.model
            self.by_model[model].remove(member_id)
            if not self.by_model[model]:
                del self.by_model[model]
        elif kind == "source":
            del self.sources[member_id]
        else:
            del self.gateways[member_id]

    # ------------------------------------------------------------ signs of life

    def seen(self, member: Instance | Source | Gateway, key: DeadlineKey, now_us: int) -> bool:
        """Notes a sign of life; True if that ended a suspicion."""
        member.seen_us = now_us
        self.deadlines.set(key, now_us + self.config.suspect_us)
        if member.state is State.ALIVE:
            return False
        member.state = State.ALIVE
        self.version += 1
        return True

    def silent(self, key: DeadlineKey, now_us: int) -> State | None:
        """What somebody whose deadline has passed is now: suspect, or None for gone."""
        kind, member_id = key
        member = self.member(kind, member_id)
        assert member is not None
        unheard = not self.log_up and self.peer_of(kind, member_id) != ""
        gone_at_us = member.seen_us + (self.config.log_down_us_max if unheard else self.config.gone_us)
        if now_us >= gone_at_us:
            return None
        member.state = State.SUSPECT
        self.version += 1
        self.deadlines.set(key, gone_at_us)
        return State.SUSPECT

    def take_report(self, instance: Instance, event: InstanceReported) -> None:
        self.version += instance.draining != event.draining
        instance.running, instance.waiting = event.running, event.waiting
        instance.kv_tokens_free = min(event.kv_tokens_free, instance.info.kv_tokens_total)
        instance.draining = event.draining

    def forgotten_models(self) -> list[str]:
        """Drops the names seen longest ago beyond the bound, and returns them. Models with instances stay."""
        dropped = []
        for model in list(self.models_seen):
            if len(self.models_seen) <= self.config.models_seen_max:
                break
            if model not in self.by_model:
                del self.models_seen[model]
                dropped.append(model)
        return dropped

    def check_invariants(self) -> None:
        assert len(self.instances) <= self.config.instances_max
        assert len(self.sources) <= self.config.sources_max
        assert len(self.gateways) <= self.config.gateways_max
        members = len(self.instances) + len(self.sources) + len(self.gateways)
        assert len(self.streams) == members == len(self.deadlines.live)
        for stream, (kind, member_id) in self.streams.items():
            assert self.stream_of(kind, member_id) == stream
            assert (kind, member_id) in self.deadlines.live
        listed = 0
        for model, ids in self.by_model.items():
            assert ids == sorted(ids) and ids
            assert all(self.instances[i].info.model == model for i in ids)
            listed += len(ids)
        assert listed == len(self.instances)
        for instance in self.instances.values():
            assert 0 <= instance.kv_tokens_foreign <= instance.info.kv_tokens_total
            assert instance == replace(instance), "what is kept of its description is not what that says"
        self.deadlines.check_invariants()
