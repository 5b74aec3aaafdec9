"""Real processes for the tests: vLLM's own OpenAI server on the CPU, and a pool node. Stopped by PID, logs kept."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parent.parent / "models" / "tiny-llama"
BLOCK_TOKENS = 32
#: No figure of a test: a machine that does other things too may be slow, and must not fail for it.
START_S, STOP_S, REPLY_S = 600.0, 60.0, 300.0
#: Of each engine's cache: several engines are to fit into one machine.
CACHE_BYTES = 256 << 20
#: Connector settings under which a slow machine loads all the same, where it would compute by the defaults.
PATIENT: dict[str, Any] = {"load_timeout_s": 60.0, "lookup_timeout_ms": 10_000, "handoff_wait_s": 60.0}

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    # Else servers of a small machine bind kernel threads to the same cores, where each waits for the others' time.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


#: Ports that this process has given away already.
_GIVEN: set[int] = set()


def free_port() -> int:
    """A port nobody listens on; below those that outgoing connections get, since a server takes a while to take it."""
    end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(10_000, end) if end > 11_000 else 0
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            port = int(s.getsockname()[1])
            if port not in _GIVEN:
                _GIVEN.add(port)
                return port


@dataclass
class Process:
    """One process and where it writes."""

    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        try:
            self.popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(STOP_S)
        # vLLM's other processes, which outlive a first one that was killed, or was stopped while it started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def wait_a_little(self) -> None:
        """Until it ends, which it should not, or a moment has passed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(0.2)

    def must_run(self) -> None:
        assert self.popen.poll() is None, f"ended with {self.popen.returncode}:\n{self.text[-4000:]}"


def start(arguments: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> Process:
    with log.open("ab") as out:
        popen = subprocess.Popen(
            arguments, stdout=out, stderr=out, env={**os.environ, **(environment or {})}, start_new_session=True
        )
    return Process(popen, log)


class Node:
    """A pool node without a scheduler of its own; may be killed and started again at the same address."""

    def __init__(self, folder: Path, memory: str = "256MiB", arguments: Sequence[str] = ()) -> None:
        self.port = free_port()
        self._folder, self._memory, self._arguments = folder, memory, arguments
        self.process = self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> Process:
        script = Path(sys.executable).parent / "kvpool"
        self.process = start(
            [
                str(script),
                "node",
                "--id",
                f"node-{self.port}",
                "--listen",
                self.address,
                "--memory",
                self._memory,
                *self._arguments,
            ],
            self._folder / f"node-{self.port}.log",
        )
        deadline_s = time.monotonic() + START_S
        while not self._answers():
            self.process.must_run()
            assert time.monotonic() < deadline_s, self.process.text[-2000:]
            self.process.wait_a_little()
        return self.process

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 0.2):
                return True
        except OSError:
            return False


@dataclass
class Offline:
    """A vLLM without a server that asks prompts in rounds: see `offline`."""

    process: Process
    prompts: list[list[list[int]]]

    @classmethod
    def start(
        cls,
        folder: Path,
        name: str,
        node: Node,
        prompts: list[list[list[int]]],
        settings: dict[str, Any] | None = None,
    ) -> Offline:
        engine = {
            "model": str(MODEL), "dtype": "float32", "enforce_eager": True, "max_model_len": 2048,
            "block_size": BLOCK_TOKENS, "kv_cache_memory_bytes": CACHE_BYTES,
            "kv_transfer_config": connector(node, **PATIENT),
            **(settings or {}),
        }  # fmt: skip
        job = json.dumps({"engine": engine, "rounds": prompts, "max_tokens": 16})
        command = [sys.executable, "-m", "tests.vllm_real.offline", job]
        return cls(start(command, folder / f"{name}.log", ENVIRONMENT), prompts)

    def rounds(self) -> list[Round]:
        """What was answered, once it has ended."""
        try:
            self.process.popen.wait(START_S)
        finally:
            self.process.stop()
        line = next((line for line in self.process.text.splitlines() if line.startswith("[{")), None)
        assert line is not None, self.process.text[-4000:]
        return [
            Round([tuple(tokens) for tokens in one["tokens"]], one["cached"], prompts)
            for one, prompts in zip(json.loads(line), self.prompts, strict=True)
        ]


