"""The scheduler as a process of its own: it says where it listens, stops cleanly, and leaves a whole journal."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scheduler_clients import SCHEDULER_PROCESS, connected

from scheduler.replay.exact import replay_file


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_on_a_signal_with_open_life_lines(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", SCHEDULER_PROCESS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        facts = json.loads(process.stdout.readline())

        async def use() -> None:
            async with connected(facts["address"]) as client:
                await client.attach(blocks="a0..a3")
                await client.join()
                assert (await client.place("r1", "a0..a3")).HasField("placement")
                process.send_signal(number)
                await asyncio.to_thread(process.wait, 60)

        asyncio.run(use())
        assert process.returncode == 0, process.stderr.read()
        assert process.stderr.read() == ""
    replay = replay_file(facts["journal"])
    assert replay.identical and not replay.torn and len(replay.decisions) == 1


@pytest.mark.processes
def test_a_killed_process_leaves_a_journal_that_replays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCHEDULER_PROCESS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())

        async def use() -> None:
            async with connected(facts["address"]) as client:
                await client.join()
                for n in range(200):
                    await client.place(f"r{n}", policy="sticky", sticky_key=str(n), max_tokens=1, prompt_tokens=1)
                process.kill()
                await asyncio.to_thread(process.wait, 60)

        asyncio.run(use())
    assert replay_file(facts["journal"]).identical
