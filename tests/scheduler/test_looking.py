"""When those who wait are weighed again: soon after anything that helps them, and never more than a core can bear."""

from __future__ import annotations

import pytest
import scheduler_events as made
from test_learning import cluster
from test_waiting import EAGER, _fields, answers, one_instance

from kvpool.core.ids import Role
from scheduler.core import events, looking, placing
from scheduler.core.commands import Placed, Refused
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore

SECOND_US = 1_000_000
GREEDY = SchedulerConfig(**{**_fields(EAGER), "horizon_us_min": 100 * SECOND_US})


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Time and id of each request that is weighed."""
    seen: list[tuple[int, str]] = []
    weigh = placing.weigh

    def noting(core: SchedulerCore, request: placing.Request) -> placing.Verdict:
        seen.append((core.now_us, request.event.request_id))
        return weigh(core, request)

    monkeypatch.setattr(placing, "weigh", noting)
    monkeypatch.setattr(looking, "weigh", noting)
    return seen


def run(core: SchedulerCore, until_us: int, lively: bool = True) -> dict[str, Placed | Refused]:
    """Time passes as the shell lets it, everybody showing life twice a second."""
    found: dict[str, Placed | Refused] = {}
    beat_us = core.now_us + SECOND_US // 2
    while True:
        due_us = core.next_deadline_us()
        at_us = min(t for t in (until_us, beat_us if lively else until_us, due_us) if t is not None)
        found |= answers(core.tick(at_us))
        core.check_invariants()
        if lively and at_us == beat_us:
            for stream, (kind, member_id) in list(core.cluster.streams.items()):
                if kind == "instance":
                    free = core.cluster.instances[member_id].info.kv_tokens_total
                    core.handle(made.reported(stream, kv_tokens_free=free), at_us)
                elif kind == "gateway":
                    core.handle(events.GatewayHeartbeat(stream, 0), at_us)
                else:
                    core.handle(events.SourceHeartbeat(stream, 0, 0), at_us)
            beat_us += SECOND_US // 2
        if at_us >= until_us and ((due_us := core.next_deadline_us()) is None or due_us > until_us):
            return found


def test_a_prefill_that_is_late_does_not_have_those_who_wait_weighed_each_millisecond(
    weighed: list[tuple[int, str]],
) -> None:
    core = one_instance()
    core.handle(made.place("r0", blocks="a0..a15", prompt_tokens=1000), 0)
    core.handle(made.place("r1", blocks="a0..a15", prompt_tokens=1001), 0)
    assert ("gw", "r1") in core.room.entries
    late_us = core.book.placements["gw", "r0"].prefill_ends_us
    run(core, late_us)
    weighed.clear()
    run(core, late_us + 200_000)
    assert ("gw", "r1") in core.room.entries
    assert len(weighed) <= 25, "a look each ten milliseconds at most"


def test_as_much_is_weighed_for_one_event_as_is_allowed(weighed: list[tuple[int, str]]) -> None:
    """A hundred whose time is up at the same moment: the core comes back for the rest, and all are answered then."""
    core = one_instance()
    placed = answers(core.handle(made.place("first"), 0))
    for n in range(100):
        placed |= answers(core.handle(made.place(f"r{n}", wait_us_max=2 * SECOND_US), 0))
    assert len(placed) == 1
    placed |= run(core, 2 * SECOND_US - 1)
    steps = 0
    while core.room.entries:
        weighed.clear()
        assert core.next_deadline_us() == 2 * SECOND_US, "what is left over is due at once"
        placed |= answers(core.tick(2 * SECOND_US))
        assert len(weighed) <= core.config.waiting_scan_max + 3
        assert len({request_id for _, request_id in weighed}) == len(weighed), "nobody is weighed twice"
        steps += 1
    assert len(placed) == 101 and steps >= 10
    core.check_invariants()


def looked_at(core: SchedulerCore) -> None:
    """An instance tells that less waits there: those who wait here are weighed again."""
    for waiting in (1, 0):
        core.handle(made.reported(1, kv_tokens_free=1 << 20, waiting=waiting), core.now_us)


def blocked() -> SchedulerCore:
    """One that does not fit has waited so long that room is kept for it, and two that would fit wait behind it."""
    core = one_instance(GREEDY, kv_tokens_total=4096)
    assert isinstance(answers(core.handle(made.place("r0", prompt_tokens=2000, max_tokens=40), 0))["r0"], Placed)
    assert not answers(core.handle(made.place("big", prompt_tokens=3000, max_tokens=40), 0))
    run(core, 3 * SECOND_US)
    looked_at(core)
    assert core.room.entries["gw", "big"].plan.kv_tokens > 0
    for name in ("small1", "small2"):
        assert not answers(core.handle(made.place(name, prompt_tokens=500, max_tokens=40), core.now_us))
    return core


def test_room_kept_for_one_that_hangs_up_goes_to_those_behind_it() -> None:
    core = blocked()
    found = answers(core.handle(events.PlaceCancelled("big", "gw"), core.now_us))
    found |= run(core, core.now_us + 10_000)
    assert isinstance(found["small1"], Placed) and isinstance(found["small2"], Placed)


def test_what_gets_free_where_it_would_decode_wakes_who_fits() -> None:
    """The first of all fits nowhere; the one behind it fits as soon as a decode elsewhere than its prefill ends."""
    config = SchedulerConfig(**{**_fields(GREEDY), "policy": "always_split", "late_binding": ("always_split",)})
    core = SchedulerCore(config)
    core.handle(made.attached(1, "node-0"), 0)
    core.handle(made.snapshot(1, 0, ""), 0)
    core.handle(made.joined(2, "p0", role=Role.PREFILL, kv_tokens_total=1 << 20), 0)
    for n in range(2):
        core.handle(made.joined(3 + n, f"d{n}", role=Role.DECODE, kv_tokens_total=4096), 0)
        slow = tuple(events.PrefillSample(tokens, 0, 10_000 * tokens) for tokens in (100, 500, 1000, 2000))
        core.handle(made.reported(3 + n, kv_tokens_free=4096, prefill=slow), 0)
    core.handle(events.GatewayOpened(9, "gw"), 0)
    for n in range(4):
        placed = answers(core.handle(made.place(f"r{n}", prompt_tokens=1000, max_tokens=950), 0))[f"r{n}"]
        assert isinstance(placed, Placed) and placed.split
        core.handle(made.outcome(9, f"r{n}", first_token=True), 0)
    assert not answers(core.handle(made.place("big", prompt_tokens=3900, max_tokens=100), 0))
    assert not answers(core.handle(made.place("small", prompt_tokens=1000, max_tokens=800), 0))
    plan = core.room.entries["gw", "small"].plan
    assert plan.prefill_id == "p0"
    ended = next(r for r, d in core.book.placements.items() if d.decode_id == plan.decode_id)
    found = answers(core.handle(made.outcome(9, ended[1], tokens=950), 1000))
    assert isinstance(found["small"], Placed)
    core.check_invariants()


def test_a_correction_that_nothing_confirms_is_forgotten() -> None:
    """Predictions so bad that every objective seems out of reach: nobody is placed, so nobody can prove them wrong."""
    core = one_instance(SchedulerConfig(late_binding=()))
    for n in range(6):
        core.handle(made.place(f"r{n}", prompt_tokens=100), core.now_us)
        core.handle(made.outcome(2, f"r{n}", first_token=True, ttft_us=30 * SECOND_US), core.now_us)
        core.handle(made.outcome(2, f"r{n}", ttft_us=0), core.now_us)
    run(core, SECOND_US)
    asked = {"prompt_tokens": 300, "ttft_slo_us": 700_000}
    assert isinstance(answers(core.handle(made.place("now", **asked), core.now_us))["now"], Refused)
    run(core, 120 * SECOND_US)
    assert isinstance(answers(core.handle(made.place("later", **asked), core.now_us))["later"], Placed)


def test_a_scheduler_that_was_held_up_takes_nobody_for_dead() -> None:
    """What was said meanwhile lies unread: everybody has a heartbeat's time to be heard. Who is silent then is gone."""
    core = one_instance()
    core.handle(made.place("r0"), 0)
    states = core.tick(20 * SECOND_US)
    assert not states and len(core.cluster.streams) == 2
    core.handle(made.reported(1, kv_tokens_free=1 << 20), 20 * SECOND_US)
    run(core, 21 * SECOND_US, lively=False)
    assert list(core.cluster.instances) == ["w0"] and not core.cluster.gateways, "the gateway said nothing still"
    core.check_invariants()


