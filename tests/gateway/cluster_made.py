"""A scheduler and engines that speak the real protocol over real gRPC, and do what a test tells them.

Their "model" is a function of all tokens before: a continuation from a wrong context shows in the tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import httpx
import numpy as np

from kvpool.service import rpc
from kvpool.v1 import common_pb2, engine_pb2, engine_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.server import GatewayServer
from tests.gateway.made_tokenizer import EOS, SPECIALS

MODEL = "made"
BLOCK_TOKENS = 4
CONTEXT_TOKENS = 512
#: A machine that does other things too may be slow, and no test must fail for it.
TEST_DEADLINE_S = 90.0
LOOK_S = 0.05

T = TypeVar("T")


def run(test: Coroutine[Any, Any, T]) -> T:
    """Runs an asyncio test with a deadline."""
    return asyncio.run(asyncio.wait_for(test, TEST_DEADLINE_S))


def http_client(base_url: str = "") -> httpx.AsyncClient:
    """One that has as long as the test: by itself httpx gives up after 5 s."""
    return httpx.AsyncClient(base_url=base_url, timeout=TEST_DEADLINE_S)


def next_token(context: list[int]) -> int:
    """A letter token that depends on the whole context; never a special one."""
    return len(SPECIALS) + (sum(context) * 31 + len(context) * 7) % 90


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context))
    return context[len(prompt) :]


def saying(tokens: list[int]) -> Callable[[list[int]], int]:
    """An answer with these tokens and then the end, whatever the prompt, also when continued elsewhere."""
    answer = [*tokens, EOS]
    begin: list[int] = []

    def say(context: list[int]) -> int:
        if not begin:
            begin.append(len(context))
        return answer[max(0, min(len(context) - begin[0], len(answer) - 1))]

    return say


class Changes:
    """Lets a test wait for something to become true.

    It looks at each change that is told, and now and then by itself: the gateway, for one, tells of none.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(TEST_DEADLINE_S):
            while not holds():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), LOOK_S)


