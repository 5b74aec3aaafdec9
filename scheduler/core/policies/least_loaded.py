"""The instance with the least work: a baseline. Roles are ignored, nothing is split or pulled from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option
from scheduler.core.policies.local import own_prospect


@dataclass(slots=True)
class LeastLoaded:
    config: SchedulerConfig

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> Iterable[Option]:
        def order(instance: Instance) -> tuple[int, int, str]:
            return appraiser.queue_us(instance), -appraiser.kv_tokens_left(instance), instance.id

        return (appraiser.colocated(i, own_prospect(appraiser, i)) for i in sorted(instances, key=order))

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        """Keeps nothing."""
