"""A gateway that knows several schedulers: it goes on with the next one, and outcomes find who needs them."""

from __future__ import annotations

import asyncio

from kvpool.core.errors import Unavailable
from kvpool.v1 import common_pb2, scheduler_pb2
from scheduler.gateway.metrics import Metrics
from scheduler.gateway.placement import SchedulerClient
from tests.gateway.cluster_made import Changes, EngineMade, SchedulerMade, colocated, refused
from tests.scheduler_log.schedulers_made import eventually, run


class Schedulers:
    """Made schedulers, and a client of all of them."""

    def __init__(self, count: int) -> None:
        self.changes = Changes()
        self.engine = EngineMade("e", self.changes)
        self.made = [SchedulerMade([self.engine], "", self.changes) for _ in range(count)]
        self.metrics = Metrics()

    async def __aenter__(self) -> Schedulers:
        await self.engine.start()
        for made in self.made:
            await made.start()
        addresses = ",".join(made.address for made in self.made)
        self.client = SchedulerClient(addresses, "gw", self.metrics)
        self.client.start()
        await self.all_connected()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        for made in self.made:
            await made.stop()
        await self.engine.stop()

    async def all_connected(self) -> None:
        await eventually(lambda: all(line.connected for line in self.client._lines), "all are connected")

    async def lost(self, number: int) -> None:
        """Until then it counts as connected, though it was stopped."""
        await eventually(lambda: not self.client._lines[number].connected, "it is lost")

    async def place(self, request_id: str, timeout_s: float = 10.0, **fields: int) -> scheduler_pb2.PlaceReply:
        request = scheduler_pb2.PlaceRequest(request_id=request_id, gateway_id="gw", **fields)  # type: ignore[arg-type]
        return await self.client.place(request, timeout_s)

    def asked(self) -> list[list[str]]:
        return [[p.request_id for p in made.places] for made in self.made]

    async def heard(self, number: int, count: int) -> None:
        await eventually(lambda: len(self.made[number].outcomes) >= count, "the outcomes came")


def outcome(request_id: str, first_token: bool = False) -> scheduler_pb2.Outcome:
    return scheduler_pb2.Outcome(request_id=request_id, first_token=first_token)


def test_one_is_asked_as_long_as_it_is_there() -> None:
    async def test() -> None:
        async with Schedulers(3) as s:
            await s.place("r1")
            await s.place("r2")
            assert s.asked() == [["r1", "r2"], [], []]
            await s.made[0].stop()
            assert (await s.place("r3")).HasField("placement")
            assert s.asked()[1] == ["r3"]
            # The first one is back: whoever was asked last goes on being asked.
            await s.lost(0)
            await s.made[0].start()
            await s.all_connected()
            await s.place("r4")
            assert s.asked() == [["r1", "r2"], ["r3", "r4"], []]

    run(test())


def test_a_request_that_is_being_placed_goes_to_the_next() -> None:
    async def test() -> None:
        async with Schedulers(2) as s:
            s.made[0].hold_places = asyncio.Event()
            placing = asyncio.create_task(s.place("r1"))
            await s.changes.until(lambda: s.made[0].places)
            await s.made[0].stop()
            assert (await placing).HasField("placement")
            assert s.asked() == [["r1"], ["r1"]]

    run(test())


def test_what_one_does_not_know_another_may() -> None:
    async def test() -> None:
        async with Schedulers(3) as s:
            s.made[0].decide = lambda request: refused(common_pb2.ErrorDetail.NO_INSTANCE, "none here", 0)
            s.made[1].decide = lambda request: colocated(s.engine)
            assert (await s.place("r1")).HasField("placement")
            assert s.asked() == [["r1"], ["r1"], []]
            # Other refusals are answers.
            s.made[0].decide = lambda request: refused(common_pb2.ErrorDetail.OVERLOADED, "too much", 5)
            assert (await s.place("r2")).refusal.retry_after_ms == 5
            assert s.asked()[1] == ["r1"]
            for made in s.made:
                made.decide = lambda request: refused(common_pb2.ErrorDetail.NO_INSTANCE, "none", 0)
            assert (await s.place("r3")).refusal.message == "none"
            assert [places[-1] for places in s.asked()] == ["r3"] * 3

    run(test())


