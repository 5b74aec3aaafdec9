"""Gateway throughput and added latency, beside a raw byte proxy in front of the same tokens in the same run.

Three processes besides this one: `backend` (a scheduler and an engine that answer at once, over gRPC; and the same
tokens as ready-made HTTP), the gateway, and `proxy` (asyncio, copies bytes, understands nothing). This process is the
client of both. CPU time is read from /proc, so "tokens a CPU second" is what one core of a gateway carries.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "bench"
PROMPT_TOKENS = 512
_TICKS = os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- backend


def sse_token() -> bytes:
    """One chunk as the gateway writes it, to be sent by the raw upstream."""
    choice = {"index": 0, "text": " token", "finish_reason": None, "logprobs": None}
    body = {"id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 0, "model": MODEL, "choices": [choice]}
    line = f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()
    return f"{len(line):x}\r\n".encode() + line + b"\r\n"


async def serve_raw(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """HTTP without a parser: one request a connection, its token count in the path."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
        tokens = json.loads(await reader.readexactly(length))["max_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = sse_token()
        for _ in range(tokens):
            writer.write(chunk)
            await writer.drain()
            # One token of each stream in turn, as an engine's steps give them.
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
    finally:
        writer.close()


async def run_backend(model_folder: str) -> None:
    """Scheduler, engine and raw upstream; prints their addresses, then serves until it is killed."""
    from kvpool.service import rpc
    from kvpool.v1 import common_pb2, engine_pb2, engine_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

    class InstantEngine(engine_pb2_grpc.EngineServicer):
        """Each step gives every running request one token; steps follow each other as fast as they are taken."""

        async def Connect(self, commands: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            running: dict[str, int] = {}
            work = asyncio.Event()

            async def read() -> None:
                async for command in commands:
                    if command.HasField("submit"):
                        running[command.submit.request_id] = command.submit.sampling.max_tokens
                        work.set()
                    elif command.HasField("abort"):
                        running.pop(command.abort.request_id, None)

            reader = asyncio.create_task(read())
            try:
                while True:
                    await work.wait()
                    events = []
                    for request_id, left in list(running.items()):
                        finish = engine_pb2.FINISH_REASON_LENGTH if left == 1 else 0
                        events.append(
                            engine_pb2.RequestEvent(request_id=request_id, token_ids=[300 + left], finish_reason=finish)
                        )
                        running[request_id] = left - 1
                        if left == 1:
                            del running[request_id]
                    if not running:
                        work.clear()
                    yield engine_pb2.EngineEvents(events=events)
            finally:
                reader.cancel()

    class InstantScheduler(scheduler_pb2_grpc.SchedulerServicer):
        target = scheduler_pb2.Target(instance_id="instant", epoch=1)

        async def Place(self, request: Any, context: Any) -> Any:
            placement = scheduler_pb2.Placement(prefill=self.target, decode=self.target, ttl_ms=10_000)
            return scheduler_pb2.PlaceReply(placement=placement)

        async def ListModels(self, request: Any, context: Any) -> Any:
            group = common_pb2.GroupSpec(
                kind=common_pb2.GROUP_KIND_FULL, layers=[0], block_tokens=64, shard_count=1, section_count=1,
                block_bytes=1024, kv_heads=1, head_dim=2,
            )  # fmt: skip
            namespace = common_pb2.NamespaceSpec(
                model=MODEL, revision="1", dtype="float32", backend="bench", layout="lkthd", hash="xxh3_128/1",
                groups=[group],
            )  # fmt: skip
            model = scheduler_pb2.ModelInfo(
                model=MODEL, namespace=namespace, tokenizer=model_folder, context_tokens_max=1 << 17, instances=1
            )
            return scheduler_pb2.ListModelsReply(models=[model])

        async def OpenGateway(self, messages: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            yield scheduler_pb2.SchedulerMessage(report_interval_ms=500, scheduler_id="instant")
            async for _ in messages:
                pass

    def register(server: Any) -> list[str]:
        engine_pb2_grpc.add_EngineServicer_to_server(InstantEngine(), server)
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(InstantScheduler(), server)
        return ["kvpool.v1.Engine", "kvpool.v1.Scheduler"]

    server, port = await rpc.serve("127.0.0.1:0", register)
    InstantScheduler.target.address = f"127.0.0.1:{port}"
    raw = await asyncio.start_server(serve_raw, "127.0.0.1", 0)
    say({"grpc": port, "http": raw.sockets[0].getsockname()[1]})
    await server.wait_for_termination()


# ---------------------------------------------------------------- proxy


async def run_proxy(upstream_port: int) -> None:
    """Copies bytes between clients and the upstream."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", upstream_port)
        await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    say({"http": server.sockets[0].getsockname()[1]})
    await server.serve_forever()


def say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


def run_role(role: str, argument: str) -> None:
    import uvloop

    if role == "backend":
        uvloop.run(run_backend(argument))
    elif role == "proxy":
        uvloop.run(run_proxy(int(argument)))
    else:
        from scheduler.gateway.server import GatewayConfig, run_gateway

        config = GatewayConfig(scheduler=argument, listen="127.0.0.1:0", models_refresh_s=3600.0)
        run_gateway(config, on_ready=lambda facts: say({"http": int(facts["address"].rpartition(":")[2])}))


# ---------------------------------------------------------------- client


class Child:
    """A role in a process of its own."""

    def __init__(self, role: str, argument: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--role", role, "--argument", argument],
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the {role} process did not start")
        self.facts: dict[str, int] = json.loads(line)

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)


async def ask(port: int, tokens: int) -> tuple[float, int]:
    """Reads one stream to its end. Returns: seconds to its first token, and events that the tokens came in."""
    prompt = [(7 * i) % 1000 + 100 for i in range(PROMPT_TOKENS)]
    body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": tokens, "stream": True}).encode()
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n")
    writer.write(b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    seen = await reader.readuntil(b"data: ")
    ttft_s = time.perf_counter() - begin
    rest = await reader.read(-1)
    assert rest.endswith(b"0\r\n\r\n"), "the stream broke off"
    writer.close()
    return ttft_s, (seen + rest).count(b'"finish_reason"')


async def measure_stream(port: int, child: Child, streams: int, tokens: int) -> dict[str, float]:
    cpu, begin = child.cpu_s(), time.perf_counter()
    events = sum(count for _, count in await asyncio.gather(*(ask(port, tokens) for _ in range(streams))))
    wall, cpu = time.perf_counter() - begin, child.cpu_s() - cpu
    total = streams * tokens
    return {
        "tokens_per_s": total / wall,
        "tokens_per_cpu_s": total / max(cpu, 1 / _TICKS),
        # A gateway that is behind puts several tokens in one event.
        "tokens_per_event": total / events,
    }


async def measure_ttft(port: int, requests: int) -> float:
    """Median milliseconds to the first token, one request at a time."""
    return statistics.median([(await ask(port, 2))[0] for _ in range(requests)]) * 1000


async def measure(options: argparse.Namespace, ports: dict[str, int], children: dict[str, Child]) -> dict[str, Any]:
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
    for name, port in ports.items():
        await measure_stream(port, children[name], 4, 16)
    # Interleaved: what disturbs the machine disturbs both.
    for _ in range(options.rounds):
        for name, port in ports.items():
            result = await measure_stream(port, children[name], options.streams, options.tokens)
            result["ttft_ms"] = await measure_ttft(port, options.ttft_requests)
            rounds[name].append(result)
    medians = {n: {k: statistics.median([r[k] for r in rs]) for k in rs[0]} for n, rs in rounds.items()}
    gateway, proxy = medians["gateway"], medians["proxy"]
    return {
        "streams": options.streams,
        "tokens": options.tokens,
        "rounds": options.rounds,
        **medians,
        "added_ttft_ms": gateway["ttft_ms"] - proxy["ttft_ms"],
        "throughput_ratio": gateway["tokens_per_cpu_s"] / proxy["tokens_per_cpu_s"],
    }


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['streams']} streams of {report['tokens']} tokens, median of {report['rounds']} rounds")
    print(f"{'':<10}{'tokens/s':>12}{'tokens/CPU s':>15}{'tokens/event':>14}{'TTFT p50 ms':>14}")
    for name in ("gateway", "proxy"):
        row = report[name]
        print(
            f"{name:<10}{row['tokens_per_s']:>12.0f}{row['tokens_per_cpu_s']:>15.0f}{row['tokens_per_event']:>14.2f}{row['ttft_ms']:>14.2f}"
        )
    print(
        f"added TTFT {report['added_ttft_ms']:.2f} ms; {report['throughput_ratio']:.2f} of the proxy's tokens per core"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPOSITORY / "tests/models/tiny-llama"), help="folder of the tokenizer")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--ttft-requests", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--role", choices=("backend", "proxy", "gateway"), help=argparse.SUPPRESS)
    parser.add_argument("--argument", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        sys.path.insert(0, str(REPOSITORY))
        run_role(options.role, options.argument)
        return
    started: list[Child] = []

    def start(role: str, argument: str) -> Child:
        started.append(Child(role, argument))
        return started[-1]

    try:
        report = run_all(options, start)
    finally:
        for child in reversed(started):
            child.stop()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)


def run_all(options: argparse.Namespace, start: Callable[[str, str], Child]) -> dict[str, Any]:
    backend = start("backend", options.model)
    children = {
        "gateway": start("gateway", f"127.0.0.1:{backend.facts['grpc']}"),
        "proxy": start("proxy", str(backend.facts["http"])),
    }
    ports = {name: child.facts["http"] for name, child in children.items()}
    return asyncio.run(measure(options, ports, children))


if __name__ == "__main__":
    main()
