"""`kvctl links`, `quota`, `namespaces`: what nodes measured, are told, and know."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.cluster import chosen_nodes
from kvpool.cli.kvctl.options import (
    ANYBODY,
    DEFAULT_SCHEDULER,
    Access,
    Json,
    Namespace,
    Objects,
    OneNode,
    Scheduler,
    parse_namespace,
)
from kvpool.v1 import source_admin_pb2 as pb


def links(
    scheduler: Scheduler = DEFAULT_SCHEDULER, node: OneNode = "", access: Access = ANYBODY, json: Json = False
) -> None:
    """Data channels between clients and nodes, as measured: state, latency, bandwidth, errors."""
    found: list[dict[str, Any]] = []
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                found += [link_data(link) for link in one.admin.ListLinks(pb.ListLinksRequest()).links]
    found.sort(key=lambda link: (link["from"], link["to"], not link["active"], link["kind"]))
    if json:
        output.print_json({"links": found})
        return
    rows = [
        (
            link["from"], link["to"], link["kind"] + (" *" if link["active"] else ""), link["state"],
            "-" if link["latency_us"] is None else f"{link['latency_us']:.0f} µs",
            "-" if link["bytes_per_s"] is None else f"{link['bytes_per_s'] / 1e9:.2f} GB/s", link["transfers"],
            output.size(link["bytes"]), link["errors"],
            "-" if link["age_ms"] is None else f"{link['age_ms'] / 1000:.0f} s",
        )
        for link in found
    ]  # fmt: skip
    columns = ("from", "to", "channel (* in use)", "state", "latency:", "bandwidth:", "transfers:", "bytes:", "errors:",
               "last sample:")  # fmt: skip
    tables.table("links", columns, rows)


def link_data(link: pb.LinkInfo) -> dict[str, Any]:
    """A link as plain data; what was never measured is None."""
    data = output.to_dict(link)
    for name in ("latency_us", "bytes_per_s"):
        data[name] = data[name] or None
    if not (link.transfers or link.errors or link.latency_us):
        data["age_ms"] = None
    return data


def quota(
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    node: OneNode = "",
    access: Access = ANYBODY,
    json: Json = False,
    namespace: Namespace = "",
    objects: Objects = "",
    tenant: Annotated[str, typer.Option("--tenant", help="Of this tenant.")] = "",
    size: Annotated[str, typer.Option("--max", help="Set it: bytes of memory on each node, e.g. 4GiB; 0 = none.")] = "",
) -> None:
    """Shows the quotas of namespaces and tenants, or sets one with --max."""
    namespace_id = parse_namespace(namespace, objects)
    if size and bool(namespace_id) == bool(tenant):
        output.fail("a quota is of a namespace, a domain or a tenant: name one", code=output.EXIT_USAGE)
    bytes_max = 0 if size in ("", "0") else output.parse_size(size)
    found: list[dict[str, Any]] = []
    unknown: list[str] = []
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                if size and namespace_id and not one.knows(namespace_id):
                    unknown.append(one.source_id)
                elif size:
                    request = pb.Quota(namespace_id=namespace_id, tenant=tenant, bytes_max=bytes_max)
                    one.admin.SetQuota(request)
                quotas = one.admin.ListQuotas(pb.ListQuotasRequest()).quotas
            found += [
                {"node": one.source_id, **output.to_dict(q)}
                for q in quotas
                if namespace_id in (b"", q.namespace_id) and tenant in ("", q.tenant)
            ]
    if json:
        output.print_json({"quotas": found})
    rows = [
        (q["node"], q["tenant"] or q["namespace_id"], output.size(q["bytes_used"]), output.size(q["bytes_max"]))
        for q in found
    ]
    if not json:
        tables.table("quotas", ("node", "tenant or namespace", "used:", "at most:"), rows)
    if unknown:
        output.fail(
            f"no quota was set on {', '.join(unknown)}: nothing of it was ever put there",
            hint="set it again once there is; `kvctl namespaces` shows who knows what",
        )


def namespaces(
    scheduler: Scheduler = DEFAULT_SCHEDULER, node: OneNode = "", access: Access = ANYBODY, json: Json = False
) -> None:
    """Namespaces that the nodes know, and what they hold of each."""
    found: list[dict[str, Any]] = []
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                found += [{"node": one.source_id, **output.to_dict(info)} for info in one.namespaces()]
    if json:
        output.print_json({"namespaces": found})
        return
    rows = []
    for info in found:
        spec = info["spec"]
        if spec["layout"] == "objects":
            what, cut = f"objects of {spec['model']}", "-"
        else:
            what = f"{spec['model']} {spec['dtype']} {spec['backend']}".strip()
            cut = ", ".join(f"{g['block_tokens']} tokens in {output.size(g['block_bytes'])}" for g in spec["groups"])
        rows.append((info["node"], info["namespace_id"], what, cut, info["blocks"], output.size(info["bytes"])))
    tables.table("namespaces", ("node", "namespace", "what", "block", "blocks:", "bytes:"), rows)
