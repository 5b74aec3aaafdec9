"""Life lines: facts, reports and announcements reach a scheduler, and a restarted one by themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from engines.torch.model import LoadedModel
from engines.torch.reports import NodeWatch, SchedulerLink
from kvpool.client import PoolClient
from kvpool.core.errors import Unavailable
from kvpool.core.ids import Tier
from kvpool.v1 import directory_pb2, directory_pb2_grpc, engine_pb2, scheduler_pb2, scheduler_pb2_grpc

from .driving import prompt
from .serving import PATIENCE_S, Gateway, eventually, worker


class Recorder(scheduler_pb2_grpc.SchedulerServicer, directory_pb2_grpc.DirectoryServicer):
    """Speaks both life lines and keeps what it hears."""

    def __init__(self) -> None:
        self.infos: list[scheduler_pb2.InstanceMessage] = []
        self.reports: list[scheduler_pb2.InstanceReport] = []
        self.held: set[bytes] = set()
        self.hello: directory_pb2.SourceHello | None = None
        self.ended = threading.Event()
        self.order = engine_pb2.ROLE_UNSPECIFIED  # said after each report

    def Join(
        self, requests: Iterator[scheduler_pb2.InstanceMessage], context: grpc.ServicerContext
    ) -> Iterator[scheduler_pb2.SchedulerMessage]:
        context.add_callback(self.ended.set)
        self.infos.append(next(requests).info)
        yield scheduler_pb2.SchedulerMessage(report_interval_ms=50, scheduler_id="s")
        for message in requests:
            self.reports.append(message.report)
            if self.order:
                yield scheduler_pb2.SchedulerMessage(report_interval_ms=50, scheduler_id="s", role=self.order)

    def Attach(
        self, requests: Iterator[directory_pb2.SourceMessage], context: grpc.ServicerContext
    ) -> Iterator[directory_pb2.DirectoryMessage]:
        self.hello = next(requests).hello
        yield directory_pb2.DirectoryMessage(want_snapshot=True, heartbeat_interval_ms=100)
        for message in requests:
            self._hear(message)

    def _hear(self, message: directory_pb2.SourceMessage) -> None:
        if message.HasField("snapshot"):
            self.held = set(_keys(message.snapshot.keys.keys))
        for event in message.events.events:
            change = self.held.update if event.kind == directory_pb2.BlockEvent.STORED else self.held.difference_update
            change(_keys(event.keys.keys))


def _keys(packed: bytes) -> list[bytes]:
    return [packed[i : i + 16] for i in range(0, len(packed), 16)]


def serve(recorder: Recorder, address: str = "127.0.0.1:0") -> tuple[grpc.Server, str]:
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(recorder, server)
    directory_pb2_grpc.add_DirectoryServicer_to_server(recorder, server)
    port = server.add_insecure_port(address)
    server.start()
    return server, f"127.0.0.1:{port}"


@pytest.fixture
def recorder() -> Iterator[tuple[Recorder, str, list[grpc.Server]]]:
    recorder = Recorder()
    server, address = serve(recorder)
    servers = [server]
    yield recorder, address, servers
    servers[-1].stop(None).wait(PATIENCE_S)


def test_a_worker_reports_and_announces(llama: LoadedModel, recorder: tuple[Recorder, str, list[grpc.Server]]) -> None:
    heard, address, servers = recorder
    with worker(llama, "w7", scheduler=address, role="decode") as own:
        assert own.wait_joined(PATIENCE_S)
        info = heard.infos[0]
        assert (info.instance_id, info.role, info.model, info.address) == ("w7", 2, "llama", own.address)
        assert info.kv_tokens_total == 4096 and info.namespace.groups[0].block_tokens == 16
        assert heard.hello is not None and heard.hello.instance_id == "w7"
        assert heard.hello.source_id == info.hbm_source_id and not heard.hello.address
        with Gateway(own) as gateway:
            gateway.submit("r", prompt(1, 70), max_tokens=30)
            gateway.tokens("r")
            reports = lambda: list(heard.reports)  # noqa: E731
            eventually(lambda: any("r" in r.finished_prefills for r in reports()), "the prefill's end is reported")
            eventually(lambda: sum(len(r.decode) for r in reports()) == 29, "decode steps are reported")
            samples = [s for r in reports() for s in r.prefill]
            assert [(s.new_tokens, s.cached_tokens) for s in samples] == [(70, 0)] and samples[0].duration_us > 0
            cached = {key.tobytes() for key in own.engine.cached_keys()}
            eventually(lambda: heard.held == cached and len(cached) == 6, "HBM blocks are announced")

            assert servers[-1].stop(None).wait(PATIENCE_S)
            restarted = Recorder()
            servers.append(serve(restarted, address)[0])
            eventually(lambda: bool(restarted.infos and restarted.reports), "it joins a restarted scheduler")
            eventually(lambda: restarted.held == cached, "and announces all it holds")
            gateway.submit("s", prompt(2, 20))
            assert len(gateway.tokens("s")) == 12
    assert restarted.ended.wait(PATIENCE_S), "a worker that stops leaves by itself"


@pytest.mark.parametrize("changeable", [True, False])
def test_a_role_is_taken_by_those_that_agree(
    llama: LoadedModel, recorder: tuple[Recorder, str, list[grpc.Server]], changeable: bool
) -> None:
    heard, address, _ = recorder
    with worker(llama, scheduler=address, role="decode", role_changeable=changeable) as running:
        eventually(lambda: bool(heard.reports), "a report")
        assert heard.infos[0].role_changeable == changeable
        assert {report.role for report in heard.reports} == {engine_pb2.ROLE_DECODE}
        before = len(heard.reports)
        heard.order = engine_pb2.ROLE_PREFILL
        if changeable:
            eventually(lambda: heard.reports[-1].role == engine_pb2.ROLE_PREFILL, "it says that it has the role")
            assert running.info().role == engine_pb2.ROLE_PREFILL, "and says so again when it joins again"
        else:
            eventually(lambda: len(heard.reports) > before + 5, "it goes on")
            assert heard.reports[-1].role == engine_pb2.ROLE_DECODE


def test_facts_that_change_while_it_joins_are_said_too(
    recorder: tuple[Recorder, str, list[grpc.Server]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call has asked for them, and is not in its hands yet, to be cut."""
    heard, address, _ = recorder
    node, asked = [""], threading.Event()

    def info() -> engine_pb2.EngineInfo:
        found = engine_pb2.EngineInfo(instance_id="w", node_source_id=node[0])
        asked.set()
        return found

    class Stub(scheduler_pb2_grpc.SchedulerStub):
        def __init__(self, channel: grpc.Channel) -> None:
            super().__init__(channel)
            join = self.Join

            def and_then_a_node_is_found(messages: Iterator[scheduler_pb2.InstanceMessage]) -> object:
                call = join(messages)
                assert asked.wait(PATIENCE_S)
                if not node[0]:
                    node[0] = "node-7"
                    link.rejoin()
                return call

            self.Join = and_then_a_node_is_found

    monkeypatch.setattr(scheduler_pb2_grpc, "SchedulerStub", Stub)
    link = SchedulerLink(address, info=info, report=scheduler_pb2.InstanceReport)
    link.start()
    try:
        eventually(lambda: any(i.node_source_id == "node-7" for i in list(heard.infos)), "its node is known")
    finally:
        link.close()


def test_an_hbm_that_can_be_read_is_announced_with_its_address(
    llama: LoadedModel, recorder: tuple[Recorder, str, list[grpc.Server]], tmp_path: Path
) -> None:
    heard, address, _ = recorder
    own = worker(llama, "w8", scheduler=address, hbm_staging_bytes=1 << 20, segment_dir=str(tmp_path))
    with own, PoolClient(own.address) as client:
        assert own.wait_joined(PATIENCE_S) and heard.hello is not None
        assert heard.hello.address == own.address and heard.hello.tier == Tier.HBM
        assert client.source_id == heard.hello.source_id and client.epoch == heard.hello.epoch


def test_a_late_node_is_found(llama: LoadedModel) -> None:
    asked, found = [], threading.Event()

    def ask() -> str:
        asked.append(1)
        if len(asked) < 2:
            raise Unavailable("not yet")
        return "node-7"

    watch = NodeWatch(ask, found.set)
    watch.start()
    assert watch.wait(PATIENCE_S) and found.wait(PATIENCE_S) and watch.source_id == "node-7"
    watch.close()
