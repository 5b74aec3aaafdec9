"""vLLM servers behind our gateway under vLLM's own load client: cache-aware placement beside round robin.

    python tools/bench/vllm_fleet.py --vllm-python .venv-vllm/bin/python [--prefill 2 --decode 2]

Starts scheduler, node, servers, agent and gateway, runs `vllm bench serve` with each policy in turn, `--rounds` times,
and ends everything. The load is conversations of several turns whose prompts repeat all that was said before (answers
are scripted, so that all runs ask the same number of tokens), each run with words of its own; `--clients` ask at the
same time, as fast as they are answered. TTFT is what the client measured; the prediction's error is the scheduler's
own. Without --prefill and --decode there are four servers (`--both`) that do both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from harness import Report, Row, arguments, wait_until_quiet
from node import NodeProcess
from vllm_server import ENVIRONMENT, Server, free_port, make_model

from kvpool.v1 import scheduler_pb2, scheduler_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "models" / "tiny-llama"
POOL_BYTES = 2 << 30
#: `vllm bench serve`, whose command line needs a distribution called "vllm", which the CPU build is not.
CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
JOIN_S, RUN_S, CALL_S = 300.0, 1800.0, 60.0
#: What tokens are counted in below; a piece is told by a number, and is the same tokens wherever it occurs in a run.
PIECE_TOKENS = 64
#: Pieces of a first turn, and what each further one adds: the answer before it and a question.
FIRST_PIECES, TURN_PIECES = 12, 4
ANSWER_TOKENS = 32


# ---------------------------------------------------------------- the load


def conversations(count: int, turns: int, seed: int) -> list[list[int]]:
    """Prompts as pieces, all first turns before all second ones and so on, in another order each time."""
    draw, pieces = random.Random(seed), itertools.count(1)
    talks = [[next(pieces) for _ in range(FIRST_PIECES)] for _ in range(count)]
    prompts = []
    for _ in range(turns):
        order = list(range(count))
        draw.shuffle(order)
        prompts += [talks[number] for number in order]
        talks = [talk + [next(pieces) for _ in range(TURN_PIECES)] for talk in talks]
    return prompts


def load(args: argparse.Namespace, folder: Path, gateway: str, policy: str, seed: int) -> dict[str, Any]:
    """One run of vLLM's client. Returns: its own summary."""
    trace, name = folder / f"trace-{seed}.jsonl", f"result-{seed}.json"
    asked = conversations(args.conversations, args.turns, seed)
    lines = [
        {"timestamp": 0, "input_length": PIECE_TOKENS * len(pieces), "output_length": ANSWER_TOKENS, "hash_ids": pieces}
        for pieces in asked
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    command = [
        args.vllm_python, "-c", CLIENT, "--backend", "openai", "--base-url", gateway, "--endpoint", "/v1/completions",
        "--model", "bench", "--tokenizer", str(TOKENIZER), "--dataset-name", "timed_trace",
        "--dataset-path", str(trace), "--timed-trace-chunk-hash-size", str(PIECE_TOKENS), "--no-self-timed",
        "--num-prompts", str(len(asked)), "--max-concurrency", str(args.clients), "--ignore-eos",
        "--temperature", "0", "--extra-body", json.dumps({"kvpool": {"policy": policy}}),
        "--disable-tqdm", "--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", name,
    ]  # fmt: skip
    # vLLM's client draws a piece's tokens by Python's hash of its number: other ones in each run.
    environment = {**os.environ, **ENVIRONMENT, "PYTHONHASHSEED": str(seed + 1)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=RUN_S)
    if done.returncode or not (folder / name).exists():
        raise RuntimeError(f"vllm bench serve failed:\n{done.stdout.decode(errors='replace')[-4000:]}")
    result: dict[str, Any] = json.loads((folder / name).read_text())
    return result


# ---------------------------------------------------------------- the cluster


@dataclass(frozen=True)
class Fleet:
    """Everything that runs."""

    gateway: str
    scheduler: str
    servers: Sequence[Server]

    def instances(self) -> list[scheduler_pb2.InstanceStatus]:
        with grpc.insecure_channel(self.scheduler) as channel:
            stub = scheduler_pb2_grpc.SchedulerStub(channel)
            request = scheduler_pb2.ListInstancesRequest()
            reply = stub.ListInstances(request, metadata=(("kvpool-protocol", "1"),), timeout=CALL_S)
        return list(reply.instances)

    def asked_tokens(self) -> float:
        """Prompt tokens of all requests that were answered."""
        with urllib.request.urlopen(f"{self.gateway}/metrics", timeout=CALL_S) as reply:
            lines = reply.read().decode().splitlines()
        name = "kvpool_gateway_prompt_tokens_total{"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def computed_tokens(self) -> float:
        """Prompt tokens that servers had neither themselves nor from the pool."""
        return sum(
            server.metric("vllm:prompt_tokens_by_source_total", source="local_compute") for server in self.servers
        )

    def prediction_error(self) -> float:
        """Median over the servers of |predicted - measured| / measured, of each one's last 64 first tokens."""
        errors = [e.median for i in self.instances() for e in i.prediction_errors if e.kind == "ttft" and e.count]
        return statistics.median(errors) if errors else float("nan")


@contextmanager
def role(log: Path, *arguments: str) -> Iterator[None]:
    """A process of kvpool."""
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "kvpool.cli.main", *arguments], stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


