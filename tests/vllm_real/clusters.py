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
from tests.vllm_real.serving import BLOCK_TOKENS, REPLY_S, START_S, Engine, Node, Process, connector, free_port, start

WAIT_S = 60.0


@dataclass
class Published:
    """An engine that publishes its KV events. `plain` has no connector and is only asked directly."""

    engine: Engine
    events: str
    replay: str

    @classmethod
    def start(cls, folder: Path, name: str, node: Node | None, **extra: Any) -> Published:
        events, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
        config = {"enable_kv_cache_events": True, "publisher": "zmq"}
        # An address without a star is one to connect to, for vLLM's publisher.
        endpoints = {"endpoint": events.replace("127.0.0.1", "*"), "replay_endpoint": replay.replace("127.0.0.1", "*")}
        arguments = ["--kv-events-config", json.dumps({**config, **endpoints})]
        transfer = connector(node, **extra) if node is not None else None
        return cls(Engine(folder, name, transfer, arguments), events, replay)

    def flag(self, node: Node, role: str) -> str:
        return (
            f"{self.engine.url},id={self.engine.name},role={role},node={node.address},"
            f"events={self.events},replay={self.replay}"
        )


@dataclass
class Cluster:
    """Everything that runs, and clients of it."""

    plain: Engine
    servers: list[Published]
    node: Node
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
        with httpx.stream("POST", url, json=asked, timeout=REPLY_S, trust_env=False) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    yield event

    def streamed(self, prompt: list[int], max_tokens: int = 16, **fields: Any) -> Streamed:
        return Streamed.of(list(self.stream(self.body(prompt, max_tokens, **fields))))

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        response = httpx.post(f"{self.gateway_url}{path}", json=body, timeout=REPLY_S, trust_env=False)
        return response.status_code, response.json()

    def gateway_metrics(self) -> str:
        return httpx.get(f"{self.gateway_url}/metrics", timeout=REPLY_S, trust_env=False).text

    # ------------------------------------------------------------ what the scheduler knows

    def scheduler(self) -> Any:
        channel = grpc.insecure_channel(self.scheduler_address)
        return scheduler_pb2_grpc.SchedulerStub(channel)

    def instances(self) -> dict[str, scheduler_pb2.InstanceStatus]:
        reply = self.scheduler().ListInstances(scheduler_pb2.ListInstancesRequest(), metadata=_PROTOCOL, timeout=10)
        return {status.info.instance_id: status for status in reply.instances}

    def status(self) -> scheduler_pb2.ClusterStatus:
        return self.scheduler().GetStatus(scheduler_pb2.GetStatusRequest(), metadata=_PROTOCOL, timeout=10)

    def explain(self, request_id: str) -> scheduler_pb2.Explanation:
        request = scheduler_pb2.ExplainRequest(request_id=request_id)
        return self.scheduler().Explain(request, metadata=_PROTOCOL, timeout=10)

    def holders(self, tokens: list[int]) -> dict[str, int]:
        """Source -> leading blocks of a prompt that it holds, by the names that the gateway gives them."""
        channel = grpc.insecure_channel(self.scheduler_address)
        listed = self.scheduler().ListModels(scheduler_pb2.ListModelsRequest(), metadata=_PROTOCOL, timeout=10)
        naming = EngineNaming.of_layout(listed.models[0].namespace.layout)
        keys = naming.keys(b"", np.asarray(tokens, dtype=np.uint32), BLOCK_TOKENS)
        request = directory_pb2.MatchRequest(keys=[common_pb2.KeyList(keys=keys.tobytes())])
        reply = directory_pb2_grpc.DirectoryStub(channel).Match(request, metadata=_PROTOCOL, timeout=10)
        return {run.source_id: run.count for run in reply.runs if run.first == 0}

    def until(self, holds: Any, what: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not holds():
            for process in self.processes:
                process.must_run()
            assert time.monotonic() < deadline_s, what
            self.node.process.wait_a_little()

    def nothing_left(self) -> bool:
        """Nothing runs on any server that is there, and nothing is promised."""
        alive = [s.engine for s in self.servers if s.engine.process.popen.poll() is None]
        busy = sum(e.metric("vllm:num_requests_running") + e.metric("vllm:num_requests_waiting") for e in alive)
        return not busy and not self.status().kv_tokens_reserved


_PROTOCOL = (("kvpool-protocol", "1"),)


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
def cluster(folder: Path, servers: int = 2, role: str = "both") -> Iterator[Cluster]:
    scheduler, port = f"127.0.0.1:{free_port()}", free_port()
    processes = [_kvpool(folder, "scheduler", "--listen", scheduler)]
    node = Node(folder, arguments=("--scheduler", scheduler))
    plain = Engine(folder, "plain")
    published = [Published.start(folder, f"server-{i}", node, handoff_wait_s=30.0) for i in range(servers)]
    processes.append(_kvpool(folder, "gateway", "--scheduler", scheduler, "--listen", f"127.0.0.1:{port}"))
    flags = [argument for server in published for argument in ("--server", server.flag(node, role))]
    processes.append(_kvpool(folder, "engine-agent", "--scheduler", scheduler, *flags))
    made = Cluster(plain, published, node, f"http://127.0.0.1:{port}", scheduler, processes)
    engines = [plain, *(server.engine for server in published)]
    try:
        for engine in engines:
            engine.wait()
        made.until(lambda: _joined(made, servers), "the servers did not join")
        yield made
    finally:
        for process in (*processes, *(engine.process for engine in engines), node.process):
            process.stop()
            kill(process)


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
