"""Cost beliefs: what is fitted from samples, how fast it follows a change, and how little a stall moves it."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.config import SchedulerConfig
from scheduler.core.cost import (
    DECODE_FORGETTING,
    DECODE_PRIOR,
    LINK_FORGETTING,
    LINK_PRIORS,
    PREFILL_FORGETTING,
    PREFILL_PRIOR,
    CostBook,
    decode_features,
    decode_time_us,
    prefill_features,
    prefill_time_us,
)
from scheduler.core.events import DecodeSample, PrefillSample
from scheduler.core.fit import LinearFit

#: Mooncake FAST'25 Fig. 14, LLaMA3-70B on 8xA800: prompt tokens -> prefill seconds, without cache and 95 % cached.
MOONCAKE = {
    8_000: (0.97, 0.14),
    16_000: (2.08, 0.23),
    32_000: (4.44, 0.41),
    64_000: (10.58, 0.88),
    128_000: (27.5, 2.32),
}


def prefill_fit(truth: tuple[float, float, float], noise: float, count: int, seed: int = 1) -> LinearFit:
    rng = random.Random(seed)
    fit = LinearFit.start(PREFILL_PRIOR, PREFILL_FORGETTING)
    for _ in range(count):
        new, cached = rng.randint(1, 4000), rng.choice([0, 0, 512, 4096, 16_000])
        x = prefill_features(new, cached)
        y = sum(c * f for c, f in zip(truth, x, strict=True))
        fit.observe(x, y * (1 + noise * (2 * rng.random() - 1)))
    return fit


@pytest.mark.parametrize(
    "truth",
    [
        (3_000.0, 100.0, 0.01),  # a small model on two cores
        (10_000.0, 116.0, 0.00154),  # the prior itself
        (500.0, 2.0, 0.0001),  # a GPU a hundred times as fast
        (200_000.0, 10.0, 0.0),  # nearly nothing but a base
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_prefill_is_learned(truth: tuple[float, float, float], noise: float) -> None:
    fit = prefill_fit(truth, noise, 200)
    for new, cached in ((64, 0), (500, 0), (2000, 0), (2000, 4096), (64, 8192)):
        x = prefill_features(new, cached)
        expected = sum(c * f for c, f in zip(truth, x, strict=True))
        assert fit.predict(x) == pytest.approx(expected, rel=0.02 + noise)


def test_published_prefill_times_are_met() -> None:
    fit = LinearFit.start(PREFILL_PRIOR, PREFILL_FORGETTING)
    for _ in range(5):
        for tokens, (cold_s, warm_s) in MOONCAKE.items():
            cached = tokens * 95 // 100
            fit.observe(prefill_features(tokens, 0), cold_s * 1e6)
            fit.observe(prefill_features(tokens - cached, cached), warm_s * 1e6)
    for tokens, (cold_s, warm_s) in MOONCAKE.items():
        cached = tokens * 95 // 100
        assert fit.predict(prefill_features(tokens, 0)) == pytest.approx(cold_s * 1e6, rel=0.15)
        assert fit.predict(prefill_features(tokens - cached, cached)) == pytest.approx(warm_s * 1e6, rel=0.35)


def test_one_kind_of_sample_scales_the_prior() -> None:
    fit = LinearFit.start(PREFILL_PRIOR, PREFILL_FORGETTING)
    before = fit.predict(prefill_features(4000, 0))
    for _ in range(10):
        fit.observe(prefill_features(1000, 0), 50 * fit_prior(prefill_features(1000, 0)))
    assert fit.predict(prefill_features(4000, 0)) == pytest.approx(50 * before, rel=0.05)


def fit_prior(x: tuple[float, ...]) -> float:
    return sum(c * f for c, f in zip(PREFILL_PRIOR, x, strict=True))


def test_decode_is_learned() -> None:
    rng = random.Random(2)
    truth = (4_000.0, 900.0, 0.3)
    fit = LinearFit.start(DECODE_PRIOR, DECODE_FORGETTING)
    for _ in range(300):
        x = decode_features(rng.randint(1, 16), rng.randint(100, 30_000))
        fit.observe(x, sum(c * f for c, f in zip(truth, x, strict=True)) * rng.uniform(0.9, 1.1))
    for batch, tokens in ((1, 1000), (8, 8000), (16, 30_000)):
        x = decode_features(batch, tokens)
        expected = sum(c * f for c, f in zip(truth, x, strict=True))
        assert fit.predict(x) == pytest.approx(expected, rel=0.08)


@given(st.tuples(*[st.floats(0, 1e6)] * 3), st.integers(0, 1 << 22), st.integers(0, 1 << 22))
def test_times_are_to_the_bit_what_a_fit_of_the_features_predicts(c: tuple[float, ...], a: int, b: int) -> None:
    fit = LinearFit(c, 0.5, [], [], 0.0, 0.0, 0, c, False)
    assert prefill_time_us(c, a, b) == fit.predict(prefill_features(a, b))
    assert decode_time_us(c, a, b) == fit.predict(decode_features(a, b))


@given(st.lists(st.tuples(st.sampled_from(list(LINK_PRIORS)), st.integers(1, 1 << 24), st.integers(1, 10**6))))
@settings(max_examples=50)
def test_no_link_is_believed_to_be_better_than_the_floor(samples: list[tuple[str, int, int]]) -> None:
    book = CostBook(SchedulerConfig())
    for number, (kind, size_bytes, duration_us) in enumerate(samples):
        book.link_floor()
        book.observe_link("w0", f"n{number % 5}", kind, size_bytes, duration_us, False, number)
    floor = book.link_floor()
    for kind in LINK_PRIORS:
        latency_us, byte_us = book.floor(kind)
        here = kind.startswith("local")
        assert latency_us >= (floor.here_latency_us if here else floor.away_latency_us)
        assert byte_us >= (floor.here_us if here else floor.away_us)
    floors = [book.floor(kind) for kind in LINK_PRIORS]
    assert min(floor.here_us, floor.away_us) == min(byte_us for _, byte_us in floors), "and no lower than need be"
    assert min(floor.here_latency_us, floor.away_latency_us) == min(latency_us for latency_us, _ in floors)


def link(count: int, us_a_byte: float, fit: LinearFit | None = None) -> LinearFit:
    fit = fit or LinearFit.start(LINK_PRIORS["remote"], LINK_FORGETTING)
    for number in range(count):
        size = (number % 8 + 1) * 1_000_000
        fit.observe((1.0, float(size)), 500.0 + us_a_byte * size)
    return fit


def test_a_link_that_has_become_slow_is_noticed() -> None:
    """Mooncake #3596: after a port flap transfers stayed five times as slow."""
    fit = link(100, 0.0004)
    assert fit.predict((1.0, 4e6)) == pytest.approx(2_100, rel=0.05)
    link(16, 0.002, fit)
    assert fit.predict((1.0, 4e6)) == pytest.approx(8_500, rel=0.25)
    link(30, 0.0004, fit)
    assert fit.predict((1.0, 4e6)) == pytest.approx(2_100, rel=0.25)