@contextmanager
def fleet(args: argparse.Namespace, folder: Path) -> Iterator[Fleet]:
    scheduler, gateway = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        stack.enter_context(role(folder / "scheduler.log", "scheduler", "--listen", scheduler))
        node = stack.enter_context(NodeProcess(POOL_BYTES, "--scheduler", scheduler))
        connector = {
            "kv_connector": "KVPoolConnector", "kv_connector_module_path": "engines.vllm.connector",
            "kv_role": "kv_both", "kv_connector_extra_config": {"node": node.address},
        }  # fmt: skip
        servers, flags = [], []
        for number, kind in enumerate(["prefill"] * args.prefill + ["decode"] * args.decode + ["both"] * args.both):
            events, replay = free_port(), free_port()
            published = {
                "enable_kv_cache_events": True, "publisher": "zmq",
                "endpoint": f"tcp://*:{events}", "replay_endpoint": f"tcp://*:{replay}",
            }  # fmt: skip
            server = Server(
                args.vllm_python, folder / "model", connector=connector, tokens_max=4096, tokenizer=True,
                arguments=["--kv-events-config", json.dumps(published)],
            )  # fmt: skip
            servers.append(stack.enter_context(server))
            at = "tcp://127.0.0.1"
            facts = f"id={kind}-{number},role={kind},node={node.address},events={at}:{events},replay={at}:{replay}"
            flags += ["--server", f"http://127.0.0.1:{server.port},{facts}"]
        for server in servers:
            server.wait()
        stack.enter_context(role(folder / "agent.log", "engine-agent", "--scheduler", scheduler, *flags))
        stack.enter_context(role(folder / "gateway.log", "gateway", "--scheduler", scheduler, "--listen", gateway))
        made = Fleet(f"http://{gateway}", scheduler, servers)
        _wait_until_joined(made, folder)
        yield made


def _wait_until_joined(made: Fleet, folder: Path) -> None:
    end_s = time.monotonic() + JOIN_S
    while True:
        try:
            with urllib.request.urlopen(f"{made.gateway}/v1/models", timeout=CALL_S) as reply:
                listed = json.load(reply)["data"]
            if listed and sum(one.state == "alive" for one in made.instances()) == len(made.servers):
                return
        except (OSError, grpc.RpcError):
            pass
        if time.monotonic() > end_s:
            logs = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in folder.glob("*.log"))
            raise RuntimeError(f"the servers did not join:\n{logs}")
        time.sleep(0.5)


# ---------------------------------------------------------------- runs


