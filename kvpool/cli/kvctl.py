"""`kvctl`: looks into a running cluster. Talks gRPC to the scheduler, and to the nodes that it names."""

from __future__ import annotations

import os
import sys

# gRPC's own log lines would stand between the answers.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from typing import Annotated, Any

import numpy as np
import typer

from kvpool.cli import output
from kvpool.core import hashing
from kvpool.service import rpc
from kvpool.v1 import (
    block_source_pb2,
    block_source_pb2_grpc,
    common_pb2,
    directory_pb2,
    directory_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
)

app = typer.Typer(
    name="kvctl",
    help="Look into a running kvpool cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Scheduler = Annotated[
    str, typer.Option("--scheduler", "-s", envvar="KVPOOL_SCHEDULER", help="Address of the scheduler.")
]
Credential = Annotated[
    str, typer.Option("--credential", envvar="KVPOOL_CREDENTIAL", help="Credential, where one is asked for.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_SCHEDULER = "127.0.0.1:7700"


class Cluster:
    """Stubs of one cluster's scheduler process; every answer is plain data."""

    def __init__(self, address: str, credential: str = "") -> None:
        self.address, self._credential = address, credential
        self._channel = rpc.make_channel(address, credential=credential)
        self._scheduler = scheduler_pb2_grpc.SchedulerStub(self._channel)
        self._directory = directory_pb2_grpc.DirectoryStub(self._channel)

    def status(self) -> dict[str, Any]:
        return output.to_dict(self._scheduler.GetStatus(scheduler_pb2.GetStatusRequest()))

    def instances(self) -> list[dict[str, Any]]:
        reply = self._scheduler.ListInstances(scheduler_pb2.ListInstancesRequest())
        return [output.to_dict(i) for i in reply.instances]

    def sources(self) -> list[dict[str, Any]]:
        reply = self._directory.ListSources(directory_pb2.ListSourcesRequest())
        return [output.to_dict(s) for s in reply.sources]

    def models(self) -> list[scheduler_pb2.ModelInfo]:
        return list(self._scheduler.ListModels(scheduler_pb2.ListModelsRequest()).models)

    def match(self, keys: bytes) -> dict[str, Any]:
        request = directory_pb2.MatchRequest(keys=[common_pb2.KeyList(keys=keys)])
        return output.to_dict(self._directory.Match(request))

    def explain(self, request_id: str) -> dict[str, Any]:
        return output.to_dict(self._scheduler.Explain(scheduler_pb2.ExplainRequest(request_id=request_id)))

    def source_stats(self, address: str) -> dict[str, Any]:
        with rpc.make_channel(address, credential=self._credential) as channel:
            stub = block_source_pb2_grpc.BlockSourceStub(channel)
            return output.to_dict(stub.GetSourceStats(block_source_pb2.GetSourceStatsRequest()))

    def blocks(self, address: str, limit: int) -> list[dict[str, Any]]:
        with rpc.make_channel(address, credential=self._credential) as channel:
            stub = block_source_pb2_grpc.BlockSourceStub(channel)
            found: list[dict[str, Any]] = []
            cursor = 0
            while len(found) < limit:
                reply = stub.ListBlocks(
                    block_source_pb2.ListBlocksRequest(cursor=cursor, limit=min(1000, limit - len(found)))
                )
                found += [output.to_dict(b) for b in reply.blocks]
                cursor = reply.next_cursor
                if not cursor:
                    break
            return found

    def nodes(self) -> list[dict[str, Any]]:
        """Sources that can be read from, each with its own counts; `stats` is missing where it does not answer."""
        found = []
        for source in self.sources():
            if not source["source"]["address"]:
                continue
            with_stats = dict(source)
            try:
                with_stats["stats"] = self.source_stats(source["source"]["address"])
            except rpc.grpc.RpcError as error:
                with_stats["error"] = str(rpc.from_rpc_error(error, source["source"]["address"]))
            found.append(with_stats)
        return found

    def held(self) -> dict[str, int]:
        """What clients hold, over all nodes: all zero when nobody does anything."""
        names = ("leases", "pins", "reservations", "quarantined")
        return {n: sum(node.get("stats", {}).get(n, 0) for node in self.nodes()) for n in names}


def open_cluster(address: str, credential: str) -> Cluster:
    return Cluster(address, credential)


@app.callback()
def _root(
    version: Annotated[bool, output.version_option("kvctl")] = False,
) -> None:
    """Look into a running kvpool cluster."""


@app.command()
def status(scheduler: Scheduler = DEFAULT_SCHEDULER, credential: Credential = "", json: Json = False) -> None:
    """The cluster at a glance: who is there, what is cached, what is held."""
    with output.reported_errors(scheduler, "scheduler"):
        cluster = open_cluster(scheduler, credential)
        data = cluster.status() | {"held": cluster.held()}
    if json:
        output.print_json(data)
        return
    held = ", ".join(f"{v} {k}" for k, v in data["held"].items())
    output.facts(
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


@app.command()
def nodes(scheduler: Scheduler = DEFAULT_SCHEDULER, credential: Credential = "", json: Json = False) -> None:
    """Sources that blocks can be read from, and what they hold."""
    with output.reported_errors(scheduler, "scheduler"):
        found = open_cluster(scheduler, credential).nodes()
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
    output.table("nodes", columns, rows)


@app.command()
def workers(scheduler: Scheduler = DEFAULT_SCHEDULER, credential: Credential = "", json: Json = False) -> None:
    """Engine instances: role, load, KV capacity, and what the scheduler believes of their speed."""
    with output.reported_errors(scheduler, "scheduler"):
        found = open_cluster(scheduler, credential).instances()
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
    output.table("workers", columns, rows)


@app.command()
def blocks(
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    credential: Credential = "",
    json: Json = False,
    node: Annotated[str, typer.Option("--node", help="Only this node (id or address).")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="At most this many a node.")] = 50,
) -> None:
    """Blocks that lie on the nodes, one line each."""
    with output.reported_errors(scheduler, "scheduler"):
        cluster = open_cluster(scheduler, credential)
        sources = [s["source"] for s in cluster.sources() if s["source"]["address"]]
    chosen = [s for s in sources if node in ("", s["source_id"], s["address"])]
    if node and not chosen:
        known = ", ".join(s["source_id"] for s in sources) or "none"
        output.fail(f"no node {node!r}", hint=f"nodes of this cluster: {known}")
    found = []
    for source in chosen:
        with output.reported_errors(source["address"], "node"):
            found += [{"node": source["source_id"], **b} for b in cluster.blocks(source["address"], limit)]
    if json:
        output.print_json({"blocks": found})
        return
    rows = [
        (
            b["node"],
            b["key"],
            b["state"],
            output.size(b["size"]),
            b["fidelity"],
            b["generation"],
            b["leases"],
            b["pins"],
        )
        for b in found
    ]
    output.table("blocks", ("node", "key", "state", "size:", "fidelity", "generation:", "leases:", "pins:"), rows)


@app.command()
def inspect(
    text: Annotated[str, typer.Option("--text", help="Prompt text; `-` reads it from standard input.")],
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    credential: Credential = "",
    json: Json = False,
    model: Annotated[str, typer.Option("--model", help="Model name; needed where there are several.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Treat the text as one user message of a chat.")] = False,
    salt: Annotated[str, typer.Option("--cache-salt-hex", help="Salt of the tenant, in hex.")] = "",
) -> None:
    """Which blocks of a prompt are cached, and where."""
    try:
        extras = hashing.Extras(salt=bytes.fromhex(salt))
    except ValueError:
        output.fail(f"{salt!r} is not hex", code=output.EXIT_USAGE)
    if len(extras.salt) not in (0, 16):
        output.fail(f"a salt has 16 bytes, not {len(extras.salt)}", code=output.EXIT_USAGE)
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            output.fail(f"standard input is not UTF-8: {error}", code=output.EXIT_USAGE)
    with output.reported_errors(scheduler, "scheduler"):
        cluster = open_cluster(scheduler, credential)
        chosen = _choose_model(cluster.models(), model)
        tokens = _tokenize(chosen.tokenizer, text, chat)
        spec = chosen.namespace
        namespace_id = _namespace_id(spec)
        root = hashing.root_key(namespace_id, extras, spec.hash)
        block_tokens = spec.groups[0].block_tokens
        keys = hashing.block_keys(root, tokens, block_tokens, spec.hash)
        match = cluster.match(keys.tobytes())
    holders: list[list[str]] = [[] for _ in keys]
    for run in match["runs"]:
        for i in range(run["first"], run["first"] + run["count"]):
            holders[i].append(f"{run['source_id']} ({run['tier']})")
    data = {
        "model": chosen.model,
        "prompt_tokens": len(tokens),
        "block_tokens": block_tokens,
        "blocks": [
            {
                "index": i,
                "key": bytes(key).hex(),
                "tokens": [i * block_tokens, (i + 1) * block_tokens],
                "held_by": holders[i],
            }
            for i, key in enumerate(keys)
        ],
        "covered_blocks": match["covered"],
        "covered_tokens": match["covered"] * block_tokens,
        "runs": match["runs"],
    }
    if json:
        output.print_json(data)
        return
    output.facts(
        f"prompt for {chosen.model}",
        {
            "tokens": f"{len(tokens)}: {len(keys)} blocks of {block_tokens}, {len(tokens) % block_tokens} left over",
            "cached": f"{data['covered_tokens']} tokens ({match['covered']} leading blocks)",
        },
    )
    rows = [
        (b["index"], f"{b['tokens'][0]}-{b['tokens'][1] - 1}", b["key"], ", ".join(b["held_by"]) or "-")
        for b in data["blocks"]
    ]
    output.table("blocks of the prompt", ("block:", "tokens", "key", "held by"), rows)


def _choose_model(models: list[scheduler_pb2.ModelInfo], name: str) -> scheduler_pb2.ModelInfo:
    names = ", ".join(sorted(m.model for m in models)) or "none"
    chosen = [m for m in models if name in ("", m.model)]
    if len(chosen) == 1:
        return chosen[0]
    if not models:
        output.fail("this cluster serves no model", hint="start a worker with `kvpool worker --model FOLDER`")
    return output.fail(
        f"no model {name!r}" if name else "several models are served", hint=f"name one with --model: {names}"
    )


def _tokenize(tokenizer: str, text: str, chat: bool) -> np.ndarray:
    from scheduler.gateway.text import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return loaded.encode_chat([{"role": "user", "content": text}]) if chat else loaded.encode(text)


def _namespace_id(spec: common_pb2.NamespaceSpec) -> bytes:
    from kvpool.service.wire import namespace_from_proto

    return bytes(namespace_from_proto(spec).id())


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="The `id` of a completion.")],
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    credential: Credential = "",
    json: Json = False,
) -> None:
    """Why a request went where it went: candidates, predictions, choice and outcome."""
    with output.reported_errors(scheduler, "scheduler"):
        data = open_cluster(scheduler, credential).explain(request_id)
    if json:
        output.print_json(data)
        return
    _print_explanation(data)


