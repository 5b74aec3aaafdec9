"""`kvctl plan`, `kvctl role`: what the running scheduler would change, and why; and an operator's own changes."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
import time
from enum import StrEnum
from typing import Annotated, Any

import grpc
import typer

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.cluster import Cluster
from kvpool.cli.kvctl.options import ANYBODY, DEFAULT_SCHEDULER, Access, Json, Scheduler
from kvpool.service import rpc


class WorkerRole(StrEnum):
    """What a worker can be told to do."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


Follow = Annotated[bool, typer.Option("--follow", "-f", help="Print each new plan until Ctrl-C; --json: one a line.")]


def plan(
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    access: Access = ANYBODY,
    follow: Follow = False,
    interval: Annotated[float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between looks.")] = 5.0,
    json: Json = False,
) -> None:
    """Proposals to change roles or the number of instances, with reasons, and how busy each phase is."""
    with output.reported_errors(scheduler, "scheduler"):
        cluster = Cluster(scheduler, access)
        found = cluster.plan()
    if not follow:
        _show(found, json)
        return
    with contextlib.suppress(KeyboardInterrupt):
        _follow(cluster, found, interval, json)


def role(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="Id of a worker that runs with --role-changeable.")],
    wanted: Annotated[WorkerRole, typer.Argument(metavar="ROLE", help="prefill, decode or both.")],
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    access: Access = ANYBODY,
    timeout: Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait until it has taken it.")] = 15.0,
    json: Json = False,
) -> None:
    """Give a worker another role: it finishes what it has, and gets new requests by the new role."""
    with output.reported_errors(scheduler, "scheduler"):
        cluster = Cluster(scheduler, access)
        cluster.set_role(worker, wanted.value)
        taken = _wait_taken(cluster, worker, wanted.value, timeout)
    if taken is None:
        output.fail(f"{worker} has not taken role {wanted.value} within {timeout:g} s", hint="see its log")
    if json:
        output.print_json({"worker": worker, "role": wanted.value, "drains": taken})
        return
    rest = f"; {taken} requests of its old one are being finished" if taken else ""
    print(f"{worker} has role {wanted.value}{rest}")


def _wait_taken(cluster: Cluster, worker: str, role: str, timeout_s: float) -> int | None:
    """Requests that it still finishes, once a worker has a role; None if it does not have it in time."""
    end_s = time.monotonic() + timeout_s
    while True:
        for instance in cluster.instances():
            if instance["info"]["instance_id"] == worker and instance["info"]["role"] == role:
                return int(instance["role_drains"])
        if time.monotonic() >= end_s:
            return None
        time.sleep(0.05)


def _follow(cluster: Cluster, found: dict[str, Any], interval_s: float, json: bool) -> None:
    """Prints a plan whenever its proposals differ from the last one's; a scheduler that is away is waited for."""
    shown: list[tuple[str, ...]] | None = None
    away = False
    while True:
        if _gist(found) != shown:
            shown = _gist(found)
            if json:
                jsonlib.dump(found, sys.stdout)
                print(flush=True)
            else:
                _show(found, json)
        time.sleep(interval_s)
        try:
            found, away = cluster.plan(), False
        except grpc.RpcError as error:
            if not away:
                print(f"{rpc.from_rpc_error(error, cluster.address)}; waiting for it", file=sys.stderr, flush=True)
            away = True


def _gist(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    proposals = [(p["model"], p["kind"], p["instance_id"], p["role"], p["blocked"]) for p in plan["proposals"]]
    return sorted([*proposals, *((c["model"], c["state"], c["instance_id"], c["role"]) for c in plan["changes"])])


def _show(plan: dict[str, Any], json: bool) -> None:
    if json:
        output.print_json(plan)
        return
    proposals = [
        (p["model"], _wish(p), p["why"], f"{p['age_ms'] / 1000:.0f} s", _executed(p)) for p in plan["proposals"]
    ]
    if proposals:
        tables.table("proposals", ("model", "change", "why", "stands for:", "carried out"), proposals)
    elif not plan["changes"]:
        tables.facts("plan", {"proposals": "none: nothing to change"})
    changes = [
        (c["model"], c["instance_id"], f"{c['was']} -> {c['role']}", c["state"], c["drains"],
         f"{c['age_ms'] / 1000:.0f} s", c["why"])
        for c in plan["changes"]
    ]  # fmt: skip
    if changes:
        tables.table(
            "roles being changed", ("model", "worker", "role", "state", "to finish:", "since:", "why"), changes
        )
    loads = [
        (load["model"], load["prefill_instances"], f"{100 * load['prefill_utilisation']:.0f}",
         load["decode_instances"], f"{100 * load['decode_utilisation']:.0f}", load["waiting"])
        for load in plan["loads"]
    ]  # fmt: skip
    columns = ("model", "prefill:", "busy %:", "decode:", "busy %:", "waiting requests:")
    tables.table("load of each phase (instances of both roles count in both)", columns, loads)


def _executed(proposal: dict[str, Any]) -> str:
    """Whether the scheduler does it by itself."""
    if proposal["kind"] != "flip":
        return "no: instances are started and stopped by you"
    return "at once" if proposal["executable"] else f"no: {proposal['blocked']}"


def _wish(proposal: dict[str, Any]) -> str:
    """A proposal as a sentence would have it."""
    role, instance = proposal["role"], proposal["instance_id"]
    if proposal["kind"] == "flip":
        return f"{instance} should {'do both' if role == 'both' else role}"
    if proposal["kind"] == "add":
        return f"one more instance to {role}"
    if proposal["kind"] == "remove":
        return f"{instance} can go ({role})"
    return f"{proposal['kind']} {instance} {role}"