def test_who_forgot_this_gateway_for_a_moment_is_asked_again() -> None:
    async def test() -> None:
        async with Schedulers(1) as s:
            told = [refused(common_pb2.ErrorDetail.UNREACHABLE, "its gateway is gone", 0), colocated(s.engine)]
            s.made[0].decide = lambda request: told.pop(0)
            assert (await s.place("r1")).HasField("placement")
            assert s.asked() == [["r1", "r1"]]

    run(test())


def test_the_second_is_asked_for_an_answer_within_what_is_left_of_the_time() -> None:
    async def test() -> None:
        async with Schedulers(2) as s:
            s.made[0].hold_places = asyncio.Event()
            placing = asyncio.create_task(s.place("r1", timeout_s=10.0, wait_ms_max=8000))
            await s.changes.until(lambda: s.made[0].places)
            await s.made[0].stop()
            assert (await placing).HasField("placement")
            waits = [made.places[0].wait_ms_max for made in s.made]
            assert 0 < waits[1] < waits[0] <= 8000

    run(test())


def test_an_outcome_that_comes_with_a_heartbeat_is_said_at_once() -> None:
    """It must not wait for the next one: its instance would look busy for as long."""

    async def test() -> None:
        async with Schedulers(1) as s:
            line = s.client._lines[0]
            await line.close()  # what is said is taken here
            line._interval_s = 3600.0
            messages = line._messages(line._stream_count)
            assert (await anext(messages)).HasField("hello")
            assert (await anext(messages)).HasField("heartbeat")
            # The generator stands where the heartbeat is being written.
            line.outcomes.append(outcome("r1"))
            line._outcome_added.set()
            assert (await asyncio.wait_for(anext(messages), 60)).outcome.request_id == "r1"
            await messages.aclose()

    run(test())


def test_outcomes_go_to_who_placed_and_else_to_another() -> None:
    async def test() -> None:
        async with Schedulers(2) as s:
            await s.place("r1")
            await s.made[0].stop()
            await s.place("r2")
            await s.lost(0)
            await s.made[0].start()
            await s.all_connected()
            s.client.report(outcome("r1", first_token=True))
            s.client.report(outcome("r1"))
            s.client.report(outcome("r2"))
            await s.heard(0, 2)
            await s.heard(1, 1)
            assert [o.request_id for o in s.made[1].outcomes] == ["r2"]
            await s.place("r3")
            assert s.asked()[1] == ["r2", "r3"]
            await s.made[1].stop()
            await s.lost(1)
            s.client.report(outcome("r3"))
            await s.heard(0, 3)

    run(test())


def test_an_outcome_that_was_said_to_who_died_is_said_again() -> None:
    async def test() -> None:
        async with Schedulers(2) as s:
            for n in range(3):
                await s.place(f"r{n}")
            s.client.report(outcome("r0", first_token=True))
            s.client.report(outcome("r0"))
            s.client.report(outcome("r1"))
            # Heard, and perhaps not passed on.
            await s.heard(0, 3)
            await s.made[0].stop()
            await s.heard(1, 2)
            assert [o.request_id for o in s.made[1].outcomes] == ["r0", "r1"]

    run(test())


def test_outcomes_wait_while_nobody_is_there() -> None:
    async def test() -> None:
        async with Schedulers(2) as s:
            for made in s.made:
                await made.stop()
            await eventually(lambda: not s.client.connected, "it is lost")
            s.client.report(outcome("r1"))
            try:
                await s.place("r1", 0.2)
            except Unavailable:
                pass
            else:
                raise AssertionError("nobody can have answered")
            await s.made[1].start()
            await s.heard(1, 1)

    run(test())
