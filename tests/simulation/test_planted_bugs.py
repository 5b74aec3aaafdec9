"""The simulation can fail: it finds each of many deliberate bugs."""

import pytest

from tests.simulation.auditor import Violation
from tests.simulation.node import Node
from tests.simulation.planted_bugs import BUGS, Bug
from tests.simulation.world import Plan, run_history

FIRST_SEED = 7000


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_auditor_finds_planted_bugs(bug: Bug) -> None:
    """The cores' own checks are off until the end of each history: what is found is seen from the outside, or there."""
    plan = Plan(steps=60, check_every=0, ssd=bug.ssd)
    with bug.planted():
        for seed in range(FIRST_SEED, FIRST_SEED + bug.seeds_max):
            try:
                run_history(seed, plan)
            except Violation:
                return
    pytest.fail(f"{bug.seeds_max} histories from seed {FIRST_SEED} on did not show that {bug.name}")


def test_a_history_is_the_same_each_time() -> None:
    one, other = (run_history(FIRST_SEED, Plan(trace=True)) for _ in range(2))
    assert one.story == other.story
    assert one.counts == other.counts
    assert one.story


def test_what_fails_first_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that can't start is not served by what is left of its predecessor, which would look like other bugs."""
    opened: set[int] = set()
    real = Node._open_store

    def open_once(self: Node) -> object:
        if id(self) in opened:
            raise Violation("planted")
        opened.add(id(self))
        return real(self)

    monkeypatch.setattr(Node, "_open_store", open_once)
    told = set()
    for seed in range(FIRST_SEED, FIRST_SEED + 8):
        opened.clear()
        try:
            run_history(seed, Plan(ssd=True))
        except Violation as error:
            told.add(str(error.__cause__))
    assert told == {"planted"}
