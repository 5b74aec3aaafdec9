"""Who disappears when: workers, scheduler, client. The client that stays gets each token once, and the right ones."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from kvpool.v1 import engine_pb2
from scheduler.gateway.lifecycle import LifecycleLimits
from scheduler.gateway.server import GatewayConfig, GatewayServer
from tests.gateway.cluster_made import (
    MODEL,
    TEST_DEADLINE_S,
    ClusterMade,
    SchedulerMade,
    cluster,
    colocated,
    expected_tokens,
    http_client,
    run,
    split,
)

PROMPT = list(range(20, 31))
ASK = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "stream": True, "return_token_ids": True}


class Reader:
    """A client that reads a stream chunk by chunk."""

    def __init__(self, c: ClusterMade, body: dict[str, Any] | None = None) -> None:
        self._url, self._body = f"{c.url}/completions", {**ASK, **(body or {})}
        self.tokens: list[int] = []
        self.chunks: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with http_client() as http, http.stream("POST", self._url, json=self._body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    self.chunks.append(chunk)
                    for choice in chunk.get("choices", ()):
                        self.tokens += choice["token_ids"]
                self._changed.set()

    async def have(self, count: int) -> None:
        while len(self.tokens) < count:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), TEST_DEADLINE_S)


def test_decode_worker_lost_mid_stream(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, engines=3) as c:
            prefill, first, second = c.engines
            first.stop_after = 4
            c.scheduler.decide = lambda request: (
                split(prefill, first) if not request.exclude_instances else split(prefill, second)
            )
            reader = Reader(c)
            await reader.have(5)
            await first.stop()
            await reader.task
            assert reader.tokens == expected_tokens(PROMPT, 12)
            assert reader.chunks[-1]["choices"][0]["finish_reason"] == "length"
            again = c.scheduler.places[1]
            assert list(again.exclude_instances) == ["engine-1"]
            assert (again.prompt_tokens, again.max_tokens) == (len(PROMPT) + 5, 7)
            assert again.request_id == c.scheduler.places[0].request_id + "~1"
            await c.until(lambda: len(c.scheduler.ends()) == 2)
            assert [(o.finish_reason, o.tokens) for o in c.scheduler.ends()] == [("instance_lost", 5), ("length", 7)]
            assert {s.sampling.seed for e in c.engines for s in e.submits} == {first.submits[0].sampling.seed}

    run(test())


def test_prefill_worker_lost_before_the_first_token(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, engines=3) as c:
            first, second, decode = c.engines
            first.first_token = False
            c.scheduler.decide = lambda request: split(second if request.exclude_instances else first, decode)
            reader = Reader(c)
            await c.until(lambda: first.running and decode.running)
            await first.stop()
            await reader.task
            assert reader.tokens == expected_tokens(PROMPT, 12)
            assert decode.aborts == [c.scheduler.places[0].request_id]
            await c.until(lambda: len(c.scheduler.ends()) == 2)

    run(test())


def test_prefill_worker_lost_after_the_first_token(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c:
            prefill, decode = c.engines
            decode.stop_after = 3
            c.scheduler.decide = lambda _: split(prefill, decode)
            reader = Reader(c)
            await reader.have(4)
            await prefill.stop()
            decode.go_on()
            await reader.task
            assert reader.tokens == expected_tokens(PROMPT, 12)
            assert len(c.scheduler.places) == 1

    run(test())


def test_worker_that_is_not_there_at_all(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c:
            await c.engines[0].stop()
            reader = Reader(c)
            await reader.task
            assert reader.tokens == expected_tokens(PROMPT, 12)

    run(test())


def test_worker_that_reports_an_error_is_avoided(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c, http_client(c.url) as http:
            c.engines[0].error = "no memory"
            reader = Reader(c)
            await reader.task
            assert reader.tokens == expected_tokens(PROMPT, 12)
            c.engines[1].error = "no memory either"
            c.scheduler.decide = lambda _: colocated(c.engines[1])
            response = await http.post("/completions", json={**ASK, "stream": False})
            assert response.status_code == 500
            assert response.json()["error"]["message"] == "no memory either"
            assert len(c.scheduler.places) == 2 + 4
            await c.until(c.nothing_left)

    run(test())


def test_all_workers_lost_ends_the_stream_with_an_error(tokenizer: str) -> None:
    async def test() -> None:
        limits = LifecycleLimits(refusals_max=2, refusal_wait_ms_min=1, refusal_wait_ms_max=5)
        async with cluster(tokenizer, engines=1, lifecycle=limits) as c:
            [engine] = c.engines
            engine.stop_after = 3
            reader = Reader(c)
            await reader.have(3)
            await engine.stop()
            await reader.task
            assert reader.tokens == expected_tokens(PROMPT, 3)
            assert reader.chunks[-1]["error"]["code"]
            await c.until(c.nothing_left)

    run(test())


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_aborts_its_request_everywhere(tokenizer: str, stream: bool) -> None:
    async def test() -> None:
        async with cluster(tokenizer) as c:
            prefill, decode = c.engines
            # One client leaves mid-stream, the other before its first token.
            prefill.first_token, decode.stop_after = stream, 2
            c.scheduler.decide = lambda _: split(prefill, decode)
            reader = Reader(c, {"stream": stream})
            await (reader.have(3) if stream else c.until(lambda: prefill.running and decode.running))
            reader.task.cancel()
            await c.until(lambda: decode.aborts)
            await c.until(c.nothing_left)
            await c.until(lambda: [o.finish_reason for o in c.scheduler.ends()] == ["abort"])
            if not stream:
                assert prefill.aborts == decode.aborts

    run(test())


def test_client_that_leaves_while_its_request_is_placed(tokenizer: str) -> None:
    """The placement that nobody waits for any more is given back."""

    async def test() -> None:
        async with cluster(tokenizer) as c:
            c.scheduler.hold_places = asyncio.Event()
            reader = Reader(c)
            await c.until(lambda: c.scheduler.places)
            reader.task.cancel()
            await asyncio.gather(reader.task, return_exceptions=True)
            await c.until(lambda: not c.gateway.active)
            c.scheduler.hold_places.set()
            await c.until(lambda: [o.finish_reason for o in c.scheduler.ends()] == ["abort"])
            assert not any(e.submits for e in c.engines)

    run(test())


def test_client_that_does_not_read_is_cut_off(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, unread_tokens_max=5) as c:
            c.engines[0].burst = 10
            reader = Reader(c, {"max_tokens": 40})
            await c.until(lambda: c.engines[0].aborts)
            await asyncio.gather(reader.task, return_exceptions=True)
            await c.until(lambda: [o.finish_reason for o in c.scheduler.ends()] == ["abort"])

    run(test())


def test_deadline_ends_a_request(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, request_timeout_s=0.3) as c, http_client(c.url) as http:
            c.engines[0].stop_after = 0
            response = await http.post("/completions", json={**ASK, "stream": False})
            assert response.status_code == 504 and response.json()["error"]["code"] == "deadline"
            await c.until(c.nothing_left)

    run(test())


def test_too_many_requests(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, active_requests_max=1) as c, http_client(c.url) as http:
            c.engines[0].stop_after = 1
            reader = Reader(c)
            await reader.have(1)
            response = await http.post("/completions", json={**ASK, "stream": False})
            assert response.status_code == 429 and response.headers["retry-after"] == "1"
            c.engines[0].go_on()
            await reader.task
            assert reader.tokens == expected_tokens(PROMPT, 12)

    run(test())


def test_scheduler_away_and_back(tokenizer: str) -> None:
    """Running streams go on; a request that needs a place waits for the scheduler's return."""

    async def test() -> None:
        async with cluster(tokenizer, place_timeout_s=60.0) as c, http_client(c.url) as http:
            c.engines[0].stop_after = 2
            running = Reader(c)
            await running.have(2)
            await c.scheduler.stop()
            c.engines[0].go_on()
            await running.task
            assert running.tokens == expected_tokens(PROMPT, 12)
            waiting = asyncio.create_task(http.post("/completions", json={**ASK, "stream": False}))
            back = SchedulerMade(c.engines, tokenizer, c.changes, address=c.scheduler.address)
            await back.start()
            response = await waiting
            assert response.json()["choices"][0]["token_ids"] == expected_tokens(PROMPT, 12)
            # The outcome of the request that ended meanwhile was kept.
            await c.until(lambda: len(back.ends()) == 2)
            await back.stop()

    run(test())