@dataclass
class EngineMade(engine_pb2_grpc.EngineServicer):
    """One worker. `stop_after` tokens it waits for `go_on`; `first_token` false keeps a prefill from ending."""

    name: str
    changes: Changes
    next_token: Callable[[list[int]], int] = next_token
    stop_after: int | None = None
    first_token: bool = True
    error: str = ""
    cached_tokens: int = 0
    epoch: int = 1
    burst: int = 1
    submits: list[engine_pb2.Submit] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    first_tokens: dict[str, int] = field(default_factory=dict)
    hellos: list[str] = field(default_factory=list)
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    address: str = ""

    async def start(self) -> None:
        def register(server: grpc.aio.Server) -> list[str]:
            engine_pb2_grpc.add_EngineServicer_to_server(self, server)
            return ["kvpool.v1.Engine"]

        self._go_on = asyncio.Event()
        self._server, port = await rpc.serve("127.0.0.1:0", register)
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        """As if the process had been killed: streams break at once."""
        for task in list(self.running.values()):
            task.cancel()
        await self._server.stop(None)

    def go_on(self) -> None:
        self._go_on.set()

    def target(self) -> scheduler_pb2.Target:
        return scheduler_pb2.Target(instance_id=self.name, address=self.address, epoch=self.epoch)

    async def Connect(
        self, commands: AsyncIterator[engine_pb2.EngineCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.EngineEvents]:
        out: asyncio.Queue[engine_pb2.RequestEvent] = asyncio.Queue()
        mine: list[str] = []
        reader = asyncio.create_task(self._read(commands, out, mine))
        try:
            while True:
                yield engine_pb2.EngineEvents(events=[await out.get()])
        finally:
            reader.cancel()
            # What came over this stream alone: another one may have begun before this one is known to have ended.
            for request_id in mine:
                self._abort(request_id)

    async def _read(
        self, commands: AsyncIterator[engine_pb2.EngineCommand], out: asyncio.Queue[engine_pb2.RequestEvent],
        mine: list[str],
    ) -> None:  # fmt: skip
        async for command in commands:
            match command.WhichOneof("command"):
                case "hello":
                    self.hellos.append(command.hello)
                case "submit":
                    submit = command.submit
                    self.submits.append(submit)
                    mine.append(submit.request_id)
                    self.running[submit.request_id] = asyncio.create_task(self._run(submit, out))
                case "first_token":
                    self.first_tokens[command.first_token.request_id] = command.first_token.token_id
                case "abort":
                    self.aborts.append(command.abort.request_id)
                    self._abort(command.abort.request_id)
            self.changes.notify()

    def _abort(self, request_id: str) -> None:
        task = self.running.pop(request_id, None)
        if task is not None:
            task.cancel()
        self.changes.notify()

    async def _run(self, submit: engine_pb2.Submit, out: asyncio.Queue[engine_pb2.RequestEvent]) -> None:
        context = np.frombuffer(submit.token_ids, dtype="<u4").tolist()
        times = engine_pb2.RequestTimes(
            queue_us=1, prefill_us=2, cached_tokens_hbm=self.cached_tokens, cached_tokens_pool=1,
            computed_tokens=len(context) - self.cached_tokens - 1,
        )  # fmt: skip
        left, made = submit.sampling.max_tokens, 0

        def event(tokens: list[int], finish: int = 0, error: str = "") -> engine_pb2.RequestEvent:
            asked = bool(submit.sampling.logprobs)
            return engine_pb2.RequestEvent(
                request_id=submit.request_id, token_ids=tokens, finish_reason=finish, error=error, times=times,
                logprobs=[-0.5] * len(tokens) if asked else (), top2_gaps=[0.25] * len(tokens) if asked else (),
            )  # fmt: skip

        if self.error:
            await out.put(event([], engine_pb2.FINISH_REASON_ERROR, self.error))
            left = 0
        elif submit.phase == engine_pb2.PHASE_PREFILL:
            if not self.first_token:
                await self._go_on.wait()
            await out.put(event([self.next_token(context)]))
            await out.put(event([], engine_pb2.FINISH_REASON_HANDED_OFF))
            left = 0
        elif submit.phase == engine_pb2.PHASE_DECODE:
            await self.changes.until(lambda: submit.request_id in self.first_tokens)
            context.append(self.first_tokens[submit.request_id])
            left -= 1
        while left:
            if self.stop_after is not None and made >= self.stop_after:
                await self._go_on.wait()
            tokens = []
            while left and len(tokens) < self.burst:
                tokens.append(self.next_token(context))
                context.append(tokens[-1])
                left -= 1
                if self._ends(tokens[-1], submit.sampling):
                    await out.put(event(tokens, engine_pb2.FINISH_REASON_STOP))
                    break
            else:
                await out.put(event(tokens, 0 if left else engine_pb2.FINISH_REASON_LENGTH))
                made += len(tokens)
                continue
            break
        self.running.pop(submit.request_id, None)
        self.changes.notify()

    @staticmethod
    def _ends(token: int, sampling: engine_pb2.Sampling) -> bool:
        return token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)


