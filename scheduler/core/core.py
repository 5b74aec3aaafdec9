"""The scheduler as a function of state, event and time: events in, commands out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpool.core.directory import Directory, DirectoryConfig
from scheduler.core import looking, membership, placing, replication, role_changes, roles
from scheduler.core.arrivals import ArrivalRate
from scheduler.core.calibration import Calibration, TtftParts, model_correction
from scheduler.core.cluster import Cluster
from scheduler.core.commands import Command, PlacementEnded
from scheduler.core.config import SchedulerConfig
from scheduler.core.cost import CostBook
from scheduler.core.deadlines import Deadlines
from scheduler.core.events import Event, OutcomeReported, PlaceCancelled, PlaceRequested, RoleOrdered, TimePassed
from scheduler.core.fleet import Fleet
from scheduler.core.holders import Sources
from scheduler.core.ledger import Ledger
from scheduler.core.options import Appraiser
from scheduler.core.outputs import OutputLengths
from scheduler.core.pending import PendingBook
from scheduler.core.placements import Owner, Placement, PlacementBook
from scheduler.core.policies import POLICIES, Policy
from scheduler.core.promises import PromiseBook
from scheduler.core.robust import RobustFit
from scheduler.core.waiting import WaitingRoom


class SchedulerCore:
    """Directory, cluster view, beliefs, placements and ledger, and the decisions made from them.

    Same configuration, same events at same times: same commands, bit for bit.
    """

    def __init__(self, config: SchedulerConfig, directory: Directory | None = None) -> None:
        self.config = config
        self.directory = directory or Directory(DirectoryConfig(sources_max=config.sources_max))
        self.cluster = Cluster(config)
        self.costs = CostBook(config)
        self.book = PlacementBook()
        self.expiries = Deadlines()
        self.room = WaitingRoom(config)
        self.pending = PendingBook(config.pending_max)
        self.promises = PromiseBook(config.promises_max)
        #: Model -> how many requests come of late.
        self.arrivals: dict[str, ArrivalRate] = {}
        #: Instance -> what predictions for it were worth.
        self.calibrations: dict[str, Calibration] = {}
        #: Model -> what predictions of TTFT were off by on all its instances.
        self.corrections: dict[str, RobustFit] = {}
        self.roles = roles.RoleBook()
        #: Columns over sources, and over the instances of each model; made anew where they are stale.
        self._sources: Sources | None = None
        self._fleets: dict[str, Fleet] = {}
        self.ledger = Ledger(config.ledger_entries_max)
        self.policies: dict[str, Policy] = {name: make(config) for name, make in POLICIES.items()}
        if config.policy not in self.policies:
            raise ValueError(f"policy {config.policy!r} is not one of {', '.join(self.policies)}")
        #: Model -> expected generated tokens as a share of max_tokens.
        self.outputs: dict[str, OutputLengths] = {}
        #: Since the core was made: "placements", "refusals", "splits", one "refused_*" a reason, one "ended_*" a cause.
        self.counts: dict[str, int] = {"placements": 0, "refusals": 0, "splits": 0}
        self.now_us = 0

    def handle(self, event: Event, now_us: int) -> list[Command]:
        """Takes in one fact. Deadlines that have passed by `now_us` come first."""
        assert now_us >= self.now_us, "time runs backwards"
        self.now_us = now_us
        commands: list[Command] = []
        self._run_deadlines(commands)
        HANDLERS[type(event)](self, event, commands)
        self._run_news(commands)
        roles.look(self, commands)
        return commands

    def tick(self, now_us: int) -> list[Command]:
        return self.handle(TimePassed(), now_us)

    def next_deadline_us(self) -> int | None:
        """When `tick` is due at the latest."""
        deadlines = (self.cluster.deadlines, self.expiries, self.room.deadlines)
        times = [max(t, self.now_us) for t in (d.next_us() for d in deadlines) if t is not None]
        return min(times, default=None)

    def _run_deadlines(self, commands: list[Command]) -> None:
        while (key := self.expiries.pop_due(self.now_us)) is not None:
            self.end_placement((key[1], key[2]), "expired", commands)
        membership.run_deadlines(self, commands)
        looking.run_deadlines(self, commands)

    def _run_news(self, commands: list[Command]) -> None:
        """Lets those who wait profit from what has got free."""
        freed, finished = self.book.take_news()
        for owner in finished:
            self.pending.finish(owner, self.now_us)
        if freed or finished:
            looking.news(self, freed, finished, commands)
            freed, finished = self.book.take_news()
            assert not freed and not finished, "placing a request frees nothing"

    # ------------------------------------------------------------ placements

    def appraiser(self, request: PlaceRequested, block_tokens: int) -> Appraiser:
        """Predictions for a request as of now. Changes nothing."""
        return placing.appraiser_of(self, request, block_tokens)

    def sources_now(self) -> Sources:
        if self._sources is None or self._sources.version != self.cluster.version:
            self._sources = Sources(self.directory, self.cluster)
        return self._sources

    def fleet_now(self, model: str) -> Fleet:
        """Columns of a model's instances, up to date."""
        for instance_id in self.book.touched:
            instance = self.cluster.instances.get(instance_id)
            of_model = self._fleets.get(instance.info.model) if instance is not None else None
            if of_model is not None:
                of_model.touch(instance_id)
        self.book.touched.clear()
        fleet = self._fleets.get(model)
        if fleet is None or fleet.version != self.cluster.version:
            self._fleets = {name: known for name, known in self._fleets.items() if name in self.cluster.by_model}
            fleet = self._fleets[model] = Fleet(model, self.cluster, self.cluster.version)
        fleet.refresh(self.book, self.costs)
        return fleet

    def end_placement(self, owner: Owner, why: str, commands: list[Command]) -> None:
        """Frees what a placement holds; does nothing if it has ended."""
        known = self.book.placements.get(owner)
        finished = known is not None and known.prefill_done
        placement = self.book.end(owner, self.now_us)
        if placement is None:
            return
        self.expiries.discard(("placement", *owner))
        if why != "outcome" and not finished:
            self.pending.drop(owner)
        if placement.peer:
            self.count("peer_ended")
            return
        self.count(f"ended_{why}")
        commands.append(PlacementEnded(request_id=owner[1], gateway_id=owner[0], why=why))

    def _outcome(self, event: OutcomeReported, commands: list[Command]) -> None:
        gateway = self.cluster.gateway_of(event.stream)
        if gateway is None:
            return
        membership.gateway_seen(self, gateway, commands)
        owner = (gateway.opened.gateway_id, event.request_id)
        self.ledger.ended(owner[0], event)
        self._learn_from(owner, event)
        if event.first_token:
            self.book.finish_prefill(owner, self.now_us)
            return
        placement = self.book.placements.get(owner)
        if placement is not None and event.finish_reason in ("stop", "length"):
            self._learn_output(placement, event.tokens)
        elif placement is not None and not placement.prefill_done:
            self.pending.drop(owner)
        self.end_placement(owner, "outcome", commands)

    def _learn_from(self, owner: Owner, event: OutcomeReported) -> None:
        """Compares what was predicted with the first token's story, once."""
        placement = self.book.placements.get(owner)
        if placement is None or placement.compared or placement.peer or not event.ttft_us:
            return  # what a peer predicted is not known here
        if placement.prefill_id not in self.cluster.instances:
            return
        placement.compared = True
        known = self.calibrations.setdefault(placement.prefill_id, Calibration())
        of_model = self.corrections.setdefault(placement.model, model_correction())
        parts = TtftParts(placement.waited_us, placement.queue_us, placement.pull_us + placement.prefill_us)
        known.observe_ttft(placement.announced_us, parts, self._drift(placement), event.ttft_us, self.now_us, of_model)
        known.prefill.observe(placement.prefill_us, event.prefill.prefill_us)
        if placement.pull_us:
            known.pull.observe(placement.pull_us, event.prefill.pull_us)

    def _drift(self, placement: Placement) -> float:
        """What a prefill is predicted to take by now, over what it was when it was placed."""
        new_tokens = placement.prompt_tokens - placement.cached_tokens
        prefill_us = self.costs.prefill_us(placement.prefill_id, new_tokens, placement.cached_tokens)
        return max(prefill_us, 1) / max(placement.prefill_us, 1)

    def _learn_output(self, placement: Placement, tokens: int) -> None:
        known = self.outputs.setdefault(placement.model, OutputLengths(self.config.output_share))
        known.ended(tokens, placement.max_tokens)

    def _time_passed(self, event: TimePassed, commands: list[Command]) -> None:
        """Deadlines have been run; nothing else happens."""

    def count(self, name: str, by: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + by

    # ------------------------------------------------------------ checks

    def check_invariants(self) -> None:
        self.cluster.check_invariants()
        self.book.check_invariants()
        self.costs.check_invariants()
        self.ledger.check_invariants()
        self.expiries.check_invariants()
        self.room.check_invariants()
        self.pending.check_invariants()
        self.promises.check_invariants()
        role_changes.check_invariants(self)
        assert not self.book.freed and not self.book.finished
        assert all(model in self.cluster.models_seen for model in (*self.arrivals, *self.corrections))
        assert all(instance_id in self.cluster.instances for instance_id in self.calibrations)
        assert not any(owner in self.book.placements for owner in self.room.entries), "placed and waiting"
        assert all(p.instance_id in self.cluster.instances for p in self.pending.prompts.values())
        assert len(self.expiries.live) == len(self.book.placements) <= self.config.placements_max
        for owner, placement in self.book.placements.items():
            assert self.expiries.live["placement", *owner] == placement.expires_us > self.now_us
            assert placement.decode_id in self.cluster.instances, "a placement outlived its decode instance"
        for instance_id, holdings in self.book.holdings.items():
            total = self.cluster.instances[instance_id].info.kv_tokens_total
            # Several schedulers that decide at the same moment may promise more than there is.
            overbooked = holdings.kv_tokens > total and not self.counts.get("peer_placements")
            assert not overbooked, f"{instance_id} is overbooked"
        assert all(instance_id in self.cluster.instances for instance_id in self.book.stalling)
        assert self.costs.prefill.keys() == self.cluster.instances.keys()
        attached = sorted(str(record.source_id) for record in self.directory.sources())
        assert attached == sorted(self.cluster.sources)
        peers = sum(placement.peer != "" for placement in self.book.placements.values())
        opened = self.counts["placements"] + peers - len(self.book.placements)
        assert opened == sum(n for name, n in self.counts.items() if name.startswith("ended_"))
        assert self.counts.get("peer_placements", 0) - peers == self.counts.get("peer_ended", 0)


Handler = Callable[[SchedulerCore, Any, list[Command]], None]

#: What each kind of event does; the whole of the core's behaviour starts here.
HANDLERS: dict[type, Handler] = {
    **membership.HANDLERS,
    **replication.HANDLERS,
    PlaceRequested: placing.place,
    PlaceCancelled: placing.cancelled,
    OutcomeReported: SchedulerCore._outcome,
    RoleOrdered: role_changes.ordered,
    TimePassed: SchedulerCore._time_passed,
}
