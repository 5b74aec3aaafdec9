"""`kvctl status`, `nodes`, `workers`: who is there, and how they are."""

from __future__ import annotations

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.cluster import Cluster
from kvpool.cli.kvctl.options import DEFAULT_SCHEDULER, Credential, Json, Scheduler


def status(scheduler: Scheduler = DEFAULT_SCHEDULER, credential: Credential = "", json: Json = False) -> None:
    """The cluster at a glance: who is there, what is cached, what is held."""
    with output.reported_errors(scheduler, "scheduler"):
        cluster = Cluster(scheduler, credential)
        data = cluster.status() | {"held": cluster.held()}
    if json:
        output.print_json(data)
        return
    held = ", ".join(f"{v} {k}" for k, v in data["held"].items())
    tables.facts(
        f"cluster at {scheduler}",
        {
            "scheduler": f"{data['scheduler_id']}, kvpool {data['version']}, up {data['uptime_ms'] / 1000:.0f} s",
            "instances": f"{data['instances_alive']} alive, {data['instances_suspect']} suspect",
            "sources": f"{data['sources_alive']} alive, {data['sources_suspect']} suspect",
            "gateways": data["gateways"],
            "cached": f"{data['directory_blocks']} blocks in {data['directory_replicas']} copies",
            "requests": f"{data['placements']} placed ({data['splits']} split), {data['refusals']} refused, "
            f"{data['active_requests']} active",
            "KV reserved": f"{data['kv_tokens_reserved']} tokens",
            "held on nodes": held,
            "journal": f"{data['journal']} ({output.size(data['journal_bytes'])})" if data["journal"] else "off",
        },
    )


def nodes(scheduler: Scheduler = DEFAULT_SCHEDULER, credential: Credential = "", json: Json = False) -> None:
    """Sources that blocks can be read from, and what they hold."""
    with output.reported_errors(scheduler, "scheduler"):
        found = Cluster(scheduler, credential).nodes()
    if json:
        output.print_json({"nodes": found})
        return
    rows = []
    for node in found:
        source, stats = node["source"], node.get("stats", {})
        used = f"{output.size(stats['bytes_used'])} of {output.size(stats['bytes_total'])}" if stats else node["error"]
        held = "/".join(str(stats.get(n, "?")) for n in ("leases", "pins", "reservations", "quarantined"))
        rows.append((source["source_id"], source["tier"], source["address"], node["state"], node["blocks"], used, held,
                     f"{node['heartbeat_age_ms']} ms"))  # fmt: skip
    columns = (
        "node",
        "tier",
        "address",
        "state",
        "blocks:",
        "used",
        "leases/pins/reservations/quarantined",
        "last heard:",
    )
    tables.table("nodes", columns, rows)


def workers(scheduler: Scheduler = DEFAULT_SCHEDULER, credential: Credential = "", json: Json = False) -> None:
    """Engine instances: role, load, KV capacity, and what the scheduler believes of their speed."""
    with output.reported_errors(scheduler, "scheduler"):
        found = Cluster(scheduler, credential).instances()
    if json:
        output.print_json({"workers": found})
        return
    rows = []
    for worker in found:
        info = worker["info"]
        rows.append((
            info["instance_id"], info["role"], info["model"], info["address"], worker["state"],
            f"{worker['running']}+{worker['waiting']}",
            f"{worker['kv_tokens_free']}/{info['kv_tokens_total']}", worker["kv_tokens_reserved"], worker["hbm_blocks"],
            output.milliseconds(worker["queue_us"]), f"{worker['prefill_per_token_us']:.0f} µs",
        ))  # fmt: skip
    columns = ("worker", "role", "model", "address", "state", "running+waiting:", "KV free:", "reserved:",
               "cached blocks:", "queue:", "prefill a token:")  # fmt: skip
    tables.table("workers", columns, rows)
