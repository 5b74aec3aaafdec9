"""Leases, pins and hand-off holds against counters kept by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.holds import Holds
from kvpool.core.ids import SessionId

ENTRIES = 8
entry_lists = st.lists(st.integers(0, ENTRIES - 1), min_size=1, max_size=6)
steps = st.lists(
    st.tuples(
        st.sampled_from(["lease", "pin", "handoff", "end lease", "end pin", "end handoff"]),
        entry_lists,
        st.sampled_from(["", "p", "q"]),
        st.integers(0, 100),
    ),
    max_size=60,
)


class ByHand:
    def __init__(self) -> None:
        self.leases: dict[int, tuple[list[int], str]] = {}
        self.pins: dict[int, list[int]] = {}
        self.handoffs: dict[str, dict[int, None]] = {}

    def counts(self) -> Counter[int]:
        held = Counter(e for entries, _ in self.leases.values() for e in entries)
        held.update(e for entries in self.pins.values() for e in entries)
        held.update(e for entries in self.handoffs.values() for e in entries)
        return held

    def loose(self, entries: list[int]) -> list[int]:
        held = self.counts()
        return [e for e in dict.fromkeys(entries) if not held[e]]

    def end_lease(self, number: int) -> list[int]:
        entries, request = self.leases.pop(number)
        for entry in entries:
            self.handoffs.get(request, {}).pop(entry, None)
        if not self.handoffs.get(request, {1: None}):
            del self.handoffs[request]
        return self.loose(entries)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_agrees_with_counting_by_hand(steps: list[tuple[str, list[int], str, int]]) -> None:
    holds, model = Holds(ENTRIES), ByHand()
    for verb, entries, request, number in steps:
        array = np.array(entries, dtype=np.int32)
        if verb == "lease":
            model.leases[holds.add_lease(SessionId(1 + number % 3), array, 10, request)] = (entries, request)
        elif verb == "pin":
            model.pins[holds.add_pin(SessionId(1 + number % 3), array, 0)] = entries
        elif verb == "handoff":
            holds.add_handoff(request, entries[0], number)
            model.handoffs.setdefault(request, {})[entries[0]] = None
        elif verb == "end lease" and model.leases:
            lease = list(model.leases)[number % len(model.leases)]
            assert holds.end_lease(lease).tolist() == model.end_lease(lease)
        elif verb == "end pin" and model.pins:
            pin = list(model.pins)[number % len(model.pins)]
            gone = model.pins.pop(pin)
            assert holds.end_pin(pin).tolist() == model.loose(gone)
        elif verb == "end handoff" and request in model.handoffs:
            loose = list(model.handoffs.pop(request))
            assert holds.end_handoff(request).tolist() == model.loose(loose)
        holds.check_invariants()
        held = model.counts()
        everything = np.arange(ENTRIES, dtype=np.int32)
        assert (holds.lease_counts + holds.pin_counts).tolist() == [held[e] for e in range(ENTRIES)]
        assert holds.held(everything).tolist() == [held[e] > 0 for e in range(ENTRIES)]
        assert sorted(holds.handoffs) == sorted(model.handoffs)


def test_a_handoff_ends_at_the_latest_time_it_was_given() -> None:
    holds = Holds(ENTRIES)
    holds.add_handoff("r", 1, 50)
    holds.add_handoff("r", 2, 20)
    assert holds.handoffs["r"].expires_us == 50


def test_a_lease_ends_only_its_own_part_of_a_handoff() -> None:
    """A reader pulls in several batches: the end of the first must not free what the second still needs."""
    holds = Holds(ENTRIES)
    for entry in range(4):
        holds.add_handoff("r", entry, 100)
    first = holds.add_lease(SessionId(1), np.array([0, 1], dtype=np.int32), 10, "r")
    assert holds.end_lease(first).tolist() == [0, 1]
    assert list(holds.handoffs["r"].entries) == [2, 3]
    second = holds.add_lease(SessionId(1), np.array([2, 3], dtype=np.int32), 10, "r")
    assert holds.end_lease(second).tolist() == [2, 3] and not holds.handoffs
