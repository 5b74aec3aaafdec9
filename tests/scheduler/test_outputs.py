"""Lengths of answers: what is assumed before one has ended, and how soon that is forgotten."""

from __future__ import annotations

from random import Random
from statistics import mean, median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.outputs import OutputLengths


def test_before_any_has_ended_all_magnitudes_are_as_likely() -> None:
    lengths = OutputLengths(0.5)
    assert lengths.expected(1024) == 512 and lengths.typical(1024) == 32
    assert lengths.expected(1) == 1 and lengths.typical(1) == 1


def test_a_few_answers_say_more_than_what_was_assumed() -> None:
    lengths = OutputLengths(0.5)
    for _ in range(18):
        lengths.ended(10, 1024)
    assert lengths.expected(1024) < 80
    assert lengths.typical(1024) == pytest.approx(10, rel=0.5)


@pytest.mark.parametrize("seed", range(4))
def test_mean_and_median_of_lengths_that_spread_widely_are_found(seed: int) -> None:
    random = Random(seed)
    drawn = [min(max(int(random.lognormvariate(3.0, 1.3)), 1), 2048) for _ in range(3000)]
    lengths = OutputLengths(0.5)
    means, medians = [], []
    for tokens in drawn:
        lengths.ended(tokens, 2048)
        means.append(lengths.expected(2048))
        medians.append(lengths.typical(2048))
    assert mean(means[500:]) == pytest.approx(mean(drawn), rel=0.2), seed
    assert mean(medians[500:]) == pytest.approx(median(drawn), rel=0.2), seed


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 2048)), max_size=60), st.integers(1, 4096))
def test_estimates_are_lengths_that_there_can_be(ended: list[tuple[int, int]], max_tokens: int) -> None:
    lengths = OutputLengths(0.5)
    for tokens, asked in ended:
        lengths.ended(tokens, asked)
    assert 1 <= lengths.expected(max_tokens) <= max_tokens
    assert 1 <= lengths.typical(max_tokens) <= max_tokens