@dataclass(frozen=True)
class Round:
    tokens: list[tuple[int, ...]]
    cached: list[int]
    prompts: list[list[int]]

    def all_cached(self, block_tokens: int = BLOCK_TOKENS) -> bool:
        """Whether all full blocks of each prompt were had."""
        return self.cached == [full_block_tokens(prompt, block_tokens) for prompt in self.prompts]


class Engine:
    """vLLM's server, with or without the connector."""

    def __init__(
        self,
        folder: Path,
        name: str,
        connector: dict[str, Any] | None = None,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self.port = name, free_port()
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(MODEL), "--served-model-name", "tiny",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager",
            "--max-model-len", "2048", "--block-size", str(BLOCK_TOKENS), "--enable-prompt-tokens-details",
            "--kv-cache-memory-bytes", str(CACHE_BYTES), *arguments,
        ]  # fmt: skip
        if connector is not None:
            command += ["--kv-transfer-config", json.dumps(connector)]
        self.process = start(command, folder / f"{name}.log", {**ENVIRONMENT, **(environment or {})})

    def wait(self) -> Engine:
        deadline_s = time.monotonic() + START_S
        while True:
            self.process.must_run()
            assert time.monotonic() < deadline_s, self.process.text[-4000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return self
            except (OSError, urllib.error.URLError):
                self.process.wait_a_little()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: dict[str, Any], timeout_s: float = REPLY_S) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            data = reply.read()
        return json.loads(data) if data else {}

    def complete(self, prompt: Sequence[int], max_tokens: int = 16, **fields: Any) -> Completion:
        body = {
            "model": "tiny", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **fields,
        }  # fmt: skip
        reply = self.post("/v1/completions", body, REPLY_S + 2 * max_tokens)
        details = reply["usage"].get("prompt_tokens_details") or {}
        return Completion(
            tuple(reply["choices"][0]["token_ids"]), details.get("cached_tokens") or 0, reply.get("kv_transfer_params")
        )

    def leave(self, prompt: Sequence[int], tokens: int, **fields: Any) -> None:
        """A client that asks for a stream and closes its connection after some tokens."""
        body = {"model": "tiny", "prompt": list(prompt), "max_tokens": 400, "temperature": 0, "ignore_eos": True,
                "stream": True, **fields}  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REPLY_S)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            while tokens:
                tokens -= reply.readline().startswith(b"data:")
        finally:
            connection.close()

    def forget(self) -> None:
        """Empties vLLM's own prefix cache. Stores under way hold blocks: until they are through, vLLM refuses."""
        deadline_s = time.monotonic() + REPLY_S
        while not self.post("/reset_prefix_cache", {})["success"]:
            assert time.monotonic() < deadline_s, self.process.text[-2000:]
            self.process.wait_a_little()

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

    def stop(self) -> None:
        self.process.stop()

    def loads(self, prompt: Sequence[int], max_tokens: int = 1, **fields: Any) -> Completion:
        """Asks until all full blocks of a prompt come from the pool; what is not there is computed, and stored."""
        deadline_s = time.monotonic() + REPLY_S
        while True:
            self.forget()
            answer = self.complete(prompt, max_tokens, **fields)
            if answer.cached_tokens >= full_block_tokens(prompt):
                return answer
            assert time.monotonic() < deadline_s, f"{answer.cached_tokens} tokens: {self.process.text[-2000:]}"


@dataclass(frozen=True)
class Completion:
    tokens: tuple[int, ...]
    cached_tokens: int
    kv_transfer_params: dict[str, Any] | None


def connector(node: Node, **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "KVPoolConnector", "kv_connector_module_path": "engines.vllm.connector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"node": node.address, **extra},
    }  # fmt: skip


def full_block_tokens(prompt: Sequence[int], block_tokens: int = BLOCK_TOKENS) -> int:
    """Tokens of a prompt in full blocks, at least one token being left to compute."""
    return (len(prompt) - 1) // block_tokens * block_tokens


@contextlib.contextmanager
def running(*processes: Engine | Node | Offline) -> Iterator[None]:
    """Servers that answer, once inside; all are stopped behind it."""
    try:
        for engine in processes:
            if isinstance(engine, Engine):
                engine.wait()
        yield
    finally:
        for process in processes:
            process.process.stop()
