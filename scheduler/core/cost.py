"""The scheduler's belief about what things cost, fitted online from samples. Pure; microseconds and bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvpool.core.ids import Tier
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import DecodeSample, PrefillSample
from scheduler.core.fit import LinearFit

#: Before any sample: Mooncake's LLaMA3-70B on 8xA800 for the shape of prefill (FAST'25 Fig. 14).
PREFILL_PRIOR = (10_000.0, 116.0, 0.00154)
DECODE_PRIOR = (20_000.0, 200.0, 0.02)
#: Latency in microseconds, microseconds a byte; by link class. Between hosts a good guess, so that it is tried: the
#: first transfers tell what it is worth, and until one has, there is one at a time over a link.
LINK_PRIORS: dict[str, tuple[float, ...]] = {
    "local": (2_000.0, 0.0005),
    "remote": (3_000.0, 0.00008),
    "local-ssd": (3_000.0, 0.001),
    "remote-ssd": (4_000.0, 0.0015),
    "local-hbm": (2_000.0, 0.0005),
    "remote-hbm": (3_000.0, 0.001),
}
#: Share of its weight a sample keeps with each newer one. Links change most suddenly, and are measured seldom.
PREFILL_FORGETTING, DECODE_FORGETTING, LINK_FORGETTING = 0.97, 0.99, 0.9
#: A pooled fit becomes the prior of a newcomer from this many samples on.
POOLED_SAMPLES_MIN = 8
#: What a link usually costs is learned this slowly: a bad hour does not change it.
USUAL_FORGETTING = 0.998
#: A link or prefill that is off by this factor, this many times in a row, has changed: old samples are nearly dropped.
CHANGE_FACTOR = 1.7
CHANGE_SAMPLES = 3
CHANGE_KEEPS = 0.05
#: A link that costs more than this many times the usual is taken for slow.
SLOW_FACTOR = 1.5
#: A prior's coefficient is at least this share of the default's, since a newcomer must be able to learn it.
PRIOR_SHARE_MIN = 0.001


def prefill_features(new_tokens: int, cached_tokens: int) -> tuple[float, ...]:
    return (1.0, float(new_tokens), new_tokens * (cached_tokens + new_tokens / 2))


def prefill_time_us(coefficients: tuple[float, ...], new_tokens: int, cached_tokens: int) -> float:
    """What a fit of these features predicts, to the bit: asked for so often that no features are made for it."""
    base_us, new_us, pair_us = coefficients
    return base_us + new_us * new_tokens + pair_us * (new_tokens * (cached_tokens + new_tokens / 2))


def decode_features(batch: int, kv_tokens: int) -> tuple[float, ...]:
    return (1.0, float(batch), float(kv_tokens))


def decode_time_us(coefficients: tuple[float, ...], batch: int, kv_tokens: int) -> float:
    """As `prefill_time_us`, of one decode step."""
    base_us, sequence_us, token_us = coefficients
    return base_us + sequence_us * batch + token_us * kv_tokens


def link_class(same_host: bool, tier: Tier) -> str:
    return ("local" if same_host else "remote") + _TIER_SUFFIX[tier]


_TIER_SUFFIX = {Tier.HBM: "-hbm", Tier.DRAM: "", Tier.SSD: "-ssd"}


@dataclass(slots=True)
class Change:
    """Notices a lasting change: the same way off, several times in a row."""

    streak: int = 0  # above zero: slower than expected so many times in a row; below: faster

    def seen(self, fit: LinearFit, x: tuple[float, ...], y: float) -> None:
        """To be called before the fit observes the sample."""
        expected = fit.predict(x)
        if y > CHANGE_FACTOR * expected:
            self.streak = max(self.streak, 0) + 1
        elif y * CHANGE_FACTOR < expected:
            self.streak = min(self.streak, 0) - 1
        else:
            self.streak = 0
        if abs(self.streak) >= CHANGE_SAMPLES:
            fit.forget(CHANGE_KEEPS)
            self.streak = 0


@dataclass(slots=True)
class Link:
    """What reading from one source costs one instance, and whether it works at present.

    What is known of a slow link grows old, since plans avoid it: after a while it is taken for what it usually is, and
    so tried again. Each time it proves to be slow still, the while is longer.
    """

    fit: LinearFit
    failures: int = 0
    down_until_us: int = 0
    usual: LinearFit = field(default_factory=lambda: LinearFit.start(LINK_PRIORS["remote"], USUAL_FORGETTING))
    change: Change = field(default_factory=Change)
    measured_us: int = 0
    proved_slow: int = 0  # times in a row that it was tried again in vain

    def trusted_us(self, config: SchedulerConfig) -> int:
        """How long a bad measurement is believed."""
        return min(config.link_trust_us_min << min(self.proved_slow, 16), config.link_trust_us_max)

    def observe(self, x: tuple[float, ...], y: float, now_us: int, config: SchedulerConfig) -> None:
        usual_us = self.usual.predict(x)
        if y <= SLOW_FACTOR * usual_us:
            self.proved_slow = 0
        elif now_us - self.measured_us > self.trusted_us(config):
            self.proved_slow += 1
        self.change.seen(self.fit, x, y)
        self.fit.observe(x, y)
        self.usual.observe(x, y)
        self.measured_us = now_us

    def costs(self, now_us: int, config: SchedulerConfig) -> tuple[float, float]:
        """Latency and microseconds a byte, as of late, or nearer to the usual where that is long ago and was bad."""
        latency, per_byte = self.fit.current()
        age_us, trusted_us = now_us - self.measured_us, self.trusted_us(config)
        if age_us > trusted_us:
            usual_latency, usual_per_byte = self.usual.current()
            share = min((age_us - trusted_us) / trusted_us, 1.0)
            if latency > SLOW_FACTOR * usual_latency:
                latency += (usual_latency - latency) * share
            if per_byte > SLOW_FACTOR * usual_per_byte:
                per_byte += (usual_per_byte - per_byte) * share
        return latency, per_byte


class LinkFloor(NamedTuple):
    """The best that any link is believed to do: on one host, and between two."""

    here_latency_us: float
    here_us: float  # a byte
    away_latency_us: float
    away_us: float


@dataclass(slots=True)
class CostBook:
    """Fitted costs of each instance and link, and pooled ones that newcomers start from.

    Pooled fits: prefill and decode by model, links by class.
    """

    config: SchedulerConfig
    prefill: dict[str, LinearFit] = field(default_factory=dict)
    decode: dict[str, LinearFit] = field(default_factory=dict)
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    pooled_prefill: dict[str, LinearFit] = field(default_factory=dict)
    pooled_decode: dict[str, LinearFit] = field(default_factory=dict)
    pooled_links: dict[str, LinearFit] = field(default_factory=dict)
    prefill_changes: dict[str, Change] = field(default_factory=dict)
    #: Link class -> what a link of it costs that was never measured; made anew when one of them is.
    priors: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: Link class -> the least latency and microseconds a byte that a link of it was ever believed to have.
    floors: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: The least of all floors, made anew when a link has been measured.
    least: LinkFloor | None = field(default=None, init=False)

    def instance_joined(self, instance_id: str, model: str) -> None:
        """Starts fits for a new process from what its peers with the same model have shown."""
        self.prefill[instance_id] = LinearFit.start(
            _prior(self.pooled_prefill.get(model), PREFILL_PRIOR), PREFILL_FORGETTING
        )
        self.decode[instance_id] = LinearFit.start(
            _prior(self.pooled_decode.get(model), DECODE_PRIOR), DECODE_FORGETTING
        )

    def instance_gone(self, instance_id: str) -> None:
        self.prefill.pop(instance_id, None)
        self.decode.pop(instance_id, None)
        self.prefill_changes.pop(instance_id, None)

    def forget_model(self, model: str) -> None:
        self.pooled_prefill.pop(model, None)
        self.pooled_decode.pop(model, None)

    def observe_prefill(self, instance_id: str, model: str, sample: PrefillSample) -> None:
        x, y = prefill_features(sample.new_tokens, sample.cached_tokens), float(sample.duration_us)
        self.prefill_changes.setdefault(instance_id, Change()).seen(self.prefill[instance_id], x, y)
        self.prefill[instance_id].observe(x, y)
        self.pooled_prefill.setdefault(model, LinearFit.start(PREFILL_PRIOR, PREFILL_FORGETTING)).observe(x, y)

    def observe_decode(self, instance_id: str, model: str, sample: DecodeSample) -> None:
        x, y = decode_features(sample.batch, sample.kv_tokens), float(sample.duration_us)
        self.decode[instance_id].observe(x, y)
        self.pooled_decode.setdefault(model, LinearFit.start(DECODE_PRIOR, DECODE_FORGETTING)).observe(x, y)

    def observe_link(
        self,
        instance_id: str,
        source_id: str,
        kind: str,
        size_bytes: int,
        duration_us: int,
        failed: bool,
        now_us: int,
        concurrent: int = 1,
    ) -> None:
        """Takes one transfer. Failures in a row take the link out of plans for longer each time.

        Args:
            concurrent: transfers that shared the link, this one included.
        """
        link = self.links.pop((instance_id, source_id), None)
        if link is None:
            prior = self._link_prior(kind)
            link = Link(LinearFit.start(prior, LINK_FORGETTING), usual=LinearFit.start(prior, USUAL_FORGETTING))
        self.links[instance_id, source_id] = link  # last = measured last
        if len(self.links) > self.config.links_max:
            del self.links[next(iter(self.links))]
        if failed:
            down_us = min(self.config.link_down_us_min << min(link.failures, 16), self.config.link_down_us_max)
            link.failures += 1
            link.down_until_us = now_us + down_us
            return
        link.failures, link.down_until_us = 0, 0
        x, y = (1.0, float(size_bytes * max(concurrent, 1))), float(duration_us)
        link.observe(x, y, now_us, self.config)
        for latency, per_byte in (link.fit.current(), link.usual.current()):
            low = self.floor(kind)
            self.floors[kind] = (min(low[0], latency), min(low[1], per_byte))
        self.priors.pop(kind, None)
        self.least = None
        self.pooled_links.setdefault(kind, LinearFit.start(LINK_PRIORS[kind], LINK_FORGETTING)).observe(x, y)

    def floor(self, kind: str) -> tuple[float, float]:
        """No link of a class is believed to be better than this."""
        known, (latency, per_byte) = self.floors.get(kind), self.unmeasured_costs(kind)
        return (latency, per_byte) if known is None else (min(known[0], latency), min(known[1], per_byte))

    def link_floor(self) -> LinkFloor:
        """The best of all classes, on one host and between two."""
        if self.least is None:
            here, away = ([self.floor(place + tier) for tier in _TIER_SUFFIX.values()] for place in ("local", "remote"))
            self.least = LinkFloor(
                min(latency for latency, _ in here), min(per_byte for _, per_byte in here),
                min(latency for latency, _ in away), min(per_byte for _, per_byte in away),
            )  # fmt: skip
        return self.least

    def _link_prior(self, kind: str) -> tuple[float, ...]:
        return _prior(self.pooled_links.get(kind), LINK_PRIORS[kind])

    def prefill_us(self, instance_id: str, new_tokens: int, cached_tokens: int) -> int:
        return int(prefill_time_us(self.prefill[instance_id].current(), new_tokens, cached_tokens))

    def decode_us(self, instance_id: str, batch: int, kv_tokens: int) -> int:
        """One decode step."""
        return int(decode_time_us(self.decode[instance_id].current(), batch, kv_tokens))

    def measured(self, instance_id: str, source_id: str) -> bool:
        return (instance_id, source_id) in self.links

    def known(self, kind: str) -> bool:
        """Whether links of a class have been measured often enough to tell what one that never was will cost."""
        return self.samples(kind) >= POOLED_SAMPLES_MIN

    def samples(self, kind: str) -> int:
        """How often links of a class have been measured."""
        pooled = self.pooled_links.get(kind)
        return pooled.samples if pooled is not None else 0

    def unmeasured_costs(self, kind: str) -> tuple[float, float]:
        """Latency and microseconds a byte of a link that nothing is known of but its class."""
        known = self.priors.get(kind)
        if known is None:
            latency, per_byte = self._link_prior(kind)
            known = self.priors[kind] = latency, per_byte
        return known

    def link_costs(self, instance_id: str, source_id: str, kind: str, now_us: int) -> tuple[float, float] | None:
        """Latency and microseconds a byte; None while the link is taken for down."""
        link = self.links.get((instance_id, source_id))
        if link is None:
            return self.unmeasured_costs(kind)
        if link.down_until_us > now_us:
            return None
        return link.costs(now_us, self.config)

    def on_trial(self, instance_id: str, source_id: str) -> bool:
        """Whether a link has failed and not worked since: one transfer at a time shows whether it does again."""
        link = self.links.get((instance_id, source_id))
        return link is not None and link.failures > 0

    def check_invariants(self) -> None:
        assert len(self.links) <= self.config.links_max
        assert self.prefill.keys() == self.decode.keys()
        assert all(instance_id in self.prefill for instance_id in self.prefill_changes)
        for fits in (self.prefill, self.decode, self.pooled_prefill, self.pooled_decode, self.pooled_links):
            for fit in fits.values():
                assert all(c >= 0 for c in fit.current())


def _prior(pooled: LinearFit | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if pooled is None or pooled.samples < POOLED_SAMPLES_MIN:
        return default
    return tuple(max(c, PRIOR_SHARE_MIN * d) for c, d in zip(pooled.current(), default, strict=True))
