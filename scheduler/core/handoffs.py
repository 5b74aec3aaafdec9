"""What it takes to bring a prompt's blocks from the instance that computes it to the one that decodes. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from scheduler.core.cluster import Instance, State
from scheduler.core.cost import link_class

if TYPE_CHECKING:
    from scheduler.core.options import Appraiser, Prospect

#: Why there is no way; the start of an option's `reason`.
NO_HANDOFF = "no hand-off"
#: What a kind of link costs is a guess until it has been measured so often.
GUESSED_BELOW = 3


class Handoff(NamedTuple):
    """From prefill to decode, by publishing to a node and pulling from it.

    Fields:
        left_us: what is left of it when the prefill ends.
        gap_us: what lies between the first token and the second, by what is known of the links.
        guessed: nobody has measured a link of the kind that blocks are pulled over.
    """

    left_us: int
    gap_us: int
    guessed: bool


NONE = Handoff(0, 0, False)


def obstacle(appraiser: Appraiser, prefill: Instance, decode: Instance) -> str:
    """Why blocks can't go from one instance to the other; empty if they can."""
    if not appraiser.request.use_pool:
        return f"{NO_HANDOFF}: the request does not use the pool"
    if prefill.info.namespace is not decode.info.namespace and prefill.info.namespace != decode.info.namespace:
        return f"{NO_HANDOFF}: the instances have different namespaces"
    if not decode.info.node_source_id:
        return f"{NO_HANDOFF}: {decode.id} has no node"
    node = appraiser.cluster.sources.get(prefill.info.node_source_id)
    if node is None:
        return f"{NO_HANDOFF}: the node of {prefill.id} is not there"
    if node.state is not State.ALIVE:
        return f"{NO_HANDOFF}: node {node.id} is {node.state.value}"
    if not node.attached.address:
        return f"{NO_HANDOFF}: node {node.id} has no address"
    return ""


def handoff(appraiser: Appraiser, prefill: Instance, decode: Instance, p: Prospect) -> tuple[Handoff, str]:
    """The hand-off of a prompt that has such a prospect on `prefill`, and why there is no way, if so.

    Blocks travel while later ones are computed; the last block can't.
    """
    reason = obstacle(appraiser, prefill, decode)
    if reason:
        return NONE, reason
    costs, prefix = appraiser.costs, appraiser.prefix
    node = appraiser.cluster.sources[prefill.info.node_source_id]
    block_bytes = prefill.block_bytes
    prompt_blocks = -(-appraiser.request.prompt_tokens // prefix.block_tokens)
    hops: list[float] = []
    known: list[bool] = []
    last_us = 0.0
    for instance, own_blocks in ((prefill, p.own_blocks), (decode, prefix.own_blocks(decode.info.hbm_source_id))):
        kind = link_class(node.attached.host_id == instance.info.host_id, node.attached.tier)
        link = costs.link_costs(instance.id, node.id, kind, appraiser.now_us)
        if link is None:
            return NONE, f"{NO_HANDOFF}: the link from {instance.id} to {node.id} is down"
        hops.append(link[0] + link[1] * (block_bytes * max(prompt_blocks - own_blocks, 1)))
        last_us += link[0] + link[1] * block_bytes
        known.append(costs.measured(instance.id, node.id) or costs.samples(kind) >= GUESSED_BELOW)
    publish_us, pull_us = hops
    left_us = max(int(publish_us + pull_us) - p.prefill_us, int(last_us))
    # Publishing teaches nothing, so that a guess at it would never be put right: it takes no longer than pulling.
    gap_us = (publish_us if known[0] else min(publish_us, pull_us)) + pull_us
    return Handoff(left_us, max(int(gap_us) - p.prefill_us, 0), not known[1]), ""
