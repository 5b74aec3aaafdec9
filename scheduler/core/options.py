"""What each way to serve a request would cost: the numbers that policies choose by and the ledger keeps. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.core.cluster import Cluster, Instance, State
from scheduler.core.config import SchedulerConfig
from scheduler.core.cost import CostBook, link_class
from scheduler.core.events import PlaceRequested
from scheduler.core.placements import PlacementBook
from scheduler.core.prefix import Prefix, Pull

#: Why an option can't be taken; the start of its `reason`. The order is that of refusals: the last met is the closest.
NO_HANDOFF, TOO_LONG, NO_CAPACITY, SLOW = "no hand-off", "context", "capacity", "SLO"


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

    @property
    def feasible(self) -> bool:
        return not self.reason

    @property
    def ttft_us(self) -> int:
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


@dataclass(slots=True)
class Load:
    """What decodes on an instance, placements on the way included."""

    batch: int
    context_tokens: int
    expected_tokens: int  # a request, on average
    step_us: int
    step_with_us: int  # with this request in the batch
    slow_us: int  # by which this request would slow the others down, and they it
    wait_us: int  # until a place in a full batch is free


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
        output_share: float,
        now_us: int,
    ) -> None:
        self.request, self.prefix, self.now_us = request, prefix, now_us
        self._cluster, self._book, self._costs, self._config = cluster, book, costs, config
        self.expected_tokens = max(int(request.max_tokens * output_share), 1)
        self.context_tokens = request.prompt_tokens + self.expected_tokens // 2
        self._covered = prefix.covered()
        self._prospects: dict[str, Prospect] = {}
        self._loads: dict[str, Load] = {}

    # ------------------------------------------------------------ one instance

    def bound_us(self, instance: Instance) -> int:
        """What prefill on an instance costs at least: as if all blocks that anybody holds were there at no cost.

        Harm to what decodes there is counted in, harm where this request is decoded is not.
        """
        prefill_us = self._prefill_us(instance, self._covered)
        harm_us = prefill_us * self.load(instance).batch
        return self.queue_us(instance) + prefill_us + int(self._config.harm_weight * harm_us)

    def prospect(self, instance: Instance) -> Prospect:
        """Prefill on an instance: own blocks are reused, more are pulled if that is predicted to beat computing."""
        known = self._prospects.get(instance.id)
        if known is None:
            known = self._prospects[instance.id] = self._appraise(instance)
        return known

    def _appraise(self, instance: Instance) -> Prospect:
        own = self.prefix.own_blocks(instance.info.hbm_source_id)
        prefill_us = self._prefill_us(instance, own)
        best: Pull | None = None
        best_us, best_prefill_us = prefill_us, prefill_us
        if self.request.use_pool:
            for pull in self.prefix.pulls(instance, own, self._costs, self.now_us):
                with_pull_us = self._prefill_us(instance, pull.reach)
                if pull.duration_us + with_pull_us < best_us:
                    best, best_us, best_prefill_us = pull, pull.duration_us + with_pull_us, with_pull_us
        return self._prospect(instance, own, best, best_prefill_us)

    def prospect_with(self, instance: Instance, blocks: int) -> Prospect:
        """Prefill on an instance that pulls up to `blocks`, or as near as sources allow, whatever it costs."""
        own = self.prefix.own_blocks(instance.info.hbm_source_id)
        best: Pull | None = None
        if self.request.use_pool and blocks > own:
            for pull in self.prefix.pulls(instance, own, self._costs, self.now_us):
                if best is None or pull.reach <= blocks:
                    best = pull
        return self._prospect(instance, own, best, self._prefill_us(instance, best.reach if best else own))

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

    def _prefill_us(self, instance: Instance, cached_blocks: int) -> int:
        cached_tokens = cached_blocks * self.prefix.block_tokens
        return self._costs.prefill_us(instance.id, self.request.prompt_tokens - cached_tokens, cached_tokens)

    def slow_cost_us(self, instance: Instance) -> int:
        """What decoding on an instance adds to an option's cost at least."""
        return int(self._config.harm_weight * self.load(instance).slow_us)

    def queue_us(self, instance: Instance) -> int:
        """Predicted prefill work before this request: placed and not finished, and waiting ones nobody placed."""
        holdings = self._book.on(instance.id)
        foreign = instance.waiting - len(holdings.queue) - len(holdings.decoding)
        queue_us = holdings.queue_left_us(self.now_us)
        if foreign > 0:
            queue_us += foreign * self._costs.prefill_us(instance.id, self.request.prompt_tokens, 0)
        return queue_us

    def load(self, instance: Instance) -> Load:
        known = self._loads.get(instance.id)
        if known is None:
            known = self._loads[instance.id] = self._measure_load(instance)
        return known

    def _measure_load(self, instance: Instance) -> Load:
        holdings = self._book.on(instance.id)
        placed = len(holdings.decoding)
        batch = placed
        if instance.kv_tokens_foreign:
            batch += max(instance.running - placed - len(holdings.queue), 0)
        context_tokens = holdings.context_tokens + instance.kv_tokens_foreign
        expected_tokens = holdings.expected_tokens // placed if placed else self.expected_tokens
        step_with_us = self._costs.decode_us(instance.id, batch + 1, context_tokens + self.context_tokens)
        if not batch:
            return Load(0, context_tokens, expected_tokens, 0, step_with_us, 0, 0)
        step_us = self._costs.decode_us(instance.id, batch, context_tokens)
        alone_us = self._costs.decode_us(instance.id, 1, self.context_tokens)
        shared_tokens = min(self.expected_tokens, expected_tokens)
        slow_us = (max(step_with_us - step_us, 0) * batch + max(step_with_us - alone_us, 0)) * shared_tokens
        excess = max(batch + 1 - instance.info.batch_max, 0)
        wait_us = excess * step_us * expected_tokens // max(instance.info.batch_max, 1)
        return Load(batch, context_tokens, expected_tokens, step_us, step_with_us, slow_us, wait_us)

    def kv_tokens_left(self, instance: Instance) -> int:
        """Free KV tokens with this request placed there; below zero if it does not fit."""
        held = self._book.on(instance.id).kv_tokens
        return instance.kv_tokens_available(held) - self.kv_tokens_needed(instance)

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
            )
        )

    def split(self, prefill: Instance, decode: Instance, prospect: Prospect | None = None) -> Option:
        """Prefill on one instance, decode on another, the blocks going through the prefill instance's node."""
        p = prospect or self.prospect(prefill)
        load = self.load(decode)
        handoff_us, reason = self._handoff(prefill, decode, p)
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
                handoff_us=handoff_us + load.wait_us,
                harm_us=p.prefill_us * self.load(prefill).batch + load.slow_us,
                step_us=load.step_with_us,
                cost_us=0,
                kv_tokens_left=self.kv_tokens_left(decode),
                reason=reason,
            )
        )

    def handoff_obstacle(self, prefill: Instance, decode: Instance) -> str:
        """Why blocks can't go from one instance to the other; empty if they can."""
        if not self.request.use_pool:
            return f"{NO_HANDOFF}: the request does not use the pool"
        if prefill.info.namespace != decode.info.namespace:
            return f"{NO_HANDOFF}: the instances have different namespaces"
        if not decode.info.node_source_id:
            return f"{NO_HANDOFF}: {decode.id} has no node"
        node = self._cluster.sources.get(prefill.info.node_source_id)
        if node is None:
            return f"{NO_HANDOFF}: the node of {prefill.id} is not there"
        if node.state is not State.ALIVE:
            return f"{NO_HANDOFF}: node {node.id} is {node.state.value}"
        if not node.attached.address:
            return f"{NO_HANDOFF}: node {node.id} has no address"
        return ""

    def _handoff(self, prefill: Instance, decode: Instance, p: Prospect) -> tuple[int, str]:
        """What of publishing and pulling is left when the prefill ends, and why there is no way, if so.

        Blocks travel while later ones are computed; the last block can't.
        """
        reason = self.handoff_obstacle(prefill, decode)
        if reason:
            return 0, reason
        node = self._cluster.sources[prefill.info.node_source_id]
        total_us, last_us = 0.0, 0.0
        block_bytes = 0
        for group in prefill.info.namespace.groups:
            block_bytes += group.block_bytes * group.shard_count
        prompt_blocks = -(-self.request.prompt_tokens // self.prefix.block_tokens)
        decode_own = self.prefix.own_blocks(decode.info.hbm_source_id)
        for instance, blocks in (
            (prefill, prompt_blocks - p.own_blocks),
            (decode, prompt_blocks - decode_own),
        ):
            kind = link_class(node.attached.host_id == instance.info.host_id, node.attached.tier)
            link = self._costs.link_costs(instance.id, node.id, kind, self.now_us)
            if link is None:
                return 0, f"{NO_HANDOFF}: the link from {instance.id} to {node.id} is down"
            total_us += link[0] + link[1] * (block_bytes * max(blocks, 1))
            last_us += link[0] + link[1] * block_bytes
        return max(int(total_us) - p.prefill_us, int(last_us)), ""

    def _finish(self, option: Option) -> Option:
        """Adds up the cost and finds out whether the option is feasible."""
        request = self.request
        option.cost_us = option.ttft_us + option.handoff_us + int(self._config.harm_weight * option.harm_us)
        if option.reason:
            return option
        decode, tokens = option.decode, request.prompt_tokens + request.max_tokens
        limit = token_limit(decode)
        if tokens > limit:
            option.reason = f"{TOO_LONG}: {tokens} tokens, the limit of {decode.id} is {limit}"
        elif request.prompt_tokens > token_limit(option.prefill):
            option.reason = (
                f"{TOO_LONG}: a prompt of {request.prompt_tokens} tokens is too long for {option.prefill.id}"
            )
        elif option.kv_tokens_left < 0:
            option.reason = f"{NO_CAPACITY}: {-option.kv_tokens_left} KV tokens too few on {decode.id}"
        elif option.split and self._prefill_room(option) < 0:
            option.reason = f"{NO_CAPACITY}: {-self._prefill_room(option)} KV tokens too few on {option.prefill.id}"
        elif request.ttft_slo_us and option.ttft_us > request.ttft_slo_us:
            option.reason = f"{SLOW}: TTFT {option.ttft_us} us, the limit is {request.ttft_slo_us}"
        elif request.tpot_slo_us:
            step_us = self._step_us_later(option)
            if step_us > request.tpot_slo_us:
                option.reason = f"{SLOW}: TPOT {step_us} us, the limit is {request.tpot_slo_us}"
        return option

    def _step_us_later(self, option: Option) -> int:
        """A decode step when the prefill has ended: those predicted to be done by then don't count."""
        batch, context_tokens = 1, self.context_tokens + option.decode.kv_tokens_foreign
        for placement in self._book.decoding_until(option.decode.id, self.now_us + option.ttft_us):
            batch += 1
            context_tokens += placement.context_tokens
        return self._costs.decode_us(option.decode.id, batch, context_tokens)

    def _prefill_room(self, option: Option) -> int:
        """Free KV tokens on the prefill instance of a split. Where nothing decodes, prefills wait for their turn."""
        if not option.prefill.decodes():
            return 0
        held = self._book.on(option.prefill.id).kv_tokens
        return option.prefill.kv_tokens_available(held) - self.prefill_kv_tokens(option.prefill)


def token_limit(instance: Instance) -> int:
    """Prompt and generated tokens that a request may have at most on an instance."""
    whole = instance.info.kv_tokens_total // instance.block_tokens * instance.block_tokens
    return min(instance.info.context_tokens_max, whole)


def whole_blocks(tokens: int, block_tokens: int) -> int:
    """Tokens rounded up to whole blocks."""
    return -(-tokens // block_tokens) * block_tokens
