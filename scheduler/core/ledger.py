"""What was decided for each request, from which predictions, and how it turned out. Pure; bounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler.core.commands import Placed, Refused
from scheduler.core.events import OutcomeReported
from scheduler.core.options import Option


class Candidate(NamedTuple):
    """An option that was looked at, as the ledger keeps it."""

    prefill_instance: str
    decode_instance: str
    split: bool
    queue_us: int
    pull_us: int
    prefill_us: int
    handoff_us: int
    decode_harm_us: int
    cost_us: int
    cached_tokens: int
    feasible: bool
    reason: str

    @classmethod
    def of(cls, option: Option) -> Candidate:
        return cls(
            option.prefill.id, option.decode.id, option.split, option.queue_us, option.pull_us, option.prefill_us,
            option.handoff_us, option.harm_us, option.cost_us, option.cached_tokens, option.feasible, option.reason,
        )  # fmt: skip


@dataclass(slots=True)
class LedgerEntry:
    """One request. Placed again after a loss, it keeps its last placement and says how many there were."""

    request_id: str
    gateway_id: str
    policy: str
    prompt_tokens: int
    max_tokens: int
    candidates: tuple[Candidate, ...]
    candidates_total: int
    choice: Placed | Refused
    placed_us: int
    attempts: int
    outcome: OutcomeReported | None = None
    waited_us: int = 0  # for its place
    priority: int = 0
    tenant: str = ""


@dataclass(slots=True)
class Ledger:
    """Entries by request id, the one decided longest ago first; at most `entries_max`."""

    entries_max: int
    entries: dict[str, LedgerEntry] = field(default_factory=dict)

    def decided(self, entry: LedgerEntry) -> None:
        before = self.entries.pop(entry.request_id, None)
        if before is not None and before.gateway_id == entry.gateway_id:
            entry.attempts = before.attempts + 1
        self.entries[entry.request_id] = entry
        if len(self.entries) > self.entries_max:
            del self.entries[next(iter(self.entries))]

    def ended(self, gateway_id: str, outcome: OutcomeReported) -> None:
        """Adds an outcome, or what is known of it so far, to its entry, if that is still there."""
        entry = self.entries.get(outcome.request_id)
        if entry is None or entry.gateway_id != gateway_id:
            return
        if outcome.first_token and entry.outcome is not None and not entry.outcome.first_token:
            return  # the end is known already
        entry.outcome = outcome

    def get(self, request_id: str) -> LedgerEntry | None:
        return self.entries.get(request_id)

    def check_invariants(self) -> None:
        assert len(self.entries) <= self.entries_max
        assert all(entry.request_id == request_id for request_id, entry in self.entries.items())
