"""The scheduler as a service: life lines, placements, lists and errors over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import scheduler_events as made
from scheduler_clients import (
    PATIENT,
    Client,
    LifeLine,
    connected,
    engine_info,
    key_list,
    outcome,
    report,
    snapshot,
    stored,
)

from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.errors import KvpoolError, Reason
from kvpool.core.ids import Fidelity, Tier, unpack_keys
from kvpool.service import rpc
from kvpool.service.announcer import Announcer, SourceFacts
from kvpool.v1 import common_pb2, directory_pb2, engine_pb2, scheduler_pb2
from scheduler.core.config import SchedulerConfig
from scheduler.replay.exact import replay_file
from scheduler.service import journal
from scheduler.service.server import SchedulerServer, SchedulerServerConfig


@asynccontextmanager
async def serving(**config: Any) -> AsyncIterator[tuple[SchedulerServer, Client]]:
    config = {"listen": "127.0.0.1:0", "core": PATIENT, **config}
    server = SchedulerServer(SchedulerServerConfig(**config))
    await server.startup()
    try:
        async with connected(server.address, config.get("credential", "")) as client:
            yield server, client
    finally:
        await server.shutdown()


def run(test: Callable[[SchedulerServer, Client], Awaitable[None]], **config: Any) -> None:
    """Runs a test against a server of its own, which must hold nothing afterwards."""

    async def body() -> None:
        async with serving(**config) as (server, client):
            await test(server, client)
        while server.shell.streams:  # noqa: ASYNC110 - their handlers tell nobody
            await asyncio.sleep(0.001)

    asyncio.run(body())


async def refused(call: Awaitable[Any]) -> KvpoolError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return rpc.from_rpc_error(caught.value)


def test_a_request_from_place_to_outcome() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        node = await client.attach(blocks="a0..a7")
        hbm = await client.attach("w0-hbm", tier=common_pb2.TIER_HBM, address="", blocks="a0..a3")
        worker, gateway = await client.join(), await client.gateway()
        reply = await client.place("r1", "a0..a14")
        placement = reply.placement
        assert placement.prefill.instance_id == placement.decode.instance_id == "w0" and not placement.split
        assert [(r.source_id, r.first, r.count, r.address) for r in placement.pull] == [("node-0", 4, 4, "node-0:1")]
        assert placement.cached_tokens == 8 * 64 and placement.predicted_ttft_us > 0 and placement.ttl_ms > 0
        (status,) = await client.instances()
        assert status.kv_tokens_reserved == 18 * 64 and status.queue_us > 0 and status.hbm_blocks == 4
        await gateway.say(outcome("r1", first_token=True))
        await gateway.say(outcome("r1", tokens=42, decode=engine_pb2.RequestTimes(computed_tokens=9)))
        await gateway.finish()
        explanation = await client.scheduler.Explain(scheduler_pb2.ExplainRequest(request_id="r1"))
        assert explanation.choice == reply and explanation.candidates_total == len(explanation.candidates) == 1
        assert explanation.outcome.tokens == 42 and explanation.outcome.decode.computed_tokens == 9
        status = await client.status()
        assert (status.placements, status.active_requests, status.kv_tokens_reserved) == (1, 0, 0)
        assert status.policies[0] == "kvpool" and (status.directory_blocks, status.directory_replicas) == (8, 12)
        for line in (worker, hbm, node):
            await line.finish()
        status = await client.status()
        assert status.instances_alive == status.sources_alive == status.gateways == status.directory_blocks == 0
        server.shell.core.check_invariants()

    run(test)


def test_a_split_names_the_node_of_the_prefill_instance() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.attach()
        for name, role in (("p0", engine_pb2.ROLE_PREFILL), ("d0", engine_pb2.ROLE_DECODE)):
            await client.join(name, role=role)
        placement = (await client.place("r1", policy="mooncake_algorithm1")).placement
        assert placement.split and (placement.prefill.instance_id, placement.decode.instance_id) == ("p0", "d0")
        assert (placement.handoff_source_id, placement.handoff_address) == ("node-0", "node-0:1")
        assert not (await client.place("r2", policy="round_robin", use_pool=False)).placement.split

    run(test)


def test_what_a_gateway_held_is_free_when_it_is_gone() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.join()
        gateway = await client.gateway()
        for number in range(3):
            assert (await client.place(f"r{number}")).HasField("placement")
        assert (await client.status()).active_requests == 3
        gateway.call.cancel()
        while (status := await client.status()).gateways:
            assert status.active_requests in (0, 3)
        assert status.kv_tokens_reserved == status.active_requests == 0

    run(test)


def test_fifty_arrivals_at_once_overbook_nobody() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.attach()
        roles = [engine_pb2.ROLE_PREFILL, engine_pb2.ROLE_DECODE, engine_pb2.ROLE_DECODE]
        for number, role in enumerate(roles):
            await client.join(f"w{number}", role=role, kv_tokens_total=8192)
        await client.gateway()
        replies = await asyncio.gather(
            *(client.place(f"r{n}", prompt_tokens=900 + n, wait_ms_max=0) for n in range(50))
        )
        taken = [r.placement.decode.instance_id for r in replies if r.HasField("placement")]
        assert sorted(taken) == ["w1"] * 8 + ["w2"] * 8 or len(taken) <= 16
        for status in await client.instances():
            assert status.kv_tokens_reserved <= status.info.kv_tokens_total
        refusals = [r.refusal for r in replies if r.HasField("refusal")]
        assert {r.reason for r in refusals} == {common_pb2.ErrorDetail.NO_CAPACITY}
        assert all(r.retry_after_ms > 0 and r.message for r in refusals)
        server.shell.core.check_invariants()

    run(test)


def test_a_gap_asks_for_a_snapshot() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        node = await client.attach(blocks="a0")
        await node.say(stored(1, "a1"))
        assert (await node.hear()).acknowledged_seq == 1
        await node.say(stored(3, "a3"))
        assert (await node.hear()).want_snapshot
        await node.say(snapshot("a0..a3", seq=3))
        answer = await node.hear()
        assert answer.acknowledged_seq == 3 and not answer.want_snapshot
        match = await client.directory.Match(directory_pb2.MatchRequest(keys=[key_list("a0..a5")]))
        assert match.covered == 4
        assert [(r.source_id, r.first, r.count, r.tier) for r in match.runs] == [("node-0", 0, 4, common_pb2.TIER_DRAM)]
        (status,) = await client.sources()
        assert (status.state, status.blocks, status.gaps, status.seq) == ("alive", 4, 1, 3)

    run(test)


def test_life_lines_end_with_the_scheduler() -> None:
    async def test() -> None:
        server = SchedulerServer(SchedulerServerConfig(listen="127.0.0.1:0", core=PATIENT))
        await server.startup()
        async with connected(server.address) as client:
            lines = [await client.attach(), await client.join(), await client.gateway()]
            await server.shutdown()
            for line in lines:
                with pytest.raises(grpc.RpcError):
                    await line.hear()
        assert server.shell.streams == 0

    asyncio.run(test())


def test_a_restarted_scheduler_learns_everything_again() -> None:
    """With the announcer that nodes and workers use: it comes back by itself and brings all it has."""

    async def test() -> None:
        keys = unpack_keys(made.keys_of("a0..a7"))
        async with serving() as (first, client):
            announcer = Announcer(
                first.address,
                SourceFacts("node-0", 1, Tier.DRAM, address="node-0:1", host_id="host-0"),
                snapshot=lambda: ([(keys, Fidelity.EXACT)], 0),
            )
            announcer.start()
            while (await client.status()).directory_blocks != 8:
                pass
        async with serving(listen=first.address) as (_, client):
            while (await client.status()).directory_blocks != 8:
                pass
            await client.join()
            announcer.publish([BlockChange(ChangeKind.STORED, made.keys_of("a8"))])
            while (await client.status()).directory_blocks != 9:
                pass
            assert (await client.place("r1", "a0..a8")).placement.cached_tokens == 9 * 64
            await asyncio.to_thread(announcer.close)
            while (await client.status()).sources_alive:
                pass
            assert (await client.status()).directory_blocks == 0

    asyncio.run(test())


def test_a_newer_life_line_replaces_an_older_one() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        old = await client.join("w0")
        new = await client.join("w0", epoch=2)
        error = await refused(old.hear())
        assert error.reason is Reason.OVERLOADED and "replaced" in str(error)
        stale = LifeLine(client.scheduler.Join())
        await stale.say(scheduler_pb2.InstanceMessage(info=engine_info("w0", epoch=1)))
        assert "newer process" in str(await refused(stale.hear()))
        (status,) = await client.instances()
        assert status.info.epoch == 2
        await new.finish()

    run(test)


def test_silence_ends_a_life_line() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        async def silent(begin: Callable[[], Awaitable[LifeLine]]) -> None:
            # Where a step of it comes late the line ends there already.
            await (await begin()).hear()

        for begin in (client.join, client.attach):
            assert "silent" in str(await refused(silent(begin)))
        assert not await client.instances() and not await client.sources()

    run(test, core=SchedulerConfig(suspect_us=50_000, gone_us=150_000))


def test_a_full_house_turns_newcomers_away() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.join("w0")
        late = LifeLine(client.scheduler.Join())
        await late.say(scheduler_pb2.InstanceMessage(info=engine_info("w1")))
        assert "no room" in str(await refused(late.hear()))

    run(test, core=replace(PATIENT, instances_max=1))


SourceMessage, InstanceMessage, GatewayMessage = (
    directory_pb2.SourceMessage,
    scheduler_pb2.InstanceMessage,
    scheduler_pb2.GatewayMessage,
)
HELLO = directory_pb2.SourceHello(source_id="s", tier=common_pb2.TIER_DRAM)
BAD_LINES = {
    "source: empty message": ("Attach", [SourceMessage()]),
    "source: heartbeat first": ("Attach", [SourceMessage(heartbeat=directory_pb2.SourceHeartbeat())]),
    "source: no id": ("Attach", [SourceMessage(hello=directory_pb2.SourceHello(tier=2))]),
    "source: unknown tier": ("Attach", [SourceMessage(hello=directory_pb2.SourceHello(source_id="s", tier=77))]),
    "source: long id": ("Attach", [SourceMessage(hello=directory_pb2.SourceHello(source_id="s" * 9999, tier=2))]),
    "source: hello twice": ("Attach", [SourceMessage(hello=HELLO), SourceMessage(hello=HELLO)]),
    "source: key length": (
        "Attach",
        [SourceMessage(hello=HELLO), SourceMessage(snapshot=directory_pb2.Snapshot(keys={"keys": b"123"}))],
    ),
    "source: unknown event": (
        "Attach",
        [
            SourceMessage(hello=HELLO),
            SourceMessage(events=directory_pb2.EventBatch(seq=1, events=[directory_pb2.BlockEvent(kind=9)])),
        ],
    ),
    "source: unknown fidelity": (
        "Attach",
        [SourceMessage(hello=HELLO), SourceMessage(snapshot=directory_pb2.Snapshot(fidelity=9))],
    ),
    "instance: report first": ("Join", [report()]),
    "instance: no namespace": ("Join", [InstanceMessage(info=engine_pb2.EngineInfo(instance_id="w", role=3))]),
    "instance: unknown role": ("Join", [InstanceMessage(info=engine_info("w", role=42))]),
    "instance: no capacity": ("Join", [InstanceMessage(info=engine_info("w", kv_tokens_total=0))]),
    "instance: no model": ("Join", [InstanceMessage(info=engine_info("w", model=""))]),
    "instance: info twice": (
        "Join",
        [InstanceMessage(info=engine_info("w")), InstanceMessage(info=engine_info("w"))],
    ),
    "instance: too many samples": (
        "Join",
        [InstanceMessage(info=engine_info("w")), report(prefill=[scheduler_pb2.PrefillSample()] * 5000)],
    ),
    "gateway: outcome first": ("OpenGateway", [outcome("r")]),
    "gateway: no id": ("OpenGateway", [GatewayMessage(hello=scheduler_pb2.GatewayHello())]),
    "gateway: outcome of nothing": (
        "OpenGateway",
        [GatewayMessage(hello=scheduler_pb2.GatewayHello(gateway_id="g")), outcome("")],
    ),
}


def test_wrong_messages_end_a_life_line_and_leave_nothing() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        for name, (method, messages) in BAD_LINES.items():
            stub = client.directory if method == "Attach" else client.scheduler
            line = LifeLine(getattr(stub, method)())
            for message in messages:
                await line.say(message)
            with pytest.raises(grpc.RpcError) as caught:
                while await line.hear() is not None:
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            assert caught.value.details(), name
        status = await client.status()
        assert status.instances_alive == status.sources_alive == status.gateways == 0

    run(test)


BAD_PLACEMENTS: list[dict[str, Any]] = [
    {"request_id": ""},
    {"request_id": "r" * 10_000},
    {"gateway_id": ""},
    {"keys": [common_pb2.KeyList(keys=b"short")]},
    {"fidelity_min": 12},
    {"exclude_instances": ["w"] * 5000},
]


@pytest.mark.parametrize("fields", BAD_PLACEMENTS, ids=lambda fields: next(iter(fields)))
def test_wrong_placement_requests_are_refused(fields: dict[str, Any]) -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.join()
        with pytest.raises(grpc.RpcError) as caught:
            await client.place(**{"request_id": "r", **fields})
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await client.status()).active_requests == 0

    run(test)


def test_placement_requests_that_ask_for_too_much_get_a_refusal() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.join()
        for fields, reason in (
            ({"prompt_tokens": 0}, Reason.BAD_ARGUMENT),
            ({"max_tokens": 2**32 - 1}, Reason.BAD_ARGUMENT),
            ({"policy": "wishful"}, Reason.BAD_ARGUMENT),
            ({"model": "none"}, Reason.UNKNOWN_MODEL),
            ({"prompt_tokens": 5000}, Reason.CONTEXT_TOO_LONG),
            ({"ttft_slo_ms": 1}, Reason.SLO_UNREACHABLE),
        ):
            assert (await client.place("r", **fields)).refusal.reason == reason
        assert (await client.status()).active_requests == 0

    run(test)


def test_other_wrong_calls_say_what_is_wrong() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        unknown = await refused(client.scheduler.Explain(scheduler_pb2.ExplainRequest(request_id="never")))
        assert unknown.reason is Reason.UNKNOWN_REQUEST and unknown.hint
        short = directory_pb2.MatchRequest(keys=[common_pb2.KeyList(keys=b"123")])
        assert (await refused(client.directory.Match(short))).reason is Reason.BAD_KEY_LENGTH
        huge = directory_pb2.MatchRequest(keys=[common_pb2.KeyList(keys=bytes(100 << 20))])
        assert (await refused(client.directory.Match(huge))).reason is Reason.OVERLOADED
        many = directory_pb2.MatchRequest(keys=[common_pb2.KeyList()] * 1000)
        assert (await refused(client.directory.Match(many))).reason is Reason.BAD_ARGUMENT
        empty = await client.directory.Match(directory_pb2.MatchRequest())
        assert empty.covered == 0

    run(test)


def test_a_credential_is_asked_for() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        assert (await client.status()).scheduler_id == "s7"
        async with connected(server.address, "wrong") as stranger:
            assert (await refused(stranger.status())).reason is Reason.UNAUTHENTICATED
            assert (await refused(LifeLine(stranger.scheduler.Join()).hear())).reason is Reason.UNAUTHENTICATED

    run(test, credential="right", scheduler_id="s7")


def test_models_are_listed_as_their_instances_describe_them() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.join("w0", tokenizer="/t", context_tokens_max=1000)
        await client.join("w1", context_tokens_max=3000)
        await client.join("x0", model="another")
        reply = await client.scheduler.ListModels(scheduler_pb2.ListModelsRequest())
        assert [(m.model, m.instances, m.context_tokens_max) for m in reply.models] == [
            ("another", 1, 4096),
            ("tiny", 2, 3000),
        ]
        assert reply.models[1].tokenizer == "/t" and reply.models[1].namespace == engine_info("w0").namespace

    run(test)


def test_a_draining_worker_takes_nothing_new() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        worker, gateway = await client.join(), await client.gateway()
        await worker.say(report(draining=True, running=1, prefill=[scheduler_pb2.PrefillSample(new_tokens=9)]))
        while (status := (await client.instances())[0]).state != "draining":
            pass
        assert status.running == 1
        reply = await client.place("r1")
        assert reply.refusal.reason == Reason.NO_INSTANCE and reply.refusal.retry_after_ms > 0
        await gateway.finish()

    run(test)


def test_what_was_served_replays(tmp_path: Path) -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        node = await client.attach(blocks="a0..a7")
        worker, gateway = await client.join(), await client.gateway()
        for number in range(20):
            await client.place(f"r{number}", "a0..a7", wait_ms_max=0)
            await worker.say(report(prefill=[scheduler_pb2.PrefillSample(new_tokens=500, duration_us=40_000)]))
            if number % 2:
                await gateway.say(outcome(f"r{number}"))
        status = await client.status()
        assert status.journal == str(tmp_path / "scheduler-000001.jsonl") and status.journal_bytes > 0
        for line in (gateway, worker, node):
            await line.finish()

    run(test, journal_dir=str(tmp_path))
    (path,) = journal.files(tmp_path)
    replay = replay_file(path)
    assert replay.identical and len(replay.decisions) == 20 and not replay.core.book.placements


async def http_get(url: str) -> tuple[int, str]:
    host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    path = "/" + url.removeprefix("http://").partition("/")[2]
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]


def test_metrics_tell_the_same_as_the_core() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        await client.attach(blocks="a0..a4")
        await client.join()
        await client.place("r1")
        await client.place("r2", prompt_tokens=9000)
        url = server.facts()["metrics_url"]
        code, text = await http_get(url)
        assert code == 200
        for line in (
            "kvpool_scheduler_placements_total 1.0",
            'kvpool_scheduler_refusals_total{reason="context_too_long"} 1.0',
            'kvpool_scheduler_members{kind="instance",state="alive"} 1.0',
            "kvpool_scheduler_directory_blocks 5.0",
            'kvpool_scheduler_kv_tokens_reserved{instance="w0"} 1152.0',
        ):
            assert line in text.splitlines(), line
        assert (await http_get(url.replace("/metrics", "/health")))[0] == 200
        assert (await http_get(url.replace("/metrics", "/nothing")))[0] == 404

    run(test, metrics_listen="127.0.0.1:0")


def test_a_taken_port_is_said_so() -> None:
    async def test(server: SchedulerServer, client: Client) -> None:
        second = SchedulerServer(SchedulerServerConfig(listen=server.address))
        with pytest.raises(KvpoolError, match="can't listen"):
            await second.startup()

    run(test)


@pytest.mark.parametrize("policy", ["", "nonsense"])
def test_an_unknown_policy_is_said_so(policy: str) -> None:
    with pytest.raises(KvpoolError, match="policy"):
        SchedulerServer(SchedulerServerConfig(policy=policy))
