"""Servers as instances, with a real scheduler and a real gateway: they join, are seen, are placed on, and leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from engines.openai_server.instance import AgentContext, ServerInstance
from engines.openai_server.settings import ServerSettings
from kvpool.core.ids import Role
from scheduler.core.commands import RoleRefused
from scheduler.core.config import SECOND_US, SchedulerConfig
from scheduler.core.events import RoleOrdered
from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.server import GatewayServer
from scheduler.gateway.text import Tokenizer
from scheduler.service.server import SchedulerServer, SchedulerServerConfig
from tests.engine_bridge.recorded import BLOCK_TOKENS, PROMPT, frames
from tests.engine_bridge.test_event_feed import Publisher
from tests.gateway.cluster_made import MODEL, Changes, expected_tokens, http_client, ready, run
from tests.gateway.made_tokenizer import make_tokenizer
from tests.gateway.server_made import ServerMade

WAIT_S = 60.0
#: This process is all there is: where it stands still for a moment, nobody has been silent.
PATIENT = SchedulerConfig(suspect_us=600 * SECOND_US, gone_us=1200 * SECOND_US)


def metrics(*, started: float = 1.0, running: int = 0, usage: float = 0.0, block_tokens: int = 4) -> str:
    cache = (
        f'block_size="{block_tokens}",num_gpu_blocks="1000",kv_cache_memory_bytes="{1000 * 4096 * block_tokens}",'
        'prefix_caching_hash_algo="sha256",cache_dtype="auto",enable_prefix_caching="True",hash_block_size="None"'
    )
    return (
        f"vllm:cache_config_info{{{cache}}} 1.0\nprocess_start_time_seconds {started}\n"
        f"vllm:num_requests_running 0.0\nvllm:num_requests_running {running}\nvllm:kv_cache_usage_perc {usage}\n"
    )


@dataclass
class Joined:
    """A scheduler, made servers, and an instance for each."""

    scheduler: SchedulerServer
    servers: list[ServerMade]
    instances: list[ServerInstance]

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110 - what is waited for happens in other threads
                await asyncio.sleep(0.01)

    @property
    def known(self) -> dict[str, object]:
        return dict(self.scheduler.shell.core.cluster.instances)


@asynccontextmanager
async def joined(
    tokenizer: str, *extras: dict[str, object], before: Callable[[Joined], None] = lambda made: None, **page: int
) -> AsyncIterator[Joined]:
    scheduler = SchedulerServer(SchedulerServerConfig(listen="127.0.0.1:0", core=PATIENT))
    await scheduler.startup()
    servers = [
        ServerMade(f"server-{i}", Changes(), Tokenizer(tokenizer), metrics=metrics(**page)) for i in range(len(extras))
    ]
    for server in servers:
        await server.start()
    instances = [
        ServerInstance(
            ServerSettings(url=server.address, id=server.name, tokenizer=tokenizer, **extra),  # type: ignore[arg-type]
            AgentContext(scheduler.address),
        )
        for server, extra in zip(servers, extras, strict=True)
    ]
    made = Joined(scheduler, servers, instances)
    before(made)
    try:
        for instance in instances:
            instance.start()
        await made.until(lambda: len(made.known) == len(servers))
        yield made
    finally:
        await asyncio.gather(*(asyncio.to_thread(instance.stop) for instance in instances))
        await scheduler.shutdown()
        for server in servers:
            await server.stop()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("changeable", [True, False])
def test_a_server_is_given_another_role_if_it_may(tokenizer: str, changeable: bool) -> None:
    async def test() -> None:
        extras = ({"role": "prefill", "role_changeable": changeable}, {"role": "prefill"}, {"role": "decode"})
        async with joined(tokenizer, *extras) as made:
            instances = made.scheduler.shell.core.cluster.instances
            commands = made.scheduler.shell.submit(RoleOrdered("server-0", Role.DECODE))
            if not changeable:
                assert [type(command) for command in commands] == [RoleRefused]
                return
            await made.until(lambda: instances["server-0"].info.role is Role.DECODE)
            await made.until(lambda: not made.scheduler.shell.core.roles.changes)

    run(test())


def test_a_server_joins_reports_and_leaves(tokenizer: str) -> None:
    async def test() -> None:
        async with joined(tokenizer, {"role": "decode", "batch_max": 7}) as made:
            instances = made.scheduler.shell.core.cluster.instances
            info = instances["server-0"].info
            assert (info.role, info.model, info.batch_max, info.kv_tokens_total) == (Role.DECODE, MODEL, 7, 4000)
            assert info.address == made.servers[0].address and info.version == "vllm 0.32.0"
            assert info.protocol == "openai" and info.hbm_source_id == ""
            # Equal for servers that differ in memory: else they could not hand over to each other.
            assert info.namespace.groups[0].block_bytes == 2 << 20
            made.servers[0].metrics = metrics(running=3, usage=0.5)
            await made.until(lambda: (instances["server-0"].running, instances["server-0"].kv_tokens_free) == (3, 2000))
            epoch = info.epoch
            made.servers[0].metrics = metrics(started=2.0)  # another process
            await made.until(lambda: made.known and instances["server-0"].info.epoch > epoch)
            await made.servers[0].stop()
            await made.until(lambda: not made.known)

    run(test())


def test_its_cache_is_in_the_directory(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.openai_server.event_feed.REPLAY_S", WAIT_S)

    async def test() -> None:
        publisher = Publisher()
        try:
            for topic, number, payload in frames()[:3]:
                publisher.publish(topic, number, payload)
            extra = {"events": publisher.endpoint, "replay": publisher.replay_endpoint}
            async with joined(tokenizer, extra, block_tokens=BLOCK_TOKENS) as made:
                instance, core = made.instances[0], made.scheduler.shell.core
                await made.until(lambda: instance.blocks == 7)
                keys = instance._naming(instance._facts).keys(b"", _words(PROMPT), BLOCK_TOKENS)  # type: ignore[arg-type]
                await made.until(lambda: core.directory.match(keys).covered == 3)
                await asyncio.to_thread(publisher.wait_subscribed)
                publisher.publish(*frames()[3])
                await made.until(lambda: core.directory.match(keys).covered == 1)
        finally:
            publisher.close()

    run(test())


def test_the_mask_of_its_connector_is_asked_for(tokenizer: str) -> None:
    """And again when the engine's caches were reset: its names in the pool may be others then."""

    async def test() -> None:
        publisher = Publisher()
        try:
            extra = {"events": publisher.endpoint, "node": "127.0.0.1:1"}

            def layout_of(made: Joined) -> str:
                instance = made.scheduler.shell.core.cluster.instances.get("server-0")
                return instance.info.namespace.layout if instance is not None else ""

            def tells(made: Joined, mask: str) -> None:
                made.servers[0].transfer = {"kvpool_tokens": 0, "kvpool_key_mask": mask}

            async with joined(tokenizer, extra, before=lambda made: tells(made, "ab" * 16)) as made:
                # A server that is slow to tell it is asked again, and joins again with it.
                await made.until(lambda: f" {'ab' * 16} " in layout_of(made))
                asked = made.servers[0].calls[0].body
                assert asked["max_tokens"] == 1 and asked["kv_transfer_params"] == {"kvpool_handoff": True}
                tells(made, "cd" * 16)
                await asyncio.to_thread(publisher.wait_subscribed)
                publisher.publish(b"", 0, msgspec.msgpack.encode([1.0, [{"type": "AllBlocksCleared"}], 0]))
                await made.until(lambda: f" {'cd' * 16} " in layout_of(made))
        finally:
            publisher.close()

    run(test())


