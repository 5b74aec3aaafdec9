"""Each instance in turn, whatever it holds: a baseline. Roles are ignored and nothing is split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option


@dataclass(slots=True)
class RoundRobin:
    config: SchedulerConfig
    #: Model -> instance that had the last turn; as many entries as models that were asked for and exist.
    last: dict[str, str] = field(default_factory=dict)

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> Iterable[Option]:
        last = self.last.get(appraiser.request.model, "")
        in_turn = [i for i in instances if i.id > last] + [i for i in instances if i.id <= last]
        return (appraiser.colocated(i) for i in in_turn)

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        self.last.pop(request.model, None)
        self.last[request.model] = option.decode.id
        if len(self.last) > self.config.models_seen_max:
            del self.last[next(iter(self.last))]
