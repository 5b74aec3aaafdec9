"""The log loses entries, stops, comes back empty, and says nonsense: schedulers go on, and agree again afterwards."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import replace

import pytest
import redis as redis_package
import scheduler_clients as clients
import scheduler_events as made
from google.protobuf.json_format import MessageToDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpool.core.ids import Role
from kvpool.v1 import event_log_pb2
from scheduler.core.core import SchedulerCore
from scheduler.core.events import InstanceReported
from scheduler.service.eventlog import messages, redis_stream, speaker
from scheduler.service.eventlog.listener import Listener
from scheduler.service.eventlog.outgoing import ENTRY_BYTES, Outgoing
from scheduler.service.eventlog.redis_stream import redacted
from scheduler.service.eventlog.speaker import Speaker
from scheduler.service.shell import Shell
from tests.scheduler_log.redis_process import RedisProcess
from tests.scheduler_log.schedulers_made import CORE, Several, check, eventually, run, schedulers, view

STREAM = "kvpool:events"


def known(several: Several, number: int) -> tuple[int, int]:
    """Instances, and blocks of node-0."""
    core = several.servers[number].shell.core
    return len(core.cluster.instances), core.directory.held_count("node-0")


def test_a_late_joiner_catches_up(redis: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many parts, of which few may be on their way at a time.
    monkeypatch.setattr(speaker, "PART_KEYS", 500)
    monkeypatch.setattr(speaker, "RESTATE_BYTES_AHEAD", 1)
    monkeypatch.setattr(speaker, "RESTATE_ENTRIES_AHEAD", 3)

    async def test() -> None:
        async with schedulers(redis.url, 2) as several:
            node = await several.clients[0].attach("node-0", ",".join(f"{c}0..{c}999" for c in "abcdefghijklmnopqrst"))
            await node.say(clients.stored(1, "z0..z9"))
            worker = await several.clients[1].join("w0")
            await worker.say(clients.report(running=2, kv_tokens_free=4000))
            await eventually(lambda: known(several, 0) == known(several, 1) == (1, 20_010), "both know all")
            await several.clients[0].place("r1")
            # Not even what was said before is there to be read.
            redis_package.Redis.from_url(redis.url).xtrim(STREAM, maxlen=0, approximate=False)
            late = await several.start()
            await eventually(lambda: known(several, 2) == (1, 20_010), "the late one knows all")
            await node.say(clients.stored(2, "y0..y9"))
            await eventually(lambda: known(several, 2) == (1, 20_020), "and hears the rest")
            await several.agree("three schedulers")
            assert late.shell.core.cluster.instances["w0"].kv_tokens_free == 4000
            await eventually(lambda: len(late.shell.core.book.placements) == 1, "the placement under way is known")

    run(test())


def test_lost_entries_are_found_missing_and_said_again(redis: RedisProcess) -> None:
    async def test() -> None:
        async with schedulers(redis.url, 2) as several:
            node = await several.clients[0].attach("node-0", "a0..a9")
            await several.clients[0].join("w0")
            await eventually(lambda: known(several, 1) == (1, 10), "all is known")
            listener = several.log(1).listener
            receive = listener.receive
            # The reader loses all entries for a while: changes, a placement, a new node and a worker's end.
            several.log(1).stream._received = lambda version, data: None
            await node.say(clients.stored(1, "b0..b9"))
            other = await several.clients[0].attach("node-1", "c0..c4")
            await several.clients[0].place("r1")
            written = several.log(0).stream.entries_written
            await eventually(lambda: several.log(0).stream.entries_written > written + 2, "it is written")
            several.log(1).stream._received = receive
            await several.agree("after the loss")
            assert listener.gaps >= 1 and known(several, 1) == (1, 20)
            await eventually(lambda: len(several.servers[1].shell.core.book.placements) == 1, "the placement")
            several.log(1).stream._received = lambda version, data: None
            await other.finish()
            await eventually(lambda: "node-1" not in view(several.servers[0])["sources"], "one node has ended")
            written = several.log(0).stream.entries_written
            await eventually(lambda: several.log(0).stream.entries_written > written + 1, "its end is written")
            several.log(1).stream._received = receive
            await several.agree("after the second loss")

    run(test())


@pytest.mark.parametrize("way", ["killed", "frozen"])
def test_redis_goes_and_comes_back_empty(redis: RedisProcess, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A Redis that hangs is taken for down after this.
    monkeypatch.setattr(redis_stream, "COMMAND_TIMEOUT_S", 2.0)
    core = replace(CORE, log_down_us_max=10 * CORE.gone_us)

    async def test() -> None:
        async with schedulers(redis.url, 2, core) as several:
            node = await several.clients[0].attach("node-0", "a0..a9")
            worker = await several.clients[1].join("w0")
            await eventually(lambda: known(several, 0) == known(several, 1) == (1, 10), "all is known")

            async def speak() -> None:
                heartbeat = clients.directory_pb2.SourceMessage(heartbeat=clients.directory_pb2.SourceHeartbeat())
                while True:
                    await node.say(heartbeat)
                    await worker.say(clients.report())
                    await asyncio.sleep(0.05)  # the pace of a member, not a wait for anything

            speaking = asyncio.create_task(speak())
            if way == "killed":
                redis.kill()
            else:
                redis.freeze()
            cores = [s.shell.core for s in several.servers]
            await eventually(lambda: not any(several.log(n).stream.up for n in range(2)), "the log is down")
            own = [cores[0].cluster.sources["node-0"], cores[1].cluster.instances["w0"]]
            for _ in range(4):
                several.pass_time(core.suspect_us * 3 // 4)
                seen_us = [member.seen_us for member in own]
                await eventually(
                    lambda seen_us=seen_us: all(m.seen_us > us for m, us in zip(own, seen_us, strict=True)),
                    "each is heard by its own scheduler",
                )
            # Long past the time after which the silent are gone: what only the other one hears is suspect, and kept.
            assert cores[0].cluster.instances["w0"].state == "suspect" and cores[0].cluster.log_up is False
            assert known(several, 0) == known(several, 1) == (1, 10)
            assert cores[1].cluster.instances["w0"].state == "alive"
            # Each goes on with what it hears itself.
            await node.say(clients.stored(1, "b0..b9"))
            assert (await several.clients[1].place("r1")).HasField("placement")
            status = await several.clients[0].status()
            assert not status.event_log.up and status.event_log.error
            if way == "killed":
                redis.start()
            else:
                redis.thaw()
            await several.all_up()
            await eventually(lambda: known(several, 1) == (1, 20), "what happened meanwhile is known")
            await several.agree("after the outage")
            await eventually(lambda: len(cores[0].book.placements) == 1, "the placement is known")
            await eventually(lambda: cores[0].cluster.instances["w0"].state == "alive", "the worker is heard again")
            await eventually(lambda: several.log(0).status().up and not several.log(0).status().error, "it says so")
            speaking.cancel()

    run(test())


def test_members_of_a_dead_scheduler_are_suspect_and_then_gone(redis: RedisProcess) -> None:
    async def test() -> None:
        async with schedulers(redis.url, 2) as several:
            await several.clients[0].attach("node-0", "a0..a9")
            await several.clients[0].join("w0")
            await eventually(lambda: known(several, 1) == (1, 10), "all is known")
            # Its news may come before its first beat.
            await eventually(lambda: all(p.address for p in several.log(1).listener.peers.values()), "its address")
            peers = (await several.clients[1].status()).event_log.peers
            assert [(p.scheduler_id, p.state, p.sources, p.instances) for p in peers] == [("s0", "alive", 1, 1)]
            assert peers[0].address == several.servers[0].address
            # A scheduler that stops in good order does not take its members with it: they come by another one.
            await several.stop(0)
            assert known(several, 1) == (1, 10)
            several.pass_time(CORE.suspect_us * 3 // 2)
            assert several.servers[1].shell.core.cluster.instances["w0"].state == "suspect"
            several.pass_time(CORE.gone_us)
            assert known(several, 1) == (0, 0)

            def forgotten() -> bool:
                # What it had said and was not read yet may still come, and then it was heard of a moment ago.
                several.pass_time(CORE.gone_us // 10)
                return not several.log(1).listener.peers

            await eventually(forgotten, "the scheduler is gone")
            check(several.servers[1])

    run(test())


def test_what_others_write_is_passed_over(redis: RedisProcess, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with schedulers(redis.url, 1) as several:
            client = redis_package.Redis.from_url(redis.url)
            entry = event_log_pb2.LogEntry(scheduler_id="x", incarnation=7, number=1, items=[messages.ended_item(3)])
            client.xadd(STREAM, {"v": "2", "d": entry.SerializeToString()})
            client.xadd(STREAM, {"something": "else"})
            client.xadd(STREAM, {"v": "1"})
            client.xadd(STREAM, {"v": "1", "d": b"\xff\xff\xff"})
            client.xadd(STREAM, {"v": "1", "d": entry.SerializeToString()[:-1]})
            listener = several.log(0).listener
            await eventually(lambda: listener.entries_bad == 5, "five bad entries")
            client.xadd(STREAM, {"v": "1", "d": entry.SerializeToString()})
            await eventually(lambda: listener.entries_read == 1, "a good one")
            assert (await several.clients[0].status()).event_log.entries_bad == 5
            metrics = several.servers[0].metrics.text().decode()
            assert "kvpool_event_log_up 1.0" in metrics and "kvpool_event_log_entries_bad_total 5.0" in metrics

    with caplog.at_level(logging.WARNING):
        run(test())
    assert sum("version b'2'" in record.getMessage() for record in caplog.records) == 1


def test_the_password_is_in_no_log_line(redis: RedisProcess, caplog: pytest.LogCaptureFixture) -> None:
    secret = "tr0ub4dor"
    redis.kill()
    redis.password = secret
    redis.start()

    async def test() -> None:
        async with schedulers(redis.url, 1) as several:
            assert secret not in str(await several.clients[0].status())
            redis.kill()
            await eventually(lambda: not several.log(0).stream.up, "it is down")
            redis.password = "another"
            redis.start()
            await eventually(lambda: "Auth" in several.log(0).stream.error, "the password is refused")

    with caplog.at_level(logging.DEBUG):
        run(test())
    assert caplog.records and not any(secret in record.getMessage() for record in caplog.records)
    assert redacted("rediss://user:pass@host:1/2?password=x") == "rediss://host:1/2"


# ---------------------------------------------------------------- without Redis


def test_outgoing_drops_all_at_its_bound_and_leaves_a_number_out() -> None:
    outgoing = Outgoing("s", 1, bytes_max=1000)
    outgoing.append(messages.ended_item(1))
    assert outgoing.dropped == 1 and not outgoing.take(9)  # closed
    outgoing.open()
    for stream in range(3):
        outgoing.append(messages.ended_item(stream + 1))
    numbers = [messages.entry_of(data).number for data in outgoing.take(9)]
    outgoing.append(messages.ended_item(4))
    outgoing.append(messages.LogItem(beat=event_log_pb2.Beat(address="x" * 1000)))
    outgoing.check_invariants()
    assert outgoing.dropped == 3 and not outgoing.bytes
    outgoing.append(messages.ended_item(5))
    (data,) = outgoing.take(9)
    assert messages.entry_of(data).number == numbers[-1] + 2


def test_large_items_are_entries_of_their_own() -> None:
    outgoing = Outgoing("s", 1)
    outgoing.open()
    for _ in range(5):
        outgoing.append(messages.LogItem(beat=event_log_pb2.Beat(address="x" * (ENTRY_BYTES * 3 // 4))))
    assert [len(messages.entry_of(data).items) for data in outgoing.take(9)] == [1] * 5
    outgoing.check_invariants()


def test_each_event_survives_the_log() -> None:
    """A field that is added to an event and forgotten here fails."""
    attached = made.attached(4, "node-0", instance_id="w0")
    assert messages.source_attached(messages.source_item(attached, 9), 4, "") == attached
    joined = made.joined(4, "w0")
    again = messages.instance_joined(messages.instance_item(joined.info, 9), 4, "s1")
    assert again.peer == "s1" and replace(again.info, namespace_id=b"") == replace(joined.info, namespace_id=b"")
    changed = made.stored(4, 3, "a0..a5")
    assert messages.blocks_changed(messages.changes_item(changed), 4) == changed
    part = made.snapshot(4, 3, "a0..a5", part=2, last=False)
    assert messages.snapshot_received(messages.snapshot_item(part), 4) == part
    report = InstanceReported(
        stream=4, running=1, waiting=2, kv_tokens_free=3, prefill=(made.events.PrefillSample(1, 2, 3),),
        decode=(made.events.DecodeSample(4, 5, 6),), links=(made.events.LinkSample("node-0", 7, 8, True, 9),),
        finished_prefills=("r1",), draining=True, role=Role.PREFILL,
    )  # fmt: skip
    assert messages.instance_reported(messages.report_item(report), 4) == report


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        if out and rng.random() < 0.8:
            out[rng.randrange(len(out))] = rng.randrange(256)
        else:
            out = out[: rng.randrange(len(out) + 1)]
    return bytes(out)


def spoken(rng: random.Random) -> list[event_log_pb2.LogItem]:
    """Items as a scheduler says them, in any order, with streams that collide."""
    stream = rng.randint(1, 3)
    made_of = event_log_pb2.PlacementMade(
        gateway_id="g", request_id=f"r{rng.randint(0, 2)}", model="tiny", max_tokens=rng.choice([0, 1, 100]),
        prefill_id=rng.choice(["w0", "w1", "?"]), decode_id=rng.choice(["w0", "w1"]), split=rng.random() < 0.5,
        kv_tokens=rng.choice([0, 64, 1 << 63]), prefill_kv_tokens=64, prefill_holds=rng.random() < 0.5, prefill_us=99,
        prefill_done=rng.random() < 0.5, age_us=rng.choice([0, 1 << 40]), expires_in_us=rng.choice([0, 1, 10**9]),
    )  # fmt: skip
    kinds = [
        lambda: messages.source_item(made.attached(1, f"n{rng.randint(0, 1)}", epoch=rng.randint(1, 2)), stream),
        lambda: messages.instance_item(made.joined(1, f"w{rng.randint(0, 1)}", epoch=rng.randint(1, 2)).info, stream),
        lambda: messages.changes_item(made.stored(stream, rng.randint(0, 4), "a0..a3")),
        lambda: messages.snapshot_item(made.snapshot(stream, rng.randint(0, 4), "b0..b3", rng.randint(0, 2))),
        lambda: messages.report_item(made.reported(stream, finished_prefills=("r0",), kv_tokens_free=1 << 40)),
        lambda: messages.ended_item(stream),
        lambda: messages.LogItem(placed=made_of),
        lambda: messages.over_item("g", f"r{rng.randint(0, 2)}", anyone=rng.random() < 0.5),
        lambda: messages.LogItem(
            beat=event_log_pb2.Beat(
                instances=[rng.randint(0, 3)],
                sources=[event_log_pb2.SourceBeat(stream=rng.randint(0, 3), alive=True, settled=True, seq=2)],
            )
        ),
        lambda: messages.LogItem(want=event_log_pb2.Want(everything=True, streams=[1, 2, 1 << 60])),
    ]
    items = [rng.choice(kinds)() for _ in range(rng.randint(1, 6))]
    for item in items:
        item.restated = rng.random() < 0.3
    return items


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32))
def test_nothing_in_the_log_breaks_a_scheduler(seed: int) -> None:
    """Items in any order, twice, with gaps, and bent: invariants hold after each entry."""
    rng = random.Random(seed)
    now_us = [1_000_000]

    async def test() -> None:
        shell = Shell(SchedulerCore(CORE), clock_us=lambda: now_us[0])
        outgoing = Outgoing("s0", 1)
        outgoing.open()
        says = Speaker(shell, outgoing, lambda: "here")
        listener = Listener(shell, "s0", 1, says)
        shell.observers.append(says.observe)
        for _ in range(25):
            now_us[0] += rng.choice([0, 1000, 3_000_000])
            entry = event_log_pb2.LogEntry(
                scheduler_id=rng.choice(["s0", "s1", "s2"]), incarnation=rng.choice([2, 3]),
                number=rng.randint(1, 40), items=spoken(rng),
            )  # fmt: skip
            data = entry.SerializeToString()
            listener.receive(b"1", mutated(data, rng) if rng.random() < 0.3 else data)
            await asyncio.sleep(0)  # what was put off until the event was over
            shell.core.check_invariants()
            listener.check_invariants()
            says.check_invariants()
            says.restate()
            listener.take_wants()
            for written in outgoing.take(8):
                assert MessageToDict(messages.entry_of(written))["items"]

    run(test())