def test_scheduler_that_never_comes(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, place_timeout_s=0.3) as c, http_client(c.url) as http:
            await c.scheduler.stop()
            response = await http.post("/completions", json={**ASK, "stream": False})
            assert response.status_code == 503 and response.headers["retry-after"]
            assert response.json()["error"]["code"] == "scheduler_unreachable"
            # Its life line may notice later than a call that fails.
            await c.until(lambda: not c.gateway._scheduler.connected)
            health = await http.get(c.url.removesuffix("/v1") + "/health")
            assert health.status_code == 503
        gateway = GatewayServer(GatewayConfig(scheduler="127.0.0.1:1", listen="127.0.0.1:0", drain_timeout_s=1))
        await gateway.startup()
        async with http_client(f"http://{gateway.address}/v1") as http:
            response = await http.post("/completions", json=ASK)
            assert response.status_code == 503
        await gateway.shutdown()

    run(test())


def test_model_that_comes_later_and_loses_its_workers(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, models_refresh_s=1000.0) as c, http_client(c.url) as http:
            c.scheduler.serves_model = False
            assert (await http.get("/models")).json()["data"] == []
            # Known already: whether there is a place is the scheduler's to say.
            assert (await http.post("/completions", json={**ASK, "stream": False})).status_code == 200
            c.scheduler.serves_model = True
            assert [m["id"] for m in (await http.get("/models")).json()["data"]] == [MODEL]

    run(test())


