"""All requests of one conversation on one instance: a baseline. Roles are ignored and nothing is split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option


@dataclass(slots=True)
class Sticky:
    """A new key goes to the instance with fewest keys; one whose instance has no room moves. No key: least work."""

    config: SchedulerConfig
    #: (model, key) -> instance, used last = last; at most `sticky_keys_max`.
    assigned: dict[tuple[str, str], str] = field(default_factory=dict)
    #: Instance -> number of keys assigned to it.
    counts: dict[str, int] = field(default_factory=dict)

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> Iterable[Option]:
        request = appraiser.request
        home = self.assigned.get((request.model, request.sticky_key)) if request.sticky_key else None

        def order(instance: Instance) -> tuple[bool, int, int, int, str]:
            keys = self.counts.get(instance.id, 0) if request.sticky_key else 0
            return (
                instance.id != home,
                keys,
                appraiser.queue_us(instance),
                -appraiser.kv_tokens_left(instance),
                instance.id,
            )

        return (appraiser.colocated(i) for i in sorted(instances, key=order))

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        if not request.sticky_key:
            return
        key = (request.model, request.sticky_key)
        self._drop(key)
        self.assigned[key] = option.decode.id
        self.counts[option.decode.id] = self.counts.get(option.decode.id, 0) + 1
        if len(self.assigned) > self.config.sticky_keys_max:
            self._drop(next(iter(self.assigned)))

    def _drop(self, key: tuple[str, str]) -> None:
        home = self.assigned.pop(key, None)
        if home is not None:
            self.counts[home] -= 1
            if not self.counts[home]:
                del self.counts[home]
