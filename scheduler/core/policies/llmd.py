"""llm-d's scorers: a weighted sum of prefix match, free KV capacity and short queues; a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option
from scheduler.core.policies import local

#: Scores are compared as whole millionths.
MICRO = 1_000_000


@dataclass(slots=True)
class LlmD:
    """The highest sum of weight * score, each score from 0 to 1. Ties go to fewer requests, then to the lower id.

    prefix = matching blocks / blocks of the prompt, those on the host counting less; kv = free share of KV capacity;
    queue = (max - q) / (max - min), 1 if all queues are equal. With instances that only prefill, a prompt of which
    enough is to be computed is split, and the prefill instance has the highest sum among these.
    Source: llm-d inference scheduler: prefix-cache, kv-cache-utilization and queue scorers, pd profile handler.
    """

    config: SchedulerConfig

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> Iterable[Option]:
        scores: dict[str, int] = {}
        for decodes in (True, False):
            scores |= self.scores_micro(appraiser, [i for i in instances if i.decodes() == decodes])

        def order(instance: Instance) -> tuple[int, int, str]:
            return -scores[instance.id], local.active_requests(appraiser, instance), instance.id

        return local.by_role(appraiser, instances, order, order, lambda i: self.splits(appraiser, i))

    def scores_micro(self, appraiser: Appraiser, instances: Sequence[Instance]) -> dict[str, int]:
        """Sums of instances that compete with each other, in millionths."""
        p = self.config.baselines
        queues = [len(appraiser.book.on(i.id).queue) for i in instances]
        longest, shortest = max(queues, default=0), min(queues, default=0)
        blocks_total = max(-(-appraiser.request.prompt_tokens // appraiser.prefix.block_tokens), 1)
        scores = {}
        for instance, queue in zip(instances, queues, strict=True):
            own = local.own_blocks(appraiser, instance)
            matched = p.llmd_device_score * own.device + p.llmd_host_score * (own.host + own.disk)
            held = appraiser.book.on(instance.id).kv_tokens
            free = instance.kv_tokens_available(held) / instance.info.kv_tokens_total
            short = (longest - queue) / (longest - shortest) if longest > shortest else 1.0
            total = p.llmd_prefix_weight * (matched / blocks_total)
            total += p.llmd_kv_weight * free
            total += p.llmd_queue_weight * short
            scores[instance.id] = int(MICRO * total)
        return scores

    def splits(self, appraiser: Appraiser, decode: Instance) -> bool:
        cached = local.own_blocks(appraiser, decode).total * appraiser.prefix.block_tokens
        return appraiser.request.prompt_tokens - cached >= self.config.baselines.llmd_split_tokens_min

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        """Keeps nothing."""
