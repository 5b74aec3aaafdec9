"""`kvctl advise`: should this cluster split prefill from decode, and with what."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.cluster import Cluster, chosen_nodes
from kvpool.cli.kvctl.options import ANYBODY, DEFAULT_SCHEDULER, Access, Json, Scheduler
from kvpool.cli.kvctl.trace import SkipBad, read
from kvpool.core.errors import KvpoolError
from kvpool.v1 import source_admin_pb2 as pb

if TYPE_CHECKING:
    from scheduler.advisor.advice import Advice
    from scheduler.advisor.checking import Check
    from scheduler.advisor.measured import Links
    from scheduler.advisor.sizing import Sized
    from scheduler.simulator.hardware import Hardware
    from scheduler.simulator.traces import Trace

MEASURED = "measured"
LINKS_FILE_BYTES_MAX = 16 << 20


def advise(
    trace: Annotated[Path, typer.Option("--trace", help="What clients ask for; see `kvctl trace`.")],
    hardware: Annotated[
        list[str] | None,
        typer.Option("--hardware", metavar="NAME|FILE", help="What to serve it with; several times to choose from."),
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="How many there are; default: as it takes.")] = None,
    links: Annotated[
        str, typer.Option("--links", metavar="measured|FILE", help="Links as measured: by the cluster, or a file.")
    ] = "",
    live: Annotated[bool, typer.Option("--live", help="The cluster as it runs: instances, fits and links.")] = False,
    ttft_ms: Annotated[float, typer.Option("--ttft-ms", min=1, help="Limit of the time to the first token.")] = 30_000,
    tbt_ms: Annotated[float, typer.Option("--tbt-ms", min=0.1, help="Limit of a request's longest intervals.")] = 200,
    share: Annotated[float, typer.Option("--share", min=0.01, max=0.999, help="Of requests that keep both.")] = 0.9,
    speed: Annotated[float, typer.Option("--speed", min=1e-6, max=1e6, help="So many times as many a second.")] = 1.0,
    simulate: Annotated[int, typer.Option("--simulate", min=0, help="Check by simulating so many requests.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the simulation.")] = 0,
    skip_bad: SkipBad = False,
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    access: Access = ANYBODY,
    json: Json = False,
) -> None:
    """Says whether to split prefill from decode, with which GPUs in which role, and where the answer would change."""
    from scheduler.advisor import words
    from scheduler.advisor.advice import advise as weigh
    from scheduler.advisor.checking import disagreement
    from scheduler.advisor.demand import demand_of
    from scheduler.advisor.model import Objectives

    found = read(trace, skip_bad)
    objectives = Objectives(ttft_ms * 1e3, tbt_ms * 1e3, share)
    try:
        known_links = _links(links, live, scheduler, access)
        kinds, gpus = _hardware(hardware or [], gpus, live, known_links, scheduler, access)
        nodes = _nodes(kinds[0], gpus)
        capacity = _cache_blocks(kinds[0], nodes, found.block_tokens)
        advice = weigh(kinds, gpus, known_links, demand_of(found, capacity, speed), objectives)
    except KvpoolError as error:
        output.fail(str(error), hint=error.hint)
    checks = _simulated(advice, found[:simulate], speed, seed) if simulate else []
    doubt = disagreement(advice, checks)
    if json:
        simulated = [check.to_json() for check in checks]
        output.print_json({**words.to_json(advice), "simulated": simulated, "simulation_disagrees": doubt})
        return
    for sentence in words.sentences(advice):
        typer.echo(sentence)
    if doubt:
        typer.echo(doubt)
    _print(advice, checks)


def _nodes(hardware: Hardware, gpus: int | None) -> int:
    if gpus is None:
        return 16
    return max(gpus // (hardware.gpus_per_instance * hardware.instances_per_node), 1)


def _cache_blocks(hardware: Hardware, nodes: int, block_tokens: int) -> int:
    """Blocks that the pool of the cluster holds: memory and SSD of its nodes."""
    node_bytes = hardware.dram_bytes + hardware.ssd_bytes
    return max(int(nodes * node_bytes // (hardware.kv_token_bytes * block_tokens)), 1)


def _hardware(
    names: list[str], gpus: int | None, live: bool, links: Links | None, scheduler: str, access: Access
) -> tuple[list[Hardware], int | None]:
    """What to choose from, and how many GPUs there are. Raises: BadArgument."""
    from scheduler.advisor.measured import hardware_of_instances
    from scheduler.simulator.hardware import PROFILES, read_hardware

    kinds = [read_hardware(name) for name in names]
    if not live:
        if not kinds:
            known = ", ".join(PROFILES)
            output.fail("which hardware?", hint=f"--hardware {known} or a file, or --live", code=output.EXIT_USAGE)
        return kinds, gpus
    with output.reported_errors(scheduler, "scheduler"):
        instances = Cluster(scheduler, access).instances()
    base = kinds[0] if kinds else next(iter(PROFILES.values()))
    pool_bytes = sum(source.get("bytes_total", 0) for source in _node_sources(scheduler, access))
    measured = hardware_of_instances(instances, base, links, pool_bytes)
    alive = sum(i["state"] in ("alive", "draining") for i in instances)
    return [measured], gpus or alive * measured.gpus_per_instance


def _links(named: str, live: bool, scheduler: str, access: Access) -> Links | None:
    """Links as a file or the cluster's nodes tell them. Raises: BadArgument."""
    from scheduler.advisor.measured import links_of

    if named and named != MEASURED:
        path = Path(named)
        try:
            if path.stat().st_size > LINKS_FILE_BYTES_MAX:
                output.fail(f"{path} is too large for a list of links")
            return links_of(json_format.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            output.fail(f"{path} can't be read: {error}", hint="write it with `kvctl links --json`")
    if not named and not live:
        return None
    if live and not named and not _node_sources(scheduler, access):
        return None
    items: list[dict[str, Any]] = []
    with chosen_nodes(scheduler, "", access) as nodes:
        for one in nodes:
            with output.reported_errors(one.address, "node"):
                measured = one.admin.ListLinks(pb.ListLinksRequest()).links
                items += [{**output.to_dict(link), "bytes_per_s": link.bytes_per_s or None} for link in measured]
    if live and not named and not any(item["bytes_per_s"] for item in items):
        return None
    return links_of(items)


def _node_sources(scheduler: str, access: Access) -> list[dict[str, Any]]:
    """Memory and SSDs of nodes, as the directory knows them; not the HBM of workers."""
    with output.reported_errors(scheduler, "scheduler"):
        sources = [one["source"] for one in Cluster(scheduler, access).sources()]
    return [source for source in sources if source["address"] and source["tier"] in ("dram", "ssd")]


def _simulated(advice: Advice, trace: Trace, speed: float, seed: int) -> list[Check]:
    from scheduler.advisor.checking import check

    found = []
    for one in (advice.colocated, advice.split):
        if one is not None and one.capacity_per_s:
            checked = check(one, trace, advice.demand.capacity_blocks, advice.objectives, speed, seed)
            if checked is not None:
                found.append(checked)
    return found


def _print(advice: Advice, checks: list[Check]) -> None:
    shown = list(advice.designs) or [one for one in (advice.colocated, advice.split) if one is not None]
    rows = [_row(one, advice) for one in shown]
    columns = ("design", "GPUs:", "carries /s:", "inside limits:", "TTFT mean:", "TBT mean:", "prefill busy:",
               "decode KV full:", "network busy:", "chunk:", "price /h:", "per million tokens:")  # fmt: skip
    tables.table(f"at {advice.demand.rate_per_s:.2f} requests/s, predicted", columns, rows)
    if checks:
        checked = [
            (c.design, f"{c.predicted_good_share:.1%}", f"{c.simulated_good_share:.1%}", _ms(c.predicted_ttft_us),
             _ms(c.simulated_ttft_us), _ms(c.simulated_tbt_us)) for c in checks
        ]  # fmt: skip
        names = (
            "design",
            "inside limits, predicted:",
            "simulated:",
            "TTFT, predicted:",
            "simulated:",
            "TBT, simulated:",
        )
        tables.table("checked by simulation", names, checked)


def _row(one: Sized, advice: Advice) -> tuple[Any, ...]:
    from scheduler.advisor.advice import cost_per_million

    e, cost = one.evaluation, cost_per_million(one, advice.demand)
    return (
        one.design.named(), one.design.gpus, f"{one.capacity_per_s:.2f}", f"{e.good_share:.1%}", _ms(e.ttft_us),
        _ms(e.tbt_us), f"{e.prefill_busy:.0%}", f"{e.decode_kv_share:.0%}", f"{e.network_busy:.1%}", e.chunk_tokens,
        f"{one.design.price_hour:.2f}", "-" if cost is None else f"{cost:.3f}",
    )  # fmt: skip


def _ms(us: float) -> str:
    return "-" if us == float("inf") else f"{us / 1e3:,.0f} ms"
