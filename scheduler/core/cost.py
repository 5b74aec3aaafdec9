"""The scheduler's belief about what things cost, fitted online from samples. Pure; microseconds and bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpool.core.ids import Tier
from scheduler.core.config import SchedulerConfig
from scheduler.core.events import DecodeSample, PrefillSample
from scheduler.core.fit import LinearFit

#: Before any sample: Mooncake's LLaMA3-70B on 8xA800 for the shape of prefill (FAST'25 Fig. 14).
PREFILL_PRIOR = (10_000.0, 116.0, 0.00154)
DECODE_PRIOR = (20_000.0, 200.0, 0.02)
#: Latency in microseconds, microseconds a byte; by link class.
LINK_PRIORS: dict[str, tuple[float, ...]] = {
    "local": (2_000.0, 0.0005),
    "remote": (3_000.0, 0.001),
    "local-ssd": (3_000.0, 0.001),
    "remote-ssd": (4_000.0, 0.0015),
}
#: Share of its weight a sample keeps with each newer one. Links change most suddenly, and are measured seldom.
PREFILL_FORGETTING, DECODE_FORGETTING, LINK_FORGETTING = 0.97, 0.99, 0.9
#: A pooled fit becomes the prior of a newcomer from this many samples on.
POOLED_SAMPLES_MIN = 8
#: A prior's coefficient is at least this share of the default's, since a newcomer must be able to learn it.
PRIOR_SHARE_MIN = 0.001


def prefill_features(new_tokens: int, cached_tokens: int) -> tuple[float, ...]:
    return (1.0, float(new_tokens), new_tokens * (cached_tokens + new_tokens / 2))


def decode_features(batch: int, kv_tokens: int) -> tuple[float, ...]:
    return (1.0, float(batch), float(kv_tokens))


def link_class(same_host: bool, tier: Tier) -> str:
    return ("local" if same_host else "remote") + ("-ssd" if tier == Tier.SSD else "")


@dataclass(slots=True)
class Link:
    """What reading from one source costs one instance, and whether it works at present."""

    fit: LinearFit
    failures: int = 0
    down_until_us: int = 0


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

    def forget_model(self, model: str) -> None:
        self.pooled_prefill.pop(model, None)
        self.pooled_decode.pop(model, None)

    def observe_prefill(self, instance_id: str, model: str, sample: PrefillSample) -> None:
        x, y = prefill_features(sample.new_tokens, sample.cached_tokens), float(sample.duration_us)
        self.prefill[instance_id].observe(x, y)
        self.pooled_prefill.setdefault(model, LinearFit.start(PREFILL_PRIOR, PREFILL_FORGETTING)).observe(x, y)

    def observe_decode(self, instance_id: str, model: str, sample: DecodeSample) -> None:
        x, y = decode_features(sample.batch, sample.kv_tokens), float(sample.duration_us)
        self.decode[instance_id].observe(x, y)
        self.pooled_decode.setdefault(model, LinearFit.start(DECODE_PRIOR, DECODE_FORGETTING)).observe(x, y)

    def observe_link(
        self, instance_id: str, source_id: str, kind: str, size_bytes: int, duration_us: int, failed: bool, now_us: int
    ) -> None:
        """Takes one transfer. Failures in a row take the link out of plans for longer each time."""
        link = self.links.pop((instance_id, source_id), None) or Link(
            LinearFit.start(self._link_prior(kind), LINK_FORGETTING)
        )
        self.links[instance_id, source_id] = link  # last = measured last
        if len(self.links) > self.config.links_max:
            del self.links[next(iter(self.links))]
        if failed:
            down_us = min(self.config.link_down_us_min << min(link.failures, 16), self.config.link_down_us_max)
            link.failures += 1
            link.down_until_us = now_us + down_us
            return
        link.failures, link.down_until_us = 0, 0
        x, y = (1.0, float(size_bytes)), float(duration_us)
        link.fit.observe(x, y)
        self.pooled_links.setdefault(kind, LinearFit.start(LINK_PRIORS[kind], LINK_FORGETTING)).observe(x, y)

    def _link_prior(self, kind: str) -> tuple[float, ...]:
        return _prior(self.pooled_links.get(kind), LINK_PRIORS[kind])

    def prefill_us(self, instance_id: str, new_tokens: int, cached_tokens: int) -> int:
        return int(self.prefill[instance_id].predict(prefill_features(new_tokens, cached_tokens)))

    def decode_us(self, instance_id: str, batch: int, kv_tokens: int) -> int:
        """One decode step."""
        return int(self.decode[instance_id].predict(decode_features(batch, kv_tokens)))

    def measured(self, instance_id: str, source_id: str) -> bool:
        return (instance_id, source_id) in self.links

    def unmeasured_costs(self, kind: str) -> tuple[float, float]:
        """Latency and microseconds a byte of a link that nothing is known of but its class."""
        latency, per_byte = self._link_prior(kind)
        return latency, per_byte

    def link_costs(self, instance_id: str, source_id: str, kind: str, now_us: int) -> tuple[float, float] | None:
        """Latency and microseconds a byte; None while the link is taken for down."""
        link = self.links.get((instance_id, source_id))
        if link is None:
            return self.unmeasured_costs(kind)
        if link.down_until_us > now_us:
            return None
        latency, per_byte = link.fit.current()
        return latency, per_byte

    def check_invariants(self) -> None:
        assert len(self.links) <= self.config.links_max
        assert self.prefill.keys() == self.decode.keys()
        for fits in (self.prefill, self.decode, self.pooled_prefill, self.pooled_decode, self.pooled_links):
            for fit in fits.values():
                assert all(c >= 0 for c in fit.current())


def _prior(pooled: LinearFit | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if pooled is None or pooled.samples < POOLED_SAMPLES_MIN:
        return default
    return tuple(max(c, PRIOR_SHARE_MIN * d) for c, d in zip(pooled.current(), default, strict=True))
