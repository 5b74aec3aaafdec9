"""`kvctl ls`, `rm`, `evict`: blocks and objects on the nodes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.cluster import Node, chosen_nodes
from kvpool.cli.kvctl.options import (
    ANYBODY,
    DEFAULT_SCHEDULER,
    Access,
    Json,
    Names,
    Namespace,
    Objects,
    OneNode,
    Scheduler,
    parse_keys,
    parse_namespace,
)
from kvpool.core.ids import KeyArray
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import common_pb2, source_admin_pb2

Prefix = Annotated[str, typer.Option("--prefix", help="Objects whose names begin so.")]


def ls(
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    node: OneNode = "",
    access: Access = ANYBODY,
    json: Json = False,
    namespace: Namespace = "",
    objects: Objects = "",
    prefix: Prefix = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="At most this many a node.")] = 50,
) -> None:
    """Blocks and objects that lie on the nodes, one line each: in memory, then those on an SSD alone."""
    namespace_id = parse_namespace(namespace, objects)
    _check_prefix(prefix, objects)
    found: list[dict[str, Any]] = []
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                listed = one.records(limit, namespace_id=namespace_id, name_prefix=prefix)
                found += [{"node": one.source_id, **output.to_dict(block)} for block in listed]
    if json:
        output.print_json({"blocks": found})
        return
    rows = [
        (
            b["node"], b["name"] or b["key"], b["state"], output.size(b["size"]),
            tiers(b), b["fidelity"], b["leases"], b["pins"], b["tenant"] or "-",
        )
        for b in found
    ]  # fmt: skip
    columns = ("node", "key or name", "state", "size:", "tier", "fidelity", "leases:", "pins:", "tenant")
    tables.table("blocks", columns, rows)


def tiers(block: dict[str, Any]) -> str:
    """Where a listed block lies."""
    return str(block["tier"]) + (" + ssd" if block["on_ssd"] and block["tier"] != "ssd" else "")


def rm(
    names: Names = None,
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    node: OneNode = "",
    access: Access = ANYBODY,
    json: Json = False,
    namespace: Namespace = "",
    objects: Objects = "",
    prefix: Prefix = "",
    everything: Annotated[bool, typer.Option("--all", help="All of the namespace or domain.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Removes blocks or objects from every tier; what is being read goes when its last reader ends."""
    namespace_id = parse_namespace(namespace, objects)
    _check_prefix(prefix, objects)
    if sum((bool(names), bool(prefix), everything)) != 1:
        output.fail("name what to remove: keys or names, or --prefix, or --all", code=output.EXIT_USAGE)
    if everything and not namespace_id:
        output.fail("--all needs --namespace HEX or --objects DOMAIN", code=output.EXIT_USAGE)
    keys = parse_keys(names or [], objects)
    if prefix or everything:
        _confirm(f"remove all of it from {node or 'every node'}?", yes)
    removed: dict[str, int] = {}
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                request = pb.RemoveRequest(
                    namespace_id=namespace_id, keys=common_pb2.KeyList(keys=keys.tobytes()), all=everything,
                    name_prefix=prefix,
                )  # fmt: skip
                removed[one.source_id] = _remove(one, request)
    _told(removed, "removed", json)


def evict(
    names: Names = None,
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    node: OneNode = "",
    access: Access = ANYBODY,
    json: Json = False,
    namespace: Namespace = "",
    objects: Objects = "",
    size: Annotated[str, typer.Option("--bytes", help="As much as the eviction policy takes next, e.g. 1GiB.")] = "",
) -> None:
    """Takes blocks out of memory, as eviction does: those on an SSD stay there, those that are held stay."""
    namespace_id = parse_namespace(namespace, objects)
    if bool(names) == bool(size):
        output.fail("name what to evict: keys or names, or --bytes", code=output.EXIT_USAGE)
    keys = parse_keys(names or [], objects)
    result: dict[str, dict[str, int]] = {}
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                requests = (
                    [source_admin_pb2.EvictRequest(bytes=output.parse_size(size))]
                    if size
                    else [
                        source_admin_pb2.EvictRequest(namespace_id=n, keys=common_pb2.KeyList(keys=packed))
                        for n, packed in by_namespace(one, keys, namespace_id).items()
                    ]
                )
                replies = [one.admin.Evict(request) for request in requests]
            result[one.source_id] = {"blocks": sum(r.blocks for r in replies), "bytes": sum(r.bytes for r in replies)}
    if json:
        output.print_json({"evicted": result})
    else:
        rows = [(name, r["blocks"], output.size(r["bytes"])) for name, r in result.items()]
        tables.table("evicted", ("node", "blocks:", "bytes:"), rows)
    if names and not any(r["blocks"] for r in result.values()):
        output.fail("none of them is in memory, or all are held", hint="`kvctl inspect KEY` shows by whom")


def by_namespace(node: Node, keys: KeyArray, namespace_id: bytes) -> dict[bytes, bytes]:
    """Packed keys by the namespace, of those that the node knows, that they are of.

    One that is not in memory counts for the namespace given.
    """
    found: dict[bytes, bytes] = {}
    packed = keys.tobytes()
    listed = {block.key: block.namespace_id for block in node.find(packed)}
    known = {info.namespace_id for info in node.namespaces()}
    for at in range(0, len(packed), 16):
        key = packed[at : at + 16]
        of = listed.get(key, namespace_id)
        if of in known and namespace_id in (b"", of):
            found[of] = found.get(of, b"") + key
    return found


def _remove(node: Node, request: pb.RemoveRequest) -> int:
    """Without a namespace each one that the node knows is tried: keys on the SSD alone are found by theirs only."""
    known = [info.namespace_id for info in node.namespaces()]
    removed = 0
    for namespace_id in [n for n in known if request.namespace_id in (b"", n)]:
        one = pb.RemoveRequest()
        one.CopyFrom(request)
        one.namespace_id = namespace_id
        removed += node.blocks.Remove(one).blocks_removed
    return removed


def _check_prefix(prefix: str, objects: str) -> None:
    if prefix and not objects:
        output.fail("--prefix is of objects: give --objects DOMAIN too", code=output.EXIT_USAGE)


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        output.fail("nobody is there to ask", hint="give --yes", code=output.EXIT_USAGE)
    if not typer.confirm(question):
        raise typer.Exit(output.EXIT_FAILED)


def _told(counts: dict[str, int], what: str, json: bool) -> None:
    if json:
        output.print_json({what: counts})
    else:
        tables.table(what, ("node", "blocks:"), list(counts.items()))
    if not sum(counts.values()):
        output.fail(f"nothing was {what}", hint="`kvctl ls` shows what there is")
