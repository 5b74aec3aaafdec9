"""`kvctl inspect`: every copy of a block or an object, or of the blocks of a prompt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.blocks import tiers
from kvpool.cli.kvctl.cluster import Node, chosen_nodes
from kvpool.cli.kvctl.options import (
    ANYBODY,
    DEFAULT_SCHEDULER,
    Access,
    Json,
    Namespace,
    Objects,
    OneNode,
    Scheduler,
    parse_keys,
    parse_namespace,
)
from kvpool.cli.kvctl.requests import inspect_prompt
from kvpool.core.ids import qualify, unpack_keys
from kvpool.service import wire
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import common_pb2

LEASE_MS = 10_000


def inspect(
    name: Annotated[str, typer.Argument(metavar="[KEY|NAME]", help="A block's key in hex, or an object's name.")] = "",
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    node: OneNode = "",
    access: Access = ANYBODY,
    json: Json = False,
    namespace: Namespace = "",
    objects: Objects = "",
    text: Annotated[str, typer.Option("--text", help="Instead: a prompt's text; `-` reads standard input.")] = "",
    model: Annotated[str, typer.Option("--model", help="With --text: needed where there are several.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="With --text: treat it as one user message of a chat.")] = False,
    salt: Annotated[str, typer.Option("--cache-salt-hex", help="With --text: salt of the tenant, in hex.")] = "",
) -> None:
    """Every copy of a block or an object: where, in which state, held by how many, with which digests."""
    if bool(name) == bool(text):
        output.fail("name a block, an object (with --objects DOMAIN), or a prompt with --text", code=output.EXIT_USAGE)
    if text:
        inspect_prompt(scheduler, access, text, model, chat, salt, json)
        return
    key = parse_keys([name], objects).tobytes()
    namespace_id = parse_namespace(namespace, objects)
    copies: list[dict[str, Any]] = []
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                copies += _copies(one, key, namespace_id)
    if json:
        output.print_json({"key": key.hex(), "name": name if objects else "", "copies": copies})
    else:
        _print(key, name if objects else "", copies)
    if not copies:
        output.fail("no node has it", hint="`kvctl ls` shows what there is")


def _copies(node: Node, key: bytes, namespace_id: bytes) -> list[dict[str, Any]]:
    copies = []
    for block in node.find(key, namespace_id):
        found: dict[str, Any] = {"node": node.source_id, **output.to_dict(block)}
        if block.state == "readable":
            found["digests"] = [f"{digest:016x}" for digest in _digests(node, block)]
        copies.append(found)
    below = node.find(key, namespace_id, below=True)
    return copies + [{"node": node.source_id, **output.to_dict(block)} for block in below]


def _digests(node: Node, block: pb.BlockInfo) -> list[int]:
    """What the block's sections must hash to; empty if it went meanwhile."""
    specs = {i.namespace_id: wire.namespace_from_proto(i.spec) for i in node.namespaces()}
    spec = specs.get(block.namespace_id)
    group = None if spec is None else wire.group_like(spec, block)
    if group is None:
        return []
    keys = qualify(unpack_keys(block.key), group, 0).tobytes()
    with node.session() as session:
        reply = node.blocks.Lease(
            pb.LeaseRequest(
                session_id=session, namespace_id=block.namespace_id, ttl_ms=LEASE_MS,
                keys=common_pb2.KeyList(group=group, keys=keys), fidelity_min=common_pb2.FIDELITY_INT8,
            )
        )  # fmt: skip
    return list(reply.blocks.digests) if reply.found[0] else []


def _print(key: bytes, name: str, copies: list[dict[str, Any]]) -> None:
    tables.facts(f"object {name}" if name else "block", {"key": key.hex(), "copies": len(copies)})
    rows = [
        (
            c["node"], tiers(c), c["state"],
            output.size(c["size"]), c["fidelity"], c["generation"] or "-",
            c["leases"], c["pins"], c["tenant"] or "-", " ".join(c.get("digests", [])) or "-",
        )
        for c in copies
    ]  # fmt: skip
    columns = ("node", "tier", "state", "size:", "fidelity", "generation:", "leases:", "pins:", "tenant", "digests")
    tables.table("copies", columns, rows)
