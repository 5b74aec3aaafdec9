"""`kvctl replay` and `kvctl plan` on what a real scheduler process did and does."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from scheduler_clients import PATIENT, SCHEDULER_PROCESS, connected, report
from typer.testing import CliRunner

from kvpool.cli.kvctl import app
from kvpool.v1 import engine_pb2, scheduler_pb2

runner = CliRunner()


@pytest.mark.processes
def test_the_journal_of_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCHEDULER_PROCESS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        try:
            asyncio.run(_use(address))
        except BaseException:
            process.kill()
            raise
        plan = runner.invoke(app, ["plan", "--scheduler", address, "--json"])
        shown = runner.invoke(app, ["plan", "--scheduler", address])
        process.terminate()
        assert process.wait(60) == 0
    assert plan.exit_code == 0, plan.output
    assert {"proposals", "loads"} <= json.loads(plan.stdout).keys()
    # Of how many, if any: on a slow machine this may have taken so long that one instance less would do.
    assert shown.exit_code == 0 and "proposals" in shown.stdout and "load of each phase" in shown.stdout

    exact = runner.invoke(app, ["replay", str(tmp_path), "--json"])
    assert exact.exit_code == 0, exact.output
    (file,) = json.loads(exact.stdout)["files"]
    assert file["identical"] and file["decisions"] == 42 and not file["torn"]

    same = json.loads(runner.invoke(app, ["replay", str(tmp_path), "--policy", "kvpool", "--json"]).stdout)
    assert same["requests"] == 42 and same["changed"] == 0
    other = runner.invoke(app, ["replay", str(tmp_path), "--policy", "round_robin", "--json"])
    assert other.exit_code == 0, other.output
    data = json.loads(other.stdout)
    assert data["requests"] == 42 and data["changed"] > 0
    then, now = data["then"], data["now"]
    impossible = {"context_too_long": 1, "unknown_model": 1}
    assert then["placed"] == 40 and then["refused_by_reason"] == impossible
    # Slower answers keep their instances longer: how many still wait or are refused in the end is a matter of the pace.
    assert impossible.items() <= now["refused_by_reason"].items() and now["placed"] >= 20
    assert now["placed"] + now["refused"] + now["unanswered"] == 42


async def _use(address: str) -> None:
    """Forty requests over three instances, two of which hold what they ask for, and two that can't be served."""
    async with connected(address) as client:
        await client.attach(blocks="a0..a31")
        for number in range(3):
            line = await client.join(f"w{number}")
            samples = [scheduler_pb2.PrefillSample(new_tokens=n, duration_us=2000 + 90 * n) for n in (50, 800, 3000)]
            await line.say(report(prefill=samples))
        gateway = await client.gateway()
        for number in range(40):
            reply = await client.place(f"r{number}", "a0..a31" if number % 2 else f"b{number}..b{number + 9}")
            assert reply.HasField("placement"), reply
            if number % 3:
                outcome = scheduler_pb2.Outcome(
                    request_id=f"r{number}", ttft_us=90_000, duration_us=200_000, tokens=20, finish_reason="stop"
                )
                await gateway.say(scheduler_pb2.GatewayMessage(outcome=outcome))
        assert (await client.place("far", prompt_tokens=10_000_000)).HasField("refusal")
        assert (await client.place("odd", model="nobody's")).HasField("refusal")


def test_proposals_are_told_with_their_reasons() -> None:
    """A server whose core has just made a proposal, asked over gRPC."""
    from scheduler.core import roles
    from scheduler.service.server import SchedulerServer, SchedulerServerConfig

    async def body() -> list[str]:
        server = SchedulerServer(SchedulerServerConfig(listen="127.0.0.1:0", core=PATIENT))
        await server.startup()
        try:
            async with connected(server.address) as client:
                await client.join("w0", role=engine_pb2.ROLE_PREFILL)
                await client.join("w1", role=engine_pb2.ROLE_DECODE)
                book = server.shell.core.roles
                book.loads["tiny"] = roles.PhaseLoad(0.95, 0.2, 1, 1, 9)
                for name, kind, instance in (("tiny", "flip", "w1"), ("other", "add", "")):
                    role = roles.Role.PREFILL
                    book.proposals[name] = roles.Proposal(name, kind, role, instance, f"busy: {kind}", 0)
                out = []
                for more in ([], ["--json"]):
                    done = await asyncio.to_thread(runner.invoke, app, ["plan", "-s", server.address, *more])
                    assert done.exit_code == 0, done.output
                    out.append(done.stdout)
                return out
        finally:
            await server.shutdown()

    text, data = asyncio.run(body())
    assert "w1 should prefill" in text and "one more instance to prefill" in text and "busy: flip" in text
    assert "95" in text
    kinds = {p["kind"]: p for p in json.loads(data)["proposals"]}
    assert kinds["flip"]["role"] == "prefill" and kinds["flip"]["instance_id"] == "w1"


def test_a_plan_is_followed_until_it_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan a change, not one a look; a scheduler that goes away is told once and waited for."""
    import time as clock

    import grpc

    from kvpool.cli.kvctl import plan

    calm = {"proposals": [], "loads": [], "changes": []}
    wish = {"model": "m", "kind": "add", "instance_id": "", "role": "decode", "why": "busy", "age_ms": 5,
            "executable": False, "blocked": ""}  # fmt: skip

    class Lost(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "gone"

        def trailing_metadata(self) -> tuple[()]:
            return ()

    answers = iter([calm, calm, Lost(), Lost(), {**calm, "proposals": [wish]}, {**calm, "proposals": [wish]}])

    def answer(_: object) -> dict[str, object]:
        found = next(answers, None)
        if found is None:
            raise KeyboardInterrupt
        if isinstance(found, Lost):
            raise found
        return found

    monkeypatch.setattr(plan.Cluster, "plan", answer)
    monkeypatch.setattr(clock, "sleep", lambda _: None)
    done = runner.invoke(app, ["plan", "--follow", "--json", "--scheduler", "127.0.0.1:1"])
    assert done.exit_code == 0, done.output
    plans = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(p["proposals"]) for p in plans] == [0, 1]
    assert done.stderr.count("waiting for it") == 1


def test_a_plan_without_a_scheduler() -> None:
    done = runner.invoke(app, ["plan", "--scheduler", "127.0.0.1:1"])
    assert done.exit_code == 3 and "no scheduler answers" in done.stderr
