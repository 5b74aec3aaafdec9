"""Time to the first token of vLLM with and without the pool, beside what vLLM has of others; and what the pool costs.

    python tools/bench/vllm_ttft.py --vllm-python .venv-vllm/bin/python [--json FILE] [--mooncake DIR] [--nixl DIR]

The model is made here, with random weights: small enough for a CPU, with 16 KiB of cache a token (a model of 8 B
parameters with grouped heads has 128), so that a prompt of 8192 tokens moves 128 MiB. Each server computes with one
thread; only one is asked at a time, and the rounds of all cases are interleaved. NIXL's servers are stopped (SIGSTOP)
while ours hand over, since their threads look for work without a pause.

cold: a prompt that nobody has seen. warm: vLLM's own cache was emptied, all full blocks come from the store (checked).
hand-off: from the answer of the server that computed the prompt to the first token of the one that goes on.
CPU: processor seconds of all processes of the server, for prompts without anything in common, 64 tokens generated each;
and with those of the node.

--mooncake, --nixl: folders made by `pip install --target` (mooncake-transfer-engine-non-cuda; nixl and nixl_cu12, both
with --no-deps).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness import Case, Report, Row, arguments, measure
from node import NodeProcess
from vllm_server import Answer, Server, cpu_s_of, free_port, make_model

ROOT = Path(__file__).resolve().parents[2]
BLOCK_TOKENS = 128
#: How long the machine is left alone before a hand-off.
ALONE_S = 2.0
#: Prompts of the workload without reuse, and tokens of each.
CPU_PROMPTS, CPU_TOKENS, CPU_GENERATED = 4, 1024, 64
POOL_BYTES = 2 << 30
#: vLLM's count of tokens that a connector brought.
LOADED = "vllm:external_prefix_cache_hits_total"


@dataclass
class Prompts:
    """A new prompt a round, the same for all cases of the round."""

    tokens: int
    draw: random.Random
    current: list[int] = field(default_factory=list)

    def new(self) -> None:
        # One more than whole blocks, so that all of these can be had and one token is left to compute.
        self.current = [self.draw.randrange(10, 4000) for _ in range(self.tokens + 1)]


class Checked:
    """Servers that answer the same prompt must answer the same token."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, ...], str] = {}

    def seconds(self, prompt: list[int], answer: Answer, cached: bool) -> float:
        wanted = len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS if cached else 0
        assert answer.cached_tokens == wanted, f"{answer.cached_tokens} tokens from the cache, not {wanted}"
        told = self._told.setdefault(tuple(prompt), answer.tokens)
        assert told == answer.tokens, f"token {answer.tokens}, not {told}"
        return answer.first_s


# ---------------------------------------------------------------- servers


def kvpool(node: NodeProcess, **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "KVPoolConnector", "kv_connector_module_path": "engines.vllm.connector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"node": node.address, **extra},
    }  # fmt: skip


