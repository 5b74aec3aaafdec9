"""A scheduler that hangs: its connections stay open, and whoever has one goes on with the next scheduler."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvpool.cli.processes import Supervisor
from kvpool.core.ids import Fidelity, Tier
from kvpool.service import announcer as announcing
from kvpool.service.announcer import Announcer, SourceFacts
from kvpool.v1 import directory_pb2, engine_pb2, scheduler_pb2
from scheduler.gateway import scheduler_line
from scheduler.gateway.metrics import Metrics
from scheduler.gateway.placement import SchedulerClient
from tests.pool.node_process import stand_still
from tests.scheduler_log.schedulers_made import eventually

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]
#: They say something every second.
SILENT_S = 4.0


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path) as supervisor:
        for name in ("s0", "s1"):
            supervisor.start(name, ["scheduler", "--listen", "127.0.0.1:0", "--id", name])
        for process in supervisor.processes.values():
            process.wait_ready(120)
        yield supervisor
        os.kill(supervisor.processes["s0"].pid, signal.SIGCONT)


def test_a_hanging_scheduler_is_left(two: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.torch import reports

    for module in (scheduler_line, announcing, reports):
        monkeypatch.setattr(module, "SILENT_S", SILENT_S)
    heard: list[bool] = []
    receive = announcing._Line.receive

    def noted(line: announcing._Line, message: directory_pb2.DirectoryMessage) -> None:
        receive(line, message)
        heard.append(line._beats)

    monkeypatch.setattr(announcing._Line, "receive", noted)
    addresses = ",".join(str(p.facts["address"]) for p in two.processes.values())
    keys = np.arange(160, dtype=np.uint8).reshape(10, 16)

    async def test() -> None:
        client = SchedulerClient(addresses, "gw", Metrics())
        client.start()
        announcer = Announcer(
            addresses,
            SourceFacts("node-0", 1, Tier.DRAM),
            snapshot=lambda: ([(keys, Fidelity.EXACT)], announcer.last_number),
        )
        announcer.start()
        reached: list[str] = []
        link = reports.SchedulerLink(
            addresses,
            # Not a valid one: it is turned away, and tries the next, and so on.
            info=lambda: reached.append("asked") or engine_pb2.EngineInfo(),  # type: ignore[func-returns-value]
            report=scheduler_pb2.InstanceReport,
        )
        link.start()
        try:
            await eventually(lambda: announcer.attached, "the source is attached")
            await eventually(lambda: all(line.connected for line in client._lines), "the gateway is connected")
            # Each has said more than its greeting: whoever does so is expected to go on.
            await eventually(lambda: all(line._speaks for line in client._lines), "they speak")
            await eventually(lambda: any(heard), "it speaks to the source")
            await asyncio.to_thread(stand_still, two.processes["s0"].popen)
            reply = await client.place(scheduler_pb2.PlaceRequest(request_id="r", gateway_id="gw", model="m"), 60)
            assert reply.HasField("refusal")
            assert not client._lines[0].connected
            await eventually(lambda: client._lines[1].connected, "the gateway has the other one")
            second = two.processes["s1"].facts["address"]
            await eventually(
                lambda: announcer.attached and announcer._schedulers.address == second, "the source is at the other one"
            )
            count = len(reached)
            await eventually(lambda: len(reached) > count, "the worker has not stopped trying")
        finally:
            await client.close()
            await asyncio.to_thread(announcer.close)
            await asyncio.to_thread(link.close)

    asyncio.run(asyncio.wait_for(test(), 200))
