"""Dynamo's router: blocks to compute and blocks to decode, added up, with credit for what is cached; a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option
from scheduler.core.placements import Owner
from scheduler.core.policies import local

#: Costs are compared as whole thousandths of a block.
MILLI = 1000


@dataclass(slots=True)
class Dynamo:
    """cost = scale * max((active prefill + prompt) / block - credit, 0) + decode blocks + weight * active requests.

    Credit is a share of each cached block by tier. The least cost is taken (the default, temperature 0). With
    instances that only prefill, one is chosen by the same cost, unless little of the prompt is left to compute.
    Source: NVIDIA Dynamo 1.x, KV router, routing concepts and conditional disaggregation.
    """

    config: SchedulerConfig
    #: Placement -> tokens that it computes, for those whose prefill is not over; at most `placements_max`.
    computing: dict[Owner, int] = field(default_factory=dict)

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> Iterable[Option]:
        def order(instance: Instance) -> tuple[int, str]:
            return self.cost_milli(appraiser, instance), instance.id

        return local.by_role(appraiser, instances, order, order, lambda i: self.splits(appraiser, i))

    def cost_milli(self, appraiser: Appraiser, instance: Instance) -> int:
        """In thousandths of a block of `dynamo_block_tokens`."""
        p = self.config.baselines
        queue = appraiser.book.on(instance.id).queue
        active_tokens = sum(self.computing.get(owner, 0) for owner in queue)
        own = local.own_blocks(appraiser, instance)
        credit = p.dynamo_device_credit * own.device + p.dynamo_host_credit * own.host + p.dynamo_disk_credit * own.disk
        credit_tokens = credit * appraiser.prefix.block_tokens
        prefill_tokens = max(active_tokens + appraiser.request.prompt_tokens - credit_tokens, 0.0)
        decode_tokens = appraiser.load(instance).context_tokens
        blocks = (p.dynamo_prefill_scale * prefill_tokens + decode_tokens) / p.dynamo_block_tokens
        return int(MILLI * (blocks + p.dynamo_request_weight * local.active_requests(appraiser, instance)))

    def splits(self, appraiser: Appraiser, decode: Instance) -> bool:
        """Whether so much is to be computed that it should not be done where the request decodes."""
        p, prompt_tokens = self.config.baselines, appraiser.request.prompt_tokens
        cached = local.own_blocks(appraiser, decode).total * appraiser.prefix.block_tokens
        new_tokens = prompt_tokens - cached
        return not (new_tokens < p.dynamo_split_tokens_min and new_tokens < p.dynamo_split_share_min * prompt_tokens)

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        owner = (request.gateway_id, request.request_id)
        self.computing.pop(owner, None)
        self.computing[owner] = request.prompt_tokens - option.cached_tokens
        if len(self.computing) > self.config.placements_max:
            del self.computing[next(iter(self.computing))]