@contextmanager
def mooncake(args: argparse.Namespace, folder: Path) -> Iterator[Server]:
    """vLLM with MooncakeStoreConnector on Mooncake's own store, as a user sets it up."""
    port, metadata = free_port(), free_port()
    config = folder / "mooncake.json"
    config.write_text(
        json.dumps(
            {
                "metadata_server": "P2PHANDSHAKE", "master_server_address": f"127.0.0.1:{port}", "protocol": "tcp",
                "device_name": "", "global_segment_size": str(POOL_BYTES), "local_buffer_size": str(256 << 20),
            }
        )
    )  # fmt: skip
    master = subprocess.Popen(
        [str(args.mooncake / "mooncake" / "mooncake_master"), f"--rpc_port={port}", f"--metrics_port={metadata}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    environment = {"MOONCAKE_CONFIG_PATH": str(config), "PYTHONPATH": f"{args.mooncake}{os.pathsep}{ROOT}"}
    connector = {
        "kv_connector": "MooncakeStoreConnector", "kv_connector_module_path": "tests.vllm_real.mooncake_on_cpu",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
    }  # fmt: skip
    try:
        with server(args, folder, connector, environment) as started:
            yield started
    finally:
        master.terminate()
        master.wait(20)


def nixl(args: argparse.Namespace, folder: Path, role: str) -> Server:
    connector = {"kv_connector": "NixlConnector", "kv_role": role, "kv_load_failure_policy": "recompute"}
    environment = {
        "PYTHONPATH": str(args.nixl), "UCX_TLS": "tcp,self,sm", "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
    }  # fmt: skip
    return server(args, folder, connector, environment)


def server(
    args: argparse.Namespace,
    folder: Path,
    connector: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
) -> Server:
    model = folder / "model"
    return Server(args.vllm_python, model, connector=connector, environment=environment, arguments=arguments)


# ---------------------------------------------------------------- cases


def first_token(server: Server, prompts: Prompts, checked: Checked, cached: bool = False) -> float:
    return checked.seconds(prompts.current, server.ask(prompts.current), cached)


def handed_over(prefill: Server, decode: Server, asks: Mapping[str, Any], prompts: Prompts, checked: Checked) -> float:
    loaded = decode.metric(LOADED)
    told = prefill.hand_over(prompts.current, asks)
    answer = decode.ask(prompts.current, kv_transfer_params=told)
    # What the answer says is cached may be what was cached at the first server.
    decode.reaches(LOADED, loaded + len(prompts.current) // BLOCK_TOKENS * BLOCK_TOKENS)
    return checked.seconds(prompts.current, Answer(answer.first_s, 0, answer.tokens, None), cached=False)


def alone(restless: Sequence[Server], asked: bool, prompts: Prompts | None) -> None:
    """Before a hand-off: servers whose threads never rest run only if it is they who are asked."""
    for one in restless:
        if asked:
            one.resume()
            one.wait()
        else:
            one.pause()
    if prompts is not None:
        prompts.new()
    time.sleep(ALONE_S)


def store_cases(prompts: Prompts, servers: Mapping[str, Server]) -> list[Case]:
    checked = Checked()
    plain = "cold, no connector"
    cases = [Case(plain, partial(first_token, servers["none"], prompts, checked), 1, "ms", prepare=prompts.new)]
    for name, one in servers.items():
        if name == "none":
            continue
        cold = partial(first_token, one, prompts, checked)
        warm = partial(first_token, one, prompts, checked, cached=True)
        rival = ("warm, Mooncake",) if name == "kvpool" and "Mooncake" in servers else (plain,)
        cases.append(Case(f"cold, {name}", cold, 1, "ms", (plain,), 0.97 if name == "kvpool" else None))
        cases.append(
            Case(f"warm, {name}", warm, 1, "ms", rival, 1.0 if name == "kvpool" else None, prepare=settled(one))
        )
    return cases


def settled(one: Server) -> Callable[[], None]:
    """Before a warm run: what was computed is stored, and not in vLLM's own cache any more."""

    def prepare() -> None:
        time.sleep(0.2)
        one.forget()

    return prepare


@dataclass
class WithoutReuse:
    """A run of the workload without reuse: what it took of the processors."""

    server: Server
    #: What runs beside the server and takes processor time for it.
    others: Sequence[int]
    draw: random.Random
    server_s: float = 0.0
    all_s: float = 0.0

    def run(self) -> float:
        """Returns: processor seconds of vLLM's processes."""
        begin_s, others_s = self.server.cpu_s(), sum(map(cpu_s_of, self.others))
        for _ in range(CPU_PROMPTS):
            self.server.ask([self.draw.randrange(10, 4000) for _ in range(CPU_TOKENS)], CPU_GENERATED)
        self.server.forget()  # stores are through
        self.server_s = self.server.cpu_s() - begin_s
        self.all_s = self.server_s + sum(map(cpu_s_of, self.others)) - others_s
        return self.server_s


def measure_stores(args: argparse.Namespace, report: Report, folder: Path, node: NodeProcess) -> None:
    draw = random.Random(1)
    with ExitStack() as stack:
        servers = {"none": server(args, folder), "kvpool": server(args, folder, kvpool(node))}
        for one in servers.values():
            stack.enter_context(one)
        if args.mooncake:
            servers["Mooncake"] = stack.enter_context(mooncake(args, folder))
        for one in servers.values():
            one.wait()
        for tokens in args.tokens:
            ours = servers["kvpool"]
            before = {name: ours.metric(f"vllm:kvpool_{name}_total") for name in ("load_us", "bytes_loaded")}
            rows = measure(store_cases(Prompts(tokens, draw), servers), args.rounds, quiet_s=args.quiet_s)
            loads = args.rounds + 1
            spent = {name: (ours.metric(f"vllm:kvpool_{name}_total") - at) / loads for name, at in before.items()}
            rows.append(Row.figure("of warm, kvpool: the step waits for blocks", spent["load_us"] / 1e3, "ms"))
            rows.append(Row.figure("bytes loaded", spent["bytes_loaded"] / (1 << 20), "MiB"))
            report.add(f"First token of a prompt of {tokens} tokens", rows)


def measure_cpu(args: argparse.Namespace, report: Report, folder: Path, node: NodeProcess) -> None:
    """Pairs of the same work: a plain server, and one with everything on that publishes its cache's events too."""
    draw = random.Random(3)
    ports = (free_port(), free_port())
    events = {
        "enable_kv_cache_events": True, "publisher": "zmq",
        "endpoint": f"tcp://*:{ports[0]}", "replay_endpoint": f"tcp://*:{ports[1]}",
    }  # fmt: skip
    with ExitStack() as stack:
        none = stack.enter_context(server(args, folder))
        ours = stack.enter_context(
            server(args, folder, kvpool(node), arguments=["--kv-events-config", json.dumps(events)])
        )
        for one in (none, ours):
            one.wait()
        base, full = WithoutReuse(none, (), draw), WithoutReuse(ours, (node.process.pid,), draw)
        plain = "vLLM, no connector"
        cases = [
            Case(plain, base.run, CPU_PROMPTS, "ms"),
            Case("vLLM, connector and events", full.run, CPU_PROMPTS, "ms", (plain,), 0.97),
            Case("the same, and the node", lambda: full.all_s, CPU_PROMPTS, "ms", (plain,), 0.95),
        ]
        rows = measure(cases, args.rounds, quiet_s=args.quiet_s)
        report.add(f"Processor time a request of {CPU_TOKENS} + {CPU_GENERATED} tokens without reuse", rows)


def measure_hand_offs(args: argparse.Namespace, report: Report, folder: Path, node: NodeProcess) -> None:
    draw = random.Random(2)
    asked: dict[str, Mapping[str, Any]] = {"kvpool": {"kvpool_handoff": True}}
    with ExitStack() as stack:
        pairs = {
            "kvpool": (server(args, folder, kvpool(node)), server(args, folder, kvpool(node, handoff_wait_s=60.0)))
        }
        if args.nixl:
            pairs["NIXL"] = (nixl(args, folder, "kv_producer"), nixl(args, folder, "kv_consumer"))
            asked["NIXL"] = {
                "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
                "remote_block_ids": None, "remote_host": None, "remote_port": None,
            }  # fmt: skip
        for pair in pairs.values():
            for one in pair:
                stack.enter_context(one)
        for pair in pairs.values():
            for one in pair:
                one.wait()
        for tokens in args.tokens:
            checked, prompts = Checked(), Prompts(tokens, draw)
            cases = []
            for name, (prefill, decode) in pairs.items():
                limits = ("hand-off, NIXL",) if name == "kvpool" and args.nixl else ()
                run = partial(handed_over, prefill, decode, asked[name], prompts, checked)
                ours = name == "kvpool"
                prepare = partial(alone, pairs.get("NIXL", ()), not ours, prompts if ours else None)
                cases.append(Case(f"hand-off, {name}", run, 1, "ms", limits, 1.0 if limits else None, prepare=prepare))
            rows = measure(cases, args.rounds, quiet_s=args.quiet_s)
            report.add(f"Hand-off of a prompt of {tokens} tokens", rows)


#: By name of `--only`.
PARTS = {"stores": measure_stores, "cpu": measure_cpu, "hand-offs": measure_hand_offs}


def main() -> None:
    parser = arguments(__doc__, rounds=10)
    # vLLM's processes go on looking for work for a second after a request, which would take from the next server.
    parser.set_defaults(quiet_s=5.0)
    parser.add_argument("--vllm-python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), help="vLLM's interpreter")
    parser.add_argument("--tokens", default="2048,8192", help="of a prompt, whole blocks of 128")
    parser.add_argument("--mooncake", type=Path, help="folder with the packages of Mooncake's store")
    parser.add_argument("--nixl", type=Path, help="folder with the packages of NIXL")
    parser.add_argument("--only", choices=PARTS, help="one of the parts")
    args = parser.parse_args()
    args.tokens = [int(word) for word in args.tokens.split(",")]
    report = Report("vLLM's first token", args.json)
    with tempfile.TemporaryDirectory() as name, NodeProcess(POOL_BYTES) as node:
        folder = Path(name)
        make_model(args.vllm_python, folder / "model")
        for part, measured in PARTS.items():
            if args.only in (None, part):
                measured(args, report, folder, node)
    report.save()


if __name__ == "__main__":
    main()
