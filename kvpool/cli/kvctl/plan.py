"""`kvctl plan`: what the running scheduler would change, roles of instances and their number, and why."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
import time
from typing import Annotated, Any

import grpc
import typer

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.cluster import Cluster
from kvpool.cli.kvctl.options import ANYBODY, DEFAULT_SCHEDULER, Access, Json, Scheduler
from kvpool.service import rpc

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
    return sorted((p["model"], p["kind"], p["instance_id"], p["role"]) for p in plan["proposals"])


def _show(plan: dict[str, Any], json: bool) -> None:
    if json:
        output.print_json(plan)
        return
    proposals = [
        (p["model"], _wish(p), p["why"], f"{p['age_ms'] / 1000:.0f} s", "yes" if p["executable"] else "no")
        for p in plan["proposals"]
    ]
    if proposals:
        tables.table("proposals", ("model", "change", "why", "stands for:", "executable"), proposals)
    else:
        tables.facts("plan", {"proposals": "none: nothing to change"})
    loads = [
        (load["model"], load["prefill_instances"], f"{100 * load['prefill_utilisation']:.0f}",
         load["decode_instances"], f"{100 * load['decode_utilisation']:.0f}", load["waiting"])
        for load in plan["loads"]
    ]  # fmt: skip
    columns = ("model", "prefill:", "busy %:", "decode:", "busy %:", "waiting requests:")
    tables.table("load of each phase (instances of both roles count in both)", columns, loads)


def _wish(proposal: dict[str, Any]) -> str:
    """A proposal as a sentence would have it."""
    role, instance = proposal["role"], proposal["instance_id"]
    if proposal["kind"] == "flip":
        return f"{instance} should {role}"
    if proposal["kind"] == "add":
        return f"one more instance to {role}"
    if proposal["kind"] == "remove":
        return f"{instance} can go ({role})"
    return f"{proposal['kind']} {instance} {role}"