def test_one_stall_is_not_a_change() -> None:
    fit = prefill_fit((3_000.0, 100.0, 0.01), 0.0, 100)
    x = prefill_features(1000, 0)
    before = fit.predict(x)
    fit.observe(x, 1000 * before)
    assert fit.predict(x) < 1.5 * before
    fit.observe(x, 1.0)
    assert fit.predict(x) > 0.7 * before


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**63)), min_size=1, max_size=40
    )
)
def test_any_samples_leave_a_usable_model(samples: list[tuple[int, int, int]]) -> None:
    fit = LinearFit.start(PREFILL_PRIOR, PREFILL_FORGETTING)
    for new, cached, us in samples:
        fit.observe(prefill_features(new, cached), float(us))
        assert all(c >= 0 and math.isfinite(c) for c in fit.current())
        assert 0 <= fit.predict(prefill_features(1000, 1000)) < math.inf


def test_a_newcomer_starts_from_its_peers() -> None:
    costs = CostBook(SchedulerConfig())
    costs.instance_joined("w0", "tiny")
    for new in range(100, 2000, 100):
        costs.observe_prefill("w0", "tiny", PrefillSample(new, 0, 2_000 + 40 * new))
        costs.observe_decode("w0", "tiny", DecodeSample(new // 100, new, 3_000 + 10 * new))
    costs.instance_joined("w1", "tiny")
    costs.instance_joined("w2", "another")
    assert costs.prefill_us("w1", 1000, 0) == pytest.approx(42_000, rel=0.1)
    assert costs.decode_us("w1", 10, 1000) == pytest.approx(13_000, rel=0.1)
    assert costs.prefill_us("w2", 1000, 0) == pytest.approx(fit_prior(prefill_features(1000, 0)), rel=0.01)
    costs.check_invariants()


def test_a_failing_link_is_left_out_longer_each_time() -> None:
    costs = CostBook(SchedulerConfig())

    def fails(now_us: int) -> None:
        costs.observe_link("w0", "node-0", "remote", 0, 0, True, now_us)

    def up(now_us: int) -> bool:
        return costs.link_costs("w0", "node-0", "remote", now_us) is not None

    assert up(0)
    fails(0)
    assert not up(1_999_999) and up(2_000_000)
    fails(2_000_000)
    assert not up(5_999_999) and up(6_000_000)
    for _ in range(50):
        fails(6_000_000)
    assert not up(37_999_999) and up(38_000_000)
    costs.observe_link("w0", "node-0", "remote", 1_000_000, 1_000, False, 6_000_000)
    assert up(6_000_000)


def test_links_are_bounded() -> None:
    costs = CostBook(SchedulerConfig(links_max=10))
    for number in range(100):
        costs.observe_link("w0", f"node-{number}", "local", 1000, 1000, False, 0)
        costs.check_invariants()
    assert list(costs.links) == [("w0", f"node-{n}") for n in range(90, 100)]
