"""What each way to serve a request would cost: the numbers that policies choose by and the ledger keeps. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.core import handoffs, loads, objectives, sharing
from scheduler.core.calibration import Calibration
from scheduler.core.cluster import Cluster, Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.cost import CostBook
from scheduler.core.events import PlaceRequested
from scheduler.core.fleet import Fleet
from scheduler.core.loads import Load
from scheduler.core.outputs import OutputLengths
from scheduler.core.pending import PendingPrompt
from scheduler.core.placements import Owner, PlacementBook
from scheduler.core.prefix import Prefix, Pull
from scheduler.core.promises import Ahead
from scheduler.core.waiting import Line, Order

#: Why an option can't be taken; the start of its `reason`. The order is that of refusals: the last met is the closest.
NO_HANDOFF, TOO_LONG, NO_CAPACITY, SLOW = handoffs.NO_HANDOFF, "context", "capacity", "SLO"
#: By how much of its prefill, and of time, a request may be held up to learn what a kind of link can do.
TRIAL_SHARE, TRIAL_US = 0.1, 100_000


@dataclass(slots=True)
class Option:
    """One way to serve a request, with its predicted cost."""

    prefill: Instance
    decode: Instance
    split: bool
    pull: Pull | None
    cached_tokens: int
    queue_us: int
    pull_us: int
    prefill_us: int
    handoff_us: int
    harm_us: int  # by which running decodes are held up, unweighted
    step_us: int  # a decode step with this request in the batch
    cost_us: int  # what is minimised
    kv_tokens_left: int  # on the decode instance with this request placed; below zero = does not fit
    reason: str = ""  # why it is not feasible
    waited_us: int = 0  # so far
    announced_us: int = 0  # TTFT from arrival, corrected by what predictions have been worth
    awaits: Owner | None = None  # the placement whose blocks this option counts on
    interval_us: int = 0  # that it makes where others decode, at most
    gap_us: int = 0  # between the first token and the second, by links that were measured, or else are tried
    handoff_guessed: bool = False  # nobody has measured a link of the kind that blocks are pulled over

    @property
    def feasible(self) -> bool:
        return not self.reason

    @property
    def service_us(self) -> int:
        """From the first block pulled to the first token."""
        return self.pull_us + self.prefill_us

    @property
    def ttft_us(self) -> int:
        """From now to the first token, as the sum of its parts: what options are compared by."""
        return self.queue_us + self.pull_us + self.prefill_us

    @property
    def order(self) -> tuple[int, str, str]:
        """Cheapest first; ids break ties."""
        return self.cost_us, self.prefill.id, self.decode.id


@dataclass(slots=True)
class Prospect:
    """What one instance would need to prefill this request."""

    own_blocks: int
    pull: Pull | None
    cached_tokens: int
    queue_us: int
    pull_us: int
    prefill_us: int
    awaits: Owner | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a request stands: since when it is here, and who is before it."""

    arrived_us: int
    order: Order
    #: Those who wait for the same model.
    line: Line | None
    #: Prompts under way that share a prefix with it, and how many blocks.
    pending: Sequence[tuple[PendingPrompt, int]] = ()
    #: Requests a second and instance that are expected to come.
    arrivals_per_s: float = 0.0
    #: What others were told to come back for, who go before it.
    promised: Ahead | None = None


