"""What the scheduler learns of links, of its own predictions and of its load, and what it does with that."""

from __future__ import annotations

import itertools
import random

import pytest
import scheduler_events as made
from hypothesis import given, note, settings
from hypothesis import strategies as st

from kvpool.core.ids import Role
from scheduler.core import events
from scheduler.core.calibration import Calibration, Errors, TtftParts, model_correction
from scheduler.core.commands import Placed, RoleProposed
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.core.cost import CostBook
from scheduler.core.robust import KEPT
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


def taught(seed: int, outcomes: int, wrong_share: float = 0.0, wrong_by: float = 20.0) -> Calibration:
    """A calibration that has seen outcomes of 30 ms + 2.4 times the queue + 1.6 times the service, 10 % of noise, and
    some that are wrong."""
    rng, known, of_model = random.Random(seed), Calibration(), model_correction()
    for _ in range(outcomes):
        queue_us, service_us = rng.randrange(2_000_000) * rng.randrange(2), rng.randrange(20_000, 2_000_000)
        actual_us = int((30_000 + 2.4 * queue_us + 1.6 * service_us) * rng.uniform(0.9, 1.1))
        actual_us = actual_us if rng.random() >= wrong_share else int(wrong_by * actual_us)
        announced_us = known.ttft_us(queue_us, service_us, 0)
        known.observe_ttft(announced_us, TtftParts(0, queue_us, service_us), 1.0, actual_us, 0, of_model)
    return known


def furthest(known: Calibration) -> float:
    """By how much its predictions are off, at most, of idle and busy instances and short and long prompts."""
    off = 0.0
    for queue_us, service_us in itertools.product((0, 1_000_000), (50_000, 500_000, 2_000_000)):
        expected_us = 30_000 + 2.4 * queue_us + 1.6 * service_us
        off = max(off, abs(known.ttft_us(queue_us, service_us, 0) - expected_us) / expected_us)
    return off


def test_predicted_ttft_converges_on_what_happens() -> None:
    known = taught(seed=3, outcomes=60, wrong_share=0.05)
    assert furthest(known) < 0.2
    assert (known.ttft.median() or 1) < 0.25


@given(
    seed=st.integers(0, 1 << 32),
    wrong_share=st.sampled_from((0.0, 0.02, 0.05, 0.1)),
    wrong_by=st.sampled_from((0.02, 0.2, 5.0, 20.0, 1000.0)),
)
@settings(max_examples=40, deadline=None)
def test_wrong_outcomes_hardly_move_a_prediction(seed: int, wrong_share: float, wrong_by: float) -> None:
    """With up to a tenth of all outcomes wrong, predictions stay within 0.35 of what is true; 0.3 is by noise alone."""
    with_noise, with_wrong = taught(seed, 120), taught(seed, 120, wrong_share, wrong_by)
    note(f"{furthest(with_noise):.3f} with noise, {furthest(with_wrong):.3f} with wrong ones")
    assert furthest(with_wrong) < 0.35


def test_what_changed_for_good_is_learned() -> None:
    """Half of a window of new outcomes is enough to move it, a whole one to forget what was."""
    known, of_model, rng = Calibration(), model_correction(), random.Random(8)
    for factor, outcomes in ((1.0, 60), (2.5, KEPT)):
        for _ in range(outcomes):
            service_us = rng.randrange(20_000, 2_000_000)
            known.observe_ttft(1, TtftParts(0, 0, service_us), 1.0, int(factor * service_us), 0, of_model)
    assert known.ttft_us(0, 1_000_000, 0) == pytest.approx(2_500_000, rel=0.1)


def test_what_the_fits_have_learned_is_not_corrected_once_more() -> None:
    """Prefills take twice as long from one moment on. The fit follows; the correction leaves that to it."""
    core, gateway = cluster(1, SchedulerConfig())
    for n in range(12):
        at_us = (n + 1) * 10 * SECOND_US
        placed = core.handle(made.place(f"r{n}", prompt_tokens=2000, max_tokens=2), at_us)[-1]
        assert isinstance(placed, Placed)
        done_us = at_us + 4_000_000
        sample = (events.PrefillSample(2000, 0, 4_000_000),)
        core.handle(made.reported(3, kv_tokens_free=1 << 20, prefill=sample), done_us)
        core.handle(made.outcome(gateway, f"r{n}", ttft_us=4_000_000), done_us)
    placed = core.handle(made.place("last", prompt_tokens=2000, max_tokens=2), 130 * SECOND_US)[-1]
    assert isinstance(placed, Placed)
    assert placed.predicted_ttft_us == pytest.approx(4_000_000, rel=0.15)
    core.check_invariants()


def test_a_new_instance_is_drawn_to_what_its_peers_have_shown() -> None:
    of_model, known = model_correction(), Calibration()
    for n in range(40):
        known.observe_ttft(1, TtftParts(0, 0, 100_000 + n), 1.0, 2 * (100_000 + n), 0, of_model)
    newcomer = Calibration()
    newcomer.observe_ttft(1, TtftParts(0, 0, 100_000), 1.0, 2_000_000, 0, of_model)
    assert newcomer.ttft_us(0, 100_000, 0) == pytest.approx(200_000, rel=0.5), "one outcome that is far off"


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
