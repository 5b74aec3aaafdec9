"""When blocks may be stored, and that every reference that was taken is given back."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.vllm.plans import GroupBlocks, Transfer
from engines.vllm.saving import SavePipeline


class Made:
    def __init__(self, blocks_max: int = 8, workers: int = 2) -> None:
        self.references: Counter[int] = Counter()
        self.pipeline = SavePipeline(blocks_max, workers, self.references.update, self.references.subtract)

    @property
    def held(self) -> dict[int, int]:
        return {block: count for block, count in self.references.items() if count}


def transfers(*blocks: int) -> list[Transfer]:
    return [Transfer("r", (GroupBlocks(0, bytes(16 * len(blocks)), blocks),))]


def test_stored_after_the_output_has_come() -> None:
    made = Made()
    made.pipeline.computes(1, transfers(5, 6))
    assert made.held == {5: 1, 6: 1} and made.pipeline.take_confirmed() == {} and not made.pipeline.has_work
    made.pipeline.computed(1)
    assert made.pipeline.has_work and made.pipeline.take_confirmed() == {1: transfers(5, 6)}
    made.pipeline.stored({1: 1})
    assert made.held == {5: 1, 6: 1} and made.pipeline.has_work
    made.pipeline.stored({1: 1})
    assert made.held == {} and not made.pipeline.has_work and made.pipeline.blocks == 0


def test_a_failed_load_spoils_what_was_begun_since() -> None:
    made = Made()
    made.pipeline.computes(1, transfers(1))
    made.pipeline.computed(1)
    made.pipeline.computes(2, transfers(2))  # its load has failed
    made.pipeline.computes(3, transfers(3))  # begun before that was known
    assert made.pipeline.failed() == [*transfers(2), *transfers(3)]
    made.pipeline.computed(2)
    made.pipeline.computed(3)
    assert made.pipeline.take_confirmed() == {1: transfers(1)}
    assert made.held == {1: 1} and list(made.pipeline.held()) == [1]


def test_a_reset_drops_what_the_workers_have_not_got() -> None:
    made = Made()
    for step in (1, 2, 3):
        made.pipeline.computes(step, transfers(step))
    made.pipeline.computed(1)
    made.pipeline.take_confirmed()
    made.pipeline.computed(2)
    made.pipeline.failed()
    made.pipeline.drop_confirmed()
    assert made.pipeline.take_confirmed() == {} and made.held == {1: 1}


def test_the_bound() -> None:
    made = Made(blocks_max=2)
    made.pipeline.computes(1, transfers(1, 2))
    assert made.pipeline.room == 0
    with pytest.raises(AssertionError):
        made.pipeline.computes(2, transfers(3))
    made.pipeline.computed(1)
    assert made.pipeline.room == 0
    made.pipeline.take_confirmed()
    made.pipeline.stored({1: 2})
    assert made.pipeline.room == 2 and made.held == {}


def test_an_output_that_never_comes_holds_nothing_for_ever() -> None:
    made = Made()
    made.pipeline.computes(1, transfers(1))
    made.pipeline.computes(2, transfers(2))
    assert made.pipeline.computed(2) == transfers(1)
    assert made.held == {2: 1} and made.pipeline.computed(1) == [] and made.pipeline.computed(5) == []


@given(st.lists(st.tuples(st.sampled_from(["computes", "computed", "failed", "take", "stored"]), st.integers(0, 9))))
def test_no_reference_is_lost(steps: list[tuple[str, int]]) -> None:
    made = Made(workers=1)
    number, taken = 0, []
    for what, value in steps:
        if what == "computes":
            number += 1
            if made.pipeline.room >= 2:
                made.pipeline.computes(number, transfers(value, value + 10))
        elif what == "computed":
            made.pipeline.computed(number - value)
        elif what == "failed":
            made.pipeline.failed()
        elif what == "take":
            taken += list(made.pipeline.take_confirmed())
        elif taken:
            made.pipeline.stored({taken.pop(value % len(taken)): 1})
        assert sum(made.held.values()) == made.pipeline.blocks <= 8 and min(made.held.values(), default=1) > 0
    made.pipeline.failed()
    made.pipeline.stored(Counter([*taken, *made.pipeline.take_confirmed()]))
    assert made.held == {} and made.pipeline.blocks == 0 and not made.pipeline.has_work
