"""Placements per second with 64 instances: the core alone, the core behind its journal, and over gRPC; and how the time
of one grows with instances and blocks (`--growth`), the least of several runs, with the machine's load beside it.

Beside them, in the same run, what bounds each: an event that decides nothing for the core, and a health check (the
smallest unary call that the same server answers) for gRPC.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from kvpool.core.ids import Fidelity, Role, Tier  # noqa: E402
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec  # noqa: E402
from scheduler.core import events  # noqa: E402
from scheduler.core.commands import Placed  # noqa: E402
from scheduler.core.config import SchedulerConfig  # noqa: E402
from scheduler.core.core import SchedulerCore  # noqa: E402
from scheduler.service.collecting import Collector  # noqa: E402
from scheduler.service.journal import Journal  # noqa: E402
from scheduler.service.shell import Shell  # noqa: E402

INSTANCES, NODES = 64, 8
BLOCK_TOKENS = 64
PROMPT_BLOCKS = 64  # 4096 tokens
SYSTEM_BLOCKS = 16  # that all conversations share
CONVERSATIONS = 512
ACTIVE = 256  # placements under way
#: The time of a decision is measured, so none is put off.
DECIDE_NOW = SchedulerConfig(late_binding=())
#: Instances and blocks whose placements are compared.
GROWTH = ((10, 100_000), (100, 100_000), (1000, 10_000), (1000, 100_000), (1000, 1_000_000))
GROWTH_RUNS = 3
POLICIES = ("kvpool", "mooncake_algorithm1", "sticky", "round_robin")
NAMESPACE = NamespaceSpec(
    model="bench",
    revision="1",
    dtype="bfloat16",
    backend="bench",
    layout="lkthd",
    hash="xxh3_128/1",
    groups=(GroupSpec(0, GroupKind.FULL, (0, 1, 2, 3), BLOCK_TOKENS, 1, 4, 2 << 20, 8, 128),),
)


class Workload:
    """A cluster with warm caches and an endless row of requests, all drawn from one seed."""

    def __init__(
        self, seed: int, instances: int = INSTANCES, nodes: int = NODES, conversations: int = CONVERSATIONS
    ) -> None:
        self.rng = random.Random(seed)
        self.instances, self.nodes, self.conversations = instances, nodes, conversations
        drawn = np.random.default_rng(seed)
        self.system = drawn.bytes(16 * SYSTEM_BLOCKS)
        own_bytes = 16 * (PROMPT_BLOCKS - SYSTEM_BLOCKS)
        self.prompts = [self.system + drawn.bytes(own_bytes) for _ in range(conversations)]

    def cluster(self) -> Iterator[events.Event]:
        """Members and what they hold. Streams: nodes, HBM sources, instances, then one gateway."""
        stream = 0
        for n in range(self.nodes):
            stream += 1
            yield events.SourceAttached(stream, f"node-{n}", 1, Tier.DRAM, f"10.0.0.{n}:1", f"host-{n}", "", 1 << 40)
            held = self.system + b"".join(p[len(self.system) :] for p in self.prompts[n :: self.nodes])
            yield events.SnapshotReceived(stream, 0, 0, True, held, Fidelity.EXACT)
        for i in range(self.instances):
            stream += 1
            host = f"host-{i % self.nodes}"
            yield events.SourceAttached(stream, f"w{i:04}-hbm", 1, Tier.HBM, "", host, f"w{i:04}", 1 << 37)
            held = self.system + b"".join(p[len(self.system) :] for p in self.prompts[i :: self.instances])
            yield events.SnapshotReceived(stream, 0, 0, True, held, Fidelity.EXACT)
        for i in range(self.instances):
            stream += 1
            yield events.InstanceJoined(stream, self.info(i))
            yield self.report(stream)
        self.gateway = stream + 1
        yield events.GatewayOpened(self.gateway, "gw")

    def info(self, i: int) -> events.InstanceInfo:
        return events.InstanceInfo(
            instance_id=f"w{i:04}",
            epoch=1,
            role=Role.PREFILL if i % 4 == 0 else Role.DECODE,
            model="bench",
            namespace=NAMESPACE,
            context_tokens_max=131_072,
            kv_tokens_total=1 << 20,
            batch_max=256,
            address=f"10.0.1.{i}:1",
            host_id=f"host-{i % self.nodes}",
            hbm_source_id=f"w{i:04}-hbm",
            node_source_id=f"node-{i % self.nodes}",
            node_address=f"10.0.0.{i % self.nodes}:1",
        )

    def report(self, stream: int) -> events.InstanceReported:
        new = self.rng.randrange(64, 4096)
        batch = self.rng.randrange(1, 32)
        return events.InstanceReported(
            stream=stream,
            running=batch,
            waiting=0,
            kv_tokens_free=1 << 20,
            prefill=(events.PrefillSample(new, 0, 5_000 + 40 * new),),
            decode=(events.DecodeSample(batch, batch * 3000, 9_000 + 100 * batch),),
            links=(events.LinkSample(f"node-{self.rng.randrange(self.nodes)}", 1 << 24, 3_000, False, 1),),
            finished_prefills=(),
            draining=False,
        )

    def request(self, number: int, policy: str) -> events.PlaceRequested:
        conversation = self.rng.randrange(self.conversations)
        return events.PlaceRequested(
            request_id=f"r{number}",
            gateway_id="gw",
            model="bench",
            keys=(events.KeyBatch(0, 0, self.prompts[conversation]),),
            prompt_tokens=PROMPT_BLOCKS * BLOCK_TOKENS + 100,
            max_tokens=512,
            ttft_slo_us=0,
            tpot_slo_us=0,
            policy=policy,
            use_pool=True,
            sticky_key=f"c{conversation}",
            exclude_instances=(),
            fidelity_min=Fidelity.EXACT,
        )

    def outcome(self, number: int) -> events.OutcomeReported:
        times = events.RequestTimes()
        return events.OutcomeReported(
            self.gateway, f"r{number}", False, 100_000, 1_000_000, 300, "stop", "", times, times
        )


class StepClock:
    """Time that passes by a fixed step an event: what is measured does not depend on how fast it runs."""

    def __init__(self) -> None:
        self.us = 0

    def __call__(self) -> int:
        self.us += 20
        return self.us


def summary(seconds: list[float], wall_s: float) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "per_s": len(seconds) / wall_s,
        "p50_us": statistics.median(ordered) * 1e6,
        "p99_us": ordered[int(len(ordered) * 0.99)] * 1e6,
    }


def measure_core(policy: str, count: int, journal: Journal | None = None) -> dict[str, float]:
    """Times each placement; outcomes keep the number under way, and are left out of the times."""
    workload = Workload(1)
    shell = Shell(SchedulerCore(DECIDE_NOW), journal, clock_us=StepClock())
    if journal is not None:
        journal.begin(shell.core)
    for event in workload.cluster():
        shell.submit(event)
    times: list[float] = []
    for number in range(count + ACTIVE):
        request = workload.request(number, policy)
        began = time.perf_counter()
        commands = shell.submit(request)
        took = time.perf_counter() - began
        assert isinstance(commands[-1], Placed), commands
        if number >= ACTIVE:
            times.append(took)
            shell.submit(workload.outcome(number - ACTIVE))
    if journal is not None:
        journal.close()
    return summary(times, sum(times))


def measure_growth(instances: int, blocks: int, count: int) -> dict[str, float]:
    """Decisions of kvpool's policy among so many instances and blocks; the least figures of several runs.

    Beside the time that passed, the CPU time of the thread: what it takes on a machine that does other things too.
    """
    runs = []
    for seed in range(GROWTH_RUNS):
        conversations = max(blocks // (PROMPT_BLOCKS - SYSTEM_BLOCKS), 1)
        workload = Workload(seed, instances, max(instances // 8, 1), conversations)
        core, now_us, times, cpu_times = SchedulerCore(DECIDE_NOW), 0, [], []
        for event in workload.cluster():
            now_us += 20
            core.handle(event, now_us)
        active = min(4 * instances, 1500)
        collector = Collector(lambda: 0)  # as the scheduler's process has one
        collector.begin()
        for number in range(count + active):
            now_us += 250
            event = workload.request(number, "kvpool")
            began, cpu_began = time.perf_counter(), time.thread_time()
            commands = core.handle(event, now_us)
            took, cpu_took = time.perf_counter() - began, time.thread_time() - cpu_began
            assert isinstance(commands[-1], Placed), commands
            core.book.finish_prefill(("gw", f"r{number - 40}"), now_us)
            if number >= active:
                times.append(took)
                cpu_times.append(cpu_took)
                core.handle(workload.outcome(number - active), now_us)
            collector.look()
        collector.end()
        cpu = summary(cpu_times, sum(cpu_times))
        runs.append({**summary(times, sum(times)), "cpu_p50_us": cpu["p50_us"], "cpu_p99_us": cpu["p99_us"]})
    return {name: (max if name == "per_s" else min)(run[name] for run in runs) for name in runs[0]}


def measure_nothing(count: int) -> dict[str, float]:
    """An event that decides nothing, through the same entrance."""
    shell = Shell(SchedulerCore(DECIDE_NOW), clock_us=StepClock())
    times = []
    for _ in range(count):
        began = time.perf_counter()
        shell.submit(events.TimePassed())
        times.append(time.perf_counter() - began)
    return summary(times, sum(times))


# ---------------------------------------------------------------- over gRPC


async def serve() -> None:
    """A scheduler with the same cluster, its members never silent; prints its address, runs until killed."""
    from scheduler.service.server import SchedulerServer, SchedulerServerConfig

    hour_us = 3_600_000_000
    core = SchedulerConfig(suspect_us=hour_us, gone_us=2 * hour_us, late_binding=())
    server = SchedulerServer(SchedulerServerConfig(listen="127.0.0.1:0", core=core))
    await server.startup()
    for event in Workload(1).cluster():
        server.shell.submit(event)
    print(server.address, flush=True)
    await server.main_loop()


async def load(call: Callable[[int], Any], count: int, concurrency: int) -> dict[str, float]:
    numbers = iter(range(count))
    times: list[float] = []

    async def caller() -> None:
        for number in numbers:
            began = time.perf_counter()
            await call(number)
            times.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return summary(times, time.perf_counter() - began)


async def measure_grpc(address: str, count: int) -> dict[str, dict[str, float]]:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from kvpool.service import rpc
    from kvpool.v1 import scheduler_pb2, scheduler_pb2_grpc

    workload = Workload(1)
    list(workload.cluster())
    channel = rpc.make_aio_channel(address)
    stub, health = scheduler_pb2_grpc.SchedulerStub(channel), health_pb2_grpc.HealthStub(channel)

    async def check(number: int) -> None:
        await health.Check(health_pb2.HealthCheckRequest())

    async def place(number: int) -> None:
        # A few ids that come again and again: each replaces its last placement, so the cluster never fills up.
        event = workload.request(number % ACTIVE, "kvpool")
        request = scheduler_pb2.PlaceRequest(
            request_id=event.request_id,
            gateway_id="gw",
            model="bench",
            prompt_tokens=event.prompt_tokens,
            max_tokens=event.max_tokens,
            use_pool=True,
        )
        request.keys.add(keys=event.keys[0].keys)
        reply = await stub.Place(request)
        assert reply.HasField("placement"), reply

    results = {}
    await load(place, 50, 4)
    for concurrency in (1, 16):
        results[f"health check, {concurrency} at once"] = await load(check, count, concurrency)
        results[f"place, {concurrency} at once"] = await load(place, count, concurrency)
    await channel.close()
    return results


def over_grpc(count: int) -> dict[str, dict[str, float]]:
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            return asyncio.run(measure_grpc(address, count))
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="placements a row")
    parser.add_argument("--growth", action="store_true", help="how a placement's time grows, and nothing else")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    if options.growth:
        grown = {
            f"{instances} instances, {blocks} blocks": measure_growth(instances, blocks, options.count)
            for instances, blocks in GROWTH
        }
        show(grown, options.json, f"prompts of {PROMPT_BLOCKS} blocks, hashing excluded, least of {GROWTH_RUNS} runs")
        return
    rows: dict[str, dict[str, float]] = {"core: an event that decides nothing": measure_nothing(options.count)}
    for policy in POLICIES:
        rows[f"core: {policy}"] = measure_core(policy, options.count)
    with tempfile.TemporaryDirectory() as folder:
        rows["core and journal: kvpool"] = measure_core("kvpool", options.count, Journal(Path(folder), 1 << 28))
    rows |= {f"gRPC: {name}": row for name, row in over_grpc(options.count).items()}
    what = f"{INSTANCES} instances, {NODES} nodes, prompts of {PROMPT_BLOCKS} blocks, {ACTIVE} placements under way"
    show(rows, options.json, what)


def show(rows: dict[str, dict[str, float]], as_json: bool, what: str) -> None:
    load = os.getloadavg()
    if as_json:
        print(json.dumps({"what": what, "load": load, "cores": os.cpu_count(), "rows": rows}, indent=2))
        return
    print(f"{what}; load {load[0]:.1f} on {os.cpu_count()} cores")
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"{'':40} " + " ".join(f"{column:>10}" for column in columns))
    for name, row in rows.items():
        print(f"{name:40} " + " ".join(f"{row[column]:10.0f}" for column in columns))


if __name__ == "__main__":
    main()
