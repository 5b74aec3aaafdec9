"""vLLM's server for a benchmark: started, asked over HTTP, and its processor time read."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

START_S, REPLY_S, STOP_S = 300.0, 600.0, 30.0
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_SERVER_DEV_MODE": "1",
}  # fmt: skip
#: Of vLLM's own cache: several prompts of 8192 tokens.
CACHE_BYTES = 512 << 20
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass(frozen=True)
class Answer:
    """`first_s` from sending the request to its first token; `tokens` as their text, which greedy sampling fixes."""

    first_s: float
    cached_tokens: int
    tokens: str
    transfer: dict[str, Any] | None


class Server:
    """One vLLM, from its start to `close`."""

    def __init__(
        self,
        python: str,
        model: Path,
        *,
        connector: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        core: int = 1,
        tokens_max: int = 8704,
    ) -> None:
        """Args: core: the one that computes; everything else of it may use the others."""
        self.port = free_port()
        command = [
            python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "bench",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager",
            "--max-model-len", str(tokens_max), "--max-num-batched-tokens", "2048", "--block-size", "128",
            "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(CACHE_BYTES),
            "--enable-prompt-tokens-details", "--skip-tokenizer-init",
        ]  # fmt: skip
        if connector is not None:
            command += ["--kv-transfer-config", json.dumps(dict(connector))]
        bound = {"VLLM_CPU_OMP_THREADS_BIND": str(core)}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - until `close`
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, start_new_session=True,
            env={**os.environ, **ENVIRONMENT, **bound, **(environment or {})},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> Self:
        end_s = time.monotonic() + START_S
        while True:
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(f"vLLM did not start:\n{self.text[-6000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
                return self
            except OSError:
                time.sleep(0.5)

    @property
    def text(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_S)

    # ------------------------------------------------------------ requests

    def ask(self, prompt: Sequence[int], tokens: int = 1, **fields: Any) -> Answer:
        """One streamed completion."""
        body = {
            "model": "bench", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, "detokenize": False,
            **fields,
        }  # fmt: skip
        data = json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REPLY_S)
        begin_s = time.perf_counter()
        try:
            connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
            return self._read(connection.getresponse(), begin_s)
        finally:
            connection.close()

    def _read(self, reply: http.client.HTTPResponse, begin_s: float) -> Answer:
        if reply.status != 200:
            raise RuntimeError(f"vLLM answers {reply.status}: {reply.read()[:2000]!r}")
        first_s, cached, transfer = 0.0, 0, None
        told: list[int] = []
        for line in reply:
            if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[5:])
            for choice in event.get("choices", ()):
                first_s = first_s or time.perf_counter() - begin_s
                told += choice.get("token_ids") or []
            cached = ((event.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or cached
            transfer = event.get("kv_transfer_params") or transfer
        return Answer(first_s, cached, " ".join(map(str, told)), transfer)

    def hand_over(self, prompt: Sequence[int], parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The first of the two steps: the prompt is computed here. Returns: what the second server is told."""
        body = {"model": "bench", "prompt": list(prompt), "max_tokens": 1, "temperature": 0, "detokenize": False,
                "kv_transfer_params": dict(parameters)}  # fmt: skip
        return dict(self._post("/v1/completions", body)["kv_transfer_params"])

    def forget(self) -> None:
        """Empties vLLM's own prefix cache, as soon as nothing holds its blocks any more."""
        end_s = time.monotonic() + REPLY_S
        while not self._post("/reset_prefix_cache", {})["success"]:
            if time.monotonic() > end_s:
                raise RuntimeError(f"vLLM's cache is held:\n{self.text[-3000:]}")
            time.sleep(0.05)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REPLY_S) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer

    # ------------------------------------------------------------ what it cost

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

    def cpu_s(self) -> float:
        """Processor seconds of all its processes so far."""
        total = 0.0
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            if int(fields[3]) == self._process.pid:  # its session
                total += (int(fields[11]) + int(fields[12])) * TICK_S
        return total
