"""What decodes on an instance, now and later, as placements under way make it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.core.cluster import Instance
from scheduler.core.cost import CostBook, decode_time_us
from scheduler.core.placements import Placement, PlacementBook

#: A request that decodes longer than predicted is expected to go on for as long as it is late, and this much longer.
OVERDUE_US = 100_000


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


def measure(
    instance: Instance, book: PlacementBook, costs: CostBook, context_tokens: int, expected_tokens: int
) -> Load:
    """The load of an instance that a request with `context_tokens` and `expected_tokens` to generate would meet."""
    holdings = book.on(instance.id)
    placed = len(holdings.decoding)
    batch = placed
    if instance.kv_tokens_foreign:
        batch += max(instance.running - placed - len(holdings.queue), 0)
    tokens = holdings.context_tokens + instance.kv_tokens_foreign
    expected_there = holdings.expected_tokens // placed if placed else expected_tokens
    coefficients = costs.decode[instance.id].current()
    step_with_us = int(decode_time_us(coefficients, batch + 1, tokens + context_tokens))
    if not batch:
        return Load(0, tokens, expected_there, 0, step_with_us, 0, 0)
    step_us = int(decode_time_us(coefficients, batch, tokens))
    alone_us = int(decode_time_us(coefficients, 1, context_tokens))
    shared_tokens = min(expected_tokens, expected_there)
    slow_us = (max(step_with_us - step_us, 0) * batch + max(step_with_us - alone_us, 0)) * shared_tokens
    excess = max(batch + 1 - instance.info.batch_max, 0)
    wait_us = excess * step_us * expected_there // max(instance.info.batch_max, 1)
    return Load(batch, tokens, expected_there, step_us, step_with_us, slow_us, wait_us)


def ends_us(placement: Placement, now_us: int) -> int:
    """When a placement is expected to end: as predicted, or later if that has passed."""
    late_us = now_us - placement.decode_ends_us
    return placement.decode_ends_us if late_us < 0 else now_us + late_us + OVERDUE_US


def peak_step_us(
    instance: Instance,
    book: PlacementBook,
    costs: CostBook,
    context_tokens: int,
    span_us: tuple[int, int],
    now_us: int,
) -> int:
    """The longest decode step on an instance while a request decodes there.

    Those predicted to be done before it begins don't count; those whose prefill ends while it decodes do, from then on.
    So what was promised to those placed earlier is not broken by one that overtakes them.

    Args:
        context_tokens: of the request.
        span_us: when it is predicted to decode.
    """
    begin_us, end_us = span_us
    here = [book.placements[owner] for owner in book.on(instance.id).decoding]
    others = [(max(p.prefill_ends_us, begin_us), ends_us(p, now_us), p.context_tokens) for p in here]
    others = [other for other in others if other[1] > begin_us and other[0] < end_us]
    foreign = instance.kv_tokens_foreign
    tokens = context_tokens + foreign
    for _, _, context in others:
        tokens += context
    bound_us = costs.decode_us(instance.id, len(others) + 1, tokens)
    if all(first == begin_us for first, _, _ in others):
        return bound_us
    peak_us = 0
    for at_us in sorted({begin_us: None, **{first: None for first, _, _ in others}}):
        batch, tokens = 1, context_tokens + foreign
        for first, last, context in others:
            if first <= at_us < last:
                batch += 1
                tokens += context
        peak_us = max(peak_us, costs.decode_us(instance.id, batch, tokens))
        if peak_us >= bound_us:
            break
    return peak_us


def kv_tokens_freed(instance: Instance, book: PlacementBook, until_us: int, now_us: int) -> int:
    """KV tokens of placements on an instance that are expected to be over by a time."""
    holdings = book.on(instance.id)
    freed = 0
    for owner in holdings.decoding:
        placement = book.placements[owner]
        if ends_us(placement, now_us) <= until_us:
            freed += placement.kv_tokens
    for owner in holdings.queue:
        placement = book.placements[owner]
        if placement.prefill_holds and placement.prefill_ends_us <= until_us:
            freed += placement.prefill_kv_tokens
    return freed


def interval_us(
    instance: Instance, book: PlacementBook, costs: CostBook, new_tokens: int, prompt_tokens: int, now_us: int
) -> int:
    """The longest interval between two tokens of those who decode on an instance while a prompt is computed there.

    A step computes a chunk of prompts and one token of each decode, and reads the weights once for both. A prompt
    behind others is computed in steps with them.

    Args:
        new_tokens: of the prompt that are to be computed.
    """
    holdings = book.on(instance.id)
    base_us, sequence_us, token_us = costs.decode[instance.id].current()
    batch = max(len(holdings.decoding), instance.running if instance.kv_tokens_foreign else 0)
    others_us = sequence_us * batch + token_us * (holdings.context_tokens + instance.kv_tokens_foreign)
    _, new_us, pair_us = costs.prefill[instance.id].current()

    def chunk_us(tokens: int) -> float:
        return new_us * tokens + pair_us * (tokens * (max(prompt_tokens, tokens) - tokens / 2))

    chunk_tokens = instance.info.chunk_tokens
    longest_us = chunk_us(new_tokens) + holdings.queue_left_us(now_us)
    if chunk_tokens:
        longest_us = min(longest_us, chunk_us(chunk_tokens))
    return int(max(base_us, longest_us) + others_us)


def broken(
    instance: Instance,
    book: PlacementBook,
    work: tuple[int, int],
    prefill_ends_us: int,
    begin_us: int,
    now_us: int,
    step_us: int,
    stall_share: float,
) -> float:
    """How many TPOT objectives a prefill on an instance is expected to break of those who decode there.

    Args:
        work: of the prefill, and the longest interval that it makes.
        prefill_ends_us: when it is predicted to end.
        begin_us: when it could be placed: who has ended by then is not asked.
        step_us: a decode step there, as it is now.
        stall_share: of the time that objectives leave, which prefills may take.
    """
    total = 0.0
    for placement in book.stalled_by(instance.id, prefill_ends_us):
        limit_us = placement.stall_us_max
        stalled_us = placement.stalled_us(*work) if limit_us is not None else 0
        if limit_us is None or not stalled_us or ends_us(placement, now_us) <= begin_us:
            continue
        unearned_us = placement.stall_us - placement.earned_us(prefill_ends_us - work[0], step_us, stall_share)
        total += risk(unearned_us + stalled_us, limit_us) - risk(unearned_us, limit_us)
    return total


def risk(stalled_us: float, limit_us: int) -> float:
    """How likely a TPOT objective is missed by a request that is held up for so long; 0.6 at the limit.

    The limit is that of an answer of median length. Lengths spread widely, so short answers are missed by little, and
    the risk grows from the first microsecond on, nearly as the share of shorter answers: 1 - exp(-x), in arithmetic
    that is the same everywhere.

    Args:
        stalled_us: beyond what the answer has earned by coming for as long as it does. Below zero is no risk.
    """
    share = max(stalled_us, 0.0) / max(limit_us, 1)
    return 1.0 - 1.0 / (1.0 + share + 0.5 * share * share)
