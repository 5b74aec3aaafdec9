"""Rules of published experiments that no scheduler should run with: how they were measured, not how to serve. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.options import SLOW, Appraiser, Option, Prospect
from scheduler.core.policies import Policy, local
from scheduler.core.policies.mooncake import MooncakeAlgorithm1


class ForcedTransfers(MooncakeAlgorithm1):
    """Algorithm 1, but a longer prefix is always pulled, and the choice does not count what that takes.

    The published algorithm avoids slow transfers, and so hardly shows what bandwidth is worth.
    """

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> list[Option]:
        options = MooncakeAlgorithm1.rank(self, appraiser, instances)
        options.sort(key=lambda o: (not o.feasible, o.queue_us + o.prefill_us, o.prefill.id, o.decode.id))
        return options

    def _prospect(self, appraiser: Appraiser, instance: Instance) -> Prospect:
        best = appraiser.prefix.longest()
        longer = best > local.own_blocks(appraiser, instance).total
        return appraiser.prospect_with(instance, best) if longer else local.own_prospect(appraiser, instance)


class LateRejection(MooncakeAlgorithm1):
    """Algorithm 1 that does not ask for decode load: who comes after its prefill to a full instance is turned away."""

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> list[Option]:
        options = MooncakeAlgorithm1.rank(self, appraiser, instances)
        for option in options:
            if option.reason.startswith(f"{SLOW}: TPOT"):
                option.reason = ""
        options.sort(key=lambda o: (not o.feasible, o.queue_us + o.pull_us + o.prefill_us, o.prefill.id, o.decode.id))
        return options


class EarlyRejection(LateRejection):
    """The same, with decode load judged before the prefill as well, as the technical report has it.

    `mooncake_predicts_load` False: by who decodes now. True: by who is predicted to decode when this prefill ends:
    those whose prefill ends until then counted, those who have decoded as long as all are taken to decode left out.
    A request is rejected if it would make the steps of its decode instance, the one with the shortest, too long.
    Source: the technical report, section 7.
    """

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> list[Option]:
        options = LateRejection.rank(self, appraiser, instances)
        limit_us = appraiser.request.tpot_slo_us
        for option in options if limit_us else ():
            if option.feasible and (step_us := self._step_us(appraiser, option)) > limit_us:
                option.reason = f"{SLOW}: TPOT {step_us} us, the limit is {limit_us}"
        return sorted(options, key=lambda o: not o.feasible)

    def _step_us(self, appraiser: Appraiser, option: Option) -> int:
        """A decode step with this request in the batch."""
        predicted = self.config.baselines.mooncake_predicts_load
        at_us = appraiser.now_us + (option.ttft_us if predicted else 0)
        batch, tokens = _decoding_at(appraiser, option.decode, at_us, predicted)
        return appraiser.costs.decode_us(option.decode.id, batch + 1, tokens + appraiser.context_tokens)


def _decoding_at(appraiser: Appraiser, instance: Instance, at_us: int, predicted: bool) -> tuple[int, int]:
    """Sequences that decode on an instance, and their KV tokens: now, or as predicted for a time."""
    book, batch, tokens = appraiser.book, 0, 0
    for owner in book.on(instance.id).decoding:
        placement = book.placements[owner]
        began = placement.prefill_done or (predicted and placement.prefill_ends_us <= at_us)
        if began and not (predicted and placement.decode_ends_us <= at_us):
            batch += 1
            tokens += placement.context_tokens
    return batch, tokens


@dataclass(frozen=True, slots=True)
class Balanced:
    """Decoding made so slow that a decode instance carries as many requests a second as one that prefills."""

    sequence_us: float  # of a decode step
    requests_s: float  # that one instance of either phase carries


def balanced(
    prefill_us: float, output_tokens: float, context_tokens: float, limit_us: float, step_us: float, token_us: float
) -> Balanced:
    """How slow decoding must be for both phases to be full at the same load.

    What a sequence adds to a decode step beside reading its KV is published by nobody; it is what is chosen here.

    Args:
        prefill_us, output_tokens, context_tokens: means of a request.
        limit_us: of a decode step.
        step_us, token_us: fixed cost of a decode step, and of a KV token.
    """
    requests_s = 1e6 / prefill_us
    batch = requests_s * output_tokens * limit_us / 1e6
    return Balanced((limit_us - step_us) / batch - token_us * context_tokens, requests_s)


#: Name -> how to make one; for `scheduler.core.policies.POLICIES` of a process that runs such experiments.
RULES: dict[str, Callable[[SchedulerConfig], Policy]] = {
    "forced_transfers": ForcedTransfers,
    "late_rejection": LateRejection,
    "early_rejection": EarlyRejection,
}