def _print_explanation(data: dict[str, Any]) -> None:
    choice = data.get("choice", {})
    placement, refusal = choice.get("placement"), choice.get("refusal")
    lines: dict[str, Any] = {
        "policy": data["policy"],
        "prompt": f"{data['prompt_tokens']} tokens, at most {data['max_tokens']} to generate",
    }
    if placement:
        where = (
            f"prefill on {placement['prefill']['instance_id']}, decode on {placement['decode']['instance_id']}"
            if placement["split"]
            else f"prefill and decode on {placement['prefill']['instance_id']}"
        )
        lines["choice"] = f"{'split' if placement['split'] else 'co-located'}: {where}"
        lines["reused"] = f"{placement['cached_tokens']} tokens predicted"
        lines["predicted TTFT"] = output.milliseconds(placement["predicted_ttft_us"])
    if refusal:
        lines["choice"] = (
            f"refused ({refusal['reason']}): {refusal['message']}; retry after {refusal['retry_after_ms']} ms"
        )
    outcome = data.get("outcome")
    if outcome:
        lines["actual TTFT"] = output.milliseconds(outcome["ttft_us"])
        took = output.milliseconds(outcome["duration_us"])
        lines["outcome"] = f"{outcome['finish_reason'] or 'running'}, {outcome['tokens']} tokens in {took}"
        for phase in ("prefill", "decode"):
            times = outcome.get(phase)
            if times:
                lines[f"{phase} worker"] = (
                    f"queued {output.milliseconds(times['queue_us'])}, pulled {output.milliseconds(times['pull_us'])} "
                    f"({output.size(times['bytes_pulled'])}), computed {output.milliseconds(times['prefill_us'])} "
                    f"for {times['computed_tokens']} tokens; reused {times['cached_tokens_hbm']} own + "
                    f"{times['cached_tokens_pool']} pulled"
                )
    else:
        lines["outcome"] = "still running" if placement else "-"
    output.facts(f"request {data['request_id']}", lines)
    costs = ("queue_us", "pull_us", "prefill_us", "handoff_us", "decode_harm_us", "cost_us")
    rows = [
        (
            c["prefill_instance"], c["decode_instance"], "split" if c["split"] else "co-located", c["cached_tokens"],
            *(f"{c[n] / 1000:.1f}" for n in costs),
            c["reason"] if not c["feasible"] else "",
        )
        for c in data["candidates"]
    ]  # fmt: skip
    columns = (
        "prefill",
        "decode",
        "kind",
        "cached:",
        "queue:",
        "pull:",
        "prefill:",
        "hand-off:",
        "harm:",
        "cost ms:",
        "",
    )
    shown = f"{len(rows)} of {data['candidates_total']}" if data["candidates_total"] > len(rows) else str(len(rows))
    output.table(f"candidates, best first ({shown}; milliseconds)", columns, rows)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
