"""What the scheduler learns of links, of its own predictions and of its load, and what it does with that."""

from __future__ import annotations

import random

import pytest
import scheduler_events as made

from kvpool.core.ids import Role
from scheduler.core import events
from scheduler.core.calibration import Calibration, Errors
from scheduler.core.commands import Placed, RoleProposed
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.core.cost import CostBook
from scheduler.core.roles import LOOK_US, PhaseLoad, wish_of

SECOND_US = 1_000_000


def transfer(costs: CostBook, us_a_byte: float, now_us: int) -> None:
    costs.observe_link("w0", "node-0", "remote", 10_000_000, int(500 + us_a_byte * 10_000_000), False, now_us)


def cost_us(costs: CostBook, now_us: int) -> float:
    known = costs.link_costs("w0", "node-0", "remote", now_us)
    assert known is not None
    return known[0] + known[1] * 10_000_000


def test_a_link_that_is_slow_for_a_while_is_noticed_and_forgiven() -> None:
    """Mooncake #3596: five times as slow, noticed within four transfers, and so is the end of it."""
    costs = CostBook(SchedulerConfig())
    for n in range(60):
        transfer(costs, 0.0004, n * 100_000)
    assert cost_us(costs, 6 * SECOND_US) == pytest.approx(4_500, rel=0.1)
    for n in range(4):
        transfer(costs, 0.002, 6 * SECOND_US + n * 100_000)
    assert cost_us(costs, 7 * SECOND_US) > 3 * 4_500
    for n in range(4):
        transfer(costs, 0.0004, 8 * SECOND_US + n * 100_000)
    assert cost_us(costs, 9 * SECOND_US) < 2 * 4_500


def test_a_slow_link_that_nobody_uses_is_tried_again() -> None:
    costs = CostBook(SchedulerConfig())
    for n in range(60):
        transfer(costs, 0.0004, n * 100_000)
    at_us = 6 * SECOND_US
    for n in range(6):
        transfer(costs, 0.004, at_us + n)
    slow = cost_us(costs, at_us + SECOND_US)
    assert slow > 5 * 4_500
    assert cost_us(costs, at_us + 5 * SECOND_US) == slow, "what was just measured is believed"
    assert cost_us(costs, at_us + 11 * SECOND_US) < 2 * 4_500, "later it is taken for what it usually is"
    transfer(costs, 0.004, at_us + 11 * SECOND_US)  # and tried: it is slow still
    assert cost_us(costs, at_us + 12 * SECOND_US) > 5 * 4_500
    assert cost_us(costs, at_us + 20 * SECOND_US) > 5 * 4_500, "in vain: it is believed for twice as long"


def test_predicted_ttft_converges_on_what_happens() -> None:
    rng = random.Random(3)
    known = Calibration()
    for _ in range(200):
        queue_us, service_us = rng.randrange(2_000_000) * rng.randrange(2), rng.randrange(20_000, 2_000_000)
        actual_us = int((30_000 + 2.4 * queue_us + 1.6 * service_us) * rng.uniform(0.9, 1.1))
        actual_us = actual_us if rng.random() < 0.99 else 20 * actual_us
        known.observe_ttft(known.ttft_us(queue_us, service_us, 0), queue_us, service_us, actual_us, 0)
    for service_us in (50_000, 500_000, 2_000_000):
        assert known.ttft_us(0, service_us, 0) == pytest.approx(30_000 + 1.6 * service_us, rel=0.2)
        expected_us = 30_000 + 2.4 * 1_000_000 + 1.6 * service_us
        assert known.ttft_us(1_000_000, service_us, 0) == pytest.approx(expected_us, rel=0.2)
    assert (known.ttft.median() or 1) < 0.25


def test_the_median_is_exact() -> None:
    rng, errors, seen = random.Random(4), Errors(), []
    assert errors.median() is None
    for _ in range(200):
        predicted, actual = rng.randrange(1, 1000), rng.randrange(100, 1000)
        errors.observe(predicted, actual)
        seen.append(abs(predicted - actual) / actual)
        ordered = sorted(seen[-64:])
        middle = len(ordered) // 2
        expected = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        assert errors.median() == expected


