"""SGLang's cache-aware router: affinity to cached prefixes until loads differ too much; a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.core.cluster import Instance
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option
from scheduler.core.policies import local


@dataclass(slots=True)
class SglangCacheAware:
    """Unbalanced (max - min > abs and max > rel * min requests): least load. Else the longest match if it is more than
    a share of the prompt, else least load. Of instances that only prefill one is chosen like that, and the decode
    instance by least load; every request is split then.

    The router keeps its own picture of what each instance has cached; here the directory knows, which is more.
    Source: SGLang model gateway, policy `cache_aware`.
    """

    config: SchedulerConfig

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> Iterable[Option]:
        loads = {i.id: local.active_requests(appraiser, i) for i in instances}

        def least_load(instance: Instance) -> tuple[int, str]:
            return loads[instance.id], instance.id

        prefills = [i for i in instances if not i.decodes()]
        if prefills:
            best = self._best_match(appraiser, prefills, loads)
            return local.by_role(appraiser, instances, least_load, _first(best, least_load), lambda _: True)
        best = self._best_match(appraiser, instances, loads)
        return local.by_role(appraiser, instances, _first(best, least_load), least_load, lambda _: False)

    def _best_match(self, appraiser: Appraiser, instances: Sequence[Instance], loads: dict[str, int]) -> str:
        """The instance with the longest match; empty where load decides."""
        p = self.config.baselines
        most = max(loads[i.id] for i in instances)
        least = min(loads[i.id] for i in instances)
        if most - least > p.sglang_balance_abs and most > p.sglang_balance_rel * least:
            return ""
        matches = [(local.own_blocks(appraiser, i).total, i) for i in instances]
        blocks, best = min(matches, key=lambda m: (-m[0], loads[m[1].id], m[1].id))
        cached_tokens = blocks * appraiser.prefix.block_tokens
        return best.id if cached_tokens > p.sglang_match_min * appraiser.request.prompt_tokens else ""

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        """Keeps nothing."""


def _first(chosen_id: str, order: Any) -> Any:
    """`order`, but with one instance before all others."""
    return lambda instance: (instance.id != chosen_id, *order(instance))
