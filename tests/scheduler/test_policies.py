"""Policies: what the golden scripts don't show, above all that looking at fewer options decides the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import scheduler_events as made

from kvpool.core.ids import Role, Tier
from scheduler.core import events
from scheduler.core.commands import Placed, Refused
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.core.fleet import Fleet
from scheduler.core.options import NO_HANDOFF, Appraiser, Option
from scheduler.core.policies import cheapest

INSTANCES, NODES = 24, 4


def traffic(seed: int) -> Iterator[events.Event]:
    """A cluster of unequal instances, and requests that pile up on it."""
    rng = random.Random(seed)
    for n in range(NODES):
        yield made.attached(n + 1, f"node-{n}", host_id=f"host-{n}")
        yield made.snapshot(n + 1, 0, f"a0..a{rng.randrange(32)},c{8 * n}..c{8 * n + 7}")
    stream = NODES
    for i in range(INSTANCES):
        host = i % NODES
        hbm, line = stream + 1, stream + 2
        stream += 2
        yield made.attached(hbm, f"w{i}-hbm", tier=Tier.HBM, address="", host_id=f"host-{host}")
        yield made.snapshot(hbm, 0, f"{rng.choice('ac')}0" if i % 3 else f"a0..a{rng.randrange(40)}")
        yield made.joined(
            line,
            f"w{i}",
            role=rng.choice(list(Role)),
            kv_tokens_total=rng.choice([8192, 32_768]),
            batch_max=rng.choice([2, 32]),
            host_id=f"host-{host}",
            node_source_id=rng.choice([f"node-{host}", f"node-{host}", ""]),
        )
        speed = rng.uniform(5, 200)
        yield made.reported(
            line,
            kv_tokens_free=1 << 20,
            prefill=tuple(events.PrefillSample(n, 0, int(2000 + speed * n)) for n in (100, 1000, 3000)),
            decode=tuple(events.DecodeSample(b, 1000 * b, int(3000 + 10 * speed * b)) for b in (1, 4, 16)),
            links=tuple(
                events.LinkSample(f"node-{n}", size, int(500 + size * rng.uniform(1e-4, 1e-1)), False, 1)
                for n in range(NODES)
                for size in (100_000, 1_000_000)
            ),
        )
    for number in range(80):
        yield made.place(
            f"r{number}",
            blocks=rng.choice(["a0..a31", "c0..c31", "d0..d31", "a0..a7,c0..c7"]),
            prompt_tokens=rng.randrange(1, 3000),
            max_tokens=rng.randrange(1, 1000),
            policy=rng.choice(["kvpool", "kvpool", "always_split"]),
            ttft_slo_us=rng.choice([0, 0, 100_000]),
            use_pool=rng.random() < 0.8,
        )


def decisions(seed: int) -> list[Placed | Refused]:
    core = SchedulerCore(SchedulerConfig())
    found: list[Placed | Refused] = []
    for number, event in enumerate(traffic(seed)):
        found += [c for c in core.handle(event, number * 1000) if isinstance(c, Placed | Refused)]
    core.check_invariants()
    return found


@pytest.mark.parametrize("seed", range(2))
def test_looking_no_further_than_the_bounds_decides_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    some = decisions(seed)
    assert any(isinstance(d, Placed) and d.split for d in some)
    assert any(isinstance(d, Placed) and not d.split for d in some)
    assert any(isinstance(d, Placed) and d.pull for d in some)
    monkeypatch.setattr(cheapest, "APPRAISED_MAX", 10**9)
    monkeypatch.setattr(cheapest, "HOPELESS_MAX", 10**9)
    some = decisions(seed)
    monkeypatch.setattr(cheapest, "APPRAISED_MIN", 10**9)
    assert decisions(seed) == some
    monkeypatch.setattr(cheapest, "APPRAISED_MIN", 1)
    assert decisions(seed) == some


@pytest.mark.parametrize("seed", range(2))
def test_columns_decide_as_plain_arithmetic_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cheapest, "APPRAISED_MAX", 10**9)
    monkeypatch.setattr(cheapest, "HOPELESS_MAX", 10**9)
    by_columns = decisions(seed)

    def one_by_one(appraiser: Appraiser, fleet: Fleet, rivals: bool) -> list[Option]:
        return cheapest._one_by_one(appraiser, fleet.instances, rivals)

    monkeypatch.setattr(cheapest, "_by_columns", one_by_one)
    assert decisions(seed) == by_columns


@pytest.mark.parametrize("seed", range(4))
def test_no_option_costs_less_than_its_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all there are, whether they would have been looked at or not."""
    best, compared = cheapest._best, 0

    def checked(bounded: Any, options_of: Any, *rest: Any) -> list[Option]:
        nonlocal compared
        bounded = list(bounded)
        for bound_us, instance in bounded:
            for option in options_of(instance):
                # What the prefill instance has no way to hand over has no cost.
                assert option.reason.startswith(NO_HANDOFF) or bound_us <= option.cost_us, (seed, option)
                compared += 1
        return best(bounded, options_of, *rest)

    monkeypatch.setattr(cheapest, "_best", checked)
    decisions(seed)
    assert compared > 1000