def test_shutdown_lets_a_request_finish(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, drain_timeout_s=60.0) as c:
            c.engines[0].stop_after = 2
            reader = Reader(c)
            await reader.have(2)
            c.gateway.stop()
            await c.gateway.main_loop()
            ending = asyncio.create_task(c.gateway.shutdown())
            c.engines[0].go_on()
            await reader.task
            assert reader.tokens == expected_tokens(PROMPT, 12)
            await ending
            with pytest.raises(httpx.ConnectError):
                async with http_client() as http:
                    await http.get(c.url)

    run(test())


@pytest.mark.parametrize("asked_twice", [False, True])
def test_what_still_runs_at_the_drain_limit_hears_why_it_ends(tokenizer: str, asked_twice: bool) -> None:
    async def test() -> None:
        async with cluster(tokenizer, drain_timeout_s=300.0 if asked_twice else 0.1) as c:
            c.engines[0].stop_after = 2
            reader = Reader(c)
            await reader.have(2)
            c.gateway.stop()
            await c.gateway.main_loop()
            if asked_twice:
                c.gateway.stop()
            await asyncio.wait_for(c.gateway.shutdown(), 60)
            await reader.task
            assert reader.chunks[-1]["error"]["code"] == "stopping"
            await c.until(c.nothing_left)

    run(test())


def test_restarted_worker_gets_a_connection_of_its_own(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, engines=1) as c:
            [engine] = c.engines
            await Reader(c).task
            engine.epoch = 2
            reader = Reader(c)
            await reader.task
            assert reader.tokens == expected_tokens(PROMPT, 12)
            assert len(engine.hellos) == 2

    run(test())


def test_idle_connections_are_closed(tokenizer: str) -> None:
    async def test() -> None:
        async with cluster(tokenizer, engines=1, link_idle_s=0.0) as c:
            await Reader(c).task
            [engine] = c.engines
            idle = c.gateway.links.link(engine.address, engine.epoch)
            closing = asyncio.create_task(c.gateway.links.close_idle())
            await asyncio.sleep(0)  # it has begun, and has not ended
            assert not c.gateway.links.count and idle is not None and not idle.closed
            reader = Reader(c)
            await reader.task
            assert reader.tokens == expected_tokens(PROMPT, 12)
            await closing
            # Its end takes nothing from the one that was opened meanwhile.
            assert idle.closed and len(c.scheduler.places) == 2

    run(test())


def test_a_bug_in_one_requests_events_leaves_the_others_of_its_worker_alone(tokenizer: str) -> None:
    class Route:
        """Of one request: what came, and with `fails` a bug in whoever takes it."""

        def __init__(self, *, fails: bool) -> None:
            self._fails = fails
            self.tokens: list[int] = []
            self.lost = ""
            self.over = asyncio.Event()

        def on_event(self, event: engine_pb2.RequestEvent) -> None:
            if self._fails:
                raise ValueError("made")
            self.tokens += event.token_ids
            if event.finish_reason:
                self.over.set()

        def on_lost(self, message: str) -> None:
            self.lost = message
            self.over.set()
            raise ValueError("made, too")

    async def test() -> None:
        async with cluster(tokenizer, engines=1) as c:
            link = c.gateway.links.link(c.engines[0].address, c.engines[0].epoch)
            assert link is not None
            bad, good = Route(fails=True), Route(fails=False)
            for name, route in (("bad", bad), ("good", good)):
                sampling = engine_pb2.Sampling(max_tokens=6, ignore_eos=True)
                tokens = b"".join(t.to_bytes(4, "little") for t in PROMPT)
                link.submit(engine_pb2.Submit(request_id=name, token_ids=tokens, sampling=sampling), route)
            for route in (bad, good):
                await asyncio.wait_for(route.over.wait(), 60)
            assert bad.lost and not good.lost and not link.closed
            assert good.tokens == expected_tokens(PROMPT, 6)
            await c.until(lambda: c.engines[0].aborts == ["bad"])

    run(test())
