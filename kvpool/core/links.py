"""How fast and how sound each link is: estimates from transfers and probes, a state machine, the choice between links.

A link is one kind of channel to one source. Pure: the caller brings the time and what happened. All arithmetic that a
choice rests on is + - * / in a fixed order; costs are compared as integer microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final

from kvpool.core.estimates import CLIP_FROM_SAMPLES, Recent, Usual


class LinkState(StrEnum):
    """What may be expected of a link."""

    UP = "up"
    DEGRADED = "degraded"  # it works, but failed lately, or is far slower than usual
    DOWN = "down"  # not to be used; probes tell when it is back
    PROBING = "probing"  # down, and a probe is under way


class LinkEvent(Enum):
    """What moves a link from state to state."""

    GOOD = "good"  # often enough in a row
    SLOW = "slow"  # far slower than usual, several times in a row
    ERROR = "error"
    FAULT = "fault"  # a timeout, or the last of too many errors in a row
    PROBE = "probe"  # a probe begins
    PROBED = "probed"  # it passed, but another one is asked for
    RESTORED = "restored"  # it passed, and it was the last one asked for


_S, _E = LinkState, LinkEvent
#: Transfers that began before a link went down say nothing about its return: only probes do.
TRANSITIONS: Final[dict[tuple[LinkState, LinkEvent], LinkState]] = {
    (_S.UP, _E.GOOD): _S.UP, (_S.UP, _E.SLOW): _S.DEGRADED, (_S.UP, _E.ERROR): _S.DEGRADED,
    (_S.UP, _E.FAULT): _S.DOWN,
    (_S.DEGRADED, _E.GOOD): _S.UP, (_S.DEGRADED, _E.SLOW): _S.DEGRADED, (_S.DEGRADED, _E.ERROR): _S.DEGRADED,
    (_S.DEGRADED, _E.FAULT): _S.DOWN,
    (_S.DOWN, _E.GOOD): _S.DOWN, (_S.DOWN, _E.SLOW): _S.DOWN, (_S.DOWN, _E.ERROR): _S.DOWN,
    (_S.DOWN, _E.FAULT): _S.DOWN, (_S.DOWN, _E.PROBE): _S.PROBING,
    (_S.PROBING, _E.GOOD): _S.PROBING, (_S.PROBING, _E.SLOW): _S.PROBING, (_S.PROBING, _E.ERROR): _S.PROBING,
    (_S.PROBING, _E.FAULT): _S.DOWN, (_S.PROBING, _E.PROBE): _S.PROBING, (_S.PROBING, _E.PROBED): _S.DOWN,
    (_S.PROBING, _E.RESTORED): _S.UP,
}  # fmt: skip
USABLE: Final = (LinkState.UP, LinkState.DEGRADED)


class Failure(StrEnum):
    """How a transfer, an opening or a probe failed."""

    ERROR = "error"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """Times in microseconds. At `links_max` the link that was heard of least recently is forgotten."""

    links_max: int = 1024
    errors_to_down: int = 3
    good_to_up: int = 3
    slow_to_degraded: int = 3
    #: A wait that is shorter is the caller's impatience, no fault, unless it was much longer than predicted.
    timeout_us_min: int = 1_000_000
    backoff_us_min: int = 100_000
    backoff_us_max: int = 2_000_000
    #: Between the probes that a link which flapped has to pass; also when a probe that does not report counts as lost.
    restore_us: int = 250_000
    probe_timeout_us: int = 1_000_000
    idle_us: int = 1_000_000
    #: Going down again within this after a return is flapping.
    flap_us: int = 30_000_000
    penalty_max: int = 4
    penalty_decay_us: int = 10_000_000
    #: When a link that the caller prefers, but that measured slower, is tried again.
    explore_us_min: int = 5_000_000
    explore_us_max: int = 20_000_000


#: Transfers below it measure latency, others bandwidth.
BANDWIDTH_BYTES_MIN: Final = 256 << 10
#: Size that links are compared by unless the caller names another.
REFERENCE_BYTES: Final = 1 << 20
_SLOW_FACTOR, _RECOVERED_FACTOR = 4.0, 2.0  # of the usual time for a byte
_OVERDUE_FACTOR: Final = 4  # of the predicted duration
_STAY_FACTOR: Final = 0.8  # another link must cost less than this much of the one in use


@dataclass(slots=True)
class _Link:
    """All that is known of a link. Costs are microseconds a byte, by whether the transfer was alone (0) or not (1)."""

    since_us: int
    heard_us: int  # of its last transfer or probe
    used_us: int = 0  # of its last transfer that measured bandwidth; 0 = none did
    state: LinkState = LinkState.UP
    latency_us: Recent = field(default_factory=Recent)
    costs: tuple[Recent, Recent] = field(default_factory=lambda: (Recent(), Recent()))
    usual: tuple[Usual, Usual] = field(default_factory=lambda: (Usual(), Usual()))
    samples: int = 0
    bytes_total: int = 0
    errors: int = 0
    timeouts: int = 0
    error: str = ""
    errors_run: int = 0
    good_run: int = 0
    slow_run: int = 0
    probes_failed_run: int = 0
    probes_passed_run: int = 0
    probe_us: int = 0  # when the next probe is due, while down; when a probe counts as lost, while probing
    restored_us: int | None = None
    penalty: int = 0
    penalty_us: int = 0
    explore_us: int = 0


@dataclass(frozen=True, slots=True)
class LinkSnapshot:
    """A link as `kvctl links` and the scheduler see it. None = not measured yet."""

    source: str
    channel: str
    state: LinkState
    since_us: int  # when the state began
    latency_us: int | None
    bandwidth_bytes_s: int | None  # of a transfer that is alone on the link
    bandwidth_shared_bytes_s: int | None  # of each one of several at the same time
    samples: int  # transfers and probes that went well
    bytes_total: int
    errors: int  # of all kinds
    timeouts: int
    error: str  # the last one
    penalty: int  # probes that a return takes beyond the first


class LinkMeter:
    """Measures links, says which are up, and which one to take. A link that nothing is known of counts as up."""

    def __init__(self, config: LinkConfig = LinkConfig()) -> None:
        self.config = config
        self._links: dict[tuple[str, str], _Link] = {}

    # ------------------------------------------------------------ what happened

    def opened(self, source: str, kind: str, now_us: int) -> None:
        """A new session offers the link afresh: it is up, whatever was before; what was measured stays."""
        link = self._link(source, kind, now_us)
        if link.state not in USABLE:
            self._enter(link, LinkState.UP, now_us)
        link.errors_run = link.slow_run = link.probes_failed_run = 0

    def transferred(
        self, source: str, kind: str, size_bytes: int, duration_us: int, concurrency: int, now_us: int
    ) -> None:
        """A transfer went well. `concurrency`: transfers on the link at the same time, this one included."""
        link = self._link(source, kind, now_us)
        link.samples += 1
        link.bytes_total += size_bytes
        duration_us = max(duration_us, 1)
        if size_bytes < BANDWIDTH_BYTES_MIN:
            moving_us = link.costs[concurrency > 1].value * size_bytes
            if moving_us < duration_us / 2:
                link.latency_us.add(duration_us - moving_us, now_us)
            self._good(link, now_us)
            return
        # Latency is left out as far as it is known, but never most of what was measured.
        cost = max(duration_us - link.latency_us.value, duration_us / 4) / size_bytes
        shared = int(concurrency > 1)
        usual = link.usual[shared]
        slow = usual.samples >= CLIP_FROM_SAMPLES and cost > _SLOW_FACTOR * usual.value
        recovered = cost <= _RECOVERED_FACTOR * usual.value or usual.samples < CLIP_FROM_SAMPLES
        link.costs[shared].add(cost, now_us, duration_us)
        usual.add(cost)
        link.used_us = now_us
        self._set_explore(source, kind, link, size_bytes, concurrency)
        if slow:
            link.slow_run += 1
            link.good_run = link.errors_run = 0
            if link.slow_run >= self.config.slow_to_degraded:
                self._apply(link, LinkEvent.SLOW, now_us)
        elif recovered or link.state is not LinkState.DEGRADED:
            self._good(link, now_us)

    def failed(
        self, source: str, kind: str, failure: Failure, now_us: int, *, waited_us: int = 0, size_bytes: int = 0,
        error: str = "",
    ) -> None:  # fmt: skip
        """A transfer or an opening failed. Refusals of what was asked for are no failures of a link: leave them out.

        Args: waited_us, size_bytes: of a timeout, how long for how much.
        """
        predicted_us = self.predict_us(source, kind, size_bytes)
        link = self._link(source, kind, now_us)
        link.errors += 1
        link.error = error
        link.good_run = 0
        if failure is Failure.TIMEOUT:
            link.timeouts += 1
            if waited_us >= self.config.timeout_us_min:
                self._apply(link, LinkEvent.FAULT, now_us)
                return
            if predicted_us is None or waited_us < _OVERDUE_FACTOR * predicted_us:
                return
        link.errors_run += 1
        fault = link.errors_run >= self.config.errors_to_down
        self._apply(link, LinkEvent.FAULT if fault else LinkEvent.ERROR, now_us)

    # ------------------------------------------------------------ probes

    def probe_due_us(self, source: str, kind: str) -> int:
        """When the next probe is due: of a link that is down with growing distance, of others once they are idle."""
        link = self._links.get((source, kind))
        if link is None:
            return 0
        return link.heard_us + self.config.idle_us if link.state in USABLE else link.probe_us

    def probe_begun(self, source: str, kind: str, now_us: int) -> None:
        """Somebody probes; until the result, or `probe_timeout_us`, nobody else needs to."""
        link = self._link(source, kind, now_us)
        if link.state not in USABLE:
            self._apply(link, LinkEvent.PROBE, now_us)
            link.probe_us = now_us + self.config.probe_timeout_us

    def probed(self, source: str, kind: str, latency_us: int, now_us: int) -> None:
        """A probe passed."""
        link = self._link(source, kind, now_us)
        link.samples += 1
        link.latency_us.add(max(latency_us, 1), now_us)
        if link.state in USABLE:
            self._good(link, now_us)
        elif link.state is LinkState.PROBING:
            link.probes_failed_run = 0
            link.probes_passed_run += 1
            restored = link.probes_passed_run > self._penalty(link, now_us)
            self._apply(link, LinkEvent.RESTORED if restored else LinkEvent.PROBED, now_us)
            link.probe_us = now_us + self.config.restore_us

    def probe_failed(self, source: str, kind: str, now_us: int, *, error: str = "") -> None:
        """A probe did not pass in time. One is enough to take a link for down: nothing light fails on a sound one."""
        link = self._link(source, kind, now_us)
        link.errors += 1
        link.error = error
        link.good_run = link.probes_passed_run = 0
        self._apply(link, LinkEvent.FAULT, now_us)
        backoff_us = self.config.backoff_us_min << min(link.probes_failed_run, 16)
        link.probe_us = now_us + min(backoff_us, self.config.backoff_us_max)
        link.probes_failed_run += 1

    # ------------------------------------------------------------ questions

    def state(self, source: str, kind: str) -> LinkState:
        link = self._links.get((source, kind))
        return LinkState.UP if link is None else link.state

    def predict_us(self, source: str, kind: str, size_bytes: int, concurrency: int = 1) -> int | None:
        """What a transfer should take; None if the link was never measured."""
        link = self._links.get((source, kind))
        if link is None:
            return None
        cost = _cost(link, concurrency)
        if cost is None:
            return None
        return int(link.latency_us.value + cost * size_bytes)

    def choose(
        self, source: str, kinds: Sequence[str], now_us: int, *, size_bytes: int = REFERENCE_BYTES, concurrency: int = 1
    ) -> str | None:
        """The kind to take for a transfer: of those that are up the fastest as measured.

        A kind that was never measured is taken where no earlier one is up: the order is then all that is known. One
        that is earlier in the order than the fastest is measured again from time to time. The kind in use is left only
        for one that is clearly faster.

        Args: kinds: in the order of preference.
        Returns: None if none is up.
        """
        usable = [kind for kind in kinds if self.state(source, kind) in USABLE]
        costs = {kind: self._plan_us(source, kind, size_bytes, concurrency) for kind in usable}
        measured = [kind for kind in usable if costs[kind] is not None]
        if not measured:
            return usable[0] if usable else None
        best = self._cheapest(source, measured, costs)
        for kind in usable[: usable.index(best)]:
            if costs[kind] is None or self._worth_a_try(self._links[source, kind], now_us):
                return kind
        return best

    def snapshot(self, source: str | None = None) -> list[LinkSnapshot]:
        """All links, or those to one source, in the order of their names."""
        names = sorted(name for name in self._links if source is None or name[0] == source)
        return [_snapshot(*name, self._links[name]) for name in names]

    def forget(self, source: str) -> None:
        """The source is gone for good."""
        for name in [name for name in self._links if name[0] == source]:
            del self._links[name]

    def check_invariants(self) -> None:
        config = self.config
        assert len(self._links) <= config.links_max
        for link in self._links.values():
            assert 0 <= link.penalty <= config.penalty_max
            assert link.errors_run < config.errors_to_down or link.state not in USABLE
            assert link.state is not LinkState.UP or link.slow_run < config.slow_to_degraded
            assert link.timeouts <= link.errors
            assert all(e.samples == 0 or e.value > 0 for e in (link.latency_us, *link.costs, *link.usual))
            assert link.state in USABLE or link.probe_us <= link.heard_us + config.backoff_us_max

    # ------------------------------------------------------------ state

    def _link(self, source: str, kind: str, now_us: int) -> _Link:
        name = (source, kind)
        link = self._links.pop(name, None)
        if link is None:
            if len(self._links) >= self.config.links_max:
                del self._links[next(iter(self._links))]
            link = _Link(since_us=now_us, heard_us=now_us, explore_us=self.config.explore_us_min)
        link.heard_us = now_us
        self._links[name] = link  # last = heard of last
        return link

    def _good(self, link: _Link, now_us: int) -> None:
        link.good_run += 1
        link.errors_run = link.slow_run = 0
        if link.state is not LinkState.DEGRADED or link.good_run >= self.config.good_to_up:
            self._apply(link, LinkEvent.GOOD, now_us)

    def _apply(self, link: _Link, event: LinkEvent, now_us: int) -> None:
        usable = link.state in USABLE
        if usable and event is LinkEvent.PROBE:
            return
        state = TRANSITIONS[link.state, event]
        if state is LinkState.DOWN and usable:
            self._note_flap(link, now_us)
            link.probes_passed_run = link.probes_failed_run = 0
            link.probe_us = now_us + self.config.backoff_us_min
        elif state is LinkState.DOWN and event is LinkEvent.FAULT:
            link.probes_passed_run = 0
        if event is LinkEvent.RESTORED:
            link.restored_us = now_us
        self._enter(link, state, now_us)

    def _enter(self, link: _Link, state: LinkState, now_us: int) -> None:
        if state is not link.state:
            link.state, link.since_us = state, now_us
            if state is LinkState.UP:
                link.errors_run = link.slow_run = 0

    def _note_flap(self, link: _Link, now_us: int) -> None:
        penalty = self._penalty(link, now_us)
        if link.restored_us is not None and now_us - link.restored_us < self.config.flap_us:
            penalty = min(penalty + 1, self.config.penalty_max)
        link.penalty, link.penalty_us = penalty, now_us

    def _penalty(self, link: _Link, now_us: int) -> int:
        return max(0, link.penalty - (now_us - link.penalty_us) // self.config.penalty_decay_us)

    # ------------------------------------------------------------ choice

    def _plan_us(self, source: str, kind: str, size_bytes: int, concurrency: int) -> int | None:
        """Predicted duration, more where the last transfers failed."""
        predicted_us = self.predict_us(source, kind, size_bytes, concurrency)
        if predicted_us is None:
            return None
        return predicted_us * (1 + self._links[source, kind].errors_run)

    def _cheapest(self, source: str, kinds: Sequence[str], costs: dict[str, int | None]) -> str:
        """The cheapest of measured kinds; the one used last unless another is clearly cheaper."""
        best = min(kinds, key=lambda kind: (costs[kind] or 0, kinds.index(kind)))
        current = max(kinds, key=lambda kind: (self._links[source, kind].used_us, -kinds.index(kind)))
        return best if (costs[best] or 0) < int(_STAY_FACTOR * (costs[current] or 0)) else current

    def _worth_a_try(self, link: _Link, now_us: int) -> bool:
        return link.state is LinkState.UP and now_us - link.used_us >= link.explore_us

    def _set_explore(self, source: str, kind: str, link: _Link, size_bytes: int, concurrency: int) -> None:
        """A link that measures slower than another one of its source is tried again later each time."""
        own_us = self._plan_us(source, kind, size_bytes, concurrency) or 0
        others = [k for s, k in self._links if s == source and k != kind and self.state(s, k) in USABLE]
        costs = [self._plan_us(source, other, size_bytes, concurrency) for other in others]
        if any(cost is not None and cost < int(_STAY_FACTOR * own_us) for cost in costs):
            link.explore_us = min(2 * link.explore_us, self.config.explore_us_max)
        else:
            link.explore_us = self.config.explore_us_min


def _cost(link: _Link, concurrency: int) -> float | None:
    """Microseconds a byte at this concurrency, or at the other one where only that was measured."""
    shared = int(concurrency > 1)
    for estimate in (link.costs[shared], link.costs[1 - shared]):
        if estimate.samples:
            return estimate.value
    return None


def _snapshot(source: str, kind: str, link: _Link) -> LinkSnapshot:
    alone, shared = (int(1e6 / e.value) if e.samples else None for e in link.costs)
    latency_us = int(link.latency_us.value) if link.latency_us.samples else None
    return LinkSnapshot(
        source, kind, link.state, link.since_us, latency_us, alone, shared, link.samples, link.bytes_total,
        link.errors, link.timeouts, link.error, link.penalty,
    )  # fmt: skip