def cluster(count: int, config: SchedulerConfig) -> tuple[SchedulerCore, int]:
    """Instances on hosts of their own, each with its node; prefill at a millisecond a token, links of 10 GB/s."""
    core, stream = SchedulerCore(config), 0
    samples = tuple(events.PrefillSample(n, 0, 1000 * n) for n in (100, 500, 1000, 2000, 3000))
    for n in range(count):
        links = tuple(
            events.LinkSample(f"node-{m}", size, 200 + size // 10_000, False, 1)
            for m in range(count)
            for size in (1_000_000, 10_000_000)
        )
        host = f"host-{n}"
        for event in (
            made.attached(stream + 1, f"node-{n}", host_id=host),
            made.snapshot(stream + 1, 0, ""),
            made.attached(stream + 2, f"w{n}-hbm", host_id=host, address=""),
            made.snapshot(stream + 2, 0, ""),
            made.joined(
                stream + 3,
                f"w{n}",
                host_id=host,
                node_source_id=f"node-{n}",
                kv_tokens_total=1 << 20,
                context_tokens_max=1 << 17,
                batch_max=256,
            ),
        ):
            core.handle(event, 0)
        for _ in range(4):
            report = made.reported(stream + 3, kv_tokens_free=1 << 20, prefill=samples, links=links)
            core.handle(report, 0)
        stream += 3
    core.handle(events.GatewayOpened(stream + 1, "gw"), 0)
    return core, stream + 1


def test_43_forks_of_one_prefix_spread() -> None:
    """The prefix is with one instance and its node: others pull it rather than queue there or compute it again."""
    core, _ = cluster(8, SchedulerConfig())
    held = "a0..a624"  # 40 000 tokens
    core.handle(made.stored(1, 1, held), 1)
    core.handle(made.stored(2, 1, held), 1)
    taken: dict[str, int] = {}
    pulled = 0
    for n in range(43):
        request = made.place(f"r{n}", blocks=f"a0..a624,x{n}", prompt_tokens=40_500, max_tokens=200)
        for command in core.handle(request, 2):
            if isinstance(command, Placed):
                taken[command.prefill.instance_id] = taken.get(command.prefill.instance_id, 0) + 1
                pulled += bool(command.pull)
                assert command.cached_tokens >= 40_000 or command.waited_us == 0
    core.check_invariants()
    assert len(taken) >= 6, taken
    assert max(taken.values()) <= 43 / 2, taken
    assert pulled >= 5


def test_a_burst_of_one_prefix_computes_it_once() -> None:
    core, _ = cluster(4, SchedulerConfig())
    placed = []
    for n in range(12):
        request = made.place(f"r{n}", blocks=f"b0..b299,y{n}", prompt_tokens=19_300, max_tokens=200)
        placed += [c for c in core.handle(request, 1) if isinstance(c, Placed)]
    core.check_invariants()
    assert len(placed) == 1 and len(core.room.entries) == 11
    assert all(w.plan.awaits == ("gw", "r0") for w in core.room.entries.values())


def load(prefill: float, decode: float, prefills: int = 4, decodes: int = 4) -> PhaseLoad:
    return PhaseLoad(prefill=prefill, decode=decode, prefill_count=prefills, decode_count=decodes)


def test_what_a_load_asks_for() -> None:
    assert wish_of(load(0.95, 0.2)) == ("flip", Role.PREFILL)
    assert wish_of(load(0.2, 0.95)) == ("flip", Role.DECODE)
    assert wish_of(load(0.95, 0.8)) == ("add", Role.PREFILL)
    assert wish_of(load(0.3, 0.2)) == ("remove", Role.DECODE)
    assert wish_of(load(0.6, 0.7)) == ("", 0)
    assert wish_of(load(0.1, 0.1, 1, 1)) == ("", 0), "the last one stays"


def test_a_change_that_was_made_is_not_wished_back() -> None:
    """Work stays, instances change: after a flip neither phase asks for the opposite."""
    for prefill in range(101):
        for decode in range(101):
            before = load(prefill / 100, decode / 100, 5, 5)
            kind, role = wish_of(before)
            if kind == "flip":
                up, down = 5 / 6, 5 / 4
                more_prefill = role == Role.PREFILL
                after = load(
                    before.prefill * (up if more_prefill else down),
                    before.decode * (down if more_prefill else up),
                    6 if more_prefill else 4,
                    4 if more_prefill else 6,
                )
                assert wish_of(after)[0] != "flip" or wish_of(after)[1] == role


def test_a_standing_load_makes_one_proposal() -> None:
    """Three that prefill have nothing to do, the one that decodes is full: the first of them should decode instead."""
    core = SchedulerCore(SchedulerConfig())
    core.handle(made.attached(1, "node-0"), 0)
    core.handle(made.snapshot(1, 0, ""), 0)
    for n, role in enumerate((Role.PREFILL, Role.PREFILL, Role.PREFILL, Role.DECODE)):
        core.handle(made.joined(n + 2, f"w{n}", role=role, kv_tokens_total=8192), 0)
    core.handle(events.GatewayOpened(9, "gw"), 0)
    for n in range(4):
        placed = core.handle(made.place(f"r{n}", max_tokens=900, policy="always_split"), 0)
        assert isinstance(placed[-1], Placed) and placed[-1].split
        core.handle(made.outcome(9, f"r{n}", first_token=True), 0)
    proposals: list[RoleProposed] = []
    for n in range(60):
        now_us = (n + 1) * LOOK_US // 5
        found = core.handle(events.SourceHeartbeat(1, 0, 0), now_us)
        for stream in (2, 3, 4, 5):
            found += core.handle(made.reported(stream, kv_tokens_free=8192), now_us)
        found += core.handle(events.GatewayHeartbeat(9, 0), now_us)
        proposals += [c for c in found if isinstance(c, RoleProposed)]
    core.check_invariants()
    assert [(p.kind, p.instance_id, p.role) for p in proposals] == [("flip", "w0", Role.DECODE)]
    assert core.roles.proposals["tiny"].instance_id == "w0"
