"""The interface of a policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from scheduler.core.cluster import Instance
from scheduler.core.events import PlaceRequested
from scheduler.core.options import Appraiser, Option


class Policy(Protocol):
    """Ranks options. Filtering is done: the instances serve the model, are alive and may be placed on."""

    def rank(self, appraiser: Appraiser, instances: Sequence[Instance]) -> Iterable[Option]:
        """Options in order of preference, those that are not feasible among them. Changes nothing.

        It is asked no further than the first feasible one; of a list the others are kept for the ledger.

        Args:
            instances: sorted by id.
        """

    def chosen(self, request: PlaceRequested, option: Option) -> None:
        """Notes what became of the ranking."""
