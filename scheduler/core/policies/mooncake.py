"""Mooncake's Algorithm 1 as published, for comparison: always split where it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option, Prospect


@dataclass(slots=True)
class MooncakeAlgorithm1:
    """Prefill where transfer + queue + prefill is least, decode where the predicted step is shortest.

    An instance pulls the longest prefix known if that is longer than its own by more than a factor. Where no hand-off
    is possible the request stays on one instance. Its replication of hot prefixes is left out.
    Source: Qin et al., Mooncake, FAST'25, Algorithm 1.
    """

    config: SchedulerConfig

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> list[Option]:
        decodes = [i for i in instances if i.decodes()]
        decodes.sort(key=lambda i: (appraiser.kv_tokens_left(i) < 0, appraiser.load(i).step_us, i.id))
        options = []
        for prefill in instances:
            if not prefill.prefills():
                continue
            prospect = self._prospect(appraiser, prefill)
            for decode in decodes:
                if decode is not prefill and not appraiser.handoff_obstacle(prefill, decode):
                    options.append(appraiser.split(prefill, decode, prospect))
                    break
        if not any(o.feasible for o in options):
            options.extend(appraiser.colocated(i, self._prospect(appraiser, i)) for i in decodes)
        options.sort(key=lambda o: (not o.feasible, o.ttft_us, o.prefill.id, o.decode.id))
        return options

    def _prospect(self, appraiser: Appraiser, instance: Instance) -> Prospect:
        best = appraiser.prefix.longest()
        own = appraiser.prefix.own_blocks(instance.info.hbm_source_id)
        pulls = best > own * self.config.mooncake_threshold
        return appraiser.prospect_with(instance, best if pulls else own)

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        """Keeps nothing."""
