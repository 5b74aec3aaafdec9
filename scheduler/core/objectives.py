"""TPOT objectives: how many an option is expected to break, its own and those of others. Pure.

An objective is for the mean of the longest tenth of a request's intervals, so each request can be held up by prefills
for some time before it is missed. How near an option brings it to that is a risk, from 0 to 1, which adds up smoothly:
one more prefill on somebody who is late already costs little, and the first on somebody who is not costs little too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.core import loads
from scheduler.core.cluster import Instance

if TYPE_CHECKING:
    from scheduler.core.options import Appraiser, Option

#: A hand-off that is above a TPOT objective by this share of it is counted in full.
GAP_COUNTED = 0.5


def peak_step_us(appraiser: Appraiser, option: Option, begin_us: int) -> int:
    """The longest decode step while this request decodes, if it begins to at `begin_us`."""
    span_us = begin_us, begin_us + option.step_us * appraiser.expected_tokens
    return loads.peak_step_us(
        option.decode, appraiser.book, appraiser.costs, appraiser.context_tokens, span_us, appraiser.now_us
    )


def interval_us(appraiser: Appraiser, option: Option) -> int:
    """The longest interval between tokens that its prefill makes for those who decode there; 0 where nobody does."""
    if not option.prefill.decodes():
        return 0
    prompt_tokens = appraiser.request.prompt_tokens
    new_tokens = prompt_tokens - option.cached_tokens
    return loads.interval_us(
        option.prefill, appraiser.book, appraiser.costs, new_tokens, prompt_tokens, appraiser.now_us
    )


def stall_us_max(appraiser: Appraiser, option: Option) -> int | None:
    """Prefill work of others by which this request's objective is as likely missed as not; None if it has none."""
    request, config = appraiser.request, appraiser.config
    if not request.tpot_slo_us or request.max_tokens <= 1:
        return None  # one token has no intervals
    slack_us = max(request.tpot_slo_us - option.step_us, 0)
    return int(config.tpot_tail * config.stall_margin * appraiser.typical_tokens * slack_us)


def stall_us(appraiser: Appraiser, option: Option, begin_us: int) -> int:
    """By how much a split holds up its own decode: prefill work left there when it begins, and the hand-off.

    The hand-off lies between the first token and the second. What of that is within the objective does no harm; what is
    little above counts for less, since hand-offs are predicted roughly and one long interval seldom breaks it. A guess
    counts for nothing, for one hand-off at a time: links that are never used are never measured.
    """
    if not option.split:
        return 0
    left_us = appraiser.book.on(option.decode.id).queue_left_us(appraiser.now_us)
    objective_us = appraiser.request.tpot_slo_us
    excess_us = max(option.gap_us + option.step_us - objective_us, 0)
    gap_us = excess_us * min(excess_us / max(GAP_COUNTED * objective_us, 1.0), 1.0)
    if option.handoff_guessed and not appraiser.book.guessed:
        gap_us = 0.0
    return max(left_us - (begin_us - appraiser.now_us), 0) + int(gap_us)


def stalling_per_s(appraiser: Appraiser, instance: Instance) -> float:
    """Microseconds of prefill a second, of late, that hold up those who decode on an instance."""
    rate = appraiser.book.stalling.get(instance.id)
    return rate.at(appraiser.now_us) if rate is not None else 0.0


def broken(appraiser: Appraiser, option: Option, delay_us: int) -> float:
    """How many objectives an option is expected to break: of those who decode where it prefills, and its own.

    Its own by the hand-off, by prefills that wait where it decodes, and by as many as came there of late.
    """
    begin_us = appraiser.now_us + max(option.queue_us, delay_us) + option.service_us
    total, limit_us = 0.0, stall_us_max(appraiser, option)
    if limit_us is not None:
        decodes_s = option.step_us * appraiser.typical_tokens / 1e6
        taken_us = stalling_per_s(appraiser, option.decode) * decodes_s
        total += loads.risk(stall_us(appraiser, option, begin_us) + taken_us, limit_us)
    if option.prefill.decodes():
        work, placed_us = (option.prefill_us, option.interval_us), appraiser.now_us + delay_us
        stall_share = appraiser.config.tpot_tail * appraiser.config.stall_margin
        total += loads.broken(
            option.prefill, appraiser.book, work, begin_us, placed_us, appraiser.now_us,
            appraiser.load(option.prefill).step_us, stall_share,
        )  # fmt: skip
    return total
