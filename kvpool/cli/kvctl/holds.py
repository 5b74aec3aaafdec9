"""`kvctl pin`, `unpin`, `pins`: holds that outlive their maker."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.blocks import by_namespace
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
    parse_seconds,
)
from kvpool.core.ids import KeyArray
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import common_pb2, source_admin_pb2

TTL_S_MAX = 7 * 86_400
Owner = Annotated[str, typer.Option("--owner", help="Whom the pin belongs to.")]


def pin(
    names: Names = None,
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    node: OneNode = "",
    access: Access = ANYBODY,
    json: Json = False,
    namespace: Namespace = "",
    objects: Objects = "",
    owner: Owner = "kvctl",
    ttl: Annotated[str, typer.Option("--ttl", help="How long, at most 7d; 0 = until `kvctl unpin`.")] = "1h",
) -> None:
    """Keeps blocks or objects from eviction, wherever they are in memory."""
    if not names:
        output.fail("name what to pin: keys of blocks, or names with --objects DOMAIN", code=output.EXIT_USAGE)
    if not owner:
        output.fail("a pin of kvctl needs an owner", code=output.EXIT_USAGE)
    ttl_s = parse_seconds(ttl)
    if ttl_s > TTL_S_MAX:
        output.fail(
            "a pin lasts at most 7 days", hint="pin again before it ends, or give --ttl 0", code=output.EXIT_USAGE
        )
    keys, namespace_id = parse_keys(names, objects), parse_namespace(namespace, objects)
    made: list[dict[str, Any]] = []
    below = False
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                below |= bool(one.find(keys.tobytes(), namespace_id, below=True))
                made += _pin(one, keys, namespace_id, owner, ttl_s)
    if json:
        output.print_json({"pins": made})
    else:
        rows = [(p["node"], p["pin_id"], p["blocks"], owner, ttl if ttl_s else "until unpinned") for p in made]
        tables.table("pinned", ("node", "pin:", "blocks:", "owner", "for"), rows)
    if not made and below:
        output.fail(
            "they lie on an SSD alone, and pins hold what is in memory", hint="pin them once they were read again"
        )
    if not made:
        output.fail("none of them is there", hint="`kvctl ls` shows what there is")


def _pin(node: Node, keys: KeyArray, namespace_id: bytes, owner: str, ttl_s: float) -> list[dict[str, Any]]:
    made = []
    with node.session() as session:
        for namespace, packed in by_namespace(node, keys, namespace_id).items():
            request = pb.PinRequest(
                session_id=session, namespace_id=namespace, keys=common_pb2.KeyList(keys=packed), owner=owner,
                ttl_ms=round(ttl_s * 1000),
            )  # fmt: skip
            reply = node.blocks.Pin(request)
            if reply.pin_id:
                made.append({"node": node.source_id, "pin_id": reply.pin_id, "blocks": sum(reply.found)})
    return made


def unpin(
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    node: OneNode = "",
    access: Access = ANYBODY,
    json: Json = False,
    owner: Owner = "kvctl",
    pin_id: Annotated[int, typer.Option("--pin", min=0, help="Only this pin (with --node); 0 = all of the owner.")] = 0,
) -> None:
    """Ends pins of an owner: one, or all."""
    if not owner:
        output.fail("name the owner: `kvctl pins` lists them", code=output.EXIT_USAGE)
    if pin_id and not node:
        output.fail("each node numbers its own pins: name one with --node", code=output.EXIT_USAGE)
    released: dict[str, int] = {}
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                reply = one.blocks.Unpin(pb.UnpinRequest(pin_id=pin_id, owner=owner))
            released[one.source_id] = reply.pins_released
    if json:
        output.print_json({"released": released})
    else:
        tables.table("unpinned", ("node", "pins:"), list(released.items()))
    if not sum(released.values()):
        output.fail(f"{owner} has no such pin", hint="`kvctl pins` lists them")


def pins(
    scheduler: Scheduler = DEFAULT_SCHEDULER, node: OneNode = "", access: Access = ANYBODY, json: Json = False
) -> None:
    """What is held, by whom, and how long still: leases, pins, hand-off holds."""
    found: list[dict[str, Any]] = []
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                reply = one.admin.ListPins(source_admin_pb2.ListPinsRequest())
            found += [{"node": one.source_id, **output.to_dict(p)} for p in reply.pins]
    if json:
        output.print_json({"pins": found})
        return
    rows = [
        (
            p["node"], p["kind"], p["pin_id"], p["owner"] or "-", p["session_id"] or "-", p["blocks"],
            output.size(p["bytes"]),
            "until released" if p["expires_in_ms"] < 0 else f"{p['expires_in_ms'] / 1000:.0f} s",
        )
        for p in found
    ]  # fmt: skip
    columns = ("node", "kind", "id:", "owner", "session", "blocks:", "bytes:", "ends in:")
    tables.table("holds", columns, rows)
