"""`kvctl status`, `nodes`, `workers`: who is there, and how they are."""

from __future__ import annotations

from collections import Counter
from typing import Any

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.cluster import HELD, Cluster, held_on
from kvpool.cli.kvctl.options import ANYBODY, DEFAULT_SCHEDULER, Access, Json, Scheduler


def status(scheduler: Scheduler = DEFAULT_SCHEDULER, access: Access = ANYBODY, json: Json = False) -> None:
    """The cluster at a glance: who is there, what is cached, what is held."""
    with output.reported_errors(scheduler, "scheduler"):
        cluster = Cluster(scheduler, access)
        nodes = cluster.nodes()
        data = cluster.status() | {"held": held_on(nodes), "ssd": _ssd(nodes)}
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
            f"{data['active_requests']} active, {data['waiting_requests']} waiting for a place",
            "KV reserved": f"{data['kv_tokens_reserved']} tokens",
            "held on nodes": held,
            **({"SSD": _ssd_line(data["ssd"])} if data["ssd"]["states"] else {}),
            **({"event log": _event_log_line(data["event_log"])} if data.get("event_log") else {}),
            "journal": f"{data['journal']} ({output.size(data['journal_bytes'])})" if data["journal"] else "off",
        },
    )


def _ssd(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """States of the nodes' SSDs, by how many, and blocks that memory gave up before an SSD had them."""
    # A node with an SSD is two sources at one address.
    found = {n["source"]["address"]: n["stats"]["ssd"] for n in nodes if "ssd" in n.get("stats", {})}
    states = Counter(ssd["state"] for ssd in found.values())
    return {
        "states": dict(sorted(states.items())),
        "evictions_unsaved": sum(ssd["evictions_unsaved"] for ssd in found.values()),
    }


def _ssd_line(ssd: dict[str, Any]) -> str:
    states = ", ".join(f"{count} {state}" for state, count in ssd["states"].items())
    return f"{states}; {ssd['evictions_unsaved']} blocks evicted before they were saved"


def _event_log_line(log: dict[str, Any]) -> str:
    """The log that several schedulers share, and who the others are."""
    state = "up" if log["up"] else f"down for {log['changed_age_ms'] / 1000:.0f} s ({log['error']})"
    peers = ", ".join(f"{p['scheduler_id']} {p['state']}" for p in log["peers"]) or "none"
    return f"{state} at {log['url']}; other schedulers: {peers}"


def nodes(scheduler: Scheduler = DEFAULT_SCHEDULER, access: Access = ANYBODY, json: Json = False) -> None:
    """Sources that blocks can be read from, and what they hold."""
    with output.reported_errors(scheduler, "scheduler"):
        found = Cluster(scheduler, access).nodes()
    if json:
        output.print_json({"nodes": found})
        return
    rows = []
    for node in found:
        source = node["source"]
        tier = source["tier"]
        rows.append((source["source_id"], tier, source["address"], node["state"], node["blocks"], *_room(tier, node),
                     f"{node['heartbeat_age_ms']} ms", _note(tier, node)))  # fmt: skip
    columns = ("node", "tier", "address", "state", "blocks:", "used", "held", "last heard:", "note")
    tables.table("nodes", columns, rows)


def _room(tier: str, node: dict[str, Any]) -> tuple[str, str]:
    """(bytes used, what is held) of one source: a node answers for its memory and for its SSD at once."""
    stats = node.get("stats")
    if stats is None:
        return "?", "?"
    if tier == "ssd":
        ssd = stats.get("ssd")
        # Holds are on memory: what is read from an SSD is brought up first.
        return (f"{output.size(ssd['bytes_live'])} of {output.size(ssd['bytes_total'])}" if ssd else "?"), "-"
    held = ", ".join(f"{stats[n]} {n}" for n in HELD if stats[n]) or "-"
    return f"{output.size(stats['bytes_used'])} of {output.size(stats['bytes_total'])}", held


def _note(tier: str, node: dict[str, Any]) -> str:
    """What stands out about a source."""
    stats = node.get("stats")
    if stats is None:
        return str(node["error"])
    notes = []
    ssd = stats.get("ssd")
    if tier == "ssd" and ssd:
        notes += [] if ssd["state"] == "ok" else [f"{ssd['state']}: {ssd['reason']}".rstrip(": ")]
        notes += [f"{ssd[n]} {what}" for n, what in (("io_errors", "I/O errors"), ("digest_errors", "bad digests"))
                  if ssd[n]]  # fmt: skip
        if ssd["evictions_unsaved"]:
            notes.append(f"{ssd['evictions_unsaved']} blocks evicted before they were saved here")
    elif tier == "dram":
        notes += ["draining"] if stats["draining"] else []
        notes += [f"{stats['digest_errors']} bad digests"] if stats["digest_errors"] else []
        if ssd and not ssd["bytes_total"]:  # it never opened: no source of its own says so
            notes.append(f"no SSD: {ssd['reason']}")
    return ", ".join(notes) or "-"


def _role(worker: dict[str, Any]) -> str:
    """The role, what it was told to be instead, and what it still finishes of another one."""
    ordered, drains = worker["role_ordered"], worker["role_drains"]
    role = str(worker["info"]["role"])
    role += f" -> {ordered}" if ordered != "unspecified" else ""
    return f"{role} (finishes {drains})" if drains else role


def workers(scheduler: Scheduler = DEFAULT_SCHEDULER, access: Access = ANYBODY, json: Json = False) -> None:
    """Engine instances: role, load, KV capacity, and what the scheduler believes of their speed."""
    with output.reported_errors(scheduler, "scheduler"):
        found = Cluster(scheduler, access).instances()
    if json:
        output.print_json({"workers": found})
        return
    rows = []
    for worker in found:
        info = worker["info"]
        rows.append((
            info["instance_id"], _role(worker), info["model"], info["address"], worker["state"],
            f"{worker['running']}+{worker['waiting']}",
            f"{worker['kv_tokens_free']}/{info['kv_tokens_total']}", worker["kv_tokens_reserved"], worker["hbm_blocks"],
            output.milliseconds(worker["queue_us"]), f"{worker['prefill_per_token_us']:.0f} µs",
        ))  # fmt: skip
    columns = ("worker", "role", "model", "address", "state", "running+waiting:", "KV free:", "reserved:",
               "cached blocks:", "queue:", "prefill a token:")  # fmt: skip
    tables.table("workers", columns, rows)
