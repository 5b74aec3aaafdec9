"""vLLM's server for a benchmark, and its model: started, asked over HTTP, and its processor time read."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

START_S, REPLY_S, STOP_S, METRIC_S = 600.0, 600.0, 30.0, 10.0
#: One thread computes, on whichever core: bound to one, all other threads of the server would have to share it.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_SERVER_DEV_MODE": "1",
}  # fmt: skip
#: Of vLLM's own cache: several prompts of 8192 tokens.
CACHE_BYTES = 512 << 20
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
#: Makes the model; runs under vLLM's Python, which has transformers.
MODEL_SCRIPT = """
import sys, torch, transformers
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=int(sys.argv[2]), hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=16384, tie_word_embeddings=True)
transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(sys.argv[1])
"""


def make_model(python: str, folder: Path, vocabulary: int = 4096) -> None:
    """A Llama with random weights, always the same, and 16 KiB of cache a token; no tokenizer."""
    subprocess.run([python, "-c", MODEL_SCRIPT, str(folder), str(vocabulary)], check=True, stderr=sys.stderr)


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
        tokens_max: int = 8704,
        tokenizer: bool = False,
        arguments: Sequence[str] = (),
    ) -> None:
        """Starts it; see `wait`.

        Args:
            tokenizer: whether the model's folder has one; else prompts are token ids, and so are answers.
            arguments: further ones of vLLM.
        """
        self.port = free_port()
        command = [
            python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "bench",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager",
            "--max-model-len", str(tokens_max), "--max-num-batched-tokens", "2048", "--block-size", "128",
            "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(CACHE_BYTES),
            "--enable-prompt-tokens-details", *([] if tokenizer else ["--skip-tokenizer-init"]), *arguments,
        ]  # fmt: skip
        if connector is not None:
            command += ["--kv-transfer-config", json.dumps(dict(connector))]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - until `close`
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, start_new_session=True,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
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

    def pause(self) -> None:
        """Stops all its processes: what spins while it waits takes no processor from others."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        if self._process.poll() is None:
            self.resume()
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

    def metric(self, name: str, **labels: str) -> float:
        """Sum of all its series, or of those with these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        series = (line for line in lines if line.startswith(f"{name}{{") and all(word in line for word in wanted))
        return sum(float(line.rsplit(" ", 1)[1]) for line in series)

    def reaches(self, name: str, value: float) -> None:
        """Raises: RuntimeError if a metric stays below a value: some moments, since it is told behind the answer."""
        end_s = time.monotonic() + METRIC_S
        while (now := self.metric(name)) < value:
            if time.monotonic() > end_s:
                raise RuntimeError(f"{name} is {now:.0f}, not {value:.0f}:\n{self.text[-3000:]}")
            time.sleep(0.05)

    def cpu_s(self) -> float:
        """Processor seconds of all its processes so far."""
        return sum(_ticks(stat) for stat in _stats() if int(stat[3]) == self._process.pid) * TICK_S  # its session


def cpu_s_of(process_id: int) -> float:
    """Processor seconds of a process so far."""
    return _ticks((Path("/proc") / str(process_id) / "stat").read_text().rpartition(")")[2].split()) * TICK_S


def _stats() -> Iterator[list[str]]:
    """Fields of /proc/*/stat behind the name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile
                yield (entry / "stat").read_text().rpartition(")")[2].split()


def _ticks(stat: Sequence[str]) -> int:
    return int(stat[11]) + int(stat[12])
