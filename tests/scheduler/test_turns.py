"""The shell between placements: a crowd that comes at once keeps nobody else from being heard."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
import scheduler_events as made

from kvpool.core.errors import Overloaded
from scheduler.core import events, placing
from scheduler.core.commands import Placed
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.service import shell as shell_module
from scheduler.service.eventlog.outgoing import Outgoing
from scheduler.service.eventlog.speaker import Speaker
from scheduler.service.shell import Shell

SECOND_US = 1_000_000


def test_others_speak_between_the_placements_of_a_crowd() -> None:
    async def test() -> None:
        shell = Shell(SchedulerCore(SchedulerConfig(late_binding=())), clock_us=lambda: SECOND_US)
        shell.submit(made.joined(1, kv_tokens_total=1 << 24))
        shell.submit(events.GatewayOpened(2, "gw"))
        told: list[str] = []
        shell.observers.append(lambda event, _: told.append(type(event).__name__))
        crowd = asyncio.gather(*(shell.place(made.place(f"r{n}")) for n in range(50)))
        while not crowd.done():
            shell.submit(events.GatewayHeartbeat(2, 0))
            await asyncio.sleep(0)
        assert all(isinstance(answer, Placed) for answer in await crowd)
        placed = [i for i, name in enumerate(told) if name == "PlaceRequested"]
        assert len(placed) == 50 and all(b > a + 1 for a, b in pairwise(placed))

    asyncio.run(test())


def test_who_hung_up_before_its_turn_is_not_weighed() -> None:
    async def test() -> None:
        shell = Shell(SchedulerCore(SchedulerConfig(late_binding=())), clock_us=lambda: SECOND_US)
        shell.submit(made.joined(1, kv_tokens_total=1 << 24))
        told: list[events.Event] = []
        shell.observers.append(lambda event, _: told.append(event))
        tasks = [asyncio.create_task(shell.place(made.place(f"r{n}"))) for n in range(10)]
        await asyncio.sleep(0)
        tasks[7].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        asked = [e.request_id for e in told if isinstance(e, events.PlaceRequested)]
        assert asked == [f"r{n}" for n in range(10) if n != 7]
        assert not shell._answers and not shell._turns_wanted

    asyncio.run(test())


def test_a_crowd_beyond_the_bound_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell_module, "TURNS_MAX", 3)

    async def test() -> None:
        shell = Shell(SchedulerCore(SchedulerConfig(late_binding=())), clock_us=lambda: SECOND_US)
        shell.submit(made.joined(1, kv_tokens_total=1 << 24))
        answers = await asyncio.gather(*(shell.place(made.place(f"r{n}")) for n in range(5)), return_exceptions=True)
        assert [type(a) for a in answers] == [Placed] * 3 + [Overloaded] * 2
        assert isinstance(await shell.place(made.place("later")), Placed)

    asyncio.run(test())


def test_what_ends_while_a_peer_speaks_is_told_to_the_peers() -> None:
    """A deadline passes in the same call in which a peer's placement is taken in: the others don't know of that end."""
    now_us = [0]
    shell = Shell(SchedulerCore(SchedulerConfig(late_binding=())), clock_us=lambda: now_us[0])
    outgoing = Outgoing("s0", 1)
    outgoing.open()
    shell.observers.append(Speaker(shell, outgoing, lambda: "").observe)
    shell.submit(made.joined(1))
    shell.submit(events.GatewayOpened(2, "gw"))
    shell.submit(made.place("mine", policy="round_robin"))
    while now_us[0] < 15 * SECOND_US - SECOND_US // 2:
        now_us[0] += SECOND_US // 2
        shell.submit(made.reported(1))
    assert shell.core.book.placements
    outgoing.take(1000)
    now_us[0] = 15 * SECOND_US
    shell.submit(peer_placed("theirs"))
    assert list(shell.core.book.placements) == [("gw2", "theirs")]
    said = [item.over.request_id for item, _ in outgoing._items if item.HasField("over")]
    assert said == ["mine"]
    # What the peer says of its own placements it need not be told.
    shell.submit(events.PeerEnded("gw2", "theirs", "s1#1"))
    assert [item.over.request_id for item, _ in outgoing._items if item.HasField("over")] == ["mine"]


def peer_placed(request_id: str) -> events.PeerPlaced:
    return events.PeerPlaced(
        peer="s1#1", gateway_id="gw2", request_id=request_id, model="tiny", max_tokens=100, prefill_id="w0",
        decode_id="w0", split=False, kv_tokens=1152, prefill_kv_tokens=0, prefill_holds=True, prefill_us=5000,
        prefill_done=False, context_tokens=1050, expected_tokens=50, age_us=3000, decode_ends_in_us=900_000,
        expires_in_us=100 * SECOND_US,
    )  # fmt: skip


def test_a_failed_instance_that_is_gone_leaves_the_columns_in_use() -> None:
    """Requests of a lost instance come all at once: each must not look at the whole fleet one by one."""
    core = SchedulerCore(SchedulerConfig())
    for n in range(3):
        core.handle(made.joined(n + 1, f"w{n}"), 0)
    core.handle(events.InstanceLeft(2), 1)
    gone = made.place("r1", exclude_instances=("w1",))
    assert placing._instances(core, gone)[0] is core.fleet_now("tiny").instances
    there = made.place("r2", exclude_instances=("w2",))
    assert [i.id for i in placing._instances(core, there)[0]] == ["w0"]


def test_one_beat_of_a_peer_is_one_event() -> None:
    core = SchedulerCore(SchedulerConfig())
    for n in range(3):
        core.handle(made.attached(n + 1, f"node-{n}", peer="s1"), 0)
    core.tick(3 * SECOND_US)
    core.handle(events.SourcesHeard(((1, 10), (3, 30), (9, 90))), 4 * SECOND_US)
    assert [(s.state.value, s.bytes_used) for s in core.cluster.sources.values()] == [
        ("alive", 10), ("suspect", 0), ("alive", 30),
    ]  # fmt: skip
    core.check_invariants()