@dataclass
class SchedulerMade(scheduler_pb2_grpc.SchedulerServicer):
    """Places every request as `decide` says; by default on the first engine that is not excluded, co-located."""

    engines: list[EngineMade]
    tokenizer: str
    changes: Changes
    decide: Callable[[scheduler_pb2.PlaceRequest], scheduler_pb2.PlaceReply] | None = None
    places: list[scheduler_pb2.PlaceRequest] = field(default_factory=list)
    outcomes: list[scheduler_pb2.Outcome] = field(default_factory=list)
    gateways: list[str] = field(default_factory=list)
    hold_places: asyncio.Event | None = None
    serves_model: bool = True
    layout: str = "lkthd"
    protocol: str = ""
    address: str = "127.0.0.1:0"

    async def start(self) -> None:
        def register(server: grpc.aio.Server) -> list[str]:
            scheduler_pb2_grpc.add_SchedulerServicer_to_server(self, server)
            return ["kvpool.v1.Scheduler"]

        self._server, port = await rpc.serve(self.address, register)
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(None)

    def ends(self) -> list[scheduler_pb2.Outcome]:
        """Final outcomes."""
        return [o for o in self.outcomes if not o.first_token]

    async def Place(
        self, request: scheduler_pb2.PlaceRequest, context: grpc.aio.ServicerContext
    ) -> scheduler_pb2.PlaceReply:
        self.places.append(request)
        self.changes.notify()
        if self.hold_places is not None:
            await self.hold_places.wait()
        return (self.decide or self._first)(request)

    def _first(self, request: scheduler_pb2.PlaceRequest) -> scheduler_pb2.PlaceReply:
        for engine in self.engines:
            if engine.name not in request.exclude_instances:
                return colocated(engine)
        return refused(common_pb2.ErrorDetail.NO_INSTANCE, "no instance", 1000)

    async def ListModels(
        self, request: scheduler_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> scheduler_pb2.ListModelsReply:
        group = common_pb2.GroupSpec(
            id=0, kind=common_pb2.GROUP_KIND_FULL, layers=[0], block_tokens=BLOCK_TOKENS, shard_count=1,
            section_count=1, block_bytes=64, kv_heads=1, head_dim=2,
        )  # fmt: skip
        namespace = common_pb2.NamespaceSpec(
            model="made", revision="1", dtype="float32", backend="none", layout=self.layout, hash="xxh3_128/1",
            groups=[group],
        )  # fmt: skip
        model = scheduler_pb2.ModelInfo(
            model=MODEL, namespace=namespace, tokenizer=self.tokenizer, context_tokens_max=CONTEXT_TOKENS,
            instances=len(self.engines), eos_token_ids=[EOS], protocol=self.protocol,
        )  # fmt: skip
        return scheduler_pb2.ListModelsReply(models=[model] if self.serves_model else [])

    async def OpenGateway(
        self, messages: AsyncIterator[scheduler_pb2.GatewayMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[scheduler_pb2.SchedulerMessage]:
        reader = asyncio.create_task(self._read(messages))
        yield scheduler_pb2.SchedulerMessage(report_interval_ms=100, scheduler_id="made")
        await reader

    async def _read(self, messages: AsyncIterator[scheduler_pb2.GatewayMessage]) -> None:
        async for message in messages:
            if message.HasField("hello"):
                self.gateways.append(message.hello.gateway_id)
            if message.HasField("outcome"):
                self.outcomes.append(message.outcome)
            self.changes.notify()


def colocated(engine: EngineMade) -> scheduler_pb2.PlaceReply:
    return scheduler_pb2.PlaceReply(
        placement=scheduler_pb2.Placement(prefill=engine.target(), decode=engine.target(), ttl_ms=1000)
    )


def split(prefill: EngineMade, decode: EngineMade) -> scheduler_pb2.PlaceReply:
    return scheduler_pb2.PlaceReply(
        placement=scheduler_pb2.Placement(
            prefill=prefill.target(), decode=decode.target(), split=True, ttl_ms=1000, handoff_source_id="node-0",
            handoff_address="127.0.0.1:1",
            pull=[scheduler_pb2.Placement().pull.add(source_id="node-0", first=0, count=1)],
        )
    )  # fmt: skip


def refused(reason: int, message: str, retry_after_ms: int) -> scheduler_pb2.PlaceReply:
    return scheduler_pb2.PlaceReply(
        refusal=scheduler_pb2.Refusal(reason=reason, message=message, retry_after_ms=retry_after_ms)  # type: ignore[arg-type]
    )


@dataclass
class ClusterMade:
    """A gateway in front of a made scheduler and made engines."""

    scheduler: SchedulerMade
    engines: list[EngineMade]
    changes: Changes
    gateway: GatewayServer

    @property
    def url(self) -> str:
        return f"http://{self.gateway.address}/v1"

    async def until(self, holds: Callable[[], object]) -> None:
        await self.changes.until(holds)

    def nothing_left(self) -> bool:
        """Nothing runs on any engine, and each placement ended once."""
        ended = [o.request_id for o in self.scheduler.ends()]
        assert len(ended) == len(set(ended))
        return not any(e.running for e in self.engines) and not self.gateway.active


async def ready(gateway: GatewayServer) -> None:
    """Until a gateway that has begun has its scheduler, and knows the model."""
    async with asyncio.timeout(TEST_DEADLINE_S):
        while not (gateway._scheduler.connected and gateway._models.served()):
            await gateway._models.refresh()
            await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def cluster(tokenizer: str, engines: int = 2, **config: Any) -> AsyncIterator[ClusterMade]:
    """Starts everything, and checks at the end that nothing is left running anywhere."""
    changes = Changes()
    made = [EngineMade(f"engine-{i}", changes) for i in range(engines)]
    for engine in made:
        await engine.start()
    scheduler = SchedulerMade(made, tokenizer, changes)
    await scheduler.start()
    settings = {"listen": "127.0.0.1:0", "drain_timeout_s": 1.0, "place_timeout_s": 30.0, **config}
    gateway = GatewayServer(GatewayConfig(scheduler=scheduler.address, **settings))
    await gateway.startup()
    try:
        await ready(gateway)
        yield ClusterMade(scheduler, made, changes, gateway)
    finally:
        await gateway.shutdown()
        await scheduler.stop()
        for engine in made:
            await engine.stop()
