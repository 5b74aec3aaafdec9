"""`kvctl advise --live` against a scheduler that instances have told what they cost."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from scheduler_clients import PATIENT, connected, report
from typer.testing import CliRunner

from kvpool.cli.kvctl import app
from kvpool.v1 import scheduler_pb2
from scheduler.service.server import SchedulerServer, SchedulerServerConfig


def samples() -> scheduler_pb2.InstanceMessage:
    """Prefill takes 2000 us and 90 a token, a decode step 7000 and 0.02 a token in the cache."""
    prefill = [
        scheduler_pb2.PrefillSample(new_tokens=n, cached_tokens=0, duration_us=2000 + 90 * n) for n in (50, 800, 3000)
    ]
    decode = [scheduler_pb2.DecodeSample(batch=b, kv_tokens=2000 * b, duration_us=7000 + 40 * b) for b in (1, 8, 16)]
    return report(prefill=prefill * 4, decode=decode * 4)


def test_the_running_cluster_is_what_is_judged(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    line = '{{"arrival_us":{},"prompt_tokens":2000,"output_tokens":50,"hash_ids":[{}]}}\n'
    requests = [line.format(n * 500_000, ",".join(str(4 * n + k) for k in range(4))) for n in range(200)]
    path.write_text('{"kvpool_trace":1,"block_tokens":512}\n' + "".join(requests), encoding="utf-8")
    runner = CliRunner()

    async def body() -> None:
        server = SchedulerServer(SchedulerServerConfig(listen="127.0.0.1:0", core=PATIENT))
        await server.startup()
        try:
            command = ["advise", "--trace", str(path), "--live", "--scheduler", server.address, "--json"]
            empty = await asyncio.to_thread(runner.invoke, app, command)
            assert empty.exit_code == 1
            assert "no instance is alive" in empty.stderr
            async with connected(server.address) as client:
                lines = [await client.join(f"w{n}", gpu="T4", tp=2, price_per_hour=3.0) for n in range(3)]
                for one in lines:
                    await one.say(samples())
                # Until the reports have been taken in; the time limit of the whole bounds it.
                while any(i.prefill_per_token_us < 80 for i in await client.instances()):
                    pass
                done = await asyncio.to_thread(runner.invoke, app, command)
                for one in lines:
                    await one.finish()
            assert done.exit_code == 0, done.output
            data = json.loads(done.output)
            chosen = data["chosen"]
            assert (chosen["gpus"], chosen["price_per_hour"]) == (6, pytest.approx(9.0))
            assert chosen["roles"]["both"]["hardware"] == "this cluster"
            assert chosen["roles"]["both"]["gpu"] == "T4"
            # 2 requests a second, 182 ms each, over three instances.
            assert chosen["prefill_busy"] == pytest.approx(2 * 0.182 / 3, rel=0.3)
        finally:
            await server.shutdown()

    asyncio.run(asyncio.wait_for(body(), 110))
