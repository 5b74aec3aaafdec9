"""Changes of roles over real gRPC: orders on life lines, what operators see, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from scheduler_clients import PATIENT, Client, LifeLine, connected, report
from typer.testing import CliRunner, Result

from kvpool.cli.kvctl import app
from kvpool.core.errors import BadArgument, KvpoolError, Unsupported
from kvpool.core.ids import Role
from kvpool.service import rpc
from kvpool.v1 import engine_pb2, scheduler_pb2
from scheduler.core import role_changes, roles
from scheduler.replay import exact
from scheduler.replay.reading import open_journal
from scheduler.service.journal import files
from scheduler.service.server import SchedulerServer, SchedulerServerConfig

P, D = engine_pb2.ROLE_PREFILL, engine_pb2.ROLE_DECODE


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order is not given up before a slow machine has shown it."""
    monkeypatch.setattr(role_changes, "ANSWER_US_MAX", PATIENT.suspect_us)


def run(body: Callable[[SchedulerServer, Client], Awaitable[None]], **config: object) -> None:
    async def main() -> None:
        settings = {"listen": "127.0.0.1:0", "core": PATIENT, **config}
        server = SchedulerServer(SchedulerServerConfig(**settings))  # type: ignore[arg-type]
        await server.startup()
        try:
            async with connected(server.address) as client:
                await body(server, client)
        finally:
            await server.shutdown()

    asyncio.run(main())


async def set_role(client: Client, instance_id: str, role: int) -> KvpoolError | None:
    try:
        await client.scheduler.SetRole(scheduler_pb2.SetRoleRequest(instance_id=instance_id, role=role))  # type: ignore[arg-type]
    except grpc.RpcError as error:
        return rpc.from_rpc_error(error)
    return None


async def kvctl(server: SchedulerServer, *words: str) -> Result:
    command, *rest = words
    return await asyncio.to_thread(CliRunner().invoke, app, [command, "-s", server.address, *rest])


async def three(client: Client) -> dict[str, LifeLine]:
    """Two that prefill and one that decodes; all but w1 may be changed."""
    return {
        name: await client.join(name, role=role, role_changeable=name != "w1")
        for name, role in (("w0", P), ("w1", P), ("w2", D))
    }


async def plan(client: Client) -> scheduler_pb2.Plan:
    return await client.scheduler.GetPlan(scheduler_pb2.GetPlanRequest())


def test_an_order_is_heard_taken_and_shown(tmp_path: Path) -> None:
    async def body(server: SchedulerServer, client: Client) -> None:
        lines = await three(client)
        assert await set_role(client, "w0", D) is None
        heard = await lines["w0"].hear()
        assert heard.role == D and heard.report_interval_ms > 0
        (change,) = (await plan(client)).changes
        assert (change.instance_id, change.was, change.role, change.state) == ("w0", P, D, "told")
        assert (await client.instances())[0].role_ordered == D
        shown = await kvctl(server, "workers")
        assert "prefill -> decode" in shown.stdout and "prefill -> decode" in (await kvctl(server, "plan")).stdout
        await lines["w0"].say(report(role=D))
        while (first := (await client.instances())[0]).info.role != D:
            pass
        assert not first.role_ordered and not (await plan(client)).changes
        text = server.metrics.text().decode()
        assert 'kvpool_scheduler_role_changes_total{how="done"} 1.0' in text
        assert 'kvpool_scheduler_roles{model="tiny",role="decode"} 2.0' in text
        assert "kvpool_scheduler_role_changes_under_way 0.0" in text
        server.shell.core.check_invariants()

    run(body, journal_dir=str(tmp_path))
    (path,) = files(tmp_path)
    assert '"$":"RoleOrdered"' in path.read_text() and '"$":"ChangeRole"' in path.read_text()
    assert exact.replay(open_journal(path)).identical


def test_orders_that_can_not_be_carried_out_say_why() -> None:
    async def body(server: SchedulerServer, client: Client) -> None:
        await three(client)
        for name, role, kind, word in (
            ("w9", D, BadArgument, "no instance"),
            ("w0", 7, BadArgument, "role 7"),
            ("w0", 0, BadArgument, "role 0"),
            ("w0", P, Unsupported, "has that role"),
            ("w1", D, Unsupported, "does not say"),
            ("w2", P, Unsupported, "no other instance decodes"),
        ):
            error = await set_role(client, name, role)
            assert isinstance(error, kind) and word in str(error), (name, role, error)
        shown = await kvctl(server, "role", "w2", "prefill")
        assert shown.exit_code == 1 and "no other instance decodes" in shown.stderr

    run(body)


def test_an_operator_gives_a_role_and_waits() -> None:
    async def body(server: SchedulerServer, client: Client) -> None:
        lines = await three(client)
        asked = asyncio.create_task(kvctl(server, "role", "w0", "both", "--json", "--timeout", "60"))
        heard = await lines["w0"].hear()
        await lines["w0"].say(report(role=heard.role))
        shown = await asked
        assert json.loads(shown.stdout) == {"worker": "w0", "role": "both", "drains": 0}
        late = await kvctl(server, "role", "w2", "both", "--timeout", "0")
        assert late.exit_code == 1 and "has not taken role both" in late.stderr

    run(body)


def test_a_plan_is_carried_out_and_told() -> None:
    """The core's books are filled in: what a load makes of them is tested without gRPC."""

    async def body(server: SchedulerServer, client: Client) -> None:
        lines = await three(client)
        book = server.shell.core.roles
        book.proposals["tiny"] = roles.Proposal("tiny", "flip", Role.DECODE, "w1", "busy", 0)
        (proposal,) = (await plan(client)).proposals
        assert not proposal.executable and "does not say" in proposal.blocked
        assert "does not say" in (await kvctl(server, "plan")).stdout
        book.proposals["tiny"] = roles.Proposal("tiny", "flip", Role.DECODE, "w0", "busy", 0)
        assert (await plan(client)).proposals[0].executable
        book.looked_us = -roles.LOOK_US
        book.loads["tiny"] = roles.PhaseLoad(0.2, 0.99, 2, 1, 9, ("flip", 2), 9)
        book.proposals.clear()
        book.loads["tiny"].streak = 9
        await lines["w2"].say(report(role=D, kv_tokens_free=0))
        assert (await lines["w0"].hear()).role == D

    run(body)


@pytest.mark.parametrize("stays", [True, False])
def test_a_scheduler_that_only_proposes(stays: bool) -> None:
    async def body(server: SchedulerServer, client: Client) -> None:
        await three(client)
        book = server.shell.core.roles
        book.proposals["tiny"] = roles.Proposal("tiny", "flip", Role.DECODE, "w0", "busy", 0)
        (proposal,) = (await plan(client)).proposals
        assert proposal.executable is not stays
        assert ("does not execute" in proposal.blocked) is stays

    run(body, core=replace(PATIENT, execute_roles=not stays))
