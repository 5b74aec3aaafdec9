"""Requests that are prefilled on one process and decoded on another get exactly the right tokens."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler.replay.exact import replay_file
from scheduler.service import journal
from tests.e2e.conftest import PATIENCE_S, Running, eventually

# Six processes: on a busy machine their start alone takes a minute.
pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]
Cut = Callable[[int, int], list[int]]
Generate = Callable[[list[int], int], list[int]]


# Exact multiples of the block, one token more and less, less than a block, several chunks.
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 128, 600, 1100])
def test_split_tokens_are_right(cluster: Running, prompts: Cut, reference: Generate, tokens: int) -> None:
    prompt = prompts(tokens, tokens)
    answer = cluster.complete(prompt, 12, policy="always_split")
    assert answer["choices"][0]["token_ids"] == reference(prompt, 12)
    explanation = cluster.control.explain(answer["id"])
    assert explanation["choice"]["placement"]["split"]
    cluster.wait_nothing_held()


def test_next_turn_hits_the_generated_text(cluster: Running, prompts: Cut, reference: Generate) -> None:
    prompt = prompts(3, 200)
    first = cluster.complete(prompt, 80, policy="always_split")["choices"][0]["token_ids"]
    assert first == reference(prompt, 80)
    follow_up = prompt + first + prompts(9, 30)

    def cached() -> int:
        answer = cluster.complete(follow_up, 8, policy="always_split")
        assert answer["choices"][0]["token_ids"] == reference(follow_up, 8)
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    # 279 tokens have KV: four full blocks of 64, the last of them mostly generated.
    eventually(lambda: cached() >= 256, "generated blocks are in the pool")


def test_many_at_once(cluster: Running, prompts: Cut, reference: Generate) -> None:
    asked = [prompts(i % 6, 150 + 40 * (i % 6)) for i in range(18)]
    with concurrent.futures.ThreadPoolExecutor(18) as pool:
        answers = list(pool.map(lambda p: cluster.complete(p, 10, policy="always_split"), asked))
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer["choices"][0]["token_ids"] == reference(prompt, 10)
    cluster.wait_nothing_held()


def test_disconnect_aborts_everywhere(cluster: Running, prompts: Cut) -> None:
    # As long as the context allows: it must not end by itself before it is seen to run.
    body = {"model": "tiny-llama", "prompt": prompts(1, 100), "max_tokens": 3900, "ignore_eos": True, "stream": True,
            "kvpool": {"policy": "always_split"}}  # fmt: skip
    with cluster.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: httpx closes the response with its iterator
        first = next(line for line in lines if line.startswith("data: {"))
        eventually(lambda: any(i["running"] for i in cluster.control.instances()), "it runs")
    request_id = json.loads(first.removeprefix("data: "))["id"]
    eventually(lambda: bool(cluster.outcome(request_id).get("finish_reason")), "its end is known")
    assert cluster.outcome(request_id)["finish_reason"] == "abort"
    eventually(lambda: all(not i["running"] for i in cluster.control.instances()), "aborted on the workers")
    cluster.wait_nothing_held()


def test_the_journal_replays_to_the_same_decisions(cluster: Running, prompts: Cut, tmp_path: Path) -> None:
    placed = {cluster.complete(prompts(60 + i, 100), 4)["id"] for i in range(3)}

    def recorded() -> set[str]:
        shutil.copytree(cluster.local.options.journal, tmp_path, dirs_exist_ok=True)
        replays = [replay_file(file) for file in journal.files(tmp_path)]
        assert all(r.identical for r in replays), [r.differences for r in replays]
        assert sum(r.events for r in replays) > len(placed)
        return {d.request_id for r in replays for d in r.decisions}

    eventually(lambda: placed <= recorded(), "the decisions are in the journal")


def test_kvctl_shows_it(cluster: Running, prompts: Cut) -> None:
    text = "import json\n" * 200
    answer = cluster.complete(text, 4)

    def kvctl(*arguments: str) -> dict:
        command = [sys.executable, "-m", "kvpool.cli.kvctl", *arguments, "--json"]
        command += ["--scheduler", cluster.local.scheduler_address]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=2 * PATIENCE_S)
        shown: dict = json.loads(done.stdout)
        return shown

    # Publishing goes on behind the answer.
    eventually(lambda: cluster.blocks_on_node() >= 5, "blocks on the node")
    eventually(lambda: not any(cluster.control.held().values()), "nothing is being written")
    eventually(lambda: bool(cluster.outcome(answer["id"]).get("finish_reason")), "its end is known")
    eventually(lambda: kvctl("inspect", "--text", text)["covered_blocks"] >= 1, "blocks are in the directory")
    assert kvctl("status")["instances_alive"] == 3
    assert kvctl("nodes")["nodes"][0]["stats"]["blocks"] > 0
    assert {w["info"]["role"] for w in kvctl("workers")["workers"]} == {"prefill", "decode"}
    blocks = kvctl("blocks", "--limit", "5")["blocks"]
    assert len(blocks) == 5 and all(b["state"] == "readable" for b in blocks)
    explained = kvctl("explain", answer["id"])
    assert explained["outcome"]["ttft_us"] > 0 and explained["candidates"]
    assert kvctl("inspect", "--text", text)["blocks"][0]["held_by"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["status", "--scheduler", "127.0.0.1:1"], 3, "no scheduler answers at 127.0.0.1:1"),
        (["explain", "no-such-request"], 1, "no-such-request"),
        (["blocks", "--node", "elsewhere"], 1, "nodes of this cluster: node-"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_kvctl_errors_say_what_to_do(cluster: Running, arguments: list[str], code: int, words: str) -> None:
    command = [sys.executable, "-m", "kvpool.cli.kvctl", *arguments]
    if "--scheduler" not in arguments and arguments[0] != "frobnicate":
        command += ["--scheduler", cluster.local.scheduler_address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
    assert done.returncode == code
    assert words in done.stderr and "Traceback" not in done.stderr