def test_a_source_on_the_same_host_is_read_from_though_many_others_reach_further() -> None:
    """More than are looked at everywhere; the one at hand has a single block that the instance lacks."""
    core = SchedulerCore(SchedulerConfig(pull_sources_max=2))
    for n in range(5):
        core.handle(made.attached(n + 1, f"node-{n}", host_id=f"host-{n}"), 0)
        core.handle(made.snapshot(n + 1, 0, "a0..a9" if n else "a0..a3"), 0)
    core.handle(made.attached(7, "w0-hbm", tier=Tier.HBM, address="", host_id="host-0"), 0)
    core.handle(made.snapshot(7, 0, "a0..a2"), 0)
    core.handle(made.joined(8), 0)
    sizes = tuple(range(100_000, 1_000_000, 100_000))
    near = tuple(events.LinkSample("node-0", size, 10 + size // 10_000, False, 1) for size in sizes)
    far = tuple(
        events.LinkSample(f"node-{n}", size, 1000 + size // 50, False, 1) for n in range(1, 5) for size in sizes
    )
    core.handle(made.reported(8, links=near + far), 0)
    (placed,) = core.handle(made.place("r", blocks="a0..a9", prompt_tokens=650), 0)
    assert isinstance(placed, Placed)
    assert [(run.source_id == "node-0", run.first, run.count) for run in placed.pull] == [(True, 3, 1), (False, 4, 6)]


def test_of_many_that_are_alike_few_are_looked_at() -> None:
    """Bounds are so near to costs that the first, or the second, is known to be good enough."""
    core = SchedulerCore(SchedulerConfig(late_binding=()))
    count = 2 * cheapest.LARGE_FLEET
    for n in range(8):
        core.handle(made.attached(n + 1, f"node-{n}", host_id=f"host-{n}"), 0)
        core.handle(made.snapshot(n + 1, 0, f"a0..a9,{'bcdefghi'[n]}10..{'bcdefghi'[n]}40"), 0)
    for n in range(count):
        role, host = Role.DECODE if n % 4 else Role.PREFILL, n % 8
        own = {"host_id": f"host-{host}", "node_source_id": f"node-{host}", "role": role, "kv_tokens_total": 1 << 20}
        core.handle(made.joined(100 + n, f"w{n:03}", **own), 0)
        sizes = (1_000_000, 4_000_000)
        links = tuple(events.LinkSample(f"node-{(n * 3) % 8}", size, 2000 + size // 5000, False, 1) for size in sizes)
        core.handle(made.reported(100 + n, kv_tokens_free=1 << 20, links=links), 0)
    for n in range(300):
        name = "bcdefghi"[n % 8]
        core.handle(made.place(f"r{n}", blocks=f"a0..a9,{name}10..{name}40", prompt_tokens=2700), 1000 * n)
    looked_at = sorted(entry.candidates_total for entry in core.ledger.entries.values())
    assert len(looked_at) == 300 and looked_at[150] <= 4 and looked_at[-1] <= 12, looked_at


@pytest.mark.parametrize("policy", ["random", "sticky", "round_robin", "least_loaded"])
def test_baselines_spread_requests(policy: str) -> None:
    core = SchedulerCore(SchedulerConfig(policy=policy))
    for n in range(4):
        core.handle(made.joined(n + 1, f"w{n}", kv_tokens_total=1 << 20), 0)
    taken = dict.fromkeys(core.cluster.instances, 0)
    for n in range(80):
        (placed,) = core.handle(made.place(f"r{n}", sticky_key=f"c{n % 40}", use_pool=False), 0)
        assert isinstance(placed, Placed)
        taken[placed.decode.instance_id] += 1
    assert min(taken.values()) >= (20 if policy != "random" else 8)


def test_expected_output_follows_what_requests_generate() -> None:
    core = SchedulerCore(SchedulerConfig())
    core.handle(made.joined(1), 0)
    core.handle(events.GatewayOpened(2, "gw"), 0)
    for n in range(200):
        core.handle(made.place(f"r{n}", max_tokens=100), 0)
        core.handle(made.outcome(2, f"r{n}", tokens=10), 0)
    assert core.outputs["tiny"].mean_share == pytest.approx(0.1, abs=0.02)
    assert core.outputs["tiny"].typical_tokens == pytest.approx(10, rel=0.1)
