"""Clients of a scheduler for tests: raw life lines over real gRPC, one message at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import scheduler_events as made

from kvpool.service import rpc
from kvpool.v1 import common_pb2, directory_pb2, directory_pb2_grpc, engine_pb2, scheduler_pb2, scheduler_pb2_grpc
from scheduler.core.config import SECOND_US, SchedulerConfig
from scheduler.service import answers

#: Of each single step of a test.
PATIENCE_S = 60.0
#: For a scheduler whose clients say nothing by themselves, and may be held up for as long as their host likes.
PATIENT = SchedulerConfig(suspect_us=600 * SECOND_US, gone_us=1200 * SECOND_US)
#: A patient scheduler as a process, with a journal in the folder that is its argument. It prints where it listens.
SCHEDULER_PROCESS = f"""
import json, sys
from scheduler.core.config import SchedulerConfig
from scheduler.service.server import SchedulerServerConfig, run_scheduler
core = SchedulerConfig(suspect_us={PATIENT.suspect_us}, gone_us={PATIENT.gone_us})
config = SchedulerServerConfig(listen="127.0.0.1:0", journal_dir=sys.argv[1], core=core)
run_scheduler(config, on_ready=lambda facts: print(json.dumps(facts), flush=True))
"""


class LifeLine:
    """One bidirectional stream: `say`, `hear`, and end it in one of three ways."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def say(self, message: Any) -> None:
        """On a stream that the other side has ended it is lost: `hear` says why."""
        with contextlib.suppress(asyncio.InvalidStateError):
            await asyncio.wait_for(self.call.write(message), PATIENCE_S)

    async def hear(self) -> Any:
        """The next answer; None when the stream has ended well. Raises: AioRpcError if it ended otherwise.

        What the scheduler says only to show that it is there is passed over.
        """
        reply = await asyncio.wait_for(self.call.read(), PATIENCE_S)
        while reply is not grpc.aio.EOF and _is_beat(reply):
            reply = await asyncio.wait_for(self.call.read(), PATIENCE_S)
        if reply is grpc.aio.EOF:
            code = await self.call.code()
            if code is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    code, await self.call.initial_metadata(), await self.call.trailing_metadata(),
                    details=await self.call.details(),
                )  # fmt: skip
            return None
        return reply

    async def finish(self) -> None:
        """Ends the stream in good order and waits until the other side has."""
        await self.call.done_writing()
        while await self.hear() is not None:
            pass


def _is_beat(reply: Any) -> bool:
    if isinstance(reply, directory_pb2.DirectoryMessage):
        return not reply.heartbeat_interval_ms
    return isinstance(reply, scheduler_pb2.SchedulerMessage) and not reply.report_interval_ms


class Client:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.scheduler = scheduler_pb2_grpc.SchedulerStub(channel)
        self.directory = directory_pb2_grpc.DirectoryStub(channel)

    async def attach(self, source_id: str = "node-0", blocks: str = "", **over: Any) -> LifeLine:
        """A source that has answered the first wish for a snapshot."""
        line = LifeLine(self.directory.Attach())
        hello: dict[str, Any] = {
            "epoch": 1,
            "tier": common_pb2.TIER_DRAM,
            "address": f"{source_id}:1",
            "host_id": "host-0",
            **over,
        }
        await line.say(directory_pb2.SourceMessage(hello=directory_pb2.SourceHello(source_id=source_id, **hello)))
        greeting = await line.hear()
        assert greeting.want_snapshot and greeting.heartbeat_interval_ms > 0
        await line.say(snapshot(blocks))
        assert not (await line.hear()).want_snapshot
        return line

    async def join(self, instance_id: str = "w0", **over: Any) -> LifeLine:
        line = LifeLine(self.scheduler.Join())
        await line.say(scheduler_pb2.InstanceMessage(info=engine_info(instance_id, **over)))
        assert (await line.hear()).report_interval_ms > 0
        return line

    async def gateway(self, gateway_id: str = "gw") -> LifeLine:
        line = LifeLine(self.scheduler.OpenGateway())
        await line.say(scheduler_pb2.GatewayMessage(hello=scheduler_pb2.GatewayHello(gateway_id=gateway_id)))
        assert (await line.hear()).scheduler_id
        return line

    async def place(self, request_id: str, blocks: str = "", **over: Any) -> scheduler_pb2.PlaceReply:
        fields: dict[str, Any] = {
            "gateway_id": "gw",
            "model": "tiny",
            "keys": [key_list(blocks)],
            "prompt_tokens": 1000,
            "max_tokens": 100,
            "use_pool": True,
            **over,
        }
        return await self.scheduler.Place(scheduler_pb2.PlaceRequest(request_id=request_id, **fields))

    async def status(self) -> scheduler_pb2.ClusterStatus:
        return await self.scheduler.GetStatus(scheduler_pb2.GetStatusRequest())

    async def instances(self) -> list[scheduler_pb2.InstanceStatus]:
        return list((await self.scheduler.ListInstances(scheduler_pb2.ListInstancesRequest())).instances)

    async def sources(self) -> list[directory_pb2.SourceStatus]:
        return list((await self.directory.ListSources(directory_pb2.ListSourcesRequest())).sources)


@asynccontextmanager
async def connected(address: str, credential: str = "") -> AsyncIterator[Client]:
    channel = rpc.make_aio_channel(address, credential=credential)
    try:
        yield Client(channel)
    finally:
        await channel.close()


def key_list(blocks: str) -> common_pb2.KeyList:
    return common_pb2.KeyList(keys=made.keys_of(blocks))


def snapshot(blocks: str, seq: int = 0) -> directory_pb2.SourceMessage:
    return directory_pb2.SourceMessage(
        snapshot=directory_pb2.Snapshot(seq=seq, last=True, keys=key_list(blocks), fidelity=common_pb2.FIDELITY_EXACT)
    )


def stored(seq: int, blocks: str) -> directory_pb2.SourceMessage:
    event = directory_pb2.BlockEvent(kind=directory_pb2.BlockEvent.STORED, keys=key_list(blocks))
    return directory_pb2.SourceMessage(events=directory_pb2.EventBatch(seq=seq, events=[event]))


def engine_info(instance_id: str, **over: Any) -> engine_pb2.EngineInfo:
    info = answers.engine_info(made.joined(1, instance_id).info)
    for name, value in over.items():
        setattr(info, name, value)
    return info


def report(**over: Any) -> scheduler_pb2.InstanceMessage:
    return scheduler_pb2.InstanceMessage(report=scheduler_pb2.InstanceReport(**{"kv_tokens_free": 8192, **over}))


def outcome(request_id: str, **over: Any) -> scheduler_pb2.GatewayMessage:
    fields: dict[str, Any] = {"ttft_us": 1000, "duration_us": 2000, "tokens": 7, "finish_reason": "stop", **over}
    return scheduler_pb2.GatewayMessage(outcome=scheduler_pb2.Outcome(request_id=request_id, **fields))
