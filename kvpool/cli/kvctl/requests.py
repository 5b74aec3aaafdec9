"""`kvctl explain ID`, and `kvctl inspect --text`: where a request went, and which blocks of a prompt are cached."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import numpy as np
import typer

from kvpool.cli import output
from kvpool.cli.kvctl import tables
from kvpool.cli.kvctl.cluster import Cluster
from kvpool.cli.kvctl.options import ANYBODY, DEFAULT_SCHEDULER, Access, Json, Scheduler
from kvpool.core import hashing
from kvpool.service import wire
from kvpool.v1 import scheduler_pb2


def inspect_prompt(scheduler: str, access: Access, text: str, model: str, chat: bool, salt: str, json: bool) -> None:
    """Which blocks of a prompt are cached, and where; text "-" is read from standard input."""
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
        cluster = Cluster(scheduler, access)
        chosen = _choose_model(cluster.models(), model)
        tokens = _tokenize(chosen.tokenizer, text, chat)
        spec = chosen.namespace
        namespace_id = bytes(wire.namespace_from_proto(spec).id())
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
    tables.facts(
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
    tables.table("blocks of the prompt", ("block:", "tokens", "key", "held by"), rows)


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


def explain(
    request_id: Annotated[str, typer.Argument(help="The `id` of a completion.")],
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    access: Access = ANYBODY,
    json: Json = False,
) -> None:
    """Why a request went where it went: candidates, predictions, choice and outcome."""
    with output.reported_errors(scheduler, "scheduler"):
        data = Cluster(scheduler, access).explain(request_id)
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
        waited = f", {output.milliseconds(data['waited_us'])} of it for a place" if data["waited_us"] else ""
        lines["predicted TTFT"] = output.milliseconds(placement["predicted_ttft_us"]) + waited
    elif data["waiting"]:
        lines["choice"] = "none yet: it waits for a place"
    if refusal:
        lines["choice"] = (
            f"refused ({refusal['reason']}): {refusal['message']}; retry after {refusal['retry_after_ms']} ms"
        )
    outcome = data.get("outcome")
    if outcome:
        lines["actual TTFT"] = output.milliseconds(outcome["ttft_us"])
        if placement and outcome["ttft_us"]:
            lines["actual TTFT"] += f"; the prediction was {100 * data['ttft_error_ratio']:.0f} % off"
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
        if placement and placement["split"] and outcome.get("prefill") and outcome.get("decode"):
            published, read = outcome["prefill"]["publish_us"], outcome["decode"]["read_us"]
            lines["hand-off"] = (
                f"published in {output.milliseconds(published)}, read in {output.milliseconds(read)}; decode waited "
                f"{output.milliseconds(outcome['decode']['exposed_us'])} for it"
            )
    else:
        lines["outcome"] = "still running" if placement else "-"
    errors = [f"{e['kind']} {100 * e['median']:.0f} % of {e['count']}" for e in data.get("prediction_errors", ())]
    if errors:
        lines["predictions there"] = f"median error of the last ones: {', '.join(errors)}"
    tables.facts(f"request {data['request_id']}", lines)
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
    tables.table(f"candidates, best first ({shown}; milliseconds)", columns, rows)
