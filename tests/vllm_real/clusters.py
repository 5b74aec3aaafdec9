"""A cluster in front of real vLLM servers: scheduler, gateway, agent and node as processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np

from kvpool.core.engine_keys import EngineNaming
from kvpool.v1 import common_pb2, directory_pb2, directory_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from tests.vllm_real.serving import (
    BLOCK_TOKENS,
    PATIENT,
    REPLY_S,
    START_S,
    Engine,
    Node,
    Process,
    connector,
    free_port,
    start,
)

WAIT_S = 300.0
#: Of one call to the scheduler.
CALL_S = 60.0
#: No server is known to be alive, on a machine that lets heartbeats starve: clients ask again.
_TRY_AGAIN = (429, 503)


@dataclass(frozen=True)
class Servers:
    """Servers to be asked directly: one without a connector, and two on a node."""

    node: Node
    plain: Engine
    prefill: Engine
    decode: Engine


@dataclass(frozen=True)
class Member:
    """A server of a cluster, and what its agent is told of it beside id and role."""

    engine: Engine
    settings: str

    @classmethod
    def on_pool(cls, folder: Path, name: str, node: Node) -> Member:
        """With kvpool's connector, and publishing its KV events."""
        events, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
        config = {"enable_kv_cache_events": True, "publisher": "zmq"}
        # An address without a star is one to connect to, for vLLM's publisher.
        endpoints = {"endpoint": events.replace("127.0.0.1", "*"), "replay_endpoint": replay.replace("127.0.0.1", "*")}
        arguments = ["--kv-events-config", json.dumps({**config, **endpoints})]
        engine = Engine(folder, name, connector(node, **PATIENT), arguments)
        return cls(engine, f"node={node.address},events={events},replay={replay}")

    @classmethod
    def on_nixl(cls, folder: Path, name: str) -> Member:
        """With vLLM's own NixlConnector, over loopback."""
        transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
        environment = {
            "UCX_TLS": "tcp,self,sm", "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        }  # fmt: skip
        return cls(Engine(folder, name, transfer, environment=environment), "handoff=nixl")

    def flag(self, role: str) -> str:
        return f"{self.engine.url},id={self.engine.name},role={role},{self.settings}"


@dataclass
class Cluster:
    """Everything that runs, and clients of it."""

    plain: Engine
    servers: list[Member]
    node: Node | None
    gateway_url: str
    scheduler_address: str
    processes: list[Process] = field(default_factory=list)

    # ------------------------------------------------------------ clients

    def body(self, prompt: list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
        return {
            "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **fields,
        }  # fmt: skip

    def stream(self, body: dict[str, Any], path: str = "/v1/completions") -> Iterator[dict[str, Any]]:
        """Events of a streamed answer; closing the iterator closes the connection."""
        url, asked = f"{self.gateway_url}{path}", {"stream": True, **body}
        deadline_s = time.monotonic() + WAIT_S
        while True:
            with httpx.stream("POST", url, json=asked, timeout=REPLY_S, trust_env=False) as response:
                if response.status_code == 200:
                    yield from _events(response)
                    return
                assert response.status_code in _TRY_AGAIN and time.monotonic() < deadline_s, response.read()
            self.processes[0].wait_a_little()

    def streamed(self, prompt: list[int], max_tokens: int = 16, **fields: Any) -> Streamed:
        return Streamed.of(list(self.stream(self.body(prompt, max_tokens, **fields))))

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        deadline_s = time.monotonic() + WAIT_S
        while True:
            response = httpx.post(f"{self.gateway_url}{path}", json=body, timeout=REPLY_S, trust_env=False)
            if response.status_code not in _TRY_AGAIN or time.monotonic() > deadline_s:
                return response.status_code, response.json()
            self.processes[0].wait_a_little()

    def gateway_metrics(self) -> str:
        return httpx.get(f"{self.gateway_url}/metrics", timeout=REPLY_S, trust_env=False).text

    # ------------------------------------------------------------ what the scheduler knows

    def scheduler(self) -> Any:
        channel = grpc.insecure_channel(self.scheduler_address)
        return scheduler_pb2_grpc.SchedulerStub(channel)

    def instances(self) -> dict[str, scheduler_pb2.InstanceStatus]:
        reply = self.scheduler().ListInstances(scheduler_pb2.ListInstancesRequest(), metadata=_PROTOCOL, timeout=CALL_S)
        return {status.info.instance_id: status for status in reply.instances}

    def status(self) -> scheduler_pb2.ClusterStatus:
        return self.scheduler().GetStatus(scheduler_pb2.GetStatusRequest(), metadata=_PROTOCOL, timeout=CALL_S)

    def explain(self, request_id: str) -> scheduler_pb2.Explanation:
        request = scheduler_pb2.ExplainRequest(request_id=request_id)
        return self.scheduler().Explain(request, metadata=_PROTOCOL, timeout=CALL_S)

    def holders(self, tokens: list[int]) -> dict[str, int]:
        """Source -> leading blocks of a prompt that it holds, by the names that the gateway gives them."""
        channel = grpc.insecure_channel(self.scheduler_address)
        listed = self.scheduler().ListModels(scheduler_pb2.ListModelsRequest(), metadata=_PROTOCOL, timeout=CALL_S)
        naming = EngineNaming.of_layout(listed.models[0].namespace.layout)
        keys = naming.keys(b"", np.asarray(tokens, dtype=np.uint32), BLOCK_TOKENS)
        request = directory_pb2.MatchRequest(keys=[common_pb2.KeyList(keys=keys.tobytes())])
        reply = directory_pb2_grpc.DirectoryStub(channel).Match(request, metadata=_PROTOCOL, timeout=CALL_S)
        return {run.source_id: run.count for run in reply.runs if run.first == 0}

    def until(self, holds: Any, what: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not holds():
            for process in self.processes:
                process.must_run()
            assert time.monotonic() < deadline_s, what
            self.processes[0].wait_a_little()

    def nothing_left(self) -> bool:
        """Nothing runs on any server that is there, and nothing is promised."""
        alive = [s.engine for s in self.servers if s.engine.process.popen.poll() is None]
        busy = sum(e.metric("vllm:num_requests_running") + e.metric("vllm:num_requests_waiting") for e in alive)
        return not busy and not self.status().kv_tokens_reserved


_PROTOCOL = (("kvpool-protocol", "1"),)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            assert "error" not in event, event
            yield event


@dataclass
class Streamed:
    """What a client made of a stream."""

    tokens: tuple[int, ...]
    text: str
    finish: str
    placements: list[dict[str, Any]]
    cached_tokens: int

    @classmethod
    def of(cls, events: list[dict[str, Any]]) -> Streamed:
        choices = [choice for event in events for choice in event.get("choices") or ()]
        usage = next((event["usage"] for event in events if event.get("usage")), {})
        return cls(
            tuple(token for choice in choices for token in choice.get("token_ids") or ()),
            "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in choices),
            next((choice["finish_reason"] for choice in reversed(choices) if choice["finish_reason"]), ""),
            next((event["kvpool"]["placements"][0] for event in events if event.get("kvpool")), []),
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        )


def _kvpool(folder: Path, role: str, *arguments: str) -> Process:
    script = Path(sys.executable).parent / "kvpool"
    return start([str(script), role, *arguments], folder / f"{role}.log", {"OMP_NUM_THREADS": "1"})


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A server without a connector, and two that share a node, behind a gateway."""
    scheduler = f"127.0.0.1:{free_port()}"
    with _role(folder, "scheduler", "--listen", scheduler) as process:
        node = Node(folder, arguments=("--scheduler", scheduler))
        plain = Engine(folder, "plain")
        members = [Member.on_pool(folder, f"server-{number}", node) for number in range(2)]
        try:
            with _gateway(folder, scheduler, plain, node, members) as made:
                made.processes.append(process)
                yield made
        finally:
            for one in (plain.process, *(member.engine.process for member in members), node.process):
                one.stop()


@contextlib.contextmanager
def nixl_cluster(folder: Path, plain: Engine) -> Iterator[Cluster]:
    """Two servers that hand over by themselves, behind a gateway that tells them to."""
    scheduler = f"127.0.0.1:{free_port()}"
    with _role(folder, "scheduler", "--listen", scheduler) as process:
        members = [Member.on_nixl(folder, f"nixl-{number}") for number in range(2)]
        try:
            with _gateway(folder, scheduler, plain, None, members, "--handoff", "nixl") as made:
                made.processes.append(process)
                yield made
        finally:
            for member in members:
                member.engine.process.stop()


@contextlib.contextmanager
def _role(folder: Path, role: str, *arguments: str) -> Iterator[Process]:
    process = _kvpool(folder, role, *arguments)
    try:
        yield process
    finally:
        process.stop()


@contextlib.contextmanager
def _gateway(
    folder: Path, scheduler: str, plain: Engine, node: Node | None, members: list[Member], *arguments: str
) -> Iterator[Cluster]:
    """Gateway and agent of servers that start; waits until all have joined."""
    address = f"127.0.0.1:{free_port()}"
    flags = [argument for member in members for argument in ("--server", member.flag("both"))]
    with (
        _role(folder, "gateway", "--scheduler", scheduler, "--listen", address, *arguments) as gateway,
        _role(folder, "engine-agent", "--scheduler", scheduler, *flags) as agent,
    ):
        made = Cluster(plain, members, node, f"http://{address}", scheduler, [gateway, agent])
        for engine in (plain, *(member.engine for member in members)):
            engine.wait()
        made.until(lambda: _joined(made, len(members)), "the servers did not join")
        yield made


def _joined(made: Cluster, count: int) -> bool:
    try:
        with urllib.request.urlopen(f"{made.gateway_url}/v1/models", timeout=5) as reply:
            listed = json.loads(reply.read())["data"]
        return bool(listed) and sum(i.state == "alive" for i in made.instances().values()) == count
    except (OSError, urllib.error.URLError, grpc.RpcError):
        return False


def kill(process: Process) -> None:
    """At once, with all that it started: each has a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.popen.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.popen.wait(START_S)
