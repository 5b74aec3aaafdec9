"""`kvpool demo`: a real cluster, real text, with the pool and without, and every token checked."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvpool.cli import output
from kvpool.cli.demo import play, report, workload
from kvpool.cli.demo.reference import Reference
from kvpool.cli.kvctl import Cluster
from kvpool.cli.local import LocalCluster, LocalOptions
from kvpool.cli.serving import addresses, watch

SETTLE_TIMEOUT_S = 20.0


class DemoFailed(RuntimeError):
    """The demo could not be run; the message says why."""


def run_demo(
    model: str, passes: int, conversations: int, turns: int, keep: bool, out: Path, stop: threading.Event
) -> bool:
    """Plays everything, prints the table and writes the report.

    Returns: whether all tokens were right and nothing stayed held.
    Raises: DemoFailed, ProcessFailed.
    """
    begin = time.monotonic()
    folder = _model_folder(model)
    options = LocalOptions(
        model=str(folder), served_name=folder.name, prefill=2, decode=2, deterministic=True, kv_tokens=65536,
        memory_bytes=1 << 30, journal=str(out.parent / "demo-journal"),
    )  # fmt: skip
    shape = workload.WorkloadShape(conversations=conversations, turns=turns)
    reference = Reference(folder, options)
    talks = workload.build(shape, reference.count_tokens)
    cluster = LocalCluster(options, out.parent / "demo-logs")
    try:
        cluster.start(lambda what: output.console.print(f"[dim]{what}[/]"), stop)
        control = Cluster(cluster.scheduler_address)
        _wait(lambda: control.status()["instances_alive"] == 4 and bool(control.nodes()), "the workers to join")
        passes_played = _play_all(cluster, options, shape, talks, passes, stop)
        held = _settled(control)
        ours = [turn for one in passes_played["kvpool"] for turn in one]
        explanations = [control.explain(turn.request_id) for turn in ours]
        with _progress() as bar:
            task = bar.add_task("checking every token against one engine without a pool", total=len(ours))
            checked = reference.check(ours, lambda: bar.advance(task))
        result = report.build(passes_played, checked, explanations, held, time.monotonic() - begin)
        _show(result, out)
        if keep:
            output.facts("still running; Ctrl-C ends it", addresses(cluster))
            watch(cluster, stop)
    finally:
        output.console.print("[dim]stopping all processes[/]")
        cluster.stop()
    return bool(result["tokens_identical"]) and not any(held.values())


def _model_folder(model: str) -> Path:
    if model:
        folder = Path(model)
    else:
        folder = Path(__file__).resolve().parents[3] / "tests" / "models" / "tiny-llama"
    if not (folder / "config.json").is_file():
        raise DemoFailed(f"no model in {folder}; name a Hugging Face folder with --model")
    return folder


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=output.console)


def _play_all(
    cluster: LocalCluster,
    options: LocalOptions,
    shape: workload.WorkloadShape,
    talks: list[workload.Conversation],
    passes: int,
    stop: threading.Event,
) -> dict[str, list[list[play.Turn]]]:
    """Passes of each mode, interleaved, so that whatever else the machine does falls on all alike."""
    played: dict[str, list[list[play.Turn]]] = {mode.name: [] for mode in play.MODES}
    with _progress() as bar:
        warm = bar.add_task("warming up", total=2 * len(play.MODES))
        for mode in play.MODES:
            short = workload.WorkloadShape(conversations=2, turns=1)
            some = [workload.Conversation(c.name, c.system, c.turns[:1], c.think_s[:1]) for c in talks[:2]]
            asyncio.run(_pass(cluster, options, short, some, mode, f"warm-{mode.name}", lambda: bar.advance(warm)))
        for index in range(passes):
            for mode in play.MODES:
                if stop.is_set():
                    raise DemoFailed("interrupted")
                total = sum(len(c.turns) for c in talks)
                task = bar.add_task(f"pass {index + 1} of {passes}: {mode.name}", total=total)
                salt = f"pass-{index}-{mode.name}"
                turns = asyncio.run(
                    _pass(cluster, options, shape, talks, mode, salt, lambda task=task: bar.advance(task))  # type: ignore[misc]
                )
                played[mode.name].append(turns)
    return played


async def _pass(
    cluster: LocalCluster,
    options: LocalOptions,
    shape: workload.WorkloadShape,
    talks: list[workload.Conversation],
    mode: play.Mode,
    salt: str,
    on_turn: Callable[[], None],
) -> list[play.Turn]:
    try:
        return await play.play_pass(cluster.gateway_url, options.served_name, talks, shape, mode, salt, on_turn)
    except (RuntimeError, play.httpx.HTTPError) as error:
        raise DemoFailed(f"{mode.name}: {type(error).__name__}: {error}") from error


def _wait(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not check():
        if time.monotonic() > deadline:
            raise DemoFailed(f"waited {SETTLE_TIMEOUT_S:.0f} s in vain for {what}")
        time.sleep(0.1)


def _settled(control: Cluster) -> dict[str, int]:
    """What the nodes still hold once the last answer has been published; zero unless something leaks."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while any((held := control.held()).values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return held


def _show(result: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    columns = ("", "TTFT p50 ms:", "p95:", "TPOT p50 ms:", "p95:", "prefix hits:", "TTFT against kvpool:")
    output.table("the same conversations, medians over the passes", columns, report.rows(result))
    output.console.print(
        f"[dim]All workers share {os.cpu_count()} cores here: a split moves work without adding any; what shows is\n"
        "the reuse. Sticky hits only what its one worker computed; kvpool hits as much while workers change.[/]"
    )
    kinds = f"{result['split_requests']} split, {result['colocated_requests']} co-located"
    verdict = "identical" if result["tokens_identical"] else "DIFFERENT"
    output.facts(
        "kvpool",
        {
            "tokens": f"{verdict} to one engine without a pool ({result['near_ties']} near ties)",
            "hit ratio, turns 2 and later": f"{100 * result['hit_ratio_turn2plus']:.0f} %",
            "requests": f"{result['requests']}: {kinds}",
            "moved between workers": f"{result['conversations_that_moved']} conversations",
            "pulled from the pool": output.size(result["bytes_pulled"]),
            "of that waited for by decode": _share(result["exposed_transfer_median"]),
            "TTFT prediction error": _errors(result),
            "still held": ", ".join(f"{v} {k}" for k, v in result["leaks"].items()),
            "time": f"{result['wall_s']:.0f} s",
            "report": str(out),
        },
    )


def _errors(result: dict[str, Any]) -> str:
    learned = result[f"ttft_prediction_error_median_after_{report.LEARNED_AFTER}"]
    later = "" if learned is None else f", {100 * learned:.0f} % after {report.LEARNED_AFTER} requests"
    return f"{100 * (result['ttft_prediction_error_median'] or 0):.0f} % (median){later}"


def _share(value: float | None) -> str:
    return "- (no request was split)" if value is None else f"{100 * value:.0f} % (median of split requests)"
