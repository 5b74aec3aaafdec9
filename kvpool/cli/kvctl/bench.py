"""`kvctl bench`: how fast one node is over one channel, beside what this machine's memory does in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.cluster import Node, chosen_nodes
from kvpool.cli.kvctl.options import ANYBODY, DEFAULT_SCHEDULER, Access, Json, OneNode, Scheduler
from kvpool.client import PoolClient
from kvpool.core.ids import NamespaceId
from kvpool.core.namespace import HASHES, GroupKind, GroupSpec, NamespaceSpec

SECTIONS = 4
#: Keys of one batched look-up.
LOOKUP_KEYS = 4096
LOOKUPS_MAX = 64
TTL_S = 60.0


@dataclass(frozen=True)
class Figure:
    """One measured operation: medians over the repeats."""

    operation: str
    seconds: float  # of one whole pass
    gb_per_s: float | None
    us: float  # a block, or a call of one key
    keys_per_s: float | None


def bench(
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    node: OneNode = "",
    access: Access = ANYBODY,
    json: Json = False,
    channel: Annotated[str, typer.Option("--channel", help="Data channel: shm, tcp, ...; empty = the best.")] = "",
    size: Annotated[str, typer.Option("--size", help="Bytes of a block.")] = "2MiB",
    count: Annotated[int, typer.Option("--count", min=1, max=65_536, help="Blocks of a pass.")] = 64,
    repeat: Annotated[int, typer.Option("--repeat", min=1, max=1000, help="Passes; medians are shown.")] = 5,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check digests when reading.")] = True,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Evict what the node holds if there is no room.")] = False,
) -> None:
    """Puts, gets and looks up blocks of a namespace of its own, and removes them again. Evicts nothing unasked."""
    block_bytes = output.parse_size(size)
    with chosen_nodes(scheduler, node, access) as nodes:
        if len(nodes) > 1:
            known = ", ".join(one.source_id for one in nodes)
            output.fail("there are several nodes", hint=f"name one with --node: {known}", code=output.EXIT_USAGE)
        one = nodes[0]
        options: dict[str, Any] = {"channels": (channel,)} if channel else {}
        with (
            output.reported_errors(one.address, "node"),
            PoolClient(
                one.address, client="kvctl-bench", credential=access.credential, tls=access.tls, **options
            ) as client,
        ):
            _check_room(one, block_bytes, count, yes)
            figures = _run(client, block_bytes, count, repeat, verify)
            used = client.channel
    if json:
        figures_data = [asdict(figure) for figure in figures]
        output.print_json(
            {
                "node": one.source_id,
                "channel": used,
                "block_bytes": block_bytes,
                "blocks": count,
                "figures": figures_data,
            }
        )
        return
    rows = [
        (
            f.operation, "-" if f.gb_per_s is None else f"{f.gb_per_s:.2f}", f"{f.us:.1f}",
            "-" if f.keys_per_s is None else f"{f.keys_per_s:,.0f}", f"{f.seconds * 1000:.2f}",
        )
        for f in figures
    ]  # fmt: skip
    title = f"{one.source_id} over {used}: {count} blocks of {output.size(block_bytes)}, median of {repeat}"
    tables.table(title, ("operation", "GB/s:", "µs a block:", "keys/s:", "ms a pass:"), rows)


def _check_room(node: Node, block_bytes: int, count: int, may_evict: bool) -> None:
    """Ends the command where the blocks would not fit, or would push out others."""
    stats, bytes_needed = node.stats(), block_bytes * count
    free, total = output.size(stats.bytes_free), output.size(stats.bytes_total)
    if bytes_needed > stats.bytes_total:
        output.fail(
            f"{output.size(bytes_needed)} are more than all memory of {node.source_id}, {total}",
            hint="--count or --size: fewer bytes", code=output.EXIT_USAGE,
        )  # fmt: skip
    fits = bytes_needed <= stats.bytes_free and block_bytes <= stats.bytes_largest_extent
    if not fits and not may_evict:
        output.fail(
            f"{output.size(bytes_needed)} would evict what {node.source_id} holds: {free} of {total} are free",
            hint="--count or --size: fewer bytes; --yes: evict", code=output.EXIT_USAGE,
        )  # fmt: skip


def _run(client: PoolClient, block_bytes: int, count: int, repeat: int, verify: bool) -> list[Figure]:
    sections = SECTIONS if block_bytes % SECTIONS == 0 else 1
    group = GroupSpec(0, GroupKind.FULL, tuple(range(SECTIONS)), 16, 1, sections, block_bytes)
    spec = NamespaceSpec("kvctl bench", "", "uint8", "bench", "opaque:bench", HASHES[0], (group,))
    namespace = client.register(spec)
    # Keys of its own for each run: two may run at the same time.
    rng = np.random.default_rng(time.time_ns())
    keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    out = np.zeros_like(blocks)
    passes: dict[str, list[float]] = {"memcpy": [], "put": [], "get": [], "lookup": [], "lookup of one": []}
    many = np.resize(keys, (LOOKUP_KEYS, 16))
    try:
        for _ in range(repeat):
            passes["memcpy"].append(_timed(lambda: _copy_rows(blocks, out)))
            client.remove(namespace, keys)
            passes["put"].append(_timed(lambda: _put(client, namespace, keys, blocks)))
            passes["get"].append(_timed(lambda: _get(client, namespace, keys, out, verify)))
            passes["lookup"].append(_timed(lambda: client.lookup(namespace, many)))
            passes["lookup of one"].append(_timed(lambda: _look_up_singly(client, namespace, keys)))
        if not np.array_equal(out, blocks):
            output.fail("the bytes read are not the bytes written", hint="please report this: it must never happen")
    finally:
        client.remove(namespace, keys)
    singles = min(count, LOOKUPS_MAX)
    moved = {"memcpy": count, "put": count, "get": count}
    asked = {"lookup": LOOKUP_KEYS, "lookup of one": singles}
    figures = []
    for operation, seconds in passes.items():
        median = float(np.median(seconds))
        gb_per_s = blocks.nbytes / median / 1e9 if operation in moved else None
        keys_per_s = asked[operation] / median if operation in asked else None
        each = moved.get(operation) or asked[operation]
        name = "get, not verified" if operation == "get" and not verify else operation
        figures.append(Figure(name, median, gb_per_s, median / each * 1e6, keys_per_s))
    return figures


def _timed(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return max(time.perf_counter() - begin_s, 1e-9)


def _copy_rows(blocks: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """The yardstick: one copy a block, as a channel makes it."""
    for row in range(len(blocks)):
        np.copyto(out[row], blocks[row])


def _put(client: PoolClient, namespace: NamespaceId, keys: NDArray[np.uint8], blocks: NDArray[np.uint8]) -> None:
    stored = client.put(namespace, keys, blocks, ttl_s=TTL_S).stored
    if not stored.all():
        output.fail(
            f"the node had room for {int(stored.sum())} of {len(keys)} blocks", hint="--count or --size: fewer bytes"
        )


def _get(
    client: PoolClient, namespace: NamespaceId, keys: NDArray[np.uint8], out: NDArray[np.uint8], verify: bool
) -> None:
    got = client.get(namespace, keys, out, ttl_s=TTL_S, verify=verify)
    if not got.found.all():
        output.fail(
            f"{int((~got.found).sum())} of {len(keys)} blocks were evicted before they were read",
            hint="--count or --size: fewer bytes, or a node that does nothing else",
        )


def _look_up_singly(client: PoolClient, namespace: NamespaceId, keys: NDArray[np.uint8]) -> None:
    for row in range(min(len(keys), LOOKUPS_MAX)):
        client.lookup(namespace, keys[row : row + 1])
