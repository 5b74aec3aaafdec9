"""The link meter: what it measures, how links go down and come back, and which one it takes."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.estimates import STALE_US, Recent, Usual
from kvpool.core.links import (
    TRANSITIONS,
    USABLE,
    Failure,
    LinkConfig,
    LinkEvent,
    LinkMeter,
    LinkState,
)

MIB = 1 << 20
SECOND = 1_000_000
S, SHM, TCP = "node-1", "shm", "tcp"


class Clocked:
    """A meter with a clock, and links that take as long as the test says."""

    def __init__(self, config: LinkConfig = LinkConfig()) -> None:  # noqa: B008
        self.meter, self.now_us = LinkMeter(config), 1_000_000

    def move(self, kind: str, bytes_s: float, size: int = 8 * MIB, latency_us: int = 100, concurrency: int = 1) -> None:
        duration_us = latency_us + int(size / bytes_s * 1e6)
        self.now_us += duration_us
        self.meter.transferred(S, kind, size, duration_us, concurrency, self.now_us)
        self.meter.check_invariants()

    def fail(self, kind: str, failure: Failure = Failure.ERROR, waited_us: int = 0, size: int = MIB) -> None:
        self.now_us += 10
        self.meter.failed(S, kind, failure, self.now_us, waited_us=waited_us, size_bytes=size, error="broken")
        self.meter.check_invariants()

    def probe_until(self, kind: str, up: bool, seconds: float) -> None:
        """Probes whenever one is due, for a time; `up`: whether they pass."""
        end_us = self.now_us + int(seconds * SECOND)
        while (due_us := max(self.now_us, self.meter.probe_due_us(S, kind))) <= end_us:
            self.now_us = due_us
            self.meter.probe_begun(S, kind, self.now_us)
            self.now_us += 200
            if up:
                self.meter.probed(S, kind, 200, self.now_us)
            else:
                self.meter.probe_failed(S, kind, self.now_us)
            self.meter.check_invariants()
        self.now_us = end_us

    def state(self, kind: str) -> LinkState:
        return self.meter.state(S, kind)

    def choose(self, *kinds: str, size_bytes: int = MIB) -> str | None:
        return self.meter.choose(S, kinds or (SHM, TCP), self.now_us, size_bytes=size_bytes)

    def down(self, kind: str) -> None:
        self.fail(kind, Failure.TIMEOUT, waited_us=5 * SECOND)
        assert self.state(kind) is LinkState.DOWN


def test_each_event_of_a_state_has_a_place_in_the_table() -> None:
    probes = {LinkEvent.PROBE, LinkEvent.PROBED, LinkEvent.RESTORED}
    for state, event in itertools.product(LinkState, LinkEvent):
        if (state in USABLE and event in probes) or (
            state is LinkState.DOWN and event in (LinkEvent.PROBED, LinkEvent.RESTORED)
        ):
            assert (state, event) not in TRANSITIONS
        else:
            assert (state, event) in TRANSITIONS
    # Back up leads through probes only.
    assert [e for (s, e), to in TRANSITIONS.items() if s not in USABLE and to in USABLE] == [LinkEvent.RESTORED]


def test_unknown_links_are_up_and_unmeasured() -> None:
    c = Clocked()
    assert c.state(SHM) is LinkState.UP
    assert c.meter.predict_us(S, SHM, MIB) is None
    assert c.choose() == SHM and c.choose(TCP, SHM) == TCP and c.meter.choose(S, [], 0) is None
    assert c.meter.snapshot() == []


@pytest.mark.parametrize("bytes_s", [5e6, 1e9, 2e10])
def test_bandwidth_and_latency_are_told_apart(bytes_s: float) -> None:
    c = Clocked()
    for size in (16 * MIB, 1000, 4 * MIB, 64 * 1024) * 20:
        c.move(TCP, bytes_s, size, latency_us=400)
    (link,) = c.meter.snapshot()
    assert link.bandwidth_bytes_s == pytest.approx(bytes_s, rel=0.1)
    assert link.latency_us is not None and 200 <= link.latency_us <= 800
    for size in (1000, MIB, 100 * MIB):
        assert c.meter.predict_us(S, TCP, size) == pytest.approx(400 + size / bytes_s * 1e6, rel=0.3, abs=150)
    assert (link.samples, link.bytes_total) == (80, 20 * (20 * MIB + 1000 + 64 * 1024))


def test_concurrent_transfers_are_measured_apart() -> None:
    c = Clocked()
    for _ in range(30):
        c.move(TCP, 1e9)
        c.move(TCP, 2.5e8, concurrency=4)
    (link,) = c.meter.snapshot()
    assert link.bandwidth_bytes_s == pytest.approx(1e9, rel=0.1)
    assert link.bandwidth_shared_bytes_s == pytest.approx(2.5e8, rel=0.1)
    alone, shared = (c.meter.predict_us(S, TCP, 100 * MIB, n) for n in (1, 2))
    assert alone is not None and shared is not None and shared > 3 * alone


def test_one_wild_sample_does_not_move_an_estimate_far() -> None:
    c = Clocked()
    for _ in range(20):
        c.move(TCP, 1e9)
    before = c.meter.predict_us(S, TCP, MIB)
    c.move(TCP, 1e6)
    after = c.meter.predict_us(S, TCP, MIB)
    assert before is not None and after is not None and after < 1.5 * before


def test_a_lasting_change_is_followed_within_twenty_samples() -> None:
    c = Clocked()
    for speed in (1e9, 2e7, 4e9, 1e9, 7e8):
        for _ in range(20):
            c.move(TCP, speed, latency_us=0)
        assert c.meter.snapshot()[0].bandwidth_bytes_s == pytest.approx(speed, rel=0.1)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(1e-3, 1e9), st.integers(0, 10 * SECOND)), min_size=1, max_size=60))
def test_estimates_stay_within_their_samples(samples: list[tuple[float, int]]) -> None:
    recent, usual, now_us = Recent(), Usual(), 0
    for sample, later_us in samples:
        now_us += later_us
        recent.add(sample, now_us)
        usual.add(sample)
    values = [sample for sample, _ in samples]
    for estimate in (recent, usual):
        assert min(values) * 0.999 <= estimate.value <= max(values) * 1.001
    if len(samples) <= 4:
        assert usual.value == pytest.approx(sum(values) / len(values))
    if samples[-1][1] > STALE_US:
        assert recent.value == pytest.approx(values[-1]), "what is stale still counts"


# ------------------------------------------------------------ down and back


def test_errors_in_a_row_take_a_link_down() -> None:
    c = Clocked()
    c.fail(SHM)
    assert c.state(SHM) is LinkState.DEGRADED
    c.fail(SHM)
    c.move(SHM, 1e9)
    c.fail(SHM)
    c.fail(SHM)
    assert c.state(SHM) is LinkState.DEGRADED, "the success between did not count"
    c.fail(SHM)
    assert c.state(SHM) is LinkState.DOWN
    assert c.choose() == TCP and c.choose(SHM) is None


def test_a_timeout_takes_a_link_down_but_impatience_does_not() -> None:
    c = Clocked()
    c.fail(TCP, Failure.TIMEOUT, waited_us=200_000)
    assert c.state(TCP) is LinkState.UP, "never measured: nobody knows whether that was too long"
    for _ in range(5):
        c.move(TCP, 1e9)
    for _ in range(10):
        c.fail(TCP, Failure.TIMEOUT, waited_us=3_000)
    assert c.state(TCP) is LinkState.UP
    c.fail(TCP, Failure.TIMEOUT, waited_us=300_000)
    assert c.state(TCP) is LinkState.DEGRADED, "300 ms for what takes one"
    c.fail(TCP, Failure.TIMEOUT, waited_us=SECOND)
    assert c.state(TCP) is LinkState.DOWN
    (link,) = c.meter.snapshot()
    assert (link.errors, link.timeouts, link.error) == (13, 13, "broken")


def test_a_degraded_link_takes_several_good_transfers_to_be_up() -> None:
    c = Clocked()
    c.fail(SHM)
    c.move(SHM, 1e9)
    c.move(SHM, 1e9)
    assert c.state(SHM) is LinkState.DEGRADED
    c.move(SHM, 1e9)
    assert c.state(SHM) is LinkState.UP


def test_far_slower_than_usual_is_degraded_until_it_is_over() -> None:
    c = Clocked()
    for _ in range(30):
        c.move(TCP, 1e9)
    c.move(TCP, 1e8)
    c.move(TCP, 1e8)
    assert c.state(TCP) is LinkState.UP
    c.move(TCP, 1e8)
    assert c.state(TCP) is LinkState.DEGRADED
    c.move(TCP, 3e8)
    c.move(TCP, 3e8)
    c.move(TCP, 3e8)
    assert c.state(TCP) is LinkState.DEGRADED, "between the two thresholds nothing changes"
    for _ in range(3):
        c.move(TCP, 1e9)
    assert c.state(TCP) is LinkState.UP


def test_late_news_of_a_broken_link_do_not_bring_it_back() -> None:
    c = Clocked()
    c.down(SHM)
    for _ in range(10):
        c.move(SHM, 1e9)
        c.fail(SHM)
    assert c.state(SHM) is LinkState.DOWN
    c.meter.probe_begun(S, SHM, c.now_us)
    c.move(SHM, 1e9)
    assert c.state(SHM) is LinkState.PROBING


def test_probes_back_off_but_never_far() -> None:
    c = Clocked()
    c.down(TCP)
    waits = []
    for _ in range(12):
        waits.append(c.meter.probe_due_us(S, TCP) - c.now_us)
        c.now_us = c.meter.probe_due_us(S, TCP)
        c.meter.probe_begun(S, TCP, c.now_us)
        assert c.state(TCP) is LinkState.PROBING
        c.meter.probe_failed(S, TCP, c.now_us, error="still gone")
        assert c.state(TCP) is LinkState.DOWN
    assert waits[0] == c.meter.config.backoff_us_min
    assert waits == sorted(waits) and waits[-1] == c.meter.config.backoff_us_max
    c.probe_until(TCP, up=True, seconds=2.1)
    assert c.state(TCP) is LinkState.UP


def test_a_probe_that_never_reports_is_lost() -> None:
    c = Clocked()
    c.down(TCP)
    c.now_us += SECOND
    c.meter.probe_begun(S, TCP, c.now_us)
    assert c.meter.probe_due_us(S, TCP) == c.now_us + c.meter.config.probe_timeout_us


def test_idle_links_are_probed_once_a_second_and_busy_ones_are_not() -> None:
    c = Clocked()
    c.move(TCP, 1e9)
    assert c.meter.probe_due_us(S, TCP) == c.now_us + c.meter.config.idle_us
    c.now_us += SECOND
    c.meter.probe_begun(S, TCP, c.now_us)
    assert c.state(TCP) is LinkState.UP
    c.meter.probed(S, TCP, 150, c.now_us)
    assert c.meter.probe_due_us(S, TCP) == c.now_us + c.meter.config.idle_us
    c.meter.probe_failed(S, TCP, c.now_us)
    assert c.state(TCP) is LinkState.DOWN


def test_a_new_session_begins_with_links_that_are_up() -> None:
    c = Clocked()
    for _ in range(5):
        c.move(TCP, 1e9)
    c.down(TCP)
    c.meter.opened(S, TCP, c.now_us)
    assert c.state(TCP) is LinkState.UP
    assert c.meter.snapshot()[0].bandwidth_bytes_s is not None


def test_flapping_costs_more_probes_and_is_forgiven() -> None:
    c = Clocked()
    penalties = []
    for _ in range(6):
        c.down(TCP)
        penalties.append(c.meter.snapshot()[0].penalty)
        c.probe_until(TCP, up=True, seconds=4.5)
        assert c.state(TCP) is LinkState.UP, "recovery has to be noticed within seconds, flapping or not"
    assert penalties == [0, 1, 2, 3, 4, 4]
    c.now_us += 60 * SECOND
    c.down(TCP)
    assert c.meter.snapshot()[0].penalty == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_flapping_link_is_in_use_seconds_after_it_settles(seed: int) -> None:
    """Users of others report links that stayed slow for 25 minutes after a port had flapped."""
    rng = random.Random(seed)
    c = Clocked()
    for _ in range(20):
        c.move(SHM, 1e10)
        c.move(TCP, 1e9)
    for _ in range(50):
        c.fail(SHM, rng.choice(list(Failure)), waited_us=rng.choice([0, 2 * SECOND]))
        c.probe_until(SHM, up=rng.random() < 0.5, seconds=rng.uniform(0, 8))
        if c.state(SHM) in USABLE:
            c.move(SHM, rng.choice([1e10, 1e8]))
        c.move(TCP, 1e9)
    settled_us = c.now_us
    while c.state(SHM) is not LinkState.UP or c.choose() != SHM:
        c.probe_until(SHM, up=True, seconds=0.1)
        if (chosen := c.choose()) is not None:
            c.move(chosen, 1e10 if chosen == SHM else 1e9)
        assert c.now_us - settled_us < 70 * SECOND, f"seed {seed}"
        if c.state(SHM) is not LinkState.UP:
            assert c.now_us - settled_us < 6 * SECOND, f"seed {seed}"


# ------------------------------------------------------------ choice


def test_the_fastest_is_taken_once_all_are_measured() -> None:
    c = Clocked()
    c.move(TCP, 1e9)
    assert c.choose() == SHM, "it comes first, and nothing is known of it yet"
    c.move(SHM, 2e8)
    c.move(TCP, 1e9)
    assert c.choose() == TCP
    assert c.choose(TCP, SHM) == TCP


def test_size_decides_between_latency_and_bandwidth() -> None:
    c = Clocked()
    for _ in range(10):
        c.move(SHM, 1e9, latency_us=0)
        c.meter.probed(S, SHM, 10, c.now_us)
        c.move(TCP, 4e9, latency_us=3000)
        c.meter.probed(S, TCP, 3000, c.now_us)
    c.move(SHM, 1e9, latency_us=0)
    assert c.choose(size_bytes=64 * 1024) == SHM
    assert c.choose(size_bytes=256 * MIB) == TCP


def test_the_one_in_use_is_left_only_for_a_clearly_faster_one() -> None:
    for in_use, other in ((SHM, TCP), (TCP, SHM)):
        c = Clocked()
        for _ in range(20):
            c.move(other, 1.1e9)
            c.move(in_use, 1e9)
        assert c.choose(other, in_use) == in_use
        for _ in range(20):
            c.move(other, 2e9)
            c.move(in_use, 1e9)
        assert c.choose(other, in_use) == other


def test_a_link_that_was_slow_once_is_tried_again() -> None:
    c = Clocked()
    for _ in range(20):
        c.move(SHM, 1e8)
        c.move(TCP, 1e9)
    assert c.choose() == TCP
    tries = 0
    for _ in range(20_000):
        c.now_us += 10_000
        chosen = c.choose()
        assert chosen is not None
        tries += chosen == SHM
        c.move(chosen, 1e8 if chosen == SHM else 1e9, size=MIB)
    assert 2 <= tries <= 12, "about once a minute, while it stays slow"
    for _ in range(9_000):
        c.now_us += 10_000
        chosen = c.choose()
        assert chosen is not None
        c.move(chosen, 1e10 if chosen == SHM else 1e9, size=MIB)
    for _ in range(200):
        chosen = c.choose()
        assert chosen is not None
        c.move(chosen, 1e10 if chosen == SHM else 1e9, size=MIB)
        c.now_us += SECOND
    assert c.choose() == SHM, "it is fast again, and nobody noticed"


def test_choosing_changes_nothing() -> None:
    c = Clocked()
    for _ in range(5):
        c.move(SHM, 1e9)
        c.move(TCP, 1e9)
    c.fail(SHM)
    before = c.meter.snapshot()
    for later_us in range(0, 100 * SECOND, SECOND):
        c.meter.choose(S, (SHM, TCP), c.now_us + later_us)
        c.meter.predict_us(S, SHM, MIB)
        c.meter.probe_due_us(S, "unknown")
    assert c.meter.snapshot() == before


def test_links_are_bounded_and_forgotten() -> None:
    meter = LinkMeter(LinkConfig(links_max=4))
    for i in range(10):
        meter.transferred(f"node-{i}", TCP, MIB, 1000, 1, i)
        meter.transferred("node-0", TCP, MIB, 1000, 1, i)
        meter.check_invariants()
    assert [link.source for link in meter.snapshot()] == ["node-0", "node-7", "node-8", "node-9"]
    assert [link.source for link in meter.snapshot("node-8")] == ["node-8"]
    meter.forget("node-8")
    assert meter.snapshot("node-8") == []


KINDS = st.sampled_from([SHM, TCP])
EVENTS = st.one_of(
    st.tuples(st.just("move"), KINDS, st.integers(1, 64 * MIB), st.integers(0, 10 * SECOND), st.integers(1, 4)),
    st.tuples(st.just("fail"), KINDS, st.sampled_from(list(Failure)), st.integers(0, 3 * SECOND)),
    st.tuples(st.sampled_from(["probe_begun", "probed", "probe_failed", "opened"]), KINDS),
    st.tuples(st.just("wait"), st.integers(0, 20 * SECOND)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, max_size=80))
def test_whatever_happens_the_meter_stays_sound(events: list[tuple]) -> None:
    meter, again, now_us = LinkMeter(), LinkMeter(), 0
    for event in events:
        for one in (meter, again):
            match event:
                case ("move", kind, size, duration_us, concurrency):
                    one.transferred(S, kind, size, duration_us, concurrency, now_us)
                case ("fail", kind, failure, waited_us):
                    one.failed(S, kind, failure, now_us, waited_us=waited_us, size_bytes=MIB)
                case ("probed", kind):
                    one.probed(S, kind, 100, now_us)
                case ("wait", _):
                    pass
                case (name, kind):
                    getattr(one, name)(S, kind, now_us)
            one.check_invariants()
        if event[0] == "wait":
            now_us += event[1]
        chosen = meter.choose(S, (SHM, TCP), now_us)
        usable = [kind for kind in (SHM, TCP) if meter.state(S, kind) in USABLE]
        assert chosen in usable if usable else chosen is None
        for kind in (SHM, TCP):
            if kind not in usable:
                assert meter.probe_due_us(S, kind) <= now_us + meter.config.backoff_us_max
    assert meter.snapshot() == again.snapshot()
