"""The scheduler as a function of state, event and time: events in, commands out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpool.core.directory import Directory
from kvpool.core.errors import Reason
from scheduler.core import admission, membership
from scheduler.core.cluster import Cluster
from scheduler.core.commands import Command, Placed, PlacementEnded, Refused, Target
from scheduler.core.config import SchedulerConfig
from scheduler.core.cost import CostBook
from scheduler.core.deadlines import Deadlines
from scheduler.core.events import Event, OutcomeReported, PlaceRequested, TimePassed
from scheduler.core.ledger import Candidate, Ledger, LedgerEntry
from scheduler.core.options import Appraiser, Option
from scheduler.core.placements import Owner, Placement, PlacementBook
from scheduler.core.policies import POLICIES, Policy
from scheduler.core.prefix import Prefix

#: Share of the old estimate that survives one more observed output length.
OUTPUT_SHARE_KEPT = 0.98
OUTPUT_SHARE_MIN = 0.01


class SchedulerCore:
    """Directory, cluster view, beliefs, placements and ledger, and the decisions made from them.

    Same configuration, same events at same times: same commands, bit for bit.
    """

    def __init__(self, config: SchedulerConfig, directory: Directory | None = None) -> None:
        self.config = config
        self.directory = directory or Directory()
        self.cluster = Cluster(config)
        self.costs = CostBook(config)
        self.book = PlacementBook()
        self.expiries = Deadlines()
        self.ledger = Ledger(config.ledger_entries_max)
        self.policies: dict[str, Policy] = {name: make(config) for name, make in POLICIES.items()}
        if config.policy not in self.policies:
            raise ValueError(f"policy {config.policy!r} is not one of {', '.join(self.policies)}")
        #: Model -> expected generated tokens as a share of max_tokens.
        self.output_shares: dict[str, float] = {}
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
        return commands

    def tick(self, now_us: int) -> list[Command]:
        return self.handle(TimePassed(), now_us)

    def next_deadline_us(self) -> int | None:
        """When `tick` is due at the latest."""
        times = [t for t in (self.cluster.deadlines.next_us(), self.expiries.next_us()) if t is not None]
        return min(times, default=None)

    def _run_deadlines(self, commands: list[Command]) -> None:
        while (key := self.expiries.pop_due(self.now_us)) is not None:
            self.end_placement((key[1], key[2]), "expired", commands)
        membership.run_deadlines(self, commands)

    # ------------------------------------------------------------ placements

    def _place(self, request: PlaceRequested, commands: list[Command]) -> None:
        name = request.policy or self.config.policy
        wrong = admission.bad_request(request, tuple(self.policies))
        if wrong:
            self._refuse(admission.refuse(request, Reason.BAD_ARGUMENT, wrong), commands)
            return
        # A request placed again has lost its first placement, whatever comes of the second.
        self.end_placement((request.gateway_id, request.request_id), "replaced", commands)
        options: list[Option] = []
        choice = self._decide(request, self.policies[name], options, commands)
        kept = options[: self.config.ledger_candidates_max]
        self.ledger.decided(
            LedgerEntry(
                request_id=request.request_id,
                gateway_id=request.gateway_id,
                policy=name,
                prompt_tokens=request.prompt_tokens,
                max_tokens=request.max_tokens,
                candidates=tuple(Candidate.of(option) for option in kept),
                candidates_total=len(options),
                choice=choice,
                placed_us=self.now_us,
                attempts=1,
            )
        )

    def _decide(
        self, request: PlaceRequested, policy: Policy, options: list[Option], commands: list[Command]
    ) -> Placed | Refused:
        """Places or refuses; `options` is filled with what was looked at, best first."""
        instances, none = admission.usable_instances(request, self.cluster, self.config)
        if none is None:
            none = admission.too_long(request, instances)
        if none is None and len(self.book.placements) >= self.config.placements_max:
            message = f"{self.config.placements_max} requests are under way"
            none = admission.refuse(request, Reason.OVERLOADED, message, admission.RETRY_DEFAULT_US)
        if none is not None:
            return self._refuse(none, commands)
        appraiser = self.appraiser(request, instances[0].block_tokens)
        ranked = policy.rank(appraiser, instances)
        best: Option | None = None
        for option in ranked:
            options.append(option)
            if option.feasible:
                best = option
                break
        if best is None:
            return self._refuse(admission.refusal(request, options, appraiser, self.config), commands)
        if isinstance(ranked, list):
            options.extend(ranked[len(options) :])
        options.remove(best)
        options.insert(0, best)
        policy.chosen(request, best)
        return self._open(request, best, appraiser, commands)

    def appraiser(self, request: PlaceRequested, block_tokens: int) -> Appraiser:
        """Predictions for a request as of now. Changes nothing."""
        share = self.output_shares.get(request.model, self.config.output_share)
        prefix = Prefix(request, block_tokens, self.directory, self.cluster, self.config.pull_sources_max)
        return Appraiser(request, prefix, self.cluster, self.book, self.costs, self.config, share, self.now_us)

    def _open(self, request: PlaceRequested, option: Option, appraiser: Appraiser, commands: list[Command]) -> Placed:
        """Reserves what an option needs and says so."""
        config, decode, prefill = self.config, option.decode, option.prefill
        start_us = option.ttft_us + option.handoff_us
        ttl_us = config.ttl_factor * (start_us + option.step_us * request.max_tokens)
        ttl_us = min(max(ttl_us, config.placement_ttl_us_min), config.placement_ttl_us_max)
        placement = Placement(
            owner=(request.gateway_id, request.request_id),
            model=request.model,
            max_tokens=request.max_tokens,
            prefill_id=prefill.id,
            decode_id=decode.id,
            split=option.split,
            kv_tokens=appraiser.kv_tokens_needed(decode),
            prefill_kv_tokens=appraiser.prefill_kv_tokens(prefill) if option.split else 0,
            prefill_holds=prefill.decodes(),
            prefill_us=option.prefill_us,
            context_tokens=appraiser.context_tokens,
            expected_tokens=appraiser.expected_tokens,
            placed_us=self.now_us,
            decode_ends_us=self.now_us + start_us + option.step_us * appraiser.expected_tokens,
            expires_us=self.now_us + ttl_us,
        )
        self.book.open(placement)
        self.expiries.set(("placement", *placement.owner), placement.expires_us)
        self.count("placements")
        if option.split:
            self.count("splits")
        info = prefill.info
        placed = Placed(
            request_id=request.request_id,
            gateway_id=request.gateway_id,
            prefill=Target(prefill.id, info.address, info.epoch),
            decode=Target(decode.id, decode.info.address, decode.info.epoch),
            split=option.split,
            pull=appraiser.prefix.runs(option.pull),
            cached_tokens=option.cached_tokens,
            predicted_ttft_us=option.ttft_us,
            handoff_source_id=info.node_source_id if option.split else "",
            handoff_address=self.cluster.sources[info.node_source_id].attached.address if option.split else "",
            ttl_ms=ttl_us // 1000,
        )
        commands.append(placed)
        return placed

    def _refuse(self, refused: Refused, commands: list[Command]) -> Refused:
        self.count("refusals")
        self.count(f"refused_{refused.reason.name.lower()}")
        commands.append(refused)
        return refused

    def end_placement(self, owner: Owner, why: str, commands: list[Command]) -> None:
        """Frees what a placement holds; does nothing if it has ended."""
        placement = self.book.end(owner, self.now_us)
        if placement is None:
            return
        self.expiries.discard(("placement", *owner))
        self.count(f"ended_{why}")
        commands.append(PlacementEnded(request_id=owner[1], gateway_id=owner[0], why=why))

    def _outcome(self, event: OutcomeReported, commands: list[Command]) -> None:
        gateway = self.cluster.gateway_of(event.stream)
        if gateway is None:
            return
        membership.gateway_seen(self, gateway, commands)
        owner = (gateway.opened.gateway_id, event.request_id)
        self.ledger.ended(owner[0], event)
        if event.first_token:
            self.book.finish_prefill(owner, self.now_us)
            return
        placement = self.book.placements.get(owner)
        if placement is not None and event.finish_reason in ("stop", "length"):
            self._learn_output(placement, event.tokens)
        self.end_placement(owner, "outcome", commands)

    def _learn_output(self, placement: Placement, tokens: int) -> None:
        share = min(max(tokens / placement.max_tokens, OUTPUT_SHARE_MIN), 1.0)
        before = self.output_shares.get(placement.model, self.config.output_share)
        self.output_shares[placement.model] = OUTPUT_SHARE_KEPT * before + (1 - OUTPUT_SHARE_KEPT) * share

    def _time_passed(self, event: TimePassed, commands: list[Command]) -> None:
        """Deadlines have been run; nothing else happens."""

    def count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    # ------------------------------------------------------------ checks

    def check_invariants(self) -> None:
        self.cluster.check_invariants()
        self.book.check_invariants()
        self.costs.check_invariants()
        self.ledger.check_invariants()
        self.expiries.check_invariants()
        assert len(self.expiries.live) == len(self.book.placements) <= self.config.placements_max
        for owner, placement in self.book.placements.items():
            assert self.expiries.live["placement", *owner] == placement.expires_us > self.now_us
            assert placement.decode_id in self.cluster.instances, "a placement outlived its decode instance"
        for instance_id, holdings in self.book.holdings.items():
            total = self.cluster.instances[instance_id].info.kv_tokens_total
            assert holdings.kv_tokens <= total, f"{instance_id} is overbooked"
        assert self.costs.prefill.keys() == self.cluster.instances.keys()
        attached = sorted(str(record.source_id) for record in self.directory.sources())
        assert attached == sorted(self.cluster.sources)
        opened = self.counts["placements"] - len(self.book.placements)
        assert opened == sum(n for name, n in self.counts.items() if name.startswith("ended_"))


Handler = Callable[[SchedulerCore, Any, list[Command]], None]

#: What each kind of event does; the whole of the core's behaviour starts here.
HANDLERS: dict[type, Handler] = {
    **membership.HANDLERS,
    PlaceRequested: SchedulerCore._place,
    OutcomeReported: SchedulerCore._outcome,
    TimePassed: SchedulerCore._time_passed,
}
