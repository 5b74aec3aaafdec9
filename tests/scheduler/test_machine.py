"""The scheduler core under arbitrary events: promises, determinism, and a checkpoint at any moment."""

from __future__ import annotations

import scheduler_events as made
from auditor import Auditor, name_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvpool.core.ids import Fidelity, Role, Tier
from scheduler.core import checkpoint, events
from scheduler.core.commands import ChangeRole, Command
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.core.policies import POLICIES
from scheduler.service import codec

HOUR_US = 3_600_000_000
CONFIG = SchedulerConfig(
    placements_max=12,
    placement_ttl_us_min=3_000_000,
    ttl_factor=0,
    ledger_entries_max=5,
    sticky_keys_max=3,
    links_max=4,
    models_seen_max=2,
    pull_sources_max=2,
    waiting_max=6,
    waiting_scan_max=3,
    wait_us_max=2_000_000,
    reserve_after_us=300_000,
    horizon_us_min=50_000,
    horizon_prefills=1.0,
    pending_max=5,
    tenants_max=3,
)
INSTANCES, NODES, GATEWAYS = ("w0", "w1", "w2", "w3"), ("node-0", "node-1"), ("gw", "gw2")
SOURCES = (*NODES, *(f"{i}-hbm" for i in INSTANCES))
BLOCKS = ("a0..a3", "a4..a15", "a0..a15", "b0..b7", "b2..b9", "c0")
PROMPTS = ("", "a0..a15", "b0..b9", "a0..a3,b0..b7", "c0")


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.core = SchedulerCore(CONFIG)
        self.auditor = Auditor(CONFIG)
        self.now_us = 0
        self.stream = 0
        self.epoch = 1
        self.seqs: dict[int, int] = {}
        self.record: list[tuple[events.Event, int, list[Command]]] = []

    def submit(self, event: events.Event) -> None:
        """Takes what is left over as the shell does: at once, as long as something is due."""
        self._submit(event)
        while (at_us := self.core.next_deadline_us()) is not None and at_us <= self.now_us:
            self._submit(events.TimePassed())
        self.auditor.check_waiting(self.now_us)

    def _submit(self, event: events.Event) -> None:
        commands = self.core.handle(event, self.now_us)
        self.record.append((event, self.now_us, commands))
        self.core.check_invariants()
        self.auditor.see(event, self.now_us, commands)
        assert self.auditor.live.keys() == self.core.book.placements.keys()
        assert self.auditor.waiting.keys() == self.core.room.entries.keys()

    def _new_stream(self) -> int:
        self.stream += 1
        return self.stream

    def _streams(self, kind: type) -> list[int]:
        return [s for s, member in self.auditor.streams.items() if isinstance(member.began, kind)]

    def _draw_stream(self, data: st.DataObject, kind: type) -> int | None:
        streams = self._streams(kind)
        return data.draw(st.sampled_from(streams)) if streams else None

    # ------------------------------------------------------------ members

    @initialize()
    def some_are_there(self) -> None:
        for node in NODES:
            self.submit(made.attached(self._new_stream(), node))
            self.submit(made.snapshot(self.stream, 0, "a0..a7"))
        for name, role in zip(INSTANCES, (Role.BOTH, Role.PREFILL, Role.DECODE, Role.DECODE), strict=True):
            self.submit(made.joined(self._new_stream(), name, role=role, kv_tokens_total=4096))
            self.submit(made.attached(self._new_stream(), f"{name}-hbm", tier=Tier.HBM, address=""))
            self.submit(made.snapshot(self.stream, 0, ""))
        for gateway in GATEWAYS:
            self.submit(events.GatewayOpened(self._new_stream(), gateway))

    @rule(
        name=st.sampled_from(INSTANCES),
        role=st.sampled_from(Role),
        model=st.sampled_from(["tiny", "tiny", "tiny", "other"]),
        kv_blocks=st.integers(1, 40),
        batch=st.integers(1, 4),
        node=st.sampled_from(["node-0", "node-0", "node-1", ""]),
        older=st.booleans(),
    )
    def join(self, name: str, role: Role, model: str, kv_blocks: int, batch: int, node: str, older: bool) -> None:
        self.epoch += 1
        self.submit(
            made.joined(
                self._new_stream(),
                name,
                role=role,
                model=model,
                kv_tokens_total=kv_blocks * made.BLOCK_TOKENS,
                batch_max=batch,
                role_changeable=batch > 1,
                node_source_id=node,
                epoch=0 if older else self.epoch,
            )
        )

    @rule(name=st.sampled_from(SOURCES), host=st.sampled_from(["host-0", "host-1"]), address=st.booleans())
    def attach(self, name: str, host: str, address: bool) -> None:
        self.epoch += 1
        tier = Tier.HBM if name.endswith("hbm") else Tier.DRAM
        self.submit(
            made.attached(
                self._new_stream(),
                name,
                epoch=self.epoch,
                tier=tier,
                host_id=host,
                address=f"{name}:1" if address else "",
            )
        )

    @rule(name=st.sampled_from(GATEWAYS))
    def open_gateway(self, name: str) -> None:
        self.submit(events.GatewayOpened(self._new_stream(), name))

    @rule(data=st.data())
    def end_stream(self, data: st.DataObject) -> None:
        streams = list(self.auditor.streams)
        if not streams:
            return
        stream = data.draw(st.sampled_from(streams))
        began = self.auditor.streams[stream].began
        if isinstance(began, events.InstanceJoined):
            self.submit(events.InstanceLeft(stream))
        elif isinstance(began, events.SourceAttached):
            self.submit(events.SourceDetached(stream))
        else:
            self.submit(events.GatewayClosed(stream))

    # ------------------------------------------------------------ what they say

    @rule(data=st.data(), blocks=st.sampled_from(BLOCKS), kind=st.sampled_from(["stored", "removed", "snapshot"]))
    def change_blocks(self, data: st.DataObject, blocks: str, kind: str) -> None:
        stream = self._draw_stream(data, events.SourceAttached)
        if stream is None:
            return
        if kind == "snapshot":
            part = data.draw(st.sampled_from([0, 0, 0, 1]))
            last = data.draw(st.sampled_from([True, True, True, False]))
            self.submit(made.snapshot(stream, self.seqs.get(stream, 0), blocks, part=part, last=last))
            return
        self.seqs[stream] = self.seqs.get(stream, 0) + data.draw(st.sampled_from([1, 1, 1, 1, 2]))
        make = made.stored if kind == "stored" else made.removed
        self.submit(make(stream, self.seqs[stream], blocks))

    @rule(
        data=st.data(),
        numbers=st.lists(st.integers(0, 5_000) | st.integers(0, 1 << 33), min_size=4, max_size=4),
        failed=st.booleans(),
    )
    def report(self, data: st.DataObject, numbers: list[int], failed: bool) -> None:
        stream = self._draw_stream(data, events.InstanceJoined)
        if stream is None:
            return
        new, cached, us, free = numbers
        running = [owner[1] for owner in self.auditor.live]
        self.submit(
            made.reported(
                stream,
                running=data.draw(st.integers(0, 5)),
                waiting=data.draw(st.integers(0, 5)),
                kv_tokens_free=data.draw(st.sampled_from([0, 640, 2048, 4096, 4096, free])),
                prefill=(events.PrefillSample(new, cached, us),),
                decode=(events.DecodeSample(new % 100, cached, us),),
                links=(events.LinkSample(data.draw(st.sampled_from(SOURCES)), new, us, failed, 1),),
                finished_prefills=tuple(running[:1]) if data.draw(st.booleans()) else (),
                draining=data.draw(st.integers(0, 7)) == 7,
                role=data.draw(st.sampled_from([None, None, None, *Role])),
            )
        )

    @rule(name=st.sampled_from(INSTANCES), role=st.sampled_from(Role), obeys=st.booleans())
    def order_a_role(self, name: str, role: Role, obeys: bool) -> None:
        self.submit(events.RoleOrdered(name, role))
        orders = [c for c in self.record[-1][2] if isinstance(c, ChangeRole)]
        for order in orders if obeys else ():
            self.submit(made.reported(order.stream, role=order.role, kv_tokens_free=4096))

    @rule()
    def all_show_life(self) -> None:
        self.time_passes(1_000_000)
        for stream, member in list(self.auditor.streams.items()):
            if isinstance(member.began, events.InstanceJoined):
                free = member.began.info.kv_tokens_total
                self.submit(made.reported(stream, kv_tokens_free=free))
            elif isinstance(member.began, events.SourceAttached):
                self.submit(events.SourceHeartbeat(stream, 1, 1))
            else:
                self.submit(events.GatewayHeartbeat(stream, 1))

    # ------------------------------------------------------------ requests

    @rule(
        request=st.sampled_from([f"r{i}" for i in range(20)]),
        gateway=st.sampled_from([*GATEWAYS, "unknown"]),
        count=st.integers(1, 4),
        prompt_tokens=st.integers(1, 1100),
        max_tokens=st.integers(1, 900),
        blocks=st.sampled_from(PROMPTS),
        policy=st.sampled_from(["", "", *POLICIES]),
        use_pool=st.booleans(),
        slo=st.sampled_from([(0, 0), (0, 0), (150_000, 0), (0, 25_000)]),
        sticky=st.sampled_from(["", "x", "y", "z", "u"]),
        exclude=st.sampled_from([(), ("w0",), ("w0", "w1")]),
        model=st.sampled_from(["tiny", "tiny", "tiny", "other"]),
        priority=st.sampled_from([0, 0, 1, -1, 5]),
        tenant=st.sampled_from(["", "a", "b", "c", "d"]),
        wait_us_max=st.sampled_from([None, None, 0, 700_000, 10_000_000]),
    )
    def place(
        self,
        request: str,
        gateway: str,
        count: int,
        prompt_tokens: int,
        max_tokens: int,
        blocks: str,
        policy: str,
        use_pool: bool,
        slo: tuple[int, int],
        sticky: str,
        exclude: tuple[str, ...],
        model: str,
        priority: int,
        tenant: str,
        wait_us_max: int | None,
    ) -> None:
        for number in range(count):
            self.submit(
                made.place(
                    f"{request}.{number}",
                    gateway_id=gateway,
                    prompt_tokens=prompt_tokens,
                    max_tokens=max_tokens,
                    blocks=blocks,
                    policy=policy,
                    use_pool=use_pool,
                    ttft_slo_us=slo[0],
                    tpot_slo_us=slo[1],
                    sticky_key=sticky,
                    exclude_instances=exclude,
                    model=model,
                    fidelity_min=Fidelity.EXACT,
                    priority=priority,
                    tenant=tenant,
                    tenant_weight=2.0 if tenant == "a" else 1.0,
                    wait_us_max=wait_us_max,
                )
            )

    @rule(data=st.data(), number=st.integers(0, 19))
    def cancel(self, data: st.DataObject, number: int) -> None:
        known = list(self.auditor.waiting) or [("gw", f"r{number}.0")]
        gateway, request = data.draw(st.sampled_from(known))
        self.submit(events.PlaceCancelled(request, gateway))

    @precondition(lambda self: self.auditor.live)
    @rule(data=st.data(), first=st.booleans(), tokens=st.integers(0, 1000), reason=st.sampled_from(["stop", "error"]))
    def outcome(self, data: st.DataObject, first: bool, tokens: int, reason: str) -> None:
        stream = self._draw_stream(data, events.GatewayOpened)
        if stream is None:
            return
        gateway = name_of(self.auditor.streams[stream].began)
        mine = [owner for owner in self.auditor.live if owner[0] == gateway]
        if not mine:
            return
        owner = data.draw(st.sampled_from(mine))
        self.submit(made.outcome(stream, owner[1], first_token=first, tokens=tokens, finish_reason=reason))
        assert first == (owner in self.auditor.live)

    # ------------------------------------------------------------ time and state

    @rule(duration_us=st.sampled_from([1, 50_000, 400_000, 1_000_000, 2_500_000, 16_000_000]))
    def time_passes(self, duration_us: int) -> None:
        until_us = self.now_us + duration_us
        while (at_us := self.core.next_deadline_us()) is not None and at_us <= until_us:
            self.now_us = at_us
            self.submit(events.TimePassed())
        self.now_us = until_us

    @rule()
    def go_on_from_a_checkpoint(self) -> None:
        """The restored core must behave as the first would have: the whole record is replayed in `teardown`."""
        if checkpoint.unsynced_streams(self.core):
            return
        ledger = self.core.ledger
        self.core = checkpoint.core_of(codec.loads(codec.dumps(checkpoint.state_of(self.core))))
        self.core.ledger = ledger

    def teardown(self) -> None:
        for stream, member in list(self.auditor.streams.items()):
            if isinstance(member.began, events.GatewayOpened):
                self.submit(events.GatewayClosed(stream))
        assert not [o for o in self.auditor.live if self.auditor._member(events.GatewayOpened, o[0])]
        assert not [o for o in self.auditor.waiting if self.auditor._member(events.GatewayOpened, o[0])]
        self.time_passes(HOUR_US + 1)
        assert not self.auditor.waiting and not self.core.room.entries and not self.core.room.awaiting
        assert not self.auditor.live and self.auditor.placed == self.auditor.ended
        assert not self.core.book.placements and not self.core.book.holdings and not self.core.cluster.streams
        assert self.core.directory.counts().replicas == 0
        assert self.core.next_deadline_us() is None
        again = SchedulerCore(CONFIG)
        for event, now_us, commands in self.record:
            assert again.handle(event, now_us) == commands


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