class Appraiser:
    """Predicts the cost of options for one request at one time. Changes nothing."""

    def __init__(
        self,
        request: PlaceRequested,
        prefix: Prefix,
        cluster: Cluster,
        book: PlacementBook,
        costs: CostBook,
        config: SchedulerConfig,
        outputs: OutputLengths,
        now_us: int,
        standing: Standing | None = None,
        calibrations: dict[str, Calibration] | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        self.request, self.prefix, self.now_us = request, prefix, now_us
        self.cluster, self.book, self.costs, self.config = cluster, book, costs, config
        self.standing = standing or Standing(now_us, (0, 0), None)
        self._calibrations = calibrations or {}
        self.fleet = fleet
        self.expected_tokens = outputs.expected(request.max_tokens)
        self.typical_tokens = outputs.typical(request.max_tokens)
        self.context_tokens = request.prompt_tokens + self.expected_tokens // 2
        self.covered = prefix.covered()
        for _, shared in self.standing.pending:
            self.covered = max(self.covered, min(shared, prefix.usable))
        self._prospects: dict[str, Prospect] = {}
        self._loads: dict[str, Load] = {}

    # ------------------------------------------------------------ one instance

    def bound_us(self, instance: Instance) -> int:
        """What prefill on an instance costs at least: as if all blocks that anybody holds were there at no cost.

        Harm to what decodes there is counted in, harm where this request is decoded is not.
        """
        prefill_us = self.prefill_us(instance, self.covered)
        harm_us = prefill_us * self.load(instance).batch
        queue_us = self.queue_us(instance)
        ttft_us = int(priced_us(queue_us + prefill_us, self.request.ttft_slo_us, self.config.slack_price))
        return ttft_us + int(self.config.harm_weight * harm_us) + self.delay_us(queue_us, prefill_us)

    def delay_us(self, queue_us: int, work_us: int) -> int:
        """By how much those who come while an instance is busy are held up by this request's work, weighted.

        They are as many as come, at the present rate, until the instance has done all that it has. So computing what
        could be reused costs nothing extra on an idle cluster, and more and more on a busy one.
        """
        busy_s = (queue_us + work_us) / 1e6
        return int(self.config.delay_weight * (self.standing.arrivals_per_s * busy_s) * work_us)

    def prospect(self, instance: Instance) -> Prospect:
        """Prefill on an instance: own blocks are reused, more are pulled if that is predicted to beat computing."""
        known = self._prospects.get(instance.id)
        if known is None:
            known = self._prospects[instance.id] = self._appraise(instance)
        return known

    def _appraise(self, instance: Instance) -> Prospect:
        own = self.prefix.own_blocks(instance.info.hbm_source_id)
        prefill_us = self.prefill_us(instance, own)
        best: Pull | None = None
        best_us, best_prefill_us = prefill_us, prefill_us
        if self.request.use_pool:
            pulls = self.prefix.pulls(instance, own, self.costs, self.now_us)
            for pull in pulls:
                with_pull_us = self.prefill_us(instance, pull.reach)
                if pull.duration_us + with_pull_us < best_us:
                    best, best_us, best_prefill_us = pull, pull.duration_us + with_pull_us, with_pull_us
            trials = self.prefix.trials(pulls, instance, own, self.costs, self.now_us) if best is None else ()
            for tried in trials:
                with_pull_us = self.prefill_us(instance, tried.reach)
                if tried.duration_us + with_pull_us < (1 + TRIAL_SHARE) * prefill_us + TRIAL_US:
                    best, best_prefill_us = tried, with_pull_us
                    break
        now = self._prospect(instance, own, best, best_prefill_us)
        return sharing.with_pending(self, instance, now) if self.standing.pending else now

    def prospect_with(self, instance: Instance, blocks: int) -> Prospect:
        """Prefill on an instance that pulls up to `blocks`, or as near as sources allow, whatever it costs."""
        own = self.prefix.own_blocks(instance.info.hbm_source_id)
        best: Pull | None = None
        if self.request.use_pool and blocks > own:
            for pull in self.prefix.pulls(instance, own, self.costs, self.now_us):
                if best is None or pull.reach <= blocks:
                    best = pull
        return self._prospect(instance, own, best, self.prefill_us(instance, best.reach if best else own))

    def prospect_from(self, instance: Instance, source_ids: Sequence[str]) -> Prospect:
        """Prefill on an instance that pulls all it can from these sources and nothing from others, whatever it costs.

        At each block the first of them that has it is taken.
        """
        own = self.prefix.own_blocks(instance.info.hbm_source_id)
        pull = None
        if self.request.use_pool:
            pull = self.prefix.pull_from(instance, own, source_ids, self.costs, self.now_us)
        return self._prospect(instance, own, pull, self.prefill_us(instance, pull.reach if pull else own))

    def _prospect(self, instance: Instance, own: int, pull: Pull | None, prefill_us: int) -> Prospect:
        blocks = pull.reach if pull else own
        return Prospect(
            own_blocks=own,
            pull=pull,
            cached_tokens=blocks * self.prefix.block_tokens,
            queue_us=self.queue_us(instance),
            pull_us=pull.duration_us if pull else 0,
            prefill_us=prefill_us,
        )

    def prefill_us(self, instance: Instance, cached_blocks: int) -> int:
        cached_tokens = cached_blocks * self.prefix.block_tokens
        return self.costs.prefill_us(instance.id, self.request.prompt_tokens - cached_tokens, cached_tokens)

    def slow_cost_us(self, instance: Instance) -> int:
        """What decoding on an instance adds to an option's cost at least."""
        return int(self.config.harm_weight * self.load(instance).slow_us)

    def queue_us(self, instance: Instance) -> int:
        """Predicted prefill work before this request: placed and not finished, and waiting ones nobody placed."""
        holdings = self.book.on(instance.id)
        foreign = instance.waiting - len(holdings.queue) - len(holdings.decoding)
        queue_us = holdings.queue_left_us(self.now_us) + self._ahead_us(instance)
        if foreign > 0:
            queue_us += foreign * self.costs.prefill_us(instance.id, self.request.prompt_tokens, 0)
        return queue_us

    def _ahead_us(self, instance: Instance) -> int:
        """Prefill work of those who wait before this request and plan to go there."""
        standing = self.standing
        return standing.line.prefill_us_ahead(instance.id, standing.order) if standing.line is not None else 0

    def prefill_count(self) -> int:
        """Instances of the model that prompts are computed on: those that only decode are a last resort."""
        if self.fleet is None:
            return 1
        return int(self.fleet.prefills.sum()) or len(self.fleet.instances)

    def load(self, instance: Instance) -> Load:
        known = self._loads.get(instance.id)
        if known is None:
            known = self._loads[instance.id] = loads.measure(
                instance, self.book, self.costs, self.context_tokens, self.expected_tokens
            )
        return known

    def kv_tokens_left(self, instance: Instance) -> int:
        """Free KV tokens with this request placed there; below zero if it does not fit behind those before it."""
        held = self.book.on(instance.id).kv_tokens
        return instance.kv_tokens_available(held) - self.kv_tokens_ahead(instance) - self.kv_tokens_needed(instance)

    def kv_tokens_ahead(self, instance: Instance) -> int:
        """KV tokens kept free there for those who wait before this request."""
        standing = self.standing
        return standing.line.kv_tokens_ahead(instance.id, standing.order) if standing.line is not None else 0

    def kv_tokens_needed(self, instance: Instance) -> int:
        return whole_blocks(self.request.prompt_tokens + self.request.max_tokens, instance.block_tokens)

    def prefill_kv_tokens(self, instance: Instance) -> int:
        """What the prompt alone needs."""
        return whole_blocks(self.request.prompt_tokens, instance.block_tokens)

    # ------------------------------------------------------------ options

    def colocated(self, instance: Instance, prospect: Prospect | None = None) -> Option:
        """Prefill and decode on one instance: its running decodes are held up by all of the prefill."""
        p = prospect or self.prospect(instance)
        load = self.load(instance)
        return self._finish(
            Option(
                prefill=instance,
                decode=instance,
                split=False,
                pull=p.pull,
                cached_tokens=p.cached_tokens,
                queue_us=p.queue_us + load.wait_us,
                pull_us=p.pull_us,
                prefill_us=p.prefill_us,
                handoff_us=0,
                harm_us=p.prefill_us * load.batch + load.slow_us,
                step_us=load.step_with_us,
                cost_us=0,
                kv_tokens_left=self.kv_tokens_left(instance),
                awaits=p.awaits,
            )
        )

    def split(self, prefill: Instance, decode: Instance, prospect: Prospect | None = None) -> Option:
        """Prefill on one instance, decode on another, the blocks going through the prefill instance's node."""
        p = prospect or self.prospect(prefill)
        load = self.load(decode)
        handoff, reason = handoffs.handoff(self, prefill, decode, p)
        return self._finish(
            Option(
                prefill=prefill,
                decode=decode,
                split=True,
                pull=p.pull,
                cached_tokens=p.cached_tokens,
                queue_us=p.queue_us,
                pull_us=p.pull_us,
                prefill_us=p.prefill_us,
                handoff_us=handoff.left_us + load.wait_us,
                harm_us=p.prefill_us * self.load(prefill).batch + load.slow_us,
                step_us=load.step_with_us,
                cost_us=0,
                kv_tokens_left=self.kv_tokens_left(decode),
                reason=reason,
                awaits=p.awaits,
                gap_us=handoff.gap_us + load.wait_us,
                handoff_guessed=handoff.guessed,
            )
        )

    def handoff_obstacle(self, prefill: Instance, decode: Instance) -> str:
        """Why blocks can't go from one instance to the other; empty if they can."""
        return handoffs.obstacle(self, prefill, decode)

    def _finish(self, option: Option) -> Option:
        """Adds up the cost and finds out whether the option is feasible."""
        request = self.request
        option.waited_us = self.now_us - self.standing.arrived_us
        left_us = self.corrected_us(option.prefill.id, option.queue_us, option.service_us)
        option.announced_us = option.waited_us + left_us
        option.cost_us = int(priced_us(option.ttft_us, request.ttft_slo_us, self.config.slack_price))
        option.cost_us += option.handoff_us + int(self.config.harm_weight * option.harm_us)
        option.cost_us += self.delay_us(option.queue_us, option.prefill_us)
        begin_us = self.now_us + option.ttft_us
        option.interval_us = objectives.interval_us(self, option)
        broken = objectives.broken(self, option, 0)
        option.cost_us += int(self.config.broken_us * broken)
        if option.reason:
            return option
        decode, tokens = option.decode, request.prompt_tokens + request.max_tokens
        limit = decode.tokens_max
        if tokens > limit:
            option.reason = f"{TOO_LONG}: {tokens} tokens, the limit of {decode.id} is {limit}"
        elif request.prompt_tokens > option.prefill.tokens_max:
            option.reason = (
                f"{TOO_LONG}: a prompt of {request.prompt_tokens} tokens is too long for {option.prefill.id}"
            )
        elif option.kv_tokens_left < 0:
            option.reason = f"{NO_CAPACITY}: {-option.kv_tokens_left} KV tokens too few on {decode.id}"
        elif option.split and self.prefill_room(option) < 0:
            option.reason = f"{NO_CAPACITY}: {-self.prefill_room(option)} KV tokens too few on {option.prefill.id}"
        elif request.ttft_slo_us and option.announced_us > request.ttft_slo_us:
            option.reason = f"{SLOW}: TTFT {option.announced_us} us, the limit is {request.ttft_slo_us}"
        elif (ttft_us := self._behind_promised_us(option)) > request.ttft_slo_us:
            option.reason = (
                f"{SLOW}: TTFT {ttft_us} us behind those who were told to come back, the limit is {request.ttft_slo_us}"
            )
        elif request.tpot_slo_us and (step_us := objectives.peak_step_us(self, option, begin_us)) > request.tpot_slo_us:
            option.reason = f"{SLOW}: TPOT {step_us} us, the limit is {request.tpot_slo_us}"
        elif broken > self.config.broken_max:
            option.reason = f"{SLOW}: TPOT of requests that {option.prefill.id} or {option.decode.id} decode already"
        return option

    def _behind_promised_us(self, option: Option) -> int:
        """TTFT of an option if all who were told to come, and go before it, come. Zero if there are none."""
        promised_us = self.promised_us(option.queue_us)
        if not promised_us:
            return 0
        left_us = self.corrected_us(option.prefill.id, option.queue_us + promised_us, option.service_us)
        return option.waited_us + left_us

    def promised_us(self, queue_us: int) -> int:
        """Prefill work on each instance of those who were told to come, and go before this request."""
        promised = self.standing.promised
        return promised.work_before_us(queue_us) // max(self.prefill_count(), 1) if promised is not None else 0

    def corrected_us(self, instance_id: str, queue_us: int, service_us: int) -> int:
        """TTFT from now by what predictions for the instance have been worth."""
        known = self._calibrations.get(instance_id)
        return queue_us + service_us if known is None else known.ttft_us(queue_us, service_us, self.now_us)

    def kv_tokens_freed(self, instance: Instance, delay_us: int) -> int:
        return loads.kv_tokens_freed(instance, self.book, self.now_us + delay_us, self.now_us)

    def prefill_room(self, option: Option) -> int:
        """Free KV tokens on the prefill instance of a split. Where nothing decodes, prefills wait for their turn."""
        if not option.prefill.decodes():
            return 0
        held = self.book.on(option.prefill.id).kv_tokens
        return option.prefill.kv_tokens_available(held) - self.prefill_kv_tokens(option.prefill)


def priced_us(ttft_us: float, slo_us: int, slack_price: float) -> float:
    """What a TTFT counts for: where there is much slack a microsecond is cheap, at the objective it has its full price.

    Grows with `ttft_us`, by no more than it grows.
    """
    if not slo_us:
        return ttft_us
    within_us = min(ttft_us, slo_us)
    return slack_price * within_us + (1 - slack_price) * (within_us * within_us / (2 * slo_us)) + ttft_us - within_us


def whole_blocks(tokens: int, block_tokens: int) -> int:
    """Tokens rounded up to whole blocks."""
    return -(-tokens // block_tokens) * block_tokens
