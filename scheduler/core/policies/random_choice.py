"""An instance drawn by the request's id: a baseline. Roles are ignored, nothing is split or pulled from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option
from scheduler.core.policies.local import own_prospect


@dataclass(slots=True)
class RandomChoice:
    """The draw depends on the request's id alone, so that a replay draws the same."""

    config: SchedulerConfig

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> Iterable[Option]:
        def draw(instance: Instance) -> tuple[int, str]:
            text = f"{appraiser.request.request_id}\0{instance.id}"
            return xxhash.xxh3_64_intdigest(text.encode()), instance.id

        return (appraiser.colocated(i, own_prospect(appraiser, i)) for i in sorted(instances, key=draw))

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        """Keeps nothing."""
