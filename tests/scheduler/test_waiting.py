"""Waiting for a place: order, fairness, Retry-After, and the answer that comes later over gRPC."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
import scheduler_events as made
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clients import PATIENT, Client, connected, outcome

from kvpool.core.errors import Reason
from kvpool.v1 import common_pb2, scheduler_pb2
from scheduler.core import events
from scheduler.core.commands import Placed, Refused
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.core.pending import shared_blocks
from scheduler.core.waiting import Lane, WaitingRoom
from scheduler.service.server import SchedulerServer, SchedulerServerConfig

SECOND_US = 1_000_000
#: A request waits as soon as its instance has a tenth of a second of work.
EAGER = SchedulerConfig(horizon_us_min=100_000, horizon_prefills=0.0, horizon_slo_share=0.0)


def one_instance(config: SchedulerConfig = EAGER, **over: object) -> SchedulerCore:
    """A core with an instance that takes a millisecond a prompt token and ten a decode step."""
    core = SchedulerCore(config)
    fields: dict[str, object] = {"kv_tokens_total": 1 << 20, "node_source_id": "", "batch_max": 256}
    core.handle(made.joined(1, "w0", **{**fields, **over}), 0)
    core.handle(events.GatewayOpened(2, "gw"), 0)
    samples = tuple(events.PrefillSample(n, 0, 1000 * n) for n in (100, 500, 1000, 2000, 3000))
    steps = tuple(events.DecodeSample(b, 1000 * b, 10_000) for b in (1, 4, 16))
    core.handle(made.reported(1, kv_tokens_free=1 << 20, prefill=samples, decode=steps), 0)
    return core


def answers(commands: list[object]) -> dict[str, Placed | Refused]:
    return {c.request_id: c for c in commands if isinstance(c, Placed | Refused)}


def alive(core: SchedulerCore, now_us: int, finished: tuple[str, ...] = ()) -> dict[str, Placed | Refused]:
    """Everybody shows life; the prefills named are over, and so are their requests."""
    found = answers(core.handle(made.reported(1, kv_tokens_free=1 << 20, finished_prefills=finished), now_us))
    for request_id in finished:
        found |= answers(core.handle(made.outcome(2, request_id, ttft_us=0), now_us))
    found |= answers(core.handle(events.GatewayHeartbeat(2, 0), now_us))
    core.check_invariants()
    return found


def drain(core: SchedulerCore, placed: list[str], now_us: int, until: int) -> list[str]:
    """Serves one request after another as predicted; returns them in the order of their placements."""
    served = 0
    while len(placed) < until:
        request_id = placed[served]
        served += 1
        now_us += core.book.placements["gw", request_id].prefill_us
        placed += alive(core, now_us, (request_id,))
        while (at_us := core.next_deadline_us()) is not None and at_us <= now_us + 2_000:
            now_us = max(at_us, now_us)
            placed += answers(core.tick(now_us))
    return placed


def test_a_lane_tells_what_is_ahead() -> None:
    rng = random.Random(5)
    lane, entries = Lane(), []
    for number in range(200):
        order = (rng.randrange(50), number)
        entries.append((order, rng.randrange(100)))
        lane.add(*entries[-1])
        if rng.random() < 0.4:
            gone = entries.pop(rng.randrange(len(entries)))
            lane.remove(*gone)
        at = (rng.randrange(60), rng.randrange(200))
        assert lane.ahead(at) == sum(amount for order, amount in entries if order < at)
    assert lane.total == sum(amount for _, amount in entries)


def test_tenants_are_served_by_weight_while_they_wait() -> None:
    core = one_instance()
    placed: list[str] = []
    for n in range(30):
        placed += answers(core.handle(made.place(f"a{n}", tenant="a"), 0))
    for n in range(30):
        placed += answers(core.handle(made.place(f"b{n}", tenant="b", tenant_weight=2.0), 0))
    order = drain(core, placed, 0, 31)
    later = order[1:]  # the first was placed before anybody waited
    assert 18 <= sum(name.startswith("b") for name in later) <= 22
    assert [n for n in order if n.startswith("a")] == [f"a{n}" for n in range(sum(x[0] == "a" for x in order))]


def test_priority_goes_first_and_starves_nobody() -> None:
    core = one_instance(SchedulerConfig(**{**_fields(EAGER), "priority_step_us": 5 * SECOND_US}))
    placed = list(answers(core.handle(made.place("first"), 0)))
    placed += answers(core.handle(made.place("patient"), 0))
    for n in range(40):
        placed += answers(core.handle(made.place(f"high{n}", priority=1), 0))
    order = drain(core, placed, 0, 20)
    assert order[1].startswith("high")
    assert order.index("patient") <= 8, "a step of priority is worth five seconds of service, each request takes one"


def _fields(config: SchedulerConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.integers(200, 3000), min_size=1, max_size=8),
    slo_ms=st.integers(500, 6000),
    asked=st.integers(200, 3000),
)
def test_retry_after_is_the_time_at_which_it_is_taken(prompts: list[int], slo_ms: int, asked: int) -> None:
    """By the same prediction: taken at that time, and refused a moment before it."""

    def ask(core: SchedulerCore, now_us: int) -> Placed | Refused | None:
        request = made.place("asked", prompt_tokens=asked, ttft_slo_us=slo_ms * 1000)
        return answers(core.handle(request, now_us)).get("asked")

    def busy() -> SchedulerCore:
        core = one_instance(SchedulerConfig(late_binding=(), retry_after_us_min=1000, retry_slack=0.0))
        for n, tokens in enumerate(prompts):
            core.handle(made.place(f"r{n}", prompt_tokens=tokens), 0)
        return core

    refused = ask(busy(), 0)
    if not isinstance(refused, Refused):
        return
    if not refused.retry_after_ms:
        empty = one_instance(SchedulerConfig(late_binding=()))
        assert isinstance(ask(empty, 0), Refused), "it would never be taken, they said"
        return
    # Only the first of the queue is known to be under way: within it the queue drains as predicted.
    core = busy()
    head_us = core.book.placements["gw", "r0"].prefill_us
    if refused.retry_after_ms * 1000 >= min(head_us, 2_900_000):
        return
    assert not isinstance(ask(core, refused.retry_after_ms * 1000), Refused)
    if refused.retry_after_ms > 20:
        assert isinstance(ask(busy(), (refused.retry_after_ms - 10) * 1000), Refused)


def test_a_place_that_gets_free_goes_to_who_waits() -> None:
    core = one_instance(kv_tokens_total=2048)
    assert isinstance(answers(core.handle(made.place("r1", prompt_tokens=1800, max_tokens=100), 0))["r1"], Placed)
    assert not answers(core.handle(made.place("r2", prompt_tokens=1000, max_tokens=100), 0))
    now = answers(core.handle(made.place("r3", prompt_tokens=1000, max_tokens=100, wait_us_max=0), 0))["r3"]
    assert isinstance(now, Refused) and now.reason is Reason.NO_CAPACITY and now.retry_after_ms > 0
    placed = alive(core, 100_000, ("r1",))["r2"]
    assert isinstance(placed, Placed) and placed.waited_us == 100_000


@pytest.mark.parametrize(("wait_us", "waits"), [(0, False), (10 * SECOND_US, True)])
def test_nobody_is_placed_in_the_hope_of_blocks_that_are_not_there(wait_us: int, waits: bool) -> None:
    """Who has no time to wait for a prefix that is being computed is weighed by what there is."""
    core = one_instance(SchedulerConfig())
    core.handle(made.place("first", blocks="a0..a30", prompt_tokens=2000), 1)
    found = answers(core.handle(made.place("next", blocks="a0..a30,b0", prompt_tokens=2064, wait_us_max=wait_us), 2))
    core.check_invariants()
    assert [waiting.plan.awaits for waiting in core.room.entries.values()] == [("gw", "first")] * waits
    assert list(found) == ["next"] * (not waits)
    for placed in found.values():
        assert isinstance(placed, Placed) and placed.cached_tokens == 0
        assert core.book.placements["gw", "next"].prefill_us == pytest.approx(2064 * 1000, rel=0.1)


def test_a_full_room_refuses_whoever_is_last() -> None:
    core = one_instance(SchedulerConfig(**{**_fields(EAGER), "waiting_max": 2}))
    core.handle(made.place("r0"), 0)
    for n in (1, 2):
        assert not answers(core.handle(made.place(f"r{n}"), 0))
    assert answers(core.handle(made.place("r3"), 0))["r3"].reason is Reason.OVERLOADED  # type: ignore[union-attr]
    found = answers(core.handle(made.place("urgent", priority=1), 0))
    assert list(found) == ["r2"] and found["r2"].reason is Reason.OVERLOADED  # type: ignore[union-attr]
    core.check_invariants()


def test_who_asks_again_keeps_the_place_in_the_order() -> None:
    core = one_instance()
    for name in ("r0", "r1", "r2"):
        core.handle(made.place(name), 0)
    assert not answers(core.handle(made.place("r1"), 500_000))
    assert core.room.first("tiny", 2) == [("gw", "r1"), ("gw", "r2")]
    core.check_invariants()


def test_accounts_of_tenants_are_bounded() -> None:
    room = WaitingRoom(SchedulerConfig(tenants_max=10))
    for n in range(100):
        room.charge(made.place(f"r{n}", tenant=f"t{n}"), 0, 1000)
    room.check_invariants()


@given(st.binary(max_size=160), st.binary(max_size=160), st.integers(0, 10))
def test_shared_blocks_are_counted(a: bytes, b: bytes, common: int) -> None:
    """Keys are chained: after the first that differs none is equal."""
    prefix = bytes(range(16)) * common
    one, other = prefix + a[: len(a) // 16 * 16], prefix + b[: len(b) // 16 * 16]
    expected = 0
    while one[expected * 16 : expected * 16 + 16] == other[expected * 16 : expected * 16 + 16] != b"":
        expected += 1
    tail = [one[i : i + 16] == other[i : i + 16] for i in range(expected * 16, min(len(one), len(other)), 16)]
    if not any(tail):
        assert shared_blocks(one, other) == expected


def serve(test: object) -> None:
    async def body() -> None:
        core = replace(EAGER, suspect_us=PATIENT.suspect_us, gone_us=PATIENT.gone_us)
        server = SchedulerServer(SchedulerServerConfig(listen="127.0.0.1:0", core=core))
        await server.startup()
        try:
            async with connected(server.address) as client:
                await test(server, client)  # type: ignore[operator]
        finally:
            await server.shutdown()

    asyncio.run(body())


async def _waits(client: Client, count: int) -> None:
    while (await client.status()).waiting_requests != count:
        pass


def test_the_answer_comes_when_there_is_a_place() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.join(kv_tokens_total=2048)
        gateway = await client.gateway()
        assert (await client.place("r1", prompt_tokens=1800)).HasField("placement")
        waiting = asyncio.create_task(client.place("r2"))
        await _waits(client, 1)
        explanation = await client.scheduler.Explain(scheduler_pb2.ExplainRequest(request_id="r2"))
        assert explanation.waiting and not explanation.HasField("choice")
        assert [i.requests_waiting for i in await client.instances()] == [1]
        await gateway.say(outcome("r1"))
        reply = await waiting
        assert reply.HasField("placement") and reply.placement.waited_us > 0
        explanation = await client.scheduler.Explain(scheduler_pb2.ExplainRequest(request_id="r1"))
        assert not explanation.waiting and explanation.ttft_error_ratio > 0
        (status,) = await client.instances()
        assert [(e.kind, e.count) for e in status.prediction_errors if e.kind == "ttft"] == [("ttft", 1)]
        plan = await client.scheduler.GetPlan(scheduler_pb2.GetPlanRequest())
        assert not plan.proposals

    serve(test)


def test_who_hangs_up_waits_no_more() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.join(kv_tokens_total=2048)
        await client.gateway()
        await client.place("r1", prompt_tokens=1800)
        waiting = asyncio.create_task(client.place("r2"))
        await _waits(client, 1)
        waiting.cancel()
        await _waits(client, 0)
        assert server.shell.core.counts["refused_deadline"] == 1
        refused = (await client.place("r3", wait_ms_max=0)).refusal
        assert refused.reason == common_pb2.ErrorDetail.NO_CAPACITY

    serve(test)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(weight: float) -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.join()
        with pytest.raises(Exception, match="tenant_weight"):
            await client.place("r1", tenant_weight=weight)

    serve(test)
