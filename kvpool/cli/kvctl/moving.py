"""`kvctl copy`, `move`, `drain`, `verify`: long operations of nodes."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpool.cli import output
from kvpool.cli.kvctl.cluster import chosen_nodes
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
from kvpool.cli.kvctl.progress import follow, report
from kvpool.v1 import block_source_pb2, common_pb2
from kvpool.v1 import source_admin_pb2 as pb

From = Annotated[str, typer.Option("--from", metavar="NODE", help="Node that has them: its id, or HOST:PORT.")]
To = Annotated[str, typer.Option("--to", metavar="NODE", help="Node that gets them: its id, or HOST:PORT.")]
KEYS_PER_CALL = 65_536


def copy(
    source: From,
    target: To,
    names: Names = None,
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    access: Access = ANYBODY,
    json: Json = False,
    namespace: Namespace = "",
    objects: Objects = "",
) -> None:
    """Copies blocks from one node to another, from its SSD too: those named, all of a namespace, or all there are."""
    _copy(source, target, names, scheduler, access, json, namespace, objects, move=False)


def move(
    source: From,
    target: To,
    names: Names = None,
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    access: Access = ANYBODY,
    json: Json = False,
    namespace: Namespace = "",
    objects: Objects = "",
) -> None:
    """As copy; each block leaves the first node once it is on the second."""
    _copy(source, target, names, scheduler, access, json, namespace, objects, move=True)


def _copy(
    source: str, target: str, names: list[str] | None, scheduler: str, access: Access, json: bool, namespace: str,
    objects: str, *, move: bool,
) -> None:  # fmt: skip
    keys, namespace_id = parse_keys(names or [], objects), parse_namespace(namespace, objects)
    word = "moved" if move else "copied"
    if len(keys) > KEYS_PER_CALL:
        output.fail(f"at most {KEYS_PER_CALL} keys at once", code=output.EXIT_USAGE)
    with chosen_nodes(scheduler, source, access) as origins, chosen_nodes(scheduler, target, access) as targets:
        origin, one = origins[0], targets[0]
        if origin.source_id == one.source_id:
            output.fail(f"{origin.source_id} is both where from and where to", code=output.EXIT_USAGE)
        with output.reported_errors(origin.address, "node"):
            packed = keys.tobytes()
            if len(keys) and not namespace_id:
                namespace_id = _namespace_of(origin.find(packed) + origin.find(packed, below=True))
        request = pb.CopyRequest(
            from_address=origin.address, namespace_id=namespace_id, move=move,
            keys=common_pb2.KeyList(keys=keys.tobytes()),
        )  # fmt: skip
        with output.reported_errors(one.address, "node"):
            last = follow(
                f"{origin.source_id} -> {one.source_id}", one.admin.Copy(request),
                interrupted=f"what was {word} stays; begin again to go on",
            )  # fmt: skip
        report(f"{word} from {origin.source_id}", {one.source_id: last}, json=json, done=word)


def _namespace_of(blocks: list[block_source_pb2.BlockInfo]) -> bytes:
    found = sorted({bytes(block.namespace_id) for block in blocks})
    if not found:
        output.fail("none of these keys is there", hint="`kvctl inspect KEY` shows where it is")
    if len(found) > 1:
        output.fail(
            "these keys are of several namespaces",
            hint=f"--namespace one of {', '.join(n.hex() for n in found)}", code=output.EXIT_USAGE,
        )  # fmt: skip
    return found[0]


def drain(
    node: Annotated[str, typer.Argument(help="Node to drain: its id, or HOST:PORT.")],
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="NODE", help="Where its blocks go; may be given several times.")
    ] = None,
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    access: Access = ANYBODY,
    json: Json = False,
    undo: Annotated[bool, typer.Option("--undo", help="Let it take new blocks again.")] = False,
    ssd: Annotated[bool, typer.Option("--ssd", help="Move what lies on its SSD alone, too.")] = False,
) -> None:
    """Lets a node take no new blocks, and moves all it has to other nodes; without --to they stay until it ends."""
    if undo and to:
        output.fail("--undo needs no --to", code=output.EXIT_USAGE)
    if ssd and not to:
        output.fail("--ssd says what moves: name where to with --to", code=output.EXIT_USAGE)
    with chosen_nodes(scheduler, node, access) as nodes:
        one = nodes[0]
        addresses = []
        for name in to or []:
            with chosen_nodes(scheduler, name, access) as targets:
                addresses.append(targets[0].address)
        with output.reported_errors(one.address, "node"):
            request = pb.DrainRequest(target_addresses=addresses, undo=undo, below=ssd)
            last = follow(
                f"draining {one.source_id}", one.admin.Drain(request),
                interrupted="the node stays draining; `kvctl drain NODE --undo` takes it back",
            )  # fmt: skip
        if not json and not addresses:
            what = "takes blocks again" if undo else f"takes no new blocks; {last.blocks_total} are there"
            print(f"{one.source_id} {what}")
            return
        report(f"drained {one.source_id}", {one.source_id: last}, json=json, done="moved")


def verify(
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    node: OneNode = "",
    access: Access = ANYBODY,
    json: Json = False,
    namespace: Namespace = "",
    objects: Objects = "",
    rate: Annotated[str, typer.Option("--rate", help="Bytes a second at most, e.g. 200MiB; 0 = no limit.")] = "0",
) -> None:
    """Reads every block again and checks it; bad ones are removed. Fails if there were any."""
    namespace_id = parse_namespace(namespace, objects)
    bytes_per_s_max = 0 if rate == "0" else output.parse_size(rate)
    results: dict[str, pb.Progress] = {}
    with chosen_nodes(scheduler, node, access) as nodes:
        for one in nodes:
            request = pb.VerifyRequest(namespace_id=namespace_id, bytes_per_s_max=bytes_per_s_max)
            with output.reported_errors(one.address, "node"):
                if namespace_id and not one.knows(namespace_id):
                    continue
                results[one.source_id] = follow(
                    f"verifying {one.source_id}", one.admin.Verify(request), interrupted="the rest was not checked"
                )
    report("verified", results, json=json, done="checked")
