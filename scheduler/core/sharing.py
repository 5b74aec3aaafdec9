"""Blocks that others are computing: whether waiting for them beats computing them once more. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from scheduler.core.pending import GRACE_US, PendingPrompt

if TYPE_CHECKING:
    from scheduler.core.cluster import Instance
    from scheduler.core.options import Appraiser, Prospect

#: Prompts under way on other instances that are considered for a pull, the longest shared prefix first.
ELSEWHERE_MAX = 2


def with_pending(appraiser: Appraiser, instance: Instance, now: Prospect) -> Prospect:
    """The better of what is there now and what others are computing.

    On the instance that computes it, a prefix is there as soon as that is done; elsewhere it can be pulled from
    that instance's node then.
    """
    best, best_us = now, now.queue_us + now.pull_us + now.prefill_us + appraiser.delay_us(now.queue_us, now.prefill_us)
    elsewhere = 0
    for prompt, shared in appraiser.standing.pending:
        blocks = min(shared, appraiser.prefix.usable)
        here = prompt.instance_id == instance.id
        elsewhere += not here
        if blocks * appraiser.prefix.block_tokens <= now.cached_tokens or (not here and elsewhere > ELSEWHERE_MAX):
            continue
        pull_us = 0 if here else _pull_us(appraiser, instance, prompt, blocks - now.own_blocks)
        if pull_us is None:
            continue
        ready = here and prompt.done_us is not None
        left_us = prompt.left_us(appraiser.now_us)
        if not here and prompt.done_us is not None:
            left_us = GRACE_US // 8  # until the directory knows what was published
        queue_us, prefill_us = max(now.queue_us, left_us), appraiser.prefill_us(instance, blocks)
        cost_us = queue_us + pull_us + prefill_us + appraiser.delay_us(queue_us, prefill_us)
        if cost_us < best_us:
            tokens = blocks * appraiser.prefix.block_tokens
            awaits = None if ready else prompt.owner
            best_us = cost_us
            best = replace(
                now,
                pull=None,
                cached_tokens=tokens,
                queue_us=queue_us,
                pull_us=pull_us,
                prefill_us=prefill_us,
                awaits=awaits,
            )
    return best


def _pull_us(appraiser: Appraiser, instance: Instance, prompt: PendingPrompt, blocks: int) -> int | None:
    """Pulling blocks that another instance is about to publish to its node; None if there is no way."""
    other = appraiser.cluster.instances.get(prompt.instance_id)
    node = appraiser.cluster.sources.get(other.info.node_source_id) if other is not None else None
    if node is None or not node.readable or not appraiser.request.use_pool:
        return None
    return appraiser.prefix.pull_us(instance, node, blocks, appraiser.costs, appraiser.now_us)