@dataclass
class Runs:
    """What one policy has shown, a figure a run."""

    p50_ms: list[float]
    p95_ms: list[float]
    requests_per_s: list[float]
    computed: list[float]
    prediction_error: list[float]
    requests: int = 0
    errors: int = 0

    @classmethod
    def none(cls) -> Runs:
        return cls([], [], [], [], [])

    def add(self, result: dict[str, Any], computed: float, prediction_error: float) -> None:
        ttft_ms = sorted(1e3 * ttft for ttft in result["ttfts"] if ttft)  # 0: there was no first token
        self.requests += len(result["ttfts"])
        self.errors += result["failed"]
        self.p50_ms.append(quantile(ttft_ms, 0.5))
        self.p95_ms.append(quantile(ttft_ms, 0.95))
        self.requests_per_s.append(result["request_throughput"])
        self.computed.append(computed)
        self.prediction_error.append(prediction_error)


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def rows(policy: str, runs: Runs, base: Runs | None, base_name: str) -> list[Row]:
    """A figure each; the ratio is the median over rounds of the ratio to the base's run in that round."""

    def of(name: str, values: list[float], against: list[float] | None, unit: str, less_is_better: bool = True) -> Row:
        ratio = None
        if against:
            pairs = zip(values, against, strict=True)
            ratio = statistics.median(b / a if less_is_better else a / b for a, b in pairs)
        limit = base_name if against else ""
        return Row(
            f"{policy}: {name}", unit, statistics.median(values), min(values), max(values), len(values), limit, ratio
        )

    return [
        of("TTFT p50", runs.p50_ms, base and base.p50_ms, "ms"),
        of("TTFT p95", runs.p95_ms, base and base.p95_ms, "ms"),
        of("requests", runs.requests_per_s, base and base.requests_per_s, "a second", less_is_better=False),
        of("prompt tokens computed", [100 * share for share in runs.computed], None, "%"),
        of("TTFT as predicted, median error", [100 * share for share in runs.prediction_error], None, "%"),
        Row.figure(f"{policy}: errors of {runs.requests} requests", runs.errors, "requests"),
    ]


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.set_defaults(quiet_s=5.0)
    parser.add_argument("--vllm-python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), help="vLLM's interpreter")
    parser.add_argument("--prefill", type=int, default=0, help="servers that prefill only")
    parser.add_argument("--decode", type=int, default=0, help="servers that decode only")
    parser.add_argument("--both", type=int, default=0, help="servers that do both")
    parser.add_argument(
        "--policies", default="round_robin,kvpool", help="the first is what the others are compared with"
    )
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--clients", type=int, default=4, help="requests under way at a time")
    args = parser.parse_args()
    if not args.prefill + args.decode + args.both:
        args.both = 4
    policies = args.policies.split(",")
    report = Report("vLLM servers behind the gateway", args.json)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(args.vllm_python, folder / "model", vocabulary=2048)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / file, folder / "model" / file)
        with fleet(args, folder) as made:
            measured = measure(args, made, folder, policies)
    asked = f"{args.conversations} conversations of {args.turns} turns, {args.clients} at a time"
    servers = ", ".join(f"{n} {kind}" for kind in ("prefill", "decode", "both") if (n := getattr(args, kind)))
    base = measured[policies[0]]
    table = [row for p in policies for row in rows(p, measured[p], None if p == policies[0] else base, policies[0])]
    report.add(f"{asked}; servers: {servers}", table)
    report.save()


def measure(args: argparse.Namespace, made: Fleet, folder: Path, policies: list[str]) -> dict[str, Runs]:
    measured = {policy: Runs.none() for policy in policies}
    for number in range(args.rounds + 1):  # the first one warms up: kernels, and what the scheduler learns
        for place, policy in enumerate(policies):
            wait_until_quiet(args.quiet_s)
            computed, asked = made.computed_tokens(), made.asked_tokens()
            result = load(args, folder, made.gateway, policy, 100 * number + place)
            if number:
                share = (made.computed_tokens() - computed) / max(1.0, made.asked_tokens() - asked)
                measured[policy].add(result, share, made.prediction_error())
    return measured


if __name__ == "__main__":
    main()
