"""The gateway as a process of its own, and its connections when they are pushed to their bounds."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any

import pytest

from kvpool.core.errors import BadArgument, Unavailable
from kvpool.v1 import engine_pb2, scheduler_pb2
from scheduler.gateway import scheduler_line
from scheduler.gateway.engines import EngineLinks
from scheduler.gateway.metrics import Metrics
from scheduler.gateway.placement import SchedulerClient
from scheduler.gateway.server import GatewayConfig, GatewayServer
from tests.gateway.cluster_made import (
    MODEL,
    Changes,
    EngineMade,
    SchedulerMade,
    cluster,
    expected_tokens,
    http_client,
    run,
)

PROMPT = list(range(20, 31))
PROGRAM = """
import json, sys
from scheduler.gateway.server import GatewayConfig, run_gateway
def ready(facts):
    loaded = sys.modules.get("torch") is not None
    print(json.dumps(facts | {"torch": loaded}), flush=True)
run_gateway(GatewayConfig(**json.loads(sys.argv[1])), on_ready=ready)
"""


async def start_gateway(scheduler: str, **config: Any) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    settings = json.dumps({"scheduler": scheduler, "listen": "127.0.0.1:0", **config})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, settings, stdout=asyncio.subprocess.PIPE, limit=1 << 20
    )
    assert process.stdout is not None
    return process, json.loads(await asyncio.wait_for(process.stdout.readline(), 60))


@pytest.mark.processes
def test_process_serves_and_ends_when_its_requests_have(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c:
            process, facts = await start_gateway(c.scheduler.address, gateway_id="second")
            assert facts["gateway"] == "second" and not facts["torch"]
            c.engines[0].stop_after = 2
            got: list[int] = []
            told = False  # a second signal would end it at once
            body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "stream": True, "return_token_ids": True}
            async with (
                http_client(facts["url"]) as http,
                http.stream("POST", "/completions", json=body) as response,
            ):
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        got += json.loads(line[6:])["choices"][0]["token_ids"]
                    if len(got) == 2 and not told:
                        told = True
                        process.send_signal(signal.SIGTERM)
                        c.engines[0].go_on()
            assert got == expected_tokens(PROMPT, 8)
            assert await asyncio.wait_for(process.wait(), 60) == 0
            assert "second" in c.scheduler.gateways
            await c.until(c.nothing_left)

    run(test())


@pytest.mark.processes
def test_killed_gateway_leaves_nothing_running(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c:
            process, facts = await start_gateway(c.scheduler.address)
            c.engines[0].stop_after = 2
            async with http_client(facts["url"]) as http:
                body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8}
                asking = asyncio.create_task(http.post("/completions", json=body))
                await c.until(lambda: c.engines[0].running)
                process.kill()
                await asyncio.gather(asking, return_exceptions=True)
            await process.wait()
            await c.until(c.nothing_left)

    run(test())


def test_wrong_addresses_are_said_clearly(tokenizer: str) -> None:
    async def test() -> None:
        for listen in ("nonsense", "127.0.0.1:99999", "127.0.0.1:x"):
            with pytest.raises(BadArgument):
                await GatewayServer(GatewayConfig(listen=listen)).startup()
        async with cluster(tokenizer) as c:
            with pytest.raises(Unavailable, match="can't listen"):
                await GatewayServer(GatewayConfig(listen=c.gateway.address)).startup()

    run(test())


class Collected:
    """A route that remembers."""

    def __init__(self) -> None:
        self.events: list[engine_pb2.RequestEvent] = []
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_event(self, event: engine_pb2.RequestEvent) -> None:
        self.events.append(event)

    def on_lost(self, message: str) -> None:
        self.lost.set_result(message)


def links(**limits: Any) -> EngineLinks:
    bounds = {"links_max": 1, "commands_max": 4, "idle_s": 60.0, **limits}
    return EngineLinks("gateway", Metrics(), credential="", **bounds)


def test_worker_that_does_not_take_commands_counts_as_lost() -> None:
    async def test() -> None:
        made = links()
        link = made.link("127.0.0.1:1", 1)
        assert link is not None
        routes = [Collected() for _ in range(8)]
        # Nothing runs in between, so nothing is sent in between.
        for number, route in enumerate(routes):
            link.submit(engine_pb2.Submit(request_id=f"r{number}"), route)
        for route in routes:
            assert "does not read its commands" in await asyncio.wait_for(route.lost, 60)
        assert made.count == 0
        late = Collected()
        link.submit(engine_pb2.Submit(request_id="late"), late)
        assert late.lost.done()
        await made.close()

    run(test())


def test_links_are_bounded() -> None:
    async def test() -> None:
        engine = EngineMade("e", Changes())
        await engine.start()
        made = links()
        assert made.link(engine.address, 1) is made.link(engine.address, 1) is not None
        assert made.link(engine.address, 2) is None
        await made.close()
        await engine.stop()

    run(test())


def test_outcomes_that_nobody_takes_are_dropped_and_counted() -> None:
    async def test() -> None:
        metrics = Metrics()
        client = SchedulerClient("127.0.0.1:1", "gateway", metrics, outcomes_max=3)
        client.start()
        for number in range(5):
            client.report(scheduler_pb2.Outcome(request_id=str(number)))
        assert b"kvpool_gateway_outcomes_dropped_total 2.0" in metrics.render()
        await client.close()

    run(test())


def test_outcomes_that_nobody_may_have_heard_are_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss takes what was said just before it; who hears an outcome twice changes nothing."""
    monkeypatch.setattr(scheduler_line, "UNSURE_S", 600.0)

    async def test() -> None:
        changes = Changes()
        first = SchedulerMade([], "", changes)
        await first.start()
        client = SchedulerClient(first.address, "gateway", Metrics())
        client.start()
        await changes.until(lambda: client.connected)
        client.report(scheduler_pb2.Outcome(request_id="said"))
        await changes.until(lambda: first.outcomes)
        await first.stop()
        await changes.until(lambda: not client.connected)
        client.report(scheduler_pb2.Outcome(request_id="new"))
        back = SchedulerMade([], "", changes, address=first.address)
        await back.start()
        await changes.until(lambda: len(back.outcomes) == 2)
        assert [outcome.request_id for outcome in back.outcomes] == ["said", "new"]
        await client.close()
        await back.stop()

    run(test())