def test_all_who_wait_for_an_instance_have_their_turn(weighed: list[tuple[int, str]]) -> None:
    """Two that don't fit stand first: the others are looked at all the same."""
    core = one_instance(GREEDY, kv_tokens_total=4096)
    core.handle(made.place("r0", prompt_tokens=3000, max_tokens=400), 0)
    for n in range(6):
        core.handle(made.place(f"big{n}", prompt_tokens=3000 + n, max_tokens=40), 0)
    weighed.clear()
    for n in range(8):
        core.handle(made.reported(1, kv_tokens_free=4096, waiting=(n + 1) % 2), 1000 * (n + 1))
    assert {request_id for _, request_id in weighed} == {f"big{n}" for n in range(6)}


def test_room_that_is_kept_for_others_is_no_reason_to_send_somebody_away() -> None:
    """More is kept for those who wait than all placements hold: the queue moves all the same."""
    core = one_instance(GREEDY, kv_tokens_total=4096)
    core.handle(made.place("r0", prompt_tokens=3000, max_tokens=400), 0)
    for n in range(4):
        assert not answers(core.handle(made.place(f"big{n}", prompt_tokens=3000, max_tokens=400), 0))
    run(core, 4 * SECOND_US)
    for _ in range(4):
        looked_at(core)
    assert sum(w.plan.kv_tokens for w in core.room.entries.values()) > 4096
    assert not answers(core.handle(made.place("one more", prompt_tokens=1000, max_tokens=40), core.now_us))
    late = answers(core.handle(made.place("never", prompt_tokens=1000, max_tokens=40, wait_us_max=0), core.now_us))
    assert isinstance(late["never"], Refused) and late["never"].retry_after_ms > 0


def test_only_the_node_of_a_prompt_brings_news_of_it(weighed: list[tuple[int, str]]) -> None:
    core, _ = cluster(3, SchedulerConfig())
    for n in range(6):
        core.handle(made.place(f"r{n}", blocks=f"b0..b299,y{n}", prompt_tokens=19_300, max_tokens=200), 1)
    assert len(core.room.entries) == 5 and list(core.room.awaiting) == [("gw", "r0")]
    own = 3 * int(core.book.placements["gw", "r0"].prefill_id[1]) + 1
    core.pending.finish(("gw", "r0"), 1)
    for other in {1, 4, 7} - {own}:
        weighed.clear()
        core.handle(made.stored(other, 1, "x0..x3"), 2)
        assert not weighed
    core.handle(made.stored(own, 1, "b0..b3"), 3)
    assert weighed