def _words(tokens: list[int]):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.asarray(tokens, dtype=np.uint32)


@pytest.mark.parametrize("handoff", ["nixl", "none"])
def test_the_gateway_places_on_servers(tokenizer: str, handoff: str) -> None:
    """With a way to hand over, a prompt goes to one and its answer comes from the other; else one does both."""

    async def test() -> None:
        roles = ({"role": "prefill"}, {"role": "decode"}) if handoff == "nixl" else ({}, {})
        async with joined(tokenizer, *({**role, "handoff": handoff} for role in roles)) as made:
            gateway = GatewayServer(
                GatewayConfig(
                    scheduler=made.scheduler.address, listen="127.0.0.1:0", handoff="nixl", drain_timeout_s=1.0
                )
            )
            await gateway.startup()
            try:
                await ready(gateway)
                if handoff == "nixl":
                    sources = made.scheduler.shell.core.cluster.sources
                    await made.until(lambda: sources.keys() == {"server-0/nixl", "server-1/nixl"})
                prefill, decode = made.servers
                prefill.transfer = {"remote_host": "h"}
                options = {"policy": "always_split" if handoff == "nixl" else "kvpool"}
                body = {
                    "kvpool": options,
                    "model": MODEL,
                    "prompt": PROMPT[:11],
                    "max_tokens": 6,
                    "stream": True,
                    "temperature": 0,
                }
                async with http_client() as http:
                    response = await http.post(f"http://{gateway.address}/v1/completions", json=body)
                    assert response.status_code == 200
                text = decode.tokenizer.decode(expected_tokens(PROMPT[:11], 6))
                assert "".join(_texts(response.text)) == text
                if handoff == "nixl":
                    assert [call.is_prefill for call in prefill.calls] == [True]
                    assert decode.calls[0].body["kv_transfer_params"] == {"remote_host": "h"}
                else:
                    assert len(prefill.calls) + len(decode.calls) == 1
                async with http_client() as http:  # one answer of one token needs no two servers
                    single = await http.post(
                        f"http://{gateway.address}/v1/completions", json={**body, "max_tokens": 1, "stream": False}
                    )
                assert single.status_code == 200
                core = made.scheduler.shell.core
                await made.until(lambda: not core.book.placements)
            finally:
                await gateway.shutdown()

    run(test())


def _texts(stream: str) -> list[str]:
    import json

    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return [choice["text"] for event in events for choice in event["choices"]]
