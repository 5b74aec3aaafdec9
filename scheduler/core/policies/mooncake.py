"""Mooncake's Algorithm 1 as published, for comparison: always split where it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import NO_HANDOFF, SLOW, Appraiser, Option, Prospect
from scheduler.core.policies import local


@dataclass(slots=True)
class MooncakeAlgorithm1:
    """Prefill where transfer + queue + prefill is least, decode where the predicted step is shortest.

    If the longest prefix anywhere is longer than an instance's own (its memory and its node's) by more than a factor,
    it is pulled: that instance then holds a replica, which is how hot prefixes spread. A request that is predicted to
    miss its TTFT or TBT is refused. Where no hand-off is possible the request stays on one instance.
    Source: Qin et al., Mooncake, FAST'25, Algorithm 1; early rejection: the technical report, section 7.
    """

    config: SchedulerConfig

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> list[Option]:
        decodes = [i for i in instances if i.decodes()]
        decodes.sort(key=lambda i: (appraiser.kv_tokens_left(i) < 0, appraiser.load(i).step_with_us, i.id))
        options = []
        for prefill in instances:
            if not prefill.prefills():
                continue
            for decode in decodes:
                if decode is not prefill and not appraiser.handoff_obstacle(prefill, decode):
                    options.append(appraiser.split(prefill, decode, self._prospect(appraiser, prefill)))
                    break
        if all(o.reason.startswith(NO_HANDOFF) for o in options):
            options.extend(appraiser.colocated(i, self._prospect(appraiser, i)) for i in decodes)
        if not self.config.baselines.mooncake_predicts_load:
            for option in options:
                _judge_load_on_arrival(appraiser.request, option)
        options.sort(key=lambda o: (not o.feasible, o.queue_us + o.pull_us + o.prefill_us, o.prefill.id, o.decode.id))
        return options

    def _prospect(self, appraiser: Appraiser, instance: Instance) -> Prospect:
        best = appraiser.prefix.longest()
        own = local.own_blocks(appraiser, instance).total
        pulls = best > own * self.config.mooncake_threshold
        return appraiser.prospect_with(instance, best) if pulls else local.own_prospect(appraiser, instance)

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        """Keeps nothing."""


def _judge_load_on_arrival(request: PlaceRequested, option: Option) -> None:
    """Takes a decode step as it would be now for the one when the prefill has ended."""
    tpot = f"{SLOW}: TPOT"
    if option.reason.startswith(tpot):
        option.reason = ""
    if not option.reason and request.tpot_slo_us and option.step_us > request.tpot_slo_us:
        option.reason = f"{tpot} {option.step_us} us on arrival, the limit is {request.tpot_slo_us}"
